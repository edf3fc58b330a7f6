"""Which arrays share memory: a result must not overwrite what is still to be read."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from hvd_sparse.core.contracts import Array
from hvd_sparse.kernels.host import address

_EFFORT = 100_000  # candidates that numpy tries before it gives up


Span = tuple[int, int]  # addresses that an array reaches over: [start, end), in bytes


def span(array: Array) -> Span:
    """Of an array on the host or a device, strided in any way."""
    on_host = isinstance(array, np.ndarray)
    start = address(array) if on_host else array.data_ptr()
    if array.flags.c_contiguous if on_host else array.is_contiguous():
        return start, start + array.nbytes
    if 0 in array.shape:
        return start, start
    end = start + array.itemsize
    for length, stride in zip(array.shape, _strides(array), strict=True):
        reach = (length - 1) * stride
        start, end = (start, end + reach) if reach > 0 else (start + reach, end)
    return start, end


def sharing(arrays: Mapping[str, Array]) -> list[tuple[str, str]]:
    """All pairs of names whose arrays have memory in common.

    Costs about as much as sorting the arrays where none do.
    """
    if apart([span(array) for array in arrays.values()]):
        return []
    spans = sorted((*span(array), name) for name, array in arrays.items())
    pairs, open_ones = [], list[tuple[int, str]]()
    for start, end, name in spans:
        open_ones = [other for other in open_ones if other[0] > start]
        pairs += [
            (earlier, name)
            for _, earlier in open_ones
            if share(arrays[earlier], arrays[name])
        ]
        open_ones.append((end, name))
    return pairs


def columns(rows: Sequence[tuple[int, ...]], count: int) -> Array:
    """(count, rows) int64: as np.array(rows).T, in a third of the time."""
    return np.fromiter(chain.from_iterable(rows), np.int64).reshape(-1, count).T


def apart(spans: Sequence[tuple[int, int]]) -> bool:
    """Whether no two of them overlap."""
    starts, ends = columns(spans, 2)
    order = np.argsort(starts, kind="stable")
    return bool((ends[order[:-1]] <= starts[order[1:]]).all())


def share(first: Array, second: Array) -> bool:
    """Whether two arrays have memory in common; views of one buffer may interleave.

    What is too hard to tell counts as common.
    """
    try:
        one, other = _addresses(first), _addresses(second)
        return np.shares_memory(one, other, max_work=_EFFORT)
    except np.exceptions.TooHardError:
        return True


def repeats(array: Array) -> bool:
    """Whether two elements of it are one in memory, as after a broadcast."""
    on_host = isinstance(array, np.ndarray)
    contiguous = array.flags.c_contiguous if on_host else array.is_contiguous()
    if contiguous or _is_nested(array):
        return False
    places = np.zeros((), np.int64)
    for length, stride in zip(array.shape, _strides(array), strict=True):
        places = np.add.outer(places, np.arange(length) * stride)
    return np.unique(places).size < places.size


def _is_nested(array: Array) -> bool:
    """Whether each dimension steps over all that is in those of smaller steps."""
    reach = 0
    steps = zip(map(abs, _strides(array)), array.shape, strict=True)
    for stride, length in sorted(steps):
        if length > 1:
            if stride <= reach:
                return False
            reach += stride * (length - 1)
    return True


def _strides(array: Array) -> tuple[int, ...]:
    """In bytes."""
    if isinstance(array, np.ndarray):
        return array.strides
    return tuple(stride * array.itemsize for stride in array.stride())


class _Addresses:
    """Those of a tensor's elements, on any device; nothing is read there."""

    def __init__(self, tensor: Array) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), True),
            "typestr": f"|V{tensor.itemsize}",
            "shape": tuple(tensor.shape),
            "strides": _strides(tensor),
        }


def _addresses(array: Array) -> Any:
    if isinstance(array, np.ndarray):
        return array
    return np.asarray(_Addresses(array))
