"""Native versions of vLLM's kernels do what the kernels do, launch by launch, for engines and on generated inputs."""

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import numpy as np
import pytest
import torch
import triton.language as tl
from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("a GPU compiles its kernels", allow_module_level=True)

import vllm.v1.worker.cpu.shm  # noqa: F401  puts what stands for a GPU's memory in place
from triton.runtime.interpreter import InterpretedFunction
from vllm.v1.worker.gpu import block_table, buffer_utils, input_batch
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample import bad_words, gumbel, logit_bias, logprob, min_p, penalties, prompt_logprob
from vllm.v1.worker.gpu.spec_decode import rejection_sampler, rejection_sampler_utils
from vllm.v1.worker.gpu.structured_outputs import _apply_grammar_bitmask_kernel

from tests.engine.conftest import StartEngine, one_pass
from tests.engine.harness import prompts
from vllm_orthrus import patches
from vllm_orthrus.patches.cpu import interpreter_enabled
from vllm_orthrus.patches.native import launch
from vllm_orthrus.patches.versions import vllm_is

pytestmark = pytest.mark.skipif(not interpreter_enabled(), reason="a real compiler for CPUs is present")

SEEDS = range(4)


class Compared:
    """Runs every launch twice, natively and interpreted, from the same memory, and compares all that both left."""

    def __init__(self, natively: Callable[..., Any], interpreted: Callable[..., Any]) -> None:
        self.natively, self.interpreted = natively, interpreted
        self.beside: list[torch.Tensor] = []  # written through addresses, so no arguments
        self.launched: set[str] = set()
        self.only_interpreted: set[str] = set()

    def run(self, kernel: Any, *arguments: Any, **named: Any) -> None:
        name = launch.name_of(kernel)
        if launch.find(kernel) is None:
            self.only_interpreted.add(name)
            return self.interpreted(kernel, *arguments, **named)
        self.launched.add(name.partition(":")[2])
        memory = [_memory(value) for value in (*arguments, *named.values(), *self.beside) if torch.is_tensor(value)]
        before = [part.clone() for part in memory]
        self.natively(kernel, *arguments, **named)
        found = [part.clone() for part in memory]
        for part, was in zip(memory, before, strict=True):
            part.copy_(was)
        self.interpreted(kernel, *arguments, **named)
        for part, mine in zip(memory, found, strict=True):
            assert _same(mine, part), f"{name}: {mine} natively, {part} interpreted"
        return None


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """All of the storage, so that nothing beside the tensor may change either."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def _same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    if mine.dtype == torch.uint64:
        mine, theirs = mine.view(torch.int64), theirs.view(torch.int64)
    if not mine.is_floating_point():
        return torch.equal(mine, theirs)
    return torch.allclose(mine.double(), theirs.double(), rtol=2e-6, atol=1e-6, equal_nan=True)


@pytest.fixture(autouse=True)
def installed() -> None:
    assert patches.install()


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compared]:
    natively: Any = InterpretedFunction.run
    compared = Compared(natively, natively.__wrapped__)
    monkeypatch.setattr(InterpretedFunction, "run", lambda *arguments, **named: compared.run(*arguments, **named))
    yield compared
    assert compared.launched, "nothing was compared"


class Inputs:
    """A batch as Model Runner V2 describes one: requests in slots that follow no order, with and without drafts."""

    def __init__(self, seed: int, drafts: int = 5, vocabulary: int = 1300) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        self.dtype = torch.float32 if seed < 2 else torch.bfloat16
        self.drafts, self.vocabulary = drafts, vocabulary
        self.num_reqs, self.slots = 1 + 2 * (seed % 4), 8
        counts = self.rng.integers(0, drafts + 1, self.num_reqs)
        if seed % 2 == 0:
            counts[0] = drafts
        index = torch.int32 if seed % 2 else torch.int64
        self.idx_mapping = torch.tensor(self.rng.permutation(self.slots)[: self.num_reqs], dtype=index)
        self.cu_num_logits = torch.tensor([0, *np.cumsum(counts + 1)], dtype=torch.int32)
        self.num_logits = int(self.cu_num_logits[-1])
        self.expanded = self.idx_mapping.repeat_interleave(torch.tensor(counts + 1))
        self.local = torch.cat([torch.arange(count + 1, dtype=torch.int32) for count in counts])
        self.temperature = torch.tensor(self.rng.choice([0.0, 0.7, 1.0, 1.3], self.slots), dtype=torch.float32)
        self.temperature[self.idx_mapping[0]] = 0.0 if seed % 2 == 0 else 0.7
        self.seed = torch.tensor(self.rng.integers(-(2**62), 2**62, self.slots))
        self.positions = torch.tensor(self.rng.integers(0, 2**34, self.num_logits))

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return (3 * torch.randn(*shape, generator=self.generator)).to(dtype or self.dtype)

    def whole(self, most: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(0, most, shape, generator=self.generator, dtype=dtype)

    def logits(self, rows: int | None = None) -> torch.Tensor:
        """Rows that don't follow one another, some tokens forbidden, and one row with a token that isn't a number."""
        count = self.num_logits if rows is None else rows
        logits = self.floats(count, self.vocabulary + 7)[:, : self.vocabulary]
        logits[:, ::11] = float("-inf")
        logits[-1, 5] = float("nan")
        return logits

    def uniform(self, rows: int, *, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(rows, generator=self.generator)


# What a batch is made of


class BlockTable:
    """Two groups of layers with block sizes of their own."""

    def __init__(self, inputs: Inputs) -> None:
        named = {"sliding_window_reach": [0, 20]} if vllm_is(">=0.33") else {}
        self.tables = block_table.BlockTables([16, 32], inputs.slots, 64, [20, 12], torch.device("cpu"), **named)
        for slot in range(inputs.slots):
            found = [inputs.rng.integers(1, 99, count).tolist() for count in inputs.rng.integers(0, 10, 2)]
            self.tables.append_block_ids(slot, tuple(found), overwrite=True)
        self.memory = [*(table.gpu for table in self.tables.block_tables), *self.tables.input_block_tables]


@pytest.mark.parametrize("seed", SEEDS)
def test_block_tables(compared: Compared, seed: int) -> None:
    inputs = Inputs(seed)
    made = BlockTable(inputs)
    compared.beside = made.memory
    made.tables.apply_staged_writes()
    computed = inputs.whole(150, inputs.slots)
    named = {"num_computed_tokens": computed} if vllm_is(">=0.33") else {}
    for table in made.tables.input_block_tables:
        table.fill_(77)
    made.tables.gather_block_tables(inputs.idx_mapping, inputs.num_reqs + 1, **named)
    made.tables.gather_block_tables(inputs.idx_mapping[:0], 2)
    lengths = inputs.rng.integers(1, 9, inputs.num_reqs)
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    positions = inputs.whole(190, 64, dtype=torch.int64)
    inputs.idx_mapping[-1] = -1 if seed == 3 else inputs.idx_mapping[-1]
    made.tables.compute_slot_mappings(inputs.idx_mapping, starts, positions, 40)
    made.tables.compute_slot_mappings(inputs.idx_mapping[:0], starts[:1], positions, 8)
    kernels = {"_apply_write_kernel", "_gather_block_tables_kernel", "_compute_slot_mappings_kernel"}
    assert compared.launched == kernels


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_staged_writes(compared: Compared, dtype: torch.dtype) -> None:
    tensor = buffer_utils.StagedWriteTensor((5, 2100), dtype=dtype, device=torch.device("cpu"))
    for row, start, length in ((3, 7, 1), (0, 0, 2050), (3, 9, 5)):
        tensor.stage_write(row, start, list(range(length)))
    tensor.apply_write()
    assert compared.launched == {"_apply_write_kernel"}


@pytest.mark.parametrize("seed", SEEDS)
def test_prompts_and_positions(compared: Compared, seed: int) -> None:
    inputs = Inputs(seed)
    lengths = inputs.rng.integers(1, 9, inputs.num_reqs)
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    computed, prefill = inputs.whole(20, inputs.slots), inputs.whole(30, inputs.slots)
    tokens = inputs.whole(900, inputs.slots, 64)
    ids, following = torch.full((80,), -5, dtype=torch.int32), torch.full((3, inputs.slots), -5, dtype=torch.int32)
    batch = (inputs.idx_mapping, starts)
    input_batch.prepare_prefill_inputs(ids, following, *batch, tokens, prefill, computed)
    positions, seq_lens = torch.zeros(80, dtype=torch.int64), torch.full((8,), 9, dtype=torch.int32)
    input_batch.prepare_pos_seq_lens(*batch, computed, positions, seq_lens)
    input_batch.post_update_num_computed_tokens(inputs.idx_mapping, computed, starts)
    prompt_logprob.get_prompt_logprobs_token_ids(int(starts[-1]), starts, inputs.idx_mapping, computed, tokens)
    input_batch.prepare_pos_seq_lens(inputs.idx_mapping[:0], starts[:1], computed, positions, seq_lens)
    assert len(compared.launched) == 4


@pytest.mark.parametrize("new_tokens", [0, 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_drafts_enter_the_batch(compared: Compared, seed: int, new_tokens: int) -> None:
    inputs = Inputs(seed)
    counts = inputs.cu_num_logits.diff()
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), (counts + 2).cumsum(0).int()])
    prefill = inputs.whole(12, inputs.slots)
    seq_lens, ids = inputs.whole(20, inputs.num_reqs) + counts, torch.full((64,), -5, dtype=torch.int32)
    sampled = inputs.whole(900, inputs.slots, 1, dtype=torch.int64)
    drafts = inputs.whole(900, inputs.slots, inputs.drafts + 2, dtype=torch.int64)[:, : inputs.drafts]
    indices = input_batch.combine_sampled_and_draft_tokens(
        ids,
        inputs.idx_mapping,
        sampled,
        starts,
        seq_lens,
        prefill,
        drafts,
        inputs.cu_num_logits,
        inputs.num_logits,
        new_tokens,
    )
    expanded, local = input_batch.expand_idx_mapping(
        inputs.idx_mapping, inputs.num_logits, inputs.cu_num_logits, inputs.drafts + 1
    )
    assert torch.equal(expanded, inputs.expanded) and torch.equal(local, inputs.local)
    positions = inputs.whole(15, 64, dtype=torch.int64)
    rejection_sampler.gather_draft_sampled(ids, positions, indices, expanded, local, prefill)
    assert len(compared.launched) == 3


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_requests_advance(compared: Compared, seed: int, counted: bool) -> None:
    inputs = Inputs(seed)
    seq_lens, prefill = inputs.whole(9, inputs.num_reqs), inputs.whole(9, inputs.slots)
    counts = inputs.cu_num_logits.diff()
    num_sampled = torch.minimum(inputs.whole(inputs.drafts + 2, inputs.num_reqs), counts)
    _, rejected = input_batch.get_num_sampled_and_rejected(
        num_sampled, seq_lens, inputs.cu_num_logits, inputs.idx_mapping, prefill
    )
    inputs.idx_mapping[-1] = -1 if seed == 2 else inputs.idx_mapping[-1]
    named = {}
    if vllm_is(">=0.33"):
        drafted = inputs.whole(99, inputs.num_reqs, inputs.drafts, dtype=torch.int64)
        named = {"draft_tokens": drafted, "draft_tokens_out": torch.zeros(inputs.slots, inputs.drafts).long()}
    for starts in (None, inputs.cu_num_logits * 2):
        input_batch.post_update(
            inputs.idx_mapping,
            inputs.whole(50, inputs.slots),
            inputs.whole(50, inputs.slots, 1, dtype=torch.int64),
            inputs.whole(3, inputs.slots, 40) if counted else None,
            inputs.whole(40, inputs.num_reqs, inputs.drafts + 1, dtype=torch.int64),
            num_sampled,
            rejected,
            starts,
            inputs.whole(40, inputs.slots, 99),
            inputs.whole(60, inputs.slots),
            **named,
        )
    assert compared.launched == {"_get_num_sampled_and_rejected_kernel", "_post_update_kernel"}


# Sampling


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_gumbel(compared: Compared, seed: int, drafting: bool, double: bool) -> None:
    inputs = Inputs(seed, vocabulary=(1300, 1024, 90, 2048)[seed])
    logits, expanded = inputs.logits(), inputs.expanded
    cache = inputs.floats(inputs.slots, inputs.drafts + 1, inputs.vocabulary + 3)[:, :, :-1] if drafting else None
    column = inputs.local.long() if seed % 2 else torch.tensor(2)
    expanded[-1] = -1 if drafting else expanded[-1]
    sampled = gumbel.gumbel_sample(
        logits,
        expanded,
        inputs.temperature,
        inputs.seed,
        inputs.positions if seed else inputs.positions.int(),
        apply_temperature=drafting,
        is_drafting=drafting,
        logits_cache=cache,
        logits_cache_col=column if drafting else None,
        use_fp64=double,
    )
    assert ((sampled >= 0) & (sampled < inputs.vocabulary)).all()
    assert not (sampled % 11 == 0).any()


def test_draws_follow_the_distribution() -> None:
    """Nothing that two versions could get wrong alike."""
    logits = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1])).repeat(20000, 1)
    slots = torch.zeros(20000, dtype=torch.int64)
    drawn = gumbel.gumbel_sample(
        logits, slots, torch.ones(1), torch.tensor([7]), torch.arange(20000), apply_temperature=False, is_drafting=False
    )
    shares = torch.bincount(drawn, minlength=4) / 20000
    assert torch.allclose(shares, torch.tensor([0.5, 0.25, 0.15, 0.1]), atol=0.015)


def test_a_row_without_numbers_still_has_a_token() -> None:
    """Interpreted, such a row stops the engine; on a GPU it does not."""
    logits = torch.full((2, 50), float("nan"))
    logits[1, 30] = 1.0
    sampled = gumbel.gumbel_sample(
        logits, torch.arange(2), torch.zeros(2), torch.zeros(2).long(), torch.arange(2), False, False
    )
    assert 0 <= sampled[0] < 50 and sampled[1] == 30


@pytest.mark.parametrize("seed", SEEDS)
def test_temperature_and_min_p(compared: Compared, seed: int) -> None:
    inputs = Inputs(seed)
    logits = inputs.logits()
    gumbel.apply_temperature(logits, inputs.expanded, inputs.temperature)
    threshold = torch.where(inputs.uniform(inputs.slots, low=-1, high=1) > 0, 0.05, 0.0)
    threshold[inputs.idx_mapping[0]] = 0.1
    min_p.apply_min_p(logits, inputs.expanded, threshold)
    assert torch.isneginf(logits[0]).sum() > len(logits[0]) / 2
    get_num_nans(logits)
    assert compared.launched == {"_temperature_kernel", "_min_p_kernel", "_num_nans_kernel"}


@pytest.mark.parametrize("seed", SEEDS)
def test_penalties(compared: Compared, seed: int) -> None:
    inputs = Inputs(seed, vocabulary=(1300, 1024, 90, 9000)[seed])
    lengths = inputs.whole(2000, inputs.slots)
    tokens = inputs.whole(inputs.vocabulary, inputs.slots, 4000)
    masks = torch.zeros(inputs.slots, -(-inputs.vocabulary // 32), dtype=torch.int32)
    counts = torch.zeros(inputs.slots, inputs.vocabulary, dtype=torch.int32)
    prefill = lengths + inputs.whole(1500, inputs.slots)
    penalties.bincount(inputs.idx_mapping, tokens, lengths, prefill, masks, counts, int(prefill.max()))
    masks[:, ::3] = 0
    counts[:, ::2] = 0
    drafted = inputs.whole(inputs.vocabulary, inputs.num_logits)
    drafted[inputs.local == inputs.drafts - 1] = -1
    repetition = inputs.uniform(inputs.slots, low=0.8, high=1.4)
    repetition[inputs.idx_mapping[0]] = 1.0
    frequency, presence = (inputs.uniform(inputs.slots, low=-1, high=1) for _ in range(2))
    frequency[inputs.idx_mapping[-1]] = 0
    arguments = (inputs.expanded, drafted, inputs.local, repetition, frequency, presence, masks, counts)
    penalties.apply_penalties(inputs.logits(), *arguments)
    assert compared.launched == {"_bincount_kernel", "_penalties_kernel"}


@pytest.mark.parametrize("seed", SEEDS)
def test_biases(compared: Compared, seed: int) -> None:
    inputs = Inputs(seed)
    tokens = [torch.stack([torch.tensor(inputs.rng.permutation(inputs.vocabulary)[:64]) for _ in range(inputs.slots)])]
    allowed, biased, stops = (part.int() for part in (tokens[0], tokens[0].flip(1), tokens[0].roll(9, 1)))
    some = inputs.whole(2, 3, inputs.slots) * inputs.whole(20, 3, inputs.slots)
    arguments = (
        some[0],
        allowed,
        some[1],
        biased,
        inputs.floats(inputs.slots, 64, dtype=torch.float32),
        inputs.whole(40, inputs.slots),
        some[2] + 1,
        inputs.whole(2, inputs.slots),
        stops,
    )
    logits = inputs.logits()
    logits[0] = float("-inf")
    logits[0, stops[inputs.expanded[0], :2].long()] = 1.0  # with nothing but stop tokens left, a grammar keeps them
    positions = inputs.whole(40, inputs.num_logits, dtype=torch.int64)
    for check in (False, True):
        logit_bias.apply_logit_bias(logits.clone(), inputs.expanded, positions, *arguments, check)
    assert compared.launched == {"_bias_kernel"}


@pytest.mark.parametrize("seed", SEEDS)
def test_bad_words(compared: Compared, seed: int) -> None:
    inputs = Inputs(seed, vocabulary=60)
    lengths = inputs.rng.integers(1, 4, (inputs.slots, 3))
    offsets = torch.tensor(np.cumsum(np.insert(lengths, 0, 0, axis=1), axis=1), dtype=torch.int32)
    prompt = inputs.whole(5, inputs.slots) + 1
    output, drafted = inputs.whole(2, inputs.slots, 30) + 1, inputs.whole(2, inputs.num_logits) + 1
    logits = inputs.logits()
    bad_words.apply_bad_words(
        logits,
        inputs.expanded,
        inputs.whole(2, inputs.slots, 12) + 1,
        offsets,
        inputs.whole(3, inputs.slots) + 1,
        output,
        prompt,
        prompt + inputs.whole(4, inputs.slots),
        drafted,
        inputs.local,
        3,
    )
    assert compared.launched == {"_bad_words_kernel"}


@pytest.mark.parametrize("seed", SEEDS)
def test_grammar(compared: Compared, seed: int) -> None:
    inputs = Inputs(seed)
    stride, logits = inputs.drafts + 1, inputs.logits()
    words = inputs.whole(2**31 - 1, inputs.num_reqs * stride, -(-inputs.vocabulary // 32) + 2)
    places = torch.arange(inputs.num_reqs * stride, dtype=torch.int32)
    arguments = (logits, logits.stride(0), places, inputs.cu_num_logits, words, words.stride(0), inputs.vocabulary)
    _apply_grammar_bitmask_kernel[(len(places), 1)](*arguments, MASK_STRIDE=stride, BLOCK_SIZE=8192)
    assert compared.launched == {"_apply_grammar_bitmask_kernel"}


@pytest.mark.parametrize("seed", SEEDS)
def test_logprobs(compared: Compared, seed: int) -> None:
    inputs = Inputs(seed)
    logits = inputs.logits()
    logits[-1, 5] = 0  # PyTorch's own top-k sorts it first
    sampled = inputs.whole(inputs.vocabulary, inputs.num_logits, dtype=torch.int64)
    state = logprob.LogprobTokenIdsState(inputs.slots, torch.device("cpu"))
    state.num_token_ids.np[:] = inputs.rng.integers(0, 4, inputs.slots)
    state.num_token_ids.copy_to_uva()
    state.token_ids.gpu[:] = inputs.whole(inputs.vocabulary, *state.token_ids.gpu.shape)
    logprob.compute_topk_scores(logits, 0, sampled)
    for best in (0, 3):
        logprob.compute_topk_scores(
            logits, best, sampled, None, state, inputs.expanded, int(state.num_token_ids.np.max())
        )
    assert compared.launched == {"_topk_log_softmax_kernel", "_ranks_kernel", "_fill_logprob_token_ids_kernel"}


def test_rank_of_the_most_probable_token_is_one() -> None:
    logits = -torch.rand(3, 9000, generator=torch.Generator().manual_seed(0)).bfloat16() - 1
    logits[:, 4321] = -0.5
    found = logprob.compute_topk_scores(logits, 1, torch.full((3,), 4321))
    assert found.selected_token_ranks.tolist() == [1, 1, 1]


# Verification


METHODS = ["greedy drafts", "drawn drafts", "by block, greedy drafts", "by block, drawn drafts", "synthetic"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", SEEDS)
def test_rejection(compared: Compared, seed: int, method: str) -> None:
    inputs = Inputs(seed, drafts=7, vocabulary=(1300, 9001, 90, 90)[seed])
    count = inputs.num_logits
    draft_logits = 2 * inputs.floats(inputs.slots, inputs.drafts + 1, inputs.vocabulary + 9)[:, : inputs.drafts, :-9]
    logits = inputs.logits()
    # The target mostly agrees with the drafts, or nothing would be accepted.
    rows = torch.arange(count)
    steps = inputs.local.clamp(max=inputs.drafts - 1).long()
    said = draft_logits[inputs.expanded.long(), steps]
    logits.copy_(torch.where(logits.isneginf() | logits.isnan(), logits, said + 0.1 * logits))
    likeliest = torch.where(logits.isnan(), float("-inf"), logits.float()).argmax(1).int()
    logits[0, likeliest[0].long()] += 12
    drafted = inputs.whole(inputs.vocabulary, count, dtype=torch.int32)
    drafted[1:] = torch.where(inputs.uniform(count - 1, low=0, high=1) < 0.9, likeliest[:-1], drafted[1:])
    drafted[rows % 7 == 6] = -1
    drafted[1] = likeliest[0]
    sampled, num_sampled = rejection_sampler_utils.rejection_sample(
        logits,
        draft_logits if "drawn" in method else None,
        drafted,
        inputs.cu_num_logits,
        inputs.positions,
        inputs.idx_mapping,
        inputs.expanded,
        inputs.local,
        inputs.temperature,
        inputs.seed,
        inputs.drafts,
        torch.linspace(0.9, 0.4, inputs.drafts) if method == "synthetic" else None,
        use_fp64=seed == 3,
        use_block_verification="block" in method,
    )
    assert num_sampled[0] > 1 or inputs.local[1] == 0 or method == "synthetic", "the first draft is certain"
    tensors = torch.zeros(count, dtype=torch.int64), sampled, sampled.stride(0), num_sampled, inputs.cu_num_logits
    rejection_sampler._flatten_sampled_kernel[(inputs.num_reqs,)](*tensors, num_warps=1)
    kernels = {
        "_compute_local_logits_stats_kernel",
        "_rejection_kernel",
        "_resample_kernel",
        "_insert_resampled_kernel",
        "_flatten_sampled_kernel",
    }
    if "block" in method:
        kernels.add("_compute_cumulative_log_p_kernel")
    if method == "by block, drawn drafts":
        kernels.add("_compute_local_residual_mass_kernel")
    assert compared.launched == kernels
    assert compared.only_interpreted == set()


# Launches that an engine makes


EVERYTHING: dict[str, Any] = {
    "temperature": 0.8,
    "top_p": 0.9,
    "seed": 3,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logprobs": 2,
    "prompt_logprobs": 1,
}
WITHOUT_DRAFTS = {"min_p": 0.01, "logit_bias": {5: 1.0}}


@pytest.mark.parametrize("drafted", ["plain", "greedy drafts", "drawn drafts, by block"])
def test_every_launch_of_an_engine(
    compared: Compared, start: StartEngine, tiny: Any, monkeypatch: pytest.MonkeyPatch, drafted: str
) -> None:
    """All of vLLM's kernels that a step launches have native versions, which agree on what is launched."""
    speculative = None
    if drafted == "plain":
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    else:
        drawn = {"draft_sample_method": "probabilistic", "rejection_sample_method": "block", "orthrus_passes": "two"}
        speculative = one_pass(tiny.block_head, **(drawn if "drawn" in drafted else {}))
    engine = start(speculative, dtype="bfloat16")
    engine.run(prompts(2), 5)
    engine.run(prompts(2), 5, **EVERYTHING, **({} if speculative else WITHOUT_DRAFTS))
    assert {name for name in compared.only_interpreted if name.startswith("vllm.")} == set()
    assert len(compared.launched) >= (14 if speculative is None else 20), len(compared.launched)


