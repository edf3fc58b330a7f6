"""Exchange: what Horovod does for the path, for both ways in which payloads travel."""

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import numpy.typing as npt
import torch

from hvd_sparse.carriers import Carrier, Embedded, Gathered, embed, extract
from hvd_sparse.core.contracts import (
    Average,
    ExchangeError,
    Located,
    Op,
    PayloadError,
    Scheduled,
    Sparsifier,
    Sum,
)
from hvd_sparse.core.frame import Frame
from hvd_sparse.core.payload import Payload, Raised
from hvd_sparse.core.received import Received
from hvd_sparse.core.roles import offers
from hvd_sparse.core.sparsifiers import fixed_density
from hvd_sparse.torch import elastic
from hvd_sparse.torch.batches import Arrival, Batch
from hvd_sparse.torch.contract import HorovodExchange

Array = npt.NDArray[Any]
Tensor = torch.Tensor

BATCH_BYTES = 64 << 20  # of gradients
_AT_ONCE = 64  # pairs of numbers are made in one go, which is cheaper


@cache
def horovod() -> Any:
    """horovod.torch, imported at first use."""
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise ImportError(
            "SparseCompressor needs Horovod with PyTorch: launch/build-horovod builds "
            "it; without Horovod use hvd_sparse.torch.DistributedOptimizer"
        ) from error
    return hvd


def is_exchanged(optimizer: Any) -> bool:
    """Whether Horovod gives gradients of its optimizer to a compressor."""
    hvd = horovod()
    group = getattr(optimizer, "process_set", None)  # the one for Adasum has none
    if group is None or not hvd.is_initialized() or not group.included():
        return False
    return elastic.is_elastic() or int(hvd.size()) > 1


def waits_for_peers() -> bool:
    """Whether a collective of this process is not complete. From any thread."""
    from horovod.torch import mpi_ops

    for handle in list(mpi_ops._handle_map):
        try:
            if not mpi_ops.poll(handle):
                return True
        except ValueError:  # completed, or taken away by a shutdown, meanwhile
            continue
    return False


class _Ranks:
    """Of the process set, which both ways of carrying payloads share."""

    def __init__(self, group: Any) -> None:
        """Args: group: returns the process set."""
        self._group = group
        self._elastic = elastic.is_elastic()
        self._place: tuple[int, int] | None = None

    @property
    def rank(self) -> int:
        """This process in the process set."""
        return self._find_place()[0]

    @property
    def size(self) -> int:
        """Processes in the process set; another one after elastic training's reset."""
        return self._find_place()[1]

    def _find_place(self) -> tuple[int, int]:
        """Asked once until `forget`: Horovod's answer takes a microsecond each time.

        In elastic training it changes without a word when workers are taken away.
        """
        if self._place is None or self._elastic:
            group = self._group()
            try:
                self._place = int(group.rank()), int(group.size())
            except ValueError as error:
                if not self._elastic:
                    raise
                # the watchdog has shut Horovod down: training recovers from this alone
                raise elastic.internal_error(str(error)) from error
        return self._place

    def forget(self) -> None:
        """Nothing is on its way, and the process set may be another."""
        self._place = None

    def nothing(self) -> Tensor:
        """What Horovod reduces where no rank sends a payload: zeros."""
        return torch.zeros(elastic.elements_beside(self.size))


