"""What an exchange costs in this job."""

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from hvd_sparse.core import costs
from hvd_sparse.core.costs import Measurement
from hvd_sparse.transport.mpi.exchange import MpiExchange

Array = npt.NDArray[Any]


def measure(
    comm: Any = None,
    *,
    sizes: Sequence[int] = costs.MEASURED_SIZES,
    repeats: int = 9,
    timeout_s: float = 600,
) -> Measurement:
    """Time exchanges of this job and fit a cost in seconds; alike on every rank.

    Collective: every rank of comm must call it. What is timed is what SparseAllreduce
    does for a group of one.

    Args:
        comm: as of SparseAllreduce.
        sizes: bytes that each rank sends, multiples of 8, at least two.
        repeats: exchanges of each size; their median counts.
        timeout_s: seconds to wait for peers in an exchange.

    Raises:
        ValueError: there are fewer than two sizes, or no repeats.
        ExchangeError: a peer did not arrive in time.
    """
    exchange = MpiExchange(comm, timeout_s)

    def gather(payload: Array) -> list[Array]:
        handle = exchange.start_bytes(payload)
        exchange.open([("measure", (), "bytes", 0, "bytes", 0)], "measure")
        exchange.close_step()
        received = list(exchange.finish_bytes(handle))
        exchange.clear()
        return received

    measurement = costs.measure(gather, sizes=sizes, repeats=repeats)
    exchange.free()
    return measurement
