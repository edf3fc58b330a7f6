"""Results of parameters that several optimizers hold, until each has stepped.

Under Horovod the result of an optimizer takes the place of the gradient in `p.grad`,
and that of the next one takes its place. Where they are synchronized first and step
then, each is to step with its own. No result is copied: `p.grad` is pointed to it.
"""

import weakref
from typing import Any, ClassVar, NamedTuple

import torch

from hvd_sparse.torch.places import Place, fingerprint

Tensor = torch.Tensor


class _Result(NamedTuple):
    name: str
    gradient: Tensor  # which is p.grad, and points to a result
    result: Tensor
    mark: Tensor  # what the result was like

    @property
    def is_there(self) -> bool:
        return self.gradient.data_ptr() == self.result.data_ptr()

    @property
    def is_changed(self) -> bool:
        return not torch.equal(fingerprint(self.result), self.mark)


class Contended:
    """Those of one compressor; they know of the others'."""

    _all: ClassVar["weakref.WeakSet[Contended]"] = weakref.WeakSet()

    def __init__(self) -> None:
        """None yet."""
        self._results: dict[Tensor, _Result] = {}
        Contended._all.add(self)

    def keep(self, name: str, place: Place, result: Tensor) -> None:
        """It is about to be handed back."""
        if place.contended and place.parameter is not None:
            result = result.detach()
            kept = _Result(name, place.gradient, result, fingerprint(result))
            self._results[place.parameter] = kept

    def clear(self) -> None:
        """Another step begins."""
        self._results.clear()

    def recall(self) -> None:
        """A step follows: `p.grad` is to be what this optimizer has synchronized.

        Raises:
            ValueError: it is the result of another optimizer, and was changed.
        """
        away = {
            p: own
            for p, own in self._results.items()
            if p.grad is own.gradient and not own.is_there and p.grad.any()
        }
        for parameter, own in away.items():
            if self._is_changed(parameter):
                raise ValueError(
                    f"{own.name}: several optimizers hold it, and its gradient was "
                    "changed when it was the result of another one: change it between "
                    "synchronize() and step() of one optimizer, before another "
                    "synchronizes"
                )
        for parameter, own in away.items():
            gradient: Any = parameter.grad
            gradient.set_(own.result)

    def stepped(self) -> None:
        """What was written into results by now was meant for this step, or by it."""
        for parameter, own in self._results.items():
            self._results[parameter] = own._replace(mark=fingerprint(own.result))

    def _is_changed(self, parameter: Tensor) -> bool:
        """Whether somebody wrote into the result of another optimizer that is there."""
        results = (others._results.get(parameter) for others in Contended._all)
        return any(r.is_there and r.is_changed for r in results if r is not None)
