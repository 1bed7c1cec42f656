"""What is remembered of requests, made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_orthrus.kernels import chances
from vllm_orthrus.kernels.hypotheses import NONE
from vllm_orthrus.kernels.slots import Remembered, Slots


class Sizes(NamedTuple):
    slots: int = 6
    drafts: int = 5
    hypotheses: int = 4
    ranks: int = chances.CANDIDATES
    vocabulary: int = 3  # so few tokens that outcomes are often foreseen


def whole_numbers(seed: int) -> Callable[..., Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return lambda low, high, *shape: torch.randint(low, high, shape, generator=gen)


def remembered(size: Sizes, seed: int) -> Slots:
    """The last place is nobody's."""
    gen, random = torch.Generator().manual_seed(seed), whole_numbers(seed)

    def real(*shape: int) -> Tensor:
        return torch.rand(shape, generator=gen)

    places, counts = (size.slots + 1,), (2, size.ranks, len(chances.EDGES) + 1)
    share = real(*places, size.drafts + 1, size.ranks)
    tried, offered = 20 * real(2, chances.KINDS, counts[2]), 20 * real(*counts)
    drafts = chances.Drafts(
        random(0, size.vocabulary, *places, size.drafts),
        random(0, size.drafts + 1, *places),
        random(0, 3, *places),
        real(*places, size.drafts) ** 0.3,
        random(0, size.vocabulary, *places, size.drafts + 1, size.ranks),
        torch.where(share > 0.3, share, 0),
    )
    return Slots(
        random(0, size.drafts, *places),
        random(0, 2, *places).bool(),
        Remembered(
            random(0, 99, *places),
            random(NONE, size.drafts + 1, *places, size.hypotheses),
            random(0, size.vocabulary, *places, size.hypotheses),
        ),
        drafts,
        chances.History(5 * real(*places), 5 * real(*places)),
        chances.Calibration(tried, tried * real(*tried.shape), offered, offered * real(*counts)),
    )


def parts(slots: Slots) -> dict[str, Tensor]:
    """Each by its name, without what is nobody's."""
    own = {"offset": slots.offset, "sampled": slots.sampled}
    own |= {f"drafts.{name}": part for name, part in slots.drafts._asdict().items()}
    own |= {f"hypotheses.{name}": part for name, part in slots.hypotheses._asdict().items()}
    own |= {f"history.{name}": part for name, part in slots.history._asdict().items()}
    return {name: part[:-1] for name, part in own.items()} | slots.calibration._asdict()


def changed(slots: Slots, change: Callable[[Tensor], Tensor]) -> Slots:
    return Slots(
        change(slots.offset),
        change(slots.sampled),
        *(type(part)(*map(change, part)) for part in slots[2:]),
    )


def assert_same(actual: Slots, expected: Slots) -> None:
    wanted = parts(expected)
    for name, part in parts(actual).items():
        if part.is_floating_point():
            torch.testing.assert_close(
                part, wanted[name], rtol=1e-5, atol=1e-6, msg=lambda said, at=name: f"{at}: {said}"
            )
        else:
            assert torch.equal(part, wanted[name]), name
