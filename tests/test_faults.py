"""A rank that raises, is paused, killed, or leaves: errors everywhere, hangs nowhere.

These start mpirun themselves, because the whole job ends.
"""

import re

import pytest
from launching import START_S, Ended, launch, needs_mpirun

DEADLINE_S = 5  # what the program gives its peers

pytestmark = [needs_mpirun, pytest.mark.jobs]


def fault(kind: str, timeout_s: float = DEADLINE_S + START_S) -> Ended:
    return launch("faults.py", kind, ranks=2, timeout_s=timeout_s)


def gave_up_in_time(errors: str) -> bool:
    """Rank 0 says so at the deadline, or little later: the machine is shared."""
    said = r"rank 0: ExchangeError: layer: step 1: rank 0 gave up after (\d+\.\d) s"
    found = re.search(said, errors)
    return found is not None and DEADLINE_S <= float(found[1]) < 2 * DEADLINE_S


def test_a_paused_rank_is_an_error_within_the_deadline() -> None:
    job = fault("pause")
    assert job.code != 0
    assert gave_up_in_time(job.errors)
    assert "did not notice" not in job.errors


def test_a_rank_whose_output_nobody_reads_ends_the_job_all_the_same() -> None:
    job = fault("unread")
    assert job.code != 0
    assert gave_up_in_time(job.errors)


def test_a_killed_rank_ends_the_job_within_seconds() -> None:
    job = fault("kill", timeout_s=START_S)
    assert job.code != 0
    assert "did not notice" not in job.errors


def test_a_rank_that_raises_outside_is_heard_by_its_peers() -> None:
    job = fault("raise")
    assert job.code != 0
    assert "rank 0: ExchangeError: layer: rank 1 raised ZeroDivisionError" in job.errors
    assert "in the loss of this rank" in job.errors


def test_a_rank_that_is_interrupted_is_heard_by_its_peers() -> None:
    job = fault("interrupt")
    assert job.code != 0
    assert "rank 0: ExchangeError: layer: rank 1 raised KeyboardInter" in job.errors


def test_a_rank_that_leaves_early_is_an_error_not_a_hang() -> None:
    job = fault("absent")
    assert job.code != 0
    assert gave_up_in_time(job.errors)


def test_a_rank_that_raises_between_start_and_finish_is_heard_by_its_peers() -> None:
    job = fault("between")
    assert job.code != 0
    assert "rank 0: ExchangeError: layer: rank 1 raised ZeroDivisionError" in job.errors


def test_a_rank_with_several_exchanges_is_heard_in_all_of_them_at_once() -> None:
    job = fault("several")
    assert job.code != 0
    assert "rank 0: ExchangeError: layer: rank 1 raised ZeroDivisionError" in job.errors


def test_a_rank_that_makes_no_exchange_is_an_error_not_a_hang() -> None:
    job = fault("construct")
    assert job.code != 0
    assert "a peer did not make its exchange" in job.errors


def test_a_warning_made_an_error_loses_nothing_and_ends_the_job() -> None:
    job = fault("warning")
    assert job.code != 0
    assert "rank 0: lost 0" in job.errors
    assert "can not be used any more: UserWarning in the middle" in job.errors
