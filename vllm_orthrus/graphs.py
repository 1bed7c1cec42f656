"""CUDA graphs of draft passes."""

from vllm_orthrus.integration.runner import BatchExecutionDescriptor, CudaGraphManager, CUDAGraphMode

# A draft pass of this many rows keeps a GPU busy for longer than the host needs to launch it.
MAX_GRAPH_ROWS = 2048


class BlockGraphs(CudaGraphManager):  # type: ignore[misc]
    """CUDA graphs of the draft pass, one per number of requests.

    vLLM's own grid counts tokens and stops at a size meant for the target; a draft always has `block` rows per
    request, so the only thing that varies is how many requests there are.
    """

    def _init_candidates(self) -> None:
        if not self.cudagraph_mode or not self.compilation_config.cudagraph_capture_sizes:
            return
        scheduler = self.vllm_config.scheduler_config
        at_once = min(self.max_num_reqs, scheduler.max_num_active_seqs or self.max_num_reqs)
        largest = min(at_once, max(1, MAX_GRAPH_ROWS // self.decode_query_len))
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
