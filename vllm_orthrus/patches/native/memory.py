"""Kernels take pointers and strides. These are the arrays behind them, without a copy."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

_DTYPES = {
    torch.bool: np.dtype(np.bool_),
    torch.uint8: np.dtype(np.uint8),
    torch.int8: np.dtype(np.int8),
    torch.int16: np.dtype(np.int16),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
    torch.uint64: np.dtype(np.uint64),  # of addresses
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(np.uint16),  # NumPy has none; see `floats` and `store`
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}


class _Memory:
    def __init__(self, address: int, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "typestr": dtype.str,
            "shape": shape,
            "strides": strides,
            "version": 3,
        }


def _array(address: int, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    if address == 0:  # of a tensor without elements
        return np.empty((0,) * len(shape), dtype)
    return np.asarray(_Memory(address, dtype, shape, strides))


def flat(pointer: torch.Tensor) -> Array:
    """All elements from this pointer to the end of its storage."""
    size = pointer.element_size()
    count = pointer.untyped_storage().nbytes() // size - int(pointer.storage_offset())
    return _array(pointer.data_ptr(), _DTYPES[pointer.dtype], (count,), (size,))


def table(address: int, stride: int, count: int) -> NDArray[np.int32]:
    """[count, stride], the first rows of a table that only its address is known of."""
    return _array(address, np.dtype(np.int32), (count, stride), (4 * stride, 4))


def rows(pointer: torch.Tensor, stride: int, count: int, width: int) -> Array:
    """[count, width], with this many elements from one row to the next."""
    dtype = _DTYPES[pointer.dtype]
    return _array(pointer.data_ptr(), dtype, (count, width), (stride * dtype.itemsize, dtype.itemsize))


def floats(pointer: torch.Tensor, values: Array) -> NDArray[np.float32]:
    """Values read from this pointer in single precision, which holds every half and bfloat16 exactly."""
    if pointer.dtype is torch.bfloat16:
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)


def stored(pointer: torch.Tensor, values: NDArray[np.float32]) -> Array:
    """Values as this pointer holds them, rounded to the nearest."""
    if pointer.dtype is torch.bfloat16:
        return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()
    return values.astype(_DTYPES[pointer.dtype])
