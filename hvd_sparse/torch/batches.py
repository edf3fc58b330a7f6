"""Batches: tensors whose payloads share one of Horovod's allgathers."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.contracts import PayloadError
from hvd_sparse.core.payload import padded_bytes, split

Array = npt.NDArray[Any]


class Batch:
    """Tensors whose payloads share an allgather, which costs more than its bytes.

    The members are fixed and the same on every rank, or ranks whose hooks fire in
    another order would gather different things under one name.
    """

    def __init__(self, name: str, members: Iterable[str]) -> None:
        """Empty; `name` is that of the allgather."""
        self.name = name
        self.members = frozenset(members)
        self.clear()

    def clear(self) -> None:
        """Empty again."""
        self.present: set[str] = set()  # some of them may have no payload yet
        self.payloads: dict[str, Array] = {}
        self.handle: int | None = None

    @property
    def complete(self) -> bool:
        """Whether all members have a payload."""
        return len(self.payloads) == len(self.members)

    @property
    def awaited(self) -> list[str]:
        """Once all members are present, those of them without a payload."""
        if len(self.present) < len(self.members):
            return []
        return sorted(self.present - self.payloads.keys())

    def joined(self, *, padded: bool) -> Array:
        """(bytes,) uint8: the payloads in the order of their names, and padding."""
        parts = [self.payloads[name] for name in sorted(self.payloads)]
        if padded:
            size = sum(part.size for part in parts)
            parts.append(np.zeros(padded_bytes(size) - size, np.uint8))
        return np.concatenate(parts)


class Arrival:
    """What all ranks sent in one batch."""

    def __init__(self, names: list[str], buffer: Array) -> None:
        """Of these tensors, in this order; the payloads of a rank side by side."""
        self.names = names
        self.buffer = buffer
        self._payloads: list[Array] = []

    def payloads(self, name: str, ranks: int, *, padded: bool) -> Sequence[Array]:
        """Those of one tensor, rank 0 first."""
        each = len(self.names)
        if not self._payloads:
            self._payloads = split(self.buffer, each=each, padded=padded)
        if len(self._payloads) != ranks * each:
            raise PayloadError(
                f"{name}: {len(self._payloads)} payloads came of those that travel "
                f"together, expected {each} of each rank; is one of these parameters "
                "frozen on some ranks only?"
            )
        return self._payloads[self.names.index(name) :: each]
