"""The gradients of one model in an exchange over MPI, dense ones and tf.IndexedSlices.

All of a step go through one Python function on host memory (tf.numpy_function), in a
tf.function or eagerly.
"""

import gc
import threading
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from hvd_sparse.advice import Adviser
from hvd_sparse.core.contracts import Op
from hvd_sparse.core.interrupts import Uninterrupted
from hvd_sparse.mpi import Blob, SparseAllreduce
from hvd_sparse.tensorflow.advice import advise
from hvd_sparse.tensorflow.buffers import Buffers
from hvd_sparse.tensorflow.loss_scales import is_finite
from hvd_sparse.tensorflow.names import VariableNames
from hvd_sparse.tensorflow.nodes import note_exchanged, run_after_exchanges
from hvd_sparse.tensorflow.states import as_tensors, complete

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
            note_exchanged(self, results[0])
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

        run_after_exchanges(self, run)

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
    # ranks may have indices of different dtypes
    parts = [count, _bytes(indices.astype(np.int64)), _bytes(values)]
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
        middle = 8 + 8 * count
        all_indices.append(np.frombuffer(blob[8:middle].tobytes(), np.int64))
        rows = np.frombuffer(blob[middle : middle + count * width].tobytes(), np.uint8)
        all_values.append(rows.view(values.dtype).reshape(count, *values.shape[1:]))
    return np.concatenate(all_values), np.concatenate(all_indices).astype(indices.dtype)
