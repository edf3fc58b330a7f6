"""What a graph calls at every step: Python functions on host memory.

TensorFlow calls them from several threads, in the order of the graph: `identify` before
`send` of any of its variables, `receive` after the exchange.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_sparse.tensorflow.identities import Identities
from hvd_sparse.tensorflow.sources import Sources
from hvd_sparse.tensorflow.step import Flights, Step

Array = npt.NDArray[Any]

_UNKNOWN = -1  # in place of the number of a name


class Running:
    """Of one compressor."""

    def __init__(self, flights: Flights, identities: Identities) -> None:
        """Join the parts."""
        self._flights = flights
        self._path = flights.path
        self._lock = flights.lock
        self._identities = identities

    def identify(self, sources: Sources, description: Any) -> Array:
        """Which variables the graph runs with; before any of them is sent.

        Args:
            sources: as the graph was traced with them.
            description: see `VariableNames.describe`.
        """
        with self._lock:
            if sources.step is None:
                return self._identified(sources, description)
            sources.step.begin()
            try:
                return self._identified(sources, description)
            except BaseException as error:
                sources.step.fail(error)
                return np.full(len(sources.gradients), _UNKNOWN, np.int64)

    def _identified(self, sources: Sources, description: Any) -> Array:
        self._flights.forget(self._identities.names.gone())
        self._path.begin()
        names = self._identities.names.named(description)
        for place in sources.dense:
            if (tensor := self._flights.dense.get(names[place])) is not None:
                size = tensor.header.n * tensor.itemsize
                self._path.traffic.count(tensor, tensor.header.n, size, size)
        return np.array([self._identities.number(name) for name in names], np.int64)

    def send(self, step: Step, unknown: bool, number: Any, gradient: Array) -> Array:
        """What is to be gathered of one gradient.

        Args:
            step: that it is of.
            unknown: its shape was, when the graph was traced.
            number: of its name, as `identify` gave it.
            gradient: of any shape.
        """
        gradient = np.asarray(gradient)  # TensorFlow hands over a scalar as a number
        with self._lock:
            if number == _UNKNOWN:
                return step.excuse("", None)
            name = self._identities.name(number)
            if unknown:
                self._path.plan.always_sparse.add(name)
            return step.send(name, gradient)

    def receive(self, step: Step, numbers: Any, *gathered: Array) -> list[Array]:
        """Results of these gradients, from what was gathered of each."""
        with self._lock:
            names = [self._identities.name(n) for n in numbers if n != _UNKNOWN]
            return step.receive(names, gathered)

    def receive_alone(self, step: Step, number: Any, gathered: Array) -> Array:
        """The result of one."""
        return self.receive(step, [number], gathered)[0]
