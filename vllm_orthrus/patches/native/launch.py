"""Where a kernel is launched that has a native version here, that version runs instead of Triton's interpreter.

A native version is written for what a kernel does, so it is bound to the kernel's code: its own and that of every
function and constant it uses, without comments and layout. A kernel whose code is another, in a newer vLLM say, is
interpreted as if there were no native version.
"""

import ast
import hashlib
import importlib
import inspect
import logging
import textwrap
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import numpy as np

Native = Callable[..., Any]
"""Takes the launch grid, and a kernel's arguments by name. Returns DECLINED to leave this launch to the interpreter."""

Grid = tuple[int, ...]
DECLINED = object()

logger = logging.getLogger("vllm.orthrus")


_functions: dict[tuple[str, str], Native] = {}  # by "module:kernel" and the fingerprint of its code


def native(kernel: str, *fingerprints: str, **fixed: Any) -> Callable[[Native], Native]:
    """Register a native version of this kernel, as its code is in one vLLM or another.

    fixed: arguments of ours that tell apart what those kernels do, where their own arguments don't.
    """

    def register(function: Native) -> Native:
        for fingerprint in fingerprints:
            _functions[kernel, fingerprint] = partial(function, **fixed) if fixed else function
        return function

    return register


def natively(run: Callable[..., Any]) -> Callable[..., Any]:
    """`InterpretedFunction.run`, but for kernels that have a native version."""
    found: dict[Any, Native | None] = {}  # by the kernel's Python function

    @wraps(run)
    def run_natively(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        try:
            function = found[self.fn]
        except KeyError:
            function = found[self.fn] = find(self)
        if function is not None and not warmup and not self.pre_run_hooks:
            by_name = dict(zip(self.arg_names, arguments, strict=False)) | named
            size = grid(by_name) if callable(grid) else grid
            with np.errstate(all="ignore"):  # as on a device: infinities and NaNs are values
                if 0 in size or function(size, **by_name) is not DECLINED:
                    return None
        return run(self, *arguments, grid=grid, warmup=warmup, **named)

    return run_natively


def find(kernel: Any) -> Native | None:
    """The native version of an interpreted kernel's code, if there is one."""
    name = name_of(kernel)
    if name not in names():
        return None
    fingerprint = fingerprint_of(kernel)
    function = _functions.get((name, fingerprint))
    if function is None:
        logger.debug(
            "Triton's interpreter runs %s: no native version does what this code (%s) does.", name, fingerprint
        )
    return function


def names() -> set[str]:
    """The kernels that have native versions."""
    return {name for name, _ in _functions}


def recognised() -> dict[str, bool]:
    """Of each kernel that has native versions, whether one of them is for the running vLLM."""
    found = {}
    for name in sorted(names()):
        module, _, kernel = name.partition(":")
        interpreted = getattr(importlib.import_module(module), kernel, None)
        found[name] = interpreted is not None and find(interpreted) is not None
    return found


def name_of(kernel: Any) -> str:
    return f"{kernel.fn.__module__}:{kernel.fn.__qualname__}"


def fingerprint_of(kernel: Any) -> str:
    """Says whether two kernels do the same: the code of this one and all that it uses, Triton's library aside."""
    parts: dict[str, str] = {}
    _collect(kernel.fn, parts)
    return hashlib.sha256("\n".join(parts[name] for name in sorted(parts)).encode()).hexdigest()[:12]


def _collect(function: Any, parts: dict[str, str]) -> None:
    from triton.language import constexpr
    from triton.runtime.interpreter import InterpretedFunction

    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    code = tree.body[0]
    assert isinstance(code, ast.FunctionDef)
    code.decorator_list = []
    if ast.get_docstring(code) is not None:
        del code.body[0]
    parts[code.name] = ast.unparse(tree)
    for name in sorted({node.id for node in ast.walk(code) if isinstance(node, ast.Name)}):
        used = function.__globals__.get(name)
        if isinstance(used, constexpr):
            parts[name] = f"{name} = {used.value!r}"
        elif isinstance(used, InterpretedFunction) and name not in parts and _is_foreign(used.fn):
            _collect(used.fn, parts)


def _is_foreign(function: Any) -> bool:
    return not function.__module__.startswith("triton.")
