"""The door for PyTorch over plain MPI, no Horovod needed.

One exchange a step, when the backward pass is over: `step()` gathers the gradients of
all parameters that require one, in the order of their names, so neither the order of
hooks nor a graph that changes from step to step matters. Gradients in host memory are
viewed as numpy arrays, never copied, and the result is written back into `p.grad`.
"""

import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hvd_sparse.advice import Adviser
from hvd_sparse.broadcast import Broadcast
from hvd_sparse.core.contracts import Average, Op, Sparsifier
from hvd_sparse.core.routing import Dense, WhenCheaper
from hvd_sparse.core.traffic import Traffic
from hvd_sparse.mpi import Blob, SparseAllreduce
from hvd_sparse.torch.advice import advise
from hvd_sparse.torch.states import as_tensors, viewed

Array = npt.NDArray[Any]
Tensor = torch.Tensor
NamedParameters = Iterable[tuple[str, Tensor]]

_LOSS = "(loss)"
_KINDS = "(kinds of gradients)"


def DistributedOptimizer(  # noqa: N802  # a constructor by name, as in Horovod
    optimizer: torch.optim.Optimizer,
    sparsifier: Sparsifier,
    *,
    named_parameters: NamedParameters | None = None,
    comm: Any = None,
    op: int = Average,
    dense: Dense = WhenCheaper(),  # noqa: B008  # frozen: one instance serves all
    backward_passes_per_step: int = 1,
    timeout_s: float = 600,
) -> Any:
    """Make an optimizer average sparsified gradients over MPI ranks before each step.

    The optimizer itself is changed, and returned: it stays an instance of its class,
    keeps its state and its learning-rate schedulers, and its state_dict is what it was.
    New are `synchronize`, `skip_synchronize`, `residual_state_dict`,
    `load_residual_state_dict`, `traffic` and `close`.

    Args:
        optimizer: any torch optimizer.
        sparsifier: TopK, RandomK, Threshold or your own; the same on every rank.
        named_parameters: model.named_parameters(); names must be unique and cover what
            the optimizer holds. Without it parameters are named by their place.
        comm: an mpi4py communicator; MPI.COMM_WORLD unless given.
        op: hvd_sparse.Average over the ranks of comm, or hvd_sparse.Sum.
        dense: which tensors go dense: WhenCheaper() or Never().
        backward_passes_per_step: how often you call backward() before step(). The
            gradient is their sum, as in Horovod. Since the exchange runs in step(),
            calling backward more often or less is no error.
        timeout_s: seconds to wait for peers in a step; a warning comes at 60.

    Returns:
        The same optimizer.

    Raises:
        TypeError: not an optimizer, or one that is distributed already.
        ValueError: names are not unique, unknown or missing.
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
    names = _names(optimizer, named_parameters)
    reduce = SparseAllreduce(
        sparsifier, comm=comm, op=op, dense=dense, timeout_s=timeout_s
    )
    kind = type(optimizer)
    distributed: Any = optimizer
    distributed.__class__ = type(kind.__name__, (_Distributed, kind), {})
    # a scheduler made earlier hides the class's step behind an attribute of the object
    vars(distributed).pop("step", None)
    distributed._sparse = _Gradients(distributed, names, reduce, Op(op))
    return distributed


class _Gradients:
    """The gradients of one optimizer on their way through SparseAllreduce."""

    def __init__(
        self,
        optimizer: Any,
        names: dict[Tensor, str],
        reduce: SparseAllreduce,
        op: Op,
    ) -> None:
        self.optimizer = optimizer
        self.op = op
        self.names = names
        self.reduce = reduce
        self.synchronized = False  # by the user, and no backward pass or step since
        self.skip = False
        self._adviser = Adviser(advise, reduce.sparsifier)
        self.kinds: dict[str, str] = {}  # dense or rows, the same on every rank
        self._hooks: dict[str, Any] = {}
        self._watch_backward(self._held())

    def exchange(self, loss: Any = None) -> Any:
        """Replace every gradient by its mean over ranks; returns the mean loss.

        Which parameters have a gradient, and of which kind, only some ranks may know:
        those that used them. So the exchange carries the names of gradients that the
        others can not expect, and a second one, where there are any, the gradients.
        """
        with self._reported():
            self._adviser.step(self.optimizer, self.reduce.rank, stacklevel=3)
            held = self._held()
            self._watch_backward(held)
            expected = {
                n: p for n, p in held.items() if n in self.kinds and p.requires_grad
            }
            blobs = {}
            if len(expected) < len(held):
                blobs[_KINDS] = _pack_kinds(held, expected)
            if loss is not None:
                number = np.array([_number(loss)], np.float64)
                blobs[_LOSS] = Blob(number.view(np.uint8))
        gathered = self._exchange_gradients(expected, blobs)
        if loss is not None:
            loss = _mean_loss(loss, gathered[_LOSS])
        found = self._learn_kinds(gathered.get(_KINDS, []))
        if found:
            # a name that this rank does not hold becomes an error on every rank
            self._exchange_gradients({n: held[n] for n in found if n in held}, {})
            self.reduce.traffic.steps -= 1  # of one step
        return loss

    def _exchange_gradients(
        self, parameters: dict[str, Tensor], blobs: dict[str, Blob]
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
        self.reduce.start(gradients, gradients, {**packed, **blobs})
        self.reduce.finish()
        gathered = self.reduce.gathered
        for name, own in rows.items():
            parameters[name].grad = self._sum_rows(own, gathered[name])
        return gathered

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """An error on the way into the exchange reaches the peers that wait in it."""
        try:
            yield
        except Exception as error:
            self.reduce.report(error)
            raise

    def _learn_kinds(self, blobs: list[Array]) -> list[str]:
        """Names that some rank has an unexpected gradient of, in one order."""
        found: dict[str, str] = {}
        for blob in blobs:
            told = json.loads(blob.tobytes().rstrip(b"\0"))
            found = {**told, **found}  # the lowest rank's word counts
        self.kinds = {**found, **self.kinds}
        return sorted(found)

    def _watch_backward(self, held: dict[str, Tensor]) -> None:
        """After a backward pass what was synchronized is not any more."""
        for name, parameter in held.items():
            if parameter.requires_grad and name not in self._hooks:
                hooked: Any = parameter  # its method has no annotations
                hook = hooked.register_post_accumulate_grad_hook(self._fresh)
                self._hooks[name] = hook

    def _fresh(self, parameter: Tensor) -> None:
        del parameter
        self.synchronized = False

    def close(self) -> None:
        """Leave the parameters as they were."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self.reduce.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Per name, the shape of the parameter."""
        return {name: tuple(p.shape) for p, name in self.names.items()}

    def _held(self) -> dict[str, Tensor]:
        """All parameters of the optimizer now, by name."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in held:
            if parameter not in self.names:
                shape = tuple(parameter.shape)
                raise ValueError(
                    f"a parameter of shape {shape} was added after "
                    "DistributedOptimizer was made; it has no name"
                )
        return {self.names[p]: p for p in held}

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

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Exchange the gradients, then the optimizer's own step.

        With a closure the exchange follows every call of it, and the loss it returns is
        averaged over ranks, so that line searches take the same turns everywhere.
        """
        state = self._sparse
        own_step = super().step  # type: ignore[misc]  # of the optimizer's class
        self._opt_called = True  # what a scheduler's own wrapper would note
        if closure is not None:

            def exchanged() -> Any:
                with torch.enable_grad():
                    loss = closure()
                return state.exchange(loss)

            state.synchronized = False
            return own_step(exchanged)
        if state.skip and not state.synchronized:
            raise RuntimeError(
                "step() inside skip_synchronize() needs synchronize() after the last "
                "backward pass"
            )
        if not state.skip:
            if state.synchronized:
                warnings.warn(
                    "step() after synchronize() uses the gradients as they are; say so "
                    "with `with optimizer.skip_synchronize():`",
                    stacklevel=2,
                )
            else:
                state.exchange()
        state.synchronized = False
        return own_step()

    # torch wraps a step that lacks these marks: schedulers, and profiling hooks, which
    # the optimizer's own step runs already
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's own; gradients to come are not synchronized."""
        self._sparse.synchronized = False
        super().zero_grad(set_to_none=set_to_none)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy, or a pickle, is of the optimizer's own class, and not distributed."""
        own_class = type(self).__mro__[2]
        return _blank, (own_class,), super().__getstate__()  # type: ignore[misc]

    def synchronize(self) -> None:
        """Exchange the gradients now, to clip them say; see skip_synchronize."""
        self._sparse.exchange()
        self._sparse.synchronized = True

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
        self._sparse.reduce.load_state_dict(state)
        self._sparse.kinds = dict(state["kinds"])

    def close(self) -> None:
        """Free the private communicator; collective."""
        self._sparse.close()


