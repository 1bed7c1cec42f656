from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from vllm_orthrus.kernels.prepare_block import BatchState, BlockRows, launch, link_tables, naive

MASK, UNTOUCHED, SLOTS = 999, -77, 9


def state(seed: int, queries: list[int], max_model_len: int) -> tuple[BatchState, list[torch.Tensor]]:
    """A batch after sampling, with these numbers of tokens per request, and its block tables of two cache groups."""
    gen = torch.Generator().manual_seed(seed)

    def random(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=gen)

    num_reqs = len(queries)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    first = [int(random(max_model_len - count, 1)) for count in queries]
    positions = torch.cat([torch.arange(start, start + count) for start, count in zip(first, queries, strict=True)])
    rejected = torch.tensor([int(random(count, 1)) for count in queries], dtype=torch.int32)
    batch = BatchState(
        torch.randperm(SLOTS, generator=gen)[:num_reqs],
        starts,
        torch.cat([positions, torch.full((5,), -(10**6))]),  # the runner's buffers are longer than the batch
        random(3, num_reqs).int(),
        rejected,
        random(1000, SLOTS, 1),
        random(1000, 2, SLOTS).int(),
    )
    return batch, [random(1000, SLOTS, 40).int(), random(1000, SLOTS, 12).int()]


def rows(capacity: int, width: int, drafts: int, sources: list[torch.Tensor]) -> BlockRows:
    def full(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full(shape, UNTOUCHED, dtype=dtype)

    targets = [full(capacity, source.shape[1], dtype=torch.int32) for source in sources]
    return BlockRows(
        full(capacity, width),
        full(capacity, width),
        full(capacity, dtype=torch.int32),
        full(capacity, drafts),
        link_tables(sources, targets, [16, 64]),
    )


@given(st.data())
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
def test_equals_naive(data: st.DataObject) -> None:
    queries = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    width = data.draw(st.integers(1, 9))
    drafts = data.draw(st.integers(1, width))
    max_model_len = data.draw(st.sampled_from((7, 100, 600)))
    batch, sources = state(data.draw(st.integers(0, 2**16)), queries, max_model_len)
    drafting = torch.tensor(sorted(data.draw(st.sets(st.sampled_from(range(len(queries)))))), dtype=torch.int64)
    num_rows = data.draw(st.integers(len(drafting), 6).filter(bool))
    padding = data.draw(st.sampled_from((0, -1)))
    found, wanted = rows(6, width, drafts, sources), rows(6, width, drafts, sources)
    launch(drafting, batch, found, MASK, max_model_len, num_rows, padding)
    naive(drafting, batch, wanted, MASK, max_model_len, num_rows, padding)
    for name, one, other in zip(BlockRows._fields[:-1], found, wanted, strict=False):
        assert torch.equal(one, other), name
    for one, other in zip(found.tables.targets, wanted.tables.targets, strict=True):
        assert torch.equal(one, other)
    assert (found.input_ids[num_rows:] == UNTOUCHED).all()


@pytest.mark.parametrize("build", [naive, launch])
def test_the_anchor_follows_the_last_token_that_was_kept(build: Callable[..., None]) -> None:
    """Four tokens at 10..13 of which two were rejected: the bonus token stands at 12."""
    tables = [torch.arange(1, 9, dtype=torch.int32).view(1, 8).repeat(2, 1)]
    batch = BatchState(
        torch.tensor([1, 0]),
        torch.tensor([0, 4, 6], dtype=torch.int32),
        torch.tensor([10, 11, 12, 13, 0, 1]),
        torch.tensor([2, 0], dtype=torch.int32),
        torch.tensor([2, 0], dtype=torch.int32),
        torch.tensor([[50], [51]]),
        torch.tensor([[60, 61]]),
    )
    out = rows(3, 3, 2, tables * 2)
    build(torch.tensor([0, 1]), batch, out, MASK, 14, padding_length=-1)
    assert out.input_ids.tolist() == [[51, MASK, MASK], [60, MASK, MASK], [0, 0, 0]]
    assert out.positions.tolist() == [[12, 13, 13], [2, 3, 4], [0, 0, 0]]  # nothing lies past the context limit
    assert out.prefix_lengths.tolist() == [12, 2, -1]
    assert out.slots.tolist() == [[1, 1], [0, 0], [-1, -1]]
    assert out.tables.targets[0][:, :2].tolist() == [[1, UNTOUCHED], [1, UNTOUCHED], [0, UNTOUCHED]]


@pytest.mark.parametrize("build", [naive, launch])
def test_too_many_requests_are_refused(build: Callable[..., None]) -> None:
    batch, sources = state(0, [2, 2], 100)
    with pytest.raises(ValueError, match="2 requests into 1 of 6 rows"):
        build(torch.tensor([0, 1]), batch, rows(6, 2, 2, sources), MASK, 100, num_rows=1)