# Where there is no native version


def test_a_kernel_whose_code_is_another_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = min_p._min_p_kernel
    assert launch.find(kernel) is not None
    changed = InterpretedFunction(_min_p_of_a_newer_vllm)
    monkeypatch.setattr(_min_p_of_a_newer_vllm, "__module__", min_p.__name__)
    monkeypatch.setattr(_min_p_of_a_newer_vllm, "__qualname__", "_min_p_kernel")
    assert changed.arg_names == kernel.arg_names
    assert launch.find(changed) is None
    logits = torch.zeros(1, 4)
    changed[(1,)](logits, logits.stride(0), torch.zeros(1).long(), torch.ones(1), 4, BLOCK_SIZE=4)
    assert logits.tolist() == [[7.0] * 4]


def _min_p_of_a_newer_vllm(  # type: ignore[no-untyped-def]
    logits_ptr, logits_stride, expanded_idx_mapping_ptr, min_p_ptr, vocab_size, BLOCK_SIZE: tl.constexpr
):
    tl.store(logits_ptr + tl.arange(0, BLOCK_SIZE), 7.0)


def test_code_is_known_by_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by what the functions do that it calls, and the constants it has; not by how it is written down."""
    kernel = gumbel._gumbel_sample_kernel
    before = launch.fingerprint_of(kernel)
    assert before == launch.fingerprint_of(InterpretedFunction(kernel.fn))
    with monkeypatch.context() as changed:
        changed.setitem(kernel.fn.__globals__, "_DRAFT_NOISE_SALT", tl.constexpr(1 << 29))
        assert launch.fingerprint_of(kernel) != before
    with monkeypatch.context() as changed:
        changed.setitem(kernel.fn.__globals__, "murmur3_uniform32", InterpretedFunction(_another_uniform))
        assert launch.fingerprint_of(kernel) != before
    assert launch.fingerprint_of(kernel) == before


def _another_uniform(seed, pos, offset):  # type: ignore[no-untyped-def]
    return offset.to(tl.float32)


def test_every_version_of_a_kernel_is_of_a_supported_vllm() -> None:
    """Each kernel is found under the running vLLM's code; the other supported vLLM has its own run of this test."""
    assert [name for name, known in launch.recognised().items() if not known] == []
