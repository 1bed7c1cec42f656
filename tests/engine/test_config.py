"""`speculative_config` from every door, what is filled in, and what is refused before anything is loaded."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.config.speculative import SpeculativeConfig
from vllm.config.utils import replace
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.worker import startup_plan

from tests.documented import commands
from tests.engine import checkpoints
from tests.engine.conftest import Checkpoints
from vllm_orthrus.engine import timing
from vllm_orthrus.engine.config import DEFAULT_DRAFTS, OrthrusSpeculativeConfig
from vllm_orthrus.errors import UserError
from vllm_orthrus.kernels.forms import SETTING
from vllm_orthrus.patches import install_in_worker, logprobs


def build(model: Path, speculative: dict[str, Any] | None = None, **options: Any) -> VllmConfig:
    settings: dict[str, Any] = {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 128}
    return EngineArgs(model=str(model), speculative_config=speculative, **(settings | options)).create_engine_config()


def orthrus(head: Path, **settings: Any) -> dict[str, Any]:
    return {"method": "orthrus", "model": str(head)} | settings


def test_filled_in_from_the_head(tiny: Checkpoints) -> None:
    config = build(tiny.base, orthrus(tiny.block_head))
    spec = config.speculative_config
    assert isinstance(spec, OrthrusSpeculativeConfig)
    assert (spec.orthrus_block_size, spec.num_speculative_tokens, spec.orthrus_mask_token_id) == (8, 7, 255)
    assert config.use_v2_model_runner
    assert config.num_lookahead_tokens == 8, "a cache that nothing else reads is written through"
    direct = build(tiny.base, orthrus(tiny.block_head, orthrus_attention="gather"))
    assert direct.num_lookahead_tokens == 0


def test_verification_is_the_backends_unless_told(tiny: Checkpoints) -> None:
    assert build(tiny.base, orthrus(tiny.block_head)).speculative_config.orthrus_verification == "backend"
    told = orthrus(tiny.block_head, orthrus_verification="fused", orthrus_attention="kernel")
    assert build(tiny.base, told).speculative_config.orthrus_passes == "one"


def test_merged_checkpoint_needs_nothing_else(tiny: Checkpoints) -> None:
    spec = build(tiny.merged, {"method": "orthrus"}).speculative_config
    assert spec.model == str(tiny.merged)
    assert (spec.orthrus_block_size, spec.num_speculative_tokens) == (DEFAULT_DRAFTS + 1, DEFAULT_DRAFTS), "not all 32"
    wide = build(tiny.merged, {"method": "orthrus", "num_speculative_tokens": 20}).speculative_config
    assert wide.orthrus_block_size == 21


def test_flags(tiny: Checkpoints) -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = ["--spec-method", "orthrus", "--spec-model", str(tiny.block_head), "--spec-tokens", "4"]
    arguments = parser.parse_args(["--model", str(tiny.base), "--skip-tokenizer-init", *flags])
    spec = EngineArgs.from_cli_args(arguments).create_engine_config().speculative_config
    assert (spec.method, spec.num_speculative_tokens) == ("orthrus", 4)

    settings = json.dumps(orthrus(tiny.block_head) | {"num-speculative-tokens": 3})
    model = ["--model", str(tiny.base), "--skip-tokenizer-init"]
    arguments = parser.parse_args([*model, "--speculative-config", settings])
    assert EngineArgs.from_cli_args(arguments).create_engine_config().speculative_config.num_speculative_tokens == 3


def test_settings_of_the_pages(tiny: Checkpoints, tmp_path: Path) -> None:
    """What the documentation tells people to give `--speculative-config`: all of it is in force."""
    told = {given for one in commands() for given in re.findall(r"--speculative-config '([^']+)'", one.line)}
    assert len(told) >= 3
    for given in map(json.loads, told):
        if "orthrus_selector" in given:
            given["orthrus_selector"] = str(checkpoints.write_selector(tmp_path / "selector"))
        spec = build(tiny.base, {"model": str(tiny.block_head)} | given).speculative_config
        assert isinstance(spec, OrthrusSpeculativeConfig)
        assert {name: getattr(spec, name) for name in given} == given


def test_survives_copies(tiny: Checkpoints) -> None:
    import cloudpickle

    config = build(tiny.base, orthrus(tiny.block_head, num_speculative_tokens=4))
    for copy in (
        pickle.loads(pickle.dumps(config)),
        cloudpickle.loads(cloudpickle.dumps(config)),
        replace(config, load_config=config.load_config),
    ):
        assert isinstance(copy.speculative_config, OrthrusSpeculativeConfig)
        assert copy.speculative_config.num_speculative_tokens == 4
        assert copy.compute_hash() == config.compute_hash()
    changed = replace(config.speculative_config, draft_sample_method="probabilistic")
    assert (changed.draft_sample_method, changed.num_speculative_tokens) == ("probabilistic", 4)


def test_loads_plugins_where_none_are(tiny: Checkpoints, tmp_path: Path) -> None:
    """vLLM unpickles the config in a new process before it loads plugins there, in the midst of what they patch."""
    pickled = tmp_path / "config"
    pickled.write_bytes(pickle.dumps(build(tiny.base, orthrus(tiny.block_head))))
    child = (
        "import pickle, pathlib, sys, vllm.plugins as plugins\n"
        "assert not plugins.plugins_loaded\n"
        "spec = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()).speculative_config\n"
        "assert plugins.plugins_loaded\n"
        "print(type(spec).__name__, spec.orthrus_block_size)"
    )
    printed = subprocess.run([sys.executable, "-c", child, str(pickled)], capture_output=True, text=True, check=True)
    assert printed.stdout.split()[-2:] == ["OrthrusSpeculativeConfig", "8"]


def test_other_methods_keep_their_own_config(tiny: Checkpoints) -> None:
    spec = build(tiny.base, {"method": "ngram", "num_speculative_tokens": 2}).speculative_config
    assert type(spec) is SpeculativeConfig


def test_other_methods_keep_their_own_rejection_sampler(tiny: Checkpoints) -> None:
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    make = logprobs.WORKER_PATCHES[0].replace(RejectionSampler)
    sampler, device = SimpleNamespace(get_logprobs_dims=lambda *_: None), torch.device("cpu")
    ngram = build(tiny.base, {"method": "ngram", "num_speculative_tokens": 2}).speculative_config
    ours = build(tiny.base, orthrus(tiny.block_head)).speculative_config
    assert type(make(sampler, ngram, device)) is RejectionSampler
    assert type(make(sampler, ours, device)) is not RejectionSampler


def test_runs_as_many_requests_as_without_drafts(tiny: Checkpoints) -> None:
    """More than fit into one draft pass: they draft in turns."""
    limits = {"max_num_batched_tokens": 64, "max_num_seqs": 32, "max_model_len": 64}
    scheduler = build(tiny.base, orthrus(tiny.block_head), **limits).scheduler_config
    assert (scheduler.max_num_seqs, scheduler.max_num_active_seqs) == (32, None)


def test_kept_distributions_bound_the_default_number_of_requests(tiny: Checkpoints) -> None:
    kept = orthrus(tiny.block_head, draft_sample_method="probabilistic")
    assert build(tiny.base, kept).scheduler_config.max_num_seqs == 256
    assert build(tiny.base, kept, max_num_seqs=300).scheduler_config.max_num_seqs == 300


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "pipeline parallel": ({}, {"pipeline_parallel_size": 2}, "pipeline_parallel_size=2 .* must be 1"),
    "more drafts than rows": ({"num_speculative_tokens": 8}, {}, "num_speculative_tokens=8 .* at most 7"),
    "wider than trained": ({"orthrus_block_size": 9}, {}, "orthrus_block_size=9 .* at most 8"),
    "unknown setting": ({"orthrus_blocksize": 4}, {}, "orthrus_blocksize.*orthrus_block_size"),
    "parallel drafting": ({"parallel_drafting": True}, {}, "parallel_drafting=True does not apply"),
    "draft ranks": ({"draft_tensor_parallel_size": 2}, {}, "draft_tensor_parallel_size=2 differs"),
    "one pass through slots": (
        {"orthrus_passes": "one", "orthrus_attention": "write_through"},
        {},
        "orthrus_passes='one' does not go with orthrus_attention='write_through'",
    ),
    "one pass without probabilities": (
        {"orthrus_passes": "one", "use_local_argmax_reduction": True},
        {},
        "use_local_argmax_reduction=True",
    ),
    "fused without hypotheses": (
        {"orthrus_verification": "fused", "orthrus_passes": "two", "orthrus_attention": "kernel"},
        {},
        "orthrus_verification='fused' .* orthrus_passes='two', .* orthrus_passes to 'one'",
    ),
    "fused without the kernel": (
        {"orthrus_verification": "fused"},
        {},
        "orthrus_verification='fused' .* orthrus_attention='gather' .* orthrus_attention to 'kernel'",
    ),
    "fused through slots": (
        {"orthrus_verification": "fused", "orthrus_attention": "write_through"},
        {},
        "orthrus_verification='fused' .* orthrus_attention='write_through' .* orthrus_verification to 'backend'",
    ),
    "fused and checked": (
        {"orthrus_verification": "fused", "orthrus_attention": "kernel", "orthrus_check_attention": True},
        {},
        "orthrus_verification='fused' does not go with orthrus_check_attention=True",
    ),
    "once in two passes": (
        {"orthrus_vocabulary": "once", "orthrus_passes": "two"},
        {},
        "orthrus_vocabulary='once' does not go with orthrus_passes='two'.* leave orthrus_vocabulary at 'auto'",
    ),
    "once where one pass can't be": (
        {"orthrus_vocabulary": "once", "orthrus_attention": "write_through"},
        {},
        "orthrus_vocabulary='once' does not go with orthrus_attention='write_through'",
    ),
    "once where ranks share requests": (
        {"orthrus_vocabulary": "once"},
        {"enable_batch_sharded_sampling": True},
        "orthrus_vocabulary='once' does not go with enable_batch_sharded_sampling=True",
    ),
    "neither once nor twice": ({"orthrus_vocabulary": "never"}, {}, "'auto', 'once' or 'twice'"),
    "neither backend nor fused": ({"orthrus_verification": "kernel"}, {}, "'backend' or 'fused'"),
    "no such head": ({"model": "/no/such/folder"}, {}, "/no/such/folder"),
    "LoRA": ({}, {"enable_lora": True}, "enable_lora"),
    "prefetched weights": ({}, {"offload_backend": "prefetch", "offload_group_size": 2}, "offload_group_size=2"),
    "no room for a block": ({}, {"max_num_batched_tokens": 4, "max_num_seqs": 2}, "one draft block"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tiny: Checkpoints) -> None:
    settings, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        build(tiny.base, orthrus(tiny.block_head, **settings), **options)


def beside(tiny: Checkpoints, settings: dict[str, Any], **parallel: Any) -> OrthrusSpeculativeConfig:
    """Of a target that is parallel in this way, which takes what this machine lacks."""
    config = build(tiny.base, orthrus(tiny.block_head))
    for name, value in parallel.items():
        setattr(config.parallel_config, name, value)
    return OrthrusSpeculativeConfig(
        method="orthrus",
        model=str(tiny.block_head),
        target_model_config=config.model_config,
        target_parallel_config=config.parallel_config,
        **settings,
    )


@pytest.mark.parametrize("size", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_context_parallelism_is_refused(size: str, tiny: Checkpoints) -> None:
    with pytest.raises(ValueError, match=f"{size}=2"):
        beside(tiny, {}, **{size: 2})


def test_ranks_that_decide_by_themselves_have_one_mode(tiny: Checkpoints) -> None:
    """Two clocks would tell the ranks of one engine different numbers of drafts, and neither would ever go on."""
    apart = {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": 2, "world_size": 2}
    assert beside(tiny, {}, **apart).orthrus_modes is None
    with pytest.raises(ValueError, match=r"orthrus_modes=\[0, 7\] needs one scheduler for all ranks"):
        beside(tiny, {"orthrus_modes": [0, 7]}, **apart)
    assert beside(tiny, {}, **(apart | {"distributed_executor_backend": "ray"})).orthrus_modes == [0, 3, 7]
    assert beside(tiny, {}, distributed_executor_backend="external_launcher").orthrus_modes == [0, 3, 7]


def test_cascades_are_counted_whole_or_refused(tiny: Checkpoints) -> None:
    """With batches sharded for sampling a rank would tell its own requests' lossy tokens alone."""
    config = build(tiny.base, orthrus(tiny.block_head)).speculative_config
    lossy = {"orthrus_cascade": {"rule": "relaxed", "k": 2, "ratio": 0.1}}
    assert config.cascade_of(lossy) is not None
    config.target_parallel_config.enable_batch_sharded_sampling = True
    assert config.cascade_of({}) is None
    with pytest.raises(UserError, match="enable_batch_sharded_sampling=True"):
        config.cascade_of(lossy)


