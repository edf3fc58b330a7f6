"""Decode: the frames of all ranks, if they agree: see `hvd_sparse.core.frame`."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hvd_sparse.core.contracts import Located, PayloadError, RaisedError
from hvd_sparse.core.frame import (
    HEAD_BYTES,
    HEAD_FORMAT,
    MAGIC,
    MARK,
    MOST_TOLD,
    RAISED,
    STEPS,
    VERSION,
    Bytes,
    Frame,
    Head,
    agreed,
    marks_of,
    padded_bytes,
)
from hvd_sparse.core.payload import Header, Payload
from hvd_sparse.kernels.host import address


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
        headers, ahead = self._at_its_step(rank, head.step)
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
        nonfinite = (marks > MARK).tolist()
        if True not in nonfinite:
            nonfinite = layout.finite
        return _Row(data, ahead, ks, nonfinite, starts, shares)

    def _at_its_step(self, rank: int, step: int) -> tuple[list[Header], int]:
        """Headers as that rank has them, and how far it is ahead."""
        headers, own = self._frame.headers, self._frame.step
        if not self._uneven:
            return headers, 0
        ahead = (step - own + STEPS // 2) % STEPS - STEPS // 2
        if own + ahead < 0:
            raise self._error(rank, 0, f"step {step}, expected about {own % STEPS}")
        return [h._replace(step=h.step + ahead) for h in headers], ahead

    def _check_count(self, rank: int, head: Head) -> None:
        expected = min(len(self._frame.headers), MOST_TOLD)
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
        [differing] = np.nonzero((marks & MARK) != own)
        step, digest = agreed(headers, layout)
        if differing.size or (head.step, head.digest) != (step % STEPS, digest):
            place = int(differing[0]) if differing.size else 0
            # one of 128 tensors that differ has the right mark all the same
            known = differing.size or len(headers) == 1
            among = "" if known else f"or another of {len(headers)}: "
            text = _difference(head, headers[place], step, digest)
            text = text or f"mark {marks[place] & MARK}, expected {own[place]}"
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
    if head.step != step % STEPS:  # which may be why the digest is another, too
        return f"step {head.step}, expected {step % STEPS}"
    if head.digest == digest:
        return ""
    shape, configuration = own.facts
    return (
        f"digest {head.digest}, expected {digest}: shape, dtype, step or configuration "
        f"differ; here step {own.step}, {own.k} elements of {shape} {own.dtype}, "
        f"{configuration}"
    )


def read_head(data: Bytes, where: str) -> Head:
    """The beginning of the frame of a rank.

    Raises:
        RaisedError: the rank raised.
        PayloadError: these are not bytes of a frame of this version.
    """
    head = _unpack(data, where)
    if head.flags == RAISED:
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
    head = Head(*HEAD_FORMAT.unpack_from(data.data))
    if (head.magic, head.version) != (MAGIC, VERSION):
        raise PayloadError(
            f"{where}: format {head.magic!r} version {head.version}, expected "
            f"{MAGIC!r} version {VERSION}: do ranks run different releases?"
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
    while start < row.size and len(frames) <= ranks:
        head = _unpack(row[start:], f"{name}: rank {len(frames)}")
        size = max(head.words * 8, HEAD_BYTES)
        frames.append(row[start : start + size])
        start += padded_bytes(size) if padded else size
    if start != row.size or len(frames) != ranks:
        more = " or more" if start < row.size else ""
        found = f"{len(frames)}{more} frames in {row.size} bytes"
        raise PayloadError(
            f"{name}: {found}, expected {ranks}, of {start} bytes: has a rank sent "
            "nothing?"
        )
    return frames
