"""The way there under Horovod: alone, with the others of its batch, or dense.

If this rank raises, no payload of its step leaves any more: in its place goes what was
raised. Its gradients are in the residuals by then.
"""

import logging
from collections.abc import Iterable
from contextlib import suppress

import torch

from hvd_sparse.core.flight import Flight, Phase
from hvd_sparse.core.flight import Tensor as Admitted
from hvd_sparse.core.frame import frame_bytes
from hvd_sparse.core.path import GradientPath
from hvd_sparse.core.payload import Raised
from hvd_sparse.torch.contract import HorovodExchange
from hvd_sparse.torch.places import Place
from hvd_sparse.torch.states import viewed
from hvd_sparse.torch.step import Context, Step
from hvd_sparse.watchdog import Watchdog

Tensor = torch.Tensor
log = logging.getLogger("hvd_sparse")

_COPIED = 1 << 20  # bytes of a gradient that goes dense: no more than that are copied
_THERE = (Phase.FILLING, Phase.FAILED)  # of what has not left
_REDUCIBLE = (torch.float16, torch.float32, torch.float64)  # by Horovod 0.28.1


def changed(name: str) -> ValueError:
    """What to raise where the result would overwrite what somebody wrote."""
    return ValueError(
        f"{name}: its gradient was changed after it was sent; call "
        "optimizer.synchronize() before you change gradients, and optimizer.step() "
        "within optimizer.skip_synchronize()"
    )


class Sender:
    """Of one compressor."""

    def __init__(
        self,
        step: Step,
        path: GradientPath,
        exchange: HorovodExchange,
        watchdog: Watchdog,
    ) -> None:
        """Join the parts."""
        self._step = step
        self._path = path
        self._exchange = exchange
        self._watchdog = watchdog

    def send(
        self, name: str, gradient: Tensor, parameter: Tensor
    ) -> tuple[Tensor, Context]:
        """As little as can be: what the backward pass has in cache stays there.

        Returns:
            What Horovod is to reduce.
        """
        step = self._step
        step.give_up(name, gradient)
        if step.failure is not None:
            return self.excuse(name, gradient, parameter)
        known = self._path.plan.tensors.get(name)
        if known is None or known.dense or known.shape != gradient.shape:
            known = self._path.admit(name, viewed(gradient))
        self._watchdog.sent(name, known.header.step)
        holder = parameter if parameter.grad is gradient else None
        context = Context(name, step.places.enter(gradient, holder), known.dense)
        step.under_way[name] = context
        if known.dense:
            reduced = self._send_dense(context)
            context.flight = Flight(known)
            context.flight.depart()
            return reduced, context
        due = self._exchange.announce(name)
        if not (known.grouped and self._exchange.batched and gradient.is_contiguous()):
            self._send_alone(context)
        if due:
            self._send_together(due)
        return self._exchange.to_reduce(name), context

    def flush(self) -> None:
        """Results are asked for: what waits for others, which do not come, leaves."""
        self._send_together(sorted(context.name for context in self._step.waiting()))

    def _send_together(self, names: Iterable[str]) -> None:
        """Send those of these tensors that wait."""
        under_way = self._step.under_way
        contexts = [c for n in names if (c := under_way.get(n)) and c.waits]
        if not contexts:  # most often
            return
        try:
            if self._step.failure is None:
                self._send_bucket(contexts)
        except BaseException as error:
            self._step.fail(error)
            raise
        finally:
            if self._step.failure is not None:
                for context in contexts:
                    self._tell(context)

    def _send_bucket(self, contexts: list[Context]) -> None:
        gradients = {context.name: context.array for context in contexts}
        for context in contexts:  # what is refused must not be taken for kept
            if context.place.changed:
                raise changed(context.name)
            self._path.admit(context.name, gradients[context.name])
        try:
            flights = self._path.send(gradients)
        except BaseException:
            for context in contexts:
                self._failed(context)
            raise
        for context, flight in zip(contexts, flights, strict=True):
            context.flight = flight

    def _send_alone(self, context: Context) -> None:
        gradient = context.array
        self._path.admit(context.name, gradient)
        try:
            [context.flight] = self._path.send({context.name: gradient})
        except BaseException:
            self._failed(context)
            raise

    def _failed(self, context: Context) -> None:
        """The path could not send it, and has kept it."""
        tensor = self._path.plan.tensors[context.name]
        context.flight = Flight(tensor, Phase.FAILED)

    def _send_dense(self, context: Context) -> Tensor:
        """The gradient as Horovod can reduce it, with what may still wait of it.

        Horovod reduces in place. Where that is not too much a copy, so that a gradient
        may be read and share its memory.
        """
        gradient = context.place.memory
        waiting = self._path.residuals.take(context.name)
        if waiting is not None:  # it went sparse while there were fewer ranks
            context.taken = waiting
            rest = torch.as_tensor(waiting).view_as(gradient)
            gradient = gradient + rest.to(gradient)
        if gradient.dtype not in _REDUCIBLE:
            return gradient.float().contiguous()
        reduced = gradient.contiguous()
        if reduced is not context.place.memory:
            return reduced
        small = reduced.numel() * reduced.element_size() <= _COPIED
        [free] = self._step.places.may_give_way([context.place])
        if small or not free:
            return reduced.clone()
        self._step.places.reduce(context.place, context.name)
        return reduced

    # ------------------------------------------------------- this rank has raised

    def excuse(
        self, name: str, gradient: Tensor, parameter: Tensor
    ) -> tuple[Tensor, Context]:
        """In place of `send`: tell the peers that this rank raised.

        Raises:
            Exception: they can not be told.
        """
        step = self._step
        context = step.under_way.get(name)
        if context is None:
            self._watchdog.sent(name, 0)
            context = step.under_way[name] = Context(name, Place(gradient, None))
        if context.excused or context.phase not in _THERE:
            return self._exchange.to_reduce(name), context
        step.keep(context)
        known = self._known(name, parameter)
        if known is not None and known.dense:
            return self._refuse(context, known), context
        due = self._exchange.announce(name)
        self._tell(context)
        self._send_together(due)
        return self._exchange.to_reduce(name), context

    def _known(self, name: str, parameter: Tensor) -> Admitted | None:
        """How its peers treat it, who may have a gradient that is not refused."""
        with suppress(Exception):
            known = self._path.plan.tensors.get(name)
            return known or self._path.admit(name, viewed(parameter))
        return None

    def _tell(self, context: Context) -> None:
        """Once a tensor, unless it has left: each travels by itself."""
        failure = self._step.failure
        if context.excused or context.phase not in _THERE or failure is None:
            return
        self._step.keep(context)
        known, size = self._path.plan.tensors.get(context.name), None
        if not self._exchange.batched and known is not None:
            size = frame_bytes([known.header])
        self._exchange.start(context.name, Raised(failure.error, size))
        context.excused = failure.told = True

    def _refuse(self, context: Context, known: Admitted) -> Tensor:
        """Horovod takes it of no rank, as it has another shape than the others have.

        Its own error, which does not say why, may be the first that is raised.
        """
        failure = self._step.failure
        if failure is not None:
            failure.told = True
            kind, error = type(failure.error).__name__, failure.error
            log.error(
                "%s: is not reduced: this rank raised %s: %s", context.name, kind, error
            )
        context.dense = context.excused = True
        dtype = getattr(torch, known.dtype)
        dtype = dtype if dtype in _REDUCIBLE else torch.float32
        device = context.place.memory.device
        return torch.zeros(known.header.n + 1, dtype=dtype, device=device)
