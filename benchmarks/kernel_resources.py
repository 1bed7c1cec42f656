"""Compile every kernel ahead of time for the GPUs we name, and say what each needs.

    python -m benchmarks.kernel_resources [--quick] [--write]

Needs no GPU: Triton compiles for a named target, and its package carries ptxas and cuobjdump. The launches are recorded
from the real host code, so tiles and specialisations are those that would run. `--write` renews docs/kernels.md.
"""

import argparse
import itertools
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_orthrus.kernels import dual_view_attention as attention
from vllm_orthrus.kernels import (
    dual_view_device,
    hypotheses,
    hypotheses_device,
    most_probable,
    prepare_block,
    prepare_hypotheses,
)
from vllm_orthrus.kernels.dual_view_plan import Target

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.float8_e4m3fnuz: "fp8e4b8",
}
KIB = 1024


class Gpu(NamedTuple):
    name: str
    compile_for: GPUTarget
    target: Target
    fp8: torch.dtype | None  # what an fp8 cache holds there


GPUS = [
    Gpu("sm_80", GPUTarget("cuda", 80, 32), Target(False, 163 * KIB, 108), torch.float8_e5m2),
    Gpu("sm_90", GPUTarget("cuda", 90, 32), Target(True, 227 * KIB, 132), torch.float8_e4m3fn),
    Gpu("sm_100", GPUTarget("cuda", 100, 32), Target(True, 227 * KIB, 148), torch.float8_e4m3fn),
    Gpu("sm_120", GPUTarget("cuda", 120, 32), Target(False, 99 * KIB, 188), torch.float8_e4m3fn),
    Gpu("gfx942", GPUTarget("hip", "gfx942", 64), Target(False, 64 * KIB, 304), torch.float8_e4m3fnuz),
]


@dataclass(frozen=True)
class Shape:
    """One draft pass, or one pass with verification rows and hypotheses."""

    name: str
    head_dim: int
    groups: int
    width: int
    blocks: int = 1
    verify: int = 0
    ragged: bool = False  # as the engine's: requests may have fewer verification rows
    page: int = 16
    num_reqs: int = 1


SHAPES = [
    Shape("4 rows", 128, 2, 2),
    Shape("draft of 8, 16/8 heads", 128, 2, 8),
    Shape("draft of 16, 32/8 heads", 128, 4, 16),
    Shape("draft of 16, 32/8 heads, pages of 64", 128, 4, 16, page=64),
    Shape("draft of 32, 32/8 heads", 128, 4, 32),
    Shape("9 + 4 x 8 rows in one pass", 128, 4, 8, blocks=4, verify=9),
    Shape("16 + 8 x 16 rows in one pass, ragged", 128, 4, 16, blocks=8, verify=16, ragged=True),
    Shape("draft of 16, head_dim 64", 64, 4, 16),
    Shape("draft of 16, head_dim 256", 256, 4, 16),
]
QUICK = [SHAPES[1], SHAPES[2], SHAPES[5], SHAPES[6]]


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


class Call(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]


@contextmanager
def recorded(module: Any, *names: str) -> Iterator[list[Call]]:
    """Collect what the host code would launch."""
    calls: list[Call] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                calls.append(Call(self.kernel, dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs))

            return launch

    with ExitStack() as patches:
        for name in names:
            patches.enter_context(mock.patch.object(module, name, Recorder(getattr(module, name))))
        yield calls


