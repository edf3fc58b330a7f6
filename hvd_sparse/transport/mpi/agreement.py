"""What ranks agree on before any data moves over MPI.

Every step opens with one fixed-size header from each rank. If all are alike but for the
byte counts, the payloads follow. If not, ranks exchange tables (one row a tensor) and
`disagreement` finds the rank and the tensor to blame: the same sentence on every rank.
Nothing in this file communicates.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from struct import Struct

from hvd_sparse.core.flight import Flight

_FORMAT = Struct("<4sBB2xqq16s")
_MAGIC = b"HVSA"
_VERSION = 2
STEP_HEADER_BYTES = _FORMAT.size

Row = tuple[str, tuple[int, ...], str, int, str, int]
ROW_FIELDS = ("name", "shape", "dtype", "k", "route", "step")


def row_of(flight: Flight) -> Row:
    """What ranks must have alike of a tensor that is sent."""
    tensor = flight.tensor
    header = tensor.header
    return tensor.name, tensor.shape, tensor.dtype, header.k, tensor.route, header.step


@dataclass(frozen=True)
class StepHeader:
    """One rank's opening of a step.

    Attributes:
        step: completed exchanges of this communicator.
        payload_bytes: what this rank will send in the allgatherv; may differ.
        digest: 16 bytes over all rows, thus all sizes, and the configuration.
        raised: this rank can not take part; its reason follows.
    """

    step: int
    payload_bytes: int
    digest: bytes
    raised: bool = False

    def pack(self) -> bytes:
        """STEP_HEADER_BYTES bytes."""
        return _FORMAT.pack(
            _MAGIC,
            _VERSION,
            self.raised,
            self.step,
            self.payload_bytes,
            self.digest,
        )

    @property
    def common(self) -> tuple[int, bytes]:
        """The part that must be the same on every rank."""
        return self.step, self.digest


def unpack(data: bytes) -> StepHeader:
    """The header in STEP_HEADER_BYTES bytes.

    Raises:
        ValueError: these are not the bytes of a header of this version.
    """
    magic, version, raised, step, size, known = _FORMAT.unpack(data)
    if (magic, version) != (_MAGIC, _VERSION):
        raise ValueError(
            f"step header {magic!r} version {version}, expected {_MAGIC!r} version "
            f"{_VERSION}: ranks run different releases of hvd_sparse"
        )
    return StepHeader(step, size, known, bool(raised))


def digest(rows: Sequence[Row], configuration: str) -> bytes:
    """16 bytes that differ if any row or the configuration does."""
    text = repr((configuration, rows)).encode()
    return blake2b(text, digest_size=16).digest()


def pack_table(rows: Sequence[Row], configuration: str, step: int) -> bytes:
    """All that the digest stands for, readable by a peer."""
    return json.dumps([configuration, step, rows]).encode()


def disagreement(tables: Sequence[bytes]) -> str:
    """One sentence on the first rank that differs from most, and in what.

    Args:
        tables: per rank, what pack_table made; not all equal.

    Example:
        >>> a = pack_table([("w", (4,), "float32", 1, "sparse", 0)], "TopK()", 0)
        >>> b = pack_table([("w", (3,), "float32", 1, "sparse", 0)], "TopK()", 0)
        >>> disagreement([a, b])
        'w: rank 1 has shape (3,), expected (4,)'
    """
    expected = Counter(tables).most_common(1)[0][0]  # ties: the lowest rank's
    rank = next(rank for rank, table in enumerate(tables) if table != expected)
    return _difference(rank, json.loads(tables[rank]), json.loads(expected))


def _difference(rank: int, found: list, expected: list) -> str:  # type: ignore[type-arg]  # JSON
    theirs = {row[0]: row for row in found[2]}
    ours = {row[0]: row for row in expected[2]}
    for name, row in ours.items():
        if name not in theirs:
            return f"{name}: rank {rank} does not have it, expected shape {_t(row[1])}"
    for name, row in theirs.items():
        if name not in ours:
            only = ", ".join(ours) or "no tensor"
            return f"{name}: rank {rank} has it, expected only {only}"
        for field, value, wanted in zip(ROW_FIELDS, row, ours[name], strict=True):
            if value != wanted and field != "k":
                seen = f"{name}: rank {rank} has {field} {_t(value)}"
                return f"{seen}, expected {_t(wanted)}"
    first = next(iter(theirs), "no tensor")
    if found[0] != expected[0]:
        return (
            f"{first}: rank {rank} has configuration {found[0]}, expected {expected[0]}"
        )
    for name, row in theirs.items():
        if row != ours[name]:
            return f"{name}: rank {rank} has k {row[3]}, expected {ours[name][3]}"
    return f"{first}: rank {rank} is at step {found[1]}, expected {expected[1]}"


def _t(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
