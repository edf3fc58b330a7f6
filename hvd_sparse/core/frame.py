"""Frames: the bytes of all tensors of a rank that travel together, under one header.

Ranks agree once a frame; a tensor takes one byte beside its entries, four more where
ranks choose how many these are. Version 2, little-endian:

    offset  bytes
    0       4      magic, b"HVSP"
    4       1      version
    5       1      flags: bit 1, this rank raised, and after the header is text that
                   says what, and nothing else
    6       2      T, tensors in the frame; 65,535 if there are more
    8       4      size of the frame, in words of 8 bytes
    12      4      step: completed exchanges, modulo 2**32; the most of any tensor
    16      8      digest of the tensors: name, shape, configuration, and whose step is
                   another
    24      T      marks: bit 7, this rank met elements that were not finite; the other
                   bits tell which tensor it is that ranks disagree about
    ...            where ranks choose how many entries they send: zeros up to a
                   multiple of 4, and that number, int32, of each such tensor
    ...            zeros up to a multiple of 8, and the entries of each, filled up to a
                   multiple of 8

One alone takes 32 bytes beside its entries, 161 of them 192. Frames of peers are read
in `hvd_sparse.core.received`.
"""

from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate
from struct import Struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.contracts import Array
from hvd_sparse.core.payload import Header, Payload, Raised, entry_bytes

Bytes = npt.NDArray[np.uint8]
Named = tuple[str, Payload | Raised]

VERSION = 2
HEAD_BYTES = 24
MARK_BYTES = 1  # of each tensor

# bits and fields of the table above
MAGIC = b"HVSP"
HEAD_FORMAT = Struct("<4sBBHIIQ")
RAISED = 2  # of the flags
NONFINITE = 128  # of a mark
MARK = 127  # its other bits
STEPS = 1 << 32  # after which they begin anew
MOST_TOLD = 65535  # tensors
_REASON_BYTES = 400  # the most that is told of an error
_MOST_PLACES = 1 << 16  # tensors in all layouts that are remembered, 120 bytes each


class Head(NamedTuple):
    """The fixed part of a frame, as the table above has it."""

    magic: bytes
    version: int
    flags: int
    tensors: int
    words: int
    step: int
    digest: int


