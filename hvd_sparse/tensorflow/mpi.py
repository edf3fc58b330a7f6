"""The doors for TensorFlow over plain MPI, no Horovod needed: Keras 2 and Keras 3.

One exchange a step: all gradients of a step go through one Python function on host
memory (tf.numpy_function), in a tf.function or eagerly. Residuals live there and not in
the graph, so that retracing changes nothing. They belong to variables, whichever of
them a step has gradients of (see `names`).
"""

import gc
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from hvd_sparse.advice import Adviser
from hvd_sparse.core.configuration import describe
from hvd_sparse.core.contracts import Average, ExchangeError, Op, Sparsifier
from hvd_sparse.core.interrupts import Uninterrupted
from hvd_sparse.core.routing import Dense, WhenCheaper
from hvd_sparse.core.traffic import Traffic
from hvd_sparse.mpi import Blob, SparseAllreduce
from hvd_sparse.tensorflow.advice import advise
from hvd_sparse.tensorflow.buffers import Buffers
from hvd_sparse.tensorflow.horovod_frames import is_saving
from hvd_sparse.tensorflow.loss_scales import (
    check_scale,
    is_finite,
    refuse_outside,
    skips_steps,
    times,
)
from hvd_sparse.tensorflow.marking import marked
from hvd_sparse.tensorflow.names import VariableNames
from hvd_sparse.tensorflow.states import as_tensors, complete
from hvd_sparse.tensorflow.stores import Configuration, join, leave
from hvd_sparse.transport.mpi.broadcast import Broadcast, Described

Array = npt.NDArray[Any]
Tensor = Any  # TensorFlow has no types
_do_not_convert: Any = tf.autograph.experimental.do_not_convert


class _Slices(NamedTuple):
    """Where the two parts of tf.IndexedSlices are among the inputs."""

    values: int
    indices: int
    dense_bytes: int
    shape: tuple[int | None, ...]


