"""What kernels assume about the strides of their tensors."""

from torch import Tensor


def require_packed(**tensors: Tensor | None) -> None:
    """Kernels take the last dimension's stride to be 1."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dim() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(_problem(name, tensor, "contiguous in its last dimension"))


def require_contiguous(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(_problem(name, tensor, "contiguous"))


def _problem(name: str, tensor: Tensor, wanted: str) -> str:
    shape, strides = tuple(tensor.shape), tensor.stride()
    return f"{name} of shape {shape} and strides {strides} must be {wanted}: pass a contiguous copy."
