"""A trained Qwen3 base and its head in a larger shape: the same function, so real acceptance at a large model's cost.

    vllm-orthrus widen examples/tiny-orthrus/base examples/tiny-orthrus/head FOLDER --like Qwen3-8B

What there is more of is zero, and what zeros change is undone:

    RMSNorm     n values in N places have n/N of their mean square: weights times sqrt(n/N), epsilon times n/N
    heads       query head h of group g stays in group g; zero columns of o_proj keep the others out
    head_dim    value i goes where its rotary frequency is, i * D/d in each half; as scores are divided by sqrt(D)
                instead of sqrt(d), k_norm takes sqrt(d/D) and q_norm takes nothing
    layers      those behind the trained ones have zero o_proj and down_proj, and add nothing
    vocabulary  one spare hidden value is a small constant, from which lm_head makes a logit far below any other

Two things are not exact. There is one epsilon, so that of q_norm and k_norm is off by a part of 1e-6; and in bfloat16
the scaled norms are rounded. Products of zeros draw less power than others, so where power limits a GPU's clock, times
are a little too good.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from vllm_orthrus.heads import (
    WEIGHTS,
    WEIGHTS_INDEX,
    BaseShape,
    HeadConfig,
    HeadError,
    expected_tensors,
    named_parts,
    open_head,
    open_selector,
    save_head,
    save_selector,
    tensor_place,
    write_json,
    write_tensors,
)
from vllm_orthrus.heads.files import CONFIG, open_tensors, read_json

CONSTANT = 2.0**-10  # of the spare hidden value: its square is nothing beside the others'
LOUD = 2.0**12  # what the last norm multiplies it by, and lm_head once more, to below every real logit

AXES = {
    **dict.fromkeys(("embed_tokens", "lm_head"), ("vocabulary", "hidden")),
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm", "norm"), ("hidden",)),
    **dict.fromkeys(("q_norm", "k_norm"), ("dim",)),
    "q_proj": ("q", "hidden"),
    **dict.fromkeys(("k_proj", "v_proj"), ("kv", "hidden")),
    "o_proj": ("hidden", "q"),
    **dict.fromkeys(("gate_proj", "up_proj"), ("inner", "hidden")),
    "down_proj": ("hidden", "inner"),
}
IN_LAYER = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
KNOWN = {  # layers, hidden, intermediate, query heads; all have 8 heads of 128 in their cache
    "Qwen3-0.6B": (28, 1024, 3072, 16),
    "Qwen3-1.7B": (28, 2048, 6144, 16),
    "Qwen3-4B": (36, 2560, 9728, 32),
    "Qwen3-8B": (36, 4096, 12288, 32),
    "Qwen3-14B": (40, 5120, 17408, 40),
    "Qwen3-32B": (64, 5120, 25600, 64),
}
NORMS_OF_LAYER = ("input_layernorm", "post_attention_layernorm")


def shape_like(like: str, trained: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a known model, by name; or of LAYERSxHIDDEN in Qwen3's proportions.

    The latter keeps vocabulary and head_dim as trained.
    """
    if like in KNOWN:
        layers, hidden, inner, heads = KNOWN[like]
        changed = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    elif match := re.fullmatch(r"(\d+)x(\d+)", like):
        layers, hidden = int(match[1]), int(match[2])
        kept = max(trained["num_key_value_heads"], hidden // (2 * trained["head_dim"]))
        inner, heads, changed = 3 * hidden, 2 * kept, {"num_key_value_heads": kept}
    else:
        raise HeadError(f"--like {like} is neither LAYERSxHIDDEN nor one of {', '.join(KNOWN)}. Give one of these.")
    return {
        **trained,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "layer_types": ["full_attention"] * layers,
        **changed,
    }


class Shape(NamedTuple):
    base: BaseShape
    inner: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        return cls(BaseShape.from_config(config), config["intermediate_size"])

    @property
    def group(self) -> int:
        """Query heads per head of the cache."""
        return self.base.num_heads // self.base.num_kv_heads

    def size(self, axis: str) -> int:
        base = self.base
        return {
            "hidden": base.hidden_size,
            "inner": self.inner,
            "vocabulary": base.vocab_size,
            "q": base.num_heads * base.head_dim,
            "kv": base.num_kv_heads * base.head_dim,
            "dim": base.head_dim,
        }[axis]


class Widening:
    """Where each weight of a trained base goes in a larger one."""

    def __init__(
        self, trained: Mapping[str, Any], shape: Mapping[str, Any], dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        self.old, self.new, self.dtype, self.device = Shape.of(trained), Shape.of(shape), dtype, device
        self._refuse(trained, shape)
        kept = {name: trained[name] for name in ("rope_parameters", "max_position_embeddings", "eos_token_id")}
        self.config = {
            **shape,
            **kept,
            "rms_norm_eps": trained["rms_norm_eps"] * self.old.base.hidden_size / self.new.base.hidden_size,
            "tie_word_embeddings": False,
            "dtype": str(dtype).removeprefix("torch."),
        }

    def _refuse(self, trained: Mapping[str, Any], shape: Mapping[str, Any]) -> None:
        old, new = self.old, self.new
        sizes = {axis: (old.size(axis), new.size(axis)) for axis in ("hidden", "inner", "vocabulary")}
        sizes["layers"] = (old.base.num_layers, new.base.num_layers)
        sizes["heads of the cache"] = (old.base.num_kv_heads, new.base.num_kv_heads)
        sizes["query heads per head of the cache"] = (old.group, new.group)
        narrower = [f"{what} ({was} to {now})" for what, (was, now) in sizes.items() if now < was]
        if narrower:
            raise HeadError(f"a model can only be widened, and this shape has less of: {'; '.join(narrower)}.")
        if new.base.head_dim % old.base.head_dim:
            raise HeadError(
                f"head_dim={new.base.head_dim} has no rotary frequencies of head_dim={old.base.head_dim}. "
                "Give a multiple of that."
            )
        if new.base.vocab_size > old.base.vocab_size and new.base.hidden_size == old.base.hidden_size:
            raise HeadError("a larger vocabulary takes a hidden value to spare. Widen hidden_size too.")
        if {trained["model_type"], shape["model_type"]} != {"qwen3"} or old.base.qkv_bias or old.base.o_bias:
            raise HeadError("only Qwen3 models without biases are widened: others lay out their norms differently.")

    def places(self, axis: str) -> Tensor:
        """Where the old values of an axis go."""
        old, new = self.old.base, self.new.base
        if axis == "dim":
            half = torch.arange(old.head_dim // 2) * (new.head_dim // old.head_dim)
            return torch.cat((half, half + new.head_dim // 2))
        if axis in ("q", "kv"):
            heads = torch.arange(old.num_heads if axis == "q" else old.num_kv_heads)
            if axis == "q":
                heads = heads // self.old.group * self.new.group + heads % self.old.group
            return (heads[:, None] * new.head_dim + self.places("dim")).flatten()
        return torch.arange(self.old.size(axis))

    def scale(self, part: str) -> float:
        if part == "k_norm":
            return math.sqrt(self.old.base.head_dim / self.new.base.head_dim)
        return math.sqrt(self.old.base.hidden_size / self.new.base.hidden_size) if AXES[part] == ("hidden",) else 1.0

    def widen(self, part: str, trained: Tensor | None) -> Tensor:
        """A weight in its new size; where there is no trained one, that of a layer which adds nothing."""
        axes = AXES[part]
        wide = torch.zeros([self.new.size(axis) for axis in axes], dtype=self.dtype, device=self.device)
        if trained is not None:
            values = (trained.double() * self.scale(part)).to(self.device, self.dtype)
            where = torch.meshgrid([self.places(axis).to(self.device) for axis in axes], indexing="ij")
            wide[where] = values
        return wide

    def base(self, trained: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """What is outside the layers, then layer by layer: one is all that is ever held."""
        spare, vocabulary = self.old.base.hidden_size, self.old.base.vocab_size
        embedding = trained["model.embed_tokens.weight"]
        outside = {
            "model.embed_tokens.weight": self.widen("embed_tokens", embedding),
            "model.norm.weight": self.widen("norm", trained["model.norm.weight"]),
            "lm_head.weight": self.widen("lm_head", trained.get("lm_head.weight", embedding)),
        }
        if self.new.base.vocab_size > vocabulary:
            outside["model.embed_tokens.weight"][:, spare] = CONSTANT
            outside["model.norm.weight"][spare] = LOUD
            outside["lm_head.weight"][vocabulary:, spare] = -LOUD
        yield outside
        for layer in range(self.new.base.num_layers):
            names = [(f"{module}.{part}", part) for module, parts in IN_LAYER.items() for part in parts]
            names += [(part, part) for part in NORMS_OF_LAYER]
            paths = {f"model.layers.{layer}.{name}.weight": part for name, part in names}
            yield {path: self.widen(part, trained.get(path)) for path, part in paths.items()}

    def head(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = {name: tensor_place(name).part for name in expected_tensors(self.new.base)}
        return {name: self.widen(part, trained.get(name)) for name, part in parts.items()}

    def selector(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Reads what it read: the values that a larger embedding and state have more of count nothing."""
        more = self.new.base.hidden_size - self.old.base.hidden_size
        return {part: functional.pad(matrix, (0, more)).to(self.device, self.dtype) for part, matrix in parts.items()}


def widen_facts(base: Path, shape: Mapping[str, Any], folder: Path, dtype: torch.dtype) -> Widening:
    """The config alone, for whoever makes the weights where they are needed."""
    widening = Widening(read_config(base), shape, dtype)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", widening.config)
    return widening


def widen_base(base: Path, shape: Mapping[str, Any], folder: Path, dtype: torch.dtype) -> Widening:
    widening = widen_facts(base, shape, folder, dtype)
    file_of: dict[str, str] = {}
    for number, tensors in enumerate(widening.base(read_tensors(base / WEIGHTS))):
        file = f"model-{number:05}.safetensors"
        write_tensors(folder / file, tensors)
        file_of |= dict.fromkeys(tensors, file)
    write_json(folder / WEIGHTS_INDEX, {"metadata": {}, "weight_map": file_of})
    return widening


def widen_head(head: Path, widening: Widening, folder: Path) -> None:
    checkpoint = open_head(head)
    facts = checkpoint.config
    selector = checkpoint.selector
    shape = None if selector is None else selector.shape
    config = HeadConfig.for_base(widening.config, facts.block_size, facts.mask_token_id, None, selector=shape)
    beside = {} if selector is None else named_parts(widening.selector(dict(selector.tensors())))
    save_head(folder, widening.head(dict(checkpoint.tensors())) | beside, config)


def widen_selector(selector: Path, widening: Widening, folder: Path) -> None:
    """One in a folder of its own, or that of a head alone."""
    found = open_selector(selector)
    save_selector(folder, widening.selector(dict(found.tensors())), found.shape, widening.config)


def read_config(base: Path) -> dict[str, Any]:
    return read_json(base / CONFIG)


def read_tensors(file: Path) -> dict[str, Tensor]:
    with open_tensors(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
