r"""The path of a gradient. Start here.

    accumulate -> select -> encode -> exchange -> aggregate -> hand back
    \__________ send __________/                \_______ receive ______/

`send` runs the first three stages and starts the exchange; `receive` finishes it and
runs the rest. The path knows no framework and no network: arrays are handled by
`hvd_sparse.kernels`, bytes are carried by the `Exchange` it was given.

One path serves one group of ranks and keeps, per tensor, what was not sent. Facts that
ranks must share (route, k, step, names) come from what all of them know; a peer that
disagrees becomes a `PayloadError` before its data is used. For many small tensors at
once, `together` does the same with fewer words.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from hashlib import blake2b
from inspect import signature
from typing import Any, NamedTuple

import numpy as np

from hvd_sparse.core.adaptive import CAT, ExactCAT
from hvd_sparse.core.configuration import describe
from hvd_sparse.core.contracts import (
    Array,
    Average,
    Exchange,
    Memory,
    Op,
    PayloadError,
    Selection,
    Sparsifier,
)
from hvd_sparse.core.memory import ErrorFeedback
from hvd_sparse.core.payload import (
    DTYPES,
    INDEXED,
    VALUES_ONLY,
    Bytes,
    Header,
    decode,
    encode,
    step_of,
)
from hvd_sparse.core.routing import Dense, Never, WhenCheaper
from hvd_sparse.core.scaling import is_finite, multiply, overflows, ratio
from hvd_sparse.core.sparsifiers import (
    RandomK,
    SignsUntilNorm,
    SignTopK,
    Threshold,
    TopK,
    elements,
)
from hvd_sparse.core.stochastic import Stochastic
from hvd_sparse.core.traffic import Traffic
from hvd_sparse.kernels import kernels_for
from hvd_sparse.kernels.host import is_one_part
from hvd_sparse.kernels.reference import check_indices, check_places

STATE_FORMAT = 1
ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_NOTHING = Selection(np.empty(0, np.int32), np.empty(0, np.float32), 0)
MOST_ELEMENTS = 2**31 - 1
# whose selections need no check: tests prove them. What inherits from them may select
# as it likes.
OURS = (
    TopK,
    RandomK,
    Threshold,
    SignTopK,
    SignsUntilNorm,
    Stochastic,
    CAT,
    ExactCAT,
)


@dataclass
class Tensor:
    """What the path knows about one tensor; all but step is fixed at first use.

    Attributes:
        sparsifier: the path's, seeded for this tensor where that matters.
        header: what travels with each payload; k is the most where `varies`.
        varies: the sparsifier chooses k from local data.
        clears: the sparsifier leaves zeros where the gradient was, if it is asked to.
        dense: this tensor takes the library's own allreduce.
        trusted: what is selected needs no check.
        plain: its payloads have a fixed size and all there is to know of its entries.
        grouped: it may be sent together with others (see `together`).
        payload: the last one's bytes; their memory serves the next.
        in_flight: sent and not received yet.
        delivered: what was sent in this step has been handed back.
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
    varies: bool
    clears: bool
    dense: bool
    trusted: bool
    plain: bool
    grouped: bool
    payload: Bytes | None = None
    in_flight: bool = False
    delivered: bool = False
    latest: int = 0
    chosen: int = 0

    def select(self, residual: Array, gradient: Array, out: Array | None) -> Selection:
        """The sparsifier's choice; `after` tells it how many the last one was."""
        sparsifier = self.sparsifier
        if hasattr(sparsifier, "after"):
            sparsifier = sparsifier.after(self.chosen)
        asked: tuple[Any, ...] = (self.header.k, self.header.step)
        if out is not None:
            asked = (*asked, out)
        selection: Selection = sparsifier.select(residual, gradient, *asked)
        return selection

    def check(self, selection: Selection) -> None:
        """What a custom sparsifier may get wrong, before it becomes a payload.

        Raises:
            ValueError: indices are not int32, do not ascend or are not k; values are
                not of the residual's dtype.
        """
        indices, values = selection.indices, selection.values
        count, k = indices.shape[0], self.header.k
        if _dtype(indices) != "int32":
            raise ValueError(f"{self.name}: indices must be int32, got {indices.dtype}")
        if count != k if not self.varies else count > k:
            most = "at most " if self.varies else ""
            raise ValueError(f"{self.name}: {most}{k} must be selected, got {count}")
        wanted = "float64" if self.header.dtype == "float64" else "float32"
        if _dtype(values) != wanted:
            raise ValueError(
                f"{self.name}: values must be {wanted}, got {values.dtype}"
            )
        try:
            check_indices(_on_host(indices), self.header.n)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        if values.shape[0] != count:
            raise ValueError(
                f"{self.name}: {count} indices were selected, but {values.shape[0]} "
                "values"
            )

    def at_step(self, step: int) -> None:
        """Count the exchanges of this tensor."""
        layout, dtype, n, k, _, digest = self.header
        self.header = Header(layout, dtype, n, k, step, digest)

    @property
    def route(self) -> str:
        """Dense or sparse, as a word."""
        return "dense" if self.dense else "sparse"


