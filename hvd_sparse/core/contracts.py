"""What the parts of the path promise each other.

A gradient meets them in this order: `Memory` keeps what earlier steps did not send,
`Sparsifier` chooses, `Exchange` carries bytes it does not understand. `Kernels` do the
work on arrays. `Array` is whatever the door's framework uses, flattened: a numpy array
in host memory, or a torch tensor on an accelerator.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, Protocol, runtime_checkable

Array = Any  # the one honest hole: numpy.ndarray or torch.Tensor
Arrived = Callable[[], bool]  # looks, without waiting, whether something is there


class Op(IntEnum):
    """What an exchange computes over the ranks; the numbers are Horovod's own."""

    Average = 0
    Sum = 1


Average = Op.Average
Sum = Op.Sum


class ExchangeError(RuntimeError):
    """A peer did something wrong, or nothing; names tensor, rank, expected, found."""


class PayloadError(ExchangeError):
    """Bytes that arrived are not the payload that was agreed on."""


class Selection(NamedTuple):
    """What a sparsifier chose to send of one gradient.

    Attributes:
        indices: (k,) int32, ascending, into the flattened gradient.
        values: (k,) float32, or float64 for a float64 gradient.
        nonfinite: elements whose sum was not finite; they kept their residual.
    """

    indices: Array
    values: Array
    nonfinite: int


class Sparsifier(Protocol):
    """Chooses which elements of residual + gradient are worth sending.

    This is all a custom sparsifier implements. If it also has a `density` in (0, 1], k
    is that share of n, fixed and the same on every rank; otherwise k is the most it may
    select, and what it did select travels in the header. It may have more: a `layout`
    of its payloads; `for_rank(rank)` and `for_tensor(name)`, which return one of its
    kind for them, as does `for_scale(loss_scale)` where gradients are multiplied with
    it; `after(count)`, which returns what selects after so many were.
    """

    def select(self, residual: Array, gradient: Array, k: int, step: int) -> Selection:
        """Overwrites residual with residual + gradient, selected entries 0.

        Args:
            residual: (n,) float32 or float64.
            gradient: (n,) floating, read only.
            k: how many elements to select.
            step: completed exchanges of this tensor, the same on every rank.
        """
        ...


class Memory(Protocol):
    """Keeps, per tensor, what was not sent."""

    residuals: dict[str, Array]

    def residual(self, name: str, gradient: Array) -> Array:
        """The (n,) residual of this tensor, zeros at first; selectors write into it."""
        ...

    def accumulate(self, name: str, gradient: Array) -> None:
        """Add a gradient of which nothing is sent; elements not finite stay out."""
        ...

    def keep(self, name: str, indices: Array, rest: Array) -> None:
        """Add to the residual what rounding took from the values sent."""
        ...

    def restore(self, name: str, indices: Array, sent: Array) -> None:
        """Put back what was sent in vain."""
        ...


class Exchange(Protocol):
    """Gives every rank the bytes of every rank.

    Attributes:
        rank: this process, in [0, size).
        size: how many ranks exchange.
        weight: what a payload costs, in multiples of its cost in an allgather.
        uneven: ranks may miss exchanges of their peers, who go on without them.
    """

    @property
    def rank(self) -> int: ...  # noqa: D102  # see above

    @property
    def size(self) -> int: ...  # noqa: D102

    @property
    def weight(self) -> int: ...  # noqa: D102

    @property
    def uneven(self) -> bool: ...  # noqa: D102

    def start(self, name: str, payload: Array) -> Any:
        """Begin to gather one payload a rank; returns a handle.

        The payload keeps its bytes until finish; the next one takes their place.
        """
        ...

    def finish(self, handle: Any) -> Sequence[Array]:
        """The payloads of all ranks, rank 0 first; empty of one that was missing."""
        ...

    def locate(
        self, handles: Sequence[Any], sizes: Array
    ) -> tuple[Array, Array] | None:
        """Where payloads lie, for kernels that take many of them in one call.

        Args:
            handles: of payloads that have this size on every rank.
            sizes: (payloads,) int64, in bytes.

        Returns:
            A buffer of uint8 at an address that is a multiple of 8, and (ranks,
            payloads) int64: where in it each payload begins. None where they do not lie
            in one, or have other sizes: `finish` gives them one by one.
        """
        ...

    def start_dense(self, name: str, gradient: Array) -> Any:
        """Begin the library's own dense allreduce (sum)."""
        ...

    def finish_dense(self, handle: Any) -> tuple[Array, int]:
        """The (n,) sum over ranks, and the bytes this rank handed to the collective."""
        ...


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


class Kernels(Protocol):
    """The hot loops for one kind of array; see `hvd_sparse.kernels.host`."""

    def zeros_like(self, gradient: Array) -> Array:
        """A residual for this gradient, zeros."""
        ...

    def select_top(
        self, residual: Array, gradient: Array, k: int, out: Array | None = None
    ) -> tuple[Array, Array, int]:
        """Accumulate, take the k largest: indices, values, nonfinite; out becomes 0."""
        ...

    def select_above(
        self,
        residual: Array,
        gradient: Array,
        bound: float,
        limit: int,
        out: Array | None = None,
    ) -> tuple[Array, Array, int]:
        """The same for entries that reach a bound, the limit largest."""
        ...

    def select_at(
        self, residual: Array, gradient: Array, indices: Array, out: Array | None = None
    ) -> tuple[Array, Array, int]:
        """The same for entries at given indices."""
        ...

    def select_some(
        self, residual: Array, gradient: Array, k: int, out: Array | None = None
    ) -> tuple[Array, Array, int]:
        """Accumulate and take all that reach some bound: k or a few more."""
        ...

    def select_again(self, residual: Array, k: int) -> tuple[Array, Array]:
        """The same of the residual as it is: indices, values."""
        ...

    def keep_largest(
        self, residual: Array, indices: Array, values: Array, k: int
    ) -> tuple[Array, Array]:
        """The k largest of what was selected; the others return to the residual."""
        ...

    def largest_first(self, values: Array) -> Array:
        """Magnitudes, float64 on the host, falling."""
        ...

    def norm(self, residual: Array) -> float:
        """The 2-norm, summed in float64."""
        ...

    def count_magnitudes(self, values: Array) -> Array:
        """(bins,) int64 on the host: magnitudes in logarithmic bins."""
        ...

    def count_sums(self, residual: Array, gradient: Array) -> Array:
        """The same of residual + gradient, which stay as they are."""
        ...

    def draw(
        self, residual: Array, gradient: Array, rate: float, seed: int
    ) -> tuple[Array, Array, int]:
        """Each entry c with p = min(1, rate |c|), as c / p; residual becomes 0."""
        ...

    def accumulate(self, residual: Array, gradient: Array) -> None:
        """Overwrites residual with residual + gradient where that is finite."""
        ...

    def add_at(self, residual: Array, indices: Array, values: Array) -> None:
        """Overwrites residual[indices] with residual[indices] + values."""
        ...

    def aggregate(
        self,
        out: Array,
        payloads: list[tuple[Array, Array]],
        scale: float,
        cleared: bool = False,
    ) -> None:
        """Overwrites out with the scaled sum of payloads, rank by rank."""
        ...

    def random_indices(self, n: int, k: int, seed: int) -> Array:
        """k distinct ascending indices of range(n) from a seed."""
        ...
