"""Make evidence anew, or say what would be made and by which command.

    python -m benchmarks.renew                     list every file, its command and its minutes; run nothing
    python -m benchmarks.renew all                 `make evidence`
    python -m benchmarks.renew traces-tiny-orthrus.json ...

What is written goes to runs/evidence first, and from there into its place if the command has got through: with an exit
status of 0, or with one that says RED beside findings that are whole. Files that hold seconds are made anew on the kind
of machine they name alone, as a file of another machine is another file. The pages that tell figures follow with
`python -m benchmarks.figures`.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.evidence import FOLDER, ROOT
from benchmarks.sources import OUT, SOURCES, Source
from vllm_orthrus.bench.environment import cpu_name
from vllm_orthrus.errors import UserError

PAGE = FOLDER / "README.md"
PICTURES = ROOT / "docs" / "pictures"
UNFINISHED = ROOT / "runs" / "evidence"
INSTEAD = {"vllm-orthrus": "-m vllm_orthrus.cli.main", "python": ""}  # of this environment and this checkout

HEAD = """# Evidence

Made by `python -m benchmarks.figures` from `benchmarks/sources.py`; don't edit. Each file holds what was found and the
environment it was found in. `make evidence` makes all of them anew that this machine can make, in their order here;
`make evidence FILES="one.json another.json"` makes some, and `python -m benchmarks.renew` says what would be run.
Minutes are those of two cores. Files that hold seconds are of one kind of machine, and made anew on no other. What the
pages tell of these files is written into them by `python -m benchmarks.figures`, and a test compares. What a GPU
measures (`make gpu-check`, `make engine-check`) comes here as well, in files named by the GPU.

| file | shows | minutes | of one machine |
|---|---|---|---|
"""


def page() -> str:
    rows = [
        f"| [{file}]({file}) | {source.shows} | {source.minutes} | {'yes' if source.timed else ''} |"
        for file, source in SOURCES.items()
    ]
    text = HEAD + "\n".join(rows) + "\n\n## Commands\n"
    for file, source in SOURCES.items():
        text += f"\n{file}:\n\n" + "".join(f"    {line}\n" for line in shown(file, source))
    return text


def shown(file: str, source: Source) -> list[str]:
    """As one would type them."""
    front = "".join(f"{name}={value} " for name, value in source.variables.items())
    return [front + command.replace(OUT, f"benchmarks/evidence/{file}") for command in source.commands]


def chosen(asked: list[str]) -> list[str]:
    if asked == ["all"]:
        return list(SOURCES)
    unknown = [file for file in asked if file not in SOURCES]
    if unknown:
        raise UserError(f"{', '.join(unknown)}: must be `all` or files of {', '.join(SOURCES)}.")
    return asked


def other_machine(file: str, source: Source, here: str) -> str | None:
    """Why a file cannot be made anew here."""
    if not source.timed or not (FOLDER / file).exists():
        return None
    facts = json.loads((FOLDER / file).read_text())["environment"]
    mine = (here, os.cpu_count())
    if (facts["cpu"], facts["cores"]) == mine:
        return None
    return f"was timed on {facts['cores']} cores of {facts['cpu']}, and these are {mine[1]} of {mine[0]}"


def executable(command: str, out: Path) -> str:
    out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out  # what was asked is kept: no folder of anybody's
    command = command.replace(OUT, shlex.quote(str(out)))
    words = command.split(" ")
    return " ".join(
        f"{shlex.quote(sys.executable)} {INSTEAD[word]}".strip()
        if word in INSTEAD and (place == 0 or words[place - 1] == "||")
        else word
        for place, word in enumerate(words)
    )


def run(command: str, out: Path, source: Source) -> int:
    line = executable(command, out)
    return subprocess.run(line, shell=True, cwd=ROOT, env=os.environ | dict(source.variables), check=False).returncode


def take_over(file: str, source: Source) -> None:
    made = UNFINISHED / file
    shutil.move(made, FOLDER / file)
    for ending, name in source.pictures.items():
        shutil.move(made.with_suffix(ending), PICTURES / name)


def renew(files: list[str]) -> int:
    done: dict[str, int] = {}
    status = 0
    UNFINISHED.mkdir(parents=True, exist_ok=True)
    for file in files:
        source = SOURCES[file]
        reason = other_machine(file, source, cpu_name())
        if reason:
            print(f"{file}: {reason}", flush=True)
            continue
        (UNFINISHED / file).unlink(missing_ok=True)
        started = time.monotonic()
        for command in source.commands:
            if command not in done or OUT in command:
                done[command] = run(command, UNFINISHED / file, source)
        found = done[source.commands[-1]]
        if (UNFINISHED / file).exists():
            take_over(file, source)
        elif OUT in source.commands[-1]:
            found = found or 1
        print(f"{file}: status {found}, {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
        status = status or found
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="`all`, or names of files")
    asked = parser.parse_args()
    if not asked.files:
        for file, source in SOURCES.items():
            print(f"{file}  ({source.minutes} minutes)", *shown(file, source), sep="\n    ")
        return 0
    try:
        return renew(chosen(asked.files))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
