"""Which tensors share memory, and gradients that get memory of their own.

A result is written where its gradient was. That is right only where nothing else is
kept there: no other gradient, no parameter, no second element of the same gradient.
Views of one buffer that do not overlap are no sharing and stay where they are.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

Tensor = torch.Tensor

_EFFORT = 100_000  # candidates that numpy tries before it gives up


def give_own_memory(parameters: Sequence[Tensor]) -> None:
    """Replace every gradient that can not hold its own result by a copy of it.

    Args:
        parameters: each has a grad, or None.
    """
    held = [p for p in parameters if p.layout is torch.strided]
    with_gradient = [
        p for p in parameters if (g := p.grad) is not None and g.layout is torch.strided
    ]
    for parameter in with_gradient:
        if overlaps_itself(_gradient(parameter)):
            _copy_gradient(parameter)
    tensors = held + [_gradient(p) for p in with_gradient]
    for group in _neighbors(tensors):
        kept: list[Any] = []
        for place in group:  # parameters first: they stay where they are
            area = _area(tensors[place])
            if place < len(held):
                kept.append(area)
            elif any(_share(area, other) for other in kept):
                _copy_gradient(with_gradient[place - len(held)])
            else:
                kept.append(area)


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may be the same memory, as after expand()."""
    if tensor.is_contiguous():
        return False
    reach = 0  # of the dimensions so far, in elements
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def is_gapless(tensor: Tensor) -> bool:
    """Whether its elements fill a piece of memory, each once, in any order."""
    return _extent(tensor) == tensor.nbytes and not overlaps_itself(tensor)


def shared_with(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Per place of a tensor that shares memory with earlier ones, the first of them.

    Args:
        tensors: strided, on any device.
    """
    held = list(tensors)
    shared: dict[int, int] = {}
    for group in _neighbors(held):
        areas = {place: _area(held[place]) for place in group}
        for place in group:
            earlier = (other for other in group if other < place)
            for other in earlier:
                if _share(areas[place], areas[other]):
                    shared[place] = other
                    break
    return shared


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _copy_gradient(parameter: Tensor) -> None:
    parameter.grad = _gradient(parameter).detach().clone()


def _neighbors(tensors: list[Tensor]) -> list[list[int]]:
    """Places of tensors, two and more, whose ranges of addresses overlap; ascending."""
    starts = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
    ends = starts + np.array([_extent(tensor) for tensor in tensors], np.int64)
    order = np.argsort(starts, kind="stable")
    if bool((ends[order[:-1]] <= starts[order[1:]]).all()):
        return []  # asked in every step, and nearly always so
    groups: list[list[int]] = [[]]
    reach = 0
    for place in order.tolist():
        if starts[place] >= reach:
            groups.append([])
        if ends[place] > starts[place]:
            groups[-1].append(place)
        reach = max(reach, ends[place])
    return [sorted(group) for group in groups if len(group) > 1]


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the last element."""
    if tensor.is_contiguous():
        return tensor.nbytes
    if not tensor.numel():
        return 0
    steps = sum(
        stride * (size - 1)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
    return (steps + 1) * tensor.element_size()


class _Area:
    """Addresses of a tensor's elements, on any device; nothing is read there."""

    def __init__(self, tensor: Tensor) -> None:
        itemsize = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), True),
            "typestr": f"|V{itemsize}",
            "shape": tuple(tensor.shape),
            "strides": tuple(itemsize * stride for stride in tensor.stride()),
        }


def _area(tensor: Tensor) -> Any:
    return np.asarray(_Area(tensor))


def _share(one: Any, other: Any) -> bool:
    try:
        return bool(np.shares_memory(one, other, max_work=_EFFORT))
    except RuntimeError:  # too hard to tell
        return True
