"""Gradients that are multiplied with a loss scale, and residuals that follow it.

Training in 16 bits multiplies the loss, and so every gradient, with a number that
changes: halved when a gradient overflows, doubled after many steps without. What waits
in the residuals was multiplied with the number of its own step. So residuals are
multiplied too, by the ratio; a power of two loses no bit.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from hvd_sparse.core.contracts import Array


def scale_of(scaler: Any) -> Callable[[], float] | None:
    """What tells the loss scale of the step to come; None where there is no scaler.

    Raises:
        TypeError: scaler can not be asked.
    """
    if scaler is None:
        return None
    if isinstance(scaler, type) or not hasattr(scaler, "get_scale"):
        raise TypeError(
            f"scaler must have get_scale(), such as a GradScaler, got {scaler!r}"
        )
    return lambda: float(scaler.get_scale())


def ratio(new: float, old: float) -> float:
    """new / old, by which residuals are multiplied without losing a bit.

    Raises:
        ValueError: new is no scale, or the ratio is no power of two.
    """
    if not 0 < new < math.inf:
        raise ValueError(f"loss scale must be positive and finite, got {new}")
    if math.frexp(new / old)[0] != 0.5:
        raise ValueError(
            f"loss scale must change by powers of two, which residuals follow exactly, "
            f"got {new} after {old}: give the scaler growth_factor=2.0 and "
            "backoff_factor=0.5"
        )
    return new / old


def multiply(residuals: dict[str, Array], factor: float) -> None:
    """Overwrites each with factor times itself, none of them if one would overflow.

    Raises:
        ValueError: an element would not be finite; the text has the tensor.
    """
    for name, residual in residuals.items():
        if residual.shape[0] and _largest(residual) * factor > _most(residual):
            raise ValueError(
                f"{name}: residual overflows where the loss scale grows by {factor:g}"
            )
    for residual in residuals.values():
        residual *= factor


def overflows(values: list[Array], scale: float, out: Array) -> bool:
    """Whether the scaled sum of such values may be infinite in the dtype of out."""
    most = sum(_largest(array) * scale for array in values if array.shape[0])
    return not most <= _most(out)  # nor is NaN


def is_finite(array: Array) -> bool:
    """Whether all elements are; without a temporary of its size but in rare cases."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(array.sum())
    if math.isfinite(total):
        return True
    wide = array.astype(np.float64) if isinstance(array, np.ndarray) else array.double()
    return math.isfinite(float(abs(wide).max()))


def _largest(array: Array) -> float:
    """The largest magnitude, from both ends: no temporary."""
    return max(-float(array.min()), float(array.max()))


_MOST = {"float16": 65504.0, "float32": float(np.finfo(np.float32).max)}
_MOST |= {"float64": float(np.finfo(np.float64).max)}
_MOST |= {"bfloat16": (2 - 2**-7) * 2.0**127}


def _most(array: Array) -> float:
    """The largest number of its dtype."""
    return _MOST[str(array.dtype).removeprefix("torch.")]
