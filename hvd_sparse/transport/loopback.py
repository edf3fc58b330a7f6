"""Ranks that are threads of one process, joined by memory.

Each gives its peers copies, so that nobody writes into memory of another: a rank that
gives up, or ends, leaves nothing behind that must be kept, and no process to abort.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from threading import Condition
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.contracts import ExchangeError
from hvd_sparse.transport.contract import Arrived, Communicator

Array = npt.NDArray[Any]

_PAUSE_S = 0.05  # to look again, even if no peer has moved
# whose thread this is; what a process knows of all its optimizers is told apart by it
this_rank: ContextVar["LoopbackCommunicator | None"] = ContextVar(
    "this_rank", default=None
)
Given = dict[int, Any]  # per rank, what it gave to a collective; complete when all did


class Job:
    """What ranks share, whichever communicator they use.

    Attributes:
        size: how many ranks there are.
        moved: guards everything here; notified whenever a rank has done something.
        moves: how often that was.
        ended: per rank that takes part in nothing any more, why.
    """

    def __init__(self, size: int) -> None:
        """Args: size: how many ranks."""
        self.size = size
        self.moved = Condition()
        self.moves = 0
        self.ended: dict[int, str] = {}

    def move(self) -> None:
        """A rank has done something; with `moved` held."""
        self.moves += 1
        self.moved.notify_all()

    def end(self, rank: int, why: str) -> None:
        """Peers that wait for this rank, or will, are told."""
        with self.moved:
            self.ended.setdefault(rank, why)
            self.move()


class LoopbackCommunicator:
    """One rank's end of collectives between threads."""

    def __init__(self, rank: int, job: Job, under_way: dict[int, Given]) -> None:
        """Used by one thread. Args: under_way: by number; shared by the ranks."""
        self.rank = rank
        self.size = job.size
        self.attributes: dict[str, Any] = {}
        self._job = job
        self._under_way = under_way
        self._begun = 0
        self._seen = 0  # moves of the job, before this rank looked last

    def _meet(self, given: Any, take: Callable[[list[Any]], None]) -> Arrived:
        """Give to the peers now; take, from what all gave, when it is there."""
        with self._job.moved:
            all_given = self._under_way.setdefault(self._begun, {})
            all_given[self.rank] = given
            if len(all_given) == self.size:
                del self._under_way[self._begun]
            self._job.move()
        self._begun += 1
        taken = False

        def arrived() -> bool:
            nonlocal taken
            if not taken and self._is_complete(all_given):
                take([all_given[rank] for rank in range(self.size)])
                taken = True
            return taken

        return arrived

    def _is_complete(self, given: Given) -> bool:
        with self._job.moved:
            for rank, why in self._job.ended.items():
                if rank not in given:
                    raise ExchangeError(f"rank {rank} {why}")
            return len(given) == self.size

    def duplicate(self) -> tuple[Communicator, Arrived]:
        """What is under way on it is that of the first rank's."""
        other = LoopbackCommunicator(self.rank, self._job, {})

        def take(given: list[dict[int, Given]]) -> None:
            other._under_way = given[0]

        return other, self._meet(other._under_way, take)

    def all_gather(self, own: Array, everyone: Array) -> Arrived:
        """Copies twice: into what peers read, and out of it."""

        def take(given: list[Array]) -> None:
            np.concatenate(given, out=everyone.reshape(-1))

        return self._meet(own.flatten(), take)

    def all_gather_in_place(
        self, array: Array, counts: Sequence[int], starts: Sequence[int]
    ) -> Arrived:
        """The same."""
        parts = [
            array[start : start + count]
            for start, count in zip(starts, counts, strict=False)
        ]

        def take(given: list[Array]) -> None:
            for part, theirs in zip(parts, given, strict=True):
                part[:] = theirs

        return self._meet(parts[self.rank].copy(), take)

    def all_reduce(self, array: Array) -> Arrived:
        """Added up rank by rank, everywhere."""

        def take(given: list[Array]) -> None:
            array[:] = given[0]
            with np.errstate(over="ignore", invalid="ignore"):  # as in MPI
                for theirs in given[1:]:
                    np.add(array, theirs, out=array)

        return self._meet(array.copy(), take)

    def broadcast(self, array: Array, root: int) -> Arrived:
        """The root waits for the others, too."""

        def take(given: list[Array]) -> None:
            if self.rank != root:
                array[:] = given[root]

        return self._meet(array.copy() if self.rank == root else None, take)

    def pause(self, waited_s: float) -> None:
        """Until a peer has moved."""
        del waited_s
        with self._job.moved:
            self._job.moved.wait_for(lambda: self._job.moves != self._seen, _PAUSE_S)
            self._seen = self._job.moves

    def watch(self, exchange: Any) -> None:
        """Who runs the ranks knows when one of them ends, and how."""

    def free(self) -> None:
        """It holds nothing."""

    def abort(self, held: object) -> None:
        """Peers have copies, and nobody waits for the end of a thread."""
