"""The watchdog counts only while peers are missing, and gives up in the end."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from hvd_sparse import watchdog
from hvd_sparse.watchdog import Watchdog

SOON_S = 20.0  # a bound: what is waited for comes within a second


class Blocked:
    """Stands for a thread in Horovod: blocked until Horovod is shut down."""

    def __init__(self) -> None:
        self.freed = threading.Event()
        self.blocked = True

    def shutdown(self) -> None:
        self.blocked = False
        self.freed.set()


@pytest.fixture
def thread() -> Blocked:
    return Blocked()


@pytest.fixture
def dog(thread: Blocked) -> Iterator[Watchdog]:
    made = Watchdog(
        0.2, rank=lambda: 3, shutdown=thread.shutdown, waiting=lambda: thread.blocked
    )
    yield made
    made.stop()


def test_it_gives_up_and_names_tensor_rank_step_and_seconds(
    dog: Watchdog, thread: Blocked, caplog: pytest.LogCaptureFixture
) -> None:
    dog.sent("weight", 7)
    dog.sent("bias", 7)
    assert thread.freed.wait(SOON_S)
    assert dog.gave_up.startswith(
        "weight (and 1 more tensors): step 7: rank 3 gave up after 0 s"
    )
    assert dog.gave_up.endswith("(timeout_s=0.2)")
    assert any(dog.gave_up in record.getMessage() for record in caplog.records)


def test_it_gives_up_where_a_filter_of_the_log_raises(
    dog: Watchdog, thread: Blocked
) -> None:
    def broken(record: logging.LogRecord) -> bool:
        raise ZeroDivisionError

    watchdog.log.addFilter(broken)
    try:
        dog.sent("weight", 7)
        assert thread.freed.wait(SOON_S)
    finally:
        watchdog.log.removeFilter(broken)


def test_what_came_back_is_not_waited_for(dog: Watchdog, thread: Blocked) -> None:
    dog.sent("weight", 0)
    dog.received("weight")
    assert not thread.freed.wait(1.0)
    assert not dog.gave_up


def test_a_caller_who_is_busy_elsewhere_is_not_disturbed(
    dog: Watchdog, thread: Blocked
) -> None:
    thread.blocked = False
    dog.sent("weight", 0)
    assert not thread.freed.wait(1.0)
    thread.blocked = True  # now somebody waits for it
    assert thread.freed.wait(SOON_S)


def test_it_warns_once(
    thread: Blocked,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watchdog, "WARNING_S", 0.3)
    dog = Watchdog(
        3.0, rank=lambda: 0, shutdown=thread.shutdown, waiting=lambda: thread.blocked
    )
    with caplog.at_level(logging.WARNING, logger="hvd_sparse"):
        dog.sent("weight", 0)
        assert thread.freed.wait(SOON_S)
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 1
    assert "weight: step 0: rank 0 has waited" in said[0]


STAYS_BLOCKED = """
import os
import sys
import time
from hvd_sparse import watchdog
watchdog._LAST_S = 0.5
dog = watchdog.Watchdog(
    0.2, rank=lambda: 0, shutdown=lambda: time.sleep(60), waiting=lambda: True
)
sys.stdout = os.fdopen(os.dup(1), "w")  # buffered, whatever the environment says
sys.stdout.write("waits in a buffer")
dog.sent("weight", 0)
time.sleep(60)
"""


def test_a_process_that_stays_blocked_ends_non_zero() -> None:
    command = [sys.executable, "-c", STAYS_BLOCKED]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert ended.returncode == 1
    assert ended.stdout == "waits in a buffer"
    assert "rank 0 is still blocked in Horovod; ending it" in ended.stderr


def test_it_ends_where_nobody_reads_what_it_printed() -> None:
    read, write = os.pipe()
    os.close(read)  # as where a launcher is gone
    command = [sys.executable, "-c", STAYS_BLOCKED]
    try:
        ended = subprocess.run(command, stdout=write, stderr=write, timeout=50)
    finally:
        os.close(write)
    assert ended.returncode == 1


def test_a_process_does_not_wait_at_exit_for_a_shutdown_that_hangs() -> None:
    program = """
import time
from hvd_sparse import watchdog
watchdog._LAST_S = 0.5
state = {"blocked": True}
def shutdown():
    state["blocked"] = False
    time.sleep(60)
dog = watchdog.Watchdog(
    0.2, rank=lambda: 0, shutdown=shutdown, waiting=lambda: state["blocked"]
)
dog.sent("weight", 0)
while state["blocked"]:
    time.sleep(0.05)
raise ValueError("what Horovod raises in the freed thread")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50
    )
    assert ended.returncode == 1
    assert "what Horovod raises" in ended.stderr
