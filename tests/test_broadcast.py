"""Broadcasts that must end, and the memory they take: in processes of their own."""

import importlib.util
import os
import re

import needs
import pytest
from launching import START_S, launch, needs_mpirun

DEADLINE_S = 5  # what the program of faults gives its peers

pytestmark = [needs_mpirun, pytest.mark.jobs]

needs_clear_refs = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="needs Linux's /proc/self/clear_refs to measure the peak of one broadcast",
)

FRAMEWORKS = {
    "parameters": "torch",
    "optimizer_state": "torch",
    "variables": "tensorflow",
}


@needs_clear_refs
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("what", FRAMEWORKS)
def test_a_broadcast_takes_two_tensors_at_most_beside_the_model(
    what: str, ranks: int
) -> None:
    if importlib.util.find_spec(FRAMEWORKS[what]) is None:
        pytest.skip(f"needs {needs.FRAMEWORKS[FRAMEWORKS[what]]}")
    job = launch("broadcast_memory.py", what, ranks=ranks, timeout_s=6 * START_S)
    assert job.code == 0, job.errors
    tensors = [float(line) for line in job.output.splitlines()]
    assert len(tensors) == ranks
    assert max(tensors) <= 2.1  # and what is not tensors


@pytest.mark.parametrize("kind", ["pause", "raise"])
def test_a_peer_that_stops_in_the_middle_is_an_error_within_the_deadline(
    kind: str,
) -> None:
    job = launch("broadcast_faults.py", kind, ranks=2, timeout_s=DEADLINE_S + START_S)
    assert job.code != 0
    if kind == "raise":  # which ends the job
        assert "ZeroDivisionError: in the middle" in job.errors
        return
    said = r"broadcast: layer: step 1: rank 0 gave up after (\d+\.\d) s"
    found = re.search(said, job.errors)
    assert found is not None, job.errors
    assert DEADLINE_S <= float(found[1]) < 2 * DEADLINE_S


def test_a_peer_that_does_not_come_is_an_error_not_a_hang() -> None:
    job = launch(
        "broadcast_faults.py", "absent", ranks=2, timeout_s=DEADLINE_S + START_S
    )
    assert job.code != 0
    assert "a peer did not make its exchange" in job.errors
