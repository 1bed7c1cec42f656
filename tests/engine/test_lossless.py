"""What vLLM returns with Orthrus is what it returns without, feature by feature."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from tests.engine import checkpoints
from tests.engine.checkpoints import VOCAB
from tests.engine.conftest import Checkpoints, StartEngine
from tests.engine.harness import Engine, prompts
from vllm_orthrus.engine.draft_pass import DraftPass
from vllm_orthrus.engine.speculator import OrthrusSpeculator


@pytest.fixture(scope="module", params=["one", "two"])
def drafting(start: StartEngine, tiny: Checkpoints, request: pytest.FixtureRequest) -> Engine:
    """A bad head on purpose: acceptance is its business, the text is not."""
    settings = {"orthrus_passes": request.param, "orthrus_hypotheses": 3, "orthrus_rows": 256}
    return start({"method": "orthrus", "model": str(tiny.block_head)} | settings)


def test_greedy(drafting: Engine, plain: Engine) -> None:
    given = prompts(12)
    drafted = drafting.run(given, 48)
    assert drafted.tokens == plain.run(given, 48).tokens
    assert 0 < drafted.counts.accepted < drafted.counts.drafted


@pytest.mark.parametrize(
    "sampling",
    [
        {"logprobs": 3},
        {"prompt_logprobs": 2},
        {"logprob_token_ids": [3, 77, 200]},
        {"logprob_token_ids": [3, 77, 200], "logprobs": 3},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4},
        {"stop_token_ids": list(range(0, VOCAB, 9)), "ignore_eos": False},
        {"min_tokens": 7, "stop_token_ids": list(range(0, VOCAB, 3)), "ignore_eos": False},
        {"bad_words": None, "allowed_token_ids": list(range(40))},
    ],
    ids=lambda sampling: "-".join(sampling),
)
def test_greedy_with(sampling: dict[str, Any], drafting: Engine, plain: Engine) -> None:
    given = prompts(4)
    drafted, expected = drafting.run(given, 24, **sampling), plain.run(given, 24, **sampling)
    assert drafted.tokens == expected.tokens
    for mine, theirs in zip(drafted.outputs, expected.outputs, strict=True):
        assert _ranks(mine.outputs[0].logprobs) == _ranks(theirs.outputs[0].logprobs)
        assert _ranks(mine.prompt_logprobs) == _ranks(theirs.prompt_logprobs)


@pytest.mark.parametrize("chunk", [2**30, 1], ids=["at once", "a request at a time"])
def test_logprobs_of_named_tokens_beside_others(
    chunk: int, drafting: Engine, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request of a batch gets what it asked for, also where vLLM verifies in chunks."""
    monkeypatch.setattr("vllm.v1.worker.gpu.spec_decode.rejection_sampler.MAX_CHUNK_BYTES", chunk)
    asked: list[dict[str, Any]] = [{"logprob_token_ids": [9, 4]}, {"logprobs": 4}, {}, {"logprob_token_ids": [1]}]
    given = prompts(4)
    params = [SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False, **one) for one in asked]
    together = drafting.llm.generate([{"prompt_token_ids": one} for one in given], params, use_tqdm=False)
    for prompt, one, wanted in zip(given, together, asked, strict=True):
        # Alone: Model Runner V1, where plain vLLM runs on CPUs, mixes up what the requests of a batch ask for.
        (other,) = plain.run([prompt], 24, **wanted).outputs
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert _ranks(one.outputs[0].logprobs) == _ranks(other.outputs[0].logprobs)
        assert (one.outputs[0].logprobs is None) == (not wanted)


def _ranks(logprobs: Any) -> Any:
    """Tokens in their order, with their log-probabilities as far as float32 agrees across batch shapes."""
    return logprobs and [
        step and {token: (entry.rank, pytest.approx(entry.logprob, abs=1e-4)) for token, entry in step.items()}
        for step in logprobs
    ]


def test_seeds_reproduce(drafting: Engine) -> None:
    given = prompts(4)
    first = drafting.run(given, 24, temperature=1.0, seed=11)
    assert first.tokens == drafting.run(given, 24, temperature=1.0, seed=11).tokens
    assert first.tokens != drafting.run(given, 24, temperature=1.0, seed=12).tokens


def test_fewer_rows_and_drafts_than_trained(start: StartEngine, tiny: Checkpoints, plain: Engine) -> None:
    narrow = {"method": "orthrus", "model": str(tiny.block_head), "orthrus_block_size": 4, "num_speculative_tokens": 3}
    engine = start(narrow)
    assert engine.runner.speculator.rows.input_ids.shape[1] == 4
    assert engine.run(prompts(4), 24).tokens == plain.run(prompts(4), 24).tokens


