"""Memory for results that TensorFlow takes over, used again when it is done with it.

A fresh 100 MB array costs more in page faults than everything that is computed in it,
and TensorFlow keeps an array that a Python function returns for as long as it wants.
The number of references to it tells when that is over. It copies arrays that do not
begin where its own tensors would.
"""

import math
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_MOST = 3  # of one name: one in use, one still held, one more for a graph that overlaps
_ALONE = 3  # references: the list, the loop's variable, getrefcount's argument
_ALIGNMENT = 64  # bytes; at least EIGEN_MAX_ALIGN_BYTES of any TensorFlow


class Buffers:
    """Arrays by name."""

    def __init__(self) -> None:
        """Start with none."""
        self._arrays: dict[str, list[Array]] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array that nobody else looks at; its content is whatever it was."""
        arrays = self._arrays.setdefault(name, [])
        for array in arrays:
            alike = array.shape == shape and array.dtype == dtype
            if alike and sys.getrefcount(array) <= _ALONE:
                return array
        fresh = _aligned(shape, np.dtype(dtype))
        arrays.append(fresh)
        del arrays[:-_MOST]
        return fresh

    def forget(self, name: str) -> None:
        """Nobody will ask for this name again."""
        self._arrays.pop(name, None)


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    count = math.prod(shape) * dtype.itemsize
    memory = np.empty(count + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + count].view(dtype).reshape(shape)
