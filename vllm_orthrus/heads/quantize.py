"""Heads whose projections are stored in eight bits, which halves what every forward streams of them.

    scale  = max |weight| / 448       of each row, which is an output channel; float32, [out, 1]
    stored = weight / scale           to the nearest E4M3 number, [out, in]
    weight = stored * scale           what it means wherever it is computed with

Norms and biases stay as they are. Scales are of whole rows, also where tensor parallelism cuts them, so that every
number of ranks computes with the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, get_args

import torch

from vllm_orthrus.heads.errors import HeadError
from vllm_orthrus.heads.tensors import SCALE, is_projection

Quantization = Literal["fp8"]
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of a row of zeros

Tensors = Iterable[tuple[str, torch.Tensor]]


class Quantized(NamedTuple):
    stored: torch.Tensor  # [out, in] in E4M3
    scale: torch.Tensor  # [out, 1] in float32


def quantize(weight: torch.Tensor) -> Quantized:
    scale = (weight.abs().amax(1, keepdim=True).float() / LARGEST).clamp_min(SMALLEST_SCALE)
    return Quantized((weight.float() / scale).to(FP8), scale)


def dequantize(quantized: Quantized) -> torch.Tensor:
    return quantized.stored.float() * quantized.scale


def quantized(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """A head's tensors, each projection as eight bits and its scales behind it."""
    for name, tensor in tensors:
        if is_projection(name):
            stored, scale = quantize(tensor)
            yield name, stored
            yield scale_name(name), scale
        else:
            yield name, tensor


def dequantized(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """The other way; a weight and its scales may come in any order, and what was never quantized as it is."""
    waiting: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if tensor.dtype != FP8 and not name.endswith(f".{SCALE}"):
            yield name, tensor
            continue
        weight = f"{name.removesuffix(SCALE)}weight" if name.endswith(f".{SCALE}") else name
        waiting[name] = tensor
        if weight in waiting and scale_name(weight) in waiting:
            yield weight, dequantize(Quantized(waiting.pop(weight), waiting.pop(scale_name(weight))))
    if waiting:
        raise HeadError(f"the head has {min(waiting)} without its other half, weights or scales. Convert it anew.")


def scale_name(weight: str) -> str:
    """The tensor that holds the scales of this one."""
    return weight.removesuffix("weight") + SCALE
