"""Encode: what bytes go on the wire: a header, and entries as their format has them.

One payload a tensor, and each describes itself. Version 1, little-endian:

    offset  bytes
    0       4      magic, b"HVSP"
    4       1      version
    5       1      layout: of the entries, see `hvd_sparse.core.formats`
    6       1      dtype of the gradient: 1 float16, 2 bfloat16, 3 float32, 4 float64
    7       1      flags: bit 0, this rank met elements that were not finite; bit 1, it
                   raised, and after the header are k bytes of text that say what
    8       4      n, elements of the gradient
    12      4      k, elements in this payload
    16      8      step, completed exchanges of this tensor
    24      8      digest of name, shape and configuration
    32      ...    entries: values, float32, or float64 for a float64 gradient, and
                   indices, int32, ascending; as many bytes as the format says for k
    ...            zeros up to a multiple of 8, so that payloads can follow each other
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.contracts import (
    Array,
    Format,
    PayloadError,
    RaisedError,
    Selection,
)
from hvd_sparse.core.formats import FORMATS, Float32
from hvd_sparse.kernels.host import address

Bytes = npt.NDArray[np.uint8]

VERSION = 1
DTYPES = {"float16": 1, "bfloat16": 2, "float32": 3, "float64": 4}
HEADER_BYTES = 32

_MAGIC = b"HVSP"
_HEADER = Struct("<4sBBBBiiqQ")
_NONFINITE = 1
_RAISED = 2
_REASON_BYTES = 400  # the most that is told of an error
_FLAGS_AT = 7
_STEP_AT = 16
_HEADER_AT = np.arange(HEADER_BYTES)
_DTYPE_OF = {code: dtype for dtype, code in DTYPES.items()}


class Header(NamedTuple):
    """What every rank must agree on before it believes a payload.

    Attributes:
        layout: that of a format, in `hvd_sparse.core.formats`.
        dtype: the gradient's: a key of DTYPES, on the wire its value.
        n: elements of the gradient.
        k: elements of the payload; the most there may be where ranks choose their own.
        step: completed exchanges of this tensor.
        digest: 64 bits over name, shape and configuration.
    """

    layout: int
    dtype: str | int
    n: int
    k: int
    step: int
    digest: int

    @property
    def payload_bytes(self) -> int:
        """Of a payload that it is the header of."""
        return int(payload_bytes(FORMATS[self.layout], str(self.dtype), self.k))

    @property
    def wide(self) -> str:
        """Dtype of residual, values and sums of a gradient of this dtype."""
        return "float64" if self.dtype in ("float64", DTYPES["float64"]) else "float32"


def payload_bytes(form: Format, dtype: str, k: Any) -> Any:
    """Bytes of a payload of k elements, header and padding included.

    Args:
        form: of the entries.
        dtype: the gradient's.
        k: a number, or an array of them, for each of which to answer.
    """
    return HEADER_BYTES + -(-form.bytes(k, dtype) // 8) * 8


def most_elements(form: Format, dtype: str, size: Any) -> Any:
    """The largest k whose payload has at most size bytes; negative if none has."""
    return form.most(size // 8 * 8 - HEADER_BYTES, dtype)


def encode(
    selection: Selection, header: Header, out: Bytes | None = None
) -> tuple[Bytes, Array]:
    """The payload of a selection, and the values a receiver will read from it.

    It is written into out where that has the right size: fresh memory is slower.

    `sent` is selection.values itself where the format does not round them. header.k is
    replaced by what was really selected.
    """
    indices, values = _on_host(selection.indices), _on_host(selection.values)
    form, dtype, k = FORMATS[header.layout], str(header.dtype), values.shape[0]
    size, end = payload_bytes(form, dtype, k), HEADER_BYTES + form.bytes(k, dtype)
    if out is None or out.size != size:
        out = np.empty(size, np.uint8)
    flags = _NONFINITE if selection.nonfinite else 0
    fields = (_MAGIC, VERSION, header.layout, DTYPES[dtype], flags, header.n, k)
    _HEADER.pack_into(out.data, 0, *fields, header.step, header.digest)
    sent = form.write(out[HEADER_BYTES:end], indices, values)
    if end < size:
        out[end:] = 0
    return out, selection.values if sent is values else _like(sent, selection.values)


def encode_error(error: BaseException, size: int | None = None) -> Bytes:
    """What leaves in place of a payload: this rank raised.

    Args:
        error: what to tell the peers, who may get the beginning of its text.
        size: bytes that it must have, where all ranks send as many; at least 32.
    """
    text = f"{type(error).__name__}: {error}".encode(errors="replace")
    room = _REASON_BYTES if size is None else size - HEADER_BYTES
    k = min(len(text), room)
    while 0 < k < len(text) and text[k] & 0xC0 == 0x80:  # in the middle of a letter
        k -= 1
    out = np.zeros(_error_bytes(k) if size is None else size, np.uint8)
    fields = (_MAGIC, VERSION, Float32.layout, DTYPES["float32"], _RAISED, 0, k, 0, 0)
    _HEADER.pack_into(out.data, 0, *fields)
    out[HEADER_BYTES : HEADER_BYTES + k] = np.frombuffer(text[:k], np.uint8)
    return out


def _error_bytes(k: int) -> int:
    """Bytes of such a payload with a text of k bytes."""
    return HEADER_BYTES + -(-k // 8) * 8


def _raised(buffer: Bytes, k: int) -> RaisedError:
    """What its rank tells of an error."""
    text = buffer[HEADER_BYTES : HEADER_BYTES + max(k, 0)].tobytes()
    return RaisedError(f"raised {text.decode(errors='replace') or 'an error'}")


def decode(buffer: Bytes, expected: Header, *, varies: bool = False) -> Selection:
    """The selection in a payload, once the header agrees.

    As views of its bytes where the format does not pack them.

    Args:
        buffer: one payload, at an address that is a multiple of 8.
        expected: what this rank sent itself.
        varies: ranks choose k themselves, up to expected.k.

    Returns:
        A selection; its indices are empty where every rank knows them.

    Raises:
        PayloadError: the header disagrees, and the text has field, expected and found;
            or its rank raised, and the text has what.
    """
    if buffer[:HEADER_BYTES].tobytes() == _packed(expected):  # all but always
        return _entries(buffer, expected, expected.k, 0)
    if buffer.size < HEADER_BYTES:
        raise PayloadError(f"payload of {buffer.size} bytes, expected at least 32")
    fields = _HEADER.unpack_from(buffer.data)
    magic, version, layout, code, flags, n, k, step, digest = fields
    if (magic, version) != (_MAGIC, VERSION):
        raise PayloadError(
            f"format {magic!r} version {version}, expected {_MAGIC!r} version {VERSION}"
        )
    if flags == _RAISED:
        raise _raised(buffer, k)
    if flags & ~_NONFINITE:
        raise PayloadError(f"flags {flags}, expected 0 or {_NONFINITE}")
    found = Header(layout, code, n, k, step, digest)
    wanted = expected._replace(dtype=DTYPES[str(expected.dtype)])
    if varies and 0 <= k <= expected.k:
        wanted = wanted._replace(k=k)
    if found != wanted:
        raise PayloadError(_disagreement(found, wanted))
    return _entries(buffer, expected, k, flags & _NONFINITE)


def _entries(buffer: Bytes, expected: Header, k: int, nonfinite: int) -> Selection:
    """What follows the header."""
    form, dtype = FORMATS[expected.layout], str(expected.dtype)
    size = payload_bytes(form, dtype, k)
    if buffer.size != size:
        raise PayloadError(
            f"payload of {buffer.size} bytes, expected {size} for k = {k}"
        )
    end = HEADER_BYTES + form.bytes(k, dtype)
    indices, values = form.read(buffer[HEADER_BYTES:end], k, dtype)
    return Selection(indices, values, nonfinite)


@lru_cache(maxsize=4096)
def _packed(header: Header) -> bytes:
    """The bytes of a header without flags."""
    layout, dtype, n, k, step, digest = header
    code = DTYPES[str(dtype)]
    return _HEADER.pack(_MAGIC, VERSION, layout, code, 0, n, k, step, digest)


class Message:
    """Payloads whose entries are plain arrays; all but their steps stays the same."""

    def __init__(self, headers: Sequence[Header]) -> None:
        """Of these tensors, in this order; the steps of the headers do not matter."""
        forms = [(FORMATS[h.layout], str(h.dtype), h.k) for h in headers]
        # (payloads,) bytes
        self.sizes = np.array([payload_bytes(*form) for form in forms])
        # (payloads, 3) int64: where indices and values begin in a payload, and k
        self._places = np.array([_places(*form) for form in forms])
        self._bounds = np.concatenate([[0], np.cumsum(self.sizes)])
        packed = bytearray(b"".join(map(_packed, headers)))
        self._headers = np.frombuffer(packed, np.uint8).reshape(-1, HEADER_BYTES)
        self._steps = self._headers[:, _STEP_AT : _STEP_AT + 8].view("<i8")[:, 0]

    def lay_out(self, steps: Sequence[int]) -> tuple[list[Bytes], Array]:
        """The payloads without their entries.

        Args:
            steps: completed exchanges of each tensor.

        Returns:
            payloads: side by side in fresh memory.
            table: (payloads, 3) int64: where to write indices and values, as addresses,
                and k.
        """
        buffer = np.zeros(self._bounds[-1], np.uint8)
        self._steps[:] = steps
        buffer[self._bounds[:-1, None] + _HEADER_AT] = self._headers
        table = self._places.copy()
        table[:, :2] += (self._bounds[:-1] + address(buffer))[:, None]
        ends = self._bounds.tolist()
        return [buffer[i:j] for i, j in pairwise(ends)], table

    def find_entries(
        self, buffer: Bytes, starts: Array, steps: Sequence[int]
    ) -> Array | None:
        """Where the entries lie in what all ranks sent.

        Args:
            buffer: at an address that is a multiple of 8.
            starts: (ranks, payloads) int64: where each begins, with all its `sizes`.
            steps: as for `lay_out`.

        Returns:
            (payloads, ranks, 3) int64: addresses of indices and of values, and k. None
            unless every header is just as expected: `decode` says what is the matter.
        """
        self._steps[:] = steps
        if not (buffer[starts[..., None] + _HEADER_AT] == self._headers).all():
            return None
        table = np.repeat(self._places[:, None], len(starts), axis=1)
        table[..., :2] += (starts.T + address(buffer))[..., None]
        return table


def _places(form: Format, dtype: str, k: int) -> tuple[int, int, int]:
    offsets = form.offsets(k, dtype)
    assert offsets is not None, "only of plain entries"
    indices, values = offsets
    return HEADER_BYTES + indices, HEADER_BYTES + values, k


def mark_nonfinite(payload: Bytes) -> None:
    """This rank met elements that were not finite."""
    payload[_FLAGS_AT] |= _NONFINITE


def step_of(buffer: Bytes) -> int:
    """The step of a payload; 0 if it is too short to have one."""
    if buffer.size < HEADER_BYTES:
        return 0
    return int(_HEADER.unpack_from(buffer.data)[7])


def padded_bytes(size: int) -> int:
    """The next size of a geometric grid of factor 1.25, a multiple of 8.

    Where ranks choose k themselves, sizes on a grid repeat from step to step, which
    keeps a collective's cached plan alive at the price of 12 % more bytes on average.
    """
    grid = 64
    while grid < size:
        grid = -(-grid * 5 // 32) * 8
    return grid


def split(buffer: Bytes, *, each: int = 1, padded: bool) -> list[Bytes]:
    """The payloads that follow each other in what ranks gathered, rank 0 first.

    Args:
        buffer: at an address that is a multiple of 8.
        each: payloads of a rank.
        padded: together they take `padded_bytes` of their size.

    Raises:
        PayloadError: these are not whole payloads; the text has the rank.
    """
    payloads: list[Bytes] = []
    start = first = 0  # of this payload, and of its rank
    while start < buffer.size:
        size = _size_at(buffer, start, len(payloads) // each)
        payloads.append(buffer[start : start + size])
        start += size
        if len(payloads) % each == 0:
            start = first + padded_bytes(start - first) if padded else start
            first = start
    if start != buffer.size:
        raise PayloadError(
            f"rank {(len(payloads) - 1) // each}: payload of "
            f"{payloads[-1].size} bytes, expected "
            f"{start - buffer.size + payloads[-1].size}"
        )
    return payloads


def _size_at(buffer: Bytes, start: int, rank: int) -> int:
    """Bytes of the payload that begins there, as its header has it."""
    header = buffer.data[start : start + HEADER_BYTES]
    whole = len(header) == HEADER_BYTES
    fields: tuple[Any, ...] = _HEADER.unpack(header) if whole else (b"", *[0] * 8)
    magic, version, layout, code, flags, _, k, _, _ = fields
    if (magic, version) != (_MAGIC, VERSION) or k < 0:
        raise PayloadError(
            f"rank {rank}: format {magic!r} version {version}, "
            f"expected {_MAGIC!r} version {VERSION}"
        )
    if layout not in FORMATS:
        known = f"{min(FORMATS)} to {max(FORMATS)}"
        raise PayloadError(f"rank {rank}: layout {layout}, expected {known}")
    if flags == _RAISED:
        return _error_bytes(k)
    size: int = payload_bytes(FORMATS[layout], _DTYPE_OF.get(code, ""), k)
    return size


def _disagreement(found: Header, wanted: Header) -> str:
    return "; ".join(
        f"{field} {theirs}, expected {ours}"
        for field, theirs, ours in zip(Header._fields, found, wanted, strict=True)
        if theirs != ours
    )


def _on_host(array: Any) -> Any:
    """Payloads leave from host memory; k elements come over from an accelerator."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def _like(array: Any, other: Any) -> Any:
    """The array as the other is: on the host, or on an accelerator."""
    return array if isinstance(other, np.ndarray) else other.new_tensor(array)