class GatheredExchange(_Ranks):
    """Allgathers of payloads; Horovod reduces two numbers beside each."""

    batched = True
    weight = 1
    uneven = False

    def __init__(self, group: Any, prefix: str, *, padded: bool) -> None:
        """Args: prefix: of names. padded: ranks choose k themselves."""
        super().__init__(group)
        self._prefix = prefix
        self._padded = padded
        self._batches: dict[str, Batch] = {}  # by member
        self._arrived: dict[str, Arrival] = {}
        self._numbers: list[Tensor] = []
        self._numbers_of = (0, 0)
        self._padding = 0

    def plan(self, sizes: dict[str, int]) -> None:
        """Decide which tensors share an allgather.

        Layers that are neighbours go together, so that a batch is complete, and leaves,
        while the backward pass is still busy with others. Neighbours are found by
        name: ranks may hold their parameters in different orders.

        Args:
            sizes: per name, bytes of the gradient; of what goes sparse.
        """
        self.forget()
        members: list[str] = []
        size = 0
        for name in sorted(sizes, key=_natural):
            members.append(name)
            size += sizes[name]
            if size >= BATCH_BYTES:
                self._share(members)
                members, size = [], 0
        if members:
            self._share(members)

    def _share(self, members: list[str]) -> None:
        batch = Batch(f"{self._prefix}.batch.{members[0]}", members)
        self._batches.update(dict.fromkeys(members, batch))

    def forget(self) -> None:
        """Nothing is planned either."""
        super().forget()
        self._numbers.clear()
        self._batches.clear()
        self._arrived.clear()

    def announce(self, name: str) -> list[str]:
        """A payload of this tensor will come.

        Returns:
            With the last one of a batch, all of which no payload has come: as the batch
            leaves when it is complete, they may as well be made in one go.
        """
        return self._enter(name).awaited

    def start(self, name: str, payload: Payload | Raised) -> str:
        """The payload leaves with the last one of its batch."""
        batch = self._enter(name)
        batch.payloads[name] = payload
        if batch.complete:
            self._gather(batch)
        return name

    def _enter(self, name: str) -> Batch:
        self._arrived.pop(name, None)  # of a step that was given up after it came
        if name not in self._batches:
            self._batches[name] = Batch(f"{self._prefix}.{name}", [name])
        batch = self._batches[name]
        if batch.handle is not None:
            self._restart(batch, name)
        batch.present.add(name)
        return batch

    def _restart(self, batch: Batch, name: str) -> None:
        """The batch has left: with this tensor in a step that was given up, or late."""
        if name in batch.payloads:
            batch.clear()
        else:
            self._await(batch)

    def _gather(self, batch: Batch) -> None:
        joined = batch.joined(padded=self._padded)
        assert batch.frame is not None
        self._padding += joined.size - batch.frame.size
        try:
            batch.handle = horovod().allgather_async(
                torch.from_numpy(joined), name=batch.name, process_set=self._group()
            )
        except BaseException:
            batch.clear()  # its payloads are taken back
            raise

    def _await(self, batch: Batch) -> None:
        frame, handle = batch.frame, batch.handle
        assert frame is not None, "it has left"
        batch.clear()
        gathered = horovod().synchronize(handle)
        if gathered is None:
            raise ExchangeError("Horovod was shut down with payloads on their way")
        arrival = Arrival(frame, gathered.numpy(), padded=self._padded)
        self._arrived.update(dict.fromkeys(arrival.names, arrival))

    def arrive(self, handle: str) -> Sequence[str]:
        """Wait for the batch that this payload is in; the names of all of it.

        All that will be sent in this step has been: incomplete batches leave now.
        """
        return self._arrival(handle).names

    def _arrival(self, handle: str) -> Arrival:
        if handle not in self._arrived:
            for batch in dict.fromkeys(self._batches.values()):
                if batch.payloads and batch.handle is None:
                    self._gather(batch)
            self._await(self._batches[handle])
        return self._arrived[handle]

    def withdraw(self) -> None:
        """The step was given up: what waits for others of its batch does not leave."""
        for batch in dict.fromkeys(self._batches.values()):
            if batch.handle is None:
                batch.clear()

    def forsake(self, handle: str) -> None:
        """Its batch is not awaited: not all ranks have sent something of it."""
        if handle in self._batches:
            self._batches[handle].clear()

    def drain(self) -> None:
        """Wait for all that is on its way, and drop it: the step has failed.

        Incomplete batches leave: peers wait for them.
        """
        for batch in dict.fromkeys(self._batches.values()):
            with suppress(Exception):  # it failed as well
                if batch.payloads and batch.handle is None:
                    self._gather(batch)
                if batch.handle is not None:
                    horovod().synchronize(batch.handle)
            batch.clear()
        self._arrived.clear()

    def drop(self, names: Sequence[str]) -> None:
        """Their payloads need not be kept."""
        for name in names:
            self._arrived.pop(name, None)

    def finish(self, handle: str) -> Sequence[Payload | None]:
        """The payloads of all ranks."""
        payloads = self._arrival(handle).payloads(handle, self.size)
        del self._arrived[handle]
        return payloads

    def locate(self, handles: Sequence[str]) -> Located | None:
        """Where they lie, if all arrived in one batch."""
        return self._arrived[handles[0]].locate(handles, self.size)

    def to_reduce(self, handle: str) -> Tensor:
        """1 from every rank and 1 from the first: what becomes of them tells the op."""
        del handle
        place = self._find_place()
        if not self._numbers or place != self._numbers_of:
            rank, size = self._numbers_of = place
            numbers = torch.zeros(_AT_ONCE, elastic.elements_beside(size))
            numbers[:, 0], numbers[:, 1] = 1.0, float(rank == 0)
            self._numbers = list(numbers.unbind())
        return self._numbers.pop()

    def reduced(self, handle: str, result: Tensor) -> Op:
        """The op that made this of the numbers."""
        total, first, *_ = result.tolist()
        try:
            return _op_of(total, first, size=self.size)
        except ValueError as error:
            raise ValueError(f"{handle}: {error}") from None

    def bytes_beside(self, reduced: Tensor, tensors: int) -> tuple[int, int]:
        """Bytes sent and received that the path does not count: not of a payload.

        Args:
            reduced: what Horovod made of the numbers of a tensor.
            tensors: how many have arrived.
        """
        beside = tensors * reduced.numel() * reduced.element_size()
        padding, self._padding = self._padding, 0
        return beside + padding, beside + padding * (self.size - 1)


