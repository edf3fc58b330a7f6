"""Where a gradient is: a tensor, as ranks treat it, and each of its flights."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from hvd_sparse.core.contracts import Array, Memory, Request, Selection, Sparsifier
from hvd_sparse.core.payload import Header, Payload, decode


class Phase(Enum):
    """Of a gradient, from when it is given until it counts, or does not.

    FILLING: nothing of it was touched: its bucket is not complete.
    SENT: what was selected is in its payload, the rest in the residual.
    ARRIVED: its result is there; the step may still fail as a whole.
    DONE: it counts, unless a GradScaler skips the step, which is told in the next.
    FAILED: it does not; what goes sparse is in the residual, for a later step. Also
        while it is selected alone: what fails then fails with all in the residual.
    """

    FILLING = auto()
    SENT = auto()
    ARRIVED = auto()
    DONE = auto()
    FAILED = auto()


@dataclass
class Tensor:
    """What the path knows about one tensor.

    Attributes:
        sparsifier: the plan's, seeded for this tensor where that matters.
        header: what ranks agree on; its k is the most where they choose.
        follows: its choice depends on how many it chose last.
        unindexed: every rank knows which indices, which do not travel.
        clears: the sparsifier leaves zeros where the gradient was, if it is asked to.
        dense: this tensor takes the library's own allreduce.
        trusted: what is selected needs no check.
        plain: small, on the host, its payloads of a fixed size and a format of ours:
            kernels may sum up it and others in one call.
        grouped: they may select from it and others in one call.
        rounds: values do not travel as they are.
        scheduled: k changes with the steps.
        payload: the last one; its memory serves the next.
        flight: the last one.
        latest: the step of the rank that is furthest, where ranks may be apart.
        chosen: elements that were selected last; 0 before the first step.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    array_dtype: Any
    itemsize: int
    sparsifier: Sparsifier
    header: Header
    follows: bool
    unindexed: bool
    clears: bool
    dense: bool
    trusted: bool
    plain: bool
    grouped: bool
    rounds: bool = False
    scheduled: bool = False
    payload: Payload | None = None
    flight: "Flight | None" = None
    latest: int = 0
    chosen: int = 0

    def select(self, residual: Array, gradient: Array, out: Array | None) -> Selection:
        """The sparsifier's choice; out becomes 0 if there is one, see `clears`."""
        sparsifier: Any = self.sparsifier
        if self.follows:
            sparsifier = sparsifier.after(self.chosen)
        asked = Request(residual, gradient, self.header.k, self.header.step, out)
        selection: Selection = (
            sparsifier.choose(asked) if self.trusted else sparsifier.select(*asked[:4])
        )
        return selection

    def at_step(self, step: int) -> None:
        """Count the exchanges of this tensor."""
        form, dtype, n, k, _, digest, varies, facts = self.header
        self.header = Header(form, dtype, n, k, step, digest, varies, facts)

    @property
    def in_flight(self) -> bool:
        """Whether it was sent, and neither counts nor was taken back."""
        return self.flight is not None and self.flight.is_out

    @property
    def route(self) -> str:
        """Dense or sparse, as a word."""
        return "dense" if self.dense else "sparse"


@dataclass(slots=True)
class Flight:
    """One gradient of a bucket.

    Attributes:
        tensor: which one; it knows its last flight.
        phase: where the gradient is.
        cleared: the gradient's memory, which the result will take, is all 0.
        indices: where every rank knows them, so that they do not travel.
        handle: of the exchange.
    """

    tensor: Tensor
    phase: Phase = Phase.FILLING
    cleared: bool = False
    indices: Array | None = None
    handle: Any = None

    @property
    def is_out(self) -> bool:
        """Whether it was sent, and neither counts nor was taken back."""
        return self.phase is Phase.SENT or self.phase is Phase.ARRIVED

    def check_on_ground(self) -> None:
        """Raise ValueError if its tensor was sent already."""
        if self.tensor.in_flight:
            name = self.tensor.name
            raise ValueError(f"{name}: was sent already and not received yet")

    def depart(self) -> None:
        """From here on what was selected is in the payload."""
        self.phase, self.tensor.flight = Phase.SENT, self

    def arrive(self) -> None:
        """Its result is there, unless all ranks took back what they had sent."""
        if self.phase is Phase.SENT:
            self.phase = Phase.ARRIVED

    def commit(self) -> None:
        """The exchange counts, on every rank, also where nothing of it is used."""
        if self.is_out:
            self.phase, self.handle = Phase.DONE, None
        tensor = self.tensor
        tensor.at_step(max(tensor.latest, tensor.header.step) + 1)

    def roll_back(self, memory: Memory) -> None:
        """The exchange does not count: what was sent is back in the residual."""
        if self.is_out:
            self.put_back(memory)

    def put_back(self, memory: Memory) -> None:
        """What was sent is back in the residual: nobody uses it."""
        try:
            if not self.tensor.dense:
                sent = self.selection
                memory.restore(self.tensor.name, sent.indices, sent.values)
        finally:  # or what a user's own part raises stops all steps to come
            self.phase, self.handle = Phase.FAILED, None

    @property
    def selection(self) -> Selection:
        """What this rank has sent."""
        assert self.tensor.payload is not None
        sent = decode(self.tensor.payload, indexed=self.indices is None)
        return sent if self.indices is None else sent._replace(indices=self.indices)


def all_of(calls: Iterable[Callable[[], None]]) -> None:
    """Make all of these calls, also where one raises; the first error is raised."""
    errors: list[BaseException] = []
    for call in calls:
        try:
            call()
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]


def indices_of(tensor: Tensor, header: Header) -> Array:
    """The indices of a tensor whose payloads carry none, in the step of this header."""
    sparsifier: Any = tensor.sparsifier  # a SharedIndices
    return sparsifier.indices(header.n, header.k, header.step)
