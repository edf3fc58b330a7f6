"""Room for what turns up: as much as there could be, of which little is used."""

import contextlib
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

# From so many bytes on malloc maps pages of their own too; but once such an array is
# gone, it takes others of its size, residuals among them, from memory that it keeps.
_MAPPED = 1 << 17


def reserve(size: int, dtype: Any) -> npt.NDArray[Any]:
    """(size,) of which only what is used becomes memory, and not 2 MiB at a time."""
    dtype = np.dtype(dtype)
    if size * dtype.itemsize < _MAPPED or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.empty(size, dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, size * dtype.itemsize, flags=flags)
    with contextlib.suppress(OSError):  # a system without huge pages
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, dtype)
