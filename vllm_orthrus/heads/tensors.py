"""The tensors of a head: what they are called, and which a complete one has.

The names are the published ones. A head's tensor is called like the base's that it stands beside, with `_diff` behind
the part:

    model.layers.3.self_attn.k_proj.weight                the base's
    model.layers.3.self_attn.k_proj_diff.weight           the head's
    model.layers.3.self_attn.k_proj_diff.weight_scale     its scales, where projections are stored in eight bits
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from vllm_orthrus.heads.base import BaseShape
from vllm_orthrus.heads.errors import HeadError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
SCALE = "weight_scale"  # of a projection in eight bits, one for each output channel

_MARK = "_diff"
_NAME = re.compile(
    rf"model\.layers\.(\d+)\.self_attn\.({'|'.join((*PROJECTIONS, *NORMS))}){_MARK}\.(weight|bias|{SCALE})", re.ASCII
)


class Place(NamedTuple):
    """Where a tensor belongs in a head."""

    layer: int
    part: str
    kind: str  # "weight", "bias" or "weight_scale"


def tensor_name(layer: int, part: str, kind: str = "weight") -> str:
    return f"model.layers.{layer}.self_attn.{part}{_MARK}.{kind}"


def tensor_place(name: str) -> Place:
    """The place that `tensor_name` made this name of."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise HeadError(
            f"{name!r} is not the name of a head's tensor, such as {tensor_name(0, 'q_proj')!r}. Rename it so, or "
            "leave it out."
        )
    layer, part, kind = found.groups()
    return Place(int(layer), part, kind)


def is_head_tensor(name: str) -> bool:
    """Whether a tensor of a merged checkpoint is the head's, so named that `tensor_place` knows it or not."""
    return f"{_MARK}." in name


def is_projection(name: str) -> bool:
    """Whether this is the matrix of a head's projection, which may be stored in eight bits."""
    return name.endswith(tuple(f".{part}{_MARK}.weight" for part in PROJECTIONS))


def base_tensor_name(name: str) -> str:
    """The base's tensor that this one of the head stands beside."""
    return name.replace(f"{_MARK}.", ".")


def expected_tensors(shape: BaseShape, quantized: bool = False) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a complete head for this base has."""
    q, kv, hidden = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim, shape.hidden_size
    weights = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    biased = ("q_proj", "k_proj", "v_proj") * shape.qkv_bias + ("o_proj",) * shape.o_bias
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in range(shape.num_layers):
        tensors |= {tensor_name(layer, part): size for part, size in weights.items()}
        if quantized:
            tensors |= {tensor_name(layer, part, SCALE): (size[0], 1) for part, size in weights.items()}
        tensors |= {tensor_name(layer, part, "bias"): weights[part][:1] for part in biased}
        tensors |= {tensor_name(layer, part): (shape.head_dim,) for part in NORMS if shape.qk_norm}
    return tensors


def check_tensors(found: Mapping[str, tuple[int, ...]], shape: BaseShape, source: str, quantized: bool = False) -> None:
    """Raise unless these are exactly the tensors that a head for this base has, each in its shape."""
    expected = expected_tensors(shape, quantized)
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} has no place in this base" for name in found if name not in expected]
    faults += [
        f"{name} is {found[name]}, not {size}" for name, size in expected.items() if found.get(name, size) != size
    ]
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise HeadError(f"{source}: not a complete head for {shape.model_type}: {'; '.join(faults[:5])}{more}.")
