"""What is launched, as Triton tells launches apart that need different code."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from vllm_orthrus.patches import install


class Launch(NamedTuple):
    kernel: str
    constants: tuple[tuple[str, Any], ...]
    arguments: tuple[tuple[str, str], ...]  # type, and what the compiler may assume of the value


class Recorder:
    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def take(self) -> set[Launch]:
        """Those since the last time."""
        taken, self.launches = set(self.launches), []
        return taken

    @contextmanager
    def recording(self, patch: pytest.MonkeyPatch) -> Iterator["Recorder"]:
        install()  # first: native versions replace the same function, for good
        run = InterpretedFunction.run

        def recorded(function: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
            if function.fn.__module__.startswith("vllm_orthrus.kernels"):
                self.launches.append(describe(function, given, named))
            run(function, *given, grid=grid, warmup=warmup, **named)

        with patch.context() as inner:
            inner.setattr(InterpretedFunction, "run", recorded)
            yield self


def describe(function: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    values = dict(zip(function.arg_names, given, strict=False)) | named
    annotations = function.fn.__annotations__
    unspecialized = function.kwargs.get("do_not_specialize") or ()
    constants, arguments = [], []
    for name, value in values.items():
        if name not in function.arg_names or "constexpr" in str(annotations.get(name)) or value is None:
            constants.append((name, value))
        else:
            arguments.append((name, assumed(value, name not in unspecialized)))
    return Launch(function.fn.__name__, tuple(constants), tuple(arguments))


def assumed(value: Any, specialized: bool) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(assumed(part, specialized) for part in value)})"
    if value is None:
        return "None"
    if isinstance(value, torch.Tensor):
        return f"*{value.dtype}" + (" by 16" if value.data_ptr() % 16 == 0 else "")
    if isinstance(value, float):
        return "float"
    size = "i32" if -(2**31) <= value < 2**31 else "i64"
    if specialized and value == 1:
        return "1"
    return size + (" by 16" if specialized and value % 16 == 0 else "")
