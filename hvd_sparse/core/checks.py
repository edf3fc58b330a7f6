"""What a user's own sparsifier may get wrong, found before it becomes a payload."""

import numpy as np

from hvd_sparse.core.contracts import Array, Selection
from hvd_sparse.core.flight import Tensor
from hvd_sparse.core.loss_scale import is_finite
from hvd_sparse.core.plan import dtype_of
from hvd_sparse.kernels.reference import check_indices


def check_selection(tensor: Tensor, selection: Selection) -> None:
    """Refuse a selection that peers could not read.

    Raises:
        TypeError: it is no Selection of arrays of one dimension.
        ValueError: indices are not int32, do not ascend or are not k; values are not of
            the residual's dtype, or not finite.
    """
    name = tensor.name
    if not isinstance(selection, Selection):
        kind = type(selection).__name__
        raise TypeError(f"{name}: select must return a Selection, got {kind}")
    _check_arrays(name, selection)
    indices, values, _ = selection
    count, k = indices.shape[0], tensor.header.k
    if dtype_of(indices) != "int32":
        raise ValueError(f"{name}: indices must be int32, got {indices.dtype}")
    if count != k if not tensor.header.varies else count > k:
        most = "at most " if tensor.header.varies else ""
        raise ValueError(f"{name}: {most}{k} must be selected, got {count}")
    if dtype_of(values) != tensor.header.wide:
        raise ValueError(
            f"{name}: values must be {tensor.header.wide}, got {values.dtype}"
        )
    try:
        check_indices(_on_host(indices), tensor.header.n)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if values.shape[0] != count:
        raise ValueError(
            f"{name}: {count} indices were selected, but {values.shape[0]} values"
        )
    if not is_finite(values):
        raise ValueError(f"{name}: values must be finite")


def _check_arrays(name: str, selection: Selection) -> None:
    for what in ("indices", "values"):
        array = selection._asdict()[what]
        try:
            dimensions = len(array.shape)
        except AttributeError:
            kind = type(array).__name__
            raise TypeError(f"{name}: {what} must be an array, got {kind}") from None
        if dimensions != 1:
            shape = tuple(array.shape)
            raise TypeError(f"{name}: {what} must have shape (k,), got {shape}")


def _on_host(indices: Array) -> Array:
    return indices if isinstance(indices, np.ndarray) else indices.cpu().numpy()