def _blank(kind: Any) -> Any:
    """An object that its state is still to be given to."""
    return kind.__new__(kind)


def _names(
    optimizer: torch.optim.Optimizer, named_parameters: NamedParameters | None
) -> dict[Tensor, str]:
    """Per parameter of the optimizer, its name."""
    held = {
        parameter: f"group{g}.parameter{i}"
        for g, group in enumerate(optimizer.param_groups)
        for i, parameter in enumerate(group["params"])
    }
    if named_parameters is None:
        return held
    given = list(named_parameters)
    seen: set[str] = set()
    for name, _ in given:
        if name in seen:
            raise ValueError(f"named_parameters must be unique, {name!r} comes twice")
        seen.add(name)
    names = {parameter: name for name, parameter in given}
    for parameter, place in held.items():
        if parameter not in names:
            raise ValueError(
                f"named_parameters must cover the optimizer's parameters, {place} of "
                f"shape {tuple(parameter.shape)} has no name"
            )
    for parameter, name in names.items():
        if parameter not in held and parameter.requires_grad:
            raise ValueError(
                f"named_parameters has {name!r}, which the optimizer does not hold"
            )
    return {parameter: names[parameter] for parameter in held}


def _kind(parameter: Tensor) -> str | None:
    if parameter.grad is None:
        return None
    return "dense" if parameter.grad.layout is torch.strided else "rows"


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


