"""Tensors "on cuda" without one: shapes, dtypes and devices of whatever vLLM and the head run, and no values.

PyTorch's fake tensors, with host tensors left real, since vLLM plans its batches in NumPy. Three kinds of fault show:
tensors of two devices or dtypes in one operation, a host that waits for a value, and a kernel launched on host memory.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm)
RANDOM = (aten.uniform_.default, aten.normal_.default, aten.exponential_.default)
# Of vLLM's CUDA library: they write to what they are given.
IN_PLACE = ("rms_norm", "fused_add_rms_norm", "silu_and_mul", "rotary_embedding")


class HostWaits(RuntimeError):
    pass


class FakeCuda(FakeTensorMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        dtype = next((leaf for leaf in leaves if isinstance(leaf, torch.dtype)), None)
        fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        target = next((leaf.type for leaf in leaves if isinstance(leaf, torch.device)), None)
        kwargs.pop("pin_memory", None)
        kwargs.pop("generator", None)
        if func is aten.is_pinned.default:
            return True
        if func is aten._pin_memory.default or func in RANDOM:
            return args[0]
        if func.name() == "_C::get_cuda_view_from_cpu_tensor":
            with self:
                return torch.empty(args[0].shape, dtype=args[0].dtype, device="cuda")
        if not fake and target != "cuda":
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            raise HostWaits("a value of a tensor on cuda is read on the host")
        if fake and target == "cpu":
            return torch.zeros(args[0].shape, dtype=dtype or args[0].dtype)
        if tensors and not fake:  # from the host
            with self:
                return torch.empty(args[0].shape, dtype=dtype or args[0].dtype, device="cuda")
        if func.overloadpacket in PRODUCTS and len({tensor.dtype for tensor in tensors}) > 1:
            raise TypeError(f"{func} of {[tensor.dtype for tensor in tensors]}")
        return super().__torch_dispatch__(func, types, args, kwargs)


class Python(TorchFunctionMode):
    """What PyTorch's Python layer refuses for a device that it was not built with, before a dispatcher is asked."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor):
            kwargs.pop("pin_memory", None)
            device = kwargs.pop("device", None) or "cpu"
            host = func(*args, **kwargs, device="cpu")
            return host if "cpu" in str(device) else torch.empty(host.shape, dtype=host.dtype, device=device)
        if args and isinstance(args[0], FakeTensor):
            if func is torch.Tensor.__getitem__:
                return _pick(*args)
            if func is torch.Tensor.__setitem__:
                return _put(*args)
            if func is torch.Tensor.copy_:
                return _copy(*args[:2])
            if func is torch.Tensor.new_tensor:
                return args[0].new_empty(torch.tensor(args[1], device="cpu").shape)
            if func is torch.Tensor.__invert__:
                return torch.bitwise_not(args[0])
        return func(*args, **kwargs)


def _pick(x: torch.Tensor, index: Any) -> torch.Tensor:
    view, tensors = _view(x, index)
    return aten.index.Tensor(view, tensors) if any(tensor is not None for tensor in tensors) else view


def _put(x: torch.Tensor, index: Any, value: Any) -> None:
    view, tensors = _view(x, index)
    if any(tensor is not None for tensor in tensors):
        if not isinstance(value, torch.Tensor):
            raise HostWaits(f"the number {value} is copied to cuda, and waited for, to be put where a tensor says")
        aten.index_put(view, tensors, value)
    elif isinstance(value, torch.Tensor):
        _copy(view, value)
    else:
        view.fill_(value)


def _view(x: torch.Tensor, index: Any) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """What numbers, slices, None and ... pick, and the tensors that pick further, by dimension."""
    index = list(index) if isinstance(index, tuple) else [index]
    picked = sum(part is not None and part is not Ellipsis for part in index)
    if not any(part is Ellipsis for part in index):
        index.append(Ellipsis)
    view, tensors = x, list[torch.Tensor | None]()
    for part in index:
        if part is Ellipsis:
            tensors += [None] * (x.dim() - picked)
        elif part is None:
            view = view.unsqueeze(len(tensors))
            tensors.append(None)
        elif isinstance(part, slice):
            view = aten.slice.Tensor(view, len(tensors), part.start, part.stop, part.step or 1)
            tensors.append(None)
        elif isinstance(part, torch.Tensor):
            if not part.is_cuda or part.dtype == torch.bool:
                raise HostWaits(f"a tensor on cuda is indexed by {part.dtype} on {part.device}")
            tensors.append(part)
        else:
            view = view.select(len(tensors), int(part))
    return view, tensors


def _copy(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if torch.broadcast_shapes(x.shape, y.shape) != x.shape:
        raise ValueError(f"{tuple(y.shape)} does not fit into {tuple(x.shape)}")
    return x


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing runs on it."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None

    __enter__ = __exit__ = lambda self, *_: None


class _Generator:
    def __new__(cls, device: Any = None) -> Any:
        return torch._C.Generator()


@contextmanager
def fake_cuda() -> Iterator[list[str]]:
    """Within it "cuda" can be allocated on. Gives the names of the Triton kernels that were launched."""
    from triton.runtime.jit import JITFunction

    launched: list[str] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        tensors = [value for value in (*args, *named.values()) if isinstance(value, torch.Tensor)]
        if not all(tensor.is_cuda for tensor in tensors):
            places = [f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors]
            raise RuntimeError(f"{kernel.__name__} is launched with {', '.join(places)}")
        launched.append(kernel.__name__)

    _define_operators()
    nothing, nowhere = lambda *_, **__: None, lambda *_, **__: 0
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")  # FlashInfer is not installed where there is no GPU
        patch.setattr(JITFunction, "run", run)
        patch.setattr(torch, "Generator", _Generator)
        for name in ("Stream", "Event", "current_stream"):
            patch.setattr(torch.cuda, name, _Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        for module in (torch.cuda, torch.accelerator):
            for name in ("empty_cache", "synchronize", "reset_peak_memory_stats"):
                patch.setattr(module, name, nothing)
            patch.setattr(module, "max_memory_allocated", nowhere)
        stack.enter_context(FakeCuda(allow_non_fake_inputs=True))
        stack.enter_context(Python())
        stack.enter_context(torch.inference_mode())
        yield launched


def _define_operators() -> None:
    if hasattr(torch.ops._C, "get_cuda_view_from_cpu_tensor"):
        return
    torch.library.define("_C::get_cuda_view_from_cpu_tensor", "(Tensor host) -> Tensor")
    torch.library.impl("_C::get_cuda_view_from_cpu_tensor", "CompositeExplicitAutograd", lambda host: host)
    for name in IN_PLACE:
        torch.library.register_fake(f"_C::{name}", lambda *args: None)
