"""The way back under Horovod, with the others of its batch where that can be.

Where something fails the step does, on this rank and, unless it is this rank's memory
or the like, on all others. Before that is raised all that is on its way is awaited: no
rank may begin the next step while others still wait for something of this one.
"""

from collections.abc import Callable

import torch

from hvd_sparse.core.contracts import ExchangeError, Op
from hvd_sparse.core.flight import Flight
from hvd_sparse.core.path import GradientPath
from hvd_sparse.torch.contract import HorovodExchange
from hvd_sparse.torch.horovod_sender import Sender, changed
from hvd_sparse.torch.states import viewed
from hvd_sparse.torch.step import Context, Idle, Step, forgotten

Tensor = torch.Tensor


class Receiver:
    """Of one compressor."""

    def __init__(
        self,
        step: Step,
        path: GradientPath,
        exchange: HorovodExchange,
        sender: Sender,
        found: Callable[[Op], Op],
        release: Callable[[], None],
    ) -> None:
        """Join the parts.

        `found` is told which op Horovod applies; `release` lets go what the optimizer
        waits for.
        """
        self._step = step
        self._path = path
        self._exchange = exchange
        self._sender = sender
        self._found = found
        self._release = release

    def receive(self, reduced: Tensor, ctx: Context) -> None:
        """The result of a gradient, and of others that came with it.

        Args:
            reduced: what Horovod made of what it was given.
            ctx: the gradient's.

        Raises:
            BaseException: what failed; `fail` must follow.
        """
        if not self._step.arriving or ctx.waits:
            self._sender.flush()  # their batches lack a member
        failure = self._step.failure
        if failure is not None and failure.told:
            raise failure.error
        if not self._step.arriving:  # the first result of this step
            self._step.places.settle()
            self._step.arriving = True
        if ctx.dense:
            self._receive_dense(reduced, ctx)
        else:
            self._receive_sparse(reduced, ctx)

    def fail(self, error: BaseException) -> None:
        """End the step: what was sent is back once all that is on its way is there."""
        self._step.fail(error)
        try:
            self._sender.flush()
        finally:
            try:
                self._release()
            finally:
                self.end()

    def end(self) -> None:
        """Await what is on its way, of which nothing counts."""
        try:
            self._exchange.drain()
        finally:
            self._step.roll_back()

    def _receive_sparse(self, reduced: Tensor, ctx: Context) -> None:
        flight = ctx.sent
        if ctx.place.changed:
            raise changed(ctx.name)
        try:
            op = self._exchange.reduced(flight.handle, reduced)
        except ValueError:  # some ranks sent none of it: their batch never comes
            self._exchange.forsake(flight.handle)
            raise
        self._path.plan.op = self._found(op)
        arrived = self._receive_batch(flight) or self._receive_alone(ctx, flight)
        sent, received = self._exchange.bytes_beside(reduced, arrived)
        self._path.traffic.overhead_sent_bytes += sent
        self._path.traffic.overhead_received_bytes += received

    def _receive_batch(self, flight: Flight) -> int:
        """Receive all that it arrived with, where that can be; returns how many."""
        step = self._step
        if self._path.scaling.is_used:  # which looks at each result by itself
            return 0
        names = self._exchange.arrive(flight.handle)
        contexts = [c for n in names if (c := step.under_way.get(n))]
        if len(contexts) != len(names):  # some were received alone
            return 0
        if any(context.place.changed for context in contexts):
            return 0
        results = step.places.results([context.place for context in contexts])
        if not all(result.is_contiguous() for result in results):
            return 0
        flights = [context.sent for context in contexts]
        outs = [c.seen(result) for c, result in zip(contexts, results, strict=True)]
        self._path.hand_back(flights, outs)
        step.arrive(contexts, results)
        self._exchange.drop(names)
        return len(contexts)

    def _receive_alone(self, ctx: Context, flight: Flight) -> int:
        [result] = self._step.places.results([ctx.place])
        flat = result
        if not result.is_contiguous():
            flat = torch.empty_like(result, memory_format=torch.contiguous_format)
        self._path.hand_back([flight], [viewed(flat)])
        self._step.arrive([ctx], [result if flat is result else result.copy_(flat)])
        return 1

    def receive_nothing(self, reduced: Tensor, ctx: Idle) -> Tensor:
        """The gradient of a parameter of which no rank has sent any, as it is."""
        if reduced.any():
            raise ExchangeError(
                f"{ctx.name}: is frozen on this rank (requires_grad is False), but "
                "another sent its gradient"
            )
        self._step.idle.pop(ctx.name, None)
        wire_bytes = reduced.numel() * reduced.element_size()
        self._path.traffic.overhead_sent_bytes += wire_bytes
        self._path.traffic.overhead_received_bytes += wire_bytes
        if ctx.frozen is not None:  # Horovod's zeros would move it, by momentum
            ctx.frozen.grad = None
        return ctx.gradient

    def _receive_dense(self, reduced: Tensor, ctx: Context) -> None:
        known = self._path.plan.tensors.get(ctx.name)
        if known is None:
            raise forgotten(ctx.name)
        if ctx.place.changed:
            raise changed(ctx.name)
        [result] = self._step.places.results([ctx.place])
        result = reduced if reduced is result else result.copy_(reduced)
        self.look_for_overflow(result)
        wire_bytes = reduced.numel() * reduced.element_size()
        self._path.traffic.count(known, reduced.numel(), wire_bytes, wire_bytes)
        self._step.arrive([ctx], [result])

    def look_for_overflow(self, result: Tensor) -> None:
        """Of what Horovod reduced: the optimizer's step will be skipped."""
        if self._path.scaling.is_used:
            values = result.coalesce().values() if result.is_sparse else result
            self._path.scaling.look_at(values)
