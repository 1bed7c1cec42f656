"""Is the dual-view attention right on this GPU, and how fast is it?

    python -m benchmarks.gpu_check [--out FILE] [--minutes 8]

Needs torch, triton and one GPU; compares itself with whatever else is installed. First the kernels against `naive` in
float64: if anything is red, no speed is printed and the exit status is 1. Then times and bytes per second, each beside
the floor that a measured copy sets. Results are written to FILE as they come, with the environment they come from.

Each time is that of a CUDA graph of many launches over as many caches, which together are several times the size of the
L2 cache: as in an engine, where every layer has a cache of its own. Exit status 2: there is no GPU.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import LAYOUTS, Case, check
from benchmarks.evidence import Evidence, default_path, environment
from vllm_orthrus.kernels.dual_view_attention import PagedCache, launch, make_plan

DEVICE = "cuda"
HALF = torch.bfloat16
PAGE = 16


class Model(NamedTuple):
    name: str
    heads: int
    kv_heads: int
    head_dim: int


MODELS = (Model("Qwen3-1.7B", 16, 8, 128), Model("Qwen3-4B and 8B", 32, 8, 128))
CONTEXTS = (512, 2048, 8192, 16384, 32768, 131072)
REQUESTS = (1, 8, 64)
WIDTHS = (8, 16, 32)


def correctness_cases() -> list[Case]:
    base = Case((1000, 0, 17, -1, 4096), width=16, groups=4, head_dim=128, dtype=HALF, splits=None)
    fp8 = torch.float8_e4m3fnuz if torch.version.hip else torch.float8_e4m3fn
    if not torch.version.hip and torch.cuda.get_device_capability() < (8, 9):
        fp8 = torch.float8_e5m2
    one_pass = replace(base, width=8, blocks=4, verify=9)
    cases = [
        base,
        *(replace(base, layout=layout) for layout in LAYOUTS[1:]),
        *(replace(base, page=page) for page in (32, 64, 128, 256)),
        replace(base, page=16, ratio=8),
        replace(base, page=64, ratio=3),
        replace(base, head_dim=64),
        replace(base, head_dim=256),
        replace(base, dtype=torch.float16),
        replace(base, dtype=torch.float32, width=5, groups=2, head_dim=64),
        *(replace(base, cache_dtype=fp8, scales=scales) for scales in ("tensor", "head")),
        replace(base, cache_dtype=fp8, head_dim=256, scales="tensor"),
        replace(base, cache_dtype=torch.float8_e5m2, scales="tensor"),
        *(replace(base, groups=groups) for groups in (1, 3, 16)),
        *(replace(base, width=width) for width in (1, 7, 32, 64)),
        *(replace(base, splits=splits) for splits in (1, 5, 100)),
        one_pass,
        replace(one_pass, ragged=True, page=64),
        replace(one_pass, width=16, blocks=8, verify=17),
        replace(one_pass, width=16, blocks=8, verify=16, ragged=True, cache_dtype=fp8, scales="tensor"),
        replace(one_pass, head_dim=64, cache_dtype=fp8, scales="head"),
        replace(base, prefixes=(131072,), kv_heads=1),
        replace(base, prefixes=tuple((7 * req) % 300 - 1 for req in range(1024)), kv_heads=1, width=3),
        *(replace(base, prefixes=(length, length + 1, length + 2), seed=length) for length in (15, 63, 127, 2047)),
    ]
    return cases


@dataclass
class KernelEvidence(Evidence):
    correctness: list[dict[str, Any]] = field(default_factory=list)
    copy_bytes_per_second: float = 0.0
    speed: list[dict[str, Any]] = field(default_factory=list)
    not_compared: dict[str, str] = field(default_factory=dict)
    targets: dict[str, Any] = field(default_factory=dict)
    finished: bool = False


def run_correctness(evidence: KernelEvidence) -> bool:
    red = 0
    for case in correctness_cases():
        try:
            verdict = check(case, DEVICE)
            problems, overall, worst = verdict.problems, verdict.overall, verdict.worst
        except Exception as error:
            problems, overall, worst = [f"{type(error).__name__}: {str(error)[:500]}"], float("nan"), float("nan")
        evidence.correctness.append({"case": str(case), "overall": overall, "row": worst, "problems": problems})
        evidence.write()
        if problems:
            red += 1
            print(f"RED  {case}\n     {problems}", flush=True)
    worst_of_all = max(entry["overall"] for entry in evidence.correctness)
    print(f"correctness: {len(evidence.correctness) - red} of {len(evidence.correctness)} cases right; ", end="")
    print(f"largest relative error {worst_of_all:.1e}", flush=True)
    return red == 0


def seconds_per_launch(launches: list[Callable[[], Any]], budget: float = 0.1) -> float:
    """The median time of one launch inside a CUDA graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launches[0]()
        launches[-1]()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for launch in launches:
            launch()
    times: list[float] = []
    deadline = time.perf_counter() + budget
    graph.replay()
    while len(times) < 3 or (time.perf_counter() < deadline and len(times) < 50):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(launches))
    return sorted(times)[len(times) // 2]


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_per_launch([lambda: target.copy_(source)] * 4)


@dataclass
class Setting:
    """One point of the sweep: its tensors, and as many caches as it takes to outgrow the L2 cache."""

    model: Model
    context: int
    num_reqs: int
    width: int

    def __post_init__(self) -> None:
        model, n = self.model, self.num_reqs
        self.pages = -(-(self.context + self.width) // PAGE)  # room for the block, which baselines need in the cache
        per_cache = n * self.pages * PAGE * model.kv_heads * 2 * model.head_dim * HALF.itemsize
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 2**26)
        self.copies = max(1, min(64, 4 * l2 // per_cache))
        total = self.copies * n * self.pages
        gen = torch.Generator(device=DEVICE).manual_seed(0)
        self.pool = torch.empty(total + 1, PAGE, model.kv_heads, 2 * model.head_dim, dtype=HALF, device=DEVICE).normal_(
            generator=gen
        )  # [pages, slots, heads, keys and values]
        order = torch.randperm(total, generator=gen, device=DEVICE).int() + 1
        self.tables = order.view(self.copies, n, self.pages)
        self.lengths = torch.full((n,), self.context, dtype=torch.int32, device=DEVICE)
        rows = n * self.width

        def normal(heads: int) -> Tensor:
            return torch.randn(rows, heads, model.head_dim, dtype=HALF, device=DEVICE, generator=gen)

        self.q, self.k, self.v = normal(model.heads), normal(model.kv_heads), normal(model.kv_heads)
        self.out = torch.empty_like(self.q)
        self.scale = model.head_dim**-0.5
        read = n * self.context * model.kv_heads * 2 * model.head_dim * HALF.itemsize
        self.moved = read + self.q.nbytes + self.k.nbytes + self.v.nbytes + self.out.nbytes  # bytes that must move

    def ours(self) -> list[Callable[[], Any]]:
        model = self.model
        keys, values = self.pool.transpose(1, 2).split(model.head_dim, dim=-1)
        plan = make_plan(
            self.num_reqs, self.width, model.heads, model.kv_heads, model.head_dim, HALF, HALF, torch.device(DEVICE)
        )
        self.plan = plan
        caches = [PagedCache(keys, values, table, PAGE) for table in self.tables]
        return [
            lambda cache=cache: launch(  # type: ignore[misc]
                self.q, self.k, self.v, cache, self.lengths, self.scale, self.out, plan
            )
            for cache in caches
        ]

    def unified(self) -> list[Callable[[], Any]]:
        """vLLM's own kernel over the same pages, the block's keys and values being in the cache already."""
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention

        model, n = self.model, self.num_reqs
        keys, values = self.pool.split(model.head_dim, dim=-1)  # [pages, slots, heads, dim]
        starts = torch.arange(0, (n + 1) * self.width, self.width, dtype=torch.int32, device=DEVICE)
        used = self.lengths + self.width
        segments = 16
        rows = n * self.width
        parts = torch.empty(rows, model.heads, segments, model.head_dim, dtype=torch.float32, device=DEVICE)
        tops, sums = (torch.empty(rows, model.heads, segments, dtype=torch.float32, device=DEVICE) for _ in range(2))
        return [
            lambda table=table: unified_attention(  # type: ignore[misc]
                q=self.q,
                k=keys,
                v=values,
                out=self.out,
                cu_seqlens_q=starts,
                max_seqlen_q=self.width,
                seqused_k=used,
                max_seqlen_k=self.context + self.width,
                softmax_scale=self.scale,
                causal=False,
                window_size=(-1, -1),
                block_table=table,
                softcap=0,
                q_descale=None,
                k_descale=None,
                v_descale=None,
                seq_threshold_3D=128 // model.kv_heads,
                num_par_softmax_segments=segments,
                softmax_segm_output=parts,
                softmax_segm_max=tops,
                softmax_segm_expsum=sums,
            )
            for table in self.tables
        ]

    def flash(self) -> list[Callable[[], Any]]:
        """FlashAttention over the same pages, where an installed one takes them."""
        try:
            from vllm.vllm_flash_attn import flash_attn_varlen_func
        except ImportError:
            from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
        model, n = self.model, self.num_reqs
        keys, values = self.pool.split(model.head_dim, dim=-1)
        starts = torch.arange(0, (n + 1) * self.width, self.width, dtype=torch.int32, device=DEVICE)
        used = self.lengths + self.width
        return [
            lambda table=table: flash_attn_varlen_func(  # type: ignore[misc]
                q=self.q,
                k=keys,
                v=values,
                max_seqlen_q=self.width,
                cu_seqlens_q=starts,
                max_seqlen_k=self.context + self.width,
                seqused_k=used,
                softmax_scale=self.scale,
                causal=False,
                block_table=table,
            )
            for table in self.tables
        ]

    def gathered(self) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Queries, and contiguous keys and values per cache [num_reqs, heads, context + width, dim]."""
        n, length, dim = self.num_reqs, self.context + self.width, self.model.head_dim
        queries = self.q.view(n, self.width, -1, dim).transpose(1, 2)
        pairs = []
        for table in self.tables:
            rows = self.pool[table.long()].view(n, self.pages * PAGE, self.model.kv_heads, 2 * dim)[:, :length]
            keys, values = rows.transpose(1, 2).split(dim, dim=-1)
            pairs.append((keys.contiguous(), values.contiguous()))
        return queries, pairs

    def sdpa(self) -> list[Callable[[], Any]]:
        """PyTorch's attention on keys and values that were gathered beforehand; the gathering is not counted."""
        queries, pairs = self.gathered()
        return [
            lambda k=k, v=v: scaled_dot_product_attention(queries, k, v, scale=self.scale, enable_gqa=True)  # type: ignore[misc]
            for k, v in pairs
        ]

    def flex(self) -> list[Callable[[], Any]]:
        """PyTorch's FlexAttention, compiled, on gathered keys and values."""
        from torch.nn.attention.flex_attention import flex_attention

        queries, pairs = self.gathered()
        compiled = torch.compile(flex_attention, dynamic=False)
        return [
            lambda k=k, v=v: compiled(queries, k, v, scale=self.scale, enable_gqa=True)  # type: ignore[misc]
            for k, v in pairs
        ]


def sweep() -> list[tuple[Model, int, int, int]]:
    """The points, those that decide about the targets first."""
    points = list(itertools.product(MODELS, CONTEXTS, REQUESTS, WIDTHS))
    return sorted(points, key=lambda point: (point[3] != 16, point[0] != MODELS[1], point[2], point[1]))


BASELINES = ("unified", "flash", "sdpa", "flex")
NAMES = {
    "unified": "vLLM unified",
    "flash": "FlashAttention",
    "sdpa": "SDPA, gathered",
    "flex": "Flex, gathered",
}
COLUMNS = "{:<16} {:>7} {:>4} {:>5} {:>9} {:>9} {:>6} {:>7}"


def run_speed(evidence: KernelEvidence, deadline: float) -> None:
    evidence.copy_bytes_per_second = copy_bandwidth()
    print(f"copy: {evidence.copy_bytes_per_second / 1e12:.2f} TB/s read and written\n")
    print("microseconds per launch; floor: the bytes that must move, at the speed of the copy")
    heads = ("model", "context", "reqs", "block", "ours", "floor", "copy %", "TB/s")
    print(COLUMNS.format(*heads) + "".join(f" {NAMES[name]:>15}" for name in BASELINES), flush=True)
    compiled_flex = 0
    for model, context, num_reqs, width in sweep():
        if time.perf_counter() > deadline:
            print("out of time; the points above are what was measured")
            return
        free, _ = torch.cuda.mem_get_info()
        size = num_reqs * context * model.kv_heads * 4 * model.head_dim
        if 4 * size > free:
            continue
        setting = Setting(model, context, num_reqs, width)
        ours = seconds_per_launch(setting.ours())
        floor = setting.moved / evidence.copy_bytes_per_second
        record: dict[str, Any] = {
            "model": model._asdict(),
            "context": context,
            "requests": num_reqs,
            "block": width,
            "caches": setting.copies,
            "bytes": setting.moved,
            "tiles": setting.plan.tiles._asdict(),
            "splits": setting.plan.splits,
            "seconds": {"ours": ours},
            "of_copy_bandwidth": floor / ours,
        }
        for name in BASELINES:
            if name in evidence.not_compared:
                continue
            if name == "flex":  # compiling it takes longer than everything else
                if width != 16 or num_reqs != 1 or compiled_flex == 4 or deadline - time.perf_counter() < 120:
                    continue
                compiled_flex += 1
            try:
                record["seconds"][name] = seconds_per_launch(getattr(setting, name)())
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
            except Exception as error:
                evidence.not_compared[name] = f"{type(error).__name__}: {str(error)[:300]}"
        evidence.speed.append(record)
        evidence.write()
        line = COLUMNS.format(
            model.name,
            context,
            num_reqs,
            width,
            f"{ours * 1e6:.1f}",
            f"{floor * 1e6:.1f}",
            f"{100 * floor / ours:.0f}",
            f"{setting.moved / ours / 1e12:.2f}",
        )
        seconds = record["seconds"]
        cells = (f"{seconds[name] * 1e6:.1f}" if name in seconds else "-" for name in BASELINES)
        print(line + "".join(f" {cell:>15}" for cell in cells), flush=True)
        del setting
        torch.cuda.empty_cache()


def judge_targets(evidence: KernelEvidence) -> None:
    def lowest(requests: int) -> float | None:
        shares = [
            entry["of_copy_bandwidth"]
            for entry in evidence.speed
            if entry["requests"] == requests and entry["context"] >= 16384
        ]
        return min(shares) if shares else None

    beaten = [
        (entry["model"]["name"], entry["context"], entry["requests"], entry["block"], name)
        for entry in evidence.speed
        for name, seconds in entry["seconds"].items()
        # At short contexts all are bound by launching, and a tie within noise will do.
        if name != "ours" and seconds < entry["seconds"]["ours"] * (1.0 if entry["context"] >= 2048 else 0.95)
    ]
    evidence.targets = {
        "lowest share of copy bandwidth, 1 request, context >= 16384 (wanted 0.85)": lowest(1),
        "lowest share of copy bandwidth, 8 requests, context >= 16384 (wanted 0.80)": lowest(8),
        "points where a baseline is faster (wanted none)": beaten,
    }
    print()
    for name, value in evidence.targets.items():
        shown = (
            f"{value:.2f}" if isinstance(value, float) else len(value) if isinstance(value, list) else "not measured"
        )
        print(f"{name}: {shown}")
    for name, reason in evidence.not_compared.items():
        print(f"not compared with {NAMES[name]}: {reason}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: benchmarks/evidence/gpu_check-GPU.json")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop measuring after this long")
    parser.add_argument("--correctness-only", action="store_true")
    options = parser.parse_args()
    deadline = time.perf_counter() + 60 * options.minutes
    if not torch.cuda.is_available():
        print("gpu-check needs a GPU that this PyTorch can use, and found none; nothing was checked or measured.")
        return 2
    facts = environment()
    evidence = KernelEvidence(options.out or default_path("gpu_check", facts["gpu"]), facts)
    print(f"{facts['gpu']}, torch {facts['torch']}, triton {facts['triton']}", flush=True)
    if not run_correctness(evidence):
        print("The kernels are wrong on this GPU, so their speed means nothing and is not measured.")
        return 1
    if not options.correctness_only:
        run_speed(evidence, deadline)
        judge_targets(evidence)
    evidence.finished = True
    evidence.write()
    print(f"written to {evidence.path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
