"""The facts beside a head's tensors, and how they are written in a `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch

from vllm_orthrus.heads.base import ARCHITECTURES, BaseShape, base_fingerprint, rope_settings
from vllm_orthrus.heads.errors import HeadError
from vllm_orthrus.heads.locate import BUILTIN_HEADS
from vllm_orthrus.heads.quantize import QUANTIZATIONS, Quantization
from vllm_orthrus.heads.selector import SELECTOR, SelectorShape

Layout = Literal["merged", "head-only"]

# Not vLLM's `quantization_config`, which in a merged checkpoint would speak of the base.
QUANTIZATION = "head_quantization"
# What merging adds to a base's config.
_MERGED_ONLY = ("block_size", "mask_token_id", "auto_map", "use_cache", QUANTIZATION, SELECTOR)


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
    quantization: Quantization | None = None  # how projections are stored
    selector: SelectorShape | None = None  # that lies beside the head

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
        quantization: Quantization | None = None,
        selector: SelectorShape | None = None,
    ) -> HeadConfig:
        ref = BaseRef(name, revision, base_fingerprint(base_config))
        shape = BaseShape.from_config(base_config)
        return cls(block_size, mask_token_id, ref, shape, dict(base_config), quantization, selector)

    @classmethod
    def from_json(cls, config: Mapping[str, Any], source: str) -> HeadConfig:
        """Read a head's `config.json`, merged or head-only, that came from the folder or repository `source`."""
        missing = [key for key in ("block_size", "mask_token_id") if key not in config]
        if missing:
            raise HeadError(
                f"{source}: config.json has no {' and no '.join(missing)}, which every Orthrus head states at its top "
                "level. Give an Orthrus head, or add them."
            )
        for key in ("block_size", "mask_token_id"):
            if type(config[key]) is not int:
                raise HeadError(f"{source}: config.json has {key}={config[key]!r}, which must be a whole number.")
        quantization = config.get(QUANTIZATION)
        if quantization not in (None, *QUANTIZATIONS):
            raise HeadError(
                f"{source}: config.json has {QUANTIZATION}={quantization!r}, and this version reads heads in "
                f"{', '.join(QUANTIZATIONS)}, or unquantized ones without that key. Upgrade vllm-orthrus, or convert "
                "the unquantized head with this version."
            )
        if layout_of(config) == "head-only":
            base_config, verifier = _base_of(config, source)
            name, revision = verifier.get("name_or_path"), verifier.get("revision")
        else:
            base_config = {key: value for key, value in config.items() if key not in _MERGED_ONLY}
            base_config["architectures"] = ARCHITECTURES.get(str(config.get("model_type")), [])
            name, revision = {head: base for base, head in BUILTIN_HEADS.items()}.get(source), None
        return cls.for_base(
            base_config,
            config["block_size"],
            config["mask_token_id"],
            name,
            revision,
            cast(Quantization | None, quantization),
            SelectorShape.from_json(config, source),
        )

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
            **self.extras_json(),
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

    def extras_json(self) -> dict[str, Any]:
        """What either layout's `config.json` says of quantization and of a selector."""
        quantization = {} if self.quantization is None else {QUANTIZATION: self.quantization}
        return {**quantization, **({} if self.selector is None else self.selector.to_json())}

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
        mine, theirs = rope_settings(self.base_config), rope_settings(base_config)
        where = f"rotary settings (head {mine}, base {theirs})" if mine != theirs else "activation, norms or embeddings"
        return [
            f"{base_name} differs from the base this head was trained for in {where}: expect fewer accepted drafts."
        ]


def _base_of(config: Mapping[str, Any], source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The base's own config, and how a head-only config names it."""
    base_config, speculators = config.get("transformer_layer_config"), config["speculators_config"]
    verifier = speculators.get("verifier") if isinstance(speculators, Mapping) else None
    if not isinstance(base_config, dict) or not isinstance(verifier, dict):
        raise HeadError(
            f"{source}: config.json must hold the base's config under `transformer_layer_config`, and its name under "
            "`speculators_config`, `verifier`. Extract the head anew with `vllm-orthrus head extract`."
        )
    for key in ("name_or_path", "revision"):
        if not isinstance(verifier.get(key), str | None):
            raise HeadError(f"{source}: config.json names the base by {key}={verifier[key]!r}, which must be text.")
    return base_config, verifier


def layout_of(config: Mapping[str, Any]) -> Layout:
    """Told by a head's `config.json`: a merged one is the base's, with what merging added."""
    return "head-only" if "speculators_config" in config else "merged"