class Layout:
    """Where all is in a frame of these tensors, whatever their steps."""

    def __init__(self, headers: Sequence[Header]) -> None:
        """In the order in which they travel."""
        digests = [header.digest for header in headers]
        text = b"".join(digest.to_bytes(8, "little") for digest in digests)
        self.digest = _hash(text)
        self.marks = np.array([digest & MARK for digest in digests], np.uint8)
        self.marks_end = HEAD_BYTES + len(headers)
        self.varying = [place for place, h in enumerate(headers) if h.varies]
        self.numbers_at = _up(self.marks_end, 4) if self.varying else self.marks_end
        self.entries_at = _up(self.numbers_at + 4 * len(self.varying), 8)
        self.ks = [header.k for header in headers]
        self.finite = [False] * len(headers)
        self.starts, self.shares = self.place(headers, self.ks)
        self.offsets = np.array(self.starts[:-1], np.int64)

    def place(
        self, headers: Sequence[Header], ks: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Where the entries of each begin, and the frame ends; bytes that each takes.

        What belongs to no tensor counts with the first.
        """
        pairs = zip(headers, ks, strict=True)
        sizes = [entry_bytes(h.form, h.dtype, h.n, k) for h, k in pairs]
        shares = [
            s + MARK_BYTES + 4 * h.varies for s, h in zip(sizes, headers, strict=True)
        ]
        starts = list(accumulate(sizes, initial=self.entries_at))
        shares[0] += starts[-1] - sum(shares)
        return starts, shares


_layouts: dict[tuple[int, ...], Layout] = {}


def layout_of(headers: Sequence[Header]) -> Layout:
    """Most often the same tensors travel together in every step."""
    digests = tuple([header.digest for header in headers])
    found = _layouts.get(digests)
    if found is None:
        if sum(map(len, _layouts)) + len(digests) > _MOST_PLACES:
            _layouts.clear()  # gradients come and go
        found = _layouts[digests] = Layout(headers)
    return found


class Frame:
    """What this rank sends of tensors that travel together.

    Attributes:
        names: of the tensors, in the order in which they travel.
        headers: what this rank knows of them; none where it raised.
        size: bytes of the frame, a multiple of 8.
    """

    def __init__(self, payloads: Sequence[Named]) -> None:
        """At least one; where this rank raised instead of one, none of them leaves."""
        self.names = [name for name, _ in payloads]
        self.headers: list[Header] = []
        raised = [sent for _, sent in payloads if isinstance(sent, Raised)]
        if raised:
            self._parts = [_told(raised[0])]
            self.size = self._parts[0].size
            return
        sent = [own for _, own in payloads if isinstance(own, Payload)]
        self.headers = [payload.header for payload in sent]
        self.layout = layout_of(self.headers)
        entries = [payload.entries for payload in sent]
        self.size = self.layout.entries_at + sum([part.size for part in entries])
        self._clean = not (self.layout.varying or any(p.nonfinite for p in sent))
        self._parts = [self._beginning(sent), *entries]

    def _beginning(self, sent: Sequence[Payload]) -> Bytes:
        """All before the entries."""
        layout = self.layout
        out = np.zeros(layout.entries_at, np.uint8)
        self.step, self.digest = agreed(self.headers, layout)
        count, words = min(len(sent), MOST_TOLD), self.size // 8
        head = MAGIC, VERSION, 0, count, words, self.step % STEPS, self.digest
        HEAD_FORMAT.pack_into(out.data, 0, *head)
        nonfinite = [NONFINITE * payload.nonfinite for payload in sent]
        marks = marks_of(self.headers, layout) | np.array(nonfinite, np.uint8)
        out[HEAD_BYTES : layout.marks_end] = marks
        if layout.varying:
            ks = np.array([sent[place].k for place in layout.varying], "<i4")
            end = layout.numbers_at + ks.nbytes
            out[layout.numbers_at : end] = ks.view(np.uint8)
        return out

    @property
    def expected(self) -> bytes:
        """How frames begin that need no closer look; nothing where all of them do."""
        return self._parts[0].tobytes() if self._clean else b""

    def write(self, out: Bytes) -> None:
        """Overwrites out, (size,)."""
        np.concatenate(self._parts, out=out)

    def bytes(self, room: int | None = None) -> Bytes:
        """(size,) or, filled up with zeros, (room,) uint8."""
        out = np.empty(self.size if room is None else room, np.uint8)
        self.write(out[: self.size])
        out[self.size :] = 0
        return out


def agreed(headers: Sequence[Header], layout: Layout) -> tuple[int, int]:
    """The step of a frame, and the digest: both the same on every rank."""
    steps = [header.step for header in headers]
    step = max(steps)
    if min(steps) == step:
        return step, layout.digest
    behind = np.array([step - own for own in steps], "<i8").tobytes()
    return step, _hash(layout.digest.to_bytes(8, "little") + behind)


def marks_of(headers: Sequence[Header], layout: Layout) -> Array:
    """(T,) uint8: seven bits of what ranks agree on for each tensor."""
    steps = np.array([header.step & MARK for header in headers], np.uint8)
    marks: Array = (layout.marks + steps) & MARK
    return marks


def padded_bytes(size: int) -> int:
    """The next size of a geometric grid of factor 1.25, a multiple of 8.

    Where ranks choose k themselves, sizes on a grid repeat from step to step, which
    keeps a collective's cached plan alive at the price of 12 % more bytes on average.
    """
    grid = 64
    while grid < size:
        grid = -(-grid * 5 // 32) * 8
    return grid


def _told(raised: Raised) -> Bytes:
    """The frame of a rank that raised."""
    error, size = raised.error, raised.frame_bytes
    text = f"{type(error).__name__}: {error}".encode(errors="replace")
    room = _REASON_BYTES if size is None else size - HEAD_BYTES
    end = min(len(text), room)
    while 0 < end < len(text) and text[end] & 0xC0 == 0x80:  # in the midst of a letter
        end -= 1
    out = np.zeros(_up(HEAD_BYTES + end, 8) if size is None else size, np.uint8)
    HEAD_FORMAT.pack_into(out.data, 0, MAGIC, VERSION, RAISED, 0, out.size // 8, 0, 0)
    out[HEAD_BYTES : HEAD_BYTES + end] = np.frombuffer(text[:end], np.uint8)
    return out


def frame_bytes(headers: Sequence[Header]) -> int:
    """Of a frame of these tensors, whose numbers do not vary."""
    return layout_of(headers).starts[-1]


def _hash(text: bytes) -> int:
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
