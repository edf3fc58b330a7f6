r"""The path of gradients. Start here.

    accumulate -> select -> encode -> exchange -> aggregate -> hand back
    \__________ send __________/                \_______ receive ______/

A bucket of tensors takes it in one go; a single one is a bucket of one. The path knows
no framework and no network: arrays are handled by `hvd_sparse.kernels`, bytes are
carried by the `Exchange` it was given.

| what | where |
|---|---|
| the stages, in detail | `outbound`, `allgather`, `inbound`; many at once: `fused` |
| what ranks decide alike: route, format, k, digest | `plan` |
| one gradient on its way | `flight` |
| what was not sent | `memory`; saved, loaded, thrown away: `residuals`, `undo` |
| gradients that are multiplied with a loss scale | `loss_scale` |

One path serves one group of ranks. A peer that disagrees becomes a `PayloadError`
before its data is used.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial

from hvd_sparse.core.allgather import Allgather
from hvd_sparse.core.contracts import (
    Array,
    Average,
    Collective,
    Exchange,
    Format,
    Memory,
    Observer,
    PayloadError,
    Sparsifier,
)
from hvd_sparse.core.flight import Flight, Phase, Tensor, all_of
from hvd_sparse.core.inbound import Inbound
from hvd_sparse.core.indices import Indices
from hvd_sparse.core.loss_scale import LossScale
from hvd_sparse.core.memory import ErrorFeedback, Kept
from hvd_sparse.core.outbound import Outbound
from hvd_sparse.core.plan import Plan
from hvd_sparse.core.residuals import Residuals
from hvd_sparse.core.routing import Dense
from hvd_sparse.core.traffic import Traffic
from hvd_sparse.core.undo import Undo
from hvd_sparse.core.values import Values


class GradientPath:
    """Nothing is lost, and replicas agree bitwise."""

    def __init__(
        self,
        sparsifier: Sparsifier,
        exchange: Exchange,
        *,
        op: int = Average,
        dense: Dense | None = None,
        values: Values | Format | None = None,
        indices: Indices | None = None,
        memory: Memory | None = None,
        collective: Collective | None = None,
        observers: Sequence[Observer] = (),
        loss_scale: Callable[[], float] | None = None,
        undo: bool = False,
    ) -> None:
        """Join the parts.

        Args:
            sparsifier: what is worth sending.
            exchange: who carries the bytes.
            op: Average over the ranks, or Sum.
            dense: which tensors go dense; WhenCheaper() unless given.
            values: how they travel; as the sparsifier is made for, or Float32().
            indices: how they travel; EliasFano() unless given.
            memory: what keeps the rest; ErrorFeedback() unless given.
            collective: who sums up; Allgather(exchange) unless given.
            observers: who looks on.
            loss_scale: what gradients are multiplied with, asked in `begin`.
            undo: keep what `residuals.discard` needs.

        Raises:
            TypeError: sparsifier has no select method, dense is no rule, values no
                format, or one of them holds what ranks can not agree on.
            ValueError: op is neither, or the sparsifier is made for other values.
        """
        self.exchange = exchange
        self.memory = memory if memory is not None else ErrorFeedback()
        self.traffic = Traffic()
        self.plan = Plan(sparsifier, exchange, op, dense, values, indices)
        self.tensors = self.plan.tensors  # per name, of those that were admitted
        self._kept = kept = Kept(self.memory)
        self.scaling = LossScale(loss_scale, self.plan, kept)
        self._undo = Undo(self.plan, kept) if undo else None
        parts = exchange, self.traffic, self.scaling
        self.residuals = Residuals(self.plan, kept, *parts, self._undo)
        by = collective or Allgather(exchange, bounded=loss_scale is not None)
        self._there = Outbound(kept, exchange, by, observers)
        self._back = Inbound(self.plan, self.memory, by, *parts, observers)

    def begin(self) -> None:
        """A step begins; needed before its first `send` with a loss scale, or undo.

        Raises:
            ValueError: the scale changed by something else than a power of two.
        """
        if self._undo:
            self._undo.begin()
        self.scaling.begin(self.residuals.waiting)

    def admit(self, name: str, gradient: Array) -> Tensor:
        """What is known about this tensor; raises as `send` does."""
        tensor = self.plan.find(name, gradient)
        if tensor is None:
            self.plan.check(name, gradient)
            kept = self.residuals.put_in_place(name, gradient)
            tensor = self.plan.enter(name, gradient, *kept)
        return tensor

    def send(
        self, gradients: Mapping[str, Array], in_place: Container[str] = ()
    ) -> list[Flight]:
        """Accumulate, select, encode, and start the exchange.

        If that fails once all were admitted, what goes sparse is in the residuals.

        Args:
            gradients: per name, the same on every rank and in every step, any shape;
                float16, bfloat16, float32 or float64; read only.
            in_place: names whose results `receive` will write over the gradient, which
                nobody looks at until then: cleared early, it saves a pass. After an
                error it is all 0, unless it goes dense.

        Returns:
            Of each gradient, in this order, what `receive` must be given.

        Raises:
            TypeError: a gradient is not floating.
            ValueError: its shape or dtype changed, it is too large, it was not received
                since, or a custom sparsifier selected something else than asked.
        """
        bucket = [(Flight(self.admit(n, g)), g) for n, g in gradients.items()]
        for flight, _ in bucket:
            flight.check_on_ground()
        try:
            if self._undo:
                for flight, gradient in bucket:
                    self._undo.note(flight.tensor, gradient)
            self._there.select(bucket, in_place)
            self._there.start(bucket)
        except BaseException:
            self._there.keep(bucket, in_place)
            raise
        return [flight for flight, _ in bucket]

    def receive(self, flights: Sequence[Flight], outs: Sequence[Array]) -> None:
        """Finish the exchange, aggregate, and hand back.

        Args:
            flights: what `send` returned, or some of it.
            outs: of each, contiguous, of the gradient's shape and dtype; overwritten
                with the average or sum over ranks, the same bits on every rank; all NaN
                if any rank met what was not finite. No two overlap. The gradient, where
                `send` was told so.

        Raises:
            PayloadError: a peer disagrees; names tensor, rank, expected and found. What
                was sent is back in the residuals.
        """
        try:
            self.hand_back(flights, outs)
        except PayloadError:
            self.roll_back(flights)
            raise
        self.commit(flights)

    def hand_back(self, flights: Sequence[Flight], outs: Sequence[Array]) -> None:
        """Receive, but for the last word: `commit` or `roll_back` must follow."""
        self._back.hand_back(list(zip(flights, outs, strict=True)))

    def commit(self, flights: Sequence[Flight]) -> None:
        """What was sent has arrived and can not be taken back any more."""
        for flight in flights:
            flight.commit()

    def roll_back(self, flights: Sequence[Flight]) -> None:
        """Put back what was sent when its exchange failed: nothing is lost."""
        all_of(partial(flight.roll_back, self.memory) for flight in flights)

    def keep(self, name: str, gradient: Array) -> Flight:
        """Accumulate and send nothing: a step was given up before it was sent."""
        tensor = self.admit(name, gradient)
        if self._undo:
            self._undo.note(tensor, gradient)
        if not tensor.dense:
            self._kept.accumulate(name, gradient.reshape(-1))
        return Flight(tensor, Phase.FAILED)
