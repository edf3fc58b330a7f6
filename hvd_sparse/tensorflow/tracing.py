"""What is built while Horovod traces a graph: sending, exchange, and receiving.

In a graph all gradients of a step leave together where that can be, and the first one
builds the exchange of all: no result is there before all are. Else, and where functions
run eagerly, each is sent and received by itself.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_sparse.tensorflow.horovod_frames import Call
from hvd_sparse.tensorflow.identities import Identities
from hvd_sparse.tensorflow.nodes import floating, note_exchanged, python_node
from hvd_sparse.tensorflow.running import Running
from hvd_sparse.tensorflow.sources import Sources
from hvd_sparse.tensorflow.step import Flights, Step

Tensor = Any  # tf.Tensor: TensorFlow has no types
Receive = Callable[[Tensor], Tensor]  # takes what Horovod reduced, builds the result

_SOURCES = "_hvd_sparse_sources"  # of a graph


class Tracing:
    """Of one compressor."""

    def __init__(self, flights: Flights, identities: Identities) -> None:
        """Nothing is built yet."""
        self._flights = flights
        self._path = flights.path
        self._exchange = flights.exchange
        self._lock = flights.lock
        self._identities = identities
        self._running = Running(flights, identities)
        self._eager: Step | None = None  # the one that runs without a graph

    def send(self, tensor: Tensor, call: Call) -> tuple[Tensor, Receive | None]:
        """Build the sending of a gradient.

        Args:
            tensor: floating.
            call: that of compress with it.

        Returns:
            What Horovod is to reduce, and what builds the receiving; None where the
            gradient goes dense.

        Raises:
            ValueError: neither Horovod nor the caller says whose gradient it is.
        """
        if call.variables is None:
            return self._send_named(tensor, call.arguments.get("name"))
        if hasattr(tensor, "numpy"):  # functions run eagerly: nothing is traced
            return self._send_eagerly(tensor, call)
        return self._send_in_graph(tensor, call)

    def forget(self) -> None:
        """A state is loaded: of what was sent before nothing is awaited."""
        self._flights.clear()
        self._eager = None

    def _goes_dense(self, name: str, tensor: Tensor) -> bool:
        """Whether Horovod reduces it itself, as far as can be known while tracing."""
        plan = self._path.plan
        if not tensor.shape.is_fully_defined():
            # as sparse_as_dense makes them: the running graph knows, when it is too
            # late to choose Horovod's own allreduce
            plan.always_sparse.add(name)
            return False
        like = np.broadcast_to(tensor.dtype.as_numpy_dtype(0), tuple(tensor.shape))
        with self._lock, suppress(TypeError, ValueError):  # peers hear it when it runs
            self._path.admit(name, like)  # which needs no memory
        admitted = plan.tensors.get(name)
        if admitted is None or not admitted.dense:
            return False
        self._flights.dense[name] = admitted
        return True

    # ----------------------------------------------------------- each leaves by itself

    def _send_named(
        self, tensor: Tensor, name: str | None
    ) -> tuple[Tensor, Receive | None]:
        """One whose user gives it a name."""
        with self._lock:
            name = self._identities.of_tensor(tensor, name)
        if self._goes_dense(name, tensor):
            return tensor, None
        return self._send_alone(
            Step(self._flights, {}), self._number(name), name, tensor
        )

    def _send_eagerly(
        self, tensor: Tensor, call: Call
    ) -> tuple[Tensor, Receive | None]:
        """One of several that leave one after the other, in one step."""
        with self._lock:
            names = self._identities.of_variables(call)
            self._flights.forget(self._identities.names.gone())
        name = names[call.place(tensor)]
        if self._goes_dense(name, tensor):
            return tensor, None
        if self._eager is None or not self._eager.awaits(name):
            self._eager = Step(
                self._flights,
                {
                    names[place]: gradient.numpy
                    for place, gradient in floating(call.gradients)
                    if not self._goes_dense(names[place], gradient)
                },
            )
        return self._send_alone(self._eager, self._number(name), name, tensor)

    def _send_alone(
        self, step: Step, number: Tensor, name: str, tensor: Tensor
    ) -> tuple[Tensor, Receive]:
        payload, gathered = self._gather(step, number, name, tensor)

        def receive(_: Tensor) -> Tensor:
            run = partial(self._running.receive_alone, step)
            node = python_node(run, [number, gathered], tensor.dtype, tensor.shape)
            note_exchanged(self._flights, node)
            return node

        return _unused(payload), receive

    def _gather(
        self, step: Step, number: Tensor, name: str, tensor: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Build the sending of one gradient, and the exchange."""
        unknown = not tensor.shape.is_fully_defined()
        send = partial(self._running.send, step, unknown)
        payload = python_node(send, [number, tensor], tf.uint8, [None])
        return payload, self._exchange.gather(name, payload)

    def _number(self, name: str) -> Tensor:
        with self._lock:
            return tf.constant(self._identities.number(name), tf.int64)

    # ------------------------------------------------------------ all of a graph's step

    def _send_in_graph(
        self, tensor: Tensor, call: Call
    ) -> tuple[Tensor, Receive | None]:
        """One of several that leave together, or by itself where that can not be."""
        with self._lock:
            names = self._identities.of_variables(call)
            sources = self._sources_of(tensor.graph, call, names)
        if sources.results is not None:
            return _joined(sources, tensor)
        place = call.place(tensor)
        if self._goes_dense(names[place], tensor):
            sources.dense.append(place)
            return tensor, None
        number = sources.numbers[place]
        return self._send_alone(Step(self._flights, {}), number, names[place], tensor)

    def _sources_of(self, graph: Any, call: Call, names: Sequence[str]) -> Sources:
        """Made once for all that leave together, outside of their branches."""
        variables, gradients = call.variables or [], call.gradients
        scope = self._identities.scope(call.optimizer)
        of = (self, sys.intern(scope), *variables)
        if not hasattr(graph, _SOURCES):
            setattr(graph, _SOURCES, [])
        known: list[Sources] = getattr(graph, _SOURCES)
        for sources in known:
            if sources.are(of, gradients):
                return sources
        sources = Sources(of, gradients)
        with graph.as_default(), tf.control_dependencies(None):
            description = self._identities.names.describe(variables, scope)
            identify = partial(self._running.identify, sources)
            sources.numbers = python_node(identify, [description], tf.int64, [None])
        if self._exchange.certain and all(
            gradient.graph is graph for _, gradient in floating(gradients)
        ):
            with graph.as_default():
                self._leave_together(sources, names)
        known.append(sources)
        return sources

    def _leave_together(self, sources: Sources, names: Sequence[str]) -> None:
        """Build the exchange of a whole step: no result is there before all are."""
        step = sources.step = Step(self._flights, {})
        gathered: dict[int, Tensor] = {}
        sources.results = {}
        for place, gradient in floating(sources.gradients):
            if self._goes_dense(names[place], gradient):
                sources.dense.append(place)
                continue
            sources.payloads[place], gathered[place] = self._gather(
                step, sources.numbers[place], names[place], gradient
            )
        if gathered:
            likes = [sources.gradients[place] for place in gathered]
            results = python_node(
                partial(self._running.receive, step),
                [tf.gather(sources.numbers, list(gathered)), *gathered.values()],
                [like.dtype for like in likes],
                [like.shape for like in likes],
            )
            note_exchanged(self._flights, results[0])
            sources.results = dict(zip(gathered, results, strict=True))


def _joined(sources: Sources, tensor: Tensor) -> tuple[Tensor, Receive]:
    """A gradient of those that leave together, which is built already."""
    assert sources.results is not None
    place = sources.place(tensor)
    if place not in sources.results:
        return tensor, partial(_after, list(sources.results.values()))
    result = sources.results[place]
    return _unused(sources.payloads[place]), lambda _: result


def _after(results: Sequence[Tensor], reduced: Tensor) -> Tensor:
    """It goes dense, and may not be there before it is known that none failed."""
    with tf.control_dependencies([tf.identity(result) for result in results[:1]]):
        return tf.identity(reduced)


def _unused(payload: Tensor) -> Tensor:
    """What Horovod is to reduce, which nobody uses."""
    # depends on data, or it would be computed once and for all
    return tf.cast(payload[:1], tf.float32)
