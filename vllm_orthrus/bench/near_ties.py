"""When two greedy texts of one model may differ: only where its two best tokens are nearly tied.

    deficit(token) = largest logit - logit(token)          as the plain engine saw them
    near tie: the other text goes on with a token whose deficit is below the bound

One token at a time and sixteen at a time are other matrix products, which add in another order. How far that moves the
difference of two logits was measured with the tiny trained model, one row against sixteen, at 3,900 places of its
answers: at most 2.7e-5 in float32 and 0.25 in bfloat16, with logits up to 22. The bounds leave room for other orders of
adding, and hold few places: none of those 3,900 in float32, 5 in 100 in bfloat16. A fault in the engine moves logits by
whole units, and parts texts where nothing is tied.

In float32 this presumes float32 products: with attention in TF32 the same logits move by 1.6e-2.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

BOUNDS = {"float32": 1e-3, "bfloat16": 0.5}
CLOSE = 1.0  # deficits that engines report: more than any bound, so that a red comparison can say by how much

Close = Mapping[int, Mapping[int, float]]  # by place in the text, then by token: deficits below CLOSE


def deficits(tokens: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Of tokens and their logits at one place, those that come close to the best."""
    logits = dict(tokens)
    best = max(logits.values())
    return {token: best - logit for token, logit in logits.items() if best - logit < CLOSE}


class Parting(NamedTuple):
    """Where two texts part for the first time. What follows are answers to different questions."""

    place: int
    deficit: float | None  # of the other text's token; None: not close to the best, or one text just ends

    def within(self, bound: float) -> bool:
        return self.deficit is not None and self.deficit < bound

    def __str__(self) -> str:
        found = f"more than {CLOSE}" if self.deficit is None else f"{self.deficit:.1e}"
        return f"at token {self.place}, {found} below the best logit"


def parting(plain: Sequence[int], close: Close, other: Sequence[int]) -> Parting | None:
    """Where another text leaves the plain one, if it does."""
    for place, (wanted, said) in enumerate(zip(plain, other, strict=False)):
        if wanted != said:
            return Parting(place, close.get(place, {}).get(said))
    # An answer ends with the token that ends it, so one that merely stops earlier is no tie of anything.
    return None if len(plain) == len(other) else Parting(min(len(plain), len(other)), None)


def ties(close: Close, bound: float) -> int:
    """Places where another token than the best comes within the bound."""
    return sum(sum(deficit < bound for deficit in tokens.values()) > 1 for tokens in close.values())
