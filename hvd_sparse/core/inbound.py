"""The way back, stage by stage: decode what all ranks sent, aggregate, hand back."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_sparse.core.contracts import Array, Exchange, Memory, PayloadError, Selection
from hvd_sparse.core.flight import Flight, with_indices
from hvd_sparse.core.fused import Fused, Pair, alike
from hvd_sparse.core.loss_scale import LossScale
from hvd_sparse.core.outbound import is_flat
from hvd_sparse.core.payload import Payload, decode
from hvd_sparse.core.plan import Plan
from hvd_sparse.core.residuals import copy_to
from hvd_sparse.core.traffic import Traffic
from hvd_sparse.kernels import kernels_for

_NOTHING = Selection(np.empty(0, np.int32), np.empty(0, np.float32), 0)


class Inbound:
    """The last stages of a path."""

    def __init__(
        self,
        plan: Plan,
        memory: Memory,
        exchange: Exchange,
        traffic: Traffic,
        scaling: LossScale,
        fused: Fused,
    ) -> None:
        """Args: fused: the stages of many small tensors at once."""
        self._plan = plan
        self._memory = memory
        self._exchange = exchange
        self._traffic = traffic
        self._scaling = scaling
        self._fused = fused

    def hand_back(self, bucket: Sequence[Pair]) -> None:
        """Args: bucket: flights, and contiguous arrays that are overwritten."""
        arrived = self._together(bucket)
        for flight, out in bucket:
            if flight.tensor.dense:
                self._hand_back_dense(flight, out)
            elif id(flight) not in arrived:
                self._hand_back_sparse(flight, out)
            flight.arrive()

    def _together(self, bucket: Sequence[Pair]) -> set[int]:
        """Those that kernels can sum up in one call; by their id."""
        arrived: set[int] = set()
        if self._scaling.is_used or self._exchange.uneven:
            return arrived
        others = self._exchange.size - 1
        for group in alike(pair for pair in bucket if _may_join(*pair)):
            sizes = self._fused.aggregate(group, self._plan.scale)
            for (flight, _), size in zip(group, sizes or [], strict=bool(sizes)):
                tensor = flight.tensor
                self._traffic.count(tensor, tensor.header.k, size, size * others)
                arrived.add(id(flight))
        return arrived

    def _hand_back_sparse(self, flight: Flight, out: Array) -> None:
        payloads = self._decode(flight)
        if any(payload.nonfinite for payload in payloads):
            # nobody applies anything, so everybody keeps what they sent
            flight.roll_back(self._memory)
            self._scaling.overflowed = self._scaling.is_used
            out[...] = float("nan")
        else:
            self._aggregate(flight, payloads, out)

    def _decode(self, flight: Flight) -> list[Selection]:
        tensor, own = flight.tensor, self._exchange.rank
        payloads = self._exchange.finish(flight.handle)
        sizes = [payload.wire_bytes for payload in payloads if payload is not None]
        mine = payloads[own]
        self._traffic.count(
            tensor, mine.k, mine.wire_bytes, sum(sizes) - mine.wire_bytes
        )
        return [self._decode_one(flight, payload) for payload in payloads]

    def _decode_one(self, flight: Flight, payload: Payload | None) -> Selection:
        """Its indices too, where they did not travel."""
        tensor = flight.tensor
        if payload is None:
            return _NOTHING._replace(values=_NOTHING.values.astype(tensor.header.wide))
        # a rank that missed some exchanges is a few steps behind, for once
        tensor.latest = max(tensor.latest, payload.header.step)
        if flight.indices is None:
            return decode(payload)
        if payload.header.step != tensor.header.step:
            return with_indices(tensor, payload)
        return decode(payload)._replace(indices=flight.indices)

    def _aggregate(self, flight: Flight, payloads: list[Selection], out: Array) -> None:
        entries = [(payload.indices, payload.values) for payload in payloads]
        scale = self._plan.scale
        try:
            kernels_for(out).aggregate(out.reshape(-1), entries, scale, flight.cleared)
        except ValueError as error:
            raise PayloadError(f"{flight.tensor.name}: {error}") from None
        self._scaling.look_at(out, [payload.values for payload in payloads])

    def _hand_back_dense(self, flight: Flight, out: Array) -> None:
        """The library's own sum; averaged as the sparse one is."""
        exchange: Any = self._exchange  # a DenseExchange
        total, wire_bytes = exchange.finish_dense(flight.handle)
        with np.errstate(over="ignore", invalid="ignore"):
            total *= total.dtype.type(self._plan.scale)  # the exchange's own buffer
            copy_to(out, total)
        self._scaling.look_at(out)
        tensor = flight.tensor
        self._traffic.count(tensor, tensor.header.n, wire_bytes, wire_bytes)


def _may_join(flight: Flight, out: Array) -> bool:
    """On the host, unrounded, contiguous, with a k that ranks share."""
    if flight.cleared or not flight.tensor.plain:
        return False
    return isinstance(out, np.ndarray) and is_flat(out)
