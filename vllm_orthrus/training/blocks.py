"""Training blocks: where anchors may stand, and which of a block's rows have something to learn.

A block at anchor a has rows i = 0..B-1 at positions a+i, with inputs [x_a, MASK, ...]. It sees the AR keys strictly
before a, of its own document, and itself; blocks do not see each other. Row i is taught p_AR(. | x_<=a+i), i = 0..B-2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Packed rows of S tokens: several documents one behind the other, padded at the end."""

    tokens: Tensor  # [R, S]
    document: Tensor  # [R, S] number of the document in its row; 0 is padding
    answer: Tensor  # [R, S] bool: the token belongs to an answer, so the model is to learn to draft it

    def to(self, device: torch.device) -> Rows:
        return Rows(*(tensor.to(device, non_blocking=True) for tensor in self))

    @property
    def positions(self) -> Tensor:
        """[R, S] position of each token in its own document."""
        column = torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(self.tokens)
        starts = torch.ones_like(self.document, dtype=torch.bool)
        starts[:, 1:] = self.document[:, 1:] != self.document[:, :-1]
        return column - torch.where(starts, column, 0).cummax(1).values

    @property
    def causal(self) -> Tensor:
        """[R, S, S] what the AR view may see: its own document, up to and including the token itself."""
        same = self.document[:, :, None] == self.document[:, None]
        return same.tril()


class Blocks(NamedTuple):
    """N blocks of width B per packed row."""

    anchors: Tensor  # [R, N] column of the anchor
    visible: Tensor  # [R, N, S] bool: AR keys that a block sees
    ids: Tensor  # [R, N, B]
    positions: Tensor  # [R, N, B] in the anchor's document
    taught: Tensor  # [R, N, B] bool: the row has a target
    teacher: Tensor  # [R, N, B] column of the AR state that teaches the row (valid where taught)


def anchor_places(rows: Rows, width: int) -> Tensor:
    """[R, S] where an anchor may stand: on an answer token that has a prefix and another answer token behind it.

    A block may run over the end of its document: its first rows still have targets, and serving meets such blocks too.
    """
    follows = torch.zeros_like(rows.answer)
    follows[:, :-1] = rows.answer[:, 1:] & (rows.document[:, 1:] == rows.document[:, :-1])
    # The published recipe's bound: the whole block lies in the packed row.
    inside = torch.arange(rows.tokens.shape[1], device=rows.tokens.device) <= rows.tokens.shape[1] - width
    return rows.answer & follows & inside & (rows.positions > 0) & (rows.document > 0)


def draw_anchors(places: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw `count` distinct anchors per row: their columns [R, count] and which are real, where places are fewer."""
    # Random keys, real places first: a draw without replacement for every row at once.
    keys = torch.rand(places.shape, generator=generator, device=places.device) + places
    drawn = keys.topk(min(count, places.shape[1]), dim=1).indices
    return drawn, places.gather(1, drawn)


def make_blocks(rows: Rows, anchors: Tensor, real: Tensor, width: int, mask_token_id: int) -> Blocks:
    length = rows.tokens.shape[1]
    offsets = torch.arange(width, device=anchors.device)
    columns = anchors[..., None] + offsets  # [R, N, B]
    ids = torch.full_like(columns, mask_token_id)
    ids[..., 0] = rows.tokens.gather(1, anchors)
    own_document = rows.document.gather(1, anchors)  # [R, N]
    visible = (rows.document[:, None] == own_document[..., None]) & (
        torch.arange(length, device=anchors.device) < anchors[..., None]
    )
    target = (columns + 1).clamp(max=length - 1)  # the token that the row predicts
    in_place = (columns + 1 < length) & (_take(rows.document, target) == own_document[..., None])
    taught = in_place & _take(rows.answer, target) & real[..., None]
    taught[..., max(1, width - 1) :] = False  # the last row of a block is never taught, unless it is the only one
    positions = rows.positions.gather(1, anchors)[..., None] + offsets
    return Blocks(anchors, visible, ids, positions, taught, columns.clamp(max=length - 1))


def _take(table: Tensor, columns: Tensor) -> Tensor:
    """table [R, S], columns [R, N, B] -> [R, N, B]."""
    return table.gather(1, columns.flatten(1)).view_as(columns)
