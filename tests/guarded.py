"""Memory behind which lies a page that ends the process if anything touches it."""

import ctypes
import mmap

import numpy as np

CANARY = 0xA5
_ROOM = 64  # canaries before what is held
_LIBC = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """Room for the bytes of a receive buffer, each time at the end of its last page."""

    def __init__(self, most: int) -> None:
        """Args: most: bytes that it may be asked to hold."""
        self._end = -(-(most + _ROOM + 8) // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, self._end + mmap.PAGESIZE)
        self._data = np.frombuffer(memory, np.uint8)
        behind = ctypes.c_void_p(self._data.ctypes.data + self._end)
        if _LIBC.mprotect(behind, mmap.PAGESIZE, 0):  # PROT_NONE
            raise OSError(ctypes.get_errno(), "mprotect failed")
        self.hold(b"")

    def hold(self, data: bytes) -> np.ndarray:
        """(bytes,) uint8, at a multiple of 8: it ends less than 8 bytes before."""
        self._held = data
        self._start = (self._end - len(data)) & -8
        assert self._start >= _ROOM, f"{len(data)} bytes have no room"
        self._data[self._start - _ROOM : self._end] = CANARY
        held = self._data[self._start : self._start + len(data)]
        held[:] = np.frombuffer(data, np.uint8)
        return held

    def check(self) -> None:
        """What was held is as it was, and so is what lies around it."""
        found = self._data[self._start - _ROOM : self._end].tobytes()
        behind = self._end - self._start - len(self._held)
        expected = bytes([CANARY]) * _ROOM + self._held + bytes([CANARY]) * behind
        assert found == expected, "bytes that had arrived were overwritten"


class Fenced:
    """An array with canaries on both sides."""

    def __init__(self, n: int, dtype: object) -> None:
        """(n,) of this dtype."""
        size = n * np.dtype(dtype).itemsize
        self._data = np.full(size + 2 * _ROOM, CANARY, np.uint8)
        self.array = self._data[_ROOM : _ROOM + size].view(dtype)

    def check(self) -> None:
        """Nothing was written beside the array."""
        for part in (self._data[:_ROOM], self._data[-_ROOM:]):
            assert part.tobytes() == bytes([CANARY]) * _ROOM, "written outside of out"
