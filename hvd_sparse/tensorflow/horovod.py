"""The door for TensorFlow and Keras under an unmodified Horovod.

    import horovod.tensorflow.keras as hvd, hvd_sparse.tensorflow as sparse

    compression = sparse.SparseCompressor(sparse.TopK(density=0.001))
    optimizer = hvd.DistributedOptimizer(optimizer, compression=compression)

Horovod calls `compress` and `decompress` while it traces a graph. So they build what
the graph does at every step:

    gradient -> send -> allgather -> receive -> mean

`send` and `receive` are Python functions on host memory (tf.numpy_function) that take
the gradient along its path; residuals live there, not in the graph, and survive every
retracing. What Horovod itself is given to reduce is not used by anybody, so that
TensorFlow prunes it: it costs nothing.
"""

import sys
import threading
import weakref
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from hvd_sparse.advice import Adviser
from hvd_sparse.core.contracts import (
    Average,
    ExchangeError,
    Op,
    PayloadError,
    Sparsifier,
)
from hvd_sparse.core.path import Flight, GradientPath
from hvd_sparse.core.path import Tensor as Admitted
from hvd_sparse.core.payload import padded_bytes, split
from hvd_sparse.core.routing import Dense, WhenCheaper
from hvd_sparse.core.traffic import Traffic
from hvd_sparse.tensorflow.advice import advise
from hvd_sparse.tensorflow.buffers import Buffers
from hvd_sparse.tensorflow.states import as_tensors
from hvd_sparse.watchdog import Watchdog

Array = npt.NDArray[Any]
Tensor = Any  # tf.Tensor: TensorFlow has no types

_KERAS = (tf.keras.optimizers.Optimizer, tf.keras.optimizers.legacy.Optimizer)
_FLOATING = (tf.float16, tf.bfloat16, tf.float32, tf.float64)
_FRAMES = 16  # between compress and Horovod's allreduce, where AutoGraph converted it


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


def _refuse_keras_3() -> None:
    version = str(getattr(tf.keras, "__version__", "2"))  # TensorFlow 2.15 has none
    if version.startswith("3"):
        raise RuntimeError(
            f"Horovod 0.28.1 never reduces the gradients of Keras {version}: use "
            "plain MPI (hvd_sparse.tensorflow.DistributedOptimizer), or Keras 2 "
            "(pip install tf_keras, TF_USE_LEGACY_KERAS=1)"
        )


class Context(NamedTuple):
    """What decompress must know of a gradient that compress sent.

    Attributes:
        name: of the tensor.
        gathered: the payloads of all ranks.
        gradient: for its shape and dtype.
    """

    name: str
    gathered: Tensor
    gradient: Tensor


