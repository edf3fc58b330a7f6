"""What carries a step over torch.distributed: a process group, from host memory.

Neither MPI nor Horovod is needed. The exchange is that of MPI (`transport.mpi`): this
file is what it calls of torch.distributed.
"""

import atexit
import copy
import os
import sys
import threading
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.contracts import ExchangeError
from hvd_sparse.core.last_words import flush_output
from hvd_sparse.transport.contract import Arrived, Communicator
from hvd_sparse.transport.mpi import failure

Array = npt.NDArray[Any]

_LOOK = timedelta(milliseconds=50)  # to wait for a collective until the next look
# gloo gives up later than the exchange, whose error says more; and this long a process
# may need to end, since gloo's end waits for what is under way
_LATER_S = 2.0
# Collectives that are kept when done: a thread of gloo lets go of each a little
# later. If it is the last to, it needs the interpreter for its tensors, and a process
# that is ending by then dies of that: "terminate called without an active exception".
_KEPT = 8
_attributes: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


def is_process_group(comm: Any) -> bool:
    """Whether it is one of torch.distributed, also one that this rank is not in."""
    dist = _distributed()
    if dist is None:
        return False
    return isinstance(comm, dist.ProcessGroup) or _is_outside(comm)


def _is_outside(comm: Any) -> bool:
    return comm is _distributed().GroupMember.NON_GROUP_MEMBER


def all_ranks(ranks_of_mpi: int) -> Any:
    """The group of all ranks where torch.distributed is initialized, or else None.

    Args:
        ranks_of_mpi: how many a launcher of MPI has started, 0 without one.

    Raises:
        ValueError: it is initialized for fewer than these; or it is not, and this
            process is one of several that torchrun, or another launcher of
            torch.distributed, has started: ranks would train without each other.
    """
    dist = _distributed()
    if dist is not None and dist.is_initialized():
        size = dist.get_world_size()
        if size < ranks_of_mpi:
            raise ValueError(
                f"comm must be given where torch.distributed has {size} ranks, but "
                f"{ranks_of_mpi} were started: MPI.COMM_WORLD, or a process group"
            )
        return dist.group.WORLD
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    by_another = {"RANK", "MASTER_ADDR"} <= {*os.environ} and not ranks_of_mpi
    if (by_torchrun or by_another) and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            "torch.distributed must be initialized, by init_process_group(), before "
            f"this rank of {os.environ['WORLD_SIZE']} exchanges gradients: it would "
            "train alone"
        )
    return None


