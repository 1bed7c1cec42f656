"""The Model Runner V2 names that the draft pass is written against, in one place because they move."""

from vllm.config import ModelConfig, VllmConfig, replace, set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d, set_default_torch_dtype
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer, init_attn_backend
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

__all__ = [
    "AttentionCGSupport",
    "BatchExecutionDescriptor",
    "BlockTables",
    "CUDAGraphMode",
    "CudaGraphManager",
    "DefaultModelState",
    "DraftModelSpeculator",
    "InputBatch",
    "KVCacheConfig",
    "ModelConfig",
    "Request",
    "SamplingParams",
    "VllmConfig",
    "async_tensor_h2d",
    "build_attn_metadata",
    "build_slot_mappings_by_layer",
    "init_attn_backend",
    "initialize_single_dummy_weight",
    "process_weights_after_loading",
    "replace",
    "set_current_vllm_config",
    "set_default_torch_dtype",
    "set_forward_context",
]
