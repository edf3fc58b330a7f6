"""What exchanges cost through Horovod, measured at start-up, for `CAT`."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvd_sparse.carriers import gather_through
from hvd_sparse.core import costs
from hvd_sparse.core.costs import Measurement


def measure(
    *,
    process_set: Any = None,
    sizes: Sequence[int] = costs.MEASURED_SIZES,
    repeats: int = 9,
) -> Measurement:
    """Time allgathers of this job and fit a cost in seconds; alike on every rank.

    Every rank must call it at the same place, after hvd.init().

    Args:
        process_set: the one of the optimizer, if any.
        sizes: bytes that each rank sends, multiples of 8, at least two.
        repeats: exchanges of each size; their median counts.

    Raises:
        ValueError: there are fewer than two sizes, or no repeats.
    """
    import horovod.tensorflow as hvd

    gather = gather_through(hvd, tf.constant, process_set)
    return costs.measure(gather, sizes=sizes, repeats=repeats)
