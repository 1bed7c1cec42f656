"""Weights that no training leaves behind: a head that holds them is whole by its shapes, and of no use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch


class Nonsense(NamedTuple):
    tensors: int  # that were looked at
    matrices: int  # among them
    not_finite: list[str]
    zero: list[str]  # matrices of nothing else

    @property
    def drafts_nothing(self) -> bool:
        """One value that isn't finite spoils every draft; matrices of zeros do only together."""
        return bool(self.not_finite) or len(self.zero) == self.matrices

    def __str__(self) -> str:
        """For a sentence that begins with the head; empty if there is nothing to say."""
        faults = ((self.not_finite, "values that are not finite"), (self.zero, "nothing but zeros"))
        said = [
            f"{what} in {len(names)} of its {self.tensors} tensors, the first of them {names[0]}"
            for names, what in faults
            if names
        ]
        return f"has {', and '.join(said)}" if said else ""


def find_nonsense(tensors: Iterable[tuple[str, torch.Tensor]]) -> Nonsense:
    """Waits for the tensors' device once, behind the last of them."""
    names, matrices, found = [], 0, []
    for name, tensor in tensors:
        names.append(name)
        matrices += tensor.ndim > 1
        zero = ~tensor.any() if tensor.ndim > 1 else tensor.new_zeros((), dtype=torch.bool)  # a bias may well be 0
        found.append(torch.stack([~tensor.isfinite().all(), zero]))
    broken = dict(zip(names, torch.stack(found).tolist(), strict=True)) if found else {}
    not_finite = [name for name, (bad, _) in broken.items() if bad]
    return Nonsense(len(names), matrices, not_finite, [name for name, (_, zero) in broken.items() if zero])
