"""What lies on the device from one step to the next, and must outlast a deep sleep.

`sleep(level=2)` gives back all memory that was taken while models were loaded: whoever asks for it brings new weights
of the target. Nobody brings the head's again, nor what drafting remembers, which is made while the head is loaded so
that vLLM counts it. vLLM carries a drafter's buffers through on the host; `DiffusionView.named_buffers` names these.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def tensors_in(holder: Any, at: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Of our own objects and of tuples in them, by their path. Modules are not looked into."""
    if isinstance(holder, torch.Tensor):
        yield at, holder
        return
    parts: dict[str, Any] = {}
    if isinstance(holder, tuple):
        parts = dict(zip(getattr(holder, "_fields", map(str, range(len(holder)))), holder, strict=True))
    elif not isinstance(holder, nn.Module) and type(holder).__module__.startswith(__name__.partition(".")[0]):
        parts = vars(holder)
    for name, part in parts.items():
        yield from tensors_in(part, f"{at}.{name}")
