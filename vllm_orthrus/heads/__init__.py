"""What an Orthrus head is, which head belongs to which base, and how a head lies on disk.

A head is, for every decoder layer of a frozen base, a second set of attention weights (the diffusion view). Their
names are the published ones, `model.layers.N.self_attn.{q,k,v,o}_proj_diff.weight` and `{q,k}_norm_diff.weight`, in
either of two layouts:

- *merged*: one checkpoint holds base and head (`chiennv/Orthrus-Qwen3-*`); only its shards with `_diff` tensors are
  ever opened;
- *head-only*: the `_diff` tensors alone, with a `config.json` in the `speculators` convention, which names the base
  (there called the verifier).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")

_ARCHITECTURES = {
    "qwen3": ["Qwen3ForCausalLM"],
    "qwen2": ["Qwen2ForCausalLM"],
    "llama": ["LlamaForCausalLM"],
    "mistral": ["MistralForCausalLM"],
}
_MERGED_ONLY = ("block_size", "mask_token_id", "auto_map", "use_cache")  # what merging adds to a base's config

BUILTIN_HEADS: Mapping[str, str] = {
    "Qwen/Qwen3-1.7B": "chiennv/Orthrus-Qwen3-1.7B",
    "Qwen/Qwen3-4B": "chiennv/Orthrus-Qwen3-4B",
    "Qwen/Qwen3-8B": "chiennv/Orthrus-Qwen3-8B",
}
HEAD_MAP_VARIABLE = "VLLM_ORTHRUS_HEADS"

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


class HeadError(ValueError):
    """A head that cannot be found, read, or used with the base it was asked to serve."""


# The base


def _field(config: Any, name: str, default: Any = None) -> Any:
    """One field of a base config, given as a transformers config object or as a parsed `config.json`."""
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return default if value is None else value


def _rope(config: Any) -> dict[str, Any]:
    """Rotary settings, whether written as transformers 5 does (`rope_parameters`) or as older checkpoints do."""
    rope = dict(_field(config, "rope_parameters") or {})
    if not rope:
        rope = dict(_field(config, "rope_scaling") or {})
        rope["rope_theta"] = _field(config, "rope_theta", 10000.0)
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    return rope


@dataclass(frozen=True)
class BaseShape:
    """The dimensions of a base that its head must match, tensor by tensor."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool

    @classmethod
    def from_config(cls, config: Any) -> BaseShape:
        """Read the shape off a base's config; raises `HeadError` for a base that no Orthrus head can serve."""
        model_type = _field(config, "model_type", "(none)")
        if model_type not in _ARCHITECTURES:
            raise HeadError(
                f"model_type={model_type!r} is not supported: an Orthrus head needs a dense decoder of one of the "
                f"types {', '.join(_ARCHITECTURES)}. Choose such a base."
            )
        _refuse_sliding_windows(config, model_type)
        heads, hidden = _field(config, "num_attention_heads"), _field(config, "hidden_size")
        attention_bias = bool(_field(config, "attention_bias", False))
        return cls(
            model_type=model_type,
            num_layers=_field(config, "num_hidden_layers"),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=_field(config, "num_key_value_heads", heads),
            head_dim=_field(config, "head_dim", hidden // heads),
            vocab_size=_field(config, "vocab_size"),
            qk_norm=model_type == "qwen3",
            qkv_bias=model_type == "qwen2" or attention_bias,
            o_bias=model_type != "qwen2" and attention_bias,
        )


def _refuse_sliding_windows(config: Any, model_type: str) -> None:
    window = _field(config, "sliding_window")
    if model_type in ("qwen2", "qwen3"):  # these carry a window size that only `use_sliding_window` switches on
        window = window if _field(config, "use_sliding_window", False) else None
    layers = {kind for kind in _field(config, "layer_types", ()) if kind != "full_attention"}
    if window is not None or layers:
        found = f"sliding_window={window}" if window is not None else f"layer_types with {sorted(layers)}"
        raise HeadError(
            f"this base limits attention ({found}), but the diffusion view must see the whole prefix. Use a base with "
            "full attention in every layer, or set `sliding_window` to null in its config.json if no context will ever "
            "be longer than the window."
        )


def base_fingerprint(config: Any) -> str:
    """A short hash of everything in a base's config that changes what its layers compute (not of its weights)."""
    names = ("hidden_act", "intermediate_size", "rms_norm_eps", "tie_word_embeddings")
    facts = {**vars(BaseShape.from_config(config)), "rope": _rope(config)}
    facts |= {name: _field(config, name) for name in names}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


# The head


def is_head_tensor(name: str) -> bool:
    return "_diff." in name


def tensor_name(layer: int, part: str, kind: Literal["weight", "bias"] = "weight") -> str:
    return f"model.layers.{layer}.self_attn.{part}_diff.{kind}"


def expected_tensors(shape: BaseShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a complete head for this base has."""
    q, kv, hidden = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim, shape.hidden_size
    weights = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    biased = ("q_proj", "k_proj", "v_proj") * shape.qkv_bias + ("o_proj",) * shape.o_bias
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in range(shape.num_layers):
        tensors |= {tensor_name(layer, part): size for part, size in weights.items()}
        tensors |= {tensor_name(layer, part, "bias"): weights[part][:1] for part in biased}
        tensors |= {tensor_name(layer, part): (shape.head_dim,) for part in NORMS if shape.qk_norm}
    return tensors


class BaseRef(NamedTuple):
    """Which base a head was trained for."""

    name: str | None
    revision: str | None
    fingerprint: str


@dataclass(frozen=True)
class HeadConfig:
    """The facts beside the tensors.

    `base_config` is the base's own `config.json`, kept so that a head can be checked without its base.
    """

    block_size: int
    mask_token_id: int
    base: BaseRef
    shape: BaseShape
    base_config: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise HeadError(f"block_size={self.block_size} must be at least 1 (the published heads have 32).")
        if not 0 <= self.mask_token_id < self.shape.vocab_size:
            raise HeadError(
                f"mask_token_id={self.mask_token_id} has no embedding row: the base has "
                f"vocab_size={self.shape.vocab_size}. Set mask_token_id to a token of the base's vocabulary that never "
                "occurs in text."
            )

    @property
    def num_drafts(self) -> int:
        """Rows of a block trained to predict: all but the last, except where the block is a single row."""
        return max(1, self.block_size - 1)

    @classmethod
    def for_base(
        cls,
        base_config: Mapping[str, Any],
        block_size: int,
        mask_token_id: int,
        name: str | None,
        revision: str | None = None,
    ) -> HeadConfig:
        ref = BaseRef(name, revision, base_fingerprint(base_config))
        return cls(block_size, mask_token_id, ref, BaseShape.from_config(base_config), dict(base_config))

    @classmethod
    def from_json(cls, config: Mapping[str, Any], source: str) -> HeadConfig:
        """Read a head's `config.json`, merged or head-only, that came from the folder or repository `source`."""
        missing = [key for key in ("block_size", "mask_token_id") if key not in config]
        if missing:
            raise HeadError(
                f"{source}: config.json has no {' and no '.join(missing)}, which every Orthrus head states at its top "
                "level. Give an Orthrus head, or add them."
            )
        if "speculators_config" in config:
            base_config, verifier = config["transformer_layer_config"], config["speculators_config"]["verifier"]
            name, revision = verifier["name_or_path"], verifier.get("revision")
        else:
            base_config = {key: value for key, value in config.items() if key not in _MERGED_ONLY}
            base_config["architectures"] = _ARCHITECTURES.get(config.get("model_type", ""), [])
            name, revision = {head: base for base, head in BUILTIN_HEADS.items()}.get(source), None
        return cls.for_base(base_config, config["block_size"], config["mask_token_id"], name, revision)

    def to_json(self, dtype: torch.dtype) -> dict[str, Any]:
        """The head-only `config.json`: the `speculators` convention, with what Orthrus adds at the top level."""
        proposal = {"proposal_type": "greedy", "speculative_tokens": self.num_drafts}
        architectures = list(self.base_config.get("architectures") or [])
        return {
            "architectures": ["OrthrusHead"],
            "speculators_model_type": "orthrus",
            "block_size": self.block_size,
            "mask_token_id": self.mask_token_id,
            "dtype": str(dtype).removeprefix("torch."),
            "speculators_config": {
                "algorithm": "orthrus",
                "proposal_methods": [proposal],
                "default_proposal_method": "greedy",
                "verifier": {
                    "name_or_path": self.base.name,
                    "architectures": architectures,
                    "revision": self.base.revision,
                    "fingerprint": self.base.fingerprint,
                },
            },
            "transformer_layer_config": dict(self.base_config),
        }

    def check_fits(self, base_config: Any, base_name: str) -> list[str]:
        """Raise unless this head's tensors belong on that base; return what else differs, for a warning."""
        base = BaseShape.from_config(base_config)
        mine, theirs = vars(self.shape), vars(base)
        differing = [f"{key} (head {mine[key]}, base {theirs[key]})" for key in mine if mine[key] != theirs[key]]
        if differing:
            trained_for = f", which was trained for {self.base.name}," if self.base.name else ""
            raise HeadError(
                f"the head{trained_for} does not fit {base_name}: {'; '.join(differing)}. "
                "Give a head trained for this base, or train one with `vllm-orthrus train`."
            )
        if base_fingerprint(base_config) == self.base.fingerprint:
            return []
        mine, theirs = _rope(self.base_config), _rope(base_config)
        where = f"rotary settings (head {mine}, base {theirs})" if mine != theirs else "activation, norms or embeddings"
        return [
            f"{base_name} differs from the base this head was trained for in {where}: expect fewer accepted drafts."
        ]


# Reading


class HeadCheckpoint(NamedTuple):
    """A head on disk: its facts and the file that holds each tensor. `tensors` reads them."""

    source: str
    layout: Literal["merged", "head-only"]
    config: HeadConfig
    files: Mapping[str, Path]

    def tensors(self, device: str | torch.device = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
        """Every head tensor, one at a time, from just the shards that hold any."""
        by_file: dict[Path, list[str]] = {}
        for name, path in self.files.items():
            by_file.setdefault(path, []).append(name)
        for path, names in by_file.items():
            with safe_open(path, framework="pt", device=str(device)) as shard:
                for name in names:
                    yield name, shard.get_tensor(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes from the files' headers, without reading the data."""
        found: dict[str, tuple[int, ...]] = {}
        for path in set(self.files.values()):
            with safe_open(path, framework="pt") as shard:
                found |= {
                    name: tuple(shard.get_slice(name).get_shape()) for name in self.files if self.files[name] == path
                }
        return found

    def check_complete(self) -> None:
        """Raise unless exactly the tensors that this head's base calls for are there, each in its shape."""
        check_tensors(self.shapes(), self.config.shape, self.source)


def check_tensors(found: Mapping[str, tuple[int, ...]], shape: BaseShape, source: str) -> None:
    expected = expected_tensors(shape)
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} has no place in this base" for name in found if name not in expected]
    faults += [
        f"{name} is {found[name]}, not {size}" for name, size in expected.items() if found.get(name, size) != size
    ]
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise HeadError(f"{source}: not a complete head for {shape.model_type}: {'; '.join(faults[:5])}{more}.")


def read_head_config(
    source: str | Path, revision: str | None = None, cache_dir: str | Path | None = None
) -> HeadConfig:
    """A head's facts, without its weights."""
    folder = _Folder(str(source), revision, cache_dir)
    return HeadConfig.from_json(json.loads(folder.file("config.json").read_text()), str(source))


def open_head(source: str | Path, revision: str | None = None, cache_dir: str | Path | None = None) -> HeadCheckpoint:
    """Open a head in a local folder or a Hugging Face repository, in either layout.

    From a repository only `config.json`, the index and the shards with `_diff` tensors are downloaded.
    """
    folder = _Folder(str(source), revision, cache_dir)
    config = json.loads(folder.file("config.json").read_text())
    index = folder.find(WEIGHTS_INDEX)
    if index is not None:
        shard_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        names = [name for name in shard_of if is_head_tensor(name)]
        files = {name: folder.file(shard_of[name]) for name in names}
    else:
        weights = folder.file(WEIGHTS)
        with safe_open(weights, framework="pt") as shard:
            files = {name: weights for name in shard.keys() if is_head_tensor(name)}  # noqa: SIM118 (not a mapping)
    if not files:
        raise HeadError(f"{source} holds no `_diff` tensors. Give a merged or a head-only Orthrus checkpoint.")
    layout: Literal["merged", "head-only"] = "head-only" if "speculators_config" in config else "merged"
    return HeadCheckpoint(str(source), layout, HeadConfig.from_json(config, str(source)), files)


class _Folder(NamedTuple):
    """A local folder, or a repository whose files are downloaded one by one as they are asked for."""

    source: str
    revision: str | None
    cache_dir: str | Path | None

    def find(self, name: str) -> Path | None:
        if Path(self.source).is_dir():
            path = Path(self.source) / name
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(self.source, name, revision=self.revision, cache_dir=self.cache_dir))
        except LocalEntryNotFoundError:  # unreachable and not in the cache: says nothing about what the repository has
            raise
        except EntryNotFoundError:
            return None

    def file(self, name: str) -> Path:
        try:
            path = self.find(name)
        except (OSError, ValueError) as error:
            raise HeadError(
                f"{self.source!r} is neither a folder here nor a repository that can be reached "
                f"({type(error).__name__}: {error}). Check the name, or download it first and give its folder."
            ) from error
        if path is None:
            raise HeadError(f"{self.source} has no {name}: a head needs config.json and .safetensors files.")
        return path


def resolve_head(base: str) -> str | None:
    """The head for a base: the base itself if its folder carries one, else the user's head map, else the built-in one.

    The user's map is a JSON object `{"base": "head", ...}` in the file named by `VLLM_ORTHRUS_HEADS`, by default
    `~/.config/vllm-orthrus/heads.json`; its entries win over the built-in ones.
    """
    if Path(base).is_dir() and _carries_head(Path(base)):
        return base
    return {**BUILTIN_HEADS, **_user_heads()}.get(base)


def _carries_head(folder: Path) -> bool:
    index, weights = folder / WEIGHTS_INDEX, folder / WEIGHTS
    if index.is_file():
        return any(map(is_head_tensor, json.loads(index.read_text())["weight_map"]))
    if not weights.is_file():
        return False
    with safe_open(weights, framework="pt") as shard:
        return any(map(is_head_tensor, shard.keys()))


def _user_heads() -> dict[str, str]:
    named = os.environ.get(HEAD_MAP_VARIABLE)
    settings = Path(os.environ.get("XDG_CONFIG_HOME", "~/.config")).expanduser()
    path = Path(named) if named else settings / "vllm-orthrus" / "heads.json"
    if not path.is_file():
        if named:
            raise HeadError(f"{HEAD_MAP_VARIABLE}={named} names no file. Point it at a JSON file, or unset it.")
        return {}
    try:
        heads = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise HeadError(
            f'{path} is not JSON ({error}). It must hold an object such as {{"my/base": "my/head"}}.'
        ) from error
    if not isinstance(heads, dict) or not all(isinstance(head, str) for head in heads.values()):
        raise HeadError(
            f'{path} must map base names to head names in one JSON object such as {{"my/base": "my/head"}}.'
        )
    return heads


# Writing


def save_head(folder: Path, tensors: Mapping[str, torch.Tensor], config: HeadConfig) -> None:
    """Write a head-only checkpoint, after checking that it is complete. The weights appear whole or not at all."""
    check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config.shape, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    dtype = next(iter(tensors.values())).dtype
    write_json(folder / "config.json", config.to_json(dtype))
    write_tensors(folder / WEIGHTS, tensors)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file whole or not at all, readable to whom any new file here is readable."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.touch()
    mode = unfinished.stat().st_mode
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, unfinished, metadata={"format": "pt"})
    unfinished.chmod(mode)  # safetensors makes files that only their owner can read; servers often run as another user
    unfinished.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
