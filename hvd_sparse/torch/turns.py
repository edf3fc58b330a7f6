"""Parameters that several optimizers hold, each of which exchanges the same gradient.

The result of the first takes the place of the gradient, in `p.grad`, which the second
has still to exchange. So the gradient is kept beside it until then, and a result too
where another takes its place before its optimizer has stepped: `p.grad` is the result
of the optimizer that exchanged, or stepped, last. Nothing is kept, nor copied, of a
parameter that one optimizer alone holds.
"""

import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch

from hvd_sparse.torch.parameters import Parameters
from hvd_sparse.torch.places import fingerprint
from hvd_sparse.transport.loopback import this_rank

Tensor = torch.Tensor

_LOCK = threading.Lock()  # optimizers of a loopback are made in several threads


class Turns:
    """Those of one optimizer; they know of the others'.

    Attributes:
        synchronized: by the user, and no backward pass or step since.
        fresh: a backward pass has made gradients that have not been exchanged.
    """

    _all: ClassVar["weakref.WeakSet[Turns]"] = weakref.WeakSet()

    def __init__(self, parameters: Parameters) -> None:
        """Args: parameters: of the optimizer."""
        self.synchronized = self.fresh = False
        self._parameters = parameters
        self._turns: dict[Tensor, _Turn] = {}
        self._rank = this_rank.get()  # others, in other threads, have tensors in use
        with _LOCK:
            Turns._all.add(self)

    def close(self) -> None:
        """The optimizer exchanges no more."""
        with _LOCK:
            Turns._all.discard(self)
        self._turns.clear()

    def forget(self, parameter: Tensor) -> None:
        """A backward pass gave it another gradient."""
        self.synchronized, self.fresh = False, True
        turn = self._turns.pop(parameter, None)
        if turn is not None:
            turn.is_over = True

    def beside(self) -> list[Tensor]:
        """Parameters of other optimizers that this one does not hold."""
        others = self._others()
        own = set(self._parameters) if others else set()
        return [p for other in others for p in other._parameters if p not in own]

    def begin(self, held: Mapping[str, Tensor]) -> None:
        """An exchange follows, after which `end` is called: `p.grad` is what it takes.

        Args:
            held: per name, the parameters of the optimizer.

        Raises:
            ValueError: a gradient was changed, and nobody knows for which optimizer.
        """
        sharing: dict[Tensor, list[Turns]] = {}
        for other in self._others():
            for parameter in other._parameters:
                sharing.setdefault(parameter, []).append(other)
        turns = {
            parameter: self._turn(name, parameter, sharing.get(parameter, []))
            for name, parameter in held.items()
            if parameter in sharing or parameter in self._turns
        }
        self._turns = {p: turn for p, turn in turns.items() if turn is not None}
        for parameter, turn in self._turns.items():
            turn.give(self, parameter)

    def end(self) -> None:
        """Results are in `p.grad`, or what an exchange that failed has left."""
        for parameter, turn in self._turns.items():
            turn.note(self, parameter)

    def recall(self, held: Mapping[str, Tensor]) -> None:
        """A step follows: `p.grad` is again what this optimizer has synchronized.

        Raises:
            ValueError: it is the result of another optimizer, and was changed.
        """
        waiting = {p: t for p, t in self._turns.items() if t.has_aside(self, p)}
        for name, parameter in held.items():
            if parameter in waiting and waiting[parameter].is_changed(parameter):
                raise _changed(name)
        for parameter, turn in waiting.items():
            turn.recall(self, parameter)
        for parameter, turn in waiting.items():
            turn.note(self, parameter)

    def stepped(self) -> None:
        """What the optimizer's own step wrote into `p.grad` is no change of a user."""
        for parameter, turn in self._turns.items():
            if turn.is_of(self, parameter):
                turn.note(self, parameter)

    def _others(self) -> list["Turns"]:
        with _LOCK:
            found = [turns for turns in Turns._all if turns is not self]
        return [turns for turns in found if turns._rank is self._rank]

    def _turn(
        self, name: str, parameter: Tensor, others: list["Turns"]
    ) -> "_Turn | None":
        """The one that goes on; else, where others hold the parameter, a new one."""
        for turns in (self, *others):
            turn = turns._turns.get(parameter)
            if turn is None:
                continue
            if turn.goes_on(self, name, parameter):
                return turn
            turn.is_over = True
        if not others:
            return None
        turn = _Turn(parameter, (self, *others))
        for other in others:  # which may ask for it when this one is gone
            other._turns[parameter] = turn
        return turn


