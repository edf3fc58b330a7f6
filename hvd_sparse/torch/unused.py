"""Results of `synchronize()` that no step uses: a step thrown away without a word.

Scripts for dense gradients skip a bad batch so: synchronize, look at the norm, zero the
gradients, go on. With error feedback what was sent is missing from the residuals by
then. Whether a result was used, nobody says; it shows in the weights, and by the hooks
of torch's optimizers. So that ranks find the same, they look at the same places of the
same tensors: where the result, which is the same everywhere, is not 0.
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from hvd_sparse.torch.states import viewed

Tensor = torch.Tensor

_LOCK = threading.Lock()  # optimizers of a loopback are made in several threads
_LOOKED_AT = (1 << 10, 1 << 16)  # elements of a result, from its first on
_PLACES = 4
_TENSORS = 32


def looked_at(names: Iterable[str]) -> set[str]:
    """Those tensors whose results tell; the same on every rank."""
    held = sorted(names)
    return set(held[:: -(-len(held) // _TENSORS) or 1])


class _Sample(NamedTuple):
    parameter: "weakref.ref[Tensor]"
    shape: torch.Size
    places: Any
    weights: Any


class Unused:
    """What one optimizer has synchronized, as long as no step is known to use it."""

    _all: ClassVar["weakref.WeakSet[Unused]"] = weakref.WeakSet()

    def __init__(self, applied: Callable[[], None]) -> None:
        """Nothing yet. Args: applied: is told when another optimizer's step uses it."""
        self._applied = applied
        self._samples: list[_Sample] = []
        self._warned = False
        with _LOCK:
            Unused._all.add(self)
        _watch_steps()

    def note(self, parameter: Tensor, result: Tensor) -> None:
        """A result is about to be handed back, outside of a step."""
        if result.shape != parameter.shape or not _is_cheap(parameter, result):
            return
        found = _not_zero(_flat(result))
        if len(found):
            weights = _flat(parameter)[found]
            sample = _Sample(weakref.ref(parameter), parameter.shape, found, weights)
            self._samples.append(sample)

    def forget(self) -> None:
        """It was used, or another one takes its place."""
        self._samples.clear()

    def were_zeroed(self) -> bool:
        """Whether gradients hold the results no more: a rank may have no others."""
        return all(map(_is_zeroed, self._samples))

    def is_thrown_away(self) -> bool:
        """Asked when the next gradients come: whether nothing became of the results."""
        samples, self._samples = self._samples, []
        return bool(samples) and all(map(_is_unchanged, samples))

    def warn(self, stacklevel: int) -> None:
        """Once."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                "synchronize() was followed by another backward pass, and no step used "
                "its results: what this rank has sent of them is lost. To throw a step "
                "away, give undo=True: then it comes back, bit by bit",
                stacklevel=stacklevel + 1,
            )

    def _holds_any(self, parameters: set[int]) -> bool:
        held = (sample.parameter() for sample in self._samples)
        return any(id(parameter) in parameters for parameter in held)


def _is_cheap(*tensors: Tensor) -> bool:
    """Whether some of their elements can be read without a copy of them all."""
    return all(t.layout is torch.strided and t.is_contiguous() for t in tensors)


def _flat(tensor: Tensor) -> Any:
    """As the path sees it: numpy, which is quicker, where it is in host memory."""
    return viewed(tensor.detach()).reshape(-1)


def _not_zero(result: Any) -> Any:
    """The first places of a flat array, as far as it is looked at."""
    for count in _LOOKED_AT:
        part = result[:count] != 0
        places = part.nonzero()[0] if isinstance(part, np.ndarray) else part.nonzero()
        if len(places):
            break
    return places.reshape(-1)[:_PLACES]


def _is_unchanged(sample: _Sample) -> bool:
    parameter = sample.parameter()
    if parameter is None or parameter.shape != sample.shape:
        return False
    return bool((_flat(parameter)[sample.places] == sample.weights).all())


def _is_zeroed(sample: _Sample) -> bool:
    """Results are not 0 at these places."""
    parameter = sample.parameter()
    gradient = None if parameter is None else parameter.grad
    if gradient is None or not _is_cheap(gradient):
        return gradient is None
    return not (_flat(gradient)[sample.places] != 0).any()


@cache
def _watch_steps() -> None:
    register_optimizer_step_post_hook(_after_any_step)


def _after_any_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Whichever optimizer holds the parameters: it may be another's base."""
    del args, kwargs
    with _LOCK:
        pending = [unused for unused in Unused._all if unused._samples]
    if not pending:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for unused in pending:
        if unused._holds_any(held):
            unused.forget()
            unused._applied()
