"""What an Orthrus head is, which head belongs to which base, and how a head is stored.

A head is, for every decoder layer of a frozen base, a second set of attention weights (the diffusion view). Their
names are the published ones, `model.layers.N.self_attn.{q,k,v,o}_proj_diff.weight` and `{q,k}_norm_diff.weight`, in
either of two layouts:

- *merged*: one checkpoint holds base and head (`chiennv/Orthrus-Qwen3-*`); only its shards with `_diff` tensors are
  ever opened;
- *head-only*: the `_diff` tensors alone, with a `config.json` in the `speculators` convention, which names the base
  (there called the verifier).

`vllm_orthrus.heads.convert` turns one into the other.
"""

from vllm_orthrus.heads.base import BaseShape, base_fingerprint
from vllm_orthrus.heads.checkpoint import HeadCheckpoint, find_selector, open_head, read_head_config
from vllm_orthrus.heads.config import BaseRef, HeadConfig
from vllm_orthrus.heads.errors import HeadError
from vllm_orthrus.heads.files import WEIGHTS, WEIGHTS_INDEX, is_folder, open_files
from vllm_orthrus.heads.locate import BUILTIN_HEADS, HEAD_MAP_VARIABLE, resolve_head
from vllm_orthrus.heads.nonsense import Nonsense, find_nonsense
from vllm_orthrus.heads.quantize import QUANTIZATIONS, Quantization, dequantized, quantized
from vllm_orthrus.heads.selector import (
    SELECTOR_PARTS,
    SelectorCheckpoint,
    SelectorShape,
    named_parts,
    open_selector,
    save_selector,
)
from vllm_orthrus.heads.store import save_head
from vllm_orthrus.heads.store_files import write_json, write_tensors
from vllm_orthrus.heads.tensors import (
    NORMS,
    PROJECTIONS,
    base_tensor_name,
    expected_tensors,
    is_head_tensor,
    tensor_name,
    tensor_place,
)

__all__ = [
    "BUILTIN_HEADS",
    "HEAD_MAP_VARIABLE",
    "NORMS",
    "PROJECTIONS",
    "QUANTIZATIONS",
    "SELECTOR_PARTS",
    "WEIGHTS",
    "WEIGHTS_INDEX",
    "BaseRef",
    "BaseShape",
    "HeadCheckpoint",
    "HeadConfig",
    "HeadError",
    "Nonsense",
    "Quantization",
    "SelectorCheckpoint",
    "SelectorShape",
    "base_fingerprint",
    "base_tensor_name",
    "dequantized",
    "expected_tensors",
    "find_nonsense",
    "find_selector",
    "is_folder",
    "is_head_tensor",
    "named_parts",
    "open_files",
    "open_head",
    "open_selector",
    "quantized",
    "read_head_config",
    "resolve_head",
    "save_head",
    "save_selector",
    "tensor_name",
    "tensor_place",
    "write_json",
    "write_tensors",
]