class Gradients:
    """The gradients of one model on their way through SparseAllreduce."""

    def __init__(self, reduce: SparseAllreduce, op: Op) -> None:
        """Args: reduce: carries them. op: for gradients that came sparse."""
        self.reduce = reduce
        self.names = VariableNames()
        self._adviser = Adviser(advise, reduce.sparsifier)
        self._op = op
        self._outs = Buffers()
        self._lock = threading.Lock()

    def advise(self, optimizer: Any) -> None:
        """Before its first step, say what spoils the quality, if anything does."""
        try:
            self._adviser.step(optimizer, self.reduce.rank, stacklevel=3)
        except Exception as error:  # the user makes errors of warnings
            self.reduce.report(error)
            raise

    @_do_not_convert  # type: ignore[untyped-decorator]
    def exchange(
        self,
        gradients: Sequence[Tensor],
        sources: Sequence[Any],
        *,
        skips: bool = False,
    ) -> list[Tensor]:
        """The mean or sum over ranks of every gradient; None stays None.

        Args:
            gradients: those that came as tf.IndexedSlices stay so.
            sources: the variable, or tensor, of each.
            skips: the caller will not use results that are not finite.

        Raises:
            ValueError: which residual is whose can not be told (see `names`).
        """
        self.see(sources)
        inputs: list[Tensor] = []
        parts: list[int | _Slices] = []  # where the parts of each are among the inputs
        present = []
        for gradient, source in zip(gradients, sources, strict=True):
            if gradient is None:
                continue
            present.append(source)
            if isinstance(gradient, tf.IndexedSlices):
                parts.append(_as_slices(gradient, len(inputs)))
                inputs += [gradient.values, gradient.indices]
            else:
                parts.append(len(inputs))
                inputs.append(tf.convert_to_tensor(gradient))

        def run(description: Any, *arrays: Array) -> list[Array]:
            with self._lock:
                return self._run(description, arrays, parts, skips)

        with tf.device("/cpu:0"):
            # also where there is none: a peer that has some must hear of it
            inputs = [self.names.describe(present), *inputs]
            results = tf.numpy_function(run, inputs, [t.dtype for t in inputs])
        return _rebuilt(gradients, results[1:])

    def see(self, sources: Sequence[Any]) -> None:
        """Name variables in this order, which must be that of all ranks."""
        try:
            self.names.see(sources)
        except ValueError as error:  # peers may know better
            self.reduce.report(error)
            raise

    def _run(
        self,
        description: Any,
        arrays: Sequence[Array],
        parts: list[int | _Slices],
        skips: bool,
    ) -> list[Any]:
        named = dict(zip(self._named(description), parts, strict=True))
        dense = {n: p for n, p in named.items() if isinstance(p, int)}
        slices = {n: p for n, p in named.items() if isinstance(p, _Slices)}
        given = {name: arrays[place] for name, place in dense.items()}
        outs = {n: self._outs.take(n, g.shape, g.dtype) for n, g in given.items()}
        blobs = {
            n: _pack(arrays[s.values], arrays[s.indices], s) for n, s in slices.items()
        }

        def unused(outs: Mapping[str, Array]) -> bool:
            rows = (self._rows(n, s, arrays)[0] for n, s in slices.items())
            return skips and not is_finite(chain(outs.values(), rows))

        with Uninterrupted():
            self.reduce.start(given, outs, blobs)
            self.reduce.finish(unused)
        results = list(arrays)
        for name, place in dense.items():
            results[place] = outs[name]
        for name, s in slices.items():
            results[s.values], results[s.indices] = self._rows(name, s, arrays)
        return [description, *results]

    def _rows(
        self, name: str, of: _Slices, arrays: Sequence[Array]
    ) -> tuple[Array, Array]:
        """Values and indices of tf.IndexedSlices, of all ranks."""
        gathered = self.reduce.gathered[name]
        values, indices = _unpack(gathered, arrays[of.values], arrays[of.indices])
        if self._op is Op.Average:
            values = values * values.dtype.type(1 / self.reduce.size)
        return values, indices

    def _named(self, description: Any) -> list[str]:
        self._forget()
        try:
            return self.names.named(description)
        except ValueError as error:
            self.reduce.report(error)
            raise

    @_do_not_convert  # type: ignore[untyped-decorator]
    def discard(self) -> None:
        """Throw the last exchange away; in a graph, when that runs."""

        def run() -> None:
            with self._lock:
                self.reduce.discard()

        if tf.inside_function():
            tf.numpy_function(run, [], [])
        else:
            run()

    # ---------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """What this rank has not sent yet, and the variables it is of."""
        gc.collect()  # ranks must agree on which variables live
        with self._lock:
            self._forget()
            state = self.reduce.state_dict()
            return as_tensors({**state, "variables": self.names.saved()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: ValueError: it is of another rank, size, configuration or model."""
        gc.collect()
        with self._lock:
            self._forget()
            loaded = self.names.loaded(state)
            self.reduce.load_state_dict(complete(loaded, self.reduce.state_dict()))
            self.names.adopt(loaded)

    def _forget(self) -> None:
        for name in self.names.gone():
            self.reduce.forget(name)
            self._outs.forget(name)


def _as_slices(gradient: Any, place: int) -> _Slices:
    shape = tuple(gradient.shape)
    known = None not in shape
    size = int(np.prod(shape)) * gradient.values.dtype.size if known else 1
    return _Slices(place, place + 1, size, shape)


def _rebuilt(gradients: Sequence[Tensor], results: Sequence[Tensor]) -> list[Tensor]:
    """The results in the places and kinds of the gradients."""
    rest = iter(results)
    rebuilt: list[Tensor] = []
    for gradient in gradients:
        if gradient is None:
            rebuilt.append(None)
        elif isinstance(gradient, tf.IndexedSlices):
            values, indices = next(rest), next(rest)
            values = tf.ensure_shape(values, [None, *gradient.values.shape[1:]])
            indices = tf.ensure_shape(indices, [None])
            rebuilt.append(tf.IndexedSlices(values, indices, gradient.dense_shape))
        else:
            rebuilt.append(tf.ensure_shape(next(rest), gradient.shape))
    return rebuilt


def _pack(values: Array, indices: Array, slices: _Slices) -> Blob:
    count = np.array([values.shape[0]], np.int64).view(np.uint8)
    parts = [count, _bytes(indices), _bytes(values)]
    used = sum(part.size for part in parts)
    return Blob(
        np.concatenate([*parts, np.zeros(-used % 8, np.uint8)]),
        tuple(-1 if n is None else n for n in slices.shape),
        values.dtype.name,
        slices.dense_bytes,
        values.size,
    )


def _bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _unpack(blobs: list[Array], values: Array, indices: Array) -> tuple[Array, Array]:
    """The rows of all ranks behind each other, rank 0 first."""
    all_values, all_indices = [], []
    width = int(np.prod(values.shape[1:])) * values.itemsize
    for blob in blobs:
        count = int(blob[:8].view(np.int64)[0])
        middle = 8 + count * indices.itemsize
        all_indices.append(np.frombuffer(blob[8:middle].tobytes(), indices.dtype))
        rows = np.frombuffer(blob[middle : middle + count * width].tobytes(), np.uint8)
        all_values.append(rows.view(values.dtype).reshape(count, *values.shape[1:]))
    return np.concatenate(all_values), np.concatenate(all_indices)


def _make(
    sparsifier: Sparsifier,
    comm: Any,
    op: int,
    dense: Dense,
    timeout_s: float,
    undo: bool = False,
) -> Gradients:
    reduce = SparseAllreduce(
        sparsifier, comm=comm, op=op, dense=dense, timeout_s=timeout_s, undo=undo
    )
    return Gradients(reduce, Op(op))


def _shared(
    sparsifier: Sparsifier,
    comm: Any,
    op: int,
    dense: Dense,
    timeout_s: float,
    undo: bool,
) -> Gradients:
    """Those of earlier tapes of the same communicator and configuration."""
    make = partial(_make, sparsifier, comm, op, dense, timeout_s, undo)
    parts = describe(sparsifier, "sparsifier"), op, describe(dense, "dense")
    return join(comm, Configuration(type(comm), *parts, timeout_s, undo), make)


def _world() -> Any:
    try:
        from mpi4py import MPI
    except ImportError:
        return None  # the exchange says what is missing
    return MPI.COMM_WORLD


# ------------------------------------------------------------------------------ tape


class DistributedGradientTape:
    """A tf.GradientTape whose gradients are averaged over MPI ranks.

        tape = DistributedGradientTape(tf.GradientTape(), TopK(density=0.001))
        for x, y in batches:
            with tape:
                loss = loss_of(model(x), y)
            gradients = tape.gradient(loss, model.trainable_variables)

    What was not sent belongs to the variable, whichever others are among the sources,
    and to all tapes of the same communicator with the same arguments: one that is made
    anew in every step continues where the last one stopped, and `traffic` and states
    are those of all of them. Ranks must agree on what has a gradient: what one of them
    leaves out is an error on all. Sources that are tensors, which a tape watches, are
    others in every step: their residuals go by their place among such sources.
    """

    def __init__(
        self,
        tape: tf.GradientTape,
        sparsifier: Sparsifier,
        *,
        comm: Any = None,
        op: int = Average,
        dense: Dense = WhenCheaper(),  # noqa: B008  # frozen: one instance serves all
        timeout_s: float = 600,
        undo: bool = False,
    ) -> None:
        """Wrap a tape; every rank of comm must call this.

        Args:
            tape: a tf.GradientTape; it can be used as before.
            sparsifier: TopK, RandomK, Threshold or your own; the same on every rank.
            comm: an mpi4py communicator; MPI.COMM_WORLD unless given.
            op: hvd_sparse.Average over the ranks of comm, or hvd_sparse.Sum.
            dense: which tensors go dense: WhenCheaper() or Never().
            timeout_s: seconds to wait for peers in a step; a warning comes at 60.
            undo: keep a copy of every residual, so that `discard` can bring it back:
                memory of the gradients' size, and one pass more over it.

        Raises:
            TypeError: tape is no tf.GradientTape.
            ValueError: op or timeout_s is out of range.
        """
        if not isinstance(tape, tf.GradientTape):
            kind = type(tape).__name__
            raise TypeError(f"tape must be a tf.GradientTape, got {kind}")
        self._tape = tape
        self._comm = _world() if comm is None else comm
        self._sparse = _shared(sparsifier, self._comm, op, dense, timeout_s, undo)
        self._closed = False

    def __enter__(self) -> "DistributedGradientTape":
        """Record, as the tape does."""
        self._tape.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop to record."""
        self._tape.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        """Whatever else a tape has: watch, stop_recording, jacobian ..."""
        return getattr(self._tape, name)

    @_do_not_convert  # type: ignore[untyped-decorator]
    def gradient(
        self, target: Tensor, sources: Any, output_gradients: Any = None, **options: Any
    ) -> Any:
        """The tape's gradients, averaged over ranks, in the structure of sources.

        Raises:
            ExchangeError: a peer disagrees, raised, or did not arrive in time; from
                within a graph TensorFlow wraps it in an error of its own.
        """
        if self._closed:
            raise ExchangeError("this exchange can not be used any more: it was closed")
        gradients = self._tape.gradient(target, sources, output_gradients, **options)
        flat = tf.nest.flatten(gradients, expand_composites=False)
        of = tf.nest.flatten(sources, expand_composites=False)
        if not of:
            return gradients
        return tf.nest.pack_sequence_as(gradients, self._sparse.exchange(flat, of))

    def discard(self) -> None:
        """Throw the gradients of the last `gradient` away: they are used in no way.

        Residuals are what they were before, bitwise. Collective: every rank calls it,
        before the next `gradient` of a tape that shares them. In a tf.function it is an
        operation, which runs where it stands; tf.cond decides whether.

        Raises:
            RuntimeError: undo=True was not given, or nothing was exchanged since the
                last time; from within a graph TensorFlow wraps it in an error of its
                own.
        """
        self._sparse.discard()

    @property
    def traffic(self) -> Traffic:
        """Bytes sent and received so far."""
        return self._sparse.reduce.traffic

    def state_dict(self) -> dict[str, Any]:
        """What this rank has not sent yet, as copies: save it beside the model.

        Returns:
            format, rank, size, configuration, step, and under "tensors", per name,
            shape, dtype, step and residual (a tf.Tensor; None where it goes dense).
        """
        return self._sparse.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue, bitwise, where state_dict was called; each rank its own.

        Raises:
            ValueError: the state is of another rank, size, configuration or model.
        """
        self._sparse.load_state_dict(state)

    def close(self) -> None:
        """Free the private communicator, and what was not sent; collective.

        Once all tapes that share it are closed: those of the same communicator with the
        same arguments.
        """
        if not self._closed and leave(self._comm, self._sparse):
            self._sparse.reduce.close()
        self._closed = True


# ------------------------------------------------------------------------- optimizer


def DistributedOptimizer(  # noqa: N802  # a constructor by name, as in Horovod
    optimizer: Any,
    sparsifier: Sparsifier,
    *,
    comm: Any = None,
    op: int = Average,
    dense: Dense = WhenCheaper(),  # noqa: B008  # frozen: one instance serves all
    timeout_s: float = 600,
) -> Any:
    """Make a Keras optimizer average sparsified gradients before it applies them.

    The optimizer itself is changed, and returned: it stays an instance of its class and
    keeps its variables. New are `residual_state_dict`, `load_residual_state_dict`,
    `traffic` and `close`. With loss scaling wrap the LossScaleOptimizer, not the
    optimizer inside it, which a rank would skip alone: residuals follow its scale, and
    steps are skipped on all ranks or on none. In a saved model the optimizer is the
    plain one, of which saving and Keras's own load_model warn: `load_model` of this
    package brings it back distributed.

    Args:
        optimizer: of Keras 2 (also legacy) or Keras 3.
        sparsifier: TopK, RandomK, Threshold or your own; the same on every rank.
        comm: an mpi4py communicator; MPI.COMM_WORLD unless given.
        op: hvd_sparse.Average over the ranks of comm, or hvd_sparse.Sum.
        dense: which tensors go dense: WhenCheaper() or Never().
        timeout_s: seconds to wait for peers in a step; a warning comes at 60.

    Returns:
        The same optimizer.

    Raises:
        TypeError: not a Keras optimizer, or one that is distributed already.
        ValueError: an argument is out of range, or the initial_scale of a
            LossScaleOptimizer of Keras 3 is no power of 2.
    """
    if isinstance(optimizer, _Distributed):
        raise TypeError("optimizer is distributed already; wrap it once")
    kind = type(optimizer)
    if not hasattr(optimizer, "apply_gradients"):
        raise TypeError(f"optimizer must be a Keras optimizer, got {kind.__name__}")
    if hasattr(optimizer, "stateless_apply"):
        check_scale(optimizer)
    options = {"comm": comm, "op": op, "dense": dense, "timeout_s": timeout_s}
    again = partial(DistributedOptimizer, sparsifier=sparsifier, **options)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    own = {**names, "_plain": kind, "_again": staticmethod(again)}
    distributed = type(kind.__name__, (_mixin(optimizer), kind), own)
    sparse = _make(sparsifier, comm, op, dense, timeout_s)
    # past __setattr__, which would track these as parts of the model
    object.__setattr__(optimizer, "_sparse", sparse)
    object.__setattr__(optimizer, "__class__", distributed)
    optimizer._see_built()
    return optimizer


def _mixin(optimizer: Any) -> type:
    if hasattr(optimizer, "stateless_apply"):
        return _DistributedKeras3
    return _DistributedKeras2 if hasattr(optimizer, "build") else _DistributedLegacy


_SAVED = (
    "the optimizer in the saved model is not distributed: load the model by "
    "hvd_sparse.tensorflow.load_model(path, sparsifier), or give its optimizer to "
    "DistributedOptimizer again, or ranks will train by themselves"
)


class _Distributed:
    """What DistributedOptimizer adds, in front of the optimizer's own class."""

    _sparse: Gradients
    _plain: type
    _again: Callable[[Any], Any]
    _warned = False

    @classmethod
    def from_config(cls, config: Any, **options: Any) -> Any:
        """A copy: distributed too, with residuals of its own; collective."""
        plain: Any = cls._plain
        return cls._again(plain.from_config(config, **options))

    def get_config(self) -> Any:
        """The optimizer's own; it does not say how to distribute a copy."""
        config: Any = super().get_config()  # type: ignore[misc]
        if not is_saving():
            return config
        if not self._warned:
            object.__setattr__(self, "_warned", True)
            warnings.warn(_SAVED, stacklevel=2)
        return marked(config)

    def _see_built(self) -> None:
        """Variables that it was built with have an order that all ranks know."""

    @property
    def traffic(self) -> Traffic:
        """Bytes sent and received so far."""
        return self._sparse.reduce.traffic

    def residual_state_dict(self) -> dict[str, Any]:
        """What this rank has not sent yet; as of DistributedGradientTape."""
        return self._sparse.state_dict()

    def load_residual_state_dict(self, state: dict[str, Any]) -> None:
        """Continue, bitwise, where residual_state_dict was called.

        Raises:
            ValueError: the state is of another rank, size, configuration or model.
        """
        self._sparse.load_state_dict(state)

    def close(self) -> None:
        """Free the private communicator; collective."""
        self._sparse.reduce.close()


class _DistributedLegacy(_Distributed):
    @_do_not_convert  # type: ignore[untyped-decorator]
    def apply_gradients(self, grads_and_vars: Any, *args: Any, **options: Any) -> Any:
        """Exchange the gradients, then the optimizer's own."""
        refuse_outside(self)
        self._sparse.advise(self)
        pairs = list(grads_and_vars)
        gradients, sources = [g for g, _ in pairs], [v for _, v in pairs]
        skips = skips_steps(self)
        exchanged = self._sparse.exchange(gradients, sources, skips=skips)
        replaced = [(g, v) for g, (_, v) in zip(exchanged, pairs, strict=True)]
        return super().apply_gradients(replaced, *args, **options)  # type: ignore[misc]


class _DistributedKeras2(_DistributedLegacy):
    def build(self, var_list: Any) -> Any:
        """The optimizer's own; its order of variables is that of all ranks."""
        self._sparse.see(var_list)
        return super().build(var_list)  # type: ignore[misc]


class _DistributedKeras3(_Distributed):
    def build(self, variables: Any) -> Any:
        """The optimizer's own; its order of variables is that of all ranks."""
        self._sparse.see(variables)
        return super().build(variables)  # type: ignore[misc]

    def _see_built(self) -> None:
        self._sparse.see(getattr(self, "_trainable_variables", None) or [])

    @_do_not_convert  # type: ignore[untyped-decorator]
    def apply_gradients(self, grads_and_vars: Any) -> Any:
        """The optimizer's own; peers may have gradients where this rank has none."""
        pairs = list(grads_and_vars)
        if not pairs:
            self._sparse.exchange([], [])
            known: Any = self  # a Keras optimizer
            return known.iterations
        return super().apply_gradients(pairs)  # type: ignore[misc]

    @_do_not_convert  # type: ignore[untyped-decorator]
    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        """Exchange the gradients, then the optimizer's own."""
        refuse_outside(self)
        self._sparse.advise(self)
        known: Any = self  # a Keras optimizer
        variables = trainable_variables
        if variables is None:
            variables = known._trainable_variables
        if skips_steps(self):
            if not known.built:  # or there is no scale yet
                known.build(variables)
            scale = tf.convert_to_tensor(known.dynamic_scale)
            unscaled = times(grads, 1 / scale)
            exchanged = self._sparse.exchange(unscaled, list(variables), skips=True)
            exchanged = times(exchanged, scale)
        else:
            exchanged = self._sparse.exchange(list(grads), list(variables))
        return super().apply(exchanged, trainable_variables)  # type: ignore[misc]


# ----------------------------------------------------------------------- start alike


def broadcast_variables(
    variables: Iterable[Any], *, root: int = 0, comm: Any = None, timeout_s: float = 600
) -> None:
    """Overwrite variables with those of one rank.

    Beside the model it takes memory for two variables at most.

    Args:
        variables: tf.Variable or Keras variables; the same shapes and dtypes in the
            same order on every rank.
        root: the rank whose values all take.
        comm: an mpi4py communicator; MPI.COMM_WORLD unless given.
        timeout_s: seconds to wait for peers without anything that arrives.

    Raises:
        TypeError: a variable holds strings.
        ValueError: root is no rank of comm.
        ExchangeError: a peer has other variables, and nothing has moved; or it did not
            arrive in time.
    """
    with Broadcast(root, comm, timeout_s) as broadcast:
        with broadcast.reported():
            held = list(variables)
            described = [_describe(place, v) for place, v in enumerate(held)]
        broadcast.agree(described)
        for variable, (name, shape, dtype) in zip(held, described, strict=True):
            # one at a time: what TensorFlow has must be copied, and copied back
            array = (
                np.ascontiguousarray(variable.numpy())
                if broadcast.is_root
                else np.empty(shape, tf.as_dtype(dtype).as_numpy_dtype)
            )
            broadcast.send(name, _bytes(array))
            broadcast.wait(name)
            if not broadcast.is_root:
                variable.assign(array)


def _describe(place: int, variable: Any) -> Described:
    """By its place: Keras numbers the names of what was made before it."""
    value = np.asarray(variable.numpy())
    name = f"variable{place}"
    if value.dtype.kind in "OSU":
        raise TypeError(f"{name}: must be numbers, got {variable.dtype}")
    return Described(name, value.shape, value.dtype.name)