class _Turn:
    """A gradient, and what became of it, until there is another one.

    Attributes:
        is_over: there is another one.
    """

    def __init__(self, parameter: Tensor, due: Iterable[Turns]) -> None:
        """Args: due: those that will exchange it."""
        self.is_over = False
        self._due = weakref.WeakSet(due)
        self._local = _copied(parameter.grad)
        self._aside = weakref.WeakKeyDictionary[Turns, Tensor | None]()
        self._owner: weakref.ref[Turns] | None = None  # whose result is in p.grad
        self._gradient = parameter.grad
        self._mark: _Mark | None = None

    def goes_on(self, turns: Turns, name: str, parameter: Tensor) -> bool:
        """Whether `p.grad` is a result that somebody else needs, and no other gradient.

        Raises:
            ValueError: nobody knows which of them it is.
        """
        if self._owner is None or self._is_past(parameter):
            return False
        if not self.is_changed(parameter):
            return bool(self._due) or self._awaiting() is not None
        if turns not in self._due or not _values(parameter.grad).any():
            return False  # by hand, or by zero_grad
        if self._awaiting() is not None:
            return True  # it was changed for that one's step: clipped, say
        raise _changed(name)

    def is_changed(self, parameter: Tensor) -> bool:
        """Whether somebody wrote into the result."""
        gradient, mark = parameter.grad, self._mark
        return gradient is not None and mark is not None and mark.differs(gradient)

    def give(self, turns: Turns, parameter: Tensor) -> None:
        """It becomes `p.grad`, where the optimizer has not exchanged it."""
        waits = self._awaiting()
        if waits is not None and waits is not turns:
            self._aside[waits] = _copied(parameter.grad)
        if turns in self._due and self._owner is not None:
            _write(parameter, self._local)
        self._due.discard(turns)
        if not self._due:
            self._local = None

    def note(self, turns: Turns, parameter: Tensor) -> None:
        """What is in `p.grad` now is the result of this optimizer."""
        self._owner = weakref.ref(turns)
        self._gradient = parameter.grad
        self._mark = None if parameter.grad is None else _Mark(parameter.grad)

    def is_of(self, turns: Turns, parameter: Tensor) -> bool:
        """Whether `p.grad` is the result of this optimizer."""
        owner = None if self._owner is None else self._owner()
        return owner is turns and not self._is_past(parameter)

    def has_aside(self, turns: Turns, parameter: Tensor) -> bool:
        """Whether another result is in the place of this optimizer's."""
        ours = turns in self._aside and not self.is_of(turns, parameter)
        if not ours or self._is_past(parameter):
            return False
        return not self.is_changed(parameter) or bool(_values(parameter.grad).any())

    def recall(self, turns: Turns, parameter: Tensor) -> None:
        """Exchange the places of both results."""
        waits, own = self._awaiting(), self._aside.pop(turns)
        if waits is not None:
            self._aside[waits] = _copied(parameter.grad)
        _write(parameter, own)

    def _is_past(self, parameter: Tensor) -> bool:
        """Whether `p.grad` is other memory; an alias of it is no new gradient."""
        gradient, known = parameter.grad, self._gradient
        if self.is_over or gradient is None or known is None or gradient is known:
            return self.is_over or gradient is not known
        strided = gradient.layout is known.layout is torch.strided
        return not strided or gradient.data_ptr() != known.data_ptr()

    def _awaiting(self) -> Turns | None:
        """The optimizer whose result is in `p.grad`, and whose step is to come."""
        owner = None if self._owner is None else self._owner()
        return owner if owner is not None and owner.synchronized else None


class _Mark:
    """What a gradient is like, to see whether somebody writes into it."""

    def __init__(self, gradient: Tensor) -> None:
        """Now."""
        self._version = gradient._version
        self._sum = _sum(gradient)

    def differs(self, gradient: Tensor) -> bool:
        """From what it was."""
        # the version of a part counts what is written into the other parts too
        whole = gradient.is_sparse or (
            gradient.nbytes == gradient.untyped_storage().nbytes()
        )
        if whole and gradient._version != self._version:
            return True
        return not torch.equal(_sum(gradient), self._sum)


def _changed(name: str) -> ValueError:
    return ValueError(
        f"{name}: several optimizers hold it, and its gradient was changed when it was "
        "the result of another one: change it between synchronize() and step() of one "
        "optimizer, before another synchronizes, or set p.grad to a new tensor"
    )


def _copied(gradient: Tensor | None) -> Tensor | None:
    """What no exchange will overwrite; those of rows are replaced, never written."""
    if gradient is None or gradient.layout is not torch.strided:
        return gradient
    return gradient.detach().clone()


def _write(parameter: Tensor, gradient: Tensor | None) -> None:
    """Into `p.grad` where that is possible: it may be a view of somebody's buffer."""
    there = parameter.grad
    if gradient is None or gradient.layout is not torch.strided:
        parameter.grad = gradient
    elif there is None or there.layout is not torch.strided:
        parameter.grad = gradient.clone()
    else:
        there.detach().copy_(gradient)


def _values(gradient: Tensor | None) -> Tensor:
    if gradient is None:
        return torch.zeros(0)
    return (gradient.coalesce().values() if gradient.is_sparse else gradient).detach()


def _sum(gradient: Tensor) -> Tensor:
    values = _values(gradient)
    return fingerprint(torch.view_as_real(values) if values.is_complex() else values)
