"""The patches: checked before applied, all or nothing, once, and nothing to see without `method: orthrus`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.reference_pages import patches_page
from scripts.site_pages import ROOT
from tests.engine.conftest import Checkpoints
from vllm_orthrus import patches
from vllm_orthrus.patches.registry import Patch, State, apply_all, is_property, literals, locate, takes


class Target:
    """Something to patch."""

    table = {"entry": 1}  # noqa: RUF012

    def method(self, value: int) -> int:
        return value

    @property
    def size(self) -> int:
        return 1


def patch(target: str, **changes: Any) -> Patch:
    settings: dict[str, Any] = {
        "target": f"{__name__}:Target.{target}",
        "why": "-",
        "upstream": "-",
        "remove_when": "-",
        "check": takes("self", "value"),
        "replace": lambda original: lambda self, value: original(self, value) + 1,
    }
    return Patch(**settings | changes)


@pytest.fixture(autouse=True)
def pristine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in list(vars(Target).items()):
        if not name.startswith("__"):
            monkeypatch.setattr(Target, name, value)


def test_applies_once() -> None:
    good = patch("method")
    assert apply_all([good]) == []
    assert apply_all([good]) == []
    assert good.state is State.APPLIED
    assert Target().method(1) == 2


def test_one_unknown_target_holds_back_all() -> None:
    good, bad = patch("method"), patch("method", check=takes("self", "other"))
    assert apply_all([good, bad]) == [bad]
    assert (good.state, bad.state) == (State.PENDING, State.REFUSED)
    assert "expected parameters ('self', 'other')" in str(bad.problem)
    assert Target().method(1) == 1


@pytest.mark.parametrize("missing", ["nothing", "table[nothing]"])
def test_missing_target_is_named(missing: str) -> None:
    absent = patch(missing)
    assert apply_all([absent]) == [absent]
    assert "missing" in str(absent.problem)


def test_not_needed_here() -> None:
    elsewhere = patch("nothing", applies=lambda: False)
    assert apply_all([elsewhere]) == []
    assert elsewhere.state is State.NOT_NEEDED


def test_entries_and_properties_are_targets() -> None:
    entry = patch("table[entry]", check=lambda value: None, replace=lambda value: value + 1)
    size = patch("size", check=is_property, replace=lambda original: property(lambda self: original.fget(self) + 1))
    assert apply_all([entry, size]) == []
    assert (Target.table["entry"], Target().size) == (2, 2)
    Target.table["entry"] = 1


def test_importers_by_name_are_followed() -> None:
    import vllm.v1.worker.gpu.model_runner as model_runner
    import vllm.v1.worker.gpu.spec_decode as spec_decode

    assert patches.install()
    assert model_runner.init_speculator is spec_decode.init_speculator


def test_every_patch_applies_here() -> None:
    assert patches.install()
    patches.install_in_worker()
    for one in (*patches.PATCHES, *patches.WORKER_PATCHES):
        assert one.state in (State.APPLIED, State.NOT_NEEDED), f"{one.target}: {one.problem}"


def test_the_model_runner_is_not_imported_for_its_patch() -> None:
    """Processes that never draft shall not load what drafts."""
    code = "import sys; from vllm_orthrus.plugin import register; register(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    loaded = done.stdout.split()
    assert "vllm.engine.arg_utils" in loaded
    assert "vllm.v1.worker.gpu.model_runner" not in loaded


def test_an_unknown_model_runner_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(patches.logger, "warning", lambda text, *values: said.append(text % values))
    other = patch("table[entry]", check=lambda value: None, replace=lambda value: value + 1)
    monkeypatch.setattr(patches, "WORKER_PATCHES", [patch("method", check=takes("self", "other")), other])
    patches.install_in_worker()
    assert len(said) == 1
    assert "Target.method" in said[0]
    assert (Target().method(1), Target.table["entry"]) == (1, 2), "one does not hold back the other"
    Target.table["entry"] = 1


def test_every_patch_explains_itself() -> None:
    every = (*patches.PATCHES, *patches.WORKER_PATCHES)
    for one in every:
        assert all((one.why, one.upstream, one.remove_when)), one.target
    assert len({one.why for one in every}) == len(every), "a reason that fits two patches says too little of one"


def test_installing_twice_changes_nothing() -> None:
    assert patches.install()
    applied = [one for one in patches.PATCHES if one.state is State.APPLIED]
    before = [locate(one.target).get() for one in applied]
    assert patches.install()
    assert [locate(one.target).get() for one in applied] == before
    choices = literals(locate("vllm.config.speculative:SpeculativeConfig.__dataclass_fields__[method].type").get())
    assert choices.count("orthrus") == 1


def test_unsupported_vllm_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    vllm_logger = logging.getLogger("vllm")
    monkeypatch.setattr(vllm_logger, "propagate", True)
    monkeypatch.setattr(patches, "SUPPORTED_VLLM", ">=0.99")
    monkeypatch.setattr(patches, "_refused", False)
    monkeypatch.setattr(patches, "apply_all", lambda patches: pytest.fail("patched an unsupported vLLM"))
    assert not patches.install()
    assert not patches.install()
    # vLLM's handlers may hand one record to the capture twice; a second call would make a second record.
    messages = {id(record): record.getMessage() for record in caplog.records if "vllm-orthrus" in record.getMessage()}
    assert len(messages) == 1
    assert ">=0.99" in next(iter(messages.values()))


WITHOUT_METHOD = """
import json, sys
from tests.engine.harness import Engine, prompts
if __name__ == "__main__":
    engine = Engine(sys.argv[1])
    greedy = engine.run(prompts(3), 24).tokens
    sampled = engine.run(prompts(3), 24, temperature=0.8, top_k=20, top_p=0.9, seed=1).tokens
    config = engine.llm.llm_engine.vllm_config
    facts = [type(engine.runner).__module__, config.compute_hash(), config.num_lookahead_tokens, str(config)]
    print("RESULT", json.dumps([greedy, sampled, facts]))
"""


@pytest.mark.slow
def test_vllm_without_the_method_is_vllm_without_the_plugin(tiny: Checkpoints, tmp_path: Path) -> None:
    script = tmp_path / "without_method.py"
    script.write_text(WITHOUT_METHOD)
    results = []
    for plugins in ("orthrus", "none"):
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"VLLM_PLUGINS": plugins, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            [sys.executable, str(script), str(tiny.base)], env=environment, capture_output=True, text=True, timeout=300
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        assert lines, done.stderr[-4000:]
        results.append(json.loads(lines[0].removeprefix("RESULT")))
    assert results[0] == results[1]


def test_the_documentation_lists_every_patch() -> None:
    assert (ROOT / "docs" / "patches.md").read_text() == patches_page(), "make reference"
