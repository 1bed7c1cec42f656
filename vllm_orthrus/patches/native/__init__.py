"""Native versions of the kernels on Model Runner V2's step, for CPUs that would interpret them."""

from vllm_orthrus.patches.native import adjustments, batch, block_tables, logprobs, rejection, sampling
from vllm_orthrus.patches.native.launch import natively, recognised

__all__ = ["adjustments", "batch", "block_tables", "logprobs", "natively", "recognised", "rejection", "sampling"]
