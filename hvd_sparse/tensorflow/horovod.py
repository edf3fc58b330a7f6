"""The door for TensorFlow and Keras under an unmodified Horovod.

    import horovod.tensorflow.keras as hvd, hvd_sparse.tensorflow as sparse

    compression = sparse.SparseCompressor(sparse.TopK(density=0.001))
    optimizer = hvd.DistributedOptimizer(optimizer, compression=compression)

Horovod calls `compress` and `decompress` while it traces a graph. So they build what
the graph does at every step:

    gradient -> send -> allgather -> receive -> mean

`send` and `receive` are Python functions on host memory (tf.numpy_function) that take
the gradient along its path; residuals live there, not in the graph, and survive every
retracing. Horovod's graph may be traced with one variable and run with another of its
shape, so one more function, in front of them, finds out which variables they are for
(see `names` and `horovod_frames`). What Horovod itself is given to reduce is not used
by anybody, so that TensorFlow prunes it: it costs nothing.
"""

import gc
import os
import re
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from hvd_sparse.advice import Adviser
from hvd_sparse.core.contracts import Average, Op, Sparsifier
from hvd_sparse.core.formats import Values
from hvd_sparse.core.path import GradientPath
from hvd_sparse.core.plan import Tensor as Admitted
from hvd_sparse.core.routing import Dense, WhenCheaper
from hvd_sparse.core.sparsifiers import fixed_density
from hvd_sparse.core.traffic import Traffic
from hvd_sparse.tensorflow.advice import advise
from hvd_sparse.tensorflow.gathers import GraphExchange
from hvd_sparse.tensorflow.horovod_frames import (
    Call,
    call_of,
    optimizer_in_the_making,
)
from hvd_sparse.tensorflow.names import VariableNames, collective
from hvd_sparse.tensorflow.nodes import FLOATING, floating, places_of, python_node
from hvd_sparse.tensorflow.sources import Sources
from hvd_sparse.tensorflow.states import as_tensors, complete
from hvd_sparse.tensorflow.step import Flights, Step
from hvd_sparse.watchdog import Watchdog

Array = npt.NDArray[Any]
Tensor = Any  # tf.Tensor: TensorFlow has no types

_UNKNOWN = -1  # in place of the number of a name
_SOURCES = "_hvd_sparse_sources"  # of a graph


def _horovod() -> Any:
    """horovod.tensorflow, imported at first use."""
    try:
        import horovod.tensorflow as hvd
    except ImportError as error:
        raise ImportError(
            "SparseCompressor needs Horovod with TensorFlow: launch/build-horovod "
            "builds it; without Horovod use hvd_sparse.tensorflow.DistributedOptimizer"
        ) from error
    return hvd


def _check_prefix(prefix: str) -> None:
    """TensorFlow would refuse it too, when it traces, and speak of a scope."""
    if not isinstance(prefix, str) or not re.fullmatch(r"[\w./-]+", prefix, re.ASCII):
        raise ValueError(
            f"prefix must be letters, digits, and any of . _ / -, got {prefix!r}"
        )


def _refuse_keras_3() -> None:
    version = str(getattr(tf.keras, "__version__", "2"))  # TensorFlow 2.15 has none
    if version.startswith("3"):
        raise RuntimeError(
            f"Horovod 0.28.1 never reduces the gradients of Keras {version}: use "
            "plain MPI (hvd_sparse.tensorflow.DistributedOptimizer), or Keras 2 "
            "(pip install tf_keras, TF_USE_LEGACY_KERAS=1)"
        )


class Context(NamedTuple):
    """What decompress must know of a gradient that compress was given.

    Attributes:
        result: of the graph: what arrived for it, where it left together with others.
        receive: builds the receiving, where it left by itself.
    """

    result: Tensor = None
    receive: Any = None


class After(NamedTuple):
    """In place of a Context: the gradient goes dense, and may fail with the others.

    Attributes:
        sources: of the step.
    """

    sources: Sources


