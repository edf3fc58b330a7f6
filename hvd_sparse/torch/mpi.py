"""The door for PyTorch over plain MPI, no Horovod needed.

One exchange a step, when the backward pass is over: `step()` gathers the gradients of
all parameters that require one, in the order of their names, so neither the order of
hooks nor a graph that changes from step to step matters. Gradients in host memory are
viewed as numpy arrays, never copied, and the result is written back into `p.grad`.
"""

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hvd_sparse.advice import Adviser
from hvd_sparse.core.contracts import Average, Op, Sparsifier
from hvd_sparse.core.formats import Values
from hvd_sparse.core.interrupts import Uninterrupted
from hvd_sparse.core.routing import Dense, WhenCheaper
from hvd_sparse.core.scaling import is_finite
from hvd_sparse.core.traffic import Traffic
from hvd_sparse.mpi import Blob, SparseAllreduce
from hvd_sparse.torch.advice import advise
from hvd_sparse.torch.parameters import NamedParameters, Parameters
from hvd_sparse.torch.scaling import (
    refuse_before_exchange,
    refuse_unknown_scale,
    refuse_unscaled,
)
from hvd_sparse.torch.sharing import give_own_memory
from hvd_sparse.torch.states import as_tensors, on_host, viewed
from hvd_sparse.torch.turns import Turns
from hvd_sparse.torch.unused import Unused, looked_at

Array = npt.NDArray[Any]
Tensor = torch.Tensor

_LOSS = "(loss)"
_KINDS = ("", "dense", "rows")  # of gradients; of none first
# what says so: its place in the first byte
_WORDS = {k: np.array([i] + [0] * 7, np.uint8) for i, k in enumerate(_KINDS)}


def DistributedOptimizer(  # noqa: N802  # a constructor by name, as in Horovod
    optimizer: torch.optim.Optimizer,
    sparsifier: Sparsifier,
    *,
    named_parameters: NamedParameters | None = None,
    comm: Any = None,
    op: int = Average,
    dense: Dense = WhenCheaper(),  # noqa: B008  # frozen: one instance serves all
    values: Values | None = None,
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
        comm: an mpi4py communicator; MPI.COMM_WORLD unless given.
        op: hvd_sparse.Average over the ranks of comm, or hvd_sparse.Sum.
        dense: which tensors go dense: WhenCheaper() or Never().
        values: how values travel: Float32(), or Sign(), which takes half the bytes;
            unless given as the sparsifier is made for.
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
        ValueError: names are not unique, or missing.
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
        timeout_s=timeout_s,
        scaler=scaler,
        undo=undo,
    )
    distributed: Any = optimizer
    distributed.__class__ = _distributed_class(type(optimizer))
    # a scheduler made earlier hides the class's step behind an attribute of the object
    vars(distributed).pop("step", None)
    gradients = _Gradients(distributed, parameters, reduce, Op(op), scaler)
    object.__setattr__(distributed, "_sparse", gradients)  # past one of its own
    return distributed


