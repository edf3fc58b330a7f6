"""Exchange, under Horovod: how payloads travel.

A user chooses one of these by `exchange=`. What they have in common with each other,
and what TensorFlow needs of them too, is here; what calls Horovod is in integrations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.contracts import PayloadError
from hvd_sparse.core.costs import Gather

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Gathered:
    """Payloads travel in an allgather of their own: the fewest bytes.

    `hvd.join()` ends the whole job: Horovod 0.28.1 does not support an allgather while
    a rank has joined. Use `Embedded()` where ranks may have unequal numbers of batches.
    """


@dataclass(frozen=True)
class Embedded:
    """Payloads travel inside the optimizer's own allreduce; works with `hvd.join()`.

    Every rank has a slot in the reduced buffer and fills its own alone, so that the sum
    of the buffers is all payloads side by side. Bytes become 16-bit integers in
    float32, which survive the factors that averaging multiplies with. Four times the
    bytes of `Gathered()`, and one collective a tensor instead of two. It needs a k that
    is the same on every rank: TopK or RandomK.
    """


Carrier = Gathered | Embedded


def slot_floats(payload_bytes: int) -> int:
    """Elements of one rank's slot: a mark and the payload."""
    return 1 + payload_bytes // 2


def embed(payload: Bytes, rank: int, size: int) -> Floats:
    """(1 + size slots,) float32: 1 and this rank's slot filled, the others zero."""
    slot = slot_floats(payload.size)
    buffer = np.zeros(1 + size * slot, np.float32)
    start = 1 + rank * slot
    buffer[[0, start]] = 1
    buffer[start + 1 : start + slot] = payload.view(np.uint16)
    return buffer


def extract(reduced: Floats, size: int) -> tuple[list[Bytes], float]:
    """The payloads of all ranks, empty where one was missing, and the scale.

    Args:
        reduced: the sum over ranks of what `embed` made, times a scale.
        size: ranks that have a slot.

    Returns:
        Payloads, and the scale: 1 for a sum, about 1 / size for an average.

    Raises:
        PayloadError: this is no sum or average of buffers that `embed` made.
    """
    if not np.isfinite(reduced).all():
        raise PayloadError("the reduced buffer has numbers that are not finite")
    slots = reduced[1:].reshape(size, -1)
    marks = slots[:, 0].astype(np.float64)
    present = marks > 0
    scale = float(np.max(marks, initial=0.0))
    if not present.any() or abs(float(reduced[0]) / scale - present.sum()) > 0.5:
        raise PayloadError(
            "op must be Average or Sum: the reduced buffer is neither of them"
        )
    payloads = []
    for slot, mark in zip(slots, marks, strict=True):
        with np.errstate(over="ignore"):  # a damaged mark may be next to nothing
            words = np.rint(slot[1:] / mark) if mark > 0 else np.empty(0)
        if words.size and not 0 <= np.min(words) <= np.max(words) < 1 << 16:
            raise PayloadError("a slot of the reduced buffer has no 16-bit integers")
        payloads.append(words.astype(np.uint16).view(np.uint8))
    return payloads, scale


def gather_through(hvd: Any, as_tensor: Callable[[Any], Any], group: Any) -> Gather:
    """Horovod's allgather, blocking, for arrays; to measure what it takes.

    Args:
        hvd: horovod.torch or horovod.tensorflow.
        as_tensor: makes an array the framework's.
        group: a process set; None for all processes.
    """
    group = hvd.global_process_set if group is None else group

    def gather(payload: Bytes) -> list[Bytes]:
        name = f"hvd_sparse.measure.{payload.size}"
        gathered = hvd.allgather(as_tensor(payload), name=name, process_set=group)
        return np.split(gathered.numpy(), group.size())

    return gather