def test_data_parallel_ranks_are_engines_of_their_own(tiny: Checkpoints) -> None:
    config = build(tiny.base, orthrus(tiny.block_head), data_parallel_size=2)
    assert config.speculative_config.orthrus_modes == [0, 3, 7]


def test_memory_is_planned_anew_for_other_heads_and_settings(tiny: Checkpoints) -> None:
    """vLLM's key knows the method and the target, whose plan would leave no room for a larger head and its graphs."""
    install_in_worker()

    def key(**settings: Any) -> str:
        return str(startup_plan.compute_plan_fingerprint(build(tiny.base, orthrus(tiny.block_head, **settings)), 0, 1))

    others = [{"orthrus_modes": []}, {"orthrus_hypotheses": 2}, {"draft_sample_method": "probabilistic"}]
    assert len({key(), *(key(**settings) for settings in others)}) == 4
    assert key() == key()
    stock = startup_plan.compute_plan_fingerprint.__wrapped__  # type: ignore[attr-defined]
    plain = build(tiny.base)
    assert startup_plan.compute_plan_fingerprint(plain, 0, 1) == stock(plain, 0, 1)


def test_steps_are_timed_anew_where_they_take_another_time(tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def place(**options: Any) -> Path:
        return timing.place(timing.what_counts(build(tiny.base, orthrus(tiny.block_head), **options)))

    places = [place(), place(enforce_eager=True), place(block_size=32)]
    for name, value in {"VLLM_BATCH_INVARIANT": "1", SETTING: "torch"}.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            places.append(place())
    assert len(set(places)) == len(places)
    assert place() == places[0]


def test_model_runner_v1_is_refused(tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER"):
        build(tiny.base, orthrus(tiny.block_head))


def test_both_doors_at_once_are_refused(tiny: Checkpoints) -> None:
    with pytest.raises(ValueError, match=r"--spec-tokens=2 .* both set"):
        build(tiny.base, orthrus(tiny.block_head, num_speculative_tokens=3), spec_tokens=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32}, "hidden_size"),
        ({"vocab_size": 512}, "vocab_size"),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, "full attention"),
        ({"num_hidden_layers": 3}, "num_layers"),
    ],
    ids=["width", "vocabulary", "sliding window", "layers"],
)
def test_head_that_does_not_fit(change: dict[str, Any], message: str, tiny: Checkpoints, tmp_path: Path) -> None:
    base = tmp_path / "other"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(checkpoints.CONFIG | change))
    with pytest.raises(ValueError, match=message):
        build(base, orthrus(tiny.block_head))


def test_base_without_a_known_head(tiny: Checkpoints) -> None:
    with pytest.raises(ValueError, match="no Orthrus head is known"):
        build(tiny.base, {"method": "orthrus"})


def test_incomplete_head(tiny: Checkpoints, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    head = tmp_path / "head"
    checkpoints.write_head(head, block_size=8)
    tensors = load_file(head / "model.safetensors")
    tensors.pop("model.layers.1.self_attn.o_proj_diff.weight")
    save_file(tensors, head / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj_diff\.weight is missing"):
        build(tiny.base, orthrus(head))


def test_random_weights_need_only_the_facts_of_a_head(tiny: Checkpoints, tmp_path: Path) -> None:
    """`load_format: dummy`, for timing a shape without its weights."""
    head = tmp_path / "head"
    head.mkdir()
    (head / "config.json").write_text((tiny.block_head / "config.json").read_text())
    spec = build(tiny.base, orthrus(head), load_format="dummy").speculative_config
    assert spec.num_speculative_tokens == 7
    with pytest.raises(ValueError, match="safetensors"):
        build(tiny.base, orthrus(head))
