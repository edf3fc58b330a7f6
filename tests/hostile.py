"""What must become of damaged bytes: they are decoded, or refused in words, no more.

`decode_hostile` takes the bytes of a fuzzer, whichever that is, through all that reads
bytes of peers.
"""

import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from damage import Draw, damaged
from guarded import Guarded
from scenes import SCENES, Scene, known_indices, scene_of

from hvd_sparse import PayloadError
from hvd_sparse.carriers import embed, extract
from hvd_sparse.core.flight import Phase
from hvd_sparse.core.frame import padded_bytes
from hvd_sparse.core.indices import KnownIndices
from hvd_sparse.core.payload import Payload, decode
from hvd_sparse.core.received import Received, split
from hvd_sparse.kernels import reference

ARRIVED = Guarded(1 << 20)
A_SCENE = 200  # damages in a row

# names the tensor, and says what was expected, and what came in its place
TOLD = re.compile(
    r"t\d: (rank \d: raised .|.*\d.*expected .|rank \d: values must be finite, \d"
    r"|rank \d: indices must ascend in \[0, \d+\), \d"
    r"|op must be Average or Sum|a slot of|the reduced buffer has numbers)",
    re.DOTALL,
)


def cases(seed: int, count: int) -> Iterator[bytes]:
    """Bytes as of a fuzzer: many damages of each scene, which is slow to make."""
    rng = random.Random(seed)
    for i in range(count):
        if i % A_SCENE == 0:
            scene = rng.randbytes(2)
        yield scene + rng.randbytes(rng.randrange(80))


def decode_hostile(data: bytes) -> str:
    """What was told of them, or nothing: they were decoded.

    Raises:
        AssertionError: something else became of them; or whatever was raised.
    """
    draw = Draw(data)
    scene = scene_of(draw.below(SCENES))
    rank = draw.below(len(scene.rows))
    rows = list(scene.rows)
    rows[rank] = damaged(draw, scene, rows[rank])
    try:
        _look_at(scene, _taken(draw, scene, rows, rank))
    except PayloadError as error:
        return _told(str(error))
    finally:
        ARRIVED.check()
        for out in scene.outs:
            out.check()
    return ""


def _told(text: str) -> str:
    assert TOLD.match(text), f"told badly: {text}"
    return text


def _taken(draw: Draw, scene: Scene, rows: list[bytes], rank: int) -> Received:
    if scene.exchange.uneven and draw.below(2):
        return _embedded(draw, scene, rows)
    return (_gathered if draw.below(2) else _apart)(scene, rows, rank)


def _embedded(draw: Draw, scene: Scene, rows: list[bytes]) -> Received:
    """As inside an allreduce, whose numbers may be damaged, too."""
    size, ranks = scene.frame.size, len(rows)
    slots = [np.frombuffer(row[:size].ljust(size, b"\0"), np.uint8) for row in rows]
    buffers = [embed(slot, rank, ranks) for rank, slot in enumerate(slots)]
    reduced = np.sum(buffers, axis=0) / np.float32(ranks)
    for _ in range(draw.below(4)):
        number = np.frombuffer(draw.take(4), np.float32)
        reduced[draw.below(reduced.size)] = number[0]
    try:
        parts, _ = extract(reduced, ranks)
    except PayloadError as error:
        raise PayloadError(f"t0: {error}") from None
    return Received(scene.frame, parts, uneven=True)


def _gathered(scene: Scene, rows: list[bytes], rank: int) -> Received:
    """As after an allgather whose sizes nobody knows."""
    padded = scene.path.exchange.size == 2
    if padded:
        rows = [row.ljust(padded_bytes(max(len(row), 24)), b"\0") for row in rows]
    row = ARRIVED.hold(b"".join(rows))
    parts = split(row, "t0", ranks=len(rows), padded=padded)
    return Received(scene.frame, parts, uneven=scene.exchange.uneven)


def _apart(scene: Scene, rows: list[bytes], rank: int) -> Received:
    """As where sizes are known beforehand."""
    parts = [np.frombuffer(bytearray(row), np.uint8) for row in rows]
    parts[rank] = ARRIVED.hold(rows[rank])
    return Received(scene.frame, parts, uneven=scene.exchange.uneven)


def _look_at(scene: Scene, received: Received) -> None:
    scene.exchange.received = received
    if scene.sums:
        _sum(scene, received)
        return
    for place, header in enumerate(scene.headers):
        for rank, payload in enumerate(received.payloads(place)):
            try:
                if payload is not None:
                    _check(decode(payload), header)
            except PayloadError as error:
                raise PayloadError(f"t{place}: rank {rank}: {error}") from None


def _check(selection: Any, header: Any) -> None:
    indices, values, _ = selection
    assert indices.size in (0, values.size)
    if indices.size:
        assert 0 <= indices[0] <= indices[-1] < header.n
        assert (np.diff(indices) > 0).all()


def _sum(scene: Scene, received: Received) -> None:
    """By a real path; what it hands back is what plain numpy makes of the same."""
    flights, outs = scene.flights(), [out.array for out in scene.outs]
    try:
        scene.path.receive(flights, outs)
    except PayloadError:
        assert all(flight.phase is Phase.FAILED for flight in flights)
        raise
    for place, out in enumerate(outs):
        there = [each for each in received.payloads(place) if each is not None]
        if any(payload.nonfinite for payload in there):
            assert np.isnan(out.astype(np.float64)).all()
            continue
        expected = np.empty_like(out)
        entries = [_entries(payload) for payload in there]
        with np.errstate(all="ignore"):
            reference.aggregate(expected, entries, scene.path.plan.scale)
        np.testing.assert_array_equal(out, expected)


def _entries(payload: Payload) -> tuple[np.ndarray, np.ndarray]:
    indices, values, _ = decode(payload)
    if payload.header.form.indices == KnownIndices():
        indices = known_indices(payload.header)
    return indices, values
