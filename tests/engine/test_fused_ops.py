"""vLLM's own kernels stand in for what it would have compiled; on a CPU nothing does. GPUs: tests/rehearsal."""

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.ir.op import IrOp
from vllm.model_executor.layers.activation import SiluAndMul

from vllm_orthrus.engine.fused_ops import fused, unfused_ops


def test_nothing_on_a_cpu() -> None:
    with set_current_vllm_config(VllmConfig()):
        activation = SiluAndMul()
    taken, providers = activation.forward, {name: op.get_priority() for name, op in IrOp.registry.items()}
    with fused(unfused_ops(nn.ModuleList([activation]))):
        assert activation.forward == taken
        assert {name: op.get_priority() for name, op in IrOp.registry.items()} == providers
        assert activation(torch.randn(2, 8)) is not None
