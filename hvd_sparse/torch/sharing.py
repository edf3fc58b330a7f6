"""Which tensors share memory, and gradients that get memory of their own.

A result is written where its gradient was. That is right only where nothing else is
kept there: no other gradient, no parameter, no second element of the same gradient.
Views of one buffer that do not overlap are no sharing and stay where they are.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from hvd_sparse.core.sharing import apart, columns, repeats, share, span

Tensor = torch.Tensor


def give_own_memory(
    parameters: Sequence[Tensor], beside: Sequence[Tensor] = ()
) -> None:
    """Replace every gradient that can not hold its own result by a copy of it.

    Args:
        parameters: each has a grad, or None.
        beside: other parameters, whose gradients are somebody else's and stay.
    """
    held = [p for p in (*parameters, *beside) if p.layout is torch.strided]
    held += [_gradient(p) for p in _with_gradient(beside)]
    with_gradient = _with_gradient(parameters)
    for parameter in with_gradient:
        if repeats(_gradient(parameter)):
            _copy_gradient(parameter)
    tensors = held + [_gradient(p) for p in with_gradient]
    for group in _neighbors(tensors):
        kept: list[Tensor] = []
        for place in group:  # what stays where it is comes first
            tensor = tensors[place]
            if place >= len(held) and any(share(tensor, other) for other in kept):
                _copy_gradient(with_gradient[place - len(held)])
            else:
                kept.append(tensor)


def is_gapless(tensor: Tensor) -> bool:
    """Whether its elements fill a piece of memory, each once, in any order."""
    start, end = span(tensor)
    return end - start == tensor.nbytes and not repeats(tensor)


def shared_with(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Per place of a tensor that shares memory with earlier ones, the first of them.

    Args:
        tensors: strided, on any device.
    """
    held = list(tensors)
    shared: dict[int, int] = {}
    for group in _neighbors(held):
        for place in group:
            earlier = (other for other in group if other < place)
            for other in earlier:
                if share(held[place], held[other]):
                    shared[place] = other
                    break
    return shared


def _with_gradient(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [
        p for p in parameters if (g := p.grad) is not None and g.layout is torch.strided
    ]


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _copy_gradient(parameter: Tensor) -> None:
    parameter.grad = _gradient(parameter).detach().clone()


def _neighbors(tensors: list[Tensor]) -> list[list[int]]:
    """Places of tensors, two and more, whose ranges of addresses overlap; ascending."""
    spans = [span(tensor) for tensor in tensors]
    if apart(spans):
        return []  # asked in every step, and nearly always so
    starts, ends = columns(spans, 2)
    order = np.argsort(starts, kind="stable")
    groups: list[list[int]] = [[]]
    reach = 0
    for place in order.tolist():
        if starts[place] >= reach:
            groups.append([])
        if ends[place] > starts[place]:
            groups[-1].append(place)
        reach = max(reach, ends[place])
    return [sorted(group) for group in groups if len(group) > 1]