def _natural(name: str) -> list[tuple[str, int]]:
    """Sorts layer10 after layer9."""
    words = re.findall(r"(\D*)(\d*)", name)
    return [(text, int(number or -1)) for text, number in words]


class EmbeddedExchange(_Ranks):
    """Payloads inside the tensor that Horovod reduces."""

    batched = False
    weight = 4  # twice the bytes, and an allreduce moves each of them twice
    uneven = True

    def __init__(self, group: Any) -> None:
        """Args: group: returns the process set."""
        super().__init__(group)
        self._sent: dict[str, Frame] = {}
        self._received: dict[str, Received] = {}

    def plan(self, sizes: dict[str, int]) -> None:
        """Every payload travels alone."""

    def announce(self, name: str) -> list[str]:
        """Nothing waits for it."""
        return []

    def withdraw(self) -> None:
        """Nothing waits."""

    def forsake(self, handle: str) -> None:
        """Nothing is awaited but what Horovod reduces."""

    def arrive(self, handle: str) -> Sequence[str]:
        """It is there, with what Horovod reduced, and nothing else."""
        return [handle]

    def drop(self, names: Sequence[str]) -> None:
        """`finish` has done so."""

    def drain(self) -> None:
        """All is on its way with what Horovod reduces."""
        self._sent.clear()
        self._received.clear()

    def forget(self) -> None:
        """Nor has it arrived."""
        super().forget()
        self._sent.clear()
        self._received.clear()

    def start(self, name: str, payload: Payload | Raised) -> str:
        """It leaves when Horovod reduces it."""
        self._sent[name] = Frame([(name, payload)])
        return name

    def locate(self, handles: Sequence[str]) -> None:
        """Each came by itself."""

    def to_reduce(self, handle: str) -> Tensor:
        """The payload in this rank's slot."""
        return torch.from_numpy(embed(self._sent[handle].bytes(), self.rank, self.size))

    def reduced(self, handle: str, result: Tensor) -> Op:
        """The op; the payloads are kept for `finish`."""
        try:
            parts, scale = extract(result.numpy(), self.size)
        except PayloadError as error:
            raise PayloadError(f"{handle}: {error}") from None
        self._received[handle] = Received(self._sent[handle], parts, uneven=True)
        return Sum if abs(scale - 1) < 0.25 / self.size else Average

    def finish(self, handle: str) -> Sequence[Payload | None]:
        """They came with what Horovod reduced."""
        return self._received.pop(handle).payloads(0)

    def bytes_beside(self, reduced: Tensor, tensors: int) -> tuple[int, int]:
        """As above, of one tensor."""
        assert tensors == 1
        whole = reduced.numel() * reduced.element_size()
        payload = 2 * (reduced.numel() // self.size - 1)
        return whole - payload, whole - (self.size - 1) * payload


def exchange_for(
    carrier: Carrier, sparsifier: Sparsifier, group: Any, prefix: str
) -> HorovodExchange:
    """What carries payloads as the user wants it, if the sparsifier allows.

    Raises:
        TypeError: carrier is none.
        ValueError: it is Embedded(), and k may differ between ranks or steps.
    """
    if not isinstance(carrier, Gathered | Embedded):
        raise TypeError(f"exchange must be Gathered() or Embedded(), got {carrier!r}")
    fixed = fixed_density(sparsifier) is not None
    if isinstance(carrier, Gathered):
        return GatheredExchange(group, prefix, padded=not fixed)
    if not fixed or offers(sparsifier, Scheduled):
        raise ValueError(
            "exchange=Embedded() needs a k that is the same on every rank and in every "
            f"step, such as that of TopK or RandomK; {sparsifier!r} has none"
        )
    return EmbeddedExchange(group)


def _op_of(total: float, first: float, *, size: int) -> Op:
    """Which op made these numbers of 1 on every rank, and of 1 on the first alone."""
    close = 0.25 / size
    if abs(total - size) < close and abs(first - 1) < close:
        return Sum
    if abs(total - 1) < close and abs(first - 1 / size) < close:
        return Average
    raise ValueError(
        "op must be Average or Sum, and requires_grad the same on every rank, but of "
        f"{size} ones Horovod made {total:g}"
    )
