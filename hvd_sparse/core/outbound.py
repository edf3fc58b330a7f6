"""The way there, stage by stage: accumulate, select, encode, start the exchange."""

from collections.abc import Container, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np

from hvd_sparse.core.checks import check_selection
from hvd_sparse.core.contracts import (
    Array,
    Collective,
    Exchange,
    Observer,
    Selection,
)
from hvd_sparse.core.flight import Flight, Phase, Tensor, all_of
from hvd_sparse.core.fused import Fused, Pair, alike
from hvd_sparse.core.memory import Kept
from hvd_sparse.core.payload import Payload, encode
from hvd_sparse.kernels import kernels_for
from hvd_sparse.kernels.contract import NothingAddedError

_CACHED = 1 << 16  # elements, below which another pass over a gradient costs little


class Outbound:
    """The first three stages of a path, and the start of the exchange."""

    def __init__(
        self,
        kept: Kept,
        exchange: Exchange,
        collective: Collective,
        observers: Sequence[Observer],
    ) -> None:
        """Join the parts."""
        self._kept = kept
        self._memory = kept.memory
        self._exchange = exchange
        self._collective = collective
        self._observers = observers
        self._fused = Fused()

    def select(self, bucket: Sequence[Pair], in_place: Container[str]) -> None:
        """Accumulate, select and encode: afterwards each has its payload.

        Args:
            bucket: flights, and their gradients, in any shape.
            in_place: names of those whose memory is free from now on.
        """
        for group in alike(pair for pair in bucket if self._may_join(*pair, in_place)):
            self._select_group(group)
        for flight, gradient in bucket:
            if flight.phase is Phase.FILLING and not flight.tensor.dense:
                free = flight.tensor.name in in_place
                self._select(flight, gradient, in_place=free)

    def _may_join(
        self, flight: Flight, gradient: Array, in_place: Container[str]
    ) -> bool:
        """Whether kernels may select from it and others at once.

        They leave the gradient as it is, which costs large ones in place a pass more;
        and what rounding takes they add to the residual.
        """
        tensor = flight.tensor
        small = tensor.header.n <= _CACHED or tensor.name not in in_place
        joins = tensor.grouped and small and is_flat(gradient)
        return joins and (not tensor.rounds or self._kept.adds_rests)

    def _select_group(self, group: Sequence[Pair]) -> None:
        """Many small ones; raises when each is in its residual."""
        named = [(flight.tensor.name, gradient) for flight, gradient in group]
        residuals = [self._memory.residual(*each) for each in named]
        flights = [flight for flight, _ in group]
        incoming: list[Array] = []
        try:
            incoming.extend(self._kept.incoming(*each) for each in named)
            self._fused.select(list(zip(flights, incoming, strict=True)), residuals)
        except BaseException:
            for flight, each, added in zip(flights, named, incoming, strict=False):
                flight.phase = Phase.FAILED  # others are asked when they are kept
                self._kept.add(*each, added)
            raise
        if self._kept.is_corrected:
            for flight in flights:
                self._kept.sent(flight.tensor.name, flight.selection.indices)

    def _select(self, flight: Flight, gradient: Array, *, in_place: bool) -> None:
        """One alone; its residual takes the gradient and keeps what is not selected."""
        tensor, flat = flight.tensor, _flat(gradient)
        residual = self._memory.residual(tensor.name, gradient)
        incoming = self._kept.incoming(tensor.name, flat)
        flight.phase = Phase.FAILED  # if what follows fails, it is in the residual
        if tensor.trusted:
            flight.cleared = (
                in_place and tensor.clears and is_flat(gradient) and incoming is flat
            )
            out = flat if flight.cleared else None
            try:
                selection = tensor.select(residual, incoming, out)
            except NothingAddedError as error:
                self._kept.add(tensor.name, gradient, incoming)
                raise error.__cause__ or error from None
        else:
            selection = _select_by_users(tensor, residual, incoming)
        tensor.chosen = selection.indices.shape[0]
        tensor.payload = self._encode(tensor, selection)
        if tensor.unindexed:
            flight.indices = selection.indices
        flight.depart()

    def _encode(self, tensor: Tensor, selection: Selection) -> Payload:
        """Its payload; from here on what was selected is in there, or back again."""
        indices, values, _ = selection
        try:
            self._kept.sent(tensor.name, indices)
            payload, sent = encode(selection, tensor.header, tensor.payload)
            if sent is not values:  # rounded on the wire: the rest is not lost
                self._memory.keep(tensor.name, indices, values - sent)
        except BaseException:
            self._memory.restore(tensor.name, indices, values)
            raise
        return payload

    def start(self, bucket: Sequence[Pair]) -> None:
        """Begin the exchange of each, in this order."""
        exchange: Any = self._exchange  # a DenseExchange, if dense ones come
        for flight, gradient in bucket:
            tensor = flight.tensor
            if tensor.dense:
                flight.handle = exchange.start_dense(tensor.name, _flat(gradient))
                flight.depart()
            else:
                self._collective.start(flight)
        for observer in self._observers:
            for flight, gradient in bucket:
                observer.sent(flight, gradient)

    def keep(self, bucket: Sequence[Pair], in_place: Container[str]) -> None:
        """The bucket does not leave: all that goes sparse waits in the residuals."""
        all_of(partial(self._keep, *pair, in_place) for pair in bucket)

    def _keep(self, flight: Flight, gradient: Array, in_place: Container[str]) -> None:
        tensor = flight.tensor
        flight.roll_back(self._memory)
        if tensor.dense:
            return
        if flight.phase is Phase.FILLING:
            self._kept.accumulate(tensor.name, _flat(gradient))
        if tensor.name in in_place:
            gradient[...] = 0


def _select_by_users(tensor: Tensor, residual: Array, incoming: Array) -> Selection:
    """It may raise, or be refused, at any point: all is then in the residual."""
    before = None
    try:
        before = deepcopy(residual)
        selection = tensor.select(residual, incoming, None)
        check_selection(tensor, selection)
    except BaseException:
        if before is not None:
            residual[...] = before
        kernels_for(residual).accumulate(residual, incoming)
        raise
    indices, values, nonfinite = selection
    return Selection(_flat(indices), _flat(values), nonfinite)


def _flat(gradient: Array) -> Array:
    """(n,) contiguous and aligned: a view where that is possible."""
    if isinstance(gradient, np.ndarray):
        return (gradient if is_flat(gradient) else gradient.copy()).reshape(-1)
    return gradient.contiguous().reshape(-1)


def is_flat(gradient: Array) -> bool:
    """Whether it is contiguous and aligned."""
    if isinstance(gradient, np.ndarray):
        return gradient.flags.c_contiguous and gradient.flags.aligned
    return bool(gradient.is_contiguous())
