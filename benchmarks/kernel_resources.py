"""Compile every kernel ahead of time for the GPUs we name, and say what each needs.

    python -m benchmarks.kernel_resources [--triton 3.8.0 | --pinned] [--quick] [--gpu sm_90] [--write]

Needs no GPU: Triton compiles for a named target, and its package carries ptxas and cuobjdump. The launches are recorded
from the real host code, so tiles and specialisations are those that would run. `--pinned` does it with each Triton that
a supported vLLM brings, and `--pinned --write` renews docs/kernels.md.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource

from benchmarks.kernel_launches import (
    GPUS,
    KIB,
    OTHERS,
    RELEASED,
    Call,
    Gpu,
    Shape,
    attention_launches,
    bookkeeping_launches,
    released_shapes,
    rotation_launches,
)
from benchmarks.pinned_triton import PINNED, unpacked

ROOT = Path(__file__).resolve().parents[1]
TYPES = {
    torch.bool: "i1",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.float8_e4m3fnuz: "fp8e4b8",
}


Place = tuple[int, ...]  # of an argument, and inside it where it is a tuple


class Source(NamedTuple):
    """What the just-in-time compiler would make of a launch, all pointers being aligned."""

    signature: dict[str, Any]  # types by name, those of a tuple in a tuple
    constants: dict[Place, Any]
    hints: dict[Place, list[list[Any]]]
    options: dict[str, Any]


class Form:
    """A kernel as it has to be compiled once, and the launches that it then serves."""

    def __init__(self, kernel: str, shape: str, cache: str, call: Call, source: Source) -> None:
        self.kernel, self.shape, self.cache, self.call, self.source = kernel, shape, cache, call, source
        self.requests: list[int] = []
        self.cuts: dict[str, list[int]] = {}  # tiles, and the numbers of splits


class Report(NamedTuple):
    kernel: str
    gpu: str
    shape: str
    cache: str
    tiles: str
    registers: int  # per thread; on gfx942 vector registers
    spills: int  # bytes; on gfx942 registers
    stack: int  # bytes
    shared: int  # bytes
    matrix: str  # the matrix instruction, or "-"
    shared_limit: int

    @property
    def place(self) -> tuple[str, ...]:
        """In the table."""
        return self[:5]


def source_of(call: Call, gpu: Gpu) -> Source:
    constants: dict[Place, Any] = {}
    hints: dict[Place, list[list[Any]]] = {}

    def kind_of(value: Any, place: Place, constant: bool, specialized: bool) -> Any:
        if isinstance(value, tuple) and not constant:
            kinds = [kind_of(part, (*place, at), False, specialized) for at, part in enumerate(value)]
            return tuple(kinds) if type(value) is tuple else type(value)(*kinds)
        if isinstance(value, Tensor):
            hints[place] = [["tt.divisibility", 16]]
            if gpu.compile_for.backend == "hip" and value.untyped_storage().nbytes() < 2**31:
                hints[place].append(["tt.pointer_range", 32])  # what Triton says of small ones there, and builds upon
            return "*" + TYPES[value.dtype]
        if isinstance(value, float) and not constant:
            return "fp32"
        if isinstance(value, int) and not constant and (value != 1 or not specialized):
            if value % 16 == 0 and specialized:
                hints[place] = [["tt.divisibility", 16]]
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        constants[place] = value
        return "constexpr"

    signature = {
        one.name: kind_of(call.arguments[one.name], (at,), one.is_constexpr, not one.do_not_specialize)
        for at, one in enumerate(call.kernel.params)
    }
    known = ("num_warps", "num_stages") + (("maxnreg",) if gpu.compile_for.backend == "cuda" else ())
    return Source(signature, constants, hints, {name: call.arguments[name] for name in known if name in call.arguments})


def forms(shapes: Iterable[Shape], batches: Iterable[int], gpu: Gpu, fp8: bool) -> list[Form]:
    """What has to be compiled for these passes, and for what surrounds those of so many requests."""
    found: dict[str, Form] = {}

    def form(kernel: str, shape: str, cache: str, call: Call) -> Form:
        source = source_of(call, gpu)
        return found.setdefault(repr((kernel, shape, cache, source)), Form(kernel, shape, cache, call, source))

    for num_reqs in batches:
        for name, call in bookkeeping_launches(num_reqs).items():
            one = form(name, "released heads", "-", call)
            one.requests.append(num_reqs)
            count = call.arguments["num_warps"]
            one.cuts[f"{count} warp{'s'[: count > 1]}"] = []
    for shape in shapes:
        for call in rotation_launches(shape) if shape.num_reqs == 1 else ():  # the same for all numbers of rows
            one = form("norm and rotate", shape.name, "-", call)
            one.requests.append(shape.num_reqs)
            one.cuts["2 warps"] = []
        for cache_dtype in [torch.bfloat16] + [gpu.fp8] * (fp8 and shape.fp8):
            calls, plan = attention_launches(shape, gpu, cache_dtype)
            for call in calls:
                name = call.kernel.__name__.removeprefix("_").removesuffix("_kernel")
                if name == "merge" and cache_dtype != torch.bfloat16:  # it never sees the cache
                    continue
                one = form(name, shape.name, TYPES[cache_dtype] if name == "attend" else "-", call)
                one.requests.append(shape.num_reqs)
                tiles = plan.tiles
                cut = f"{tiles.rows}x{tiles.positions}, {tiles.warps} warps, {tiles.stages} stages"
                one.cuts.setdefault(cut, []).append(plan.splits)
    return list(found.values())


def several(numbers: Sequence[int], what: str) -> str:
    """ "1-3, 5 requests"."""
    ends: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    said = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)
    return f"{said} {what}{'s'[: said != '1']}"


def compile_form(form: Form, gpu: Gpu) -> Any:
    source = form.source
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        syntax = ASTSource(form.call.kernel, source.signature, source.constants, source.hints)
        return triton.compile(syntax, target=gpu.compile_for, options=source.options | {"enable_fp_fusion": True})


def examine(compiled: Any, gpu: Gpu) -> dict[str, Any]:
    """Registers, spills, stack and matrix instruction of a compiled kernel."""
    if gpu.compile_for.backend == "hip":
        code = compiled.asm["amdgcn"]
        fields = {key: int(found) for key, found in re.findall(r"\.(\w+):\s+(\d+)", code)}
        found = re.search(r"v_mfma_\w+", code)
        return {
            "registers": fields["vgpr_count"],
            "spills": fields["vgpr_spill_count"],  # scalar ones find room in lanes of these, and go to no memory
            "stack": fields["private_segment_fixed_size"],
            "matrix": found.group(0) if found else "-",
        }
    ptx = compiled.asm["ptx"]
    found = re.search(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", ptx)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))
        stack = int(re.findall(r"STACK:(\d+)", usage)[0])
        # A spill is local memory in the machine code, which takes longer to print than to make: none without a stack.
        assembly = run(triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin)) if stack else ""
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        "stack": stack,
        "matrix": found.group(0) if found else "-",
    }


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def report(form: Form, gpu: Gpu) -> Report:
    compiled = compile_form(form, gpu)
    released = form.shape not in {shape.name for shape in OTHERS}
    return Report(
        form.kernel,
        gpu.name,
        f"{form.shape}, {several(form.requests, 'request')}" if released else form.shape,
        form.cache,
        "; ".join(f"{cut}, {several(splits, 'split')}" if splits else cut for cut, splits in form.cuts.items()),
        shared=compiled.metadata.shared,
        shared_limit=gpu.target.shared,
        **examine(compiled, gpu),
    )


def all_forms(gpu: Gpu) -> list[Form]:
    return forms([*released_shapes(), *OTHERS], range(1, RELEASED.most_carried + 1), gpu, fp8=True)


def quick_forms(gpu: Gpu) -> list[Form]:
    """The passes that need most of a GPU; with the GPU that most will have, all that one request launches."""
    shapes = [shape for shape in released_shapes() if shape.num_reqs == 1 and shape.groups == 4]
    widest = [max(OTHERS, key=lambda shape: shape.head_dim)]
    if gpu.name == "sm_90":
        return forms([*shapes, *widest], [1], gpu, fp8=False)
    heaviest = "attend", "take up"
    return [form for form in forms([shapes[-1], *widest], [1], gpu, fp8=True) if form.kernel in heaviest]


def faults(report: Report) -> list[str]:
    """What is not as it must be."""
    found = []
    if report.spills:
        found.append(f"spills: {report.spills}")
    if report.shared > report.shared_limit:
        found.append(f"{report.shared} bytes of shared memory, {report.shared_limit} allowed")
    if report.kernel == "attend":
        rows = int(report.tiles.split("x")[0])
        wanted = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}.get(report.gpu) if rows >= 64 else "mma.sync"
        wanted = "v_mfma" if report.gpu == "gfx942" else wanted or "mma.sync"
        if not report.matrix.startswith(wanted):
            found.append(f"matrix instruction {report.matrix}, not {wanted}")
    return found


HEADER = """## Compiled ahead of time

