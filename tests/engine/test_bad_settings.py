"""Whatever is written into `speculative_config`: it holds as written, or is refused in words of ours before serving."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig
from vllm.config.speculative import SpeculativeConfig
from vllm.config.utils import replace
from vllm.engine.arg_utils import EngineArgs

from tests.engine.conftest import Checkpoints
from vllm_orthrus.engine.config import known_settings
from vllm_orthrus.engine.settings import DraftShape

Build = Callable[..., Any]
OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 128}


@pytest.fixture(scope="module")
def plain(tiny: Checkpoints) -> VllmConfig:
    return EngineArgs(model=str(tiny.base), **OPTIONS).create_engine_config()


@pytest.fixture(scope="module")
def build(tiny: Checkpoints, plain: VllmConfig) -> Build:
    """vLLM's own way from its arguments to a speculative config."""

    def create(speculative: Any, **flags: Any) -> Any:
        arguments = EngineArgs(model=str(tiny.base), speculative_config=speculative, **(OPTIONS | flags))
        return arguments.create_speculative_config(plain.model_config, plain.parallel_config)

    return create


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# What a user might write

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
INNER = PLAIN | st.lists(PLAIN, max_size=3)
JSON = INNER | st.lists(INNER, max_size=2) | st.dictionaries(st.text(max_size=6), INNER, max_size=2)
SMALL = st.integers(1, 7) | st.integers(-1, 12)
HUGE = st.integers(10**9, 10**400)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "num_speculative_tokens": SMALL | st.just("3"),
    "draft_tensor_parallel_size": st.integers(1, 2),
    "draft_load_config": st.fixed_dictionaries(
        {"load_format": st.sampled_from(["auto", "safetensors", "dummy", "pt", "gguf", "tensorizer", "x"])}
    ),
    "draft_sample_method": st.sampled_from(["greedy", "probabilistic", "beam"]),
    "rejection_sample_method": st.sampled_from(["standard", "block", "synthetic", "fly", "strict"]),
    "synthetic_acceptance_length": st.floats(0, 9),
    "num_speculative_tokens_per_batch_size": st.lists(st.tuples(SMALL, SMALL | HUGE, SMALL | HUGE), max_size=3),
    "orthrus_block_size": SMALL,
    "orthrus_attention": st.sampled_from(["auto", "kernel", "gather", "write_through", "triton"]),
    "orthrus_passes": st.sampled_from(["auto", "one", "two", "1"]),
    "orthrus_modes": st.lists(st.integers(0, 8), max_size=4) | st.just([0, 7]),
    "orthrus_cascade": st.sampled_from(["refuse", "off", "chow", {"rule": "chow", "alpha": 0.5}])
    | st.fixed_dictionaries({"rule": st.sampled_from(["token_v3", "relaxed", "x"]), "alpha": st.floats(-1, 2)}),
    "orthrus_hypotheses": st.integers(0, 65),
    "orthrus_rows": st.integers(0, 40),
    "orthrus_verification": st.sampled_from(["backend", "fused", "kernel"]),
    "orthrus_vocabulary": st.sampled_from(["auto", "once", "twice", "never"]),
}
TRUTHS = ("use_local_argmax_reduction", "orthrus_time_modes", "orthrus_check_attention")
SENSIBLE = [*LIKELY, *TRUTHS]
NAMES = [*known_settings(), "orthrus_mask_token_id", "orthrus_drafting_rows", *SpeculativeConfig.__dataclass_fields__]
SPELT = [spelt for name in NAMES for spelt in (name, name.replace("_", "-"), name.upper()) if spelt != "method"]
KEYS = st.sampled_from(SPELT) | st.text(max_size=6) | st.integers()


@st.composite
def written(draw: st.DrawFn) -> dict[Any, Any]:
    sensible, found = draw(st.booleans()), {}
    for key in draw(st.lists(st.sampled_from(SENSIBLE) if sensible else KEYS, max_size=3, unique=True)):
        name = str(key).replace("-", "_")
        usual = st.booleans() if name in TRUTHS else LIKELY.get(name, JSON)
        found[key] = draw(usual if sensible else usual | JSON | HUGE)
    return found


