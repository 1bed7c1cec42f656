"""`orthrus_verification: fused`: our kernel in the place of vLLM's attention gives what vLLM's attention gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.engine.closures import ForwardClosures
from tests.engine.conftest import THOROUGH, Checkpoints, StartEngine, one_pass
from tests.engine.harness import UNDER_PRESSURE, Engine, prompts, says_the_same_under_pressure
from vllm_orthrus.engine.attention import kernel as kernel_attention
from vllm_orthrus.engine.attention.gather import GatherAttention
from vllm_orthrus.engine.onepass import verification
from vllm_orthrus.engine.onepass.forward import HypothesisRows, OnePass
from vllm_orthrus.engine.onepass.verification import BackendVerification, FusedVerification
from vllm_orthrus.engine.target_attention import Attention
from vllm_orthrus.kernels.dual_view_attention import naive

Forward = Callable[..., torch.Tensor]


def fused(tiny: Checkpoints, **settings: Any) -> dict[str, Any]:
    return one_pass(tiny.block_head, orthrus_attention="kernel", orthrus_verification="fused") | settings


@pytest.fixture(scope="module")
def engine(start: StartEngine, tiny: Checkpoints) -> Engine:
    return start(fused(tiny, orthrus_hypotheses=2), max_num_batched_tokens=512)


class Twice:
    """Runs every forward with hypotheses again, with vLLM's attention and a dense one in the kernel's place.

    The fused one comes first, when the cache does not yet hold the keys and values that it has to write.
    """

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.verified = self.drafted = 0.0  # worst differences
        self.forwards, self.ragged = 0, 0

    def __call__(
        self, one: OnePass, ids: torch.Tensor, positions: torch.Tensor, embedded: Any, rows: HypothesisRows
    ) -> torch.Tensor:
        verified = self.forward(one, ids, positions, embedded, rows)
        drafted, attention = rows.hidden.clone(), one.attention
        assert isinstance(attention, FusedVerification)
        one.attention = BackendVerification(GatherAttention(attention.blocks.layers), False)
        self.verified = max(self.verified, distance(verified, self.forward(one, ids, positions, embedded, rows)))
        one.attention = attention
        real = (rows.blocks.prefix_lengths >= 0).flatten().repeat_interleave(one.shape.block)
        self.drafted = max(self.drafted, distance(drafted[real], rows.hidden[real]))
        rows.hidden.copy_(drafted)
        self.forwards += 1
        self.ragged += len(positions) != one.shape.verified * len(rows.blocks.prefix_lengths)
        return verified

    def agree(self) -> bool:
        assert self.forwards > 5, "hardly any hypotheses were carried"
        return self.verified <= 1e-5 and self.drafted <= 1e-5


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max()) if one.numel() else 0.0


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch) -> Twice:
    twice = Twice(OnePass.forward_with_rows)
    monkeypatch.setattr(OnePass, "forward_with_rows", lambda *arguments: twice(*arguments))
    return twice


def test_same_text_and_same_hidden_states(engine: Engine, plain: Engine, twice: Twice) -> None:
    """Prompts of different lengths, one of which ends at the context limit and so loses drafts on its way."""
    given = [*prompts(2, shortest=20), [(5 * j) % 250 for j in range(240)]]
    assert engine.run(given, 24).tokens == plain.run(given, 24).tokens
    print(
        f"{twice.forwards} forwards: verification rows {twice.verified:.1e}, hypothesis rows {twice.drafted:.1e} apart"
    )
    assert twice.agree()
    assert twice.ragged > 0


@pytest.mark.slow
@pytest.mark.skipif(not THOROUGH, reason="interpreted, two minutes; ORTHRUS_TEST_THOROUGH=1 runs it")
def test_chunked_prefill_preemption_and_prefix_hits(
    start: StartEngine, tiny: Checkpoints, plain: Engine, twice: Twice
) -> None:
    engine = start(
        fused(tiny, orthrus_rows=4096, orthrus_block_size=5, num_speculative_tokens=4, orthrus_hypotheses=2),
        **UNDER_PRESSURE,
    )
    says_the_same_under_pressure(engine, plain)
    assert twice.agree()


def _lengths(by: int) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        prepare = FusedVerification.prepare

        def faulty(self: FusedVerification, batch: Any) -> None:
            prepare(self, batch)
            self.lengths += by * (self.lengths > 0)

        patch.setattr(FusedVerification, "prepare", faulty)

    return plant


def _nothing_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(verification, "write_to_cache", lambda *arguments: None)


FAULTS = {"a position too many": _lengths(+1), "a position too few": _lengths(-1), "nothing written": _nothing_written}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_notices(fault: str, engine: Engine, twice: Twice, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        FAULTS[fault](patch)
        engine.run(prompts(1, shortest=20), 16)
    assert not twice.agree()


def test_replayed_verifications(engine: Engine, plain: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three requests in a graph of four: what their rows see is where it was captured, and the fourth does no harm."""
    given, attention = prompts(3, shortest=20), engine.runner.speculator.drafting.one_pass.attention
    expected = plain.run(given, 12).tokens
    forwards = ForwardClosures(engine, 8, (24,))
    forwards.install(monkeypatch)
    assert (attention.lengths == -1).all()
    assert engine.run(given, 12).tokens == expected
    assert set(forwards.replayed) == {4}
    assert (attention.lengths[18:24] == -1).all()
    # A planted fault: what a batch's rows see is written elsewhere than where it was captured.
    prepare = FusedVerification.prepare

    def astray(self: FusedVerification, batch: Any) -> None:
        captured, self.lengths = self.lengths, self.lengths.clone()
        prepare(self, batch)
        self.lengths = captured

    monkeypatch.setattr(FusedVerification, "prepare", astray)
    assert engine.run(given, 12).tokens != expected


