"""Many small tensors in one call of the kernels, which saves each some Python.

Each gets the same bits as alone; only the loops over them are in the kernels.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from hvd_sparse.core.contracts import Array, Exchange, Memory, PayloadError
from hvd_sparse.core.flight import Flight
from hvd_sparse.core.payload import Message, mark_nonfinite
from hvd_sparse.kernels import host

_MOST_MESSAGES = 1024  # remembered

Pair = tuple[Flight, Array]  # and its gradient, or where its result goes


class Fused:
    """The stages that pass over elements, for groups of one dtype on the host."""

    def __init__(self, memory: Memory, exchange: Exchange) -> None:
        """Nothing is known of any group yet."""
        self._memory = memory
        self._exchange = exchange
        self._messages: dict[tuple[int, ...], Message] = {}  # by their digests

    def select(self, group: Sequence[Pair]) -> None:
        """Accumulate, select and encode; raises before anything is accumulated.

        Args:
            group: flights of `grouped` tensors, and their gradients, contiguous.
        """
        flights, gradients = zip(*group, strict=True)
        tensors = [flight.tensor for flight in flights]
        residuals = [self._memory.residual(f.tensor.name, g) for f, g in group]
        steps = [tensor.header.step for tensor in tensors]
        payloads, table = self._message(flights).lay_out(steps)
        sparsifier: Any = tensors[0].sparsifier  # a Grouped
        nonfinite = sparsifier.select_group(residuals, gradients, table)
        for flight, tensor, payload, wrong in zip(
            flights, tensors, payloads, nonfinite, strict=True
        ):
            if wrong:
                mark_nonfinite(payload)
            tensor.payload = payload
            tensor.chosen = tensor.header.k
            flight.accumulated = tensor.in_flight = True

    def aggregate(self, group: Sequence[Pair], scale: float) -> bool:
        """Sum up what has arrived into the results.

        Args:
            group: flights of `plain` tensors, and contiguous arrays for their results,
                no two of which overlap.
            scale: what sums are multiplied with.

        Returns:
            False, and nothing was done, where they must be received one by one.

        Raises:
            PayloadError: a payload is damaged; the text has the tensor.
        """
        flights, outs = zip(*group, strict=True)
        tensors = [flight.tensor for flight in flights]
        message = self._message(flights)
        handles = [flight.handle for flight in flights]
        found = self._exchange.locate(handles, message.sizes)
        if found is None:
            return False
        steps = [tensor.header.step for tensor in tensors]
        table = message.find_entries(*found, steps)
        if table is None:
            return False
        wrong = host.aggregate_group(outs, table, scale)
        if wrong >= 0:
            name, n = tensors[wrong].name, tensors[wrong].header.n
            raise PayloadError(f"{name}: indices must ascend in [0, {n})")
        return True

    def _message(self, flights: Iterable[Flight]) -> Message:
        """Its layout: most often the same tensors travel together in every step."""
        digests = tuple(flight.tensor.header.digest for flight in flights)
        if digests not in self._messages:
            if len(self._messages) == _MOST_MESSAGES:  # gradients come and go
                self._messages.clear()
            headers = [flight.tensor.header for flight in flights]
            self._messages[digests] = Message(headers)
        return self._messages[digests]


def alike(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Those of one dtype together, where there are several."""
    ordered = sorted(pairs, key=_dtype)
    groups = [list(group) for _, group in groupby(ordered, _dtype)]
    return [group for group in groups if len(group) > 1]


def _dtype(pair: Pair) -> str:
    return pair[0].tensor.dtype
