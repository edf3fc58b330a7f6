"""Ctrl-C in the middle of a step: the step comes to its end first.

Python raises a KeyboardInterrupt wherever it happens to be; most often that is where a
kernel has just selected, and its result is in nobody's hands yet. So it is held back.
"""

# the functions that the module signal wraps: its wrappers look for an enum that a
# handler might be, which takes 9 us each time, and a gradient under Horovod is one time
import _signal  # type: ignore[import-not-found]  # typeshed has only signal
import threading
from types import FrameType
from typing import Any


class Uninterrupted:
    """What is inside runs to its end; a Ctrl-C meanwhile is raised after that.

    A second one is raised at once: what is inside waits for peers, for as long as the
    deadline of its exchange. Only the main thread is ever interrupted, and only where
    Python handles the signal; elsewhere this does nothing. Inside of another one it
    leaves all to that.
    """

    def __init__(self) -> None:
        """Serves one `with` after the other."""
        self._handler: Any = None  # whoever handles it otherwise
        self._frame: FrameType | None = None  # where the first came
        self._came = False

    def __enter__(self) -> None:
        """From here on."""
        if threading.current_thread() is not threading.main_thread():
            return
        handler = _signal.getsignal(_signal.SIGINT)
        nested = isinstance(getattr(handler, "__self__", None), Uninterrupted)
        if callable(handler) and not nested:
            self._handler = handler
            _signal.signal(_signal.SIGINT, self._hold)

    def __exit__(self, *error: object) -> None:
        """Up to here: raises what was held back."""
        handler, self._handler = self._handler, None
        if handler is None:
            return
        _signal.signal(_signal.SIGINT, handler)
        came, frame = self._came, self._frame
        self._came, self._frame = False, None
        if came:
            handler(_signal.SIGINT, frame)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self._came:
            self._handler(number, frame)
        self._came, self._frame = True, frame
