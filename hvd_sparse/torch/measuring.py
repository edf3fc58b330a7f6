"""What exchanges cost through Horovod, measured at start-up, for `CAT`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hvd_sparse.core import costs
from hvd_sparse.core.costs import Measurement

Array = npt.NDArray[Any]


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
    import horovod.torch as hvd

    group = hvd.global_process_set if process_set is None else process_set

    def gather(payload: Array) -> list[Array]:
        name = f"hvd_sparse.measure.{payload.size}"
        gathered = hvd.allgather(
            torch.from_numpy(payload), name=name, process_set=group
        )
        return np.split(gathered.numpy(), group.size())

    return costs.measure(gather, sizes=sizes, repeats=repeats)
