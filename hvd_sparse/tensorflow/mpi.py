"""The doors for TensorFlow over plain MPI, no Horovod needed: Keras 2 and Keras 3.

One exchange a step: all gradients of a step go through one Python function on host
memory (tf.numpy_function), in a tf.function or eagerly. Residuals live there and not in
the graph, so that retracing changes nothing.
"""

import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from hvd_sparse.advice import Adviser
from hvd_sparse.broadcast import Broadcast, Described
from hvd_sparse.core.contracts import Average, Op, Sparsifier
from hvd_sparse.core.routing import Dense, WhenCheaper
from hvd_sparse.core.traffic import Traffic
from hvd_sparse.mpi import Blob, SparseAllreduce
from hvd_sparse.tensorflow.advice import advise
from hvd_sparse.tensorflow.buffers import Buffers
from hvd_sparse.tensorflow.states import as_tensors

Array = npt.NDArray[Any]
Tensor = Any  # TensorFlow has no types
_do_not_convert: Any = tf.autograph.experimental.do_not_convert


class _Slices(NamedTuple):
    """Where the two parts of tf.IndexedSlices are among the inputs."""

    name: str
    values: int
    indices: int
    dense_bytes: int
    shape: tuple[int | None, ...]


class Gradients:
    """The gradients of one model on their way through SparseAllreduce."""

    def __init__(self, reduce: SparseAllreduce, op: Op) -> None:
        """Args: reduce: carries them. op: for gradients that came sparse."""
        self.reduce = reduce
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
    def exchange(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The mean or sum over ranks of every gradient; None stays None.

        Tensors are named by their place, so that every rank, and every trace, must
        have them in the same order. Gradients that came as tf.IndexedSlices stay so.
        """
        inputs: list[Tensor] = []
        dense: dict[str, int] = {}
        slices: list[_Slices] = []
        for place, gradient in enumerate(gradients):
            name = f"gradient{place}"
            if isinstance(gradient, tf.IndexedSlices):
                slices.append(_as_slices(name, gradient, len(inputs)))
                inputs += [gradient.values, gradient.indices]
            elif gradient is not None:
                dense[name] = len(inputs)
                inputs.append(tf.convert_to_tensor(gradient))
        if not inputs:
            return list(gradients)

        def run(*arrays: Array) -> list[Array]:
            return self._run(arrays, dense, slices)

        with tf.device("/cpu:0"):
            results = tf.numpy_function(run, inputs, [t.dtype for t in inputs])
        results = results if isinstance(results, list | tuple) else [results]
        return _rebuilt(gradients, results)

    def _run(
        self, arrays: Sequence[Array], dense: dict[str, int], slices: list[_Slices]
    ) -> list[Array]:
        with self._lock:
            given = {name: arrays[place] for name, place in dense.items()}
            outs = {n: self._outs.take(n, g.shape, g.dtype) for n, g in given.items()}
            blobs = {
                s.name: _pack(arrays[s.values], arrays[s.indices], s) for s in slices
            }
            self.reduce.start(given, outs, blobs)
            self.reduce.finish()
            results = list(arrays)
            for name, place in dense.items():
                results[place] = outs[name]
            for s in slices:
                gathered = self.reduce.gathered[s.name]
                values, indices = _unpack(gathered, arrays[s.values], arrays[s.indices])
                if self._op is Op.Average:
                    values = values * values.dtype.type(1 / self.reduce.size)
                results[s.values], results[s.indices] = values, indices
            return results


def _as_slices(name: str, gradient: Any, place: int) -> _Slices:
    shape = tuple(gradient.shape)
    known = None not in shape
    size = int(np.prod(shape)) * gradient.values.dtype.size if known else 1
    return _Slices(name, place, place + 1, size, shape)


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
    sparsifier: Sparsifier, comm: Any, op: int, dense: Dense, timeout_s: float
) -> Gradients:
    reduce = SparseAllreduce(
        sparsifier, comm=comm, op=op, dense=dense, timeout_s=timeout_s
    )
    return Gradients(reduce, Op(op))


# ------------------------------------------------------------------------------ tape


class DistributedGradientTape:
    """A tf.GradientTape whose gradients are averaged over MPI ranks.

    Made once, since it keeps what was not sent, and entered at every step:

        tape = DistributedGradientTape(tf.GradientTape(), TopK(density=0.001))
        for x, y in batches:
            with tape:
                loss = loss_of(model(x), y)
            gradients = tape.gradient(loss, model.trainable_variables)
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
    ) -> None:
        """Wrap a tape; every rank of comm must call this.

        Args:
            tape: a tf.GradientTape; it can be used as before.
            sparsifier: TopK, RandomK, Threshold or your own; the same on every rank.
            comm: an mpi4py communicator; MPI.COMM_WORLD unless given.
            op: hvd_sparse.Average over the ranks of comm, or hvd_sparse.Sum.
            dense: which tensors go dense: WhenCheaper() or Never().
            timeout_s: seconds to wait for peers in a step; a warning comes at 60.

        Raises:
            TypeError: tape is no tf.GradientTape.
            ValueError: op or timeout_s is out of range.
        """
        if not isinstance(tape, tf.GradientTape):
            kind = type(tape).__name__
            raise TypeError(f"tape must be a tf.GradientTape, got {kind}")
        self._tape = tape
        self._sparse = _make(sparsifier, comm, op, dense, timeout_s)

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
        gradients = self._tape.gradient(target, sources, output_gradients, **options)
        flat = tf.nest.flatten(gradients, expand_composites=False)
        return tf.nest.pack_sequence_as(gradients, self._sparse.exchange(flat))

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
        return as_tensors(self._sparse.reduce.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue, bitwise, where state_dict was called; each rank its own.

        Raises:
            ValueError: the state is of another rank, size, configuration or model.
        """
        self._sparse.reduce.load_state_dict(state)

    def close(self) -> None:
        """Free the private communicator; collective."""
        self._sparse.reduce.close()


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
    optimizer inside it: a rank that skips a step alone would stall the others.

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
    """
    if isinstance(optimizer, _Distributed):
        raise TypeError("optimizer is distributed already; wrap it once")
    kind = type(optimizer)
    if not hasattr(optimizer, "apply_gradients"):
        raise TypeError(f"optimizer must be a Keras optimizer, got {kind.__name__}")
    keras_3 = hasattr(optimizer, "stateless_apply")
    mixin: type = _DistributedKeras3 if keras_3 else _DistributedKeras2
    distributed = type(
        kind.__name__,
        (mixin, kind),
        {"__module__": kind.__module__, "__qualname__": kind.__qualname__},
    )
    sparse = _make(sparsifier, comm, op, dense, timeout_s)
    # past __setattr__, which would track these as parts of the model
    object.__setattr__(optimizer, "_sparse", sparse)
    object.__setattr__(optimizer, "__class__", distributed)
    return optimizer


class _Distributed:
    """What DistributedOptimizer adds, in front of the optimizer's own class."""

    _sparse: Gradients

    @property
    def traffic(self) -> Traffic:
        """Bytes sent and received so far."""
        return self._sparse.reduce.traffic

    def residual_state_dict(self) -> dict[str, Any]:
        """What this rank has not sent yet; as of DistributedGradientTape."""
        return as_tensors(self._sparse.reduce.state_dict())

    def load_residual_state_dict(self, state: dict[str, Any]) -> None:
        """Continue, bitwise, where residual_state_dict was called.

        Raises:
            ValueError: the state is of another rank, size, configuration or model.
        """
        self._sparse.reduce.load_state_dict(state)

    def close(self) -> None:
        """Free the private communicator; collective."""
        self._sparse.reduce.close()


class _DistributedKeras2(_Distributed):
    @_do_not_convert  # type: ignore[untyped-decorator]
    def apply_gradients(self, grads_and_vars: Any, *args: Any, **options: Any) -> Any:
        """Exchange the gradients, then the optimizer's own."""
        self._sparse.advise(self)
        pairs = list(grads_and_vars)
        exchanged = self._sparse.exchange([gradient for gradient, _ in pairs])
        replaced = [(g, v) for g, (_, v) in zip(exchanged, pairs, strict=True)]
        return super().apply_gradients(replaced, *args, **options)  # type: ignore[misc]


class _DistributedKeras3(_Distributed):
    @_do_not_convert  # type: ignore[untyped-decorator]
    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        """Exchange the gradients, then the optimizer's own."""
        self._sparse.advise(self)
        exchanged = self._sparse.exchange(list(grads))
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
