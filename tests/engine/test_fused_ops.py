"""vLLM's own kernels stand in for what it would have compiled, and only meanwhile. GPUs: tests/rehearsal."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.ir.op import IrOp
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_orthrus.engine.fused_ops import fused, unfused_ops

ROPES = {
    "default": {"rope_type": "default"},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    with set_current_vllm_config(VllmConfig()):
        yield request.param


def close(mine: list[torch.Tensor], native: list[torch.Tensor], dtype: torch.dtype) -> None:
    limit = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(mine, native, rtol=limit, atol=limit)


@pytest.mark.parametrize("width", [64, 96, 50])
def test_norms_on_a_cpu(width: int, dtype: torch.dtype) -> None:
    """50: the platform's kernel would leave out a remainder."""
    torch.manual_seed(0)
    norm = RMSNorm(width, eps=1e-5, dtype=dtype)
    norm.weight.data.normal_()
    x, residual = torch.randn(7, 2 * width).to(dtype)[:, ::2], torch.randn(7, width).to(dtype)
    native = [norm.forward_native(x), *norm.forward_native(x.clone(), residual.clone())]
    ops = unfused_ops(nn.ModuleList([norm]))
    assert len(ops) == (0 if width == 50 else 1)
    with fused(ops):
        close([norm(x), *norm(x.contiguous(), residual.clone())], native, dtype)


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_embeddings_on_a_cpu(kind: str, dtype: torch.dtype) -> None:
    rotary = get_rope(32, 64, rope_parameters={"rope_theta": 10000.0, **ROPES[kind]}, dtype=dtype)
    positions, qkv = torch.tensor([0, 5, 63, 2]), torch.randn(4, 256).to(dtype)
    native = list(rotary.forward_native(positions, *(part.clone() for part in qkv.split([128, 128], dim=1))))
    ops = unfused_ops(nn.ModuleList([rotary]))
    assert ops, "a family of which nothing is known runs in its PyTorch form, and none of these is one"
    with fused(ops):
        close(list(rotary(positions, *qkv.clone().split([128, 128], dim=1))), native, dtype)


def test_only_meanwhile(dtype: torch.dtype) -> None:
    """And nothing that vLLM compiles by itself: its guards would be asked in every layer."""
    activation = SiluAndMul()
    taken, providers = activation.forward, {name: op.get_priority() for name, op in IrOp.registry.items()}
    x = torch.randn(2, 8).to(dtype)
    native = activation.forward_native(x)
    with pytest.raises(RuntimeError, match="planted"), fused(unfused_ops(nn.ModuleList([activation]))):
        assert {name: op.get_priority() for name, op in IrOp.registry.items()} == providers
        assert activation.forward == activation.forward_native
        assert torch.equal(activation(x), native)
        raise RuntimeError("planted")
    assert activation.forward == taken
