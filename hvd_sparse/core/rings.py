"""What an exchange costs on paper: up to how many ranks an allgatherv pays.

The usual model: a message of b bytes takes latency + b / bandwidth, every rank has a
link of its own, and sends and receives at the same time. Allgatherv and dense allreduce
are rings, as in Gloo, and in Open MPI for all but small messages (which take fewer,
larger hops: fewer latencies, as many bytes). Bytes are those a rank sends, which are
those it receives.

Thakur, Rabenseifner, Gropp, Optimization of Collective Communication Operations in
MPICH, 2005, has the rings. Renggli, Ashkboos, Aghagolzadeh, Alistarh, Hoefler, SparCML,
SC 2019, has the sparse allreduce that `split_allreduce` counts, and how a union fills.
"""

import math
from dataclasses import dataclass

from hvd_sparse.core.contracts import Format
from hvd_sparse.core.formats import Entries
from hvd_sparse.core.payload import MOST_ELEMENTS, payload_bytes
from hvd_sparse.core.values import Float32, float_bytes

_PLAIN = Entries(Float32())


@dataclass(frozen=True)
class Link:
    """The network as each rank sees it.

    Args:
        latency_s: of a message of no bytes, in seconds, >= 0.
        bytes_per_s: that a rank can send, and receive at the same time; > 0.

    Raises:
        ValueError: an argument is out of range.
    """

    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        if not self.latency_s >= 0:
            raise ValueError(f"latency_s must not be negative, got {self.latency_s}")
        if not self.bytes_per_s > 0:
            raise ValueError(f"bytes_per_s must be positive, got {self.bytes_per_s}")

    def seconds(self, transfer: "Transfer") -> float:
        """What a collective takes."""
        return transfer.messages * self.latency_s + transfer.bytes / self.bytes_per_s


@dataclass(frozen=True)
class Transfer:
    """What one rank sends in a collective, one message after the other.

    Attributes:
        messages: how many.
        bytes: in all.
    """

    messages: int
    bytes: float


def allgather(
    ranks: int,
    k: int,
    *,
    n: int = MOST_ELEMENTS,
    dtype: str = "float32",
    form: Format = _PLAIN,
) -> Transfer:
    """The payloads of k of n elements of all ranks, to all ranks: grows with them."""
    payload = payload_bytes(form, dtype, n, k)
    return Transfer(ranks - 1, (ranks - 1) * payload)


def dense_allreduce(ranks: int, n: int, *, itemsize: int = 4) -> Transfer:
    """A ring: a reduce-scatter and an allgather of n / ranks elements a message."""
    return Transfer(2 * (ranks - 1), 2 * (ranks - 1) * n * itemsize / ranks)


def union(ranks: int, n: int, k: int) -> float:
    """Elements that at least one of the ranks sends, if each draws k at random.

    n (1 - (1 - k / n)^ranks). Real gradients agree about some of the largest, so that
    this is an upper estimate; if no two ranks agree it is min(n, ranks k).
    """
    return float(n * (1 - (1 - k / n) ** ranks))


def split_allreduce(ranks: int, n: int, k: int, *, dtype: str = "float32") -> Transfer:
    """A sparse allreduce, which this package has not: each rank sums a part of n.

    SparCML's split allgather: entries go to the rank that has their part, sums come
    back to all; dense once the union takes more bytes so. Headers are not counted.
    """
    there = min(n, math.ceil(union(ranks, n, k)))
    sums = min(_PLAIN.bytes(there, dtype, n), n * float_bytes(dtype))
    share = (ranks - 1) / ranks
    return Transfer(2 * (ranks - 1), share * (_PLAIN.bytes(k, dtype, n) + sums))


def most_ranks(n: int, k: int, *, itemsize: int = 4, form: Format = _PLAIN) -> int:
    """The largest number of ranks for which an allgather sends less than a dense ring.

    From (P - 1) payload < 2 (P - 1) n itemsize / P; what `WhenCheaper` decides by.
    """
    payload: int = payload_bytes(form, "float32", n, k)
    return (2 * n * itemsize - 1) // payload
