"""The door for PyTorch over plain MPI, no Horovod needed.

One exchange a step, when the backward pass is over: `step()` gathers the gradients of
all parameters that require one, in the order of their names, so neither the order of
hooks nor a graph that changes from step to step matters. Gradients in host memory are
viewed as numpy arrays, never copied, and the result is written back into `p.grad`.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hvd_sparse.core.contracts import Average, Format, Op, Sparsifier
from hvd_sparse.core.indices import Indices
from hvd_sparse.core.routing import Dense, WhenCheaper
from hvd_sparse.core.traffic import Traffic
from hvd_sparse.core.values import Values
from hvd_sparse.mpi import SparseAllreduce
from hvd_sparse.torch.grad_scaler import refuse_before_exchange, refuse_unknown_scale
from hvd_sparse.torch.gradients import Gradients
from hvd_sparse.torch.parameters import NamedParameters, Parameters
from hvd_sparse.torch.states import as_tensors, on_host


def DistributedOptimizer(  # noqa: N802  # a constructor by name, as in Horovod
    optimizer: torch.optim.Optimizer,
    sparsifier: Sparsifier,
    *,
    named_parameters: NamedParameters | None = None,
    comm: Any = None,
    op: int = Average,
    dense: Dense = WhenCheaper(),  # noqa: B008  # frozen: one instance serves all
    values: Values | Format | None = None,
    indices: Indices | None = None,
    backward_passes_per_step: int = 1,
    timeout_s: float = 600,
    scaler: Any = None,
    undo: bool = False,
) -> Any:
    """Make an optimizer average sparsified gradients over MPI ranks before each step.

    The optimizer itself is changed, and returned: it stays an instance of its class,
    keeps its state and its learning-rate schedulers, and its state_dict is what it was.
    New are `synchronize`, `skip_synchronize`, `residual_state_dict`,
    `load_residual_state_dict`, `discard`, `traffic` and `close`.

    Several may hold one parameter. Each exchanges what the backward pass left in
    `p.grad`, and steps with its own result; `p.grad` is that of the last one. A result
    that was changed by hand when it was another optimizer's turn is a ValueError.

    Args:
        optimizer: any torch optimizer.
        sparsifier: TopK, RandomK, Threshold or your own; the same on every rank.
        named_parameters: model.named_parameters(), of the whole model, so that what
            add_param_group adds later has a name; names must be unique and cover what
            the optimizer holds. Without it parameters are named by their place.
        comm: an mpi4py communicator, a process group of torch.distributed, which
            needs no MPI, or one of hvd_sparse.loopback. Unless given all ranks: of
            torch.distributed where that is initialized, else MPI.COMM_WORLD.
        op: hvd_sparse.Average over the ranks of comm, or hvd_sparse.Sum.
        dense: which tensors go dense: WhenCheaper() or Never().
        values: how values travel: Float32(), Float16(), BFloat16(), Int8(), Int4(),
            Int2(), Sign(), or a Format of your own; unless given as the sparsifier
            is made for.
        indices: how indices travel: EliasFano(), some 2 + log2(n / k) bits each, or
            RawIndices(), 32 bits.
        backward_passes_per_step: how often you call backward() before step(). The
            gradient is their sum, as in Horovod. Since the exchange runs in step(),
            calling backward more often or less is no error.
        timeout_s: seconds to wait for peers in a step; a warning comes at 60.
        scaler: the GradScaler, where there is one, so that residuals follow its scale
            and a step that it skips leaves what was sent in them.
        undo: keep a copy of every residual, so that `discard` can bring it back: memory
            of the gradients' size, and one pass more over it.

    Returns:
        The same optimizer.

    Raises:
        TypeError: not an optimizer, or one that is distributed already,
            named_parameters are no pairs of a name and a tensor, or scaler can not be
            asked for its scale.
        ValueError: names are not unique, or missing; or this is one of several ranks
            of torchrun, and torch.distributed is not initialized.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {kind}")
    if isinstance(optimizer, _Distributed):
        raise TypeError("optimizer is distributed already; wrap it once")
    if backward_passes_per_step < 1:
        raise ValueError(
            "backward_passes_per_step must be at least 1, "
            f"got {backward_passes_per_step}"
        )
    parameters = Parameters(optimizer, named_parameters)
    reduce = SparseAllreduce(
        sparsifier,
        comm=comm,
        op=op,
        dense=dense,
        values=values,
        indices=indices,
        timeout_s=timeout_s,
        scaler=scaler,
        undo=undo,
    )
    distributed: Any = optimizer
    kind, given = type(optimizer), dict(vars(optimizer))
    distributed.__class__ = _distributed_class(kind)
    # a scheduler made earlier hides the class's step behind an attribute of the object
    vars(distributed).pop("step", None)
    try:
        gradients = Gradients(distributed, parameters, reduce, Op(op), scaler)
    except BaseException:  # the optimizer is what it was
        distributed.__class__ = kind
        vars(distributed).update(given)
        raise
    object.__setattr__(distributed, "_sparse", gradients)  # past one of its own
    return distributed


