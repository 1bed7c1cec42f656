"""The training forward against the reference, block by block, and the geometry of packed rows."""

from __future__ import annotations

import pytest
import torch

from tests.unit.conftest import make_base, make_reference
from vllm_orthrus.training.blocks import Rows, anchor_places, draw_anchors, make_blocks
from vllm_orthrus.training.dual_view import AttentionKind, DualViewModel

WIDTH, MASK = 6, 127


def packed_rows() -> Rows:
    """Two rows of 40: documents of 14 and 26 tokens; one document of 30 tokens and padding."""
    generator = torch.Generator().manual_seed(3)
    document = torch.tensor([[1] * 14 + [2] * 26, [1] * 30 + [0] * 10])
    answer = torch.zeros(2, 40, dtype=torch.bool)
    answer[0, 5:14] = answer[0, 20:40] = answer[1, 3:30] = True
    return Rows(torch.randint(0, 120, (2, 40), generator=generator), document, answer)


def start_of(rows: Rows, row: int, column: int) -> int:
    return int((rows.document[row] == rows.document[row, column]).nonzero()[0])


def test_positions_restart_with_each_document() -> None:
    positions = packed_rows().positions
    assert positions[0].tolist() == [*range(14), *range(26)]
    assert positions[1, :30].tolist() == list(range(30))


def test_anchors_stand_on_answers_with_something_to_learn() -> None:
    rows = packed_rows()
    for row, column in anchor_places(rows, WIDTH).nonzero().tolist():
        assert rows.answer[row, column] and rows.answer[row, column + 1]
        assert rows.document[row, column] == rows.document[row, column + 1]
        assert 1 <= column <= 40 - WIDTH and column > start_of(rows, row, column)
    assert not anchor_places(rows, WIDTH)[0, 13], "the last token of a document has nothing behind it"
    assert anchor_places(rows, WIDTH)[0, 12]


def test_anchors_are_drawn_without_replacement_and_reproducibly() -> None:
    places = anchor_places(packed_rows(), WIDTH)
    anchors, real = draw_anchors(places, 12, torch.Generator().manual_seed(5))
    again, _ = draw_anchors(places, 12, torch.Generator().manual_seed(5))
    assert torch.equal(anchors, again)
    for row in range(2):
        drawn = anchors[row][real[row]].tolist()
        assert len(drawn) == len(set(drawn)) == 12
        assert places[row, drawn].all()
    everything, real = draw_anchors(places, 39, torch.Generator().manual_seed(5))
    assert real.sum(1).tolist() == places.sum(1).tolist(), "every place is used, and nothing else counts as real"
    assert everything.shape == (2, 39)


def test_rows_are_taught_by_the_state_that_knows_their_prefix() -> None:
    rows = packed_rows()
    anchors = torch.tensor([[12, 20], [27, 10]])
    blocks = make_blocks(rows, anchors, torch.tensor([[True, True], [True, False]]), WIDTH, MASK)
    assert blocks.ids[0, 0].tolist() == [int(rows.tokens[0, 12])] + [MASK] * (WIDTH - 1)
    assert blocks.positions[0, 1].tolist() == list(range(6, 12)), "document 2 starts at column 14"
    assert blocks.teacher[0, 1, :5].tolist() == [20, 21, 22, 23, 24]
    assert blocks.taught[0, 0].tolist() == [True] + [False] * 5, "only column 13 is left of document 1"
    assert blocks.taught[0, 1].tolist() == [True] * 5 + [False], "the last row is never taught"
    assert blocks.taught[1, 0].tolist() == [True, True] + [False] * 4, "padding teaches nothing"
    assert not blocks.taught[1, 1].any(), "a block that isn't real teaches nothing"
    assert blocks.visible[0, 1].nonzero().flatten().tolist() == list(range(14, 20))


@pytest.mark.parametrize("kind", ["dense", "flex"])
@pytest.mark.parametrize("shape", ["qwen3", "qwen2"])
def test_packed_forward_is_the_reference(kind: AttentionKind, shape: str) -> None:
    """Every block's states equal a separate run of the reference on that document alone; so do the teacher's."""
    reference = make_reference(make_base(shape), WIDTH)
    rows = packed_rows()
    anchors, real = draw_anchors(anchor_places(rows, WIDTH), 5, torch.Generator().manual_seed(1))
    blocks = make_blocks(rows, anchors, real, WIDTH, MASK)
    with torch.no_grad():
        states = DualViewModel(reference.base, reference.head, kind)(rows, blocks)
        for row in range(2):
            for block in range(5):
                column = int(anchors[row, block])
                start = start_of(rows, row, column)
                tokens = rows.tokens[row, start : column + WIDTH][None]
                cache = reference.new_cache(1, 64)
                teacher = reference.autoregressive(tokens, torch.arange(tokens.shape[1])[None], cache)
                student = reference.diffusion(rows.tokens[row, column][None], torch.tensor([column - start]), cache)
                torch.testing.assert_close(states.student[row, block], student[0], atol=2e-5, rtol=1e-4)
                own = (rows.document[row, start : column + WIDTH] == rows.document[row, column]).sum()
                torch.testing.assert_close(
                    states.teacher[row, start : start + own], teacher[0, :own], atol=2e-5, rtol=1e-4
                )


@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_reaches_the_head_and_nothing_else(recompute: bool) -> None:
    reference = make_reference(make_base(), WIDTH)
    rows = packed_rows()
    anchors, real = draw_anchors(anchor_places(rows, WIDTH), 5, torch.Generator().manual_seed(1))
    model = DualViewModel(reference.base, reference.head, "dense", recompute)
    states = model(rows, make_blocks(rows, anchors, real, WIDTH, MASK))
    assert not states.teacher.requires_grad
    states.student.square().sum().backward()
    assert all(parameter.grad is None for parameter in reference.base.parameters())
    grads = {name: parameter.grad for name, parameter in reference.head.named_parameters()}
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values()), "every head tensor must learn"


def test_recomputing_changes_nothing() -> None:
    gradients = []
    for recompute in (False, True):
        reference = make_reference(make_base(), WIDTH)
        rows = packed_rows()
        anchors, real = draw_anchors(anchor_places(rows, WIDTH), 5, torch.Generator().manual_seed(1))
        model = DualViewModel(reference.base, reference.head, "dense", recompute)
        model(rows, make_blocks(rows, anchors, real, WIDTH, MASK)).student.square().sum().backward()
        gradients.append([parameter.grad for parameter in reference.head.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None and torch.equal(plain, recomputed)
