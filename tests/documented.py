"""The commands that the documentation tells people to type, and who runs each of them.

A command is run by a test, with the tiny model in place of the one that is named, or it needs a GPU, or it takes longer
than a test may: then the workflow or the evidence that runs it is named. `tests/unit/test_documented.py` finds every
command in the pages and asks for its row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/evidence/README.md"),
    *("examples/README.md", "examples/tiny-orthrus/README.md"),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
PROGRAMS = ("make", "pip", "vllm", "vllm-orthrus", "python", "curl", "git", "cp", "test")
FRONT = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?")
GPU = "a GPU"
EVIDENCE = "make evidence"  # benchmarks/sources.py lists it
TRAINED = "half an hour of training"  # that made what lies in examples/tiny-orthrus, which every test runs on

# The first row whose beginning fits counts: a file of tests, with `::` and a test's name; a workflow; or one of these.
RUN_BY: tuple[tuple[str, str], ...] = (
    ("pip install", "tests/unit/test_package.py::test_a_wheel_is_the_package_and_nothing_else"),
    ("git clone", ".github/workflows/ci.yml"),
    ("cp -r runs/tiny-orthrus/head", TRAINED),
    ("curl localhost:8000/v1/completions", "tests/serve/test_cascades.py::test_requests_choose"),
    # vLLM
    ("vllm serve Qwen/Qwen3-8B --max-model-len", "tests/serve/test_soak.py::test_every_greedy_answer_is_stock_vllms"),
    ("vllm bench serve", "tests/engine/test_bench.py"),
    ("vllm serve", "tests/engine/test_config.py::test_settings_of_the_pages"),
    # make
    ("make demo", "tests/unit/test_deployment.py::test_the_cpu_images_steps"),
    ("make serve-tests", ".github/workflows/nightly.yml"),
    ("make serve", "tests/serve/test_soak.py::test_every_greedy_answer_is_stock_vllms"),
    ("make soak", ".github/workflows/nightly.yml"),
    ("make vllm-tests", ".github/workflows/nightly.yml"),
    ("make gpu-check", GPU),
    ("make engine-check", GPU),
    ("make evidence", "tests/unit/test_evidence.py::test_what_is_made_takes_the_old_ones_place"),
    ("make compatibility", EVIDENCE),
    ("make docs", "tests/unit/test_docs.py::test_the_site_is_built_without_a_warning"),
    ("make reference", "tests/unit/test_docs.py::test_settings_are_as_the_code_has_them"),
    ("make kernels-compiled", "tests/kernels/test_compiled.py"),
    ("make", ".ci/run"),
    # ours
    ("vllm-orthrus answers", "tests/unit/test_trainer.py::test_answers_are_the_bases_own"),
    ("vllm-orthrus train --selector-only", "tests/unit/test_selector.py::test_commands"),
    ("vllm-orthrus train", "tests/unit/test_trainer.py::test_commands_end_to_end"),
    ("vllm-orthrus report", "tests/unit/test_trainer.py::test_commands_end_to_end"),
    ("vllm-orthrus head convert HEAD OUTPUT --quantize", "tests/unit/test_quantize.py"),
    ("vllm-orthrus head", "tests/unit/test_trainer.py::test_commands_end_to_end"),
    ("vllm-orthrus doctor --cluster", "tests/serve/test_cluster.py"),
    ("vllm-orthrus doctor", "tests/engine/test_doctor.py::test_ready"),
    ("vllm-orthrus simulate", "tests/unit/test_simulator.py"),
    ("vllm-orthrus plan", "tests/unit/test_plan.py::test_command"),
    ("vllm-orthrus widen", "tests/unit/test_widen.py"),
    ("vllm-orthrus bench throughput", "tests/engine/test_bench.py"),
    ("vllm-orthrus bench acceptance", "tests/engine/test_bench.py"),
    ("vllm-orthrus bench cost", "tests/engine/test_bench.py"),
    ("vllm-orthrus bench lossless", "tests/engine/test_bench.py::test_lossless"),
    ("vllm-orthrus bench cascade", "tests/unit/test_bench_cascade.py"),
    ("vllm-orthrus bench", "tests/engine/test_bench.py"),
    # modules and scripts
    ("python -m benchmarks.engine_check", GPU),
    ("python -m benchmarks.paired_products", GPU),
    ("python -m benchmarks.figures", "tests/unit/test_evidence.py::test_pages_tell_what_is_in_the_files"),
    ("python -m benchmarks.renew", "tests/unit/test_evidence.py"),
    ("python -m benchmarks.step_table", "tests/unit/test_step_table.py::test_the_page_has_the_table"),
    ("python -m benchmarks.", EVIDENCE),
    ("python -m tests.serve.soak", EVIDENCE),
    ("python -m tests.serve.faults", "tests/serve/test_faults.py"),
    ("python -m tests.compatibility", "tests/unit/test_compatibility.py::test_the_page_is_what_the_tests_found"),
    ("python -m tests.rehearsal.graph_table", "tests/rehearsal/test_graph_table.py"),
    ("python -m pytest", ".ci/run"),
    ("python scripts/overlay_vllm.py", ".ci/run"),
    ("python scripts/compare_vllm.py", "tests/unit/test_vllm_surface.py"),
    ("python examples/offline.py", "tests/serve/test_examples.py::test_offline"),
    ("python examples/tiny-orthrus/make_base.py", TRAINED),
)


class Command(NamedTuple):
    page: str
    line: str  # from the program on, in one line, without remarks


def commands() -> Iterator[Command]:
    for page in PAGES:
        text = (ROOT / page).read_text()
        for line in [*_blocks(text), *_spans(text)]:
            if line.split()[0] in PROGRAMS:
                yield Command(page, line)


def run_by(command: str) -> str | None:
    return next((who for begins, who in RUN_BY if command.startswith(begins)), None)


def _blocks(text: str) -> Iterator[str]:
    """Lines of indented blocks, put together where a quote or a backslash goes on."""
    inside, behind_blank, begun = False, True, ""
    for line in text.splitlines():
        code = line.startswith("    ") and (inside or behind_blank)
        inside, behind_blank = code or (inside and not line), not line
        if not code:
            begun = ""
            continue
        begun += (" " if begun else "") + line.strip().removesuffix("\\").strip()
        if line.endswith("\\") or begun.count("'") % 2:
            continue
        yield from _cleaned(begun)
        begun = ""


def _spans(text: str) -> Iterator[str]:
    """Commands inside sentences, if they have more than the program's name."""
    outside = re.sub(r"(?m)^ {4}.*$|```[\s\S]*?```", "", text)
    for span in re.findall(r"`([^`]+)`", outside):
        for line in _cleaned(" ".join(span.split())):
            if " " in line and "..." not in line:
                yield line


def _cleaned(line: str) -> Iterator[str]:
    """Without a prompt's environment, what is said beside a command, and words in brackets, which may be left out."""
    line = line.partition("|| ")[2] or line
    line = FRONT.sub("", line)
    line = re.split(r"\s{2,}", line)[0].strip()
    line = re.sub(r" \[[^\]]*\]", "", line)
    if line:
        yield line