class Errors:
    """Of verification rows, ours and vLLM's against the same in float64: relative norms, overall and worst row."""

    def __init__(self, layers: list[Any], launch: Callable[..., torch.Tensor]) -> None:
        self.attn = {layer.attn.kv_cache.data_ptr(): layer.attn for layer in layers}
        self.launch = launch
        self.squares = {"ours": 0.0, "vLLM's": 0.0, "exact": 0.0}
        self.worst = {"ours": 0.0, "vLLM's": 0.0}

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: Any, *rest: Any, **named: Any) -> Any:
        rows = named.pop("verification")
        # Triton's interpreter cuts bfloat16 off where a GPU rounds, so the rounding is left to PyTorch.
        unrounded = rows and rows._replace(out=rows.out.float())
        out = self.launch(q, k, v, cache, *rest, verification=unrounded, **named)
        if rows is not None:
            rows.out.copy_(unrounded.out)
            exact = torch.zeros_like(rows.q, dtype=torch.float64)
            naive(q, k, v, cache, *rest, verification=rows._replace(out=exact))
            theirs = torch.empty_like(rows.out)
            name = self.attn[cache.keys.data_ptr()].layer_name
            # Keys and values are in the cache; the CPU backend takes them from there.
            torch.ops.vllm.unified_attention_with_output(rows.q, k, v, theirs, name)
            norms = exact.norm(dim=-1)
            self.squares["exact"] += float(norms.square().sum())
            for which, found in (("ours", rows.out), ("vLLM's", theirs)):
                error = (found.double() - exact).norm(dim=-1)
                self.squares[which] += float(error.square().sum())
                self.worst[which] = max(self.worst[which], float((error / norms).max()))
        return out

    def overall(self, which: str) -> float:
        return float((self.squares[which] / self.squares["exact"]) ** 0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_as_exact_as_the_backend(
    dtype: str, start: StartEngine, tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted, our kernel keeps softmax weights in float32, which on a GPU are rounded to the values' type."""
    if dtype == "bfloat16" and torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM packs a cache in bfloat16 for this CPU's matrix tiles, and no kernel of ours reads that")
    engine = start(fused(tiny, orthrus_hypotheses=1), dtype=dtype, max_num_seqs=2)
    layers = engine.runner.speculator.drafting.one_pass.attention.blocks.layers
    errors = Errors(layers, kernel_attention.dual_view_attention)
    monkeypatch.setattr(kernel_attention, "dual_view_attention", errors)
    engine.run(prompts(2, shortest=120), 16)
    for which, worst in errors.worst.items():
        print(f"{dtype}, {which}: {errors.overall(which):.2e} overall, {worst:.2e} in the worst row and head")
    assert 0 < errors.overall("ours") <= 1.2 * errors.overall("vLLM's")


def test_attention_that_is_more_than_a_softmax_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    speculator = engine.runner.speculator
    attention, config = speculator.draft_pass.attention, speculator.vllm_config
    layers = attention.layers
    speculator.drafting.bind(attention, layers, speculator.block_tables)
    attn = layers[1].attn
    cases: list[tuple[Any, str, Any, str]] = [
        (attn, "sliding_window", 64, "sliding window"),
        (attn, "has_sink", True, "sinks"),
        (attn, "attn_type", "encoder_only", "attn_type='encoder_only'"),
        (attn, "kv_sharing_target_layer_name", "model.layers.0.self_attn.attn", "another layer's cache"),
        (attn, "kv_cache_dtype", "nvfp4", "kv_cache_dtype=nvfp4"),
        (attn, "__class__", type("RSWAAttention", (Attention,), {}), r"layers\.1\..* it is a RSWAAttention"),
        (attn.impl, "logits_soft_cap", 30.0, "caps its logits"),
        (attn.impl, "alibi_slopes", torch.ones(4), "ALiBi"),
        (attn.attn_backend, "forward_includes_kv_cache_update", True, "writes the cache itself"),
        (config, "kv_transfer_config", object(), "KV connector"),
    ]
    for owner, name, value, message in cases:
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=message) as refusal:
            patch.setattr(owner, name, value)
            speculator.drafting.bind(attention, layers, speculator.block_tables)
        assert "Set orthrus_verification to 'backend'" in str(refusal.value)
