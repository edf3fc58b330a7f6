"""A step of several buckets, each on its way while the next one is filled.

A thread exchanges one bucket after the other, so that the network works beside the
backward pass. All ranks have the same buckets in the same order, so these exchanges
match. What has arrived stays until the step is over.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy.typing as npt

from hvd_sparse.core.contracts import Located
from hvd_sparse.core.payload import Payload
from hvd_sparse.transport.mpi.agreement import Row
from hvd_sparse.transport.mpi.buffers import Buffers
from hvd_sparse.transport.mpi.exchange import MpiExchange

Array = npt.NDArray[Any]


class Handle(NamedTuple):
    """What was started: in which bucket of the step, and where in it."""

    bucket: int
    place: int


class BucketsExchange(MpiExchange):
    """As `MpiExchange`, for steps whose buckets leave one by one.

    `fill` begins a bucket, `start` and its like add to it, `depart` sends it off. After
    the last one comes `wait`, and `clear` when nothing of the step is read any more.
    """

    def __init__(self, comm: Any, timeout_s: float) -> None:
        """As of `MpiExchange`."""
        super().__init__(comm, timeout_s)
        self._filled: list[Buffers] = []  # of all buckets that any step had
        self._count = 0  # of this step
        self._thread = ThreadPoolExecutor(1, "hvd_sparse exchange")
        self._travels: list[Future[None]] = []
        self._failed = False
        self.step_overhead_bytes = 0

    # ---------------------------------------------------------------- of one bucket

    def fill(self) -> None:
        """What is started from here on belongs to the next bucket."""
        if self._count == len(self._filled):
            self._filled.append(Buffers(self.size))
        self._count += 1

    @property
    def _filling(self) -> Buffers:
        return self._filled[self._count - 1]

    def start(self, name: str, payload: Payload) -> Any:
        """Add a payload to the bucket."""
        payloads = self._filling.payloads
        payloads.append((name, payload))
        return Handle(self._count - 1, len(payloads) - 1)

    def start_bytes(self, data: Array) -> Any:
        """Add (bytes,) uint8 that are no payload; a multiple of 8."""
        blobs = self._filling.blobs
        blobs.append(data)
        return Handle(self._count - 1, len(blobs) - 1)

    def start_dense(self, name: str, gradient: Array) -> Any:
        """Add a tensor to the dense allreduce of the bucket."""
        del name
        return Handle(self._count - 1, self._filling.add_dense(gradient))

    def depart(self, rows: Sequence[Row], configuration: str) -> None:
        """The bucket is complete; does not wait."""
        buffers = self._filling

        def travel() -> None:
            self._use(buffers)
            self.open(rows, configuration)
            self.close_step()
            self.step_overhead_bytes += self.overhead_bytes

        self._send_off(travel)

    def depart_with(self, error: BaseException) -> None:
        """In place of the bucket, peers are told that this rank raised."""

        def travel() -> None:
            self.report(error)  # once those before have arrived
            raise error

        self._send_off(travel)

    def _send_off(self, travel: Callable[[], None]) -> None:
        """After those before; not at all if one of them failed, as it did on peers."""

        def unless_failed() -> None:
            if self._failed:
                return
            try:
                travel()
            except BaseException as error:
                self._failed = True
                super(BucketsExchange, self).interrupt(str(error))  # what still goes on
                raise

        self._travels.append(self._thread.submit(unless_failed))

    # ---------------------------------------------------------------- of all of them

    def wait(self) -> None:
        """Until all buckets have arrived.

        Raises:
            ExchangeError: a peer disagrees, raised, or did not arrive in time; later
                buckets stayed here, on every rank.
            BaseException: what this rank raised in place of a bucket.
        """
        try:
            errors = [travel.exception() for travel in self._travels]
        except BaseException as error:  # a second Ctrl-C
            self.interrupt(f"{type(error).__name__} in the middle of a step")
            raise
        self._travels, self._failed = [], False
        for failed in errors:
            if failed is not None:
                raise failed

    def _of(self, handle: Handle) -> Buffers:
        return self._filled[handle.bucket]

    def finish(self, handle: Any) -> Sequence[Payload | None]:
        """The payloads of all ranks, after `wait`."""
        return self._of(handle).received.payloads(handle.place)

    def locate(self, handles: Sequence[Any]) -> Located | None:
        """Where payloads lie; None where they came in several buckets."""
        if len({handle.bucket for handle in handles}) > 1:
            return None
        return self._of(handles[0]).locate([handle.place for handle in handles])

    def finish_bytes(self, handle: Any) -> Sequence[Array]:
        """Those of all ranks, rank 0 first."""
        return self._of(handle).gathered(handle.place)

    def finish_dense(self, handle: Any) -> tuple[Array, int]:
        """The sum over ranks, float32 or float64, and its bytes."""
        total = self._of(handle).sum(handle.place)
        return total, total.nbytes

    def clear(self) -> None:
        """The step is over; the memory of its buckets serves the next."""
        for buffers in self._filled[: self._count]:
            buffers.clear()
        self._count = self.step_overhead_bytes = 0

    # ------------------------------------------------------- when something is wrong

    def interrupt(self, reason: str) -> None:
        """As of `MpiExchange`; the thread leaves it soon."""
        if self._is_travelling and not self._refusal:
            self._failed, self._refusal = True, reason
            self._comm.abort(vars(self).copy())

    @property
    def _is_travelling(self) -> bool:
        return not all(travel.done() for travel in self._travels)

    def reporting(self, error: BaseException) -> Iterator[None]:
        """As of `MpiExchange`, once what is under way has come to its end."""
        while self._is_travelling:
            yield
        if not self._failed:  # or the peers know already
            yield from self._telling(error)
