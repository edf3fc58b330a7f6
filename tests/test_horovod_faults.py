"""Under Horovod: ranks that are paused, killed or late; and a restart after a kill.

These start horovodrun themselves, because the whole job ends.
"""

import re
from pathlib import Path

import pytest
from launching import START_S, Ended, launch_horovod, needs_horovodrun

DEADLINE_S = 5  # what the program gives its peers
# after that Horovod has 10 s to shut down, and the launcher takes its time with a rank
# that is stopped: it sends it a signal, and a second one that can not be ignored
END_S = 60

pytestmark = [needs_horovodrun, pytest.mark.jobs]
transports = pytest.mark.parametrize("transport", ["gloo", "mpi"])


def fault(kind: str, transport: str, *arguments: str) -> Ended:
    return launch_horovod(
        "horovod_faults.py",
        kind,
        *arguments,
        ranks=2,
        timeout_s=DEADLINE_S + START_S + END_S,
        transport=transport,
    )


def gave_up_in_time(errors: str) -> bool:
    """Rank 0 says so at the deadline, or little later: the machine is shared."""
    said = r"step 1: rank 0 gave up after (\d+) s .* \(timeout_s=5\)"
    found = re.search(said, errors)
    return found is not None and DEADLINE_S <= int(found[1]) < 2 * DEADLINE_S


def told(errors: str) -> list[str]:
    """What ranks said: pytest cuts a long text in its middle."""
    return [line for line in errors.splitlines() if re.search(r"rank \d", line)]


@transports
@pytest.mark.parametrize("kind", ["pause", "pause-dense", "absent", "half", "frozen"])
def test_a_rank_that_does_not_come_is_an_error_within_the_deadline(
    kind: str, transport: str
) -> None:
    job = fault(kind, transport)
    assert job.code != 0
    assert gave_up_in_time(job.errors), told(job.errors)
    # the blocked wait was freed: its handle is gone, or its operation has failed
    freed = r"rank 0: (ValueError: Handle|HorovodInternalError)"
    assert re.search(freed, job.errors), told(job.errors)
    assert "did not notice" not in job.errors


@transports
def test_a_killed_rank_ends_the_job_within_seconds(transport: str) -> None:
    job = fault("kill", transport)
    assert job.code != 0
    assert job.seconds < START_S + 10
    assert "did not notice" not in job.errors


@transports
def test_a_restart_after_a_kill_continues_bitwise(
    transport: str, tmp_path: Path
) -> None:
    killed = fault("before", transport, str(tmp_path))
    assert killed.code != 0
    job = fault("after", transport, str(tmp_path))
    assert job.code == 0, job.errors
    weights = [file.read_text() for file in tmp_path.glob("*.weights")]
    assert len(weights) == 4
    assert len(set(weights)) == 1
