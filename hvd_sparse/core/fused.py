"""Many small tensors in one call of the kernels, which saves each some Python.

Each gets the same bits as alone; only the loops over them are in the kernels.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from hvd_sparse.core.contracts import Array, PayloadError
from hvd_sparse.core.flight import Flight
from hvd_sparse.core.formats import Entries
from hvd_sparse.core.payload import Bytes, Header, Payload, entry_bytes
from hvd_sparse.kernels import host

_MOST_ROOMS = 1024  # remembered

Pair = tuple[Flight, Array]  # and its gradient, or where its result goes


class Fused:
    """The stages that pass over elements, for groups of one dtype on the host."""

    def __init__(self) -> None:
        """Nothing is known of any group yet."""
        self._rooms: dict[tuple[int, ...], _Room] = {}  # by digests

    def select(self, group: Sequence[Pair], residuals: Sequence[Array]) -> None:
        """Accumulate, select and encode; raises before anything is accumulated.

        Args:
            group: flights of `grouped` tensors, and what is added to the residual of
                each, contiguous.
            residuals: of each.
        """
        flights, gradients = zip(*group, strict=True)
        parts, table = self._room(flights).lay_out()
        sparsifier: Any = flights[0].tensor.sparsifier  # a Grouped
        nonfinite = sparsifier.select_group(residuals, gradients, table)
        for flight, part, wrong in zip(flights, parts, nonfinite, strict=True):
            tensor = flight.tensor
            header = tensor.header
            tensor.payload = Payload(header, header.k, bool(wrong), part)
            tensor.chosen = header.k
            flight.depart()

    def aggregate(self, group: Sequence[Pair], addresses: Array, scale: float) -> None:
        """Sum up what has arrived into the results.

        Args:
            group: flights of `plain` tensors, and contiguous arrays for their results,
                no two of which overlap.
            addresses: (ranks, payloads) int64: of the entries of each.
            scale: what sums are multiplied with.

        Raises:
            PayloadError: a peer disagrees; the text has the tensor.
        """
        flights, outs = zip(*group, strict=True)
        table = self._room(flights).find_entries(addresses)
        wrong = host.aggregate_group(outs, table, scale)
        if wrong >= 0:
            tensor = flights[wrong].tensor
            name, n = tensor.name, tensor.header.n
            raise PayloadError(
                f"{name}: indices must ascend in [0, {n}), and values be finite"
            )

    def _room(self, flights: Iterable[Flight]) -> "_Room":
        """Most often the same tensors are selected together in every step."""
        digests = tuple(flight.tensor.header.digest for flight in flights)
        if digests not in self._rooms:
            if len(self._rooms) == _MOST_ROOMS:  # gradients come and go
                self._rooms.clear()
            self._rooms[digests] = _Room([flight.tensor.header for flight in flights])
        return self._rooms[digests]


class _Room:
    """For the entries of some tensors, in formats of ours, side by side."""

    def __init__(self, headers: Sequence[Header]) -> None:
        """Of these tensors, in this order; the steps of the headers do not matter."""
        sizes = [entry_bytes(h.form, h.dtype, h.n, h.k) for h in headers]
        # (payloads, 5) int64: where indices and values begin in the entries; k, kinds
        self._places = np.array([_places(header) for header in headers])
        self._bounds = np.concatenate([[0], np.cumsum(sizes)])

    def lay_out(self) -> tuple[list[Bytes], Array]:
        """Memory for entries, zeros.

        Returns:
            parts: of each tensor, side by side in fresh memory.
            table: (payloads, 5) int64: where to write indices and values, as addresses;
                k, and the two kinds: a row of `kernels.host.entries` for each.
        """
        buffer = np.zeros(self._bounds[-1], np.uint8)
        table = self._places.copy()
        table[:, :2] += (self._bounds[:-1] + host.address(buffer))[:, None]
        return [buffer[i:j] for i, j in pairwise(self._bounds.tolist())], table

    def find_entries(self, addresses: Array) -> Array:
        """Where indices and values lie.

        Args:
            addresses: (ranks, payloads) int64: of the entries of each.

        Returns:
            (payloads, ranks, 5) int64: the same.
        """
        table = np.repeat(self._places[:, None], len(addresses), axis=1)
        table[..., :2] += addresses.T[..., None]
        return table


def _places(header: Header) -> tuple[int, int, int, int, int]:
    assert isinstance(header.form, Entries)
    places = header.form.places(header.k, header.dtype, header.n)
    return places.indices_at, 0, header.k, places.index_kind, places.value_kind


def alike(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Those of one dtype together, where there are several."""
    ordered = sorted(pairs, key=_dtype)
    groups = [list(group) for _, group in groupby(ordered, _dtype)]
    return [group for group in groups if len(group) > 1]


def _dtype(pair: Pair) -> str:
    return pair[0].tensor.dtype
