"""Watches over waits that nobody can interrupt from inside them.

Horovod blocks in native code until all ranks have sent a tensor, and its own stall
check never fires under Gloo. So a thread counts how long nothing has moved: it warns,
and in the end gives up in the place of the thread that waits.
"""

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from hvd_sparse.core.last_words import flush_output

log = logging.getLogger("hvd_sparse")

WARNING_S = 60.0
_LAST_S = 10.0  # for the blocked thread to leave Horovod once it was shut down


class Watchdog:
    """Counts the seconds in which collectives wait for peers and nothing moves."""

    def __init__(
        self,
        timeout_s: float,
        rank: Callable[[], int],
        shutdown: Callable[[], None],
        waiting: Callable[[], bool],
    ) -> None:
        """Watch from the first `sent` on.

        Args:
            timeout_s: seconds without movement after which to give up.
            rank: of this process, for the messages.
            shutdown: frees the threads that are blocked.
            waiting: whether something that this process has sent waits for peers.
                Otherwise the caller is busy with something else. It must not look at
                the frames of other threads: CPython 3.11 crashes now and then.
        """
        self.gave_up = ""
        self._timeout_s = timeout_s
        self._rank = rank
        self._shutdown = shutdown
        self._waiting = waiting
        self._waits: dict[str, int] = {}  # per tensor that is awaited, its step
        self._moves = 0
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def sent(self, name: str, step: int) -> None:
        """A tensor is on its way."""
        self._waits[name] = step
        self._moves += 1
        if self._thread is None or not self._thread.is_alive():  # or after a fork
            self._thread = threading.Thread(
                target=self._watch, name="hvd_sparse watchdog", daemon=True
            )
            self._thread.start()

    def received(self, name: str) -> None:
        """It came back, and all that travelled beside it: nobody waits for it now."""
        self._waits.pop(name, None)
        self._moves += 1

    def forget(self) -> None:
        """Nothing is awaited any more."""
        self._waits.clear()
        self._moves += 1

    def stop(self) -> None:
        """Watch no more."""
        self._stopped.set()

    def _watch(self) -> None:
        # time is counted in ticks, so that a process that was itself stopped for a
        # while does not believe that it waited all that time
        tick = min(1.0, self._timeout_s / 20)
        waited, moves, warned = 0.0, self._moves, False
        while not self._stopped.wait(tick):
            if self._moves != moves or not self._waits or not self._waiting():
                waited, moves, warned = 0.0, self._moves, False
                continue
            waited += tick
            if waited >= self._timeout_s:
                self._give_up(waited)
                return
            if waited >= WARNING_S and not warned:
                warned = True
                _log(logging.WARNING, self._said("has waited", waited))

    def _said(self, what: str, waited: float) -> str:
        waits = list(self._waits.items()) or [("no tensor", 0)]
        name, step = waits[0]
        more = f" (and {len(waits) - 1} more tensors)" if len(waits) > 1 else ""
        return (
            f"{name}{more}: step {step}: rank {self._rank()} {what} "
            f"{waited:.0f} s for its peers; which of them are missing can not be known "
            "from inside Horovod"
        )

    def _give_up(self, waited: float) -> None:
        """Free the blocked threads; end the process where that does not help."""
        said = self._said("gave up after", waited)
        self.gave_up = f"{said} (timeout_s={self._timeout_s:g})"
        _log(logging.ERROR, f"{self.gave_up}; shutting Horovod down")
        over = threading.Event()
        deadline = time.monotonic() + _LAST_S
        # before anything is freed: a thread that is may leave at once
        atexit.register(_leave, over, deadline)
        # in a thread of its own, for it may block as well; then leaving would, too
        threading.Thread(target=self._shut_down, args=(over,), daemon=True).start()
        while time.monotonic() < deadline:
            if self._stopped.wait(0.1) or not self._waiting():
                return
        blocked = f"rank {self._rank()} is still blocked in Horovod; ending it"
        _log(logging.ERROR, blocked)
        _end()

    def _shut_down(self, over: threading.Event) -> None:
        try:
            self._shutdown()
        finally:
            over.set()


def _log(level: int, text: str) -> None:
    with suppress(Exception):  # of a user's filter: the watch must go on
        log.log(level, "%s", text)


def _leave(over: threading.Event, deadline: float) -> None:
    """At exit: Horovod's own farewell would wait for the missing peer for ever."""
    if not over.wait(max(0.0, deadline - time.monotonic())):
        _end()


def _end() -> None:
    logging.shutdown()
    flush_output()
    os._exit(1)
