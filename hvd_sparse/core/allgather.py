"""Allgather: every rank gets the payloads of all ranks, and sums them up itself.

Replicas agree bitwise because each sums in the order of ranks.
"""

from collections.abc import Sequence

import numpy as np

from hvd_sparse.core.contracts import Array, Exchange, PayloadError, Summed
from hvd_sparse.core.flight import Flight, indices_of
from hvd_sparse.core.fused import Fused, Pair, alike
from hvd_sparse.core.loss_scale import largest
from hvd_sparse.core.outbound import is_flat
from hvd_sparse.core.payload import Payload, as_coded, decode
from hvd_sparse.kernels import kernels_for
from hvd_sparse.kernels.coding import Coded


class Allgather:
    """The collective of Alistarh et al., 2018, algorithm 1."""

    def __init__(self, exchange: Exchange, *, bounded: bool = False) -> None:
        """Args: bounded: say how large sums may be, for which all values are read."""
        self._exchange = exchange
        self._bounded = bounded
        self._fused = Fused()

    def start(self, flight: Flight) -> None:
        """Begin to gather its payload."""
        tensor = flight.tensor
        flight.handle = self._exchange.start(tensor.name, tensor.payload)

    def sum(
        self, flights: Sequence[Flight], outs: Sequence[Array], scale: float
    ) -> list[Summed]:
        """As of `Collective`."""
        bucket = list(zip(flights, outs, strict=True))
        there = {} if self._exchange.uneven else self._sum_groups(bucket, scale)
        return [
            there.get(flight.tensor.name) or self._sum_one(flight, out, scale)
            for flight, out in bucket
        ]

    def _sum_groups(self, bucket: Sequence[Pair], scale: float) -> dict[str, Summed]:
        """Those that kernels can sum up in one call."""
        there: dict[str, Summed] = {}
        others = self._exchange.size - 1
        for group in alike(pair for pair in bucket if _may_join(*pair)):
            found = self._exchange.locate([flight.handle for flight, _ in group])
            if found is None:  # they must be received one by one
                continue
            try:
                self._fused.aggregate(group, found.addresses, scale)
            except PayloadError:
                for flight, _ in group:
                    _check(flight, self._exchange.finish(flight.handle))
                raise
            for (flight, _), size in zip(group, found.wire_bytes, strict=True):
                tensor = flight.tensor
                there[tensor.name] = Summed(tensor.header.k, size, size * others)
        return there

    def _sum_one(self, flight: Flight, out: Array, scale: float) -> Summed:
        payloads = self._exchange.finish(flight.handle)
        mine = payloads[self._exchange.rank]
        if mine is None:
            told = f"rank {self._exchange.rank}: no payload, expected this rank's own"
            raise PayloadError(f"{flight.tensor.name}: {told}")
        size = mine.wire_bytes
        there = [payload for payload in payloads if payload is not None]
        total = sum(payload.wire_bytes for payload in there)
        summed = Summed(mine.k, size, total - size)
        # a rank that missed some exchanges is a few steps behind, for once
        steps = [payload.header.step for payload in there]
        flight.tensor.latest = max(flight.tensor.latest, *steps)
        if any(payload.nonfinite for payload in there):
            return summed._replace(nonfinite=True)
        kernels = kernels_for(out)
        try:
            parts = [_coded(flight, payload) for payload in there]
            kernels.aggregate_coded(out.reshape(-1), parts, scale, flight.cleared)
        except (PayloadError, ValueError) as error:
            _check(flight, payloads)
            raise PayloadError(f"{flight.tensor.name}: {error}") from None
        if not self._bounded:
            return summed
        return summed._replace(bound=sum(largest(decode(p).values) for p in there))


def _check(flight: Flight, payloads: Sequence[Payload | None]) -> None:
    """Raise PayloadError with tensor and rank if entries of one are wrong."""
    for rank, payload in enumerate(payloads):
        try:
            if payload is not None:
                decode(payload, indexed=flight.indices is None)
        except PayloadError as error:
            told = f"{flight.tensor.name}: rank {rank}: {error}"
            raise PayloadError(told) from None


def _coded(flight: Flight, payload: Payload) -> Coded:
    """As it travels, and its indices where they did not."""
    tensor = flight.tensor
    coded = as_coded(payload, indexed=flight.indices is None)
    if flight.indices is None:
        return coded
    if payload.header.step != tensor.header.step:
        return coded._replace(indices=indices_of(tensor, payload.header))
    return coded._replace(indices=flight.indices)


def _may_join(flight: Flight, out: Array) -> bool:
    """On the host, contiguous, with a k that ranks share."""
    if flight.cleared or not flight.tensor.plain:
        return False
    return isinstance(out, np.ndarray) and is_flat(out)
