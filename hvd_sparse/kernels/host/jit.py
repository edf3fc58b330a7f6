"""How the hot loops are compiled, and where their machine code is kept.

Numba's own cache looks at one source file a function, and numbers the signatures of a
function in an index. Here both would give wrong code in silence: loops of one file are
inlined into those of another, and of two processes that compile at the same time each
may give its number to the other's code. So each signature has a file of its own, whose
name depends on all sources of the kernels: what is found under it is what is wanted.
"""

import contextlib
import fcntl
import logging
import os
import pickle
from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import uuid4

import numba
import numpy
from numba.core.caching import FunctionCache, NullCache
from numba.core.serialize import dumps

_KERNELS = Path(__file__).parents[1]  # all that loops are made of, constants too
_INSTALLED = Path(__file__).parent / "__pycache__"  # beside the files with the loops

log = logging.getLogger("hvd_sparse")


@cache
def _sources_digest(folder: Path) -> str:
    """Changes with every edit of any Python file below the folder."""
    digest = blake2b(digest_size=8)
    for file in sorted(folder.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder)} {len(content)} ".encode() + content)
    return digest.hexdigest()


class _Files:
    """The compiled signatures of one function, a file each; the part Numba calls."""

    def __init__(self, folder: Path, function: str, sources: str) -> None:
        """Args: folder: to write. function: a file name. sources: their digest."""
        self._folder = folder
        self._function = function
        self._sources = sources

    def _name(self, key: Any) -> str:
        """For this signature, processor and bytecode, and what compiled it."""
        about = (numba.__version__, numpy.__version__, key)
        digest = blake2b(repr(about).encode(), digest_size=12)
        return f"{self._function}.{self._sources}.{digest.hexdigest()}.nbc"

    def load(self, key: Any) -> Any:
        """What was saved under this key, or None: then Numba compiles.

        By this user, or beside the sources by who installed them and warmed them up.
        """
        for folder in (self._folder, _INSTALLED):
            try:
                return pickle.loads((folder / self._name(key)).read_bytes())
            except (OSError, EOFError, pickle.UnpicklingError):  # none, or damaged
                continue
        return None

    def save(self, key: Any, data: Any) -> None:
        """Other processes see all of it or nothing.

        Raises:
            OSError: the disk is full, or may not be written any more.
        """
        self._forget_other_sources()
        unfinished = self._folder / f"{uuid4().hex}.unfinished"
        try:
            unfinished.write_bytes(dumps(data))
            unfinished.replace(self._folder / self._name(key))
        finally:
            unfinished.unlink(missing_ok=True)

    def _forget_other_sources(self) -> None:
        """What was compiled before an edit would pile up; whoever needs it compiles."""
        for file in self._folder.glob("*.nb[ci]"):
            if f".{self._sources}." not in file.name:
                with contextlib.suppress(OSError):  # gone, or another user's
                    file.unlink()


class _KernelCache(FunctionCache):  # type: ignore[misc]  # numba has no types
    """Numba's, which finds a folder that may be written, with other files in it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _Files(
            Path(self._cache_path),
            self._impl.filename_base,
            _sources_digest(_KERNELS),
        )

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """What was compiled before, or None: Numba compiles."""
        found = super().load_overload(signature, target_context)
        if found is None:
            folder = Path(self._cache_path)
            if _is_first_in(folder):
                _say(f"they are kept in {folder}")
        return found

    def save_overload(self, signature: Any, data: Any) -> None:
        """What can not be kept costs time in the next process, and no step in this."""
        with contextlib.suppress(OSError):
            super().save_overload(signature, data)


class _NoCache(NullCache):  # type: ignore[misc]  # numba has no types
    """Where no folder may be written."""

    def load_overload(self, signature: Any, target_context: Any) -> None:
        """Nothing was kept: Numba compiles."""
        _say(
            "in every process, for no folder may be written: name one that may, in "
            "NUMBA_CACHE_DIR"
        )


@cache
def _say(kept: str) -> None:
    """Once a process: else nobody knows why a first step takes so long."""
    log.warning(
        "hvd_sparse compiles its hot loops for this processor, 10 to 20 s a dtype; %s "
        "(python -m hvd_sparse.warm_up compiles all of them ahead)",
        kept,
    )


@cache
def _is_first_in(folder: Path) -> bool:
    """Whether no other process compiles into this folder: one speaks for all.

    The first holds a lock while it lives. Where that can not be had, all are first.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / "compiling.lock", os.O_CREAT | os.O_RDWR, 0o666)
    except OSError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return False
    except OSError:  # some network file systems have no locks
        os.close(file)
    return True


def jit(function: Any) -> Any:
    """Compiled at first use and kept on disk, where this user may write anywhere."""
    dispatcher = numba.njit(nogil=True, error_model="numpy")(function)
    dispatcher._cache = _NoCache()
    with contextlib.suppress(RuntimeError):  # numba found no folder for its cache
        dispatcher._cache = _KernelCache(function)
    return dispatcher