class _Gradients:
    """The gradients of one optimizer on their way through SparseAllreduce."""

    def __init__(
        self,
        optimizer: Any,
        parameters: Parameters,
        reduce: SparseAllreduce,
        op: Op,
        scaler: Any,
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.op = op
        self.scaler = scaler
        self.parameters = parameters
        self.reduce = reduce
        self.turns = Turns(parameters)
        self.skip = False
        self._adviser = Adviser(advise, reduce.sparsifier)
        self.kinds: dict[str, str] = {}  # dense or rows, the same on every rank
        self.unused = Unused()
        self._hooks: dict[str, Any] = {}
        weakref.finalize(self, _remove, self._hooks).atexit = False
        self.watch_backward(parameters.held())

    def exchange(self, loss: Any = None) -> Any:
        """Replace every gradient by its mean over ranks; returns the mean loss.

        Which parameters have a gradient, and of which kind, only some ranks may know:
        those that used them. So the exchange carries, for each parameter of which none
        is expected, the kind of its gradient, and a second one, where there are any,
        the gradients. That every rank holds the same parameters, and has frozen the
        same ones, is agreed on with it.
        """
        with self._reported():
            optimizer: Any = self._optimizer()
            refuse_unscaled(self.scaler, optimizer)
            self._adviser.step(optimizer, self.reduce.rank, stacklevel=4)
            held = self.parameters.held()
            self.watch_backward(held)
            self._throw_away(stacklevel=4)
            self.turns.begin(held)
        try:
            with Uninterrupted():  # also between the exchanges of a step
                return self._exchange(held, loss)
        finally:
            self.turns.end()

    def synchronize(self) -> None:
        """By the user, in whose hands the results are now."""
        self.exchange()
        self.turns.synchronized = True
        if self.reduce.is_scaled:  # the scaler says what becomes of them
            return
        held = self.parameters.held()
        for name in looked_at(n for n, p in held.items() if p.requires_grad):
            parameter = held[name]
            if parameter.grad is not None:
                self.unused.note(parameter, parameter.grad)

    def _throw_away(self, stacklevel: int) -> None:
        """The step before, if nothing became of it."""
        if self.turns.synchronized:  # no backward pass since
            self.unused.forget()
        elif self.unused.is_thrown_away():
            if self.reduce.can_discard:
                self.reduce.discard()
            else:
                self.unused.warn(stacklevel + 1)

    def _exchange(self, held: dict[str, Tensor], loss: Any) -> Any:
        with self._reported():
            give_own_memory(list(held.values()), self.turns.beside())
            expected = {
                n: p for n, p in held.items() if n in self.kinds and p.requires_grad
            }
            others = {n: _pack_kind(p) for n, p in held.items() if n not in expected}
            blobs = dict(others)
            if loss is not None:
                number = np.array([_number(loss)], np.float64)
                blobs[_LOSS] = Blob(number.view(np.uint8))
        gathered = self._exchange_gradients(expected, blobs)
        if loss is not None:
            loss = _mean_loss(loss, gathered[_LOSS])
        found = self._learn_kinds({name: gathered[name] for name in others})
        if found:
            late = {name: held[name] for name in found}
            self._exchange_gradients(late, {}, continues=True)
            self.reduce.traffic.steps -= 1  # of one step
        return loss

    def mean_loss(self, loss: Any) -> Any:
        """That of gradients that were exchanged before."""
        with self._reported():
            number = np.array([_number(loss)], np.float64)
        blobs = {_LOSS: Blob(number.view(np.uint8))}
        gathered = self._exchange_gradients({}, blobs, continues=True)
        self.reduce.traffic.steps -= 1  # of one step
        return _mean_loss(loss, gathered[_LOSS])

    def _exchange_gradients(
        self,
        parameters: dict[str, Tensor],
        blobs: dict[str, Blob],
        *,
        continues: bool = False,
    ) -> dict[str, list[Array]]:
        """One exchange; returns what was gathered of the blobs."""
        with self._reported():
            rows = {
                n: _sparse_gradient(p)
                for n, p in parameters.items()
                if self.kinds[n] == "rows"
            }
            gradients = {
                n: viewed(_dense_gradient(p))
                for n, p in parameters.items()
                if n not in rows
            }
            packed = {name: _pack_rows(gradient) for name, gradient in rows.items()}
        blobs = {**packed, **blobs}
        self.reduce.start(gradients, gradients, blobs, continues=continues)
        self.reduce.finish()
        gathered = self.reduce.gathered
        for name, own in rows.items():
            total = parameters[name].grad = self._sum_rows(own, gathered[name])
            if self.reduce.is_scaled and not is_finite(total.values()):
                self.reduce.overflow()
        return gathered

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """An error on the way into the exchange reaches the peers that wait in it."""
        try:
            yield
        except BaseException as error:  # Ctrl-C, too
            self.reduce.report(error)
            raise

    def _learn_kinds(self, told: dict[str, list[Array]]) -> list[str]:
        """Names that some rank has an unexpected gradient of, in one order."""
        found = []
        for name in sorted(told):
            codes = [code for blob in told[name] if (code := blob[0])]
            if codes:  # the lowest rank's word counts
                found.append(name)
                self.kinds.setdefault(name, _KINDS[codes[0]])
        return found

    def watch_backward(self, held: dict[str, Tensor]) -> None:
        """After a backward pass what was synchronized is not any more."""
        for name, parameter in held.items():
            if parameter.requires_grad and name not in self._hooks:
                hooked: Any = parameter  # its method has no annotations
                hook = hooked.register_post_accumulate_grad_hook(
                    _forgetting(self.turns)
                )
                self._hooks[name] = hook

    def close(self) -> None:
        """Leave the parameters as they were."""
        _remove(self._hooks)
        self.turns.close()
        self.reduce.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Per name, the shape of the parameter."""
        return {name: tuple(p.shape) for name, p in self.parameters.held().items()}

    def _sum_rows(self, own: Tensor, blobs: list[Array]) -> Tensor:
        """Gradients that came sparse stay sparse: gathered as they are, then summed."""
        parts = [_unpack_rows(own, blob) for blob in blobs]
        indices = torch.cat([indices for indices, _ in parts], dim=1)
        values = torch.cat([values for _, values in parts])
        # sums are float32 for 16-bit gradients, as on the path
        wide = values if values.dtype.itemsize > 2 else values.float()
        total = _rows(indices, wide, own.shape)
        if self.op is Op.Average:
            total = total * (1 / self.reduce.size)
        return total.to(values.dtype).coalesce()


class _Distributed:
    """What DistributedOptimizer adds, in front of the optimizer's own class."""

    _sparse: _Gradients
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
                with torch.enable_grad():
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
        return self._own_step(own_step, arguments, options)

    def _own_step(
        self,
        own_step: Callable[..., Any],
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> Any:
        turns = self._sparse.turns
        self._sparse.unused.forget()
        if turns.synchronized:
            turns.recall(self._sparse.parameters.held())
        turns.synchronized = False
        result = own_step(self, *arguments, **options)
        turns.synchronized = False  # by a closure, say
        turns.stepped()
        return result

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
        self._sparse.synchronize()

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
        """Throw away what `synchronize` has exchanged, in place of a step.

        Residuals are what they were before, bitwise. Collective: every rank calls it,
        before its next backward pass. Gradients are still the results: zero them.

        Example:
            optimizer.synchronize()
            if torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 100:
                optimizer.discard()  # the same norm, and so the same way, on every rank
            else:
                with optimizer.skip_synchronize():
                    optimizer.step()

        Raises:
            RuntimeError: undo=True was not given, or nothing was exchanged since the
                last time.
        """
        self._sparse.reduce.discard()
        self._sparse.unused.forget()
        self._sparse.turns.synchronized = False

    def close(self) -> None:
        """Free the private communicator; collective."""
        self._sparse.close()


def _forgetting(turns: Turns) -> Callable[[Tensor], None]:
    """A hook that keeps neither them nor their optimizer alive."""
    known = weakref.ref(turns)

    def forget(parameter: Tensor) -> None:
        if (found := known()) is not None:
            found.forget(parameter)

    return forget


def _remove(hooks: dict[str, Any]) -> None:
    for hook in hooks.values():
        hook.remove()
    hooks.clear()


def _blank(kind: Any) -> Any:
    """An object that its state is still to be given to."""
    return kind.__new__(kind)


def _distributed_class(kind: Any) -> type:
    """A class in front of the optimizer's own, whose step takes what its own takes."""
    own_step, closure_place = kind.step, _closure_place(kind.step)

    @functools.wraps(own_step)
    def step(self: _Distributed, *arguments: Any, **options: Any) -> Any:
        return self._exchanged_step(own_step, closure_place, arguments, options)

    # torch wraps a step that lacks these marks: schedulers, and profiling hooks, which
    # the optimizer's own step runs already
    marked: Any = step
    marked._wrapped_by_lr_sched = marked.hooked = True
    described = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (_Distributed, kind), {"step": step, **described})


def _closure_place(step: Callable[..., Any]) -> int:
    """Of the closure among a step's arguments without self; torch has it first."""
    try:
        names = list(inspect.signature(step).parameters)[1:]
    except ValueError:  # not written in Python
        return 0
    return names.index("closure") if "closure" in names else 0


def _pack_kind(parameter: Tensor) -> Blob:
    """The kind of a gradient that the peers do not expect."""
    state = "frozen" if not parameter.requires_grad else "without a gradient"
    dtype = str(parameter.dtype).removeprefix("torch.")
    word = _WORDS[_kind(parameter)]
    return Blob(word, tuple(parameter.shape), f"{dtype} ({state})")


def _kind(parameter: Tensor) -> str:
    """That of its gradient; a frozen one's zeros tell nothing, and are none."""
    gradient = parameter.grad
    if gradient is None:
        return ""
    dense = gradient.layout is torch.strided
    if not parameter.requires_grad:
        values = gradient if dense else gradient.coalesce().values()
        if not values.any():
            return ""
    return "dense" if dense else "rows"


def _dense_gradient(parameter: Tensor) -> Tensor:
    """Its gradient; zeros where this rank did not use the parameter in this step."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.layout is not torch.strided:
        parameter.grad = parameter.grad.to_dense()
    return parameter.grad


def _sparse_gradient(parameter: Tensor) -> Tensor:
    """Its gradient, every row once; no rows where this rank did not use it."""
    if parameter.grad is None:
        shape = parameter.shape
        indices = torch.empty((1, 0), dtype=torch.int64, device=parameter.device)
        return _rows(indices, parameter.new_empty((0, *shape[1:])), shape)
    if parameter.grad.layout is torch.strided:  # used densely too, in this step
        return parameter.grad.to_sparse(1).coalesce()
    return parameter.grad.coalesce()


def _number(loss: Any) -> float:
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def _rows(indices: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """The sum of rows that may come several times, in the order they come."""
    whole = torch.sparse_coo_tensor(indices, values, shape, check_invariants=False)
    return whole.coalesce()


def _mean_loss(loss: Any, blobs: list[Array]) -> Any:
    mean = float(np.mean([blob.view(np.float64)[0] for blob in blobs]))
    return torch.full_like(loss, mean) if isinstance(loss, Tensor) else mean


def _pack_rows(gradient: Tensor) -> Blob:
    """A coalesced sparse gradient as bytes: indices, then values, padded to 8."""
    indices = np.ascontiguousarray(gradient.indices().cpu().numpy()).reshape(-1)
    values = viewed(gradient.values().cpu().contiguous()).reshape(-1)
    count = np.array([gradient.indices().shape[1]], np.int64)
    parts = [count.view(np.uint8), indices.view(np.uint8), values.view(np.uint8)]
    used = sum(part.size for part in parts)
    return Blob(
        np.concatenate([*parts, np.zeros(-used % 8, np.uint8)]),
        tuple(gradient.shape),
        str(gradient.dtype).removeprefix("torch."),
        gradient.numel() * gradient.dtype.itemsize,
        gradient.values().numel(),
    )


def _unpack_rows(like: Tensor, blob: Array) -> tuple[Tensor, Tensor]:
    count = int(blob[:8].view(np.int64)[0])
    dimensions, width = like.sparse_dim(), like.values().shape[1:]
    middle = 8 + 8 * dimensions * count
    end = middle + count * width.numel() * like.dtype.itemsize
    indices = blob[8:middle].view(np.int64).reshape(dimensions, count)
    # a view in another dtype needs an element at least
    values = (
        torch.from_numpy(blob[middle:end].copy()).view(like.dtype)
        if end > middle
        else like.new_empty(0, layout=torch.strided)
    )
    device = like.device
    return (
        torch.from_numpy(indices.copy()).to(device),
        values.reshape(count, *width).to(device),
    )
