"""The exchange that every MPI integration uses: all payloads of a step at once.

What is started is collected; `open` begins the step (see `protocol`) on a private
duplicate of the communicator. Nothing blocks: what is under way is polled against a
deadline, since a blocked collective can not time out. A step that missed it can not be
taken back (see `failure`), so the exchange refuses further use.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy.typing as npt

from hvd_sparse.core.contracts import ExchangeError, Located
from hvd_sparse.core.payload import Payload
from hvd_sparse.transport.contract import Arrived, Communicator
from hvd_sparse.transport.mpi import protocol
from hvd_sparse.transport.mpi.agreement import STEP_HEADER_BYTES, Row
from hvd_sparse.transport.mpi.buffers import WORD, Buffers
from hvd_sparse.transport.mpi.communicator import communicator_of
from hvd_sparse.transport.mpi.failure import Deadline

Array = npt.NDArray[Any]


class MpiExchange:
    """Gathers payloads and reduces dense tensors, all of a step at once."""

    weight = 1
    uneven = False

    def __init__(self, comm: Any, timeout_s: float) -> None:
        """Duplicate the communicator; collective over comm.

        Args:
            comm: as of `communicator_of`.
            timeout_s: seconds to wait for peers in a step.

        Raises:
            TypeError, ValueError: comm is no communicator, or timeout_s out of range.
            ImportError: mpi4py is missing, and comm is not of another kind.
            ExchangeError: a peer did not make its exchange in time.
        """
        self._deadline = Deadline(timeout_s)
        given = communicator_of(comm, timeout_s)
        self.rank, self.size = given.rank, given.size
        self._comm = self._duplicate(given)
        self._buffers = Buffers(self.size)
        self.step = 0
        self.overhead_bytes = 0
        self._refusal = ""
        self._forget()
        self._comm.watch(self)

    def _duplicate(self, comm: Communicator) -> Communicator:
        """A peer may have failed before it came here."""
        duplicate, arrived = comm.duplicate()
        self._deadline.start()
        try:
            while not arrived():
                who = f"rank {self.rank}"
                comm.pause(self._deadline.check(who, "make its exchange"))
        except BaseException:  # Ctrl-C, too
            comm.abort((duplicate, arrived))
            raise
        return duplicate

    def _forget(self) -> None:
        self._buffers.clear()
        self._use(self._buffers)

    def _use(self, buffers: Buffers) -> None:
        """For the next step."""
        self._buffers, self._payloads = buffers, buffers.payloads
        self._deadline.forget()
        self._protocol: protocol.Steps[None] | None = None
        self._what = ""
        self._waiting: list[Arrived] = []

    # ------------------------------------------------------------- Exchange protocol

    def start(self, name: str, payload: Payload) -> int:
        """Add a payload to the step that begins with `open`."""
        self._payloads.append((name, payload))
        return len(self._payloads) - 1

    def finish(self, handle: int) -> Sequence[Payload | None]:
        """The payloads of all ranks, after `close_step`."""
        return self._buffers.received.payloads(handle)

    def locate(self, handles: Sequence[int]) -> Located | None:
        """Where payloads lie."""
        return self._buffers.locate(handles)

    def start_bytes(self, data: Array) -> int:
        """Add (bytes,) uint8 that are no payload; a multiple of 8."""
        self._buffers.blobs.append(data)
        return len(self._buffers.blobs) - 1

    def finish_bytes(self, handle: int) -> Sequence[Array]:
        """Those of all ranks, rank 0 first."""
        return self._buffers.gathered(handle)

    def start_dense(self, name: str, gradient: Array) -> int:
        """Add a tensor to the dense allreduce of the step; (n,), on host or device."""
        del name
        return self._buffers.add_dense(gradient)

    def finish_dense(self, handle: int) -> tuple[Array, int]:
        """The sum over ranks, float32 or float64, and its bytes."""
        total = self._buffers.sum(handle)
        return total, total.nbytes

    # ----------------------------------------------------------------- one step

    def open(self, rows: Sequence[Row], configuration: str) -> None:
        """Begin the step with all that was started; does not wait."""
        self._begin(self._exchange(rows, configuration), protocol.names(rows))

    def _exchange(
        self, rows: Sequence[Row], configuration: str
    ) -> protocol.Steps[None]:
        given = self._comm, self.step, rows, configuration, self._buffers
        yield from protocol.exchange(*given)
        self.overhead_bytes = STEP_HEADER_BYTES + WORD * len(self._buffers.blobs)
        self.step += 1

    def begin_broadcast(self, arrays: Sequence[Array], root: int, what: str) -> None:
        """Begin a step that overwrites arrays with those of one rank.

        Ranks must have agreed on the sizes; each below 2 GiB. What is under way is kept
        for ever if a peer does not arrive: memory of the caller, too.
        """
        self._begin(protocol.broadcast(self._comm, arrays, root), what)

    def _begin(self, steps: protocol.Steps[None], what: str) -> None:
        if self._refusal:
            raise ExchangeError(
                f"this exchange can not be used any more: {self._refusal}"
            )
        self._protocol = steps
        self._what = what
        self._waiting = next(steps)

    @property
    def busy(self) -> bool:
        """Whether a step is under way."""
        return self._protocol is not None

    def advance(self) -> bool:
        """Do what can be done without waiting; returns whether the step is complete.

        Raises:
            ExchangeError: a peer disagrees, raised, or is gone.
        """
        while self._protocol is not None:
            if not self._all_arrived():
                return False
            try:
                self._waiting = next(self._protocol, [])
            except ExchangeError:
                self._protocol = None  # all ranks know, and nothing is under way
                raise
            if not self._waiting:
                self._protocol = None
        return True

    def _all_arrived(self) -> bool:
        try:
            return all([arrived() for arrived in self._waiting])  # noqa: C419  # look at all
        except ExchangeError as error:
            raise ExchangeError(f"{self._what}: {error}") from None

    def close_step(self) -> None:
        """Wait until the step is complete.

        Raises:
            ExchangeError: a peer disagrees, raised, or did not arrive in time.
        """
        self._deadline.start()
        while not self.advance():
            self._pause_or_give_up()

    def clear(self) -> None:
        """Drop the buffers of a completed step."""
        self._forget()

    # ------------------------------------------------------- when something is wrong

    def _pause_or_give_up(self) -> None:
        if self._refusal:  # another thread has left it
            raise ExchangeError(self._refusal)
        try:
            who = f"{self._what}: step {self.step}: rank {self.rank}"
            waited = self._deadline.check(who)
        except ExchangeError as error:
            self.interrupt(str(error))
            raise
        self._comm.pause(waited)

    def interrupt(self, reason: str) -> None:
        """Leave a step that is under way; the exchange can not be used any more."""
        if self.busy and not self._refusal:
            self._refusal = reason
            self._comm.abort(vars(self).copy())

    def report(self, error: BaseException) -> None:
        """Tell the peers, in place of this step, that this rank raised.

        Returns when they have heard it; this rank then raises its own error.

        Raises:
            ExchangeError: they did not come to hear it in time.
        """
        self._deadline.start()
        try:
            for _ in self._telling(error):
                self._pause_or_give_up()
        except BaseException as another:  # Ctrl-C, say: it is not waited for any more
            self.interrupt(f"{type(another).__name__} while it told its peers")
            raise

    def reporting(self, error: BaseException) -> Iterator[None]:
        """What `report` does, as an iterator that ends when the peers have heard."""
        return self._telling(error)

    def _telling(self, error: BaseException) -> Iterator[None]:
        if self._refusal or self.size == 1:
            return
        while not self.advance():  # peers are in it too; the next is for the report
            yield
        self._forget()
        self._deadline.start()
        steps = protocol.farewell(self._comm, self.step, error)
        self._begin(steps, f"after {type(error).__name__}")
        while not self.advance():
            yield
        self._forget()

    def free(self) -> None:
        """Free the private communicator; collective, and only where nothing is lost."""
        if self.busy:
            raise RuntimeError("finish() must come before close()")
        if not self._refusal:
            self._comm.free()
        self._refusal = self._refusal or "it was closed"
