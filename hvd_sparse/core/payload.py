"""Encode: what one tensor sends, before it has a place on the wire.

Its entries are bytes as their format has them; what every rank knows of the tensor, its
header, stays at home: `hvd_sparse.core.frame` says once for all tensors that travel
together that ranks agree about it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.contracts import Array, Format, PayloadError, Selection
from hvd_sparse.core.format_checks import check_entries, read_entries
from hvd_sparse.core.formats import is_ours
from hvd_sparse.kernels.coding import Coded, plain

Bytes = npt.NDArray[np.uint8]

DTYPES = ("float16", "bfloat16", "float32", "float64")
MOST_ELEMENTS = 2**31 - 1  # of a gradient: indices are int32
HEADER_BYTES = 32  # that a tensor takes beside its entries if it travels alone


class Header(NamedTuple):
    """What every rank must agree on before it believes a payload.

    Attributes:
        form: how its entries become bytes.
        dtype: the gradient's, one of DTYPES.
        n: elements of the gradient.
        k: elements of the payload; the most there may be where `varies`.
        step: completed exchanges of this tensor.
        digest: 64 bits over all of these but the step, and name and facts.
        varies: ranks choose k themselves.
        facts: shape and configuration, which the digest stands for; for errors.
    """

    form: Format
    dtype: str
    n: int
    k: int
    step: int
    digest: int
    varies: bool = False
    facts: tuple[tuple[int, ...], str] = ((), "")

    @property
    def wide(self) -> str:
        """Dtype of residual, values and sums of a gradient of this dtype."""
        return "float64" if self.dtype == "float64" else "float32"


class Payload(NamedTuple):
    """What a rank sends of one tensor.

    Attributes:
        header: what all ranks know of it.
        k: entries; those of the header unless ranks choose.
        nonfinite: this rank met elements that were not finite.
        entries: (bytes,) uint8 at an address that is a multiple of 8; so is their
            number, zeros fill them up.
        wire_bytes: of what arrived: all that it took, its share of the frame included.
    """

    header: Header
    k: int
    nonfinite: bool
    entries: Bytes
    wire_bytes: int = 0


@dataclass(frozen=True)
class Raised:
    """In place of a payload: this rank raised.

    Attributes:
        error: what peers are told, or the beginning of it.
        frame_bytes: that its frame must have, where all ranks send as many.
    """

    error: BaseException
    frame_bytes: int | None = None


def entry_bytes(form: Format, dtype: str, n: int, k: Any) -> Any:
    """Bytes of k entries of n elements, filled up; k a number or an array."""
    return -(-form.bytes(k, dtype, n) // 8) * 8


def payload_bytes(form: Format, dtype: str, n: int, k: Any) -> Any:
    """Bytes on the wire of k entries of a tensor that travels alone.

    Args:
        form: of the entries.
        dtype: the gradient's.
        n: its elements.
        k: a number, or an array of them, for each of which to answer.
    """
    return HEADER_BYTES + entry_bytes(form, dtype, n, k)


def most_elements(form: Format, dtype: str, n: int, size: Any) -> Any:
    """The largest k for which `payload_bytes` is at most size; negative if none is."""
    return form.most(size // 8 * 8 - HEADER_BYTES, dtype, n)


def encode(
    selection: Selection, header: Header, memory: Payload | None = None
) -> tuple[Payload, Array]:
    """The payload of a selection, and the values a receiver will read from it.

    Args:
        selection: what was selected.
        header: of its tensor.
        memory: one that is not needed any more, to be overwritten: fresh memory is
            slower.

    Returns:
        The payload, and `selection.values` itself where the format does not round.

    Raises:
        ValueError: a format of a user's own makes something else of finite values.
    """
    indices, values = _on_host(selection.indices), _on_host(selection.values)
    form, dtype, n, k = header.form, header.dtype, header.n, values.shape[0]
    size, end = entry_bytes(form, dtype, n, k), form.bytes(k, dtype, n)
    out = None if memory is None else memory.entries
    if out is None or out.size != size:
        out = np.empty(size, np.uint8)
    sent = form.write(out[:end], indices, values, n)
    if sent is not values and not np.isfinite(sent).all():
        raise ValueError(f"{form!r}: write must give finite values of finite ones")
    if end < size:
        out[end:] = 0
    payload = Payload(header, k, bool(selection.nonfinite), out)
    return payload, selection.values if sent is values else _like(
        sent, selection.values
    )


def decode(payload: Payload, *, indexed: bool = False) -> Selection:
    """The selection in a payload, as views of its bytes where they are not packed.

    Its indices are empty where every rank knows them.

    Raises:
        PayloadError: there are not k entries in it, indices do not ascend in [0, n), or
            values are not finite.
    """
    header, k = payload.header, payload.k
    form, dtype, n = header.form, header.dtype, header.n
    data = payload.entries[: form.bytes(k, dtype, n)]
    indices, values = read_entries(form, data, k, dtype, n)
    if indexed and indices.size != k:
        raise PayloadError(f"{form!r}: read must give {k} indices, got {indices.size}")
    check_entries(indices, values, n)
    return Selection(indices, values, int(payload.nonfinite))


def as_coded(payload: Payload, *, indexed: bool = False) -> Coded:
    """The entries as kernels read them: as they travel, if the format is ours.

    Its indices are empty where every rank knows them. Raises as `decode`, unless the
    kernels will find out.
    """
    header, k = payload.header, payload.k
    form = header.form
    if is_ours(form):
        return form.coded(payload.entries, k, header.dtype, header.n)
    selection = decode(payload, indexed=indexed)
    return plain(selection.indices, selection.values)._replace(k=k)


def _on_host(array: Any) -> Any:
    """Payloads leave from host memory; k elements come over from an accelerator."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def _like(array: Any, other: Any) -> Any:
    """The array as the other is: on the host, or on an accelerator."""
    return array if isinstance(other, np.ndarray) else other.new_tensor(array)
