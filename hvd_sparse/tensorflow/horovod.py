"""The door for TensorFlow and Keras under an unmodified Horovod.

    import horovod.tensorflow.keras as hvd, hvd_sparse.tensorflow as sparse

    compression = sparse.SparseCompressor(sparse.TopK(density=0.001))
    optimizer = hvd.DistributedOptimizer(optimizer, compression=compression)

Horovod calls `compress` and `decompress` while it traces a graph. So they build what
the graph does at every step (see `tracing`, and `running` for what it calls then):

    gradient -> send -> allgather -> receive -> mean

`send` and `receive` are Python functions on host memory (tf.numpy_function) that take
the gradient along its path; residuals live there, not in the graph, and survive every
retracing. Horovod's graph may be traced with one variable and run with another of its
shape, so one more function, in front of them, finds out which variables they are for
(see `names` and `horovod_frames`). What Horovod itself is given to reduce is not used
by anybody, so that TensorFlow prunes it: it costs nothing.
"""

import gc
import re
import weakref
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from hvd_sparse.advice import Adviser
from hvd_sparse.core.contracts import Average, Format, Op, Sparsifier
from hvd_sparse.core.indices import Indices
from hvd_sparse.core.path import GradientPath
from hvd_sparse.core.routing import Dense, WhenCheaper
from hvd_sparse.core.sparsifiers import fixed_density
from hvd_sparse.core.traffic import Traffic
from hvd_sparse.core.values import Values
from hvd_sparse.tensorflow.advice import advise
from hvd_sparse.tensorflow.gathers import GraphExchange, horovod
from hvd_sparse.tensorflow.horovod_frames import (
    Call,
    call_of,
    optimizer_in_the_making,
)
from hvd_sparse.tensorflow.identities import Identities
from hvd_sparse.tensorflow.nodes import FLOATING, run_after_exchanges
from hvd_sparse.tensorflow.states import as_tensors, complete
from hvd_sparse.tensorflow.step import Flights
from hvd_sparse.tensorflow.tracing import Receive, Tracing
from hvd_sparse.watchdog import Watchdog

Tensor = Any  # tf.Tensor: TensorFlow has no types


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
        values: Values | Format | None = None,
        indices: Indices | None = None,
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
            values: how values travel: Float32(), Float16(), BFloat16(), Int8(), Int4(),
                Int2(), Sign(), or a Format of your own; unless given as the sparsifier
                is made for.
            indices: how indices travel: EliasFano(), some 2 + log2(n / k) bits each, or
                RawIndices(), 32 bits.
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
        hvd = horovod()
        self._process_set = process_set
        padded = fixed_density(sparsifier) is None
        self._exchange = GraphExchange(process_set, prefix, padded=padded)
        self._path = GradientPath(
            sparsifier,
            self._exchange,
            op=op,
            dense=dense,
            values=values,
            indices=indices,
            undo=undo,
        )
        self._adviser = Adviser(advise, sparsifier)
        watchdog = Watchdog(
            timeout_s,
            rank=hvd.rank,
            shutdown=hvd.shutdown,
            # the graph gathers at once what was sent, so nobody else is waited for
            waiting=hvd.is_initialized,
        )
        self._flights = Flights(self._path, self._exchange, watchdog)
        weakref.finalize(self._flights, watchdog.stop)  # graphs have them, too
        self._identities = Identities()
        self._tracing = Tracing(self._flights, self._identities)

    def __repr__(self) -> str:
        """What was chosen."""
        return f"SparseCompressor({self._path.plan.configuration})"

    def __hash__(self) -> int:
        """By identity and by the optimizer that is made with it, if one is.

        Horovod keeps the function that calls a compressor in a dictionary, in whose
        keys the compressor is. Two optimizers must not find the same one: what it was
        traced with would tell the residuals of the first of them, for both.
        """
        return hash((id(self), self._identities.owner(optimizer_in_the_making())))

    def __eq__(self, other: object) -> bool:
        """By identity."""
        return self is other

    # ------------------------------------------------------- traced, called by Horovod

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def compress(self, tensor: Tensor) -> tuple[Tensor, Receive | None]:
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
        return self._tracing.send(tensor, call)

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def decompress(self, tensor: Tensor, ctx: Receive | None) -> Tensor:
        """Build the receiving of the gradient that was sent.

        Raises:
            ExchangeError: when the graph runs: a peer disagrees, or raised, or Horovod
                was shut down; or whatever this rank raised while it sent. What was sent
                in this step is back in the residuals.
        """
        return tensor if ctx is None else ctx(tensor)

    def _check_call(self, call: Mapping[str, Any]) -> None:
        hvd = horovod()
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
        if theirs is not None and theirs is not self._exchange.group:
            raise ValueError(
                f"process_set must be that of the optimizer, {theirs}, got "
                f"{self._process_set}"
            )

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
            with self._flights.lock:
                self._path.residuals.discard()

        run_after_exchanges(self._flights, run)

    # ---------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """What this rank has not sent yet, as copies: save it beside the model.

        Returns:
            format, rank, size, configuration, step, and under "tensors", per name,
            shape, dtype, step and residual (a tf.Tensor; None where it goes dense).
        """
        gc.collect()  # ranks must agree on which variables live
        names = self._identities.names
        with self._flights.lock:
            self._flights.forget(names.gone())
            state = self._path.residuals.state_dict()
            return as_tensors({**state, "variables": names.saved()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue, bitwise, where state_dict was called; each rank its own.

        Raises:
            ValueError: the state is of another rank, size, configuration or model.
        """
        gc.collect()
        names = self._identities.names
        with self._flights.lock:
            self._flights.forget(names.gone())
            loaded = names.loaded(state)
            residuals = self._path.residuals
            residuals.load_state_dict(complete(loaded, residuals.state_dict()))
            names.adopt(loaded)
            self._tracing.forget()


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
