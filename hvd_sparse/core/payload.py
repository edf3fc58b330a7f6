"""Encode: what bytes go on the wire. No other file knows the layout.

One payload a tensor, and each describes itself. Version 1, little-endian:

    offset  bytes
    0       4      magic, b"HVSP"
    4       1      version
    5       1      layout: 1 values and indices, 2 values only (all ranks know which),
                   3 one scale, indices and signs
    6       1      dtype of the gradient: 1 float16, 2 bfloat16, 3 float32, 4 float64
    7       1      flags: bit 0, this rank met elements that were not finite; bit 1, it
                   raised, and after the header are k bytes of text that say what
    8       4      n, elements of the gradient
    12      4      k, elements in this payload
    16      8      step, completed exchanges of this tensor
    24      8      digest of name, shape and configuration
    32      k v    values, float32 (v = 4), or float64 (v = 8) for a float64 gradient
    32+k v  4 k    indices, int32, ascending (layout 1)
    ...            zeros up to a multiple of 8, so that payloads can follow each other

Layout 3 has, from offset 32 on, the scale (v bytes) and k words of 4 bytes: bits 0-30
are an index, ascending, bit 31 is the sign. Every value is plus or minus the scale.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.contracts import Array, PayloadError, Selection
from hvd_sparse.kernels.host import address

Bytes = npt.NDArray[np.uint8]

VERSION = 1
INDEXED = 1
VALUES_ONLY = 2
SIGNS = 3
LAYOUTS = (INDEXED, VALUES_ONLY, SIGNS)
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
_INDEX: Any = np.dtype("<i4")
_VALUES: dict[int, Any] = {4: np.dtype("<f4"), 8: np.dtype("<f8")}
_SIGN = np.uint32(1 << 31)


class Header(NamedTuple):
    """What every rank must agree on before it believes a payload.

    Attributes:
        layout: INDEXED, VALUES_ONLY or SIGNS.
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
    def wide(self) -> str:
        """Dtype of residual, values and sums of a gradient of this dtype."""
        return "float64" if self.dtype in ("float64", DTYPES["float64"]) else "float32"


def value_bytes(dtype: str | int) -> int:
    """Bytes of one value on the wire for a gradient of this dtype."""
    return 8 if dtype in ("float64", DTYPES["float64"]) else 4


def entry_bytes(layout: int, dtype: str | int) -> int:
    """Bytes of one element on the wire: its value, its index, or both."""
    if layout == SIGNS:
        return 4
    return value_bytes(dtype) + (4 if layout == INDEXED else 0)


def _fixed_bytes(layout: int, dtype: str | int) -> int:
    """Bytes of a payload of no elements: the header and, in layout 3, the scale."""
    return HEADER_BYTES + (value_bytes(dtype) if layout == SIGNS else 0)


