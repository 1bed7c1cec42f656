"""What drafting keeps on the device beside the head's weights, counted without allocating any of it."""

from typing import Any, NamedTuple

import pytest

from tests.rehearsal.machines import Ask
from tests.rehearsal.qwen3 import BASE, load

MIB = 2**20
DRAFTS, HYPOTHESES = 15, 9  # three of each of three requests, all of which have one product for their logits


class Kept(NamedTuple):
    """Bytes."""

    blocks: int  # hidden states of blocks
    logits: int  # of blocks
    workspace: int  # of the kernel
    distributions: int
    rest: int
    max_num_seqs: int
    at_once: int
    most_carried: int


def keep(*settings: tuple[str, Any]) -> Kept:
    import torch

    from vllm_orthrus.engine.onepass.drafting import OnePassDrafting

    speculator = load(*settings).speculator
    found: dict[int, int] = {}
    met: set[int] = set()  # some of ours know each other

    def size(value: Any) -> int:
        """Of all that hangs on something of ours and was not counted yet."""
        if isinstance(value, torch.nn.Module):
            return 0  # the head's weights, and the target
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            new = storage._cdata not in found and value.device.type != "cpu"
            return found.setdefault(storage._cdata, storage.nbytes()) if new else 0
        if isinstance(value, dict):
            return sum(map(size, value.values()))
        if isinstance(value, list | tuple):
            return sum(map(size, value))
        ours = type(value).__module__.startswith("vllm_orthrus") and id(value) not in met
        met.add(id(value))
        return size({n: part for n, part in vars(value).items() if n != "sources"}) if ours and vars(value) else 0

    drafting = speculator.drafting
    one_pass = isinstance(drafting, OnePassDrafting)
    kept = [drafting.drafted, drafting.buffers.hidden, drafting.memory.block_hidden] if one_pass else []
    logits = [drafting.logits.carried, drafting.logits.kept] if one_pass else []
    parts = size(kept), size(logits), size(speculator.workspace), size(speculator.draft_logits)
    shape = speculator.shape
    rest = size([part for name, part in vars(speculator).items() if name != "block_tables"])
    return Kept(*parts, rest, shape.max_num_reqs, shape.at_once, shape.most_carried)


@pytest.mark.parametrize("gpu", ["H200", "RTX 4090"])  # the most and the least that vLLM gives by default
@pytest.mark.parametrize("way", ["one pass", "two products", "two passes", "probabilistic"])
def test_as_much_as_the_docs_say(gpu: str, way: str, ask: Ask) -> None:
    """The terms of docs/memory.md, one by one."""
    settings: dict[str, tuple[str, Any]] = {
        "two passes": ("orthrus_passes", "two"),
        "two products": ("orthrus_vocabulary", "twice"),
        "probabilistic": ("draft_sample_method", "probabilistic"),
    }
    kept = ask(gpu, keep, *([settings[way]] if way in settings else []))
    row = BASE["hidden_size"] * 2
    blocks = (kept.at_once + kept.most_carried + 1 + HYPOTHESES) * (DRAFTS + 1) * row
    assert kept.blocks == (0 if way == "two passes" else blocks)
    logits = (HYPOTHESES + kept.most_carried + 1) * (DRAFTS + 1) * BASE["vocab_size"] * 2
    assert kept.logits == (0 if way in ("two passes", "two products") else logits)
    assert 0 < kept.workspace <= 36 * MIB
    distributions = kept.max_num_seqs * DRAFTS * BASE["vocab_size"] * 2
    assert kept.distributions == (distributions if way == "probabilistic" else 0)
    assert kept.rest <= kept.max_num_seqs * 18 * 2**10
    assert kept.max_num_seqs <= (256 if way == "probabilistic" else 1024)
    bound = 131 * MIB if way != "probabilistic" else 1.3 * 2**30
    assert sum(kept[:5]) <= bound
