"""Ctrl-C while something must run to its end."""

import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from hvd_sparse.core.interrupts import Uninterrupted


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def held(*steps: Callable[[], object]) -> None:
    with Uninterrupted():
        for step in steps:
            step()


def test_it_is_raised_afterwards() -> None:
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        held(interrupt, lambda: done.append(1))
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_one_is_raised_at_once() -> None:
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        held(interrupt, interrupt, lambda: done.append(1))
    assert not done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_inside_of_another_it_is_raised_after_that() -> None:
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        held(lambda: held(interrupt), lambda: done.append(1))
    assert done


def test_the_next_use_begins_anew() -> None:
    held = Uninterrupted()
    with pytest.raises(KeyboardInterrupt), held:
        interrupt()
    with held:
        pass


def test_an_error_is_not_hidden() -> None:
    def fail() -> None:
        raise ValueError

    with pytest.raises(KeyboardInterrupt) as raised:
        held(interrupt, fail)
    assert isinstance(raised.value.__context__, ValueError)


def test_a_handler_of_the_users_is_asked_and_stays() -> None:
    seen = []

    def handler(number: int, frame: Any) -> None:
        seen.append((number, frame.f_code.co_name))

    before = signal.signal(signal.SIGINT, handler)
    try:
        with Uninterrupted():
            interrupt()
            assert not seen
        assert seen == [(signal.SIGINT, "interrupt")]
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Uninterrupted():
            interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_is_left_alone() -> None:
    def use() -> None:
        with Uninterrupted():
            handlers.append(signal.getsignal(signal.SIGINT))

    handlers: list[Any] = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]
