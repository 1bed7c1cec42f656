"""Which draft blocks a verification carries, and which of them its outcome makes useful.

A request's known anchor stands at position p, its drafts d1..dn behind it. A **hypothesis** (a, c) says "position p+a+1
holds token c" and stands for the block [c, MASK, ...] at p+a+1 with the prefix p+a+1:

    (-1, anchor)       the exact block of the known anchor
    (a, d_{a+1})       the block of a draft: useful once more than a drafts were accepted
    (a, c)             the exact block after the outcome "a drafts accepted, then bonus c"

After the outcome "a* accepted, bonus b" every hypothesis that names a token which really stands there is usable; its
rows from offset = a* - a on predict what follows b. Offset 0 is a **hit**: the very rows of a separate draft pass.
Blocks with a larger offset didn't know the bonus; what is left of them is a **tail**. The newest usable block is taken,
and if there is none, the block that the drafts came from stays at hand. With P(a) the chance that exactly a drafts are
accepted, P(c | a) that of the bonus and V(offset) the worth of drafting from such a row on, a set of blocks is worth

    sum_a P(a) * (covered_a * V(0) + (1 - covered_a) * V(smallest usable offset after a)),   covered_a = sum of P(c | a)

choose.py takes one hypothesis of greatest gain after another, and match.py finds the newest usable one.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

NONE = -2  # in Hypotheses.accepted: no block


class Hypotheses(NamedTuple):
    """Blocks in the order of choice: [token, MASK, ...] at p + accepted + 1, behind everything before it."""

    accepted: Tensor  # [R, H] int64; -1: the known anchor's block; NONE: no block
    token: Tensor  # [R, H] int64


def count_covered(hypotheses: Hypotheses, drafts: Tensor, real: Tensor, accepted: Tensor) -> Tensor:
    """[R] bool: some hypothesis was an exact block after `accepted` [R] of the `real` [R] drafts [R, K].

    Tells the two kinds of miss apart: no exact block after so many drafts, or only such for another bonus. The block of
    the very draft that was rejected is not an exact block.
    """
    at = accepted.clamp(0, drafts.shape[1] - 1)[:, None]
    other = (hypotheses.token != drafts.gather(1, at)) | (accepted >= real)[:, None]
    return ((hypotheses.accepted == accepted[:, None]) & other).any(1)
