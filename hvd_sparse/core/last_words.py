"""What a process still says when it ends without Python's own farewell."""

import sys
from contextlib import suppress


def flush_output() -> None:
    """Write what was printed; never raises, as nobody may be left to read it.

    A launcher ends when the first rank fails, and the pipes of the others with it: a
    rank that stumbled over that would not end.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed, broken, or None
            stream.flush()
