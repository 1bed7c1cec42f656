"""How many launches a GPU would be given, counted on a CPU. The rule:

an operator of PyTorch or vLLM that computes, moves or fills something         1, even where CUDA needs more for it
views, metadata, memory that is only reserved, results without elements        0
a Triton kernel, ours or vLLM's                                                1
a norm, an activation or a rotary embedding of vLLM                            1, the hand-written kernel of a GPU
vLLM's attention                                                               1, and 1 for the write to its cache
values that the host hands over, or reads                                      1, the copy
what the host computes of numbers of its own                                   0
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

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

from vllm_orthrus.engine import speculator
from vllm_orthrus.engine.onepass import drafting, verification

BY_HAND = (RMSNorm, SiluAndMul, RotaryEmbedding)
RESERVES = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
SAME_MEMORY = torch.ops.aten._unsafe_view.default


class Part(NamedTuple):
    """One call of a part of the step."""

    launches: list[str]
    layers: list[int]  # launches of each, from the one behind its first norm to its successor's


class LaunchCount(TorchDispatchMode):
    """Everything that runs inside, in order. What runs within something that was counted is a part of it."""

    def __init__(self, *models: Any) -> None:
        """models: whose layers are told apart."""
        super().__init__()
        self.launches: list[str] = []
        self.within = 0
        self.bounds = [layer.input_layernorm for model in models for layer in model.model.layers]
        self.bounds += [model.model.norm for model in models]
        self.of_host: list[torch.Tensor] = []  # known to be, here where everything is
        self.passed: list[int] = []  # at which of the launches a layer began
        self.parts: dict[str, list[Part]] = {}

    def note(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        """Keep apart what each call of this method launches."""
        call, parts = getattr(owner, name), self.parts.setdefault(name, [])

        def noted(*args: Any, **kwargs: Any) -> Any:
            before, passed = len(self.launches), len(self.passed)
            result = call(*args, **kwargs)
            at = self.passed[passed:]
            parts.append(Part(self.launches[before:], [end - start for start, end in pairwise(at)]))
            return result

        patch.setattr(owner, name, noted)

    def leave_out(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        """Count nothing of what this method does: it is the host's work, or not of the step that is asked about."""
        call = getattr(owner, name)

        def uncounted(*args: Any, **kwargs: Any) -> Any:
            with self._as("", 0):
                return call(*args, **kwargs)

        patch.setattr(owner, name, uncounted)

    @contextmanager
    def _as(self, name: str, times: int) -> Iterator[None]:
        self._begin(name, times)
        try:
            yield
        finally:
            self.within -= 1

    def _begin(self, name: str, times: int) -> None:
        if not self.within:
            self.launches += [name] * times
        self.within += 1

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.within:
            return operator(*args, **kwargs)
        if operator.namespace == "aten":
            with self:  # inference mode hands over compounds whole: a reshape is a view or a copy
                if (parts := operator.decompose(*args, **kwargs)) is not NotImplemented:
                    return parts
        out = operator(*args, **kwargs)
        if operator in RESERVES or operator == SAME_MEMORY or operator.is_view or operator.namespace == "prim":
            return out
        given, made = (
            [leaf for leaf in tree_leaves(some) if isinstance(leaf, torch.Tensor)] for some in ((args, kwargs), out)
        )
        if given and all(map(self._is_of_host, given)):
            self.of_host += made
        elif not made or any(tensor.numel() for tensor in made):
            self.launches.append(str(operator))
        return out

    def _is_of_host(self, tensor: torch.Tensor) -> bool:
        memory = tensor.untyped_storage().data_ptr()
        return any(memory == mine.untyped_storage().data_ptr() for mine in self.of_host)

    @contextmanager
    def counting(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        run, hand_over = InterpretedFunction.run, speculator.async_tensor_h2d
        attend = verification.attend_to_cache

        def counted(function: Any, *given: Any, **named: Any) -> None:
            with self._as(function.fn.__name__, 1):
                run(function, *given, **named)

        def handed_over(*given: Any, **named: Any) -> Any:
            with self._as("copy from the host", 1):
                return hand_over(*given, **named)

        def attended(*given: Any) -> Any:
            with self._as("attention", 1):
                return attend(*given)

        def begin(module: torch.nn.Module, inputs: Any) -> None:
            if times := _by_hand(module):
                self._begin(type(module).__name__, times)
            if any(module is bound for bound in self.bounds):
                self.passed.append(len(self.launches))

        def end(module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
            self.within -= _by_hand(module) > 0

        hooks = [register_module_forward_pre_hook(begin), register_module_forward_hook(end)]
        try:
            with patch.context() as inner, self:
                inner.setattr(InterpretedFunction, "run", counted)
                inner.setattr(verification, "attend_to_cache", attended)
                for caller in (speculator, drafting):
                    inner.setattr(caller, "async_tensor_h2d", handed_over)
                yield
        finally:
            for hook in hooks:
                hook.remove()


def _by_hand(module: torch.nn.Module) -> int:
    if isinstance(module, BY_HAND):
        return 1
    # Where our kernel answers in its place, that is what runs.
    return 2 if isinstance(module, Attention) and "forward" not in vars(module) else 0