def _pack_kinds(held: dict[str, Tensor], expected: dict[str, Tensor]) -> Blob:
    """Names and kinds of the gradients here that the peers do not expect."""
    told = {n: _kind(p) for n, p in held.items() if n not in expected}
    text = json.dumps({n: kind for n, kind in told.items() if kind}).encode()
    return Blob(np.frombuffer(text + bytes(-len(text) % 8), np.uint8))


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


# -------------------------------------------------------------------- start alike


def broadcast_parameters(
    params: Any, *, root: int = 0, comm: Any = None, timeout_s: float = 600
) -> None:
    """Overwrite parameters and buffers with those of one rank.

    Args:
        params: model.state_dict(), or pairs of name and tensor; the same names, shapes
            and dtypes on every rank.
        root: the rank whose values all take.
        comm: an mpi4py communicator; MPI.COMM_WORLD unless given.
        timeout_s: seconds to wait for peers.

    Raises:
        ExchangeError: a peer has other tensors, or did not arrive in time.
    """
    pairs = params.items() if hasattr(params, "items") else params
    tensors = {name: t for name, t in pairs if isinstance(t, Tensor)}
    with Broadcast(root, comm, timeout_s) as broadcast, torch.no_grad():
        described = [(n, tuple(t.shape), str(t.dtype)) for n, t in tensors.items()]
        data = broadcast(_save(tensors), repr(sorted(described)))
        for name, value in _load(data).items():
            tensors[name].copy_(value)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer,
    *,
    root: int = 0,
    comm: Any = None,
    timeout_s: float = 600,
) -> None:
    """Overwrite the state and the options of an optimizer with those of one rank.

    Residuals are not part of it: they belong to their rank.

    Args:
        optimizer: distributed or not; the same parameters on every rank.
        root: the rank whose state all take.
        comm: an mpi4py communicator; MPI.COMM_WORLD unless given.
        timeout_s: seconds to wait for peers.

    Raises:
        ExchangeError: a peer has other parameters, or did not arrive in time.
    """
    with Broadcast(root, comm, timeout_s) as broadcast:
        held = [[tuple(p.shape) for p in g["params"]] for g in optimizer.param_groups]
        described = f"{type(optimizer).__name__} {held}"
        optimizer.load_state_dict(
            _load(broadcast(_save(optimizer.state_dict()), described))
        )


def _save(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _load(data: bytes) -> Any:
    # from a peer of this job, which could run any code here anyway
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
