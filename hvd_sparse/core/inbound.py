"""The way back, stage by stage: sum up what ranks sent, look at it, hand it back."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_sparse.core.contracts import (
    Array,
    Collective,
    Exchange,
    Memory,
    Observer,
    Summed,
)
from hvd_sparse.core.flight import Flight
from hvd_sparse.core.fused import Pair
from hvd_sparse.core.loss_scale import LossScale
from hvd_sparse.core.plan import Plan
from hvd_sparse.core.residuals import copy_to
from hvd_sparse.core.traffic import Traffic


class Inbound:
    """The last stages of a path."""

    def __init__(
        self,
        plan: Plan,
        memory: Memory,
        collective: Collective,
        exchange: Exchange,
        traffic: Traffic,
        scaling: LossScale,
        observers: Sequence[Observer],
    ) -> None:
        """Join the parts."""
        self._plan = plan
        self._memory = memory
        self._exchange = exchange
        self._collective = collective
        self._traffic = traffic
        self._scaling = scaling
        self._observers = observers

    def hand_back(self, bucket: Sequence[Pair]) -> None:
        """Args: bucket: flights, and contiguous arrays that are overwritten."""
        sparse = [pair for pair in bucket if not pair[0].tensor.dense]
        if sparse:
            flights, outs = zip(*sparse, strict=True)
            sums = self._collective.sum(flights, outs, self._plan.scale)
            for flight, out, summed in zip(flights, outs, sums, strict=True):
                self._look_at(flight, out, summed)
        for flight, out in bucket:
            if flight.tensor.dense:
                self._hand_back_dense(flight, out)
            flight.arrive()
        for observer in self._observers:
            for flight, out in bucket:
                observer.received(flight, out)

    def _look_at(self, flight: Flight, out: Array, summed: Summed) -> None:
        """What is not finite nobody applies, so everybody keeps what they sent."""
        elements, sent, received, bound, nonfinite = summed
        self._traffic.count(flight.tensor, elements, sent, received)
        if nonfinite:
            flight.roll_back(self._memory)
            self._scaling.overflow()
            out[...] = float("nan")
        else:
            self._scaling.look_at(out, bound)

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
