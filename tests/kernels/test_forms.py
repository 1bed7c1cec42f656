"""Every operator is one module of the same shape, and the setting decides which form of it runs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from vllm_orthrus.kernels import (
    choose,
    dual_view_attention,
    most_probable,
    norm_rotate,
    prepare_block,
    prepare_hypotheses,
    take_rows,
    take_up,
)
from vllm_orthrus.kernels.forms import SETTING, wanted_form

OPERATORS = {
    "choose": choose,
    "dual_view_attention": dual_view_attention,
    "most_probable": most_probable,
    "norm_rotate": norm_rotate,
    "prepare_blocks": prepare_block,
    "prepare_hypotheses": prepare_hypotheses,
    "take_rows": take_rows,
    "take_up": take_up,
}
ON_THE_KERNEL_PATH = ("dual_view_attention", "prepare_blocks")  # chosen by orthrus_attention, on a CPU too


@pytest.mark.parametrize("name", OPERATORS)
def test_naive_and_launch_take_what_the_operator_takes(name: str) -> None:
    module: Any = OPERATORS[name]
    wanted = [(one.name, one.default) for one in inspect.signature(getattr(module, name)).parameters.values()]
    for form in (module.naive, module.launch):
        given = [(one.name, one.default) for one in inspect.signature(form).parameters.values()]
        assert given[: len(wanted)] == wanted
        assert all(default is not inspect.Parameter.empty for _, default in given[len(wanted) :])


@pytest.mark.parametrize("form", ["auto", "triton", "torch"])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_setting_decides(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = OPERATORS[name]
    monkeypatch.setenv(SETTING, form)
    for which in ("naive", "launch"):
        monkeypatch.setattr(module, which, lambda *arguments, which=which: ran.append(which))
    ran: list[str] = []
    operator = getattr(module, name)
    tensor = torch.empty(0)
    buffers = prepare_hypotheses.HypothesisBlocks(tensor, tensor, tensor)
    operator(*(buffers if parameter == "out" else tensor for parameter in inspect.signature(operator).parameters))
    on_a_cpu = "launch" if name in ON_THE_KERNEL_PATH else "naive"
    assert ran == [{"auto": on_a_cpu, "triton": "launch", "torch": "naive"}[form]]


def test_no_other_form_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, "cuda")
    with pytest.raises(ValueError, match=f"{SETTING}=cuda is not one of 'auto', 'triton' and 'torch'"):
        wanted_form()
