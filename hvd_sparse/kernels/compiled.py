"""How the hot loops are compiled."""

from typing import Any

from numba import njit


def jit(function: Any) -> Any:
    """Compiled at first use and kept on disk, where this user may write anywhere."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no folder for its cache
        return njit(**options)(function)
