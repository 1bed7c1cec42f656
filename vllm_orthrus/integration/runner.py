"""The Model Runner V2 names that the draft pass is written against, in one place because they move."""

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

__all__ = [
    "BatchExecutionDescriptor",
    "BlockTables",
    "CUDAGraphMode",
    "CudaGraphManager",
    "DraftModelSpeculator",
    "InputBatch",
    "KVCacheConfig",
    "VllmConfig",
    "set_current_vllm_config",
    "set_forward_context",
]