What each kernel needs on each GPU, from `make kernels-compiled` with the Triton versions that vLLM brings there:
{versions}. Two figures in a cell are theirs, in this order. *Released heads*: blocks of {block} rows, 16 verified
rows, as many hypotheses as {rows} rows have room for, and every number of requests that makes a difference. Tiles are
rows x positions. Registers are per thread (gfx942: vector registers). No kernel spills; the tests assert it.

| kernel | GPU | rows | cache | tiles | registers | stack, bytes | shared, KiB (limit) | matrix instruction |
|---|---|---|---|---|---|---|---|---|
"""


def row(reports: Sequence[Report]) -> str:
    """One kernel's row of the table, by each Triton."""

    def each(figures: Iterable[str]) -> str:
        said = list(figures)
        return " / ".join(said if len(set(said)) > 1 else said[:1])

    first = reports[0]
    registers, stack = each(str(one.registers) for one in reports), each(str(one.stack) for one in reports)
    shared = each(f"{one.shared / KIB:.1f}" for one in reports)
    limit, matrix = first.shared_limit // KIB, each(one.matrix for one in reports)
    return f"| {' | '.join(first.place)} | {registers} | {stack} | {shared} ({limit}) | {matrix} |"


def write_table(evidence: dict[str, list[Report]]) -> None:
    by_place: dict[tuple[str, ...], list[Report]] = {}
    for one in itertools.chain.from_iterable(evidence.values()):
        by_place.setdefault(one.place, []).append(one)
    versions = " and ".join(f"{version} (vLLM {PINNED[version]})" for version in evidence)
    table = (
        HEADER.format(versions=versions, rows=RELEASED.rows, block=RELEASED.block)
        + "\n".join(map(row, by_place.values()))
        + "\n"
    )
    page = ROOT / "docs" / "kernels.md"
    explained = page.read_text().partition(HEADER.splitlines()[0])[0]
    page.write_text(explained + table)