def _distributed() -> Any:
    """torch.distributed, where it is imported and was built."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() else None


class ProcessGroupCommunicator:
    """The ranks of a process group.

    Exchanges work on private groups of the same ranks, over gloo: c10d matches
    collectives by their order, and that of the user's own is not known here.
    """

    def __init__(self, group: Any, timeout_s: float) -> None:
        """Join the ranks.

        Args:
            group: torch.distributed.group.WORLD, or one of new_group.
            timeout_s: how long the exchange waits; the group's own timeout, if that is
                shorter.

        Raises:
            ValueError: this rank is not in the group.
        """
        if _is_outside(group):
            raise ValueError("comm must be a process group that this rank is in")
        self._group, self._timeout_s = group, timeout_s
        self.rank: int = group.rank()
        self.size: int = group.size()
        self._gloo: Any = None  # of a duplicate
        self._meeting: _Meeting | None = None  # of the last duplicate
        self._under_way: list[Any] = []
        self._kept: deque[Any] = deque(maxlen=_KEPT)

    @property
    def attributes(self) -> dict[str, Any]:
        """Of the group, which may have several objects like this one."""
        return _attributes.setdefault(self._group, {})

    def duplicate(self) -> tuple[Communicator, Arrived]:
        """Ranks find each other through the store of the group, under a new name.

        Not by new_group: names of its groups count all of this process, and ranks may
        have made different ones.
        """
        duplicate = copy.copy(self)
        duplicate._under_way, duplicate._kept = [], deque(maxlen=_KEPT)
        self._meeting = _Meeting(duplicate)
        return duplicate, self._meeting.is_over

    def connect(self) -> None:
        """Waits for all ranks to come."""
        dist = _distributed()
        _, store = dist.distributed_c10d._world.pg_map[self._group]
        # a name that no earlier group of this store had, also before another
        # init_process_group: addresses of those are still in there
        number = store.add(f"hvd_sparse/{self.rank}", 1)
        store = dist.PrefixStore(f"hvd_sparse/{number}", store)
        timeout = self._timeout()
        self._gloo = dist.ProcessGroupGloo(store, self.rank, self.size, timeout)

    def _timeout(self) -> timedelta:
        own = timedelta(seconds=min(self._timeout_s, 1e6) + _LATER_S)
        [device, *_] = self._group._device_types
        options = getattr(self._group._get_backend(device), "options", None)
        return own if options is None else min(own, options._timeout)

    def all_gather(self, own: Array, everyone: Array) -> Arrived:
        """Fixed sizes."""
        return self._posted(self._gloo._allgather_base, _tensor(everyone), _tensor(own))

    def all_gather_in_place(
        self, array: Array, counts: Sequence[int], starts: Sequence[int]
    ) -> Arrived:
        """All ranks send as much as the one that has most: gloo gathers no others."""
        here, most = _slice_of(counts, starts, self.rank), max(counts)
        own = np.zeros(most, array.dtype)
        own[: counts[self.rank]] = array[here]
        everyone = np.empty((self.size, most), array.dtype)
        gathered = self.all_gather(own, everyone)

        def arrived() -> bool:
            if not gathered():
                return False
            for rank, count in enumerate(counts):
                array[_slice_of(counts, starts, rank)] = everyone[rank, :count]
            return True

        return arrived

    def all_reduce(self, array: Array) -> Arrived:
        """In place."""
        return self._posted(self._gloo.allreduce, [_tensor(array)])

    def broadcast(self, array: Array, root: int) -> Arrived:
        """In place."""
        options = _distributed().BroadcastOptions()
        options.rootRank = root
        return self._posted(self._gloo.broadcast, [_tensor(array)], options)

    def _posted(self, collective: Any, *arguments: Any) -> Arrived:
        """Begun; the work keeps the tensors, and these the arrays."""
        try:
            work = collective(*arguments)
        except RuntimeError as error:
            raise _lost(error) from error
        self._under_way.append(work)
        self._kept.append(work)

        def arrived() -> bool:
            if not work.is_completed():
                return False
            if work in self._under_way:
                self._under_way.remove(work)
            try:
                work.wait()  # raises what became of it
            except RuntimeError as error:
                raise _lost(error) from error
            return True

        return arrived

    def pause(self, waited_s: float) -> None:
        """Until something has come, or for a moment; the core is left to others."""
        del waited_s
        for work in self._under_way[:1]:
            try:
                work.wait(_LOOK)
            except RuntimeError:
                return  # not there yet, or failed: `arrived` tells which

    def watch(self, exchange: Any) -> None:
        """An exception that ends this process is reported first."""
        failure.watch(exchange)

    def free(self) -> None:
        """Ends its threads, and closes what connects it."""
        self._gloo = None

    def abort(self, held: object) -> None:
        """Gloo's own timeout ends what is under way."""
        failure.keep_for_ever(held)
        if self._meeting is not None:
            atexit.register(self._meeting.leave)


class _Meeting:
    """Ranks that connect, in a thread: it may wait for one that does not come."""

    def __init__(self, comm: ProcessGroupCommunicator) -> None:
        self._comm = comm
        self._error: RuntimeError | None = None
        self._thread = threading.Thread(
            target=self._connect, name="hvd_sparse meeting", daemon=True
        )
        self._thread.start()

    def _connect(self) -> None:
        try:
            self._comm.connect()
        except RuntimeError as error:
            self._error = error

    def is_over(self) -> bool:
        self._thread.join(_LOOK.total_seconds())
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise _lost(self._error) from self._error
        return True

    def leave(self) -> None:
        """At exit: the thread must not come back to an interpreter that has ended."""
        self._thread.join(_LATER_S + 1)
        if self._thread.is_alive():
            flush_output()
            os._exit(1)


def _slice_of(counts: Sequence[int], starts: Sequence[int], rank: int) -> slice:
    """Where the part of a rank lies."""
    return slice(starts[rank], starts[rank] + counts[rank])


def _tensor(array: Array) -> Any:
    """The same memory, unless it may not be written: then it is only read here."""
    import torch

    flat = array.reshape(-1)
    return torch.from_numpy(flat if flat.flags.writeable else flat.copy())


_GONE = ("closed by peer", "reset by peer", "Broken pipe", "imed out", "timeout")


def _lost(error: RuntimeError) -> ExchangeError:
    gone = any(words in str(error) for words in _GONE)
    why = "a peer is gone, or did not arrive in time" if gone else "torch.distributed"
    return ExchangeError(f"{why}: {error}")
