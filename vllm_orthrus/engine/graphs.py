"""CUDA graphs of draft passes, of what takes up the outcome of a verification, and of verifications of fewer drafts."""

from collections.abc import Iterable, Sequence

import torch

from vllm_orthrus.engine.settings import DraftShape
from vllm_orthrus.engine.vllm import BatchExecutionDescriptor, CudaGraphManager, CUDAGraphMode, VllmConfig


class BlockGraphs(CudaGraphManager):  # type: ignore[misc]
    """CUDA graphs of the draft pass, one per width of a block and number of requests.

    vLLM's own grid counts tokens and stops at a size meant for the target; a draft always has as many rows for each
    request, so the only other thing that varies is how many requests there are.
    """

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, mode: CUDAGraphMode, widths: Sequence[int], largest: int
    ) -> None:
        """widths: rows of a block; largest: the most requests that draft in one pass."""
        self.widths, self.largest = widths, largest
        super().__init__(vllm_config, device, mode, decode_query_len=max(widths))

    def _init_candidates(self) -> None:
        if not self.cudagraph_mode:
            return
        few = must_be_few(self.vllm_config)
        for width in self.widths:
            sizes = (1, 2, 4, *range(8, self.largest, 8))
            plan_graphs(self, width, counts_of_requests(width, self.largest, sizes, few))

    def find(self, num_reqs: int, width: int) -> BatchExecutionDescriptor:
        """The smallest graph that holds so many requests, or a descriptor that says that there is none."""
        return self.dispatch(num_reqs, num_reqs * width, width, num_active_loras=0)


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
            self._capture_descs[mode] = [
                one
                for one in descriptors
                if one.uniform_token_count == self.shape.verified and self.shape.num_hypotheses(one.num_reqs)
            ]

    def find(self, num_reqs: int) -> BatchExecutionDescriptor | None:
        """The graph for exactly so many requests: how many hypotheses each has depends on it."""
        verified = self.shape.verified
        graph = self.dispatch(num_reqs, num_reqs * verified, verified, num_active_loras=0)
        return graph if graph in self.graphs and graph.num_reqs == num_reqs else None


# Rows that cost next to nothing, as weights take longer to read; and from one graph to the next, up to so many rows.
CHEAP_ROWS, STEPS = 64, ((256, 16), (512, 32))


# vLLM's own all-reduce has room for so many of those that graphs hold: two for each layer, and one. And so many graphs
# count, as vLLM captures some of them twice, the first time to see what memory they take.
REGISTERED, COUNTED = 65536, 560


def must_be_few(vllm_config: VllmConfig) -> bool:
    """Whether tensor-parallel ranks could not start with all graphs, as the target is so deep."""
    parallel = vllm_config.parallel_config
    if parallel.tensor_parallel_size == 1 or parallel.disable_custom_all_reduce:
        return False
    layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    return bool((2 * layers + 1) * COUNTED > REGISTERED)


def counts_of_requests(rows: int, most: int, sizes: Iterable[int], few: bool = False) -> list[int]:
    """For which a forward with so many rows for each has graphs. sizes: that there are, whatever rows a request has.

    vLLM's sizes go from 8 to 16 to 24. With a row for each request that costs nothing; a block of 16 for each of 9
    requests, padded to 16 of them, would be 112 rows dearer.
    """
    if few and rows > 1:  # of those without drafts there are as many as vLLM has by itself
        return sorted({2**doublings for doublings in range(most.bit_length())} | {most})
    counts, above = {min(size, most) for size in sizes} | {most}, CHEAP_ROWS
    for up_to, step in STEPS:
        each = 2 ** (max(1, step // rows).bit_length() - 1)
        counts |= {count for count in range(each, most, each) if above < count * rows <= up_to}
        above = up_to
    return sorted(counts)


def plan_graphs(manager: CudaGraphManager, rows: int, counts: Iterable[int]) -> None:
    """Of forwards with so many rows for each request. counts: of requests, ascending."""
    planned = manager._capture_descs.setdefault(CUDAGraphMode.FULL, [])
    smallest = 0
    for count in counts:
        descriptor = BatchExecutionDescriptor(
            cg_mode=CUDAGraphMode.FULL,
            num_tokens=count * rows,
            num_reqs=count,
            uniform_token_count=rows,
        )
        planned.append(descriptor)
        for num_tokens in range(smallest, descriptor.num_tokens + 1):
            # First of those for as many tokens: others are for another number of rows each, or of single pieces.
            manager._candidates.setdefault((num_tokens, 0), []).insert(0, descriptor)
        smallest = descriptor.num_tokens + 1
    planned.sort(key=lambda one: one.num_tokens, reverse=True)  # so that the pool is reused


def plan_modes(manager: CudaGraphManager, modes: Iterable[int]) -> None:
    """Graphs of whole verifications of fewer drafts than the most, beside those that vLLM has planned for the most.

    vLLM's sizes count tokens. Here they count requests, with some between where a request has many rows. Sizes of
    tokens would give every mode as many as plain decoding.
    """
    mode, sizes = manager.cudagraph_mode, manager.compilation_config.cudagraph_capture_sizes
    if not (sizes and mode.separate_routine() and mode.decode_mode() == CUDAGraphMode.FULL):
        return  # graphs of any rows serve these as well, or there are none of whole verifications
    few = must_be_few(manager.vllm_config)
    for rows in (drafts + 1 for drafts in modes):
        most = min(manager.max_num_reqs, max(sizes) // rows)
        if most and rows != manager.decode_query_len:
            plan_graphs(manager, rows, counts_of_requests(rows, most, sizes, few))