def attention_launches(shape: Shape, gpu: Gpu, cache_dtype: torch.dtype) -> tuple[list[Call], str]:
    dtype, kv_heads, heads = torch.bfloat16, 8, 8 * shape.groups
    stored = empty(1000, shape.page, kv_heads, 2 * shape.head_dim, dtype=cache_dtype)
    keys, values = stored.transpose(1, 2).split(shape.head_dim, dim=-1)
    scale = empty(1, dtype=torch.float32) if cache_dtype.itemsize == 1 else None
    table = empty(shape.num_reqs, 2048, dtype=torch.int32)
    cache = attention.PagedCache(keys, values, table, shape.page, scale, scale)
    rows = shape.num_reqs * shape.blocks * shape.width
    verification = None
    if shape.verify:
        count = shape.num_reqs * shape.verify
        verification = attention.Verification(
            empty(count, heads, shape.head_dim, dtype=dtype),
            empty(count, dtype=torch.int32),
            shape.verify,
            empty(count, heads, shape.head_dim, dtype=dtype),
            empty(shape.num_reqs + 1, dtype=torch.int32) if shape.ragged else None,
        )
    per_request = shape.verify + shape.blocks * shape.width
    plan = attention.make_plan(
        shape.num_reqs, per_request, heads, kv_heads, shape.head_dim, dtype, cache_dtype, "meta", target=gpu.target
    )
    with recorded(dual_view_device, "attend", "merge") as calls:
        attention.dual_view_attention(
            empty(rows, heads, shape.head_dim, dtype=dtype),
            empty(rows, kv_heads, shape.head_dim, dtype=dtype),
            empty(rows, kv_heads, shape.head_dim, dtype=dtype),
            cache,
            empty(shape.num_reqs, shape.blocks, dtype=torch.int32),
            shape.head_dim**-0.5,
            plan=plan,
            verification=verification,
        )
    tiles = plan.tiles
    return calls, f"{tiles.rows}x{tiles.positions}, {tiles.warps} warps, {tiles.stages} stages, {plan.splits} splits"


