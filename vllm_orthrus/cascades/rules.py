"""The distribution that a speculative cascade follows (Narasimhan et al., "Faster Cascades via Speculative Decoding",
arXiv 2405.19261).

p is the AR view's distribution, q that of a draft row, both after temperature. A rule says which tokens v may be left
to the draft, r(v) = 0, and for which the AR view is asked, r(v) = 1. What the text follows is then

    pi(v) = q(v) * (1 - r(v)) + p(v) * eta,    eta = sum over u of q(u) * r(u)

The first three rules decide for all tokens at once, so that pi is either q or p:

    chow       r = 1 if max q < 1 - alpha
    diff       r = 1 if max q < max p - alpha
    opt        r = 1 if max q < max p - alpha * D_TV(p, q),    D_TV = sum over u of max(p(u) - q(u), 0)

the others for each token:

    token_v1   r(v) = 1 if q(v) < max p - alpha
    token_v2   r(v) = 1 if p(v) < max p - alpha
    token_v3   r(v) = 1 if p(v) < max p * (1 - alpha)
    relaxed    r(v) = 1 if p(v) is not among the k greatest, or p(v) < ratio * max p

`relaxed` is not the paper's: it is what other engines accept drafts by, with a distribution to it. More alpha leaves
more to the draft.

What p forbids, p(v) = 0, stays forbidden: q is first restricted to what p allows, and normalised. Where nothing is left
of it, pi = p.

Greedy requests have no temperature to draw with. Their rule looks at p and q of temperature 1, and pi is all on one
token: q's likeliest if the rule leaves it to the draft, else p's.

    draft x ~ q; accept it with probability min(1, pi(x) / q(x)); else draw from norm(max(pi - q, 0))

leaves the output distributed as pi. A token with r(x) = 0 is always accepted, for there pi(x) >= q(x).

All distributions are [..., V]; knobs have a last dimension of one.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Knobs(NamedTuple):
    """What rules are set with. Each takes its own: k and ratio are those of `relaxed`, alpha that of all others."""

    alpha: Tensor  # [..., 1]
    k: Tensor  # [..., 1], whole numbers up to MOST_K
    ratio: Tensor  # [..., 1]


MOST_K = 64

Rule = Callable[[Tensor, Tensor, Knobs], Tensor]
"""Takes p, q and knobs. Says where r = 0, for all tokens at once [..., 1] or for each [..., V]."""


def chow(p: Tensor, q: Tensor, knobs: Knobs) -> Tensor:
    """max q >= 1 - alpha: the draft is sure enough of itself."""
    return _greatest(q) >= 1 - knobs.alpha


def diff(p: Tensor, q: Tensor, knobs: Knobs) -> Tensor:
    """max q >= max p - alpha: the draft is nearly as sure as the AR view."""
    return _greatest(q) >= _greatest(p) - knobs.alpha


def opt(p: Tensor, q: Tensor, knobs: Knobs) -> Tensor:
    """max q >= max p - alpha * D_TV(p, q): as `diff`, and what asking costs grows with how often it would reject."""
    return _greatest(q) >= _greatest(p) - knobs.alpha * (p - q).clamp(min=0).sum(-1, keepdim=True)


def token_v1(p: Tensor, q: Tensor, knobs: Knobs) -> Tensor:
    """q(v) >= max p - alpha."""
    return q >= _greatest(p) - knobs.alpha


def token_v2(p: Tensor, q: Tensor, knobs: Knobs) -> Tensor:
    """p(v) >= max p - alpha: among the AR view's own choices, by distance."""
    return p >= _greatest(p) - knobs.alpha


def token_v3(p: Tensor, q: Tensor, knobs: Knobs) -> Tensor:
    """p(v) >= max p * (1 - alpha): among the AR view's own choices, by proportion."""
    return p >= _greatest(p) * (1 - knobs.alpha)


def relaxed(p: Tensor, q: Tensor, knobs: Knobs) -> Tensor:
    """p(v) >= ratio * max p, and p(v) at least the k-th greatest."""
    ranked = p.topk(min(MOST_K, p.shape[-1]), dim=-1).values  # as many whatever k is: nobody waits to know it
    least = ranked.gather(-1, (knobs.k.long().expand_as(_greatest(p)) - 1).clamp(max=ranked.shape[-1] - 1))
    return (p >= least) & (p >= _greatest(p) * knobs.ratio)


RULES: dict[str, Rule] = {rule.__name__: rule for rule in (chow, diff, opt, token_v1, token_v2, token_v3, relaxed)}
NEEDS_Q = ("chow", "diff", "opt", "token_v1")  # more of q than which token was drawn


def _greatest(x: Tensor) -> Tensor:
    return x.amax(-1, keepdim=True)


class Judged(NamedTuple):
    q: Tensor  # [..., V], restricted to what p allows; zeros where nothing is left
    kept: Tensor  # [..., V] bool: r(v) = 0, and p allows v


def judge(rule: str, p: Tensor, q: Tensor, knobs: Knobs) -> Judged:
    allowed = p > 0
    q = torch.where(allowed, q, 0)
    left = q.sum(-1, keepdim=True)
    q = torch.where(left > 0, q / left, 0)
    return Judged(q, RULES[rule](p, q, knobs) & allowed & (left > 0))


def target(p: Tensor, judged: Judged) -> Tensor:
    """pi(v) = q(v) * (1 - r(v)) + p(v) * eta."""
    kept = torch.where(judged.kept, judged.q, 0)
    eta = (judged.q - kept).sum(-1, keepdim=True)
    nothing = judged.q.sum(-1, keepdim=True) == 0
    return torch.where(nothing, p, kept + p * eta)


def greedy_choice(judged: Judged) -> tuple[Tensor, Tensor]:
    """[...] q's likeliest token, and whether pi is all on it. Where not, pi is all on p's likeliest."""
    choice = judged.q.argmax(-1)
    return choice, judged.kept.gather(-1, choice[..., None]).squeeze(-1)