def payload_bytes(layout: int, dtype: str | int, k: int) -> int:
    """Bytes of a payload of k elements, header and padding included."""
    return -(-(_fixed_bytes(layout, dtype) + k * entry_bytes(layout, dtype)) // 8) * 8


def most_elements(layout: int, dtype: str | int, size: int) -> int:
    """The largest k whose payload has at most size bytes; negative if none has."""
    room = size // 8 * 8 - _fixed_bytes(layout, dtype)
    return room // entry_bytes(layout, dtype)


def encode(
    selection: Selection, header: Header, out: Bytes | None = None
) -> tuple[Bytes, Array]:
    """The payload of a selection, and the values a receiver will read from it.

    It is written into out where that has the right size: fresh memory is slower.

    Values travel unrounded in layouts 1 and 2, where `sent` is selection.values. In
    layout 3 they become plus or minus their mean magnitude. header.k is replaced by
    what was really selected.
    """
    indices, values = _on_host(selection.indices), _on_host(selection.values)
    k = values.shape[0]
    size = payload_bytes(header.layout, header.dtype, k)
    if out is None or out.size != size:
        out = np.empty(size, np.uint8)
    flags = _NONFINITE if selection.nonfinite else 0
    code = DTYPES[str(header.dtype)]
    fields = (_MAGIC, VERSION, header.layout, code, flags, header.n, k)
    _HEADER.pack_into(out.data, 0, *fields, header.step, header.digest)
    if header.layout == SIGNS:
        return out, _like(_write_signs(out, indices, values), selection.values)
    end = HEADER_BYTES + values.nbytes
    out[HEADER_BYTES:end] = values.view(np.uint8)
    if header.layout == INDEXED:
        out[end : end + 4 * k] = indices.view(np.uint8)
        end += 4 * k
    if end < size:
        out[end:] = 0
    return out, selection.values


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
    _HEADER.pack_into(out.data, 0, _MAGIC, VERSION, INDEXED, 3, _RAISED, 0, k, 0, 0)
    out[HEADER_BYTES : HEADER_BYTES + k] = np.frombuffer(text[:k], np.uint8)
    return out


def _error_bytes(k: int) -> int:
    """Bytes of such a payload with a text of k bytes."""
    return HEADER_BYTES + -(-k // 8) * 8


def _raised(buffer: Bytes, k: int) -> PayloadError:
    """What its rank tells of an error."""
    text = buffer[HEADER_BYTES : HEADER_BYTES + max(k, 0)].tobytes()
    return PayloadError(f"raised {text.decode(errors='replace') or 'an error'}")


def _write_signs(out: Bytes, indices: Array, values: Array) -> Array:
    """Overwrites what follows the header; returns the values a receiver will read."""
    scale = mean_magnitude(values)
    start = HEADER_BYTES + scale.nbytes
    end = start + 4 * indices.size
    out[HEADER_BYTES:start] = scale.view(np.uint8)
    words = out[start:end].view(np.uint32)
    words[:] = indices.view(np.uint32)
    words[np.signbit(values)] |= _SIGN
    out[end:] = 0
    return np.copysign(scale, values)


def mean_magnitude(values: Array) -> Array:
    """(1,) of the values' dtype: sum |v| / k, 0 of none; sums beyond range are fine."""
    magnitudes = np.abs(values).astype(np.float64)
    largest = float(magnitudes.max(initial=0.0))
    if largest == 0:
        return np.zeros(1, values.dtype)
    power = 2.0 ** np.frexp(largest)[1].clip(-1022, 1023)  # exact, but for subnormals
    return np.array([(magnitudes / power).mean() * power], values.dtype)


def decode(buffer: Bytes, expected: Header, *, varies: bool = False) -> Selection:
    """The selection in a payload, once the header agrees.

    In layouts 1 and 2 as views of its bytes.

    Args:
        buffer: one payload, at an address that is a multiple of 8.
        expected: what this rank sent itself.
        varies: ranks choose k themselves, up to expected.k.

    Returns:
        A selection; its indices are empty in layout 2, where every rank knows them.

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
    size = payload_bytes(expected.layout, expected.dtype, k)
    if buffer.size != size:
        raise PayloadError(
            f"payload of {buffer.size} bytes, expected {size} for k = {k}"
        )
    if expected.layout == SIGNS:
        return _read_signs(buffer, expected, k, nonfinite)
    wide = value_bytes(expected.dtype)
    end = HEADER_BYTES + k * wide
    values = buffer[HEADER_BYTES:end].view(_VALUES[wide])
    taken = 4 * k if expected.layout == INDEXED else 0
    return Selection(buffer[end : end + taken].view(_INDEX), values, nonfinite)


@lru_cache(maxsize=4096)
def _packed(header: Header) -> bytes:
    """The bytes of a header without flags."""
    layout, dtype, n, k, step, digest = header
    code = DTYPES[str(dtype)]
    return _HEADER.pack(_MAGIC, VERSION, layout, code, 0, n, k, step, digest)


class Message:
    """Payloads of layout 1; all but their steps is the same every time."""

    def __init__(self, headers: Sequence[Header]) -> None:
        """Of these tensors, in this order; the steps of the headers do not matter."""
        ks = np.array([header.k for header in headers])
        wide = np.array([value_bytes(header.dtype) for header in headers])
        self.sizes = HEADER_BYTES + -(-ks * (wide + 4) // 8) * 8  # (payloads,) bytes
        # (payloads, 3) int64: where indices and values begin in a payload, and k
        values = np.full_like(ks, HEADER_BYTES)
        self._places = np.stack([values + ks * wide, values, ks], axis=1)
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


def mark_nonfinite(payload: Bytes) -> None:
    """This rank met elements that were not finite."""
    payload[_FLAGS_AT] |= _NONFINITE


def _read_signs(buffer: Bytes, header: Header, k: int, nonfinite: int) -> Selection:
    start = _fixed_bytes(SIGNS, header.dtype)
    scale = buffer[HEADER_BYTES:start].view(f"<f{value_bytes(header.dtype)}")
    words = buffer[start : start + 4 * k].view("<u4")
    values = np.repeat(scale, k)
    np.negative(values, out=values, where=words >= _SIGN)
    indices = (words & ~_SIGN).view(np.int32)
    return Selection(indices, values, nonfinite)


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
    if layout not in LAYOUTS:
        raise PayloadError(f"rank {rank}: layout {layout}, expected 1 to 3")
    if flags == _RAISED:
        return _error_bytes(k)
    return payload_bytes(layout, code, k)


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
