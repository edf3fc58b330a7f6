"""What the parts of the path promise each other: all that the path calls of them.

Costs, which CAT alone asks, are in `hvd_sparse.core.costs`. What else is called of an
exchange is declared where it is: under Horovod in `hvd_sparse.torch.contract`; the one
over MPI calls a `Communicator`, in `hvd_sparse.transport.contract`.

A gradient meets them in this order: `Memory` keeps what earlier steps did not send,
`Sparsifier` chooses, `Format` makes bytes of the choice, `Collective` sums up what
ranks chose, by an `Exchange` that carries bytes it does not understand; `Observer`
looks on. `Kernels` (in `hvd_sparse.kernels.contract`, since kernels know nothing of the
core) do the work on arrays. `Array` is whatever the integration's framework uses,
flattened: a numpy array in host memory, or a torch tensor on an accelerator.

A sparsifier implements `select` alone. What else one may have is declared here, too,
each in a protocol of its own: `core.roles` asks for it when a tensor is first seen.
"""

from collections.abc import Sequence
from enum import IntEnum
from math import inf
from typing import Any, NamedTuple, Protocol

Array = Any  # numpy.ndarray or torch.Tensor, which have no type in common


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


class RaisedError(PayloadError):
    """A peer raised, and this is what it told in place of a payload."""


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

    This is all a custom sparsifier implements. If it is a `FixedDensity` as well, it
    selects exactly k; otherwise k is the most it may select, and what it did select
    travels beside it.
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


class FixedDensity(Protocol):
    """A sparsifier whose k follows from n: the same on every rank.

    Attributes:
        density: k / n, in (0, 1]; None if it has none after all.
    """

    density: float | None


class Scheduled(Protocol):
    """A sparsifier whose density changes with the steps, alike on every rank.

    A `FixedDensity` as well: that density, best where the schedule ends, decides for
    all steps whether a tensor goes dense, and `advise` goes by it.
    """

    def density_at(self, step: int) -> float:
        """k / n, in (0, 1], after so many completed exchanges of the tensor."""
        ...


class SharedIndices(Protocol):
    """A sparsifier whose indices every rank can work out: they need not travel.

    Attributes:
        shared_indices: False if they must after all.
    """

    shared_indices: bool

    def indices(self, n: int, k: int, step: int) -> Array:
        """(k,) int32 ascending, distinct: those that `select` takes in this step."""
        ...


class PerRank(Protocol):
    """A sparsifier that is another on each rank."""

    def for_rank(self, rank: int) -> Sparsifier:
        """The one of this rank, in [0, size)."""
        ...


class PerTensor(Protocol):
    """A sparsifier that is another for each tensor."""

    def for_tensor(self, name: str) -> Sparsifier:
        """The one of this tensor."""
        ...


class PerScale(Protocol):
    """A sparsifier that depends on the unit of gradients."""

    def for_scale(self, loss_scale: float) -> Sparsifier:
        """What selects the same of gradients that are multiplied with loss_scale."""
        ...


class Following(Protocol):
    """A sparsifier whose choice depends on how many it chose last."""

    def after(self, chosen: int) -> Sparsifier:
        """What selects after so many were selected of this tensor; 0 at first."""
        ...


class Formatted(Protocol):
    """A sparsifier that is made for one way in which values travel, or for any."""

    @property
    def made_for(self) -> Any:
        """`values=` of an integration may say nothing else; None: what it likes."""
        ...


class PerFormat(Protocol):
    """A sparsifier whose choice depends on the bytes it makes."""

    def for_format(self, form: "Format") -> Sparsifier:
        """What selects for payloads of this format."""
        ...


class Request(NamedTuple):
    """What is asked of a sparsifier that is `Proved`.

    Attributes:
        residual: as in `Sparsifier.select`; so are gradient, k and step.
        out: the gradient's memory where it is free: it becomes all 0 in the same pass.
    """

    residual: Array
    gradient: Array
    k: int
    step: int
    out: Array | None = None


class Proved(Protocol):
    """A sparsifier whose selections tests prove, so that none is checked again.

    Attributes:
        proved: its own class. What inherits from it has this attribute, too, but is
            another class, and may select as it likes.
        clears: it can be asked to clear the gradient while it selects.
    """

    proved: type
    clears: bool

    def choose(self, asked: Request) -> Selection:
        """As `Sparsifier.select`; out becomes 0 if there is one."""
        ...


class Grouped(Protocol):
    """A sparsifier that can select from many tensors in one call."""

    def select_group(
        self, residuals: Sequence[Array], gradients: Sequence[Array], table: Array
    ) -> Sequence[int]:
        """As `select`, for many arrays on the host, of one dtype.

        Args:
            residuals: (n,) each.
            gradients: (n,) each, of the residuals' dtype.
            table: (arrays, 5) int64: addresses where to write the indices and the
                values of each, its k, and the two kinds; see `kernels.host.entries`.

        Returns:
            Of each, how many sums were not finite.
        """
        ...


class Scaler(Protocol):
    """What multiplies the loss, such as a GradScaler."""

    def get_scale(self) -> float:
        """By how much, in the step to come; the same on every rank."""
        ...


