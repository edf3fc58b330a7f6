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

One alone takes 32 bytes beside its entries, 161 of them 192.
"""

from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate
from struct import Struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.contracts import Array, Located, PayloadError, RaisedError
from hvd_sparse.core.payload import Header, Payload, Raised, entry_bytes
from hvd_sparse.kernels.host import address

Bytes = npt.NDArray[np.uint8]
Named = tuple[str, Payload | Raised]

VERSION = 2
HEAD_BYTES = 24
MARK_BYTES = 1  # of each tensor

_MAGIC = b"HVSP"
_HEAD = Struct("<4sBBHIIQ")
_RAISED = 2
_NONFINITE = 128
_MARK = 127
_STEPS = 1 << 32
_MOST_TOLD = 65535  # tensors
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
        self.marks = np.array([digest & _MARK for digest in digests], np.uint8)
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
        sizes = [entry_bytes(h.form, h.dtype, k) for h, k in pairs]
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
        count = min(len(sent), _MOST_TOLD)
        step, words = self.step % _STEPS, self.size // 8
        _HEAD.pack_into(
            out.data, 0, _MAGIC, VERSION, 0, count, words, step, self.digest
        )
        marks = marks_of(self.headers, layout)
        nonfinite = [payload.nonfinite for payload in sent]
        if True in nonfinite:
            marks = marks | np.where(nonfinite, _NONFINITE, 0).astype(np.uint8)
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


class _Row(NamedTuple):
    """The frame of one rank, where it agrees; of each tensor."""

    data: Bytes
    ahead: int  # steps
    ks: list[int]
    nonfinite: list[bool]
    starts: list[int]
    shares: list[int]


class Received:
    """What all ranks sent of the tensors of a frame, once it agrees."""

    def __init__(
        self, frame: Frame, parts: Sequence[Bytes], *, uneven: bool = False
    ) -> None:
        """Look at all of it.

        Args:
            frame: this rank's.
            parts: the frames of all ranks, rank 0 first, at addresses that are
                multiples of 8; empty where there is none.
            uneven: ranks may have missed steps of their peers.

        Raises:
            RaisedError: a rank raised, and the text has what.
            PayloadError: a rank disagrees; names tensor, rank, expected and found.
        """
        self._frame = frame
        self._uneven = uneven
        if not frame.headers:  # this rank raised: the step fails in any case
            raise RaisedError(f"{frame.names[0]}: this rank raised")
        expected = frame.expected
        self._rows = [self._row(*row, expected) for row in enumerate(parts)]

    def payloads(self, place: int) -> list[Payload | None]:
        """Of one tensor, of all ranks; None of one that was missing."""
        return [None if r is None else self._payload(r, place) for r in self._rows]

    def _payload(self, row: _Row, place: int) -> Payload:
        header = self._frame.headers[place]
        if row.ahead:
            header = header._replace(step=header.step + row.ahead)
        entries = row.data[row.starts[place] : row.starts[place + 1]]
        rest = row.ks[place], row.nonfinite[place], entries, row.shares[place]
        return Payload(header, *rest)

    def locate(self, places: Sequence[int]) -> Located | None:
        """Where their entries lie; None where ranks differ in more than these."""
        layout = self._frame.layout
        rows = [row for row in self._rows if row and row.starts is layout.starts]
        if len(rows) < len(self._rows):
            return None
        if any(row.nonfinite is not layout.finite for row in rows):
            return None
        bases = np.array([address(row.data) for row in rows])
        shares = [layout.shares[place] for place in places]
        return Located(bases[:, None] + layout.offsets[places], shares)

    # -------------------------------------------------------------- does it agree?

    def _row(self, rank: int, data: Bytes, expected: bytes) -> _Row | None:
        if not data.size and self._uneven:
            return None
        frame, lay = self._frame, self._frame.layout
        same = expected and data.size == frame.size
        if same and data[: len(expected)].tobytes() == expected:
            return _Row(data, 0, lay.ks, lay.finite, lay.starts, lay.shares)
        return self._look(rank, data)

    def _look(self, rank: int, data: Bytes) -> _Row:
        frame, layout = self._frame, self._frame.layout
        head = read_head(data, f"{frame.names[0]}: rank {rank}")
        headers, ahead = self._at_its_step(head.step)
        self._check_count(rank, head)
        marks = data[HEAD_BYTES : layout.marks_end]
        self._check_marks(rank, marks, head, headers)
        ks = self._numbers(rank, data)
        starts, shares = layout.starts, layout.shares
        if layout.varying:
            starts, shares = layout.place(headers, ks)
        if data.size != starts[-1]:
            raise self._error(
                rank, 0, f"frame of {data.size} bytes, expected {starts[-1]}"
            )
        nonfinite = (marks > _MARK).tolist()
        if True not in nonfinite:
            nonfinite = layout.finite
        return _Row(data, ahead, ks, nonfinite, starts, shares)

    def _at_its_step(self, step: int) -> tuple[list[Header], int]:
        """Headers as that rank has them, and how far it is ahead."""
        headers, own = self._frame.headers, self._frame.step
        if not self._uneven:
            return headers, 0
        ahead = (step - own + _STEPS // 2) % _STEPS - _STEPS // 2
        return [h._replace(step=h.step + ahead) for h in headers], ahead

    def _check_count(self, rank: int, head: Head) -> None:
        expected = min(len(self._frame.headers), _MOST_TOLD)
        if head.tensors != expected:
            text = (
                f"{head.tensors} payloads came of those that travel together, expected "
                f"{expected}; is one of these parameters frozen on some ranks only?"
            )
            raise self._error(rank, 0, text)

    def _check_marks(
        self, rank: int, marks: Bytes, head: Head, headers: Sequence[Header]
    ) -> None:
        layout = self._frame.layout
        if marks.size < len(headers):
            text = f"frame of {HEAD_BYTES + marks.size} bytes, expected at least "
            raise self._error(rank, 0, f"{text}{layout.marks_end}")
        own = marks_of(headers, layout)
        [differing] = np.nonzero((marks & _MARK) != own)
        step, digest = agreed(headers, layout)
        if differing.size or (head.step, head.digest) != (step % _STEPS, digest):
            place = int(differing[0]) if differing.size else 0
            # one of 128 tensors that differ has the right mark all the same
            known = differing.size or len(headers) == 1
            among = "" if known else f"or another of {len(headers)}: "
            text = _difference(head, headers[place], step, digest)
            text = text or f"mark {marks[place] & _MARK}, expected {own[place]}"
            raise self._error(rank, place, f"{among}{text}")

    def _numbers(self, rank: int, data: Bytes) -> list[int]:
        layout = self._frame.layout
        if not layout.varying:
            return layout.ks
        end = layout.numbers_at + 4 * len(layout.varying)
        if data.size < end:
            text = f"frame of {data.size} bytes, expected at least {end}"
            raise self._error(rank, 0, text)
        ks = list(layout.ks)
        found = data[layout.numbers_at : end].view("<i4").tolist()
        for place, k in zip(layout.varying, found, strict=True):
            if not 0 <= k <= ks[place]:
                raise self._error(rank, place, f"k {k}, expected 0 to {ks[place]}")
            ks[place] = k
        return ks

    def _error(self, rank: int, place: int, text: str) -> PayloadError:
        return PayloadError(f"{self._frame.names[place]}: rank {rank}: {text}")


def _difference(head: Head, own: Header, step: int, digest: int) -> str:
    if head.digest == digest:
        told = f"step {head.step}, expected {step % _STEPS}"
        return told if head.step != step % _STEPS else ""
    return (
        f"digest {head.digest}, expected {digest}: shape, dtype, step or configuration "
        f"differ, here {own.k} of {own.n} elements, {own.dtype}, step {own.step}"
    )


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
    steps = np.array([header.step & _MARK for header in headers], np.uint8)
    marks: Array = (layout.marks + steps) & _MARK
    return marks


def read_head(data: Bytes, where: str) -> Head:
    """The beginning of the frame of a rank.

    Raises:
        RaisedError: the rank raised.
        PayloadError: these are not bytes of a frame of this version.
    """
    head = _unpack(data, where)
    if head.flags == _RAISED:
        text = data[HEAD_BYTES : head.words * 8].tobytes().rstrip(b"\0")
        told = text.decode(errors="replace") or "an error"
        raise RaisedError(f"{where}: raised {told}")
    if head.flags:
        raise PayloadError(f"{where}: flags {head.flags}, expected 0")
    return head


def _unpack(data: Bytes, where: str) -> Head:
    if data.size < HEAD_BYTES:
        raise PayloadError(
            f"{where}: frame of {data.size} bytes, expected at least {HEAD_BYTES}"
        )
    head = Head(*_HEAD.unpack_from(data.data))
    if (head.magic, head.version) != (_MAGIC, VERSION):
        raise PayloadError(
            f"{where}: format {head.magic!r} version {head.version}, expected "
            f"{_MAGIC!r} version {VERSION}: do ranks run different releases?"
        )
    return head


def split(row: Bytes, name: str, *, ranks: int, padded: bool) -> list[Bytes]:
    """The frames that follow each other in what ranks gathered, rank 0 first.

    Args:
        row: at an address that is a multiple of 8.
        name: of the first tensor, for errors.
        ranks: how many sent one.
        padded: each takes `padded_bytes` of its size.

    Raises:
        PayloadError: these are not whole frames of so many ranks.
    """
    frames: list[Bytes] = []
    start = 0
    while start < row.size:
        head = _unpack(row[start:], f"{name}: rank {len(frames)}")
        size = max(head.words * 8, HEAD_BYTES)
        frames.append(row[start : start + size])
        start += padded_bytes(size) if padded else size
    if start != row.size or len(frames) != ranks:
        found = f"{len(frames)} frames in {row.size} bytes"
        raise PayloadError(
            f"{name}: {found}, expected {ranks}, of {start} bytes: has a rank sent "
            "nothing?"
        )
    return frames


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
    _HEAD.pack_into(out.data, 0, _MAGIC, VERSION, _RAISED, 0, out.size // 8, 0, 0)
    out[HEAD_BYTES : HEAD_BYTES + end] = np.frombuffer(text[:end], np.uint8)
    return out


def frame_bytes(headers: Sequence[Header]) -> int:
    """Of a frame of these tensors, whose numbers do not vary."""
    return layout_of(headers).starts[-1]


def _hash(text: bytes) -> int:
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
