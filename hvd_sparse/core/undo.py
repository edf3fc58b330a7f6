"""Undo: what residuals were before the last step, so that it can be thrown away.

Subtracting what was added would not do: (r + g) - g is not r where g is large. So it is
a copy of each residual, which costs memory of the gradient's size and a pass over it.
"""

from copy import deepcopy
from typing import NamedTuple

from hvd_sparse.core.contracts import Array
from hvd_sparse.core.flight import Tensor
from hvd_sparse.core.memory import Kept
from hvd_sparse.core.plan import Plan


class _Before(NamedTuple):
    step: int
    chosen: int


class Undo:
    """Of one path."""

    def __init__(self, plan: Plan, kept: Kept) -> None:
        """No step yet."""
        self._plan = plan
        self._kept = kept
        self._copies: dict[str, list[Array]] = {}
        self._last: dict[str, _Before] = {}  # of the tensors of the last step
        self._taken: dict[str, Array] = {}  # whole residuals that went with it
        self._begun = self._applied = False

    def begin(self) -> None:
        """A step begins: the one before it can not be thrown away any more."""
        self._last.clear()
        self._taken.clear()
        self._begun = True  # also if all of it goes dense, of which nothing waits
        self._applied = False

    def took(self, name: str, residual: Array) -> None:
        """A residual goes as a whole, with a gradient that goes dense."""
        self._taken[name] = residual

    def note(self, tensor: Tensor, gradient: Array) -> None:
        """Before the gradient comes into its residual.

        Where another one of the same step was given up, that one stays.
        """
        name = tensor.name
        if not tensor.dense:
            self._kept.memory.residual(name, gradient)
            arrays = self._kept.arrays(name)
            if name in self._copies:
                _overwrite(self._copies[name], arrays)
            else:
                self._copies[name] = [deepcopy(array) for array in arrays]
        self._begun = True
        self._last[name] = _Before(tensor.header.step, tensor.chosen)

    def applied(self) -> None:
        """The optimizer used its results, which are not to come back as residuals."""
        self._applied = self._begun

    def discard(self) -> None:
        """Bring back what was before, bit by bit.

        Raises:
            RuntimeError: there is no step, it was applied, or it is under way.
        """
        tensors = {name: self._plan.tensors[name] for name in self._last}
        under_way = sorted(name for name, t in tensors.items() if t.in_flight)
        if under_way:
            raise RuntimeError(
                f"{under_way[0]}: its exchange is under way: discard() must follow it"
            )
        if not self._begun:
            raise RuntimeError("there is no step that discard() could throw away")
        if self._applied:
            raise RuntimeError(
                "the optimizer's step has applied what discard() would throw away: "
                "call it in place of step()"
            )
        for name, tensor in tensors.items():
            if not tensor.dense:
                _overwrite(self._kept.arrays(name), self._copies[name])
            tensor.at_step(self._last[name].step)
            tensor.chosen = self._last[name].chosen
            tensor.flight = None
        self._kept.memory.residuals.update(self._taken)
        self.begin()
        self._begun = False

    def forget(self, name: str | None = None) -> None:
        """Of a tensor that is gone; of all of them where another state is loaded."""
        if name is None:
            self._begun = self._applied = False
        for kept in (self._copies, self._last, self._taken):
            for each in [name] if name is not None else [*kept]:
                kept.pop(each, None)


def _overwrite(arrays: list[Array], sources: list[Array]) -> None:
    for array, source in zip(arrays, sources, strict=True):
        array[...] = source
