"""Arrays as the loops take them: where they are, and which bits are read of them."""

from collections.abc import Sequence
from ctypes import addressof, c_char
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_sparse.kernels.host.simd import LANES

Array = npt.NDArray[Any]
Selected = tuple[Array, Array, int]

# added, it leaves every residual as it is, -0.0 included; by the bytes of a float
NOTHING = {4: np.full(LANES, -0.0, np.float32), 8: np.full(LANES, -0.0)}
# what addresses point to, for the compiler
INDICES = np.empty(0, np.int32)
BYTES = np.empty(0, np.uint8)
_NO_OUT = {char: np.empty(0, char) for char in "hHfd"}


def address(array: Any) -> int:
    """Of its first element."""
    try:  # a quarter of the time; not of bfloat16, gaps, or what is read-only
        return addressof(c_char.from_buffer(array))
    except (TypeError, ValueError):
        return int(array.__array_interface__["data"][0])


def zeros_like(gradient: Array) -> Array:
    """A residual for this gradient: (n,) zeros, float32, or float64 for float64."""
    wide = gradient.dtype == np.float64
    return np.zeros(gradient.size, np.float64 if wide else np.float32)


class _Unlocked:
    """A read-only array, seen as if it could be written: numpy keeps it alive."""

    def __init__(self, array: Array) -> None:
        self.array = array
        seen = array.__array_interface__
        self.__array_interface__ = {**seen, "data": (seen["data"][0], False)}


def readable(array: Array) -> Array:
    """What a kernel only reads: nothing is compiled anew for read-only arrays."""
    return array if array.flags.writeable else np.asarray(_Unlocked(array))


def bit_patterns(array: Array) -> Array:
    """16-bit floats as their bit patterns, anything wider as it is."""
    if array.dtype.itemsize > 2:
        return array
    return array.view(np.int16 if array.dtype == np.float16 else np.uint16)


def lane_view(gradient: Array) -> Array:
    """The gradient as the lanes read it."""
    return readable(bit_patterns(gradient))


def cleared_view(out: Array | None, lanes: Array) -> Array:
    """What is to be cleared as its bit patterns; an empty array for nothing."""
    return _NO_OUT[lanes.dtype.char] if out is None else bit_patterns(out)


def joined(found: Sequence[Selected]) -> Selected:
    """What the threads selected, each from its part, in the order of the parts."""
    if len(found) == 1:
        return found[0]
    indices, values, nonfinite = zip(*found, strict=True)
    return np.concatenate(indices), np.concatenate(values), sum(nonfinite)
