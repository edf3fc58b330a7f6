"""What carries the steps of the exchange over MPI: mpi4py, loopback, or your own."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

Array = Any  # numpy.ndarray
Arrived = Callable[[], bool]  # looks, without waiting, whether something is there


@runtime_checkable
class Communicator(Protocol):
    """Ranks that take part in collectives; the MPI exchange runs on any such thing.

    All ranks call the same methods in the same order; two duplicates do not mix.
    Collectives do not wait: each returns what tells whether it is complete on this
    rank, to be asked until it is. Until then its arrays, which are contiguous and in
    host memory, are in use. To ask is an ExchangeError where a peer is known to be
    gone.

    Attributes:
        rank: this one, in [0, size).
        size: how many ranks there are.
        attributes: what users of this communicator keep with it.
    """

    @property
    def rank(self) -> int: ...  # noqa: D102  # see above

    @property
    def size(self) -> int: ...  # noqa: D102

    @property
    def attributes(self) -> dict[str, Any]: ...  # noqa: D102

    def duplicate(self) -> tuple["Communicator", Arrived]:
        """The same ranks again; not to be used before it is there."""
        ...

    def all_gather(self, own: Array, everyone: Array) -> Arrived:
        """Overwrites everyone with the arrays of all ranks, rank 0 first.

        Args:
            own: of any shape and dtype; the same on every rank.
            everyone: size times as many elements.
        """
        ...

    def all_gather_in_place(
        self, array: Array, counts: Sequence[int], starts: Sequence[int]
    ) -> Arrived:
        """Overwrites the parts of other ranks with theirs.

        Args:
            array: (n,) uint8 or int64, its own part filled.
            counts: per rank, elements of its part; the same on every rank.
            starts: per rank, where its part begins in this array.
        """
        ...

    def all_reduce(self, array: Array) -> Arrived:
        """Overwrites (n,) float32 or float64 with the sum over ranks."""
        ...

    def broadcast(self, array: Array, root: int) -> Arrived:
        """Overwrites (n,) uint8 with that of one rank, where it is only read."""
        ...

    def pause(self, waited_s: float) -> None:
        """Let others run, between two looks; after this long without success."""
        ...

    def watch(self, exchange: Any) -> None:
        """Let peers that wait in this exchange hear of it if this rank fails."""
        ...

    def free(self) -> None:
        """Give back what it holds; nothing is under way, and it is not used again."""
        ...

    def abort(self, held: object) -> None:
        """Leave what is under way, and end the job where it could not end otherwise.

        Args:
            held: all that is in use; to be kept for as long as peers may write into it.
        """
        ...
