"""vLLM's own kernels stand in for what it would have compiled, and only meanwhile."""

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_orthrus.integration import fused_ops


def test_only_while_our_passes_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with set_current_vllm_config(VllmConfig()):
        activation = SiluAndMul()
        rotary = get_rope(32, 64, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}, dtype=torch.float32)
    model = nn.ModuleList([nn.ModuleDict({"act_fn": activation, "rotary": rotary}), nn.ModuleDict({"rotary": rotary})])
    ops = fused_ops.unfused_ops(model)
    assert ops == [activation, rotary]
    called = []
    for op in ops:
        monkeypatch.setattr(op, "forward_cuda", lambda *arguments, op=op: called.append(op))
    x = torch.randn(2, 8)
    with fused_ops.fused(ops):
        assert activation(x) is not None, "on a CPU there is nothing to take instead"

    class Priority:
        @staticmethod
        def with_default(wanted: list[str]) -> "Priority":
            assert wanted == ["vllm_c", "native"]
            return Priority()

        set_priority = monkeypatch.context

    monkeypatch.setattr(fused_ops, "IrOpPriorityConfig", Priority)
    monkeypatch.setattr(type(fused_ops.current_platform), "is_cuda", lambda self: True)
    with fused_ops.fused(ops):
        assert activation(x) is None
        assert rotary(torch.arange(2), x, x) is None
    assert called == ops
    assert activation(x) is not None, "they stayed"