def empty(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def bookkeeping_launches() -> dict[str, Call]:
    """What surrounds the forwards: 8 requests, 15 drafts, 8 hypotheses, blocks of 16."""
    int32, float32 = torch.int32, torch.float32
    batch = prepare_block.BatchState(
        empty(8), empty(9, dtype=int32), empty(99), empty(8, dtype=int32), empty(8, dtype=int32), empty(64, 1),
        empty(1, 64, dtype=int32),
    )  # fmt: skip
    table = empty(64, 2048, dtype=int32)
    tables = prepare_block.BlockTables([table], [table], [16], empty(1, 5))
    rows = prepare_block.BlockRows(empty(64, 16), empty(64, 16), empty(64, dtype=int32), empty(64, 15), tables)
    with recorded(prepare_block, "_prepare") as prepare:
        prepare_block.prepare_blocks(empty(8), batch, rows, 7, 40960)
    remembered = prepare_hypotheses.Remembered(empty(64), empty(64, 8), empty(64, 8))
    blocks = prepare_hypotheses.HypothesisBlocks(empty(8, 8, 16), empty(8, 8, 16), empty(8, 8, dtype=int32))
    with recorded(prepare_hypotheses, "_prepare") as ride_along:
        prepare_hypotheses.launch(7, remembered, prepare_hypotheses.Verified(*batch[:3]), blocks, 7, 40960)
    with recorded(most_probable, "_scan", "_merge") as look:
        logits = empty(8, 16, 151936, dtype=torch.bfloat16)
        most_probable.launch(logits, empty(8, 15), empty(8, dtype=float32), 9)
    chances = (empty(8, 16, dtype=float32), empty(8, 16, 8, dtype=float32), empty(8, 16, 8))
    with recorded(hypotheses_device, "_choose", "_match") as judge:
        chosen = hypotheses.choose_device(*chances, empty(8, 15), empty(8), empty(8), empty(17, dtype=float32), 8)
        hypotheses.match_device(chosen, empty(8, 15), empty(8), empty(8), empty(8))
    names = ("prepare", "prepare hypotheses", "scan logits", "merge scans", "choose", "match")
    return dict(zip(names, (*prepare, *ride_along, *look, *judge), strict=True))


def compile_call(call: Call, gpu: Gpu) -> Any:
    """Compile as the just-in-time compiler would for these arguments, all pointers being aligned."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    hints: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(call.kernel.params):
        value = call.arguments[parameter.name]
        kind = "constexpr"
        if isinstance(value, Tensor):
            kind = "*" + TYPES[value.dtype]
            hints[index,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            kind = "fp32"
        elif isinstance(value, int) and not parameter.is_constexpr and (value != 1 or parameter.do_not_specialize):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                hints[index,] = [["tt.divisibility", 16]]
        else:
            constants[index,] = value
        signature[parameter.name] = kind
    known = ("num_warps", "num_stages") + (("maxnreg",) if gpu.compile_for.backend == "cuda" else ())
    options = {name: call.arguments[name] for name in known if name in call.arguments}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = ASTSource(call.kernel, signature, constants, hints)
        return triton.compile(source, target=gpu.compile_for, options=options | {"enable_fp_fusion": True})


def examine(compiled: Any, gpu: Gpu) -> dict[str, Any]:
    """Registers, spills, stack and matrix instruction of a compiled kernel."""
    if gpu.compile_for.backend == "hip":
        code = compiled.asm["amdgcn"]
        fields = {key: int(found) for key, found in re.findall(r"\.(\w+):\s+(\d+)", code)}
        spills = fields["vgpr_spill_count"] + fields["sgpr_spill_count"]
        found = re.search(r"v_mfma_\w+", code)
        return {
            "registers": fields["vgpr_count"],
            "spills": spills,
            "stack": fields["private_segment_fixed_size"],
            "matrix": found.group(0) if found else "-",
        }
    ptx = compiled.asm["ptx"]
    found = re.search(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", ptx)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))
        assembly = run(triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin))
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        # Local memory in the machine code is what a spill would be.
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[0]),
        "matrix": found.group(0) if found else "-",
    }


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def warps(call: Call) -> str:
    count = call.arguments["num_warps"]
    return f"{count} warp{'s'[: count > 1]}"


def reports(shapes: list[Shape], gpus: list[Gpu]) -> Iterator[Report]:
    for gpu in gpus:
        limit = gpu.target.shared
        for name, call in bookkeeping_launches().items():
            compiled = compile_call(call, gpu)
            facts = examine(compiled, gpu)
            yield Report(
                name, gpu.name, "-", "-", warps(call), shared=compiled.metadata.shared, shared_limit=limit, **facts
            )
        for shape, cache_dtype in itertools.product(shapes, (torch.bfloat16, gpu.fp8)):
            if cache_dtype is None:
                continue
            calls, tiles = attention_launches(shape, gpu, cache_dtype)
            for call in calls:
                name = call.kernel.__name__
                if name == "merge" and cache_dtype != torch.bfloat16:  # it never sees the cache
                    continue
                compiled = compile_call(call, gpu)
                yield Report(
                    name,
                    gpu.name,
                    shape.name,
                    TYPES[cache_dtype] if name == "attend" else "-",
                    tiles,
                    shared=compiled.metadata.shared,
                    shared_limit=limit,
                    **examine(compiled, gpu),
                )


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


HEADER = """# The kernels, compiled ahead of time

What each kernel needs on each GPU, from `python -m benchmarks.kernel_resources --write` with Triton {version}. Tiles
are rows x positions. Registers are per thread (gfx942: vector registers). No kernel spills; the tests assert it.

| kernel | GPU | rows | cache | tiles | registers | stack, bytes | shared, KiB (limit) | matrix instruction |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few shapes")
    parser.add_argument("--gpu", help="only this one")
    parser.add_argument("--write", action="store_true", help="renew docs/kernels.md")
    options = parser.parse_args()
    rows, red = [], 0
    for report in reports(QUICK if options.quick else SHAPES, [g for g in GPUS if options.gpu in (None, g.name)]):
        problems = faults(report)
        red += bool(problems)
        rows.append(
            f"| {report.kernel} | {report.gpu} | {report.shape} | {report.cache} | {report.tiles} | {report.registers} "
            f"| {report.stack} | {report.shared / KIB:.1f} ({report.shared_limit // KIB}) | {report.matrix} |"
        )
        print(rows[-1], *problems, flush=True)
    if options.write and not red:
        path = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
        path.write_text(HEADER.format(version=triton.__version__) + "\n".join(rows) + "\n")
    return 1 if red else 0


if __name__ == "__main__":
    raise SystemExit(main())