class Format(Protocol):
    """Which bytes the entries of a payload become, and how many for k of them.

    Attributes:
        layout: its number, which ranks agree on; from 128 on for your own.
    """

    @property
    def layout(self) -> int: ...  # noqa: D102  # see above

    def bytes(self, k: Any, dtype: str, n: int) -> Any:
        """Bytes of k entries of a gradient of n elements; k a number or an array."""
        ...

    def most(self, size: Any, dtype: str, n: int) -> Any:
        """The most entries that size bytes have room for; negative if not even 0."""
        ...

    def write(self, out: Array, indices: Array, values: Array, n: int) -> Array:
        """Overwrites out, (bytes,) uint8, with (k,) entries, which are on the host.

        Returns:
            (k,) the values that a receiver will read: `values` itself, or rounded.
        """
        ...

    def read(self, data: Array, k: int, dtype: str, n: int) -> tuple[Array, Array]:
        """Of k entries: (k,) int32 indices, none if they did not travel, and values."""
        ...

    def without_indices(self) -> "Format":
        """The same where every rank knows them.

        Raises:
            ValueError: there is none.
        """
        ...


class Located(NamedTuple):
    """Where payloads lie that have arrived, for kernels that take many in one call.

    Attributes:
        addresses: (ranks, payloads) int64: of the entries of each.
        wire_bytes: of each payload, what it took on the wire; of every rank as much.
    """

    addresses: Array
    wire_bytes: Sequence[int]


class Memory(Protocol):
    """Keeps, per tensor, what was not sent."""

    residuals: dict[str, Array]

    def residual(self, name: str, gradient: Array) -> Array:
        """The (n,) residual of this tensor, zeros at first; selectors write into it."""
        ...

    def keep(self, name: str, indices: Array, rest: Array) -> None:
        """Add to the residual what rounding took from the values sent."""
        ...

    def restore(self, name: str, indices: Array, sent: Array) -> None:
        """Put back what was sent in vain."""
        ...


class Correcting(Protocol):
    """A memory that adds something else than the gradient, such as a velocity."""

    def incoming(self, name: str, gradient: Array) -> Array:
        """What is added to the residual in place of a gradient; asked once for each.

        The gradient is contiguous, in any shape, read only, maybe not finite somewhere.
        What is returned is (n,) contiguous, of its dtype or the residual's.
        """
        ...

    def sent(self, name: str, indices: Array) -> None:
        """These entries leave: (k,) int32, ascending; `restore` may bring them back."""
        ...

    def beside(self, name: str) -> dict[str, Array]:
        """What else it keeps of a tensor, as named arrays, from `residual` on.

        States and `discard` copy and overwrite them; a loss scale multiplies them.
        """
        ...

    def forget(self, name: str) -> None:
        """A tensor is gone, or another state will be loaded: drop what is beside."""
        ...


class Summed(NamedTuple):
    """What a collective has made of one tensor.

    Attributes:
        elements: in this rank's payload.
        sent: bytes that this rank has sent.
        received: bytes that came from the others.
        bound: magnitudes of sums, before they are scaled, are no more than this.
        nonfinite: a rank met elements that were not finite: there is no result.
    """

    elements: int
    sent: int
    received: int
    bound: float = inf
    nonfinite: bool = False


class Collective(Protocol):
    """Sums up what ranks send. The path does not know which payloads come where."""

    def start(self, flight: Any) -> None:
        """Begin the exchange of one tensor; a `Flight`, whose handle is yours."""
        ...

    def sum(
        self, flights: Sequence[Any], outs: Sequence[Array], scale: float
    ) -> Sequence[Summed]:
        """Overwrites outs with sums over ranks times scale, the same bits on each rank.

        An out is contiguous, of its gradient's shape and dtype, and all 0 already where
        the flight is `cleared`. Raises PayloadError as `Exchange.finish`.
        """
        ...


class Observer(Protocol):
    """Sees each `Flight`, and changes nothing; what it raises fails the step."""

    def sent(self, flight: Any, gradient: Array) -> None:
        """It has left: `flight.selection` is what was selected, unless it goes dense.

        The gradient is all 0 already where the flight is `cleared`.
        """
        ...

    def received(self, flight: Any, out: Array) -> None:
        """Its result is there; NaN where a rank met what is not finite."""
        ...


class Exchange(Protocol):
    """Gives every rank the payloads of every rank: see `hvd_sparse.core.payload`.

    What travels together is a frame, which the core writes and reads: an exchange
    carries bytes that it does not understand (`core.frame`, `core.received`).

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

    def start(self, name: str, payload: Any) -> Any:
        """Begin to gather one payload a rank; returns a handle.

        The payload keeps its bytes until finish; the next one takes their place.
        """
        ...

    def finish(self, handle: Any) -> Sequence[Any]:
        """The payloads of all ranks, rank 0 first; None of one that was missing.

        Raises:
            PayloadError: a rank disagrees, or raised.
        """
        ...

    def locate(self, handles: Sequence[Any]) -> Located | None:
        """Where payloads lie; raises as `finish`.

        Returns:
            None where ranks have other numbers of entries, or met something that was
            not finite, or they do not travel together: `finish` gives them one by one.
        """
        ...


class DenseExchange(Exchange, Protocol):
    """An exchange that takes tensors that go dense as well.

    To a path on another one none may come: its integration reduces them by itself.
    """

    def start_dense(self, name: str, gradient: Array) -> Any:
        """Begin the library's own dense allreduce (sum)."""
        ...

    def finish_dense(self, handle: Any) -> tuple[Array, int]:
        """The (n,) sum over ranks, and the bytes this rank handed to the collective."""
        ...