class Flight(NamedTuple):
    """One gradient between send and receive.

    Attributes:
        indices: where every rank knows them, so that they do not travel.
        cleared: the gradient's memory, which the result will take, is all 0.
    """

    tensor: Tensor
    indices: Array | None
    handle: Any
    cleared: bool = False


class GradientPath:
    """Nothing is lost, replicas agree bitwise (laws 1 and 2 of the design)."""

    def __init__(
        self,
        sparsifier: Sparsifier,
        exchange: Exchange,
        *,
        op: int = Average,
        dense: Dense | None = None,
        memory: Memory | None = None,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        """Join the parts.

        Args:
            sparsifier: what is worth sending: TopK, RandomK, Threshold or your own.
            exchange: who carries the bytes.
            op: Average over the ranks, or Sum.
            dense: which tensors go dense; WhenCheaper() unless given.
            memory: what keeps the rest; ErrorFeedback() unless given.
            loss_scale: what gradients are multiplied with, asked in `begin`.

        Raises:
            TypeError: sparsifier has no select method, dense is no rule, or one of them
                holds what ranks can not agree on.
            ValueError: op is neither Average nor Sum.
        """
        if isinstance(sparsifier, type) or not hasattr(sparsifier, "select"):
            raise TypeError(
                "sparsifier must have a select method, such as TopK(density=0.001), "
                f"got {sparsifier!r}"
            )
        if isinstance(dense, type) or not hasattr(dense or WhenCheaper(), "limit"):
            raise TypeError(f"dense must be WhenCheaper() or Never(), got {dense!r}")
        if op not in (Op.Average, Op.Sum):
            raise ValueError(f"op must be Average or Sum, got {op!r}")
        self.sparsifier = sparsifier
        # as it is now: what it counts while it selects is not part of it
        self._chosen = describe(sparsifier, "sparsifier")
        self._rule = describe(dense if dense is not None else WhenCheaper(), "dense")
        self.exchange = exchange
        self.op = Op(op)
        self.op_name = self.op.name  # a door that finds out later says so here
        self.dense = dense if dense is not None else WhenCheaper()
        self.memory = memory if memory is not None else ErrorFeedback()
        self.traffic = Traffic()
        self.tensors: dict[str, Tensor] = {}
        self.always_sparse: set[str] = set()  # names of tensors, whatever `dense` says
        self.overflowed = False  # a result of this step was not finite
        self._loss_scale = loss_scale
        self._scale_now: float | None = None  # of the residuals
        self._loaded: dict[str, dict[str, Any]] = {}

    # ------------------------------------------------------------------- the path

    def send(self, name: str, gradient: Array, *, in_place: bool = False) -> Flight:
        """Accumulate, select, encode, and start the exchange.

        Args:
            name: the tensor's, the same on every rank and in every step.
            gradient: any shape; float16, bfloat16, float32 or float64; read only.
            in_place: `receive` will be given the gradient as out, untouched until then.
                So it may be all 0 meanwhile, which saves a pass over its memory.

        Raises:
            TypeError: the gradient is not floating.
            ValueError: its shape or dtype changed, it is too large, or a custom
                sparsifier selected something else than asked.
        """
        tensor = self.admit(name, gradient)
        if tensor.dense:
            handle = self.exchange.start_dense(name, _flat(gradient))
            return Flight(tensor, None, handle)
        if tensor.in_flight:
            raise ValueError(f"{name}: was sent already and not received yet")
        # accumulate and select in one pass: the residual takes the gradient and keeps
        # what is not selected
        flat = _flat(gradient)
        out = flat if in_place and tensor.clears and is_flat(gradient) else None
        selection = self._select(tensor, gradient, flat, out)
        payload = self._encode(tensor, selection)
        tensor.payload, tensor.in_flight = payload, True
        shared = selection.indices if tensor.header.layout == VALUES_ONLY else None
        flight = Flight(tensor, shared, None, cleared=out is not None)
        try:
            return flight._replace(handle=self.exchange.start(name, payload))
        except BaseException:
            self.recall(flight)
            raise

    def receive(self, flight: Flight, out: Array) -> Array:
        """Finish the exchange, aggregate, and hand back.

        Args:
            flight: what send returned.
            out: contiguous, of the gradient's shape and dtype; overwritten. Where send
                was told that it works in place, the gradient.

        Returns:
            out: the average or sum over ranks, the same bits on every rank; NaN
            throughout if any rank met an element that was not finite.

        Raises:
            PayloadError: a peer disagrees; names tensor, rank, expected and found.
        """
        try:
            self.hand_back(flight, out)
        except PayloadError:
            self.recall(flight)
            raise
        self.settle(flight)
        return out

    # receive in halves, for a group that arrives whole or not at all

    def hand_back(self, flight: Flight, out: Array) -> None:
        """Receive, but for the last word: `settle` or `recall` must follow."""
        if flight.tensor.dense:
            self._hand_back_dense(flight, out)
        else:
            self._hand_back_sparse(flight, out)

    def settle(self, flight: Flight) -> None:
        """What was sent has arrived and can not be recalled any more."""
        tensor = flight.tensor
        tensor.delivered, tensor.in_flight = tensor.in_flight, False
        tensor.at_step(max(tensor.latest, tensor.header.step) + 1)

    def recall(self, flight: Flight) -> None:
        """Put back what was sent when its exchange failed: nothing is lost."""
        tensor = flight.tensor
        if tensor.in_flight:
            assert tensor.payload is not None
            own = decode(tensor.payload, tensor.header, varies=True)
            indices = own.indices if flight.indices is None else flight.indices
            self.memory.restore(tensor.name, indices, own.values)
            tensor.in_flight = False

    # where gradients are multiplied with a loss scale

    @property
    def is_scaled(self) -> bool:
        """Whether they are."""
        return self._loss_scale is not None

    def begin(self) -> None:
        """A step begins; needed before its first `send` where gradients are scaled.

        Raises:
            ValueError: the scale changed by something else than a power of two.
        """
        if self._loss_scale is None:
            return
        self.put_back()
        self.overflowed = False
        for tensor in self.tensors.values():
            tensor.delivered = False
        scale = self._loss_scale()
        if scale != self._scale_now:
            self._follow(scale)

    def _follow(self, scale: float) -> None:
        """Bring all that waits to another loss scale."""
        factor = ratio(scale, self._scale_now or scale)
        multiply(self.memory.residuals, factor)
        for saved in self._loaded.values():
            if saved["residual"] is not None:
                saved["residual"] = saved["residual"] * factor
        self._scale_now = scale
        for name, tensor in self.tensors.items():
            tensor.header = tensor.header._replace(digest=self._digest(tensor))
            tensor.sparsifier = self._own(name)

    def put_back(self) -> None:
        """Where a result overflowed nobody applies the step: all keep what they sent.

        Of a tensor that is flagged the path does so at once; others were delivered.
        """
        for tensor in self.tensors.values():
            if self.overflowed and tensor.delivered:
                assert tensor.payload is not None
                header = tensor.header._replace(step=step_of(tensor.payload))
                sent = self._sent(tensor, header)
                self.memory.restore(tensor.name, sent.indices, sent.values)
                tensor.delivered = False

    def count(self, tensor: Tensor, elements: int, sent: int, received: int) -> None:
        """Add to `traffic` what one exchange moved: elements sent, and bytes."""
        traffic = self.traffic.tensor(tensor.name, tensor.route)
        traffic.sent_bytes += sent
        traffic.sent_elements += elements
        traffic.received_bytes += received
        traffic.dense_bytes += tensor.header.n * tensor.itemsize

    # ------------------------------------------------------------ stages, in detail

    def _select(
        self, tensor: Tensor, gradient: Array, flat: Array, out: Array | None
    ) -> Selection:
        residual = self.memory.residual(tensor.name, gradient)
        selection = tensor.select(residual, flat, out)
        self._check(tensor, selection)
        tensor.chosen = selection.indices.shape[0]
        return selection

    def _encode(self, tensor: Tensor, selection: Selection) -> Bytes:
        """Its payload; from here on what was selected is in there, or back again."""
        indices, values, _ = selection
        try:
            payload, sent = encode(selection, tensor.header, tensor.payload)
            if sent is not values:  # rounded on the wire: the rest is not lost
                self.memory.keep(tensor.name, indices, values - sent)
        except BaseException:
            self.memory.restore(tensor.name, indices, values)
            raise
        return payload

    def _hand_back_sparse(self, flight: Flight, out: Array) -> None:
        payloads = self._decode(flight)
        if any(payload.nonfinite for payload in payloads):
            # nobody applies anything, so everybody keeps what they sent
            self.recall(flight)
            self.overflowed = self.is_scaled
            out[...] = float("nan")
        else:
            self._aggregate(flight, payloads, out)

    def _check(self, tensor: Tensor, selection: Selection) -> None:
        if tensor.trusted:
            return
        try:
            tensor.check(selection)
        except ValueError:
            self._undo(tensor, selection)
            raise

    def _undo(self, tensor: Tensor, selection: Selection) -> None:
        """Put back what was selected, as far as it can be told where that was."""
        indices, values = _on_host(selection.indices), selection.values
        if indices.shape == values.shape and indices.dtype.kind in "iu":
            places, first = np.unique(indices, return_index=True)
            with suppress(IndexError):
                check_places(places, tensor.header.n)
                self.memory.restore(tensor.name, places, values[first])

    def _decode(self, flight: Flight) -> list[Selection]:
        tensor = flight.tensor
        payloads = []
        received = self.exchange.finish(flight.handle)
        for rank, buffer in enumerate(received):
            try:
                payload = self._decode_one(flight, buffer)
            except PayloadError as error:
                raise PayloadError(f"{tensor.name}: rank {rank}: {error}") from None
            payloads.append(payload)
        own = received[self.exchange.rank].size
        others = sum(buffer.size for buffer in received) - own
        self.count(tensor, payloads[self.exchange.rank].values.shape[0], own, others)
        return payloads

    def _decode_one(self, flight: Flight, buffer: Bytes) -> Selection:
        """Its indices too, where they did not travel."""
        tensor, header, indices = flight.tensor, flight.tensor.header, flight.indices
        if self.exchange.uneven:
            if not buffer.size:
                return _NOTHING._replace(values=_NOTHING.values.astype(header.wide))
            # a rank that missed some exchanges is a few steps behind, for once
            header = header._replace(step=step_of(buffer))
            tensor.latest = max(tensor.latest, header.step)
        selection = decode(buffer, header, varies=tensor.varies)
        if indices is None:
            return selection
        if header.step != tensor.header.step:
            indices = self._drawn(tensor, header)
        return selection._replace(indices=indices)

    def _sent(self, tensor: Tensor, header: Header) -> Selection:
        """What this rank sent last, in the step of that header."""
        assert tensor.payload is not None
        sent = decode(tensor.payload, header, varies=True)
        if header.layout == VALUES_ONLY:
            return sent._replace(indices=self._drawn(tensor, header))
        return sent

    def _drawn(self, tensor: Tensor, header: Header) -> Array:
        """The indices that no payload of this tensor carries."""
        drawn: Any = tensor.sparsifier  # it has shared_indices
        indices: Array = drawn.indices(header.n, header.k, header.step)
        return indices

    def _aggregate(self, flight: Flight, payloads: list[Selection], out: Array) -> None:
        entries = [(payload.indices, payload.values) for payload in payloads]
        kernels = kernels_for(out)
        try:
            kernels.aggregate(out.reshape(-1), entries, self.scale, flight.cleared)
        except ValueError as error:
            raise PayloadError(f"{flight.tensor.name}: {error}") from None
        if self.is_scaled:
            values = [payload.values for payload in payloads]
            if overflows(values, self.scale, out) and not is_finite(out):
                self.overflowed = True

    def _hand_back_dense(self, flight: Flight, out: Array) -> None:
        """The library's own sum; averaged as the sparse one is."""
        tensor = flight.tensor
        total, wire_bytes = self.exchange.finish_dense(flight.handle)
        with np.errstate(over="ignore", invalid="ignore"):
            total *= total.dtype.type(self.scale)  # the exchange's own buffer
            _copy_to(out, total)
        if self.is_scaled and not is_finite(out):
            self.overflowed = True
        self.count(tensor, tensor.header.n, wire_bytes, wire_bytes)

    @property
    def scale(self) -> float:
        """What the sum over ranks is multiplied with."""
        return 1.0 if self.op is Op.Sum else 1.0 / self.exchange.size

    # --------------------------------------------------- what ranks decide alike

    def admit(self, name: str, gradient: Array) -> Tensor:
        """What is known about this tensor; raises as `send` does."""
        tensor = self.tensors.get(name)
        if tensor is None:
            tensor = self.tensors[name] = self._first_use(name, gradient)
        elif gradient.shape != tensor.shape or gradient.dtype != tensor.array_dtype:
            raise ValueError(
                f"{name}: gradient has shape {tuple(gradient.shape)} and dtype "
                f"{_dtype(gradient)}, expected {tensor.shape} and {tensor.dtype} "
                "as in earlier steps"
            )
        return tensor

    def _first_use(self, name: str, gradient: Array) -> Tensor:
        shape, dtype = tuple(gradient.shape), _dtype(gradient)
        n = int(np.prod(shape, dtype=np.int64))
        if dtype not in DTYPES:
            raise TypeError(
                f"{name}: gradient must be one of {', '.join(DTYPES)}, got {dtype}"
            )
        if n > MOST_ELEMENTS:
            raise ValueError(
                f"{name}: gradient must have at most 2**31 - 1 elements (indices are "
                f"int32), got {n}; split it"
            )
        step, chosen = self._restore_loaded(name, gradient)
        sparsifier, layout, k, dense = self._plan(name, n, dtype)
        varies = getattr(sparsifier, "density", None) is None
        trusted = type(sparsifier) in OURS
        wide = dtype in ("float32", "float64")
        plain = layout == INDEXED and wide and not (dense or varies)
        header = Header(layout, dtype, n, k, step, digest=0)
        tensor = Tensor(
            name,
            shape,
            dtype,
            gradient.dtype,
            gradient.dtype.itemsize,
            sparsifier,
            header,
            varies=varies,
            clears=trusted and "out" in signature(sparsifier.select).parameters,
            dense=dense,
            trusted=trusted,
            plain=plain,
            grouped=plain
            and trusted
            and hasattr(sparsifier, "select_group")
            and isinstance(gradient, np.ndarray)
            and is_one_part(n),  # with more threads it gains more by itself
            chosen=chosen,
        )
        tensor.header = header._replace(digest=self._digest(tensor))
        return tensor

    def _digest(self, tensor: Tensor) -> int:
        """64 bits that stand for all that ranks must have alike for this tensor."""
        k, layout = tensor.header.k, tensor.header.layout
        facts = (tensor.name, tensor.shape, tensor.dtype, k, layout, self.agreed)
        text = repr(facts).encode()
        return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")

    def goes_dense(self, name: str, gradient: Array) -> bool:
        """Whether it will, or can not go at all; nothing is remembered."""
        n, dtype = int(np.prod(gradient.shape, dtype=np.int64)), _dtype(gradient)
        return dtype not in DTYPES or self._plan(name, n, dtype)[3]

    def _plan(self, name: str, n: int, dtype: str) -> tuple[Sparsifier, int, int, bool]:
        """The sparsifier for this tensor, its layout, its k, whether it goes dense."""
        sparsifier = self._own(name)
        shared = getattr(sparsifier, "shared_indices", False)
        layout = getattr(sparsifier, "layout", VALUES_ONLY if shared else INDEXED)
        size = self.exchange.size * self.exchange.weight
        dense = Never() if name in self.always_sparse else self.dense
        limit = dense.limit(n, dtype, ITEMSIZES[dtype], layout, size)
        density = getattr(sparsifier, "density", None)
        if density is None:
            return sparsifier, layout, limit, limit < min(1, n)
        k = elements(density, n)
        return sparsifier, layout, k, limit < k

    def _own(self, name: str) -> Sparsifier:
        """The sparsifier as this rank, this tensor and the loss scale have it."""
        sparsifier: Any = self.sparsifier
        if hasattr(sparsifier, "for_rank"):
            sparsifier = sparsifier.for_rank(self.exchange.rank)
        if hasattr(sparsifier, "for_tensor"):
            sparsifier = sparsifier.for_tensor(name)
        if hasattr(sparsifier, "for_scale") and self._scale_now is not None:
            sparsifier = sparsifier.for_scale(self._scale_now)
        return sparsifier  # type: ignore[no-any-return]

    @property
    def configuration(self) -> str:
        """What the user chose, as text: equal on every rank, or an error."""
        return f"{self._chosen}, op={self.op_name}, dense={self._rule}"

    @property
    def agreed(self) -> str:
        """The configuration, and what belongs to a step."""
        if self._scale_now is None:
            return self.configuration
        return f"{self.configuration}, loss scale {self._scale_now}"

    @property
    def _old_configurations(self) -> Iterator[str]:
        """As release 0.1.0 wrote it: by repr, or by the name of the class alone."""
        for chosen in (repr(self.sparsifier), type(self.sparsifier).__name__):
            yield f"{chosen}, op={self.op_name}, dense={self.dense!r}"

    # ------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """All that a restart needs, as copies; it belongs to this rank.

        In the middle of a step, what is on its way is part of the residuals, as if its
        exchange had failed: nothing is lost.
        """
        self.put_back()
        scaled = {} if self._scale_now is None else {"loss_scale": self._scale_now}
        return {
            **scaled,
            "format": STATE_FORMAT,
            "rank": self.exchange.rank,
            "size": self.exchange.size,
            "configuration": self.configuration,
            "step": self.traffic.steps,
            "tensors": {
                # loaded and not used since: still waiting, so still part of the state
                **{
                    name: {"chosen": 0, **saved, "residual": _copy(saved["residual"])}
                    for name, saved in self._loaded.items()
                },
                **{
                    name: _saved(tensor, self._kept(tensor))
                    for name, tensor in self.tensors.items()
                },
            },
        }

    def _kept(self, tensor: Tensor) -> Array | None:
        """A copy of its residual, with what is on its way."""
        residual = _copy(self.memory.residuals.get(tensor.name))
        if tensor.in_flight and residual is not None:
            sent = self._sent(tensor, tensor.header)
            kernels_for(residual).add_at(residual, sent.indices, sent.values)
        return residual

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where state_dict was called, bitwise.

        Raises:
            ValueError: the state belongs to another rank, size or configuration, or a
                tensor of it has another shape or dtype here (then, or at its first
                use); the text has names, expected and found.
        """
        for key, *here in (
            ("format", STATE_FORMAT),
            ("size", self.exchange.size),
            ("rank", self.exchange.rank),
            ("configuration", self.configuration, *self._old_configurations),
        ):
            if state.get(key) not in here:
                raise ValueError(
                    f"state was saved with {key} {state.get(key)}, expected {here[0]}"
                )
        self._check_scale(state)
        saved = state["tensors"]
        for name, tensor in self.tensors.items():
            if name in saved:
                _check_loaded(name, saved[name], tensor.shape, tensor.dtype)
            elif saved:  # an empty state is that of a start: it resets all
                raise ValueError(f"state has no tensor {name!r}")
        self.adopt(state)

    def _check_scale(self, state: dict[str, Any]) -> None:
        scale, waits = state.get("loss_scale"), bool(state["tensors"])
        if scale is not None and not self.is_scaled:
            raise ValueError(
                f"state was saved with loss scale {scale}, expected none: give scaler="
            )
        if scale is None and self.is_scaled and waits:
            raise ValueError(
                "state has no loss scale, expected one for scaler=: put the one it was "
                'saved with into state["loss_scale"], 1.0 where there was none'
            )

    def adopt(self, state: dict[str, Any]) -> None:
        """Continue from a state of this process in another group of ranks.

        Routes are decided anew, since they depend on how many ranks there are.
        """
        self.tensors.clear()
        self.overflowed = False
        self._scale_now = state.get("loss_scale")
        self._loaded = {name: dict(saved) for name, saved in state["tensors"].items()}
        self.memory.residuals.clear()
        self.traffic.steps = state["step"]

    def forget(self, name: str) -> None:
        """Drop what is kept of a tensor that is gone; it is not under way."""
        self.tensors.pop(name, None)
        self.memory.residuals.pop(name, None)

    def _restore_loaded(self, name: str, gradient: Array) -> tuple[int, int]:
        """Put a loaded residual where its gradient is; returns step and chosen."""
        saved = self._loaded.get(name)
        if saved is None:
            return 0, 0
        _check_loaded(name, saved, tuple(gradient.shape), _dtype(gradient))
        if saved["residual"] is not None:
            _copy_to(self.memory.residual(name, gradient), saved["residual"])
        del self._loaded[name]
        return int(saved["step"]), int(saved.get("chosen", 0))


def _saved(tensor: Tensor, residual: Array | None) -> dict[str, Any]:
    return {
        "shape": tensor.shape,
        "dtype": tensor.dtype,
        "step": tensor.header.step,
        "residual": None if residual is None else residual.reshape(tensor.shape),
        "chosen": tensor.chosen,
    }


def _check_loaded(
    name: str, saved: dict[str, Any], shape: tuple[int, ...], dtype: str
) -> None:
    found = (tuple(saved["shape"]), saved["dtype"])
    if found != (shape, dtype):
        raise ValueError(
            f"{name}: state has shape {found[0]} and dtype {found[1]}, expected "
            f"{shape} and {dtype}"
        )


def _copy(array: Array | None) -> Array | None:
    """In memory of its own; a state may hold arrays of any framework."""
    if isinstance(array, np.ndarray) or array is None:
        return copy(array)
    return array.clone() if hasattr(array, "clone") else copy(array)


def _copy_to(out: Array, source: Any) -> None:
    """Overwrites out, on host or device, with as many numbers, rounding."""
    if isinstance(out, np.ndarray):
        out.reshape(-1)[...] = np.asarray(source).reshape(-1)
    else:
        on_host = isinstance(source, np.ndarray)
        source = out.new_tensor(source) if on_host else source
        out.reshape(-1).copy_(source.reshape(-1))


def _flat(gradient: Array) -> Array:
    """(n,) contiguous and aligned: a view where that is possible."""
    if isinstance(gradient, np.ndarray):
        return (gradient if is_flat(gradient) else gradient.copy()).reshape(-1)
    return gradient.contiguous().reshape(-1)


def is_flat(gradient: Array) -> bool:
    """Whether `_flat` is a view of the same memory."""
    if isinstance(gradient, np.ndarray):
        return gradient.flags.c_contiguous and gradient.flags.aligned
    return bool(gradient.is_contiguous())


def _on_host(indices: Array) -> Array:
    return indices if isinstance(indices, np.ndarray) else indices.cpu().numpy()


def _dtype(array: Array) -> str:
    return str(array.dtype).removeprefix("torch.")
