"""Damage: what may become of the bytes of one rank, as the bytes of a fuzzer say."""

import struct
from collections.abc import Callable

from scenes import SCENES, Scene, scene_of

from hvd_sparse.core.frame import HEAD_BYTES, Frame, layout_of
from hvd_sparse.core.payload import Raised, entry_bytes


class Draw:
    """Numbers from the bytes of a fuzzer: 0 once these have run out."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        """So many bytes, filled up with zeros."""
        found = self._data[self._at : self._at + count]
        self._at += count
        return found.ljust(count, b"\0")

    def below(self, count: int) -> int:
        """In [0, count); 0 if that is empty."""
        if count < 2:
            return 0
        size = 1 + (count > 1 << 8) + 2 * (count > 1 << 16)
        return int.from_bytes(self.take(size), "little") % count


Damage = Callable[[Draw, Scene, bytearray], bytes | bytearray]


def _truncate(draw: Draw, scene: Scene, row: bytearray) -> bytearray:
    return row[: draw.below(len(row) + 1)]


def _extend(draw: Draw, scene: Scene, row: bytearray) -> bytearray:
    return row + draw.take(1 + draw.below(40))


def _flip(draw: Draw, scene: Scene, row: bytearray) -> bytearray:
    for _ in range(1 + draw.below(8)):
        bit = draw.below(8 * len(row))
        row[bit // 8] ^= 1 << bit % 8
    return row


def _overwrite(draw: Draw, scene: Scene, row: bytearray, start: int = 0) -> bytearray:
    at = start + draw.below(len(row) - start)
    taken = draw.take(min(1 + draw.below(32), len(row) - at))
    row[at : at + len(taken)] = taken
    return row


def _overwrite_entries(draw: Draw, scene: Scene, row: bytearray) -> bytearray:
    start = layout_of(scene.headers).entries_at
    return _overwrite(draw, scene, row, start) if start < len(row) else row


def _fill_entries(draw: Draw, scene: Scene, row: bytearray) -> bytearray:
    """All 0 or all 1: so are the high parts of Elias-Fano indices then."""
    start = min(layout_of(scene.headers).entries_at, len(row))
    start += draw.below(len(row) - start)
    end = start + draw.below(len(row) - start + 1)
    row[start:end] = (b"\0", b"\xff", b"\x7f", b"\x80")[draw.below(4)] * (end - start)
    return row


def _swap(draw: Draw, scene: Scene, row: bytearray) -> bytearray:
    size = 1 + draw.below(len(row) // 2)
    one, other = (draw.below(len(row) - size + 1) for _ in range(2))
    row[one : one + size], row[other : other + size] = (
        row[other : other + size],
        row[one : one + size],
    )
    return row


def _foreign(draw: Draw, scene: Scene, row: bytearray) -> bytearray:
    return bytearray(scene.foreign[draw.below(len(scene.foreign))])


def _of_another_scene(draw: Draw, scene: Scene, row: bytearray) -> bytearray:
    rows = scene_of(draw.below(SCENES) % 64).rows
    return bytearray(rows[draw.below(len(rows))])


def _other_numbers(draw: Draw, scene: Scene, row: bytearray) -> bytearray:
    """Another k where ranks choose, and as many bytes as that takes."""
    layout = layout_of(scene.headers)
    if not layout.varying or len(row) < layout.entries_at:
        return _overwrite_entries(draw, scene, row)
    ks = list(layout.ks)
    for i, place in enumerate(layout.varying):
        ks[place] = draw.below(ks[place] + 1)
        struct.pack_into("<i", row, layout.numbers_at + 4 * i, ks[place])
    pairs = zip(scene.headers, ks, strict=True)
    size = sum(entry_bytes(h.form, h.dtype, h.n, k) for h, k in pairs)
    return row[: layout.entries_at + size].ljust(layout.entries_at + size, b"\xff")


def _header(draw: Draw, scene: Scene, row: bytearray) -> bytearray:
    at = draw.below(HEAD_BYTES)
    taken = draw.take(1 + draw.below(8))[: len(row) - at]
    row[at : at + len(taken)] = taken
    return row


def _nothing(draw: Draw, scene: Scene, row: bytearray) -> bytearray:
    return row[:0]


def _anything(draw: Draw, scene: Scene, row: bytearray) -> bytearray:
    return bytearray(draw.take(draw.below(200)))


def _raised(draw: Draw, scene: Scene, row: bytearray) -> bytearray:
    text = draw.take(draw.below(60)).decode(errors="replace")
    return bytearray(Frame([("t0", Raised(ValueError(text)))]).bytes().tobytes())


DAMAGES: tuple[Damage, ...] = (
    _overwrite_entries,
    _overwrite_entries,
    _fill_entries,
    _fill_entries,
    _flip,
    _flip,
    _other_numbers,
    _swap,
    _foreign,
    _truncate,
    _extend,
    _header,
    _overwrite,
    _of_another_scene,
    _nothing,
    _anything,
    _raised,
)


def damaged(draw: Draw, scene: Scene, row: bytes) -> bytes:
    """One to three damages, one after the other; its size may then be told rightly."""
    found = bytearray(row)
    for _ in range(1 + draw.below(3)):
        damage = DAMAGES[draw.below(len(DAMAGES))]
        found = bytearray(damage(draw, scene, found)) if found else found
    if draw.below(2) and len(found) >= 12:
        struct.pack_into("<I", found, 8, len(found) // 8)
    return bytes(found)
