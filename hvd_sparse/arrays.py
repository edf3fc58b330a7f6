"""What is asked of the arrays that a user gives: of gradients, and of their outs.

What would fail when results are handed back must fail before anything is sent.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.sharing import repeats, sharing

Array = npt.NDArray[Any]


def checked(name: Any, gradient: Any) -> Any:
    """An array as it is; a numpy scalar as a 0-d array."""
    if not isinstance(name, str):
        raise TypeError(f"names must be str, got {name!r}")
    if isinstance(gradient, np.generic):
        return np.asarray(gradient)
    kind = type(gradient).__name__
    if not (isinstance(gradient, np.ndarray) or hasattr(gradient, "data_ptr")):
        raise TypeError(f"{name}: gradient must be an array, got {kind}")
    _refuse_odd_kinds(name, "gradient", gradient)
    return gradient


def _refuse_odd_kinds(name: str, role: str, array: Any) -> None:
    """Arrays that compute otherwise: a matrix is never flat, a mask hides elements."""
    for kind, cure in (
        (np.matrix, "np.asarray(it)"),
        (np.ma.MaskedArray, "it.filled(0)"),
    ):
        if isinstance(array, kind):
            raise TypeError(
                f"{name}: {role} must be a plain array, got {kind.__name__}; give "
                f"{cure}"
            )


def check_outs(gradients: Mapping[str, Array], outs: Mapping[str, Array]) -> None:
    """Raises: TypeError, ValueError: results can not be handed back in these."""
    if not outs:
        return
    for name, gradient in gradients.items():
        if name not in outs:
            raise ValueError(f"{name}: out has no array of this name")
        _check_out(name, gradient, outs[name])
    for name in outs:
        if name not in gradients:
            raise ValueError(f"{name}: out has it, but there is no such gradient")
    for first, second in sharing(outs):
        raise ValueError(
            f"{second}: out shares memory with that of {first!r}, which can not hold "
            "both results: give arrays of their own"
        )


def _check_out(name: str, gradient: Array, out: Array) -> None:
    if out is not gradient:
        _check_alike(name, gradient, out)
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError(f"{name}: out is read-only")
    if repeats(out):
        raise ValueError(f"{name}: out has elements that share memory")


def _check_alike(name: str, gradient: Array, out: Array) -> None:
    if out.shape != gradient.shape or out.dtype != gradient.dtype:
        raise ValueError(
            f"{name}: out has shape {tuple(out.shape)} and dtype {out.dtype}, expected "
            f"{tuple(gradient.shape)} and {gradient.dtype} as the gradient"
        )
    _refuse_odd_kinds(name, "out", out)


def check_on_host(gradients: Mapping[str, Array]) -> None:
    """Raises: TypeError: for one of these no out can be made here."""
    for name, gradient in gradients.items():
        if not isinstance(gradient, np.ndarray):
            kind = type(gradient).__name__
            raise TypeError(
                f"{name}: gradient must be a numpy array without out, got {kind}"
            )


def in_place(gradients: Mapping[str, Array], outs: Mapping[str, Array]) -> set[str]:
    """Names of gradients that are their own outs, and can give way at once."""
    found = {name for name, g in gradients.items() if outs.get(name) is g}
    if 0 < len(found) < len(gradients):  # else none of them shares, as outs do not
        for pair in sharing(gradients):
            found -= set(pair)  # they are part of others, which are read later
    return found


def contiguous(out: Array) -> Array:
    """out, or something contiguous of its shape to be copied into it."""
    if not isinstance(out, np.ndarray):
        return out if out.is_contiguous() else out.new_empty(out.shape)
    if out.flags.c_contiguous and out.flags.aligned:
        return out
    return np.empty(out.shape, out.dtype)