_COPIED = (
    "an optimizer that was copied or loaded was distributed and is not any more: give "
    "it to DistributedOptimizer again, or ranks will train by themselves"
)


class _Distributed:
    """What DistributedOptimizer adds, in front of the optimizer's own class."""

    _sparse: Gradients
    param_groups: list[dict[str, Any]]

    def _exchanged_step(
        self,
        own_step: Callable[..., Any],
        closure_place: int,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> Any:
        """Exchange the gradients, then the optimizer's own step.

        With a closure the exchange follows every call of it, and the loss it returns is
        averaged over ranks, so that line searches take the same turns everywhere.
        """
        state, turns = self._sparse, self._sparse.turns
        self._opt_called = True  # what a scheduler's own wrapper would note
        given: dict[Any, Any] = {**dict(enumerate(arguments)), **options}
        place = "closure" if "closure" in options else closure_place
        closure = given.get(place)
        if callable(closure):

            def exchanged() -> Any:
                turns.synchronized = False
                with torch.enable_grad(), state.reported():
                    loss = closure()
                if turns.synchronized:  # by the closure, to clip them say
                    return state.mean_loss(loss)
                return state.exchange(loss)

            turns.synchronized = False
            given[place] = exchanged
            arguments = tuple(given[i] for i in range(len(arguments)))
            options = {name: given[name] for name in options}
            return self._own_step(own_step, arguments, options)
        if state.skip and not turns.synchronized:
            raise RuntimeError(
                "step() inside skip_synchronize() needs synchronize() after the last "
                "backward pass"
            )
        if turns.synchronized and not state.reduce.is_scaled:
            refuse_unknown_scale(depth=1)
        if not state.skip:
            if turns.synchronized:
                warnings.warn(
                    "step() after synchronize() uses the gradients as they are; say so "
                    "with `with optimizer.skip_synchronize():`",
                    stacklevel=3,
                )
            else:
                refuse_before_exchange(depth=1)
                state.exchange()
        state.unused.forget()  # not before a closure, which may throw them away
        return self._own_step(own_step, arguments, options)

    def _own_step(
        self,
        own_step: Callable[..., Any],
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> Any:
        turns = self._sparse.turns
        if turns.synchronized:
            self._sparse.refuse_unsent()
            turns.recall(self._sparse.parameters.held())
        turns.synchronized = False
        result = own_step(self, *arguments, **options)
        turns.synchronized = False  # by a closure, say
        turns.stepped()
        if not self._is_skipped():
            self._sparse.reduce.applied()
        return result

    def _is_skipped(self) -> bool:
        """Whether a GradScaler has left it to the optimizer's kernel to do nothing."""
        overflowed = getattr(self, "found_inf", None)
        return overflowed is not None and bool(overflowed)

    def zero_grad(self, *arguments: Any, **options: Any) -> None:
        """The optimizer's own; gradients to come are not synchronized."""
        self._sparse.turns.synchronized = False
        super().zero_grad(*arguments, **options)  # type: ignore[misc]

    def add_param_group(self, *arguments: Any, **options: Any) -> None:
        """The optimizer's own, on every rank alike; a peer without it is an error.

        Raises:
            ValueError: a parameter has no name; the group is not added.
        """
        groups = len(self.param_groups)
        super().add_param_group(*arguments, **options)  # type: ignore[misc]
        try:
            self._sparse.watch_backward(self._sparse.parameters.held())
        except ValueError:
            del self.param_groups[groups:]
            raise

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy, or a pickle, is of the optimizer's own class, and not distributed."""
        own_class = type(self).__mro__[2]
        return _blank, (own_class,), super().__getstate__()  # type: ignore[misc]

    def synchronize(self) -> None:
        """Exchange the gradients now, to clip them say; see skip_synchronize.

        Another backward pass without a step throws the results away, as with `discard`,
        if undo=True was given; else what was sent is lost, which is warned of once.
        """
        _uncompiled(self._sparse.synchronize)()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Inside, step() does not exchange: synchronize() has done so.

        Example:
            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with optimizer.skip_synchronize():
                optimizer.step()
        """
        self._sparse.skip = True
        try:
            yield
        finally:
            self._sparse.skip = False

    @property
    def traffic(self) -> Traffic:
        """Bytes sent and received so far."""
        return self._sparse.reduce.traffic

    def residual_state_dict(self) -> dict[str, Any]:
        """What this rank has not sent yet, as copies: save it beside the model.

        Returns:
            format, rank, size, configuration, step, and under "tensors", per name,
            shape, dtype, step and residual (a tensor; None where it goes dense);
            under "parameters" the shapes of all that the optimizer holds, under
            "kinds" which gradients are sparse.
        """
        state = as_tensors(self._sparse.reduce.state_dict())
        kinds = dict(self._sparse.kinds)
        return {**state, "parameters": self._sparse.shapes(), "kinds": kinds}

    def load_residual_state_dict(self, state: dict[str, Any]) -> None:
        """Continue, bitwise, where residual_state_dict was called; each rank its own.

        Raises:
            ValueError: the state is of another rank, size, configuration or model.
        """
        here, saved = self._sparse.shapes(), state["parameters"]
        for name in sorted({*here, *saved}):
            if saved.get(name) != here.get(name):
                raise ValueError(
                    f"{name}: state has shape {saved.get(name)}, expected "
                    f"{here.get(name)} (None: no such parameter)"
                )
        self._sparse.reduce.load_state_dict(on_host(state))
        self._sparse.kinds = dict(state["kinds"])

    def discard(self) -> None:
        """Throw this step's gradients away, in place of a step of the optimizer.

        Residuals are what they were before, bitwise. Collective: every rank calls it
        between its backward pass and the next one, after `synchronize` or without: then
        this takes part in the exchange first, since peers may wait. A rank that makes
        no backward pass calls `synchronize`, which takes part with zeros, and then
        this. Gradients are the results: zero them afterwards.

        Example:
            optimizer.synchronize()
            if torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 100:
                optimizer.discard()  # the same norm, and so the same way, on every rank
            else:
                with optimizer.skip_synchronize():
                    optimizer.step()

        Raises:
            RuntimeError: undo=True was not given, there was neither a backward pass nor
                an exchange since the last time, or step() has applied the results.
            ExchangeError: a peer disagrees, raised, or did not arrive in time.
        """
        self._sparse.discard()

    def close(self) -> None:
        """Free the private communicator; collective."""
        self._sparse.close()


def _blank(kind: Any) -> Any:
    """A copy whose state is still to come."""
    warnings.warn(_COPIED, stacklevel=2)
    return kind.__new__(kind)


def _distributed_class(kind: Any) -> type:
    """A class in front of the optimizer's own, whose step takes what its own takes."""
    own_step, closure_place = kind.step, _closure_place(kind.step)

    @functools.wraps(own_step)
    def step(self: _Distributed, *arguments: Any, **options: Any) -> Any:
        exchanged = _uncompiled(self._exchanged_step)
        return exchanged(own_step, closure_place, arguments, options)

    # torch wraps a step that lacks these marks: schedulers, and profiling hooks, which
    # the optimizer's own step runs already
    marked: Any = step
    marked._wrapped_by_lr_sched = marked.hooked = True
    described = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (_Distributed, kind), {"step": step, **described})


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but torch.compile does not look into it: it can trace no exchange."""
    compiler: Any = torch.compiler
    if not compiler.is_compiling():  # then callers' frames are those we expect
        return function
    disabled: Callable[..., Any] = compiler.disable(function)
    return disabled


def _closure_place(step: Callable[..., Any]) -> int:
    """Of the closure among a step's arguments without self; torch has it first."""
    try:
        names = list(inspect.signature(step).parameters)[1:]
    except ValueError:  # not written in Python
        return 0
    return names.index("closure") if "closure" in names else 0
