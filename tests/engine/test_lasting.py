"""A deep sleep gives back what was taken while models were loaded, and vLLM brings back only what it knows of.

CPUs cannot sleep. What stands in for it is the memory itself: all of it that loading the head took is overwritten, and
what vLLM does beside that, which is to carry the drafter's buffers over, is done as `Worker.sleep` and `wake_up` do it.
"""

import gc
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.conftest import StartEngine
from tests.engine.harness import Engine, Run
from tests.engine.test_selector import selecting
from tests.engine.trained import OPTIONS, TINY, chat, questions, trained_head
from vllm_orthrus.engine.speculator import OrthrusSpeculator
from vllm_orthrus.engine.view import DiffusionView

LENGTH = 32
Storages = dict[int, torch.UntypedStorage]
WAYS: dict[str, dict[str, Any]] = {
    "two passes": trained_head("two"),
    "one pass": trained_head("one"),
    "one pass, selector, drawn": selecting("one", draft_sample_method="probabilistic"),
}


def storages() -> Storages:
    """Not the addresses that vLLM keeps in tensors of one number: products on CPUs have their weights behind those."""
    found = Storages()
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and one.dim():
            # What compilers left behind them in this process has no memory, sparse tensors have several.
            with suppress(RuntimeError):
                found[one.untyped_storage().data_ptr()] = one.untyped_storage()
    return found


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Storages:
    """What loading a head takes and keeps."""
    load, found = OrthrusSpeculator.load_draft_model, Storages()

    def load_draft_model(self: Any, *args: Any) -> nn.Module:
        before = storages()
        view = load(self, *args)
        gc.collect()
        found.update({place: one for place, one in storages().items() if place not in before and one.nbytes()})
        return view

    monkeypatch.setattr(OrthrusSpeculator, "load_draft_model", load_draft_model)
    return found


def sleep_deeply(engine: Engine, taken: Storages) -> None:
    draft = engine.runner.get_draft_model()
    saved = {name: buffer.cpu().clone() for name, buffer in draft.named_buffers()}
    for storage in taken.values():
        storage.fill_(0x5A)
    for name, buffer in draft.named_buffers():
        buffer.data.copy_(saved[name].data)


def ask(engine: Engine, first: int) -> Run:
    sampling = {"temperature": 0.7, "seed": 5} if engine.runner.speculator.draft_logits is not None else {}
    return engine.run([chat(engine, question) for question in questions(1, first)], LENGTH, **sampling)


@pytest.mark.parametrize("way", WAYS)
def test_drafts_are_those_of_an_engine_that_never_slept(way: str, start: StartEngine, taken: Storages) -> None:
    engine = start(WAYS[way], TINY / "base", **OPTIONS)
    held = {buffer.untyped_storage().data_ptr() for _, buffer in engine.runner.get_draft_model().named_buffers()}
    assert len(taken) >= 8 and held & taken.keys()
    ask(engine, 0)
    sleep_deeply(engine, taken)
    slept = ask(engine, 1)
    awake = start(WAYS[way], TINY / "base", **OPTIONS)
    ask(awake, 0)
    never = ask(awake, 1)
    assert (slept.tokens, slept.counts) == (never.tokens, never.counts)
    assert engine.one_pass == awake.one_pass


def test_without_it_drafts_are_lost(start: StartEngine, taken: Storages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiffusionView, "named_buffers", nn.Module.named_buffers)
    engine = start(WAYS["two passes"], TINY / "base", **OPTIONS)
    before = ask(engine, 0)
    sleep_deeply(engine, taken)
    after = ask(engine, 0)
    assert after.tokens == before.tokens, "drafts never change the text"
    assert after.counts.accepted < 0.3 * before.counts.accepted
