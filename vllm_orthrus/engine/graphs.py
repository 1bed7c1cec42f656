"""CUDA graphs of draft passes, and of what takes up the outcome of a verification."""

import torch

from vllm_orthrus.engine.settings import DraftShape
from vllm_orthrus.engine.vllm import BatchExecutionDescriptor, CudaGraphManager, CUDAGraphMode, VllmConfig


class BlockGraphs(CudaGraphManager):  # type: ignore[misc]
    """CUDA graphs of the draft pass, one per number of requests.

    vLLM's own grid counts tokens and stops at a size meant for the target; a draft always has `block` rows per
    request, so the only thing that varies is how many requests there are.
    """

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, mode: CUDAGraphMode, block: int, largest: int
    ) -> None:
        """largest: the most requests that draft in one pass."""
        self.largest = largest
        super().__init__(vllm_config, device, mode, decode_query_len=block)

    def _init_candidates(self) -> None:
        if not self.cudagraph_mode:
            return
        largest = self.largest
        counts = [count for count in (1, 2, 4, *range(8, largest, 8)) if count < largest]
        descriptors = [
            BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.FULL,
                num_tokens=count * self.decode_query_len,
                num_reqs=count,
                uniform_token_count=self.decode_query_len,
            )
            for count in (*counts, largest)
        ]
        self._capture_descs[CUDAGraphMode.FULL] = descriptors[::-1]  # largest first, so that the pool is reused
        smallest = 0
        for descriptor in descriptors:
            for num_tokens in range(smallest, descriptor.num_tokens + 1):
                self._candidates[num_tokens, 0] = [descriptor]
            smallest = descriptor.num_tokens + 1


class OutcomeGraphs(CudaGraphManager):  # type: ignore[misc]
    """One per number of requests for which a verification has a graph and carries hypotheses.

    The numbers are vLLM's own, so that a batch is padded to the same one here as there.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, mode: CUDAGraphMode, shape: DraftShape) -> None:
        self.shape = shape
        super().__init__(vllm_config, device, mode, decode_query_len=shape.verified)

    def _init_candidates(self) -> None:
        super()._init_candidates()
        for mode, descriptors in self._capture_descs.items():
            self._capture_descs[mode] = [one for one in descriptors if self.shape.num_hypotheses(one.num_reqs)]

    def find(self, num_reqs: int) -> BatchExecutionDescriptor | None:
        """The graph for exactly so many requests: how many hypotheses each has depends on it."""
        verified = self.shape.verified
        graph = self.dispatch(num_reqs, num_reqs * verified, verified, num_active_loras=0)
        return graph if graph in self.graphs and graph.num_reqs == num_reqs else None
