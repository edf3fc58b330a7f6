"""Results of `synchronize()` that no step uses: a step thrown away without a word.

Scripts for dense gradients skip a bad batch so: synchronize, look at the norm, zero the
gradients, go on. With error feedback what was sent is missing from the residuals by
then. Whether a result was used, nobody says; it shows in the weights, and by the hooks
of torch's optimizers. So that ranks find the same, they look at the same places: where
the result, which is the same everywhere, is not 0.
"""

import warnings
import weakref
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

Tensor = torch.Tensor

_LOOKED_AT = 1 << 16  # elements of a result, from its first on
_PLACES = 4


class _Sample(NamedTuple):
    parameter: "weakref.ref[Tensor]"
    shape: torch.Size
    places: Tensor
    weights: Tensor


class Unused:
    """What one optimizer has synchronized, as long as no step is known to use it."""

    _all: ClassVar["weakref.WeakSet[Unused]"] = weakref.WeakSet()

    def __init__(self) -> None:
        """Nothing yet."""
        self._samples: list[_Sample] = []
        self._warned = False
        Unused._all.add(self)
        _watch_steps()

    def note(self, parameter: Tensor, result: Tensor) -> None:
        """A result is about to be handed back, outside of a step."""
        if result.layout is not torch.strided:
            result = result.coalesce().to_dense()
        found = result.detach().reshape(-1)[:_LOOKED_AT].nonzero().flatten()[:_PLACES]
        if found.numel() and result.shape == parameter.shape:
            shape, weights = parameter.shape, parameter.detach().reshape(-1)[found]
            self._samples.append(_Sample(weakref.ref(parameter), shape, found, weights))

    def forget(self) -> None:
        """It was used, or another one takes its place."""
        self._samples.clear()

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


def _is_unchanged(sample: _Sample) -> bool:
    parameter = sample.parameter()
    if parameter is None or parameter.shape != sample.shape:
        return False
    weights = parameter.detach().reshape(-1)
    return torch.equal(weights[sample.places], sample.weights)


@cache
def _watch_steps() -> None:
    register_optimizer_step_post_hook(_after_any_step)


def _after_any_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Whichever optimizer holds the parameters: it may be another's base."""
    del args, kwargs
    pending = [unused for unused in Unused._all if unused._samples]
    if not pending:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for unused in pending:
        if unused._holds_any(held):
            unused.forget()
