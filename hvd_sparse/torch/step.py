"""One step of an optimizer under Horovod: it counts as a whole, or not at all.

Horovod gives gradients away one by one, and asks for their results one by one, in
another order on every rank. So a rank may have received some of them when it learns
that a peer has failed. What was sent counts when the last result is there; until then
all of the step can be taken back, and is, on every rank.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hvd_sparse.core.contracts import ExchangeError
from hvd_sparse.core.flight import Flight, Phase
from hvd_sparse.core.path import GradientPath
from hvd_sparse.torch.places import Place, Places
from hvd_sparse.torch.states import viewed
from hvd_sparse.watchdog import Watchdog

Tensor = torch.Tensor


@dataclass(slots=True)
class Context:
    """What decompress must know of a gradient that compress was given.

    Attributes:
        name: of its parameter.
        place: where the gradient is.
        dense: it is reduced by Horovod.
        flight: None until its bucket leaves, or fails to.
        result: None until it is there.
        taken: the residual that went with it, where it goes dense.
        excused: its peers are told that this rank raised.
        alone: no optimizer gave it: its step is its own.
    """

    name: str
    place: Place
    dense: bool = False
    flight: Flight | None = None
    result: Tensor | None = None
    taken: Any = None
    excused: bool = False
    alone: bool = False
    _array: Any = None

    @property
    def phase(self) -> Phase:
        """Where the gradient is."""
        return Phase.FILLING if self.flight is None else self.flight.phase

    @property
    def waits(self) -> bool:
        """Whether it is to leave with the last one of its batch."""
        return self.phase is Phase.FILLING and not self.excused

    @property
    def sent(self) -> Flight:
        """The flight of a gradient that is on its way."""
        if self.flight is None:
            raise forgotten(self.name)
        return self.flight

    @property
    def array(self) -> Any:
        """The gradient as the path sees it."""
        if self._array is None:
            self._array = viewed(self.place.memory)
        return self._array

    def seen(self, result: Tensor) -> Any:
        """Its result as the path sees it."""
        return self.array if result is self.place.memory else viewed(result)


@dataclass(slots=True)
class Idle:
    """In place of a Context: no rank sends anything of this parameter.

    Attributes:
        name: of the parameter.
        gradient: stays as it is.
        frozen: the parameter, if that is why; None before a closure.
    """

    name: str
    gradient: Tensor
    frozen: Tensor | None


@dataclass(slots=True)
class Failure:
    """What this rank raises when its step has come to its end.

    Attributes:
        error: the first one.
        told: peers learn of it in this step, which fails on every rank.
    """

    error: BaseException
    told: bool = False


def forgotten(name: str) -> ExchangeError:
    """What to raise where the state is not that in which a gradient left."""
    return ExchangeError(
        f"{name}: is not on its way: a state was loaded between the backward pass and "
        "the optimizer's step"
    )


class Step:
    """The gradients of the step that is under way.

    Attributes:
        places: where they lie.
        under_way: by name; there is no result yet.
        idle: of parameters of which nothing is sent.
        arrived: results are there, and may be taken back.
        arriving: results are asked for.
        failure: of this rank.
    """

    def __init__(self, path: GradientPath, watchdog: Watchdog) -> None:
        """None yet."""
        self.places = Places()
        self._path = path
        self._watchdog = watchdog
        self._clear()

    def _clear(self) -> None:
        self.under_way: dict[str, Context] = {}
        self.idle: dict[str, Idle] = {}
        self.arrived: list[Context] = []
        self.arriving = False
        self.failure: Failure | None = None

    @property
    def is_empty(self) -> bool:
        """The next gradient is the first one of a step."""
        return not (self.under_way or self.idle or self.arrived)

    def waiting(self) -> list[Context]:
        """Those that wait for the last one of their batch."""
        return [context for context in self.under_way.values() if context.waits]

    def __contains__(self, name: str) -> bool:
        """Whether it was given, and its result has not been asked for."""
        return name in self.under_way or name in self.idle

    def fail(self, error: BaseException) -> Failure:
        """From here on peers are told, in place of gradients; the first error counts.

        Returns:
            What this rank will raise.
        """
        if self.failure is None:
            self.failure = Failure(error)
        return self.failure

    def keep(self, context: Context) -> None:
        """What is right of a gradient that will not be sent goes with the next step."""
        if context.flight is not None or context.place.rewritten:
            return
        with suppress(Exception):  # it is refused, which is what failed
            context.flight = self._path.keep(context.name, context.array)

    # ------------------------------------------------------------------------ its end

    def arrive(self, contexts: Sequence[Context], results: Sequence[Tensor]) -> None:
        """They count when all others have arrived as well."""
        for context, result in zip(contexts, results, strict=True):
            context.result = result
        self.arrived += contexts
        self._leave(contexts)

    def settle(self) -> BaseException | None:
        """If all is there it can not be taken back any more; what is alone counts now.

        Returns:
            What this rank raises all the same; its peers do not.
        """
        if self.under_way or self.idle:
            self._count([context for context in self.arrived if context.alone])
            self.arrived = [context for context in self.arrived if not context.alone]
            return None
        self._count(self.arrived)
        failure = self.failure
        self._clear()
        return None if failure is None else failure.error

    def _count(self, contexts: list[Context]) -> None:
        traffic = self._path.traffic
        for context in contexts:
            flight = context.sent
            flight.commit()
            traffic.steps = max(traffic.steps, flight.tensor.header.step)

    def roll_back(self) -> None:
        """Nothing of it counts: what was sent is back in the residuals."""
        contexts = [*self.arrived, *self.under_way.values()]
        waiting = self.waiting()
        self._leave(list(self.under_way.values()))
        try:
            self._path.roll_back([c.flight for c in contexts if c.flight is not None])
            for context in waiting:
                self.keep(context)
            for context in contexts:
                if context.taken is not None:
                    self._path.memory.residuals.setdefault(context.name, context.taken)
        finally:
            self._watchdog.forget()
            self._clear()

    def give_up(self, name: str, gradient: Tensor) -> None:
        """The step of an earlier gradient, whose result was never asked for."""
        self.idle.pop(name, None)
        context = self.under_way.get(name)
        if context is None:
            return
        self.failure = None  # it was of the step that is given up
        self._leave([context])
        if context.flight is not None:
            self._path.roll_back([context.flight])
        elif context.waits and not np.may_share_memory(context.array, viewed(gradient)):
            self._path.keep(name, context.array)

    def forget(self) -> None:
        """What is under way belongs to another state."""
        for context in self.under_way.values():
            context.flight = None
        self.places.clear()
        self._watchdog.forget()
        self._clear()

    def _leave(self, contexts: Sequence[Context]) -> None:
        """They are not under way any more; what is there holds the gradient alive."""
        for context in contexts:
            self.under_way.pop(context.name, None)
        self.places.leave(context.place for context in contexts)
