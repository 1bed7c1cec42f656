"""vLLM's own kernels stand in for what it would have compiled, and only meanwhile."""

from typing import Any

from tests.rehearsal.machines import Ask


def implementations() -> dict[str, Any]:
    """What implements vLLM's operators before, while and after our passes run, and whether the results are the same."""
    import torch
    from torch import nn
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.ir.op import IrOp
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from vllm_orthrus.engine.fused_ops import fused, unfused_ops

    def providers() -> dict[str, list[str]]:
        return {name: op.get_priority() for name, op in IrOp.registry.items()}

    config = VllmConfig()
    config.kernel_config.ir_op_priority.set_default()
    with set_current_vllm_config(config):
        activation, norm = SiluAndMul(), RMSNorm(64, dtype=torch.float32)
        rotary = get_rope(32, 64, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}, dtype=torch.float32)
        model = nn.ModuleList([nn.ModuleDict({"act_fn": activation, "rotary": rotary, "norm": norm}), rotary])
        ops = unfused_ops(model)
        assert list(ops) == [activation, rotary]
        x, positions = torch.randn(2, 64), torch.arange(2)
        taken = [op.forward for op in ops]
        before = providers()
        plain = [norm(x), *norm(x.clone(), x.clone()), activation.forward_native(x)]
        plain += rotary.forward_native(positions, x.clone(), x.clone())
        with fused(ops):
            meanwhile = providers()
            assert [op.forward for op in ops] == [op.forward_cuda for op in ops]
            by_hand = [norm(x), *norm(x.clone(), x.clone()), activation(x), *rotary(positions, x.clone(), x.clone())]
        assert [op.forward for op in ops] == taken
        torch.testing.assert_close(by_hand, plain)
    return {"before": before, "meanwhile": meanwhile, "after": providers()}


def test_only_while_our_passes_run(ask: Ask) -> None:
    found = ask("H200", implementations)
    norms = {norm: ["vllm_c", "native"] for norm in ("rms_norm", "fused_add_rms_norm")}
    assert found["meanwhile"] == found["before"] | norms != found["before"]
    assert found["after"] == found["before"]


def naming_all() -> str:
    """A provider that not every operator has, named for all of them."""
    import torch
    from vllm.config.kernel import IrOpPriorityConfig
    from vllm.platforms import current_platform

    from vllm_orthrus.engine.fused_ops import BY_HAND

    assert torch.cuda.is_available()
    current_platform.import_ir_kernels()
    try:
        with IrOpPriorityConfig.with_default([BY_HAND, "native"]).set_priority():
            return "taken"
    except AssertionError as error:  # vLLM's own check
        return str(error)


def test_the_operators_are_those_of_a_gpu(ask: Ask) -> None:
    """A planted fault, which once ended every engine: that machine must not let it pass."""
    assert "must be registered" in ask("H200", naming_all)
