"""What the collectives of this job take, by the bytes that a rank contributes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.costs import measure
from hvd_sparse.doctor.transport import Transport

Array = npt.NDArray[Any]

SMALL = (64, 1024, 16_384)  # bytes, to find out how slow the network is
LARGEST = 16 << 20
BUDGET_S = 2.0  # for the exchanges of the largest size
REPEATS = 9


@dataclass(frozen=True)
class Collective:
    """What one takes.

    No line fits small and large messages alike: buffers, the size of segments and
    another algorithm of MPI's for large ones bend it. So what was measured is kept.

    Attributes:
        sizes: bytes that each rank contributed, rising, at least two.
        times_s: of the slowest rank, medians.
    """

    sizes: tuple[int, ...]
    times_s: tuple[float, ...]

    @property
    def latency_s(self) -> float:
        """Of the smallest."""
        return self.times_s[0]

    @property
    def per_byte_s(self) -> float:
        """Of what is added to a large one."""
        before, last = self.times_s[-2:]
        rise = (last - before) / (self.sizes[-1] - self.sizes[-2])
        return rise if rise > 0 else last / self.sizes[-1]

    def seconds(self, size: int) -> float:
        """Of one with so many bytes a rank; 0 of none.

        On a line between two that were measured; beyond them at the rate of the last.
        """
        if not size:
            return 0.0
        beyond = max(0, size - self.sizes[-1])
        within = float(np.interp(size, self.sizes, self.times_s))
        return within + beyond * self.per_byte_s


@dataclass(frozen=True)
class Network:
    """The collectives that an exchange is made of.

    Attributes:
        allgather: of payloads.
        allreduce: of float32 gradients.
        allreduce_half: of float16 gradients.
    """

    allgather: Collective
    allreduce: Collective
    allreduce_half: Collective


def measure_network(transport: Transport) -> Network:
    """Collective: every rank must call it. Takes some 10 seconds on a slow network."""
    return Network(
        _measure(transport, transport.gather),
        _measure(transport, lambda own: transport.reduce(own.view(np.float32))),
        _measure(transport, lambda own: transport.reduce(own.view(np.float16))),
    )


def _measure(transport: Transport, exchange: Callable[[Array], object]) -> Collective:
    sizes = [*SMALL]
    while sizes[-1] < LARGEST and _seconds(transport, exchange, sizes[-1]) < _MOST_S:
        sizes.append(4 * sizes[-1])
    found = measure(transport.gather, sizes=sizes, repeats=REPEATS, exchange=exchange)
    return Collective(found.sizes, found.seconds)


_MOST_S = BUDGET_S / (REPEATS + 1) / 4  # the next size takes four times as long


def _seconds(
    transport: Transport, exchange: Callable[[Array], object], size: int
) -> float:
    """The best of three exchanges of this size, for one may stall, on any rank."""
    payload, times = np.zeros(size, np.uint8), []
    for _ in range(3):
        start = time.perf_counter()
        exchange(payload)
        times.append(time.perf_counter() - start)
    every = transport.gather(np.array([min(times)]).view(np.uint8))
    return max(float(part.view(np.float64)[0]) for part in every)