def holds(setting: Any, given: Any) -> bool:
    """pydantic may have read a number or a truth out of text, and lists where tuples were."""
    as_json = [json.loads(json.dumps(value, default=vars)) for value in (setting, given)]
    return as_json[0] == as_json[1] or str(setting).lower() == str(given).lower()


def mentions(error: Exception, settings: dict[Any, Any]) -> bool:
    said = str(error).replace("-", "_")
    return "speculative_config" in said or any(str(key).replace("-", "_") in said for key in settings)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_generated(data: st.DataObject, build: Build, plain: VllmConfig, tiny: Checkpoints) -> None:
    settings = data.draw(written())
    settings = {"method": "orthrus", "model": str(tiny.block_head)} | settings
    flags = data.draw(st.sampled_from([{}, {}, {}, {"spec_tokens": 3}, {"spec_method": "orthrus"}]))
    try:
        spec = build(settings, **flags)
        whole = replace(plain, speculative_config=spec)
    except ValueError as error:
        event("refused")
        assert mentions(error, settings | {f"--{flag}".replace("_", "-"): 0 for flag in flags}), str(error)
        return
    event(f"taken, with {len(settings) - 2} settings")
    for key, value in settings.items():
        name = key.replace("-", "_")
        resolved = name == "synthetic_acceptance_length" or (name == "orthrus_passes" and value == "auto")
        if value is None or resolved:
            continue
        if name == "draft_load_config":
            assert spec.draft_load_config.load_format == value["load_format"]
        else:
            assert holds(getattr(spec, name), value), name
    shape = DraftShape.of(whole)
    assert 0 < shape.drafts <= shape.drafting_rows <= shape.block <= 8
    assert shape.mask_token_id == 255
    if settings.get("orthrus_passes", settings.get("orthrus-passes")) == "one":
        assert shape.num_hypotheses(1) > 0


# What somebody did write

