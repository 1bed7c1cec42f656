"""What every block that could prove useful would draft, computed once and looked up from then on.

Greedy text is the same however it is drafted, and a hypothesis is only ever used where what it says came true. So the
block at hand is told by its place in the text and by its width, and one pass can be replayed from tables, exactly, for
many ways to spend rows. `sight` is what a block sees of the text before it; verifications see everything.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from vllm_orthrus.kernels.chances import LOOKED_AT
from vllm_orthrus.training.reference import Cache, Reference
from vllm_orthrus.training.views import Rope

WIDTHS = (2, 4, 8, 16)


class Sight(NamedTuple):
    """Positions of the prefix that a block sees: the first and the last so many. Nothing said: all."""

    first: int = 0
    last: int | None = None


ALL = Sight()


class Blocks(NamedTuple):
    """Of R greedy answers. A block at place t begins with the answer's token t."""

    answers: Tensor  # [R, T]
    ends: Tensor  # [R] place of the last token: that which stops, or the limit
    widths: tuple[int, ...]  # W of them
    tokens: Tensor  # [W, R, P, B, C+1] the most probable of each row; rows past a block's width hold nothing
    probability: Tensor  # [W, R, P, B, C+1] falling


@torch.inference_mode()
def draft_everywhere(
    reference: Reference, cache: Cache, text: Tensor, places: Tensor, width: int, sight: Sight = ALL
) -> Tensor:
    """Hidden states [P, width, d] of the blocks that begin at positions `places` [P] of one text [T] in the cache."""
    ids = torch.full((len(places), width), reference.config.mask_token_id)
    ids[:, 0] = text[places]
    x = reference.decoder.embed_tokens(ids)
    rope = Rope.at(reference.decoder.rotary_emb, x, places[:, None] + torch.arange(width))
    slots = torch.arange(len(text))
    seen = slots < places[:, None]
    if sight.last is not None:
        seen &= (slots < sight.first) | (slots >= places[:, None] - sight.last)
    hidden = torch.where(seen, 0.0, float("-inf"))[:, None, None]  # [P, 1, 1, T]
    for index, (layer, _, view) in enumerate(reference.views()):
        q, k, v = view.project(layer.input_layernorm(x), rope)
        group = q.shape[1] // k.shape[1]
        # The prefix is shared by all blocks of the text, so it is not spread out over them.
        before_k, before_v = (side[index][0, :, : len(text)].repeat_interleave(group, 0) for side in cache)  # [H, T, D]
        k, v = (side.repeat_interleave(group, 1) for side in (k, v))
        scores = torch.cat((q @ before_k.transpose(-1, -2) * view.scaling + hidden, q @ k.mT * view.scaling), -1)
        weights = scores.softmax(-1)
        x = x + view.output(weights[..., : len(text)] @ before_v + weights[..., len(text) :] @ v)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    result: Tensor = reference.decoder.norm(x)
    return result


@torch.inference_mode()
def read_blocks(
    reference: Reference,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    limit: int,
    stop: Sequence[int],
    widths: tuple[int, ...] = WIDTHS,
    sights: Sequence[Sight] = (ALL,),
) -> list[Blocks]:
    """For each sight. The answers must go on past their end and past the limit as far as a step may lead."""
    ended = [next((at for at, token in enumerate(answer[:limit]) if token in stop), limit - 1) for answer in answers]
    block = max(widths)
    places, counts = limit + block, LOOKED_AT
    shape = (len(sights), len(widths), len(prompts), places, block, counts)
    tokens, probability = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
    for row, (prompt, answer) in enumerate(tqdm(list(zip(prompts, answers, strict=True)), desc="blocks")):
        text = torch.tensor([*prompt, *answer])
        cache = reference.new_cache(1, len(text))
        reference.autoregressive(text[None], torch.arange(len(text))[None], cache)
        where = len(prompt) + torch.arange(min(places, ended[row] + 1))  # none is used behind the end
        for (which, sight), (index, width) in itertools.product(enumerate(sights), enumerate(widths)):
            logits = reference.logits(draft_everywhere(reference, cache, text, where, width, sight))
            likely = logits.softmax(-1).topk(counts)
            tokens[which, index, row, : len(where), :width] = likely.indices.int()
            probability[which, index, row, : len(where), :width] = likely.values
    told, ends = torch.tensor([list(answer) for answer in answers]), torch.tensor(ended)
    return [Blocks(told, ends, widths, tokens[which], probability[which]) for which in range(len(sights))]
