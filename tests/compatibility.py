"""docs/compatibility.md, from what runs with `--features` found with each vLLM, and docs/regressions.md.

python -m tests.compatibility
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.features import FEATURES, listed
from tests.regressions import REGRESSIONS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
REGRESSIONS_PAGE = ROOT / "docs" / "regressions.md"
EVIDENCE = ROOT / "benchmarks" / "evidence"

HEAD = """# What goes together with Orthrus

Made by `make compatibility` from the results of the tests that each row names; don't edit. *Works* means that the text
is that of the same engine without drafts, token for token in float32, and that drafts were kept. *Refused* means before
anything is loaded, and the reason is what the engine says. What *vLLM itself refuses*, it refuses for every speculative
method, or for every engine on a CPU. Tests of rows *on request* run with `ORTHRUS_TEST_THOROUGH=1 make engine`, and not
in `make test`. Everything ran on a CPU: on the build of vLLM 0.32 for them, and with 0.33, which has none, as 0.33's
Python over 0.32's binaries. What went wrong in other speculators, and the tests that hold it off here, is in
[regressions.md](regressions.md).
"""

REGRESSIONS_HEAD = """# Bugs of other speculators, held off

Made by `python -m tests.compatibility` from `tests/regressions.py`; don't edit. Each bug has been shipped by a
speculator for vLLM. Each of these tests has been seen to fail with the fault planted; the last column plants it in
every run, or in those with `ORTHRUS_TEST_THOROUGH=1`. Faults of the attention kernel are in
`kernels/test_planted_faults.py`.

| bug | seen in | tests that fail | the fault | planted by |
|---|---|---|---|---|
"""

Found = Mapping[str, Mapping[str, Any]]  # by feature


def found() -> dict[str, Found]:
    """By release of vLLM."""
    files = sorted(EVIDENCE.glob("compatibility-*.json"))
    return {file.stem.removeprefix("compatibility-"): json.loads(file.read_text())["features"] for file in files}


def page(by_release: Mapping[str, Found]) -> str:
    lines = [HEAD]
    columns = [f"vLLM {release}" for release in by_release]
    for group, names in FEATURES.items():
        lines += [f"## {group}\n", f"| | {' | '.join(columns)} | tests |", "|---" * (len(columns) + 2) + "|"]
        for name in names:
            rows = [features.get(name) for features in by_release.values()]
            cells = [verdict(row) for row in rows]
            lines.append(f"| {name} | {' | '.join(cells)} | {tests(rows)} |")
        lines.append("")
    return "\n".join(lines)


def verdict(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "not tested"
    failed = [name for name, test in row["tests"].items() if test["outcome"] == "failed"]
    if failed or all(test["outcome"] == "skipped" for test in row["tests"].values()):
        return f"**fails**: {len(failed)} of {len(row['tests'])} tests" if failed else "not tested"
    told = {"works": "works", "refused": "refused", "stock": "vLLM itself refuses"}
    words = told[row["verdict"]]
    if row["said"]:
        words += f": {row['said']}"
    return words + (", on request" if row["thorough"] else "")


def tests(rows: list[Mapping[str, Any] | None]) -> str:
    names = {test.partition("[")[0] for row in rows if row is not None for test in row["tests"]}
    return ", ".join(f"`{name.removeprefix('tests/').removeprefix('engine/')}`" for name in sorted(names))


def regressions() -> str:
    rows = []
    for one in REGRESSIONS:
        guards = ", ".join(f"`{test.removeprefix('engine/')}`" for test in one.tests)
        rows.append(f"| {one.bug} | {one.seen} | {guards} | {one.fault} | `{one.planted.removeprefix('engine/')}` |\n")
    return REGRESSIONS_HEAD + "".join(rows)


def unasked(by_release: Mapping[str, Found]) -> list[str]:
    """Rows for which no test has run."""
    return [f"vLLM {release}: {name}" for release, rows in by_release.items() for name in listed() if name not in rows]


def main() -> int:
    results = found()
    PAGE.write_text(page(results))
    REGRESSIONS_PAGE.write_text(regressions())
    missing = unasked(results)
    if missing:
        print("not tested:", *missing, sep="\n  ")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