class SparseCompressor:
    """Sends what is worth it of each gradient; for `compression=` of Horovod.

    One compressor serves one optimizer, or the tapes of one training loop. With a
    single process Horovod calls no compressor, and training is dense.
    """

    def __init__(
        self,
        sparsifier: Sparsifier,
        *,
        op: int = Average,
        dense: Dense = WhenCheaper(),  # noqa: B008  # frozen: one instance serves all
        prefix: str = "hvd_sparse",
        process_set: Any = None,
        timeout_s: float = 600,
    ) -> None:
        """Decide what to send; no communication yet.

        Args:
            sparsifier: TopK, RandomK, Threshold or your own; the same on every rank.
            op: that of the optimizer: hvd.Average or hvd.Sum.
            dense: which tensors go dense, by Horovod's own allreduce: WhenCheaper() or
                Never().
            prefix: of the names of collectives. Optimizers that work at the same time
                need different ones.
            process_set: the one that is given to the optimizer, if any.
            timeout_s: seconds in which nothing moves after which to give up and shut
                Horovod down; a warning is logged at 60.

        Raises:
            TypeError: sparsifier can not select.
            ValueError: an argument is out of range.
            RuntimeError: Keras is version 3, which Horovod does not serve.
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        _refuse_keras_3()
        hvd = _horovod()
        self._process_set = process_set
        padded = getattr(sparsifier, "density", None) is None
        self._exchange = _GraphExchange(self._group, padded=padded)
        self._path = GradientPath(sparsifier, self._exchange, op=op, dense=dense)
        self._prefix = prefix
        self._flights: dict[str, Flight] = {}
        self._outs = Buffers()
        self._dense: dict[str, Admitted] = {}  # what Horovod reduces without us
        self._counts: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._owner: weakref.ref[Any] | None = None
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

    def __repr__(self) -> str:
        """What was chosen."""
        return f"SparseCompressor({self._path.configuration})"

    def __hash__(self) -> int:
        """By identity. Horovod looks a compressor up when an optimizer is made."""
        self._check_owner()
        return id(self)

    def __eq__(self, other: object) -> bool:
        """By identity."""
        return self is other

    # ------------------------------------------------------- traced, called by Horovod

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def compress(self, tensor: Tensor) -> tuple[Tensor, Context | None]:
        """Build the sending of a gradient; returns what Horovod is to reduce.

        Raises:
            ValueError: op, or the process set, is not that of the optimizer.
        """
        self._check_call()
        optimizer = _optimizer_that_calls()
        if optimizer is not None:
            self._adviser.step(optimizer, self._exchange.rank, stacklevel=2)
        if tensor.dtype not in _FLOATING:
            return tensor, None
        name = self._name(tensor)
        if not tensor.shape.is_fully_defined():
            # as sparse_as_dense makes them: the running graph knows, when it is too
            # late to choose Horovod's own allreduce
            self._path.always_sparse.add(name)
        elif (admitted := self._admit(name, tensor)).dense:
            self._dense[name] = admitted
            return tensor, None
        payload = _python(partial(self._send, name), [tensor], tf.uint8, [None])
        gathered = _horovod().allgather(
            payload,
            name=f"HorovodAllgather.{self._prefix}.{name}",
            ignore_name_scope=True,
            process_set=self._group(),
        )
        # depends on data, or it would be computed once and for all; used by nobody
        return tf.cast(payload[:1], tf.float32), Context(name, gathered, tensor)

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def decompress(self, tensor: Tensor, ctx: Context | None) -> Tensor:
        """Build the receiving of the gradient that was sent.

        Raises:
            ExchangeError: when the graph runs: a peer disagrees, or Horovod was shut
                down. What was sent is back in the residual.
        """
        if ctx is None:
            return tensor
        gradient = ctx.gradient
        receive = partial(self._receive, ctx.name)
        return _python(receive, [ctx.gathered], gradient.dtype, gradient.shape)

    # ------------------------------------------------------------ run at every step

    def _send(self, name: str, gradient: Array) -> Array:
        gradient = np.asarray(gradient)  # TensorFlow hands over a scalar as a number
        with self._lock:
            tensor = self._path.admit(name, gradient)
            if tensor.in_flight:  # its result was never asked for
                self._path.recall(self._flights[name])
            self._watchdog.sent(name, tensor.header.step)
            self._flights[name] = self._path.send(name, gradient)
            return self._exchange.outgoing(name)

    def _receive(self, name: str, gathered: Array) -> Array:
        with self._lock:
            flight = self._flights[name]
            self._exchange.deliver(name, gathered)
            out = self._outs.take(name, flight.tensor.shape, flight.tensor.array_dtype)
            try:
                self._path.receive(flight, out)
            except BaseException as error:
                self._path.recall(flight)
                self._watchdog.forget()  # the rest of the graph will not run
                if self._watchdog.gave_up:
                    raise ExchangeError(self._watchdog.gave_up) from error
                raise
            finally:
                self._watchdog.received(name)
            self._count(flight.tensor.header.step)
            return out

    def _count(self, step: int) -> None:
        """What Horovod reduces without us is sent as often as the first of ours."""
        if step <= self.traffic.steps:
            return
        self.traffic.steps = step
        for tensor in self._dense.values():
            n = tensor.header.n
            self._path.count(tensor, n, n * tensor.itemsize, n * tensor.itemsize)

    # ---------------------------------------------------------------------- facts

    def _name(self, tensor: Tensor) -> str:
        """Its place among the gradients of its graph, which retracing does not change.

        Outside of any graph, the name that the caller gave to Horovod.
        """
        if hasattr(tensor, "numpy"):
            name = _caller_of(self).get("name")
            if name is None:
                raise ValueError(
                    "hvd.allreduce(..., compression=SparseCompressor(...)) outside of "
                    "an optimizer, a tape or a tf.function needs name="
                )
            return str(name)
        count = self._counts.get(tensor.graph, 0)
        self._counts[tensor.graph] = count + 1
        return f"gradient{count}"

    def _admit(self, name: str, tensor: Tensor) -> Admitted:
        """Shape and dtype are checked while tracing, memory is not needed for that."""
        like = np.broadcast_to(tensor.dtype.as_numpy_dtype(0), tuple(tensor.shape))
        with self._lock:
            return self._path.admit(name, like)

    def _check_call(self) -> None:
        call = _caller_of(self)
        hvd = _horovod()
        op = call.get("op")
        if op == hvd.Adasum:
            raise ValueError(
                "op=Adasum is not supported: it combines weights, not gradients; use "
                "op=hvd.Average or hvd.Sum"
            )
        if op is not None and op != self._path.op:
            theirs = Op(op).name if op in (0, 1) else op
            raise ValueError(
                f"op must be that of the optimizer, {theirs}, got "
                f"{self._path.op.name}: SparseCompressor(..., op=...)"
            )
        theirs = call.get("process_set")
        if theirs is not None and theirs is not self._group():
            raise ValueError(
                f"process_set must be that of the optimizer, {theirs}, got "
                f"{self._process_set}"
            )

    def _check_owner(self) -> None:
        """Two optimizers with one compressor would share residuals unnoticed."""
        frame = sys._getframe(2)
        for _ in range(_FRAMES):
            owner = frame.f_locals.get("self")
            if isinstance(owner, tf.keras.optimizers.Optimizer) or hasattr(
                owner, "_allreduce_grads"
            ):
                break
            if frame.f_back is None:
                return
            frame = frame.f_back
        else:
            return
        if hasattr(owner, "_tape") or isinstance(owner, tf.GradientTape):
            return  # a loop makes a new tape at every step
        known = None if self._owner is None else self._owner()
        if known is not None and known is not owner:
            raise ValueError(
                "one SparseCompressor serves one optimizer, got a second: give each "
                "its own, with another prefix"
            )
        self._owner = weakref.ref(owner)

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

    # ---------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """What this rank has not sent yet, as copies: save it beside the model.

        Returns:
            format, rank, size, configuration, step, and under "tensors", per name,
            shape, dtype, step and residual (a tf.Tensor; None where it goes dense).
        """
        with self._lock:
            return as_tensors(self._path.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue, bitwise, where state_dict was called; each rank its own.

        Raises:
            ValueError: the state is of another rank, size, configuration or model.
        """
        with self._lock:
            self._flights.clear()
            self._watchdog.forget()
            self._path.load_state_dict(state)