class SparseCompressor:
    """Sends what is worth it of each gradient; for `compression=` of Horovod.

    What was not sent belongs to the variable, and where several optimizers are made
    with one compressor, or copied by `from_config`, to each of them and the variable.
    All tapes share. With a single process Horovod calls no
    compressor, and training is dense.
    """

    def __init__(
        self,
        sparsifier: Sparsifier,
        *,
        op: int = Average,
        dense: Dense = WhenCheaper(),  # noqa: B008  # frozen: one instance serves all
        values: Values | None = None,
        prefix: str = "hvd_sparse",
        process_set: Any = None,
        timeout_s: float = 600,
        undo: bool = False,
    ) -> None:
        """Decide what to send; no communication yet.

        Args:
            sparsifier: TopK, RandomK, Threshold or your own; the same on every rank.
            op: that of the optimizer: hvd.Average or hvd.Sum.
            dense: which tensors go dense, by Horovod's own allreduce: WhenCheaper() or
                Never().
            values: how values travel: Float32(), or Sign(), which takes half the bytes;
                unless given as the sparsifier is made for.
            prefix: of the names of collectives: letters, digits, and any of . _ / -.
                Optimizers that work at the same time need different ones.
            process_set: the one that is given to the optimizer, if any.
            timeout_s: seconds in which nothing moves after which to give up and shut
                Horovod down; a warning is logged at 60.
            undo: keep a copy of every residual, so that `discard` can bring it back:
                memory of the gradients' size, and one pass more over it.

        Raises:
            TypeError: sparsifier can not select.
            ValueError: an argument is out of range.
            RuntimeError: Keras is version 3, which Horovod does not serve.
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        _check_prefix(prefix)
        _refuse_keras_3()
        hvd = _horovod()
        self._process_set = process_set
        padded = fixed_density(sparsifier) is None
        self._exchange = GraphExchange(self._group, padded=padded)
        self._path = GradientPath(
            sparsifier,
            self._exchange,
            op=op,
            dense=dense,
            values=values,
            undo=undo,
        )
        self._prefix = prefix
        self._dense: dict[str, Admitted] = {}  # what Horovod reduces without us
        self._names = VariableNames()
        self._numbered: dict[str, int] = {}  # what graphs carry in place of names
        self._called: list[str] = []  # by that number
        self._owners: dict[int, int] = {}  # by id of an optimizer that lives
        self._owned = 0
        self._adviser = Adviser(advise, sparsifier)
        self._lock = threading.RLock()  # TensorFlow calls from several threads
        self._watchdog = Watchdog(
            timeout_s,
            rank=hvd.rank,
            shutdown=hvd.shutdown,
            # the graph gathers at once what was sent, so nobody else is waited for
            waiting=hvd.is_initialized,
        )
        weakref.finalize(self, self._watchdog.stop)
        self._flights = Flights(self._path, self._exchange, self._watchdog)
        self._eager: Step | None = None  # the one that runs without a graph

    def __repr__(self) -> str:
        """What was chosen."""
        return f"SparseCompressor({self._path.plan.configuration})"

    def __hash__(self) -> int:
        """By identity and by the optimizer that is made with it, if one is.

        Horovod keeps the function that calls a compressor in a dictionary, in whose
        keys the compressor is. Two optimizers must not find the same one: what it was
        traced with would tell the residuals of the first of them, for both.
        """
        return hash((id(self), self._owner(optimizer_in_the_making())))

    def __eq__(self, other: object) -> bool:
        """By identity."""
        return self is other

    # ------------------------------------------------------- traced, called by Horovod

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def compress(self, tensor: Tensor) -> tuple[Tensor, Context | After | None]:
        """Build the sending of a gradient; returns what Horovod is to reduce.

        Raises:
            ValueError: op, or the process set, is not that of the optimizer; nobody
                says whose gradient it is; a loss scale changes.
        """
        call = call_of(self, tensor)
        self._check_call(call.arguments)
        _check_loss_scale(call)
        if call.optimizer is not None:
            self._adviser.step(call.optimizer, self._exchange.rank, stacklevel=2)
        if tensor.dtype not in FLOATING:
            return tensor, None
        name, number, sources = self._identity(tensor, call)
        if sources is not None and sources.results is not None:
            return self._join(sources, tensor, sources.place(tensor))
        if self._goes_dense(name, tensor):
            if sources is not None:
                sources.dense.append(_place(tensor, call))
            return tensor, None
        step = (
            self._lone_step(name, tensor, call) if sources is None else self._step({})
        )
        payload, gathered = self._gather(step, number, name, tensor)
        receive = partial(self._receive_one, step, number, gathered, tensor)
        # depends on data, or it would be computed once and for all; used by nobody
        return tf.cast(payload[:1], tf.float32), Context(receive=receive)

    def _join(
        self, sources: Sources, tensor: Tensor, place: int
    ) -> tuple[Tensor, Context | After]:
        """A gradient of those that leave together, which is built already."""
        assert sources.results is not None
        if place not in sources.results:
            return tensor, After(sources)
        dummy = tf.cast(sources.payloads[place][:1], tf.float32)
        return dummy, Context(sources.results[place])

    def _gather(
        self, step: Step, number: Tensor, name: str, tensor: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Build the sending of one gradient, and the exchange."""
        unknown = not tensor.shape.is_fully_defined()
        send = partial(self._send, step, unknown)
        payload = python_node(send, [number, tensor], tf.uint8, [None])
        gathered = _horovod().allgather(
            payload,
            name=f"HorovodAllgather.{self._prefix}.{collective(name)}",
            ignore_name_scope=True,
            process_set=self._group(),
        )
        return payload, gathered

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def decompress(self, tensor: Tensor, ctx: Context | After | None) -> Tensor:
        """Build the receiving of the gradient that was sent.

        Raises:
            ExchangeError: when the graph runs: a peer disagrees, or raised, or Horovod
                was shut down; or whatever this rank raised while it sent. What was sent
                in this step is back in the residuals.
        """
        if ctx is None:
            return tensor
        if isinstance(ctx, After):
            results = list((ctx.sources.results or {}).values())
            with tf.control_dependencies([tf.identity(r) for r in results[:1]]):
                return tf.identity(tensor)  # not before it is known that none failed
        return ctx.receive() if ctx.result is None else ctx.result

    def _receive_one(
        self, step: Step, number: Tensor, gathered: Tensor, like: Tensor
    ) -> Tensor:
        receive = partial(self._receive_alone, step)
        return python_node(receive, [number, gathered], like.dtype, like.shape)

    def _leave_together(
        self, sources: Sources, names: Sequence[str], gradients: Sequence[Tensor]
    ) -> None:
        """Build the exchange of a whole step: no result is there before all are."""
        step = sources.step = self._step({})
        gathered: dict[int, Tensor] = {}
        sources.results = {}
        for place, gradient in floating(gradients):
            if self._goes_dense(names[place], gradient):
                sources.dense.append(place)
                continue
            sources.payloads[place], gathered[place] = self._gather(
                step, sources.numbers[place], names[place], gradient
            )
        if gathered:
            numbers = tf.gather(sources.numbers, list(gathered))
            likes = [gradients[place] for place in gathered]
            results = python_node(
                partial(self._receive, step),
                [numbers, *gathered.values()],
                [like.dtype for like in likes],
                [like.shape for like in likes],
            )
            sources.results = dict(zip(gathered, results, strict=True))

    def _step(self, gradients: Mapping[str, Any]) -> Step:
        return Step(self._flights, gradients)

    def _lone_step(self, name: str, tensor: Tensor, call: Call) -> Step:
        """Of gradients that leave one after the other, or of one alone."""
        if call.variables is None or not hasattr(tensor, "numpy"):
            return self._step({})
        if self._eager is None or not self._eager.awaits(name):
            scope = self._scope(call.optimizer)
            names = self._names.see(call.variables, scope, places_of(call.gradients))
            self._eager = self._step(
                {
                    names[place]: gradient.numpy
                    for place, gradient in floating(call.gradients)
                    if not self._goes_dense(names[place], gradient)
                }
            )
        return self._eager

    # ------------------------------------------------------------ run at every step

    def _identify(self, sources: Sources, description: Any) -> Array:
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
        self._forget()
        self._path.begin()
        names = self._names.named(description)
        for place in sources.dense:
            if (tensor := self._dense.get(names[place])) is not None:
                size = tensor.header.n * tensor.itemsize
                self.traffic.count(tensor, tensor.header.n, size, size)
        return np.array([self._number(name) for name in names], np.int64)

    def _send(self, step: Step, unknown: bool, number: Any, gradient: Array) -> Array:
        gradient = np.asarray(gradient)  # TensorFlow hands over a scalar as a number
        with self._lock:
            if number == _UNKNOWN:
                return step.excuse("", None)
            name = self._named(number)
            if unknown:
                self._path.plan.always_sparse.add(name)
            return step.send(name, gradient)

    def _receive(self, step: Step, numbers: Any, *gathered: Array) -> list[Array]:
        with self._lock:
            names = [self._named(n) for n in numbers if n != _UNKNOWN]
            return step.receive(names, gathered)

    def _receive_alone(self, step: Step, number: Any, gathered: Array) -> Array:
        with self._lock:
            return step.receive([self._named(number)], [gathered])[0]

    # ----------------------------------------------------------------- whose it is

    def _identity(self, tensor: Tensor, call: Call) -> tuple[str, Tensor, Any]:
        """Its name while tracing; what tells it when the graph runs; its companions.

        Raises:
            ValueError: neither Horovod nor the caller says whose gradient it is.
        """
        with self._lock:
            if call.variables is None:
                name = call.arguments.get("name")
                if name is None:
                    raise ValueError(
                        f"a gradient of shape {tensor.shape} belongs to no variable "
                        "that can be seen: hvd.allreduce(..., compression="
                        "SparseCompressor(...)) outside of an optimizer or a tape "
                        "needs name="
                    )
                shape = tuple(-1 if n is None else n for n in tensor.shape)
                name = self._names.see_tensor(str(name), shape)
                return name, tf.constant(self._number(name), tf.int64), None
            place = _place(tensor, call)
            scope = self._scope(call.optimizer)
            names = self._names.see(call.variables, scope, places_of(call.gradients))
            if hasattr(tensor, "numpy"):  # functions run eagerly: nothing is traced
                self._forget()
                number = tf.constant(self._number(names[place]), tf.int64)
                return names[place], number, None
            sources = self._sources_of(tensor.graph, call, scope, names)
            return names[place], sources.numbers[place], sources

    def _sources_of(
        self, graph: Any, call: Call, scope: str, names: Sequence[str]
    ) -> Sources:
        """Made once for all that leave together, outside of their branches."""
        variables, gradients = call.variables or [], call.gradients
        if not hasattr(graph, _SOURCES):
            setattr(graph, _SOURCES, [])
        known: list[Sources] = getattr(graph, _SOURCES)
        of = (self, sys.intern(scope), *variables)
        for sources in known:
            if sources.are(of, gradients):
                return sources
        sources = Sources(of, gradients)
        with graph.as_default(), tf.control_dependencies(None):
            description = self._names.describe(variables, scope)
            identify = partial(self._identify, sources)
            sources.numbers = python_node(identify, [description], tf.int64, [None])
        if self._always_exchanges(graph, gradients):
            with graph.as_default():
                self._leave_together(sources, names, gradients)
        known.append(sources)
        return sources

    def _always_exchanges(self, graph: Any, gradients: Sequence[Tensor]) -> bool:
        """Whether a graph can do so at once: Horovod may decide when it runs."""
        group = self._group()
        if os.environ.get("HOROVOD_ELASTIC") == "1" or not group.included():
            return False
        found = [gradient for _, gradient in floating(gradients)]
        return int(group.size()) > 1 and all(g.graph is graph for g in found)

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
        self._dense[name] = admitted
        return True

    def _number(self, name: str) -> int:
        if name not in self._numbered:
            self._numbered[name] = len(self._called)
            self._called.append(name)
        return self._numbered[name]

    def _named(self, number: Any) -> str:
        return self._called[int(number)]

    def _owner(self, optimizer: Any) -> int:
        """In the order in which they are made, which is that on every rank."""
        if optimizer is None:
            return 0
        owner = self._owners.get(id(optimizer))
        if owner is None:
            owner = self._owners[id(optimizer)] = self._owned
            self._owned += 1
            ours = weakref.ref(self)
            ends = weakref.finalize(optimizer, _end, ours, id(optimizer))
            ends.atexit = False
        return owner

    def _scope(self, optimizer: Any) -> str:
        return "" if optimizer is None else f"@{self._owner(optimizer)}"

    def _forget(self) -> None:
        for name in self._names.gone():
            tensor = self._path.plan.tensors.get(name)
            if tensor is not None and tensor.in_flight:
                continue
            self._path.residuals.forget(name)
            self._flights.forget(name)
            self._dense.pop(name, None)

    def _check_call(self, call: Mapping[str, Any]) -> None:
        hvd = _horovod()
        op = call.get("op")
        if op == hvd.Adasum:
            raise ValueError(
                "op=Adasum is not supported: it combines weights, not gradients; use "
                "op=hvd.Average or hvd.Sum"
            )
        if op is not None and op != self._path.plan.op:
            theirs = Op(op).name if op in (0, 1) else op
            raise ValueError(
                f"op must be that of the optimizer, {theirs}, got "
                f"{self._path.plan.op.name}: SparseCompressor(..., op=...)"
            )
        theirs = call.get("process_set")
        if theirs is not None and theirs is not self._group():
            raise ValueError(
                f"process_set must be that of the optimizer, {theirs}, got "
                f"{self._process_set}"
            )

    def _group(self) -> Any:
        if self._process_set is None:
            return _horovod().global_process_set
        return self._process_set

    @property
    def traffic(self) -> Traffic:
        """Bytes sent and received so far.

        Horovod reduces tensors that go dense itself: they are counted at the steps of
        those that go sparse, if there are any.
        """
        return self._path.traffic

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def discard(self) -> None:
        """Throw away what Horovod's tape has averaged last: it is used in no way.

        Residuals are what they were before, bitwise. Collective: every rank calls it
        before the next gradients. In a tf.function it is an operation, which runs where
        it stands; tf.cond decides whether. Keras optimizers exchange and update in one,
        so there is nothing in between to throw away.

        Raises:
            RuntimeError: undo=True was not given, or nothing was exchanged since the
                last time; from within a graph TensorFlow wraps it in an error of its
                own.
        """

        def run() -> None:
            with self._lock:
                self._path.residuals.discard()

        if tf.inside_function():
            tf.numpy_function(run, [], [])
        else:
            run()

    # ---------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """What this rank has not sent yet, as copies: save it beside the model.

        Returns:
            format, rank, size, configuration, step, and under "tensors", per name,
            shape, dtype, step and residual (a tf.Tensor; None where it goes dense).
        """
        gc.collect()  # ranks must agree on which variables live
        with self._lock:
            self._forget()
            state = self._path.residuals.state_dict()
            return as_tensors({**state, "variables": self._names.saved()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue, bitwise, where state_dict was called; each rank its own.

        Raises:
            ValueError: the state is of another rank, size, configuration or model.
        """
        gc.collect()
        with self._lock:
            self._forget()
            loaded = self._names.loaded(state)
            residuals = self._path.residuals
            residuals.load_state_dict(complete(loaded, residuals.state_dict()))
            self._names.adopt(loaded)
            self._flights.by_name.clear()
            self._eager = None
            self._watchdog.forget()


def _check_loss_scale(call: Call) -> None:
    """Residuals are in units of it; and a skipped step would not be noticed here."""
    for optimizer in (call.loss_scale, call.optimizer):
        if getattr(optimizer, "dynamic", False) and hasattr(optimizer, "loss_scale"):
            raise ValueError(
                "a LossScaleOptimizer under Horovod must not change its scale, or what "
                "was not sent would be out of proportion: LossScaleOptimizer("
                "hvd.DistributedOptimizer(...), dynamic=False, initial_scale=1024), or "
                "wrap a LossScaleOptimizer over plain MPI, which follows the scale"
            )


def _place(gradient: Tensor, call: Call) -> int:
    return next(p for p, other in enumerate(call.gradients) if other is gradient)


def _end(ours: "weakref.ref[SparseCompressor]", identity: int) -> None:
    """An optimizer is gone. The garbage collector calls this wherever it is."""
    compressor = ours()
    if compressor is not None:
        compressor._names.end(f"@{compressor._owners.pop(identity)}")
