"""One step under Horovod: what leaves together arrives together, or none of it does.

If this rank raises while it sends, no payload of the step leaves any more: in its place
goes what was raised, which every rank raises when it receives. Until the last result is
there all of the step can be taken back.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.contracts import ExchangeError
from hvd_sparse.core.flight import Flight
from hvd_sparse.core.flight import Tensor as Admitted
from hvd_sparse.core.interrupts import Uninterrupted
from hvd_sparse.core.path import GradientPath
from hvd_sparse.core.payload import Raised
from hvd_sparse.tensorflow.buffers import Buffers
from hvd_sparse.tensorflow.gathers import GraphExchange
from hvd_sparse.watchdog import Watchdog

Array = npt.NDArray[Any]


class Flights:
    """What all steps of one compressor share.

    Attributes:
        lock: of all that they share.
        by_name: the last one of each tensor.
        dense: tensors that Horovod reduces without us. A load keeps them: graphs do.
        outs: memory for results.
    """

    def __init__(
        self, path: GradientPath, exchange: GraphExchange, watchdog: Watchdog
    ) -> None:
        """None yet."""
        self.path = path
        self.exchange = exchange
        self.watchdog = watchdog
        self.lock = threading.RLock()  # TensorFlow calls from several threads
        self.by_name: dict[str, Flight] = {}
        self.dense: dict[str, Admitted] = {}
        self.outs = Buffers()

    def forget(self, names: Iterable[str]) -> None:
        """Tensors are gone: drop what is kept of those that are not on their way."""
        for name in names:
            tensor = self.path.plan.tensors.get(name)
            if tensor is not None and tensor.in_flight:
                continue
            self.path.residuals.forget(name)
            self.by_name.pop(name, None)
            self.outs.forget(name)
            self.dense.pop(name, None)

    def clear(self) -> None:
        """A state is loaded: nothing is on its way."""
        self.by_name.clear()
        self.watchdog.forget()


class Step:
    """Tensors that leave together; whoever calls holds the lock of its flights."""

    def __init__(
        self, flights: Flights, gradients: Mapping[str, Callable[[], Array]]
    ) -> None:
        """Nothing has left.

        Args:
            flights: of the compressor.
            gradients: per name what returns it, where they leave one after the other:
                the step is complete when all of them have arrived.
        """
        self._flights = flights
        self._path = flights.path
        self.begin()
        self._rest = dict(gradients)  # what has not left yet

    def begin(self) -> None:
        """Another run of the graph in which they leave."""
        self._rest = {}
        self._sent: dict[str, Flight | None] = {}  # None of what was excused
        self._arrived: set[str] = set()
        self._error: BaseException | None = None
        self._told = False  # peers learn of the error

    def awaits(self, name: str) -> bool:
        """Whether this tensor is to leave yet."""
        return name in self._rest

    def fail(self, error: BaseException) -> None:
        """From here on peers are told; the first error counts."""
        self._error = self._error or error

    # -------------------------------------------------------------------------- there

    def send(self, name: str, gradient: Array) -> Array:
        """What is to be gathered: its payload, or what this rank has raised."""
        outgoing = None
        if name in self._sent:  # in a run of the graph that did not come to its end
            self._abort()
        self._rest.pop(name, None)
        try:
            with Uninterrupted():
                if self._error is None:
                    outgoing = self._send(name, gradient)
        except BaseException as error:
            self.fail(error)
        return self.excuse(name, gradient) if outgoing is None else outgoing

    def _abort(self) -> None:
        for name, flight in self._sent.items():
            if flight is not None and self._flights.by_name.get(name) is flight:
                self._path.roll_back([flight])
        self.begin()

    def _send(self, name: str, gradient: Array) -> Array:
        flights = self._flights
        tensor = self._path.admit(name, gradient)
        if tensor.in_flight:  # its result was never asked for
            self._path.roll_back([flights.by_name[name]])
        flights.watchdog.sent(name, tensor.header.step)
        try:
            [flight] = self._path.send({name: gradient})
        except BaseException:
            self._sent[name] = None  # the path has kept it
            raise
        self._sent[name] = flights.by_name[name] = flight
        return flights.exchange.outgoing(name)

    def excuse(self, name: str, gradient: Array | None) -> Array:
        """In place of a payload; the gradient, if it is known, is in the residual."""
        assert self._error is not None
        if name not in self._sent:
            self._sent[name] = None
            if gradient is not None:
                self._keep(name, gradient)
        self._flights.watchdog.sent(name, 0)
        self._told = True
        self._flights.exchange.start(name, Raised(self._error))
        return self._flights.exchange.outgoing(name)

    def _keep(self, name: str, gradient: Array) -> None:
        with suppress(Exception):  # it is refused, which is what failed
            tensor = self._path.admit(name, gradient)
            if tensor.in_flight:
                self._path.roll_back([self._flights.by_name[name]])
            self._path.keep(name, gradient)

    # ----------------------------------------------------------------------- and back

    def receive(self, names: Sequence[str], gathered: Sequence[Array]) -> list[Array]:
        """Results of these tensors; of a step whose last they are, all count.

        Raises:
            BaseException: what this rank raised while it sent.
            ExchangeError: a peer raised, or disagrees, or Horovod was shut down.
        """
        outs = None
        try:
            with Uninterrupted():
                outs = self._receive(names, gathered)
        except BaseException as error:
            if outs is None:
                failed = self._failed(error)
                raise failed from failed.__cause__
            self.fail(error)  # Ctrl-C: raised when the others are there too
        self._arrived.update(names)
        if not self._rest and self._arrived >= self._sent.keys():
            self._settle()
        return outs or []

    def _receive(self, names: Sequence[str], gathered: Sequence[Array]) -> list[Array]:
        if self._error is not None and self._told:
            raise self._error
        flights = [self._flight(name) for name in names]
        for name, array in zip(names, gathered, strict=True):
            self._flights.exchange.deliver(name, array)
        outs = [
            self._flights.outs.take(tensor.name, tensor.shape, tensor.array_dtype)
            for tensor in (flight.tensor for flight in flights)
        ]
        self._path.hand_back(flights, outs)
        for name in names:
            self._flights.watchdog.received(name)
        return outs

    def _flight(self, name: str) -> Flight:
        flight = self._sent.get(name)
        if flight is None or self._flights.by_name.get(name) is not flight:
            raise ExchangeError(
                f"{name}: is not on its way: a state was loaded in the middle of a step"
            )
        return flight

    def _settle(self) -> None:
        """What was sent has arrived and can not be taken back any more."""
        flights = [flight for flight in self._sent.values() if flight is not None]
        self._path.commit(flights)
        traffic = self._path.traffic
        steps = [flight.tensor.header.step for flight in flights]
        traffic.steps = max([traffic.steps, *steps])
        error = self._error
        self.begin()
        if error is not None:
            raise error

    def _failed(self, error: BaseException) -> BaseException:
        """What to raise; nothing of the step counts."""
        watchdog, rest = self._flights.watchdog, self._rest
        watchdog.forget()  # the rest of the graph will not run
        self._abort()
        for name, gradient in rest.items():  # their turn does not come
            self._keep(name, np.asarray(gradient()))
        if watchdog.gave_up:
            failed = ExchangeError(watchdog.gave_up)
            failed.__cause__ = error
            return failed
        return error
