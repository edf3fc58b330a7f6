"""The steps of a model in DistributedDataParallel, bucket by bucket.

The path is that of all other doors. A bucket is sent as soon as DDP has it; when the
last one of a step is sent, all are received, in the thread of the backward pass.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from hvd_sparse import arrays
from hvd_sparse.core.contracts import Exchange
from hvd_sparse.core.flight import Flight
from hvd_sparse.core.path import GradientPath
from hvd_sparse.torch.states import viewed
from hvd_sparse.transport.mpi.agreement import Row, row_of
from hvd_sparse.transport.mpi.buckets import BucketsExchange

Tensor = torch.Tensor
Array = Any


class Sent(NamedTuple):
    """A bucket on its way.

    Attributes:
        buffer: its gradients, side by side, where the results go.
        future: what DDP waits for.
        flights: of the gradients; none where this rank raised.
        outs: views of the buffer, one for each.
        unused: the handle of who has no use for which; None where nobody is asked.
    """

    buffer: Tensor
    future: Any
    flights: list[Flight]
    outs: list[Array]
    unused: Any


class Reducer:
    """What exchanges the gradients of one model, and keeps the residuals.

    Attributes:
        exchange: of this model alone.
        path: the same.
    """

    def __init__(
        self,
        names: Mapping[Tensor, str],
        group: Any,
        timeout_s: float,
        path_of: Callable[[Exchange], GradientPath],
        *,
        finds_unused: bool,
    ) -> None:
        """Join the ranks; collective.

        Args:
            names: of the model's parameters, alike on every rank.
            group: their process group.
            timeout_s: seconds to wait for peers.
            path_of: makes the path over an exchange.
            finds_unused: DDP looks for parameters that no rank has used, and throws
                their results away.

        Raises:
            TypeError, ValueError: as of the path.
            ExchangeError: a peer did not come.
        """
        self._names = names
        self._finds_unused = finds_unused
        self._sent: list[Sent] = []
        self._beside: list[Any] = []
        self._under_way = False
        self.exchange = BucketsExchange(group, timeout_s)
        try:
            self.path = path_of(self.exchange)
        except (TypeError, ValueError) as error:
            self.exchange.report(error)  # peers may have better arguments
            raise

    # ------------------------------------------------------------------- on the way out

    def send(self, bucket: Any) -> Any:
        """Select and send. What fails is raised by `receive`, as on the peers.

        Args:
            bucket: of DDP, with gradients that are not sparse.

        Returns:
            A future of the bucket's buffer, which then has the results.
        """
        self.exchange.fill()
        try:
            sent = self._select(bucket)
        except BaseException as error:
            self.exchange.depart_with(error)
            sent = Sent(bucket.buffer(), torch.futures.Future(), [], [], None)
        self._sent.append(sent)
        return sent.future

    def beside(self, future: Any) -> None:
        """Of a bucket of this step that goes another way, the same on every rank."""
        if self.path.scaling.is_used:
            self._beside.append(future)

    def _select(self, bucket: Any) -> Sent:
        if not self._under_way:
            self.path.begin()
            self._under_way = True
        pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
        gradients = {self._name(p): viewed(_of(p, gradient)) for p, gradient in pairs}
        outs = list(gradients.values())
        unused = self._tell_unused(outs) if self._finds_unused else None
        flights = self.path.send(gradients, in_place=gradients)
        rows: list[Row] = [row_of(flight) for flight in flights]
        if unused is not None:
            rows.append(("(unused)", (len(outs),), "bytes", 0, "bytes", 0))
        self.exchange.depart(rows, self.path.plan.agreed)
        return Sent(bucket.buffer(), torch.futures.Future(), flights, outs, unused)

    def _name(self, parameter: Tensor) -> str:
        if parameter not in self._names:
            shape = tuple(parameter.shape)
            raise ValueError(f"named_parameters must have all, found none of {shape}")
        return self._names[parameter]

    # ------------------------------------------------------------------------- and back

    def receive(self) -> None:
        """All buckets of the step; does nothing where there was none.

        Raises:
            ExchangeError: a peer disagrees, raised, or did not arrive in time. What was
                sent is back in the residuals.
            BaseException: what this rank raised when it sent.
        """
        sent, self._sent, self._under_way = self._sent, [], False
        beside, self._beside = self._beside, []
        if not sent:
            return
        flights = [flight for one in sent for flight in one.flights]
        try:
            self.exchange.wait()
            for one in sent:
                self._hand_back(one)
            if not all(_is_finite(future.wait()) for future in beside):
                self.path.scaling.overflow()
        except BaseException:
            self.path.roll_back(flights)
            self.exchange.clear()
            raise
        self.path.commit(flights)
        self._count()
        self.exchange.clear()
        for one in sent:
            one.future.set_result(one.buffer)

    def _hand_back(self, one: Sent) -> None:
        flat = [arrays.contiguous(out) for out in one.outs]
        self.path.hand_back(one.flights, flat)
        for out, result in zip(one.outs, flat, strict=True):
            if result is not out:  # its memory is in another order
                out[...] = result
        if one.unused is not None:
            self._take_back_unused(one)

    def _count(self) -> None:
        traffic, overhead = self.path.traffic, self.exchange.step_overhead_bytes
        traffic.steps += 1
        traffic.overhead_sent_bytes += overhead
        traffic.overhead_received_bytes += overhead * (self.exchange.size - 1)

    # ------------------------------------------------ parameters that nobody has used

    def _tell_unused(self, gradients: list[Array]) -> Any:
        """A bit for each gradient that is zero here; DDP itself tells nobody."""
        bits = np.packbits([not gradient.any() for gradient in gradients])
        return self.exchange.start_bytes(np.pad(bits, (0, -bits.size % 8)))

    def _take_back_unused(self, one: Sent) -> None:
        """Nobody applies their results: what was sent of them is not lost."""
        everyones = np.stack(self.exchange.finish_bytes(one.unused))
        nobodys = np.unpackbits(np.bitwise_and.reduce(everyones))
        for flight, out, unused in zip(one.flights, one.outs, nobodys, strict=False):
            if unused:
                self.path.roll_back([flight])
                out[...] = 0


def _of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the order of memory that DDP gave it: the parameter's.

    Buckets say nothing of that, and show all as if it were contiguous.
    """
    reach = sum(
        (n - 1) * by for n, by in zip(parameter.shape, parameter.stride(), strict=True)
    )
    if parameter.is_contiguous() or reach + 1 != parameter.numel():
        return gradient
    return gradient.as_strided(parameter.shape, parameter.stride())


def _is_finite(result: Tensor) -> bool:
    values = result.coalesce().values() if result.is_sparse else result
    return bool(values.isfinite().all())
