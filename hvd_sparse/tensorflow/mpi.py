"""The doors for TensorFlow over plain MPI, no Horovod needed: Keras 2 and Keras 3.

One exchange a step: all gradients of a step go through one Python function on host
memory (tf.numpy_function), in a tf.function or eagerly. Residuals live there and not in
the graph, so that retracing changes nothing. They belong to variables, whichever of
them a step has gradients of (see `names`).
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import tensorflow as tf

from hvd_sparse.core.configuration import describe
from hvd_sparse.core.contracts import Average, ExchangeError, Format, Op, Sparsifier
from hvd_sparse.core.indices import Indices
from hvd_sparse.core.routing import Dense, WhenCheaper
from hvd_sparse.core.traffic import Traffic
from hvd_sparse.core.values import Values
from hvd_sparse.mpi import SparseAllreduce
from hvd_sparse.tensorflow.gradients import Gradients
from hvd_sparse.tensorflow.horovod_frames import is_saving, is_serializing
from hvd_sparse.tensorflow.loss_scales import (
    check_scale,
    refuse_outside,
    skips_steps,
    times,
)
from hvd_sparse.tensorflow.marking import expecting, marked
from hvd_sparse.tensorflow.stores import Configuration, join, leave

Tensor = Any  # TensorFlow has no types
_do_not_convert: Any = tf.autograph.experimental.do_not_convert


def _make(sparsifier: Sparsifier, comm: Any, op: int, **options: Any) -> Gradients:
    """Args: options: of SparseAllreduce."""
    reduce = SparseAllreduce(sparsifier, comm=comm, op=op, **options)
    return Gradients(reduce, Op(op))


def _shared(sparsifier: Sparsifier, comm: Any, op: int, **options: Any) -> Gradients:
    """Those of earlier tapes of the same communicator and configuration."""
    make = partial(_make, sparsifier, comm, op, **options)
    parts = describe(sparsifier, "sparsifier"), op, describe(options, "an option")
    return join(comm, Configuration(type(comm), *parts), make)


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
        values: Values | Format | None = None,
        indices: Indices | None = None,
        timeout_s: float = 600,
        undo: bool = False,
    ) -> None:
        """Wrap a tape; every rank of comm must call this.

        Args:
            tape: a tf.GradientTape; it can be used as before.
            sparsifier: TopK, RandomK, Threshold or your own; the same on every rank.
            comm: an mpi4py communicator, or one of hvd_sparse.loopback; MPI.COMM_WORLD
                unless given.
            op: hvd_sparse.Average over the ranks of comm, or hvd_sparse.Sum.
            dense: which tensors go dense: WhenCheaper() or Never().
            values: how values travel: Float32(), Float16(), BFloat16(), Int8(), Int4(),
                Int2(), Sign(), or a Format of your own; unless given as the sparsifier
                is made for.
            indices: how indices travel: EliasFano(), some 2 + log2(n / k) bits each, or
                RawIndices(), 32 bits.
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
        self._sparse = _shared(
            sparsifier,
            self._comm,
            op,
            dense=dense,
            values=values,
            indices=indices,
            timeout_s=timeout_s,
            undo=undo,
        )
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
    values: Values | Format | None = None,
    indices: Indices | None = None,
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
        comm: an mpi4py communicator, or one of hvd_sparse.loopback; MPI.COMM_WORLD
            unless given.
        op: hvd_sparse.Average over the ranks of comm, or hvd_sparse.Sum.
        dense: which tensors go dense: WhenCheaper() or Never().
        values: how values travel: Float32(), Float16(), BFloat16(), Int8(), Int4(),
            Int2(), Sign(), or a Format of your own; unless given as the sparsifier
            is made for.
        indices: how indices travel: EliasFano(), some 2 + log2(n / k) bits each, or
            RawIndices(), 32 bits.
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
    options: dict[str, Any] = {
        "op": op,
        "dense": dense,
        "values": values,
        "indices": indices,
        "timeout_s": timeout_s,
    }
    again = partial(DistributedOptimizer, sparsifier=sparsifier, comm=comm, **options)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    own = {**names, "_plain": kind, "_again": staticmethod(again)}
    distributed = type(kind.__name__, (_mixin(optimizer), kind), own)
    sparse = _make(sparsifier, comm, **options)
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
        with expecting():
            copy = plain.from_config(config, **options)
        return cls._again(copy)

    def get_config(self) -> Any:
        """The optimizer's own; it does not say how to distribute a copy."""
        config: Any = super().get_config()  # type: ignore[misc]
        saving = is_saving()
        if saving and not self._warned:
            object.__setattr__(self, "_warned", True)
            warnings.warn(_SAVED, stacklevel=2)
        return marked(config) if saving or is_serializing() else config

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
