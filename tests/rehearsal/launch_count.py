"""How many launches a GPU would be given, counted on a CPU. The rule:

    an operator of PyTorch or vLLM that computes or moves something                1, even where CUDA needs two for it
    views, metadata, memory that is only reserved, results without elements        0
    a Triton kernel, ours or vLLM's                                                1
    a norm, an activation or a rotary embedding of vLLM                            1, the hand-written kernel of a GPU
    vLLM's attention                                                               2, the write to its cache included
    values that the host hands over                                                1, the copy
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

from vllm_orthrus import speculator

BY_HAND = (RMSNorm, SiluAndMul, RotaryEmbedding)
NOTHING_RUNS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
    torch.ops.aten.detach.default,
    torch.ops.aten._unsafe_view.default,
}


class LaunchCount(TorchDispatchMode):
    """Everything that runs inside, in order. What runs inside of something that was counted is a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.inside = 0

    def count(self, name: str, times: int = 1) -> None:
        if not self.inside:
            self.launches += [name] * times

    @contextmanager
    def as_one(self, name: str, times: int = 1) -> Iterator[None]:
        self.count(name, times)
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside or operator in NOTHING_RUNS or operator.is_view or operator.namespace == "prim":
            return operator(*args, **kwargs)
        with self:  # inference mode hands over compounds whole
            if (parts := operator.decompose(*args, **kwargs)) is not NotImplemented:
                return parts
        out = operator(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((out, args, kwargs)) if isinstance(leaf, torch.Tensor)]
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)] or tensors
        if any(tensor.numel() for tensor in written):
            self.count(str(operator))
        return out

    @contextmanager
    def counting(self, patch: pytest.MonkeyPatch) -> Iterator["LaunchCount"]:
        run, hand_over = InterpretedFunction.run, speculator.async_tensor_h2d

        def counted(function: Any, *given: Any, **named: Any) -> None:
            with self.as_one(function.fn.__name__):
                run(function, *given, **named)

        def counted_copy(*given: Any, **named: Any) -> torch.Tensor:
            with self.as_one("copy from the host"):
                return hand_over(*given, **named)  # type: ignore[no-any-return]

        def begin(module: torch.nn.Module, inputs: Any) -> None:
            if (launches := _by_hand(module)) is not None:
                self.count(type(module).__name__, launches)
                self.inside += 1

        def end(module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
            self.inside -= _by_hand(module) is not None

        hooks = [register_module_forward_pre_hook(begin), register_module_forward_hook(end)]
        try:
            with patch.context() as inner, self:
                inner.setattr(InterpretedFunction, "run", counted)
                inner.setattr(speculator, "async_tensor_h2d", counted_copy)
                yield self
        finally:
            for hook in hooks:
                hook.remove()


def _by_hand(module: torch.nn.Module) -> int | None:
    if isinstance(module, BY_HAND):
        return 1
    # Where our kernel answers in its place, that is what runs.
    return 2 if isinstance(module, Attention) and "forward" not in vars(module) else None


def each_call(count: LaunchCount, function: Callable[..., Any], calls: list[list[str]]) -> Callable[..., Any]:
    """The function, noting what each call of it launched."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        before = len(count.launches)
        result = function(*args, **kwargs)
        calls.append(count.launches[before:])
        return result

    return noted