class _GraphExchange:
    """Holds payloads while the graph, which is not ours to run, gathers them."""

    weight = 1
    uneven = False

    def __init__(self, group: Any, *, padded: bool) -> None:
        self._group = group
        self._padded = padded
        self._sent: dict[str, Array] = {}
        self._gathered: dict[str, Array] = {}

    @property
    def rank(self) -> int:
        return int(self._group().rank())

    @property
    def size(self) -> int:
        return int(self._group().size())

    def start(self, name: str, payload: Array) -> str:
        self._sent[name] = payload
        return name

    def outgoing(self, name: str) -> Array:
        payload = self._sent[name]
        if not self._padded:
            return payload.copy()  # the path reuses its memory
        padding = np.zeros(padded_bytes(payload.size) - payload.size, np.uint8)
        return np.concatenate([payload, padding])

    def deliver(self, name: str, gathered: Array) -> None:
        self._gathered[name] = gathered

    def finish(self, handle: str) -> list[Array]:
        gathered = _aligned(self._gathered.pop(handle))
        payloads = split(gathered, padded=self._padded)
        if len(payloads) != self.size:
            raise PayloadError(f"{len(payloads)} payloads, expected {self.size}")
        return payloads

    def start_dense(self, name: str, gradient: Array) -> Any:
        raise NotImplementedError("Horovod reduces dense tensors itself")

    def finish_dense(self, handle: Any) -> tuple[Array, int]:
        raise NotImplementedError("Horovod reduces dense tensors itself")


def _aligned(buffer: Array) -> Array:
    """At an address that is a multiple of 8."""
    return buffer if buffer.ctypes.data % 8 == 0 else buffer.copy()


def _python(function: Any, inputs: list[Tensor], dtype: Any, shape: Any) -> Tensor:
    """A Python function on host memory as a node of the graph."""
    with tf.device("/cpu:0"):
        result = tf.numpy_function(function, inputs, dtype, stateful=True)
    result.set_shape(shape) if not hasattr(result, "numpy") else None
    return result


def _optimizer_that_calls() -> Any:
    """The Keras optimizer whose method calls compress; None for a tape.

    However far: between the two TensorFlow traces a function, and AutoGraph converts.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, _KERAS):
            return owner
        frame = frame.f_back
    return None


def _caller_of(compressor: SparseCompressor) -> dict[str, Any]:
    """The arguments of the Horovod function that calls, as far as they are found."""
    frame = sys._getframe(2)
    for _ in range(_FRAMES):
        local = frame.f_locals
        if local.get("compression") is compressor and "op" in local:
            return local
        if frame.f_back is None:
            break
        frame = frame.f_back
    return {}