Case = tuple[dict[Any, Any], dict[str, Any], str]
REFUSED: dict[str, Case] = {
    "filled in from the head": ({"orthrus_mask_token_id": 3}, {}, "has no setting orthrus_mask_token_id"),
    "rows that were taught": ({"orthrus_drafting_rows": 7}, {}, "has no setting orthrus_drafting_rows"),
    "given by vLLM": ({"target_model_config": None}, {}, "has no setting target_model_config"),
    "twice, by a flag": (
        {"num-speculative-tokens": 7},
        {"spec_tokens": 4},
        r"--spec-tokens=4 and speculative_config\['num_speculative_tokens'\]=7",
    ),
    "twice": (
        {"num-speculative-tokens": 7, "num_speculative_tokens": 7},
        {},
        "num_speculative_tokens twice, with hyphens and without",
    ),
    "a key that is no text": ({5: 1}, {}, "has the key 5, and the names of settings are text"),
    "a format": ({"draft_load_config": {"load_format": "gguf"}}, {}, "draft_load_config.load_format='gguf'"),
    "an unknown format": ({"draft_load_config": {"load_format": "x"}}, {}, "may be one of auto, safetensors, dummy"),
    "a table of too many": (
        {"num_speculative_tokens_per_batch_size": [[1, 8, 99]]},
        {},
        "wants 99 drafts, and there are no more than num_speculative_tokens=7",
    ),
    "an empty table": ({"num_speculative_tokens_per_batch_size": []}, {}, "must not be empty"),
    "a table with a hole at its start": (
        {"num_speculative_tokens_per_batch_size": [[2, 8, 3]]},
        {},
        "first batch-size range must start at 1",
    ),
    "no rows for one pass": (
        {"orthrus_rows": 1, "orthrus_passes": "one"},
        {},
        "orthrus_passes='one' does not go with orthrus_rows=1, as one request alone needs 24. Change that",
    ),
    "no rows to fuse": (
        {"orthrus_rows": 23, "orthrus_verification": "fused", "orthrus_attention": "kernel"},
        {},
        "orthrus_verification='fused' does not go with orthrus_rows=23",
    ),
    "a revision of a folder": ({"revision": "v1"}, {}, "revision='v1' was given for .* is a folder here"),
    "an empty name": ({"model": ""}, {}, "model='' names nothing"),
    "another method's": ({"prompt_lookup_max": 3}, {}, "prompt_lookup_max=3 does not apply .* another method"),
    "one pass of trimmed verifications": (
        {"enable_adaptive_verification": True, "orthrus_passes": "one"},
        {},
        "orthrus_passes='one' does not go with enable_adaptive_verification=True",
    ),
    "distributions that are not there": (
        {"use_local_argmax_reduction": True, "draft_sample_method": "probabilistic"},
        {},
        "use_local_argmax_reduction=True does not go with draft_sample_method='probabilistic'",
    ),
    "the target's": ({"enforce_eager": True}, {}, "enforce_eager=True does not apply .* --enforce-eager for both"),
    "code": ({"code_revision": "main"}, {}, "code_revision='main' does not apply .* no code"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, build: Build, tiny: Checkpoints) -> None:
    settings, flags, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        build({"method": "orthrus", "model": str(tiny.block_head)} | settings, **flags)


@pytest.mark.parametrize("nonsense", [5, [1], "x", True, '{"method": "orthrus"}'])
@pytest.mark.parametrize("flags", [{}, {"spec_method": "orthrus"}])
def test_no_object(nonsense: Any, flags: dict[str, Any], tiny: Checkpoints) -> None:
    arguments = EngineArgs(model=str(tiny.base), speculative_config=nonsense, **(OPTIONS | flags))
    with pytest.raises(ValueError, match=r"speculative_config=.* must be an object with settings"):
        arguments.create_engine_config()


def test_rows_for_one_request_are_enough(build: Build, tiny: Checkpoints) -> None:
    few = {"method": "orthrus", "model": str(tiny.block_head), "orthrus_rows": 24, "orthrus_passes": "one"}
    assert build(few).orthrus_passes == "one"


def test_pooling_is_refused(tiny: Checkpoints) -> None:
    settings = {"method": "orthrus", "model": str(tiny.block_head)}
    arguments = EngineArgs(model=str(tiny.base), speculative_config=settings, runner="pooling", **OPTIONS)
    with pytest.raises(ValueError, match="runner='pooling' does not go with method 'orthrus'"):
        arguments.create_engine_config()


def test_a_format_of_the_target_says_nothing_of_the_head(build: Build, tiny: Checkpoints) -> None:
    """Targets may be loaded in ways that no head is stored for; where downloads go and made-up weights are for both."""
    settings = {"method": "orthrus", "model": str(tiny.block_head)}
    for asked, found in (("runai_streamer", "auto"), ("safetensors", "auto"), ("dummy", "dummy")):
        spec = build(settings, load_format=asked, download_dir="/some/where")
        assert (spec.draft_load_config.load_format, spec.head_cache) == (found, "/some/where")
    own = settings | {"draft_load_config": {"load_format": "dummy"}}
    assert build(own, load_format="auto").made_up


def test_a_merged_folder_served_at_a_revision(tiny: Checkpoints) -> None:
    """vLLM takes a revision for a folder and passes it over; the head in it is no other."""
    options = OPTIONS | {"revision": "v1"}
    arguments = EngineArgs(model=str(tiny.merged), speculative_config={"method": "orthrus"}, **options)
    assert arguments.create_engine_config().speculative_config.revision is None


def test_workers_open_the_commit_that_was_checked(
    build: Build, tiny: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch may move between the check and the last worker."""
    import huggingface_hub.constants

    repository = tmp_path / "models--some--head"
    for commit in ("a" * 40, "b" * 40):
        (repository / "snapshots" / commit).mkdir(parents=True)
        for file in tiny.block_head.iterdir():
            (repository / "snapshots" / commit / file.name).symlink_to(file)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    settings = {"method": "orthrus", "model": "some/head"}
    for load_format in ("auto", "dummy"):
        spec = build(settings | {"draft_load_config": {"load_format": load_format, "download_dir": str(tmp_path)}})
        assert spec.revision == "a" * 40
