"""The gradients of one optimizer in an exchange over MPI, dense ones and rows.

Which parameters a step uses, and whether their gradients are dense, only some ranks may
know; what each tells the others of it travels with the gradients.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hvd_sparse.advice import Adviser
from hvd_sparse.core.contracts import ExchangeError, Op
from hvd_sparse.core.interrupts import Uninterrupted
from hvd_sparse.core.loss_scale import is_finite
from hvd_sparse.mpi import Blob, SparseAllreduce
from hvd_sparse.torch.advice import advise
from hvd_sparse.torch.grad_scaler import refuse_unscaled
from hvd_sparse.torch.parameters import Parameters
from hvd_sparse.torch.sharing import give_own_memory
from hvd_sparse.torch.states import viewed
from hvd_sparse.torch.turns import Turns
from hvd_sparse.torch.unused import Unused, looked_at

Array = npt.NDArray[Any]
Tensor = torch.Tensor

_KINDS = ("", "dense", "rows")  # of gradients; of none first
# what says so: its place in the first byte
_WORDS = {k: np.array([i] + [0] * 7, np.uint8) for i, k in enumerate(_KINDS)}


class Gradients:
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
        self.unused = Unused(reduce.applied)
        self._exchanged: set[str] = set()  # names, the last time
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
        self.turns.fresh = False
        with self.reported():
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
            self._exchanged = {n for n, p in held.items() if p.requires_grad}
            self.turns.end()

    def synchronize(self) -> None:
        """By the user, in whose hands the results are now."""
        self.exchange()
        self.turns.synchronized = True
        held = self.parameters.held()
        for name in looked_at(n for n, p in held.items() if p.requires_grad):
            parameter = held[name]
            if parameter.grad is not None:
                self.unused.note(parameter, parameter.grad)

    def refuse_unsent(self) -> None:
        """Before a step with what was synchronized.

        Raises:
            ValueError: a gradient of this rank alone would move a parameter.
        """
        for name, parameter in self.parameters.held().items():
            gradient = parameter.grad
            if name in self._exchanged or not parameter.requires_grad:
                continue
            if gradient is not None and bool(gradient.any()):
                raise ValueError(
                    f"{name}: joined the optimizer, or was thawed, after "
                    "synchronize(), so that its gradient was not sent: call "
                    "synchronize() again"
                )

    def discard(self) -> None:
        """By the user; peers may wait in the exchange that this rank has not made."""
        if self.reduce.can_discard and (self.turns.fresh or self._has_thawed()):
            self.exchange()
        self.reduce.discard()
        self.unused.forget()
        self.turns.synchronized = False

    def _has_thawed(self) -> bool:
        """Whether there is a gradient of which no hook has told: of a thawed one."""
        return any(
            parameter.requires_grad and parameter.grad is not None
            for name, parameter in self.parameters.held().items()
            if name not in self._hooks
        )

    def _throw_away(self, stacklevel: int) -> None:
        """The step before, if nothing became of it."""
        if self.turns.synchronized and not self.unused.were_zeroed():
            self.unused.forget()  # no backward pass since: they are sent again
        elif self.unused.is_thrown_away() and not self.reduce.overflowed:
            if self.reduce.can_discard:
                self.reduce.discard()
            else:
                self.unused.warn(stacklevel + 1)

    def _exchange(self, held: dict[str, Tensor], loss: Any) -> Any:
        with self.reported():
            give_own_memory(list(held.values()), self.turns.beside())
            expected = {
                n: p for n, p in held.items() if n in self.kinds and p.requires_grad
            }
            others = {n: _pack_kind(p) for n, p in held.items() if n not in expected}
            blobs = dict(others)
            if loss is not None:
                number = np.array([_number(loss)], np.float64)
                blobs[_loss_name(held)] = Blob(number.view(np.uint8))
        gathered = self._exchange_gradients(expected, blobs)
        if loss is not None:
            loss = _mean_loss(loss, gathered[_loss_name(held)])
        found = self._learn_kinds({name: gathered[name] for name in others})
        if found:
            late = {name: held[name] for name in found}
            self._exchange_gradients(late, {}, continues=True)
            self.reduce.traffic.steps -= 1  # of one step
        return loss

    def mean_loss(self, loss: Any) -> Any:
        """That of gradients that were exchanged before."""
        with self.reported():
            number = np.array([_number(loss)], np.float64)
        name = _loss_name(self.parameters.held())
        blobs = {name: Blob(number.view(np.uint8))}
        gathered = self._exchange_gradients({}, blobs, continues=True)
        self.reduce.traffic.steps -= 1  # of one step
        return _mean_loss(loss, gathered[name])

    def _exchange_gradients(
        self,
        parameters: dict[str, Tensor],
        blobs: dict[str, Blob],
        *,
        continues: bool = False,
    ) -> dict[str, list[Array]]:
        """One exchange; returns what was gathered of the blobs."""
        with self.reported():
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
    def reported(self) -> Iterator[None]:
        """An error on the way into the exchange reaches the peers that wait in it."""
        try:
            yield
        except ExchangeError:  # of which they know
            raise
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


def _loss_name(held: dict[str, Tensor]) -> str:
    """That of the loss beside these gradients: no parameter's."""
    name = "(loss)"
    while name in held:
        name = f"({name})"
    return name


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
        _described(gradient),
        gradient.numel() * gradient.dtype.itemsize,
        gradient.values().numel(),
    )


def _described(gradient: Tensor) -> str:
    """What ranks must have alike to read each other's: a row has one index."""
    dtype, of = str(gradient.dtype).removeprefix("torch."), gradient.sparse_dim()
    return dtype if of == 1 else f"{dtype} with {of} sparse dimensions"


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
