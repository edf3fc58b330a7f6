"""How a rank gives up, and how it leaves.

A request that missed its deadline can be neither cancelled nor completed. So its
buffers are kept for ever, the exchange refuses further use, and the process ends by
Abort: MPI_Finalize would wait for the missing peer. An error that nobody catches is
told to the peers first, in whichever exchange they wait.
"""

import atexit
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol
from weakref import WeakSet

from hvd_sparse.core.contracts import ExchangeError
from hvd_sparse.core.last_words import flush_output

log = logging.getLogger("hvd_sparse")

WARNING_S = 60.0
PAUSE_S = 2e-4
_FAREWELL_S = 5.0  # how long a failing rank waits for one more peer to hear of it


class Deadline:
    """How long a rank waits for its peers: a warning at WARNING_S, then an error."""

    def __init__(self, timeout_s: float) -> None:
        """Begins now.

        Raises:
            ValueError: timeout_s is not positive.
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        self.timeout_s = timeout_s
        self._warned = False
        self.start()

    def start(self) -> None:
        """Wait for the whole time from now on."""
        self._started = time.monotonic()

    def forget(self) -> None:
        """What follows is another step, to be warned of anew."""
        self._warned = False

    def check(self, who: str, missed: str = "arrive") -> float:
        """Seconds waited so far.

        Args:
            who: waits, for what: for messages.
            missed: what a peer did not do.

        Raises:
            ExchangeError: they are more than timeout_s.
        """
        waited = time.monotonic() - self._started
        if waited > self.timeout_s:
            raise ExchangeError(
                f"{who} gave up after {waited:.1f} s (timeout_s={self.timeout_s:g}); "
                f"a peer did not {missed}"
            )
        if waited > WARNING_S and not self._warned:
            self._warned = True
            log.warning("%s has waited %.0f s for its peers", who, waited)
        return waited


# ------------------------------------------------------------------ what is left behind

_KEPT: list[object] = []


def keep_for_ever(held: object) -> None:
    """MPI still writes into it: never freed, never reused."""
    _KEPT.append(held)


def abort_at_exit(comm: Any) -> None:
    """End the job when this process does. Args: comm: of mpi4py."""

    def abort() -> None:
        flush_output()
        comm.Abort(1)

    atexit.register(abort)


# -------------------------------------------------------------- telling it to the peers


class Reporting(Protocol):
    """What is asked of an exchange when its rank fails."""

    def reporting(self, error: BaseException) -> Iterator[None]:
        """Tell the peers; ends when they have heard."""
        ...

    def interrupt(self, reason: str) -> None:
        """Leave what is under way."""
        ...


_OPEN: "WeakSet[Any]" = WeakSet()


def watch(exchange: Reporting) -> None:
    """From now on an uncaught exception in this process reaches the peers."""
    _OPEN.add(exchange)
    if getattr(sys.excepthook, "reports_to_peers", False):
        return
    previous = sys.excepthook

    def excepthook(
        kind: type[BaseException],
        error: BaseException,
        traceback: TracebackType | None,
    ) -> None:
        try:
            previous(kind, error, traceback)
        finally:
            if not isinstance(error, ExchangeError):  # of which the peers know
                _say_farewell(error, list(_OPEN))

    excepthook.reports_to_peers = True  # type: ignore[attr-defined]
    sys.excepthook = excepthook


def _say_farewell(error: BaseException, exchanges: list[Reporting]) -> None:
    """Report to the peers of all exchanges side by side.

    In which of them they wait, and in which order, is not known. Where nobody listens,
    the Abort at exit ends them.
    """
    talks = [(exchange, exchange.reporting(error)) for exchange in exchanges]
    heard = time.monotonic()
    while talks and time.monotonic() - heard < _FAREWELL_S:
        waiting = [talk for talk in talks if _goes_on(talk[1])]
        if len(waiting) < len(talks):
            heard = time.monotonic()  # and time for that peer to say what it heard
        talks = waiting
        time.sleep(PAUSE_S)
    for exchange, _ in talks:
        exchange.interrupt(f"{type(error).__name__} was raised")


def _goes_on(talk: Iterator[None]) -> bool:
    with suppress(ExchangeError):  # its peers know already
        return next(talk, talk) is None
    return False
