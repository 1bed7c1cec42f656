"""What an engine passes to a launch are views of buffers. A view gives what a copy gives, or is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.slots import Sizes, parts, remembered
from vllm_orthrus.kernels import (
    chances,
    choose,
    dual_view_attention,
    most_probable,
    norm_rotate,
    prepare_block,
    prepare_hypotheses,
    take_rows,
    take_up,
)
from vllm_orthrus.kernels.dual_view_attention import PagedCache, Verification
from vllm_orthrus.kernels.slots import Remembered, Slots

Tensors = dict[str, Tensor]
Launch = Callable[[Tensors], Any]

REQS, DRAFTS, RANKS, HYPOTHESES, VOCABULARY = 3, 5, 4, 6, 40


def _slots() -> Tensors:
    made = remembered(Sizes(slots=4, drafts=DRAFTS, hypotheses=HYPOTHESES, ranks=RANKS), 1)
    named = {"slot offset": made.offset, "sampled": made.sampled}
    for kind, part in (("hypotheses", made.hypotheses), ("drafts", made.drafts), ("history", made.history)):
        named |= {f"{kind} {name}": tensor for name, tensor in part._asdict().items()}
    return named | {f"table {name}": tensor for name, tensor in made.calibration._asdict().items()}


def _as_slots(t: Tensors) -> Slots:
    def of(kind: str) -> list[Tensor]:
        return [tensor for name, tensor in t.items() if name.startswith(f"{kind} ")]

    own = chances.Drafts(*of("drafts")), chances.History(*of("history")), chances.Calibration(*of("table"))
    return Slots(t["slot offset"], t["sampled"], Remembered(*of("hypotheses")), *own)


def _choose() -> tuple[Tensors, Launch]:
    gen = torch.Generator().manual_seed(1)
    probabilities = torch.randn(REQS, DRAFTS + 1, VOCABULARY, generator=gen).softmax(-1)
    tokens = probabilities[:, :-1].argmax(-1)
    said = most_probable.from_probabilities(probabilities, tokens, RANKS + 1)
    given = {
        "slot": torch.tensor([2, 0, 3]),
        "anchor_position": torch.tensor([20, 10, 30]),
        "anchor": torch.tensor([11, 22, 33]),
        "tokens": tokens,
        "temperature": torch.tensor([0.0, 0.7, 1.5]),
        **{f"said {name}": tensor for name, tensor in said._asdict().items()},
        "values": 0.9 ** torch.arange(DRAFTS + 2),
    }

    def launch(t: Tensors) -> list[Tensor]:
        slots = _as_slots(t)
        drafted = choose.Drafted(t["slot"], t["anchor_position"], t["anchor"], t["tokens"], t["temperature"])
        said = most_probable.Probable(t["said confidence"], t["said tokens"], t["said probability"])
        choose.launch(drafted, said, t["values"], slots, DRAFTS, DRAFTS + 1)
        return list(parts(slots).values())

    return given | _slots(), launch


def _take_up() -> tuple[Tensors, Launch]:
    given = {
        "slot": torch.tensor([2, 0, 3]),
        "num_sampled": torch.tensor([2, 6, 1]),
        "num_rejected": torch.tensor([4, 0, 5]),
        "bonus": torch.tensor([1, 0, 2]),
        "prefix_lengths": torch.tensor([[9, 7, 8], [5, -1, 6], [4, 3, 9]], dtype=torch.int32),
        "counters": torch.arange(6),
    }

    def launch(t: Tensors) -> list[Tensor]:
        slots = _as_slots(t)
        outcome = take_up.Outcome(t["slot"], t["num_sampled"], t["num_rejected"], t["bonus"])
        which = take_up.launch(outcome, t["prefix_lengths"], slots, t["counters"], 7)
        return [which, t["counters"], *parts(slots).values()]

    return given | _slots(), launch


def _rows() -> tuple[Tensors, Launch]:
    gen = torch.Generator().manual_seed(4)
    given = {
        "hidden": torch.randn(REQS, 2, 4, 10, generator=gen),
        "which": torch.tensor([1, -1, 0]),
        "slot": torch.tensor([2, 0, 3]),
        "place": torch.tensor([1, 3, 0, 2, 3]),
        "offset": torch.tensor([2, 0, 1, 3, 0]),
        "kept": torch.randn(REQS + 1, 4, 10, generator=gen),
    }
    return given, lambda t: [take_rows.launch(*t.values(), num_drafts=DRAFTS), t["kept"]]


def _norm_rotate() -> tuple[Tensors, Launch]:
    gen = torch.Generator().manual_seed(5)
    width = (4 + 2 * 2) * 16
    given = {
        "qkv": torch.randn(3, width, generator=gen),
        "positions": torch.tensor([4, 5, 6]),
        "q_weight": torch.rand(16, generator=gen),
        "k_weight": torch.rand(16, generator=gen),
        "second qkv": torch.randn(2, width, generator=gen),
        "second positions": torch.tensor([7, 8]),
        "cos_sin": torch.randn(9, 16, generator=gen),
        "keys": torch.zeros(2, 2, 4, 16),
        "values": torch.zeros(2, 2, 4, 16),
        "slots": torch.tensor([5, -1, 2]),
    }

    def launch(t: Tensors) -> None:
        weights = t["q_weight"], t["k_weight"]
        first = norm_rotate.Projected(t["qkv"], t["positions"], *weights)
        second = norm_rotate.Projected(t["second qkv"], t["second positions"], *weights)
        cache = norm_rotate.CacheSlots(t["keys"], t["values"], t["slots"])
        norm_rotate.launch((first, second), norm_rotate.Heads(4, 2, 16), t["cos_sin"], 1e-6, cache)

    return given, launch


def _likeliest() -> tuple[Tensors, Launch]:
    gen = torch.Generator().manual_seed(2)
    given = {
        "logits": torch.randn(REQS * DRAFTS + REQS, VOCABULARY, generator=gen),
        "drafts": torch.randint(0, VOCABULARY, (REQS, DRAFTS), generator=gen),
        "temperature": torch.tensor([0.0, 0.7, 1.5]),
    }
    return given, lambda t: list(most_probable.launch(*t.values(), count=3, stretch=16))


def _hypotheses() -> tuple[Tensors, Launch]:
    block, num_hypotheses = 4, 3
    given = {
        "anchor_position": torch.tensor([20, 10, 30, 0]),
        "accepted": torch.tensor([[-1, 0, 1, 2], [0, 1, -2, 2], [2, 0, -1, 1], [0, 0, 0, 0]]),
        "token": torch.arange(16).view(4, 4),
        "idx_mapping": torch.tensor([1, 0, 2]),
        "query_start_loc": torch.tensor([0, 3, 6, 9], dtype=torch.int32),
        "positions": torch.tensor([10, 11, 12, 20, 21, 22, 30, 31, 32]),
        "input_ids": torch.full((REQS, num_hypotheses, block), -7),
        "places": torch.full((REQS, num_hypotheses, block), -7),
        "prefix_lengths": torch.full((REQS, num_hypotheses), -7, dtype=torch.int32),
    }

    def launch(t: Tensors) -> None:
        given = list(t.values())
        prepare_hypotheses.launch(
            REQS,
            Remembered(*given[:3]),
            prepare_hypotheses.VerifyBatch(*given[3:6]),
            prepare_hypotheses.HypothesisBlocks(*given[6:]),
            99,
            100,
        )

    return given, launch


def _blocks() -> tuple[Tensors, Launch]:
    block, capacity = 4, 4
    given = {
        "drafting": torch.tensor([2, 0]),
        "idx_mapping": torch.tensor([1, 3, 0]),
        "query_start_loc": torch.tensor([0, 3, 6, 9], dtype=torch.int32),
        "positions": torch.tensor([10, 11, 12, 20, 21, 22, 30, 31, 32]),
        "num_sampled": torch.tensor([2, 3, 0]),
        "num_rejected": torch.tensor([1, 0, 0]),
        "last_sampled": torch.tensor([[70], [71], [72], [73]]),
        "next_prefill_tokens": torch.tensor([[80, 81, 82, 83]], dtype=torch.int32),
        "input_ids": torch.full((capacity, block), -7),
        "places": torch.full((capacity, block), -7),
        "prefix_lengths": torch.full((capacity,), -7, dtype=torch.int32),
        "slots": torch.full((capacity, 3), -7),
        "source": torch.arange(1, 37, dtype=torch.int32).view(3, 12),
        "target": torch.zeros(capacity, 12, dtype=torch.int32),
    }

    def launch(t: Tensors) -> None:
        given = list(t.values())
        tables = prepare_block.link_tables([t["source"]], [t["target"]], [8])
        rows = prepare_block.BlockRows(*given[8:12], tables)
        prepare_block.launch(given[0], prepare_block.BatchState(*given[1:8]), rows, 99, 90)

    return given, launch


def _attention() -> tuple[Tensors, Launch]:
    gen = torch.Generator().manual_seed(3)
    heads, kv_heads, dim, page, pages, block, verified = 4, 2, 16, 4, 12, 3, 2

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    given = {
        "q": random(2 * block, heads, dim),
        "k": random(2 * block, kv_heads, dim),
        "v": random(2 * block, kv_heads, dim),
        "keys": random(pages, kv_heads, page, dim),
        "values": random(pages, kv_heads, page, dim),
        "table": torch.tensor([[3, 1, 5], [2, 7, 4]], dtype=torch.int32),
        "k_scale": torch.tensor([0.5, 2.0]),
        "v_scale": torch.tensor([3.0, 0.25]),
        "prefix_lengths": torch.tensor([[7], [11]], dtype=torch.int32),
        "out": torch.zeros(2 * block, heads, dim),
        "verify_q": random(2 * verified, heads, dim),
        "verify_lengths": torch.tensor([8, 9, 11, 12], dtype=torch.int32),
        "verify_out": torch.zeros(2 * verified, heads, dim),
        "verify_starts": torch.tensor([0, 2, 4], dtype=torch.int32),
    }

    def launch(t: Tensors) -> None:
        cache = PagedCache(t["keys"], t["values"], t["table"], page, t["k_scale"], t["v_scale"])
        rows = Verification(t["verify_q"], t["verify_lengths"], verified, t["verify_out"], t["verify_starts"])
        given = (t["q"], t["k"], t["v"], cache, t["prefix_lengths"])
        dual_view_attention.launch(*given, 0.25, out=t["out"], verification=rows)

    return given, launch


CASES = {
    "choose": _choose,
    "take up": _take_up,
    "rows": _rows,
    "norm and rotate": _norm_rotate,
    "likeliest": _likeliest,
    "hypotheses": _hypotheses,
    "blocks": _blocks,
    "attention": _attention,
}


def every_argument() -> Iterator[tuple[str, str, int]]:
    for case, make in CASES.items():
        for name, tensor in make()[0].items():
            yield from ((case, name, dimension) for dimension in range(tensor.dim()))


def spread(tensor: Tensor, dimension: int) -> Tensor:
    """The same values as every third of a larger tensor along one dimension; what lies between is not for anybody."""
    size = list(tensor.shape)
    size[dimension] *= 3
    between = float("nan") if tensor.is_floating_point() else 0  # an index that leads nowhere would crash
    room = torch.full(size, between, dtype=tensor.dtype)
    view = room[tuple(slice(None, None, 3) if d == dimension else slice(None) for d in range(tensor.dim()))]
    return view.copy_(tensor)


def outcome(case: str, changed: Callable[[str, Tensor], Tensor]) -> tuple[Any, Tensors]:
    given, launch = CASES[case]()
    given = {name: changed(name, tensor) for name, tensor in given.items()}
    return launch(given), given


@pytest.mark.parametrize(("case", "name", "dimension"), every_argument())
def test_a_view_gives_what_a_copy_gives(case: str, name: str, dimension: int) -> None:
    expected = outcome(case, lambda _, tensor: tensor)
    try:
        found = outcome(case, lambda at, tensor: spread(tensor, dimension) if at == name else tensor)
    except ValueError as refusal:
        assert "contiguous" in str(refusal)
        return
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_the_views_that_the_engine_passes_are_taken() -> None:
    """First columns of the buffers that hold the blocks' rows."""
    for case, names in {
        "choose": ("slot", "anchor", "anchor_position"),
        "take up": ("slot", "bonus"),
        "rows": ("slot",),
    }.items():
        expected = outcome(case, lambda _, tensor: tensor)
        found = outcome(case, lambda at, tensor, names=names: spread(tensor, 0) if at in names else tensor)
        torch.testing.assert_close(found, expected)