@pytest.mark.feature("numbers of drafts by batch size")
def test_drafts_chosen_by_batch_size(start: StartEngine, tiny: Checkpoints, plain: Engine) -> None:
    """vLLM's dynamic speculation, down to no drafts at all."""
    schedule = [[1, 2, 5], [3, 4, 2], [5, 8, 0]]
    engine = start(
        {
            "method": "orthrus",
            "model": str(tiny.block_head),
            "num_speculative_tokens": 5,
            "num_speculative_tokens_per_batch_size": schedule,
        }
    )
    drafted = engine.run(prompts(8), 24)
    assert drafted.tokens == plain.run(prompts(8), 24).tokens


@pytest.mark.feature("merged checkpoints")
def test_merged_checkpoint(start: StartEngine, tiny: Checkpoints, plain: Engine) -> None:
    """As published, without its remote code: the head is found in the target itself."""
    expected = plain.run(prompts(4), 40)
    alone = start(None, model=tiny.merged)
    assert alone.run(prompts(4), 40).tokens == expected.tokens
    drafted = start({"method": "orthrus", "orthrus_modes": []}, model=tiny.merged).run(prompts(4), 40)
    assert drafted.tokens == expected.tokens
    assert drafted.counts.drafted >= 15 * 4


@pytest.mark.parametrize("passes", ["one", "two"])
def test_structured_output(passes: str, start: StartEngine, tiny: Checkpoints) -> None:
    """Drafts that the grammar forbids are dropped by the scheduler, whatever the head thinks."""
    checkpoints.write_tokenizer(tiny.base)
    params = {"structured_outputs": StructuredOutputsParams(regex="[ -~]{6,40}")}
    settings = {"skip_tokenizer_init": False}
    expected = start(None, **settings).run(prompts(4), 24, ignore_eos=False, **params)
    speculative = {"method": "orthrus", "model": str(tiny.block_head), "orthrus_passes": passes}
    drafted = start(speculative, **settings).run(prompts(4), 24, ignore_eos=False, **params)
    assert drafted.tokens == expected.tokens
    assert 0 < drafted.counts.accepted < drafted.counts.drafted


def test_nothing_of_the_base_is_held_twice(drafting: Engine) -> None:
    runner = drafting.runner
    view, target = runner.speculator.model, runner.model
    assert view.target is target
    assert not set(view.modules()) & set(target.modules())
    parts = ("qkv_proj", "o_proj", "q_norm", "k_norm")
    names = {f"layers.{index}.{part}.weight" for index in range(2) for part in parts}
    assert {name for name, _ in view.named_parameters()} == names
    mine = {tensor.untyped_storage().data_ptr() for tensor in view.parameters() if tensor.numel()}
    assert not mine & {tensor.untyped_storage().data_ptr() for tensor in target.parameters()}
    cached = {name for group in runner.kv_cache_config.kv_cache_groups for name in group.layer_names}
    assert len(cached) == 2, "drafting added layers to the cache"


class HostReads(TorchDispatchMode):
    """Raises where an operation would make the host wait for the device to learn a value."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "item")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name.split("::")[1].removesuffix("_out") in self.WAITING:
            raise AssertionError(f"{function} makes the host wait for the device")
        return function(*args, **(kwargs or {}))


def test_drafting_never_waits_for_the_device(drafting: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    propose = OrthrusSpeculator.propose
    watched = []

    def watched_propose(self: OrthrusSpeculator, *arguments: Any, **options: Any) -> Any:
        with HostReads():
            result = propose(self, *arguments, **options)
        watched.append(result.shape)
        return result

    monkeypatch.setattr(OrthrusSpeculator, "propose", watched_propose)
    drafting.run(prompts(6), 8)
    assert watched
    with pytest.raises(AssertionError, match="wait"), HostReads():
        torch.ones(2).sum().item()


def test_requests_reading_their_prompt_draft_nothing(
    start: StartEngine, tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start({"method": "orthrus", "model": str(tiny.block_head)}, max_num_batched_tokens=16)
    passes: list[int] = []
    draft = DraftPass.compute

    def counting(self: DraftPass, num_reqs: int, *rest: Any) -> None:
        passes.append(num_reqs)
        draft(self, num_reqs, *rest)

    monkeypatch.setattr(DraftPass, "compute", counting)
    engine.run([list(range(100))], 1)
    assert len(passes) <= 1, "seven chunks of prompt and one token need at most one draft pass"