def with_triton(version: str, options: Sequence[str]) -> list[Report] | None:
    """The reports of a process that has this Triton; None if any is red."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(unpacked(version)), *([inherited] if inherited else [])])
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "reports.json"
        command = [sys.executable, "-m", "benchmarks.kernel_resources", "--json", str(found), *options]
        green = subprocess.run(command, cwd=ROOT, env=environment).returncode == 0
        return [Report(*fields) for fields in json.loads(found.read_text())] if green else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", help="with this version of Triton, downloaded if need be")
    parser.add_argument("--pinned", action="store_true", help="with each Triton that a supported vLLM brings")
    parser.add_argument("--quick", action="store_true", help="a few shapes")
    parser.add_argument("--gpu", help="only this one", choices=[gpu.name for gpu in GPUS])
    parser.add_argument("--write", action="store_true", help="renew docs/kernels.md; takes --pinned and all shapes")
    parser.add_argument("--json", type=Path, help="where to put the reports")
    options = parser.parse_args()
    if options.write and (not options.pinned or options.quick or options.gpu):
        parser.error("--write takes --pinned, all shapes and all GPUs")
    if options.pinned or options.triton:
        passed = ["--quick"] * options.quick + (["--gpu", options.gpu] if options.gpu else [])
        versions = list(PINNED) if options.pinned else [options.triton]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as side_by_side:  # each is a process of its own
            found = side_by_side.map(with_triton, versions, itertools.repeat(passed))
        evidence = dict(zip(versions, found, strict=True))
        green = {version: reports for version, reports in evidence.items() if reports is not None}
        if options.write and len(green) == len(evidence):
            write_table(green)
        return int(len(green) < len(evidence))
    reports, red = [], 0
    for gpu in GPUS:
        if options.gpu in (None, gpu.name):
            for form in quick_forms(gpu) if options.quick else all_forms(gpu):
                reports.append(report(form, gpu))
                problems = faults(reports[-1])
                red += bool(problems)
                print(f"Triton {triton.__version__}", row(reports[-1:]), *problems, flush=True)
    if options.json:
        options.json.write_text(json.dumps(reports))
    return 1 if red else 0


if __name__ == "__main__":
    raise SystemExit(main())
