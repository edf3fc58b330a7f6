"""What a step takes on this machine alone: the real path, without a network."""

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.frame import MARK_BYTES
from hvd_sparse.core.indices import Indices
from hvd_sparse.core.path import GradientPath
from hvd_sparse.core.payload import Payload
from hvd_sparse.core.sparsifiers import TopK
from hvd_sparse.core.values import Values

Array = npt.NDArray[Any]

MOST_ELEMENTS = 30_000_000  # are tried; a larger model takes so much longer
STEPS = 4


class Local(NamedTuple):
    """One rank's share of a step.

    Attributes:
        seconds: to accumulate, select, encode, aggregate and hand back.
        payload_bytes: what goes sparse sends.
        dense_bytes: of the tensors that go dense.
        sparse_tensors: how many go sparse.
    """

    seconds: float
    payload_bytes: int
    dense_bytes: int
    sparse_tensors: int


class Echo:
    """An exchange between ranks that all send the same."""

    weight = 1
    uneven = False
    rank = 0

    def __init__(self, size: int) -> None:
        """Args: size: how many ranks."""
        self.size = size
        self.sent_bytes = 0

    def start(self, name: str, payload: Payload) -> Payload:
        """The payload itself is the handle."""
        del name
        self.sent_bytes += payload.entries.size + MARK_BYTES
        return payload

    def finish(self, handle: Payload) -> Sequence[Payload]:
        """As often as there are ranks."""
        return [handle] * self.size

    def locate(self, handles: Sequence[Payload]) -> None:
        """Each by itself."""


def measure_local(
    sizes: Sequence[int],
    density: float,
    ranks: int,
    *,
    values: Values | None = None,
    indices: Indices | None = None,
) -> Local:
    """Time the path over tensors of these sizes, float32, in place.

    Args:
        sizes: elements of each.
        density: of what is sent.
        ranks: how many exchange.
        values: how values travel, as for an integration.
        indices: how indices do.

    Raises:
        ValueError: density is not in (0, 1].
    """
    exchange = Echo(ranks)
    sparsifier = TopK(density=density)
    path = GradientPath(sparsifier, exchange, values=values, indices=indices)
    named = {f"tensor {i}": size for i, size in enumerate(sizes)}
    dense = {n for n, s in named.items() if path.plan.goes_dense(n, _like(s))}
    sparse = {name: size for name, size in named.items() if name not in dense}
    share = min(1.0, MOST_ELEMENTS / max(1, sum(sparse.values())))
    tried = {n: max(1, round(share * size)) for n, size in sparse.items()}
    path.plan.always_sparse.update(tried)
    times = [_step(path, tried, step) for step in range(STEPS)]
    return Local(
        statistics.median(times[1:]) / share if sparse else 0.0,
        round(exchange.sent_bytes / STEPS / share),
        4 * sum(size for name, size in named.items() if name in dense),
        len(sparse),
    )


def _like(size: int) -> Array:
    return np.broadcast_to(np.float32(0), (size,))


def _step(path: GradientPath, sizes: dict[str, int], step: int) -> float:
    generator = np.random.default_rng(step)
    noise = generator.standard_normal(1 << 16, np.float32)
    gradients = {name: np.resize(noise, size) for name, size in sizes.items()}
    start = time.perf_counter()
    flights = path.send(gradients, in_place=gradients)
    path.receive(flights, list(gradients.values()))
    return time.perf_counter() - start
