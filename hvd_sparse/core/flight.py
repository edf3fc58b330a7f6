"""Flight: one gradient between send and hand back, and what can be undone of it."""

from dataclasses import dataclass
from typing import Any

from hvd_sparse.core.contracts import Array, Memory, Selection
from hvd_sparse.core.payload import Header, Payload, decode
from hvd_sparse.core.plan import Tensor


@dataclass(slots=True)
class Flight:
    """One gradient of a bucket.

    Attributes:
        tensor: which one.
        accumulated: it is in the residual, or was taken from there.
        cleared: the gradient's memory, which the result will take, is all 0.
        indices: where every rank knows them, so that they do not travel.
        handle: of the exchange.
    """

    tensor: Tensor
    accumulated: bool = False
    cleared: bool = False
    indices: Array | None = None
    handle: Any = None

    def check_on_ground(self) -> None:
        """Raise ValueError if it was sent already."""
        if self.tensor.in_flight:
            name = self.tensor.name
            raise ValueError(f"{name}: was sent already and not received yet")

    def settle(self) -> None:
        """What was sent has arrived and can not be recalled any more."""
        tensor = self.tensor
        tensor.delivered, tensor.in_flight = tensor.in_flight, False
        tensor.at_step(max(tensor.latest, tensor.header.step) + 1)

    def recall(self, memory: Memory) -> None:
        """Put back what was sent when its exchange failed: nothing is lost."""
        tensor = self.tensor
        if tensor.in_flight:
            assert tensor.payload is not None
            own = decode(tensor.payload)
            indices = own.indices if self.indices is None else self.indices
            memory.restore(tensor.name, indices, own.values)
            tensor.in_flight = False


def last_sent(tensor: Tensor) -> Selection:
    """What this rank sent last."""
    assert tensor.payload is not None
    return with_indices(tensor, tensor.payload)


def with_indices(tensor: Tensor, payload: Payload) -> Selection:
    """What is in a payload, and indices that no payload of this tensor carries."""
    sent = decode(payload)
    indices = drawn(tensor, payload.header)
    return sent if indices is None else sent._replace(indices=indices)


def drawn(tensor: Tensor, header: Header) -> Array | None:
    """The indices that no payload of this tensor carries; None where they travel."""
    if not tensor.unindexed:
        return None
    sparsifier: Any = tensor.sparsifier  # a SharedIndices
    indices: Array = sparsifier.indices(header.n, header.k, header.step)
    return indices
