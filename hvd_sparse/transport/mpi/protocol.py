"""What ranks say to each other in a step, as generators that yield what they wait for.

1. one all-gather of fixed-size headers: do all ranks mean the same step, with the same
   tensors and configuration? Has anyone raised? (see `agreement`)
2. one all-gather of all payloads, and beside it at most one all-reduce a dtype for the
   tensors that go dense.

Agreement comes first because ranks that disagree on counts corrupt each other's memory.
Whoever runs a generator goes on with it when all that it yielded has arrived. An
ExchangeError that it raises is raised on every rank, and nothing is under way then.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import accumulate, zip_longest
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.contracts import ExchangeError
from hvd_sparse.transport.contract import Arrived, Communicator
from hvd_sparse.transport.mpi.agreement import (
    STEP_HEADER_BYTES,
    Row,
    StepHeader,
    digest,
    disagreement,
    pack_table,
    unpack,
)
from hvd_sparse.transport.mpi.buffers import WORD, Buffers

Array = npt.NDArray[Any]
Result = TypeVar("Result")
Steps = Generator[list[Arrived], None, Result]

MESSAGE_BYTES = 1 << 30  # collectives count in C ints: more is split
_REASON_BYTES = 1024


def exchange(
    comm: Communicator,
    step: int,
    rows: Sequence[Row],
    configuration: str,
    buffers: Buffers,
) -> Steps[None]:
    """A step: all ranks get the payloads and the sums of all.

    Args:
        comm: private to the exchange.
        step: completed exchanges of it.
        rows: what ranks must have alike of each payload and tensor.
        configuration: what else they must have alike.
        buffers: what this rank sends; then what it receives.
    """
    header = StepHeader(step, buffers.close(), digest(rows, configuration))
    headers = yield from _agree(comm, header)
    if any(other.raised for other in headers):
        reasons = yield from _reasons(comm, "", headers)
        raise ExchangeError(f"{names(rows)}: {reasons}")
    if len({other.common for other in headers}) > 1:
        table = pack_table(rows, configuration, step)
        raise ExchangeError(disagreement((yield from _tables(comm, table))))
    counts = [other.payload_bytes // WORD for other in headers]
    received = buffers.frame(counts, comm.rank)
    dense = buffers.dense.values()
    for posted in zip_longest(_gather(comm, received, counts), _reduce(comm, dense)):
        yield [arrived for arrived in posted if arrived is not None]
    buffers.open(counts)


def broadcast(comm: Communicator, arrays: Sequence[Array], root: int) -> Steps[None]:
    """Arrays of one rank to all, who have agreed on their sizes."""
    yield [comm.broadcast(array, root) for array in arrays]


def farewell(comm: Communicator, step: int, error: BaseException) -> Steps[None]:
    """In place of a step: this rank raised and takes no part in it."""
    header = StepHeader(step, 0, bytes(16), raised=True)
    headers = yield from _agree(comm, header)
    yield from _reasons(comm, f"{type(error).__name__}: {error}", headers)


def names(rows: Sequence[Row]) -> str:
    """What a message calls a step of these."""
    found = [row[0] for row in rows]
    if len(found) < 2:
        return found[0] if found else "no tensor"
    return f"{found[0]} (and {len(found) - 1} more tensors)"


def _agree(comm: Communicator, header: StepHeader) -> Steps[list[StepHeader]]:
    own = np.frombuffer(header.pack(), np.uint8)
    everyone = np.empty(comm.size * STEP_HEADER_BYTES, np.uint8)
    yield [comm.all_gather(own, everyone)]
    data = everyone.tobytes()
    cuts = range(0, len(data), STEP_HEADER_BYTES)
    try:
        return [unpack(data[cut : cut + STEP_HEADER_BYTES]) for cut in cuts]
    except ValueError as error:
        raise ExchangeError(str(error)) from None


def _gather(
    comm: Communicator, received: Array, counts: list[int]
) -> Iterator[Arrived]:
    """In place, in rounds of at most MESSAGE_BYTES from each rank."""
    room = max(1, MESSAGE_BYTES // WORD)
    starts = [0, *accumulate(counts)]
    for done in range(0, max(counts), room):
        now = [min(max(count - done, 0), room) for count in counts]
        places = [
            start + done if count else 0
            for start, count in zip(starts, now, strict=False)
        ]
        yield comm.all_gather_in_place(received, now, places)


def _reduce(comm: Communicator, buffers: Iterable[Array]) -> Iterator[Arrived]:
    """In place, in rounds of at most MESSAGE_BYTES."""
    for buffer in buffers:
        room = max(1, MESSAGE_BYTES // buffer.itemsize)
        for done in range(0, buffer.size, room):
            yield comm.all_reduce(buffer[done : done + room])


def _reasons(comm: Communicator, own: str, headers: list[StepHeader]) -> Steps[str]:
    """Why ranks raised, as one sentence."""
    reason = np.zeros(_REASON_BYTES, np.uint8)
    text = own.encode()[:_REASON_BYTES]
    reason[: len(text)] = np.frombuffer(text, np.uint8)
    everyone = np.empty((comm.size, _REASON_BYTES), np.uint8)
    yield [comm.all_gather(reason, everyone)]
    return "; ".join(
        f"rank {rank} raised {_text(everyone[rank])}"
        for rank, header in enumerate(headers)
        if header.raised
    )


def _text(reason: Array) -> str:
    return reason.tobytes().rstrip(b"\0").decode(errors="replace")


def _tables(comm: Communicator, table: bytes) -> Steps[list[bytes]]:
    lengths = np.empty(comm.size, np.int32)
    yield [comm.all_gather(np.array([len(table)], np.int32), lengths)]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    everyone = np.empty(int(ends[-1]), np.uint8)
    own = everyone[starts[comm.rank] : ends[comm.rank]]
    own[:] = np.frombuffer(table, np.uint8)
    yield [comm.all_gather_in_place(everyone, lengths.tolist(), starts.tolist())]
    return [
        everyone[start:end].tobytes() for start, end in zip(starts, ends, strict=True)
    ]
