"""What a user's own format may get wrong, found before a kernel reads its arrays."""

from typing import Any

import numpy as np

from hvd_sparse.core.contracts import Array, Format, PayloadError
from hvd_sparse.core.formats import is_ours
from hvd_sparse.core.roles import offers
from hvd_sparse.kernels.reference import check_finite, check_indices

_TRIED = 100_000  # elements of a gradient with which a format is tried
_YOURS = 128  # the least number of a format of one's own


def check_format(form: Any) -> None:
    """Refuse what is no format, or does not give back what it was given.

    Raises:
        TypeError: a method is missing.
        ValueError: with three entries, or none, it breaks a promise of `Format`.
    """
    if isinstance(form, type) or not offers(form, Format):
        raise TypeError(
            "values must be Float32() or another format of hvd_sparse, or have all "
            f"methods of a Format, got {form!r}"
        )
    if is_ours(form):
        return
    if not (isinstance(form.layout, int) and form.layout >= _YOURS):
        raise ValueError(
            f"{form!r}: layout must be an int of at least {_YOURS}, got {form.layout!r}"
        )
    indices = np.array([2, 3, 65_536], np.int32)
    for dtype in ("float32", "float64"):
        values = np.array([3.1, -1, 1e-3], dtype)
        for k in (3, 0):
            _try(form, indices[:k], values[:k])


def _try(form: Format, indices: Array, values: Array) -> None:
    k, dtype = len(values), str(values.dtype)
    size = form.bytes(k, dtype, _TRIED)
    most = form.most(size, dtype, _TRIED)
    if most < k:
        raise ValueError(
            f"{form!r}: {size} bytes of {k} entries must have room for {k}, got {most}"
        )
    out, given = np.zeros(size, np.uint8), values.copy()
    given.flags.writeable = False  # they are what the sparsifier has selected
    sent = form.write(out, indices, given, _TRIED)
    found = form.read(out, k, dtype, _TRIED)
    for what, one, other in (
        ("indices", indices, found[0]),
        ("values", sent, found[1]),
    ):
        kind = np.int32 if what == "indices" else values.dtype
        for array in (one, other):
            if not isinstance(array, np.ndarray) or array.dtype != kind:
                raise ValueError(
                    f"{form!r}: {what} must be an array of {np.dtype(kind)}, "
                    f"got {array!r}"
                )
        if not np.array_equal(one, other):
            raise ValueError(
                f"{form!r}: read must give the {what} that were written, "
                f"expected {one!r}, got {other!r}"
            )


def read_entries(
    form: Format, data: Array, k: int, dtype: str, n: int
) -> tuple[Array, Array]:
    """As its `read`, in arrays that kernels may read.

    Raises:
        PayloadError: they are not those of k entries.
    """
    indices, values = form.read(data, k, dtype, n)
    if is_ours(form):
        return indices, values
    wide = "float64" if dtype == "float64" else "float32"
    kinds = indices.dtype, values.dtype
    shapes = indices.shape in ((k,), (0,)) and values.shape == (k,)
    if not shapes or kinds != (np.int32, np.dtype(wide)):
        raise PayloadError(
            f"{form!r}: read must give {k} entries, int32 indices and {wide} values, "
            f"got {indices.shape} {kinds[0]} and {values.shape} {kinds[1]}"
        )
    return _plain(indices), _plain(values)


def check_entries(indices: Array, values: Array, n: int) -> None:
    """Refuse what no rank sends.

    Raises:
        PayloadError: indices do not ascend in [0, n), or values are not finite.
    """
    try:
        check_indices(indices, n)
        check_finite(values)
    except ValueError as error:
        raise PayloadError(str(error)) from None


def _plain(array: Array) -> Array:
    return np.require(array, requirements=("C_CONTIGUOUS", "ALIGNED"))
