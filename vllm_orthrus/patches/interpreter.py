"""What Triton's interpreter lacks to run vLLM's kernels and ours: gaps filled, and three wastes of time removed."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any


def complete() -> None:
    """Fill the gaps. Harmless to repeat."""
    global _completed
    if not _completed:
        _accept_integer_masks()
        _implement_library_functions()
        _compute_in_bfloat16()
        _leave_overflow_unchecked()
        _patch_language_once()
        _pass_tensors_as_they_are()
        _completed = True


_completed = False


def convert_loaded_functions() -> None:
    """Turn the functions Triton has already compiled lazily into interpreted ones.

    Triton chooses when a function is decorated, and PyTorch has imported it by
    now, so Triton's own library (``tl.sum``, ``tl.cdiv``) chose the compiler.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    interpreted: dict[int, Any] = {}  # a function imported into several modules must stay one object
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "triton":
            continue
        for attribute, value in list(vars(module).items()):
            if type(value) is JITFunction:
                replacement = interpreted.setdefault(id(value), InterpretedFunction(value.fn))
                setattr(module, attribute, replacement)


def _accept_integer_masks() -> None:
    """Let the interpreter load and store under a mask that NumPy made an integer.

    vLLM's Gumbel sampler stores under ``mask & scalar``; compiled Triton keeps
    that a boolean, while NumPy promotes it to an integer, which the interpreter's
    native load and store reject ("mask has unsupported dtype").
    """
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    load = InterpreterBuilder.create_masked_load
    store = InterpreterBuilder.create_masked_store

    def as_bool(mask: Any) -> Any:
        if mask.data.dtype == np.bool_:
            return mask
        return TensorHandle(mask.data.astype(np.bool_), mask.dtype)

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **kw: Any) -> Any:
        return load(self, ptrs, as_bool(mask), *rest, **kw)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, ptrs, value, as_bool(mask), *rest)

    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store


def _implement_library_functions() -> None:
    """Give the interpreter the device library functions that vLLM's samplers call.

    In Triton they are stubs that a compiler backend fills in; interpreted, they return None.
    """
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import TensorHandle

    def elementwise(function: Callable[[Any], Any], result: Any = None) -> Callable[[Any], Any]:
        def apply(x: Any) -> Any:
            dtype = result or x.dtype
            with np.errstate(all="ignore"):  # as on a device: infinities and NaNs are values
                data = function(x.handle.data)
            shape = list(x.type.shape) if x.type.is_block() else None
            return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, shape) if shape else dtype)

        return apply

    libdevice.log1p = elementwise(np.log1p)
    libdevice.isnan = elementwise(np.isnan, tl.int1)


def _compute_in_bfloat16() -> None:
    """Compare, combine and round bfloat16 values as numbers.

    The interpreter keeps them as the integers of their bits, and compares and adds those: vLLM's rank of a most
    probable token whose logit is negative came out as the last. Made of a single, a value was cut off, not rounded.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    binary, unary, cast = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op, InterpreterBuilder.cast_impl

    def widened(bits: Any) -> Any:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def rounded(values: Any) -> Any:
        """To the nearest, and to the even one of two."""
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(np.shape(values))
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[[Any, Any], Any]) -> Any:
        if lhs.dtype.scalar != tl.bfloat16:
            return binary(self, lhs, rhs, op)
        with np.errstate(all="ignore"):
            result = op(widened(lhs.data), widened(rhs.data))
        return TensorHandle(result if result.dtype == np.bool_ else rounded(result), tl.bfloat16)

    def unary_op(self: Any, arg: Any, op: Callable[[Any], Any]) -> Any:
        if arg.dtype.scalar != tl.bfloat16:
            return unary(self, arg, op)
        return TensorHandle(rounded(op(widened(arg.data))), tl.bfloat16)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = (src.dtype.scalar, dst_type.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(widened(src.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(rounded(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.unary_op = unary_op
    InterpreterBuilder.cast_impl = cast_impl


def _leave_overflow_unchecked() -> None:
    """As compiled kernels do unless asked otherwise: the check makes six operations of each on 32-bit integers."""
    from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

    interpreter_builder.options = replace(InterpreterOptions(), sanitize_overflow=False)


def _patch_language_once() -> None:
    """Prepare `triton.language` once per launch.

    The interpreter swaps the language's functions for its own while a kernel runs, and does so again for every device
    function the kernel calls, which takes a third of the time of a kernel made of small functions.
    """
    from triton.runtime import interpreter

    patch, new_scope = interpreter._patch_lang, interpreter._LangPatchScope
    language = interpreter.tl
    patched: set[int] = set()  # the language modules that the running launch has prepared

    def patch_lang(fn: Any) -> Any:
        wanted = {id(value) for value in fn.__globals__.values() if value is language or value is language.core}
        if wanted and wanted <= patched:
            return new_scope()
        scope, before = patch(fn), set(patched)
        restore = scope.restore
        patched.update(wanted)

        def restore_and_forget() -> None:
            restore()
            patched.intersection_update(before)

        scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch_lang


def _pass_tensors_as_they_are() -> None:
    """Leave the arguments where they are.

    The interpreter copies whole storages to the host and back around every launch. Where the device is the host, that
    is each argument copied onto itself, a whole cache among them.
    """
    from triton.runtime.interpreter import GridExecutor

    GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    GridExecutor._restore_args_dev = lambda self, *arguments: None
