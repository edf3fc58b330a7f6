"""A rank that raises, is paused, killed, or leaves: errors everywhere, hangs nowhere.

These start mpirun themselves, because the whole job ends.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"
DEADLINE_S = 5  # what the programs give their peers
START_S = 25  # to start Python and load the kernels on a loaded machine

mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent))
pytestmark = pytest.mark.skipif(mpirun is None, reason="needs hvd_sparse[mpi]")


def launch(program, *arguments, ranks=2, timeout_s=DEADLINE_S + START_S):
    """Exit code, standard error, seconds; every rank is gone when this returns."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_plm_rsh_agent": "/bin/false",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    environment.pop("OMPI_MCA_ess_singleton_isolated", None)
    command = [mpirun, "-np", str(ranks), "--oversubscribe", "--bind-to", "none"]
    command += [sys.executable, str(PROGRAMS / program), *arguments]
    started = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        _, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # mpirun then ends its ranks
        _, errors = process.communicate(timeout=20)
        pytest.fail(f"the job hangs after {timeout_s} s: {errors.decode()}")
    return process.returncode, errors.decode(), time.monotonic() - started


def gave_up_in_time(errors):
    """Rank 0 says so at the deadline, or little later: the machine is shared."""
    said = r"rank 0: ExchangeError: layer: step 1: rank 0 gave up after (\d+\.\d) s"
    found = re.search(said, errors)
    return found and DEADLINE_S <= float(found[1]) < 2 * DEADLINE_S


def test_a_paused_rank_is_an_error_within_the_deadline():
    code, errors, _ = launch("faults.py", "pause")
    assert code != 0
    assert gave_up_in_time(errors)
    assert "did not notice" not in errors


def test_a_killed_rank_ends_the_job_within_seconds():
    code, errors, _ = launch("faults.py", "kill", timeout_s=START_S)
    assert code != 0
    assert "did not notice" not in errors


def test_a_rank_that_raises_outside_is_heard_by_its_peers():
    code, errors, _ = launch("faults.py", "raise")
    assert code != 0
    assert "rank 0: ExchangeError: layer: rank 1 raised ZeroDivisionError" in errors
    assert "in the loss of this rank" in errors


def test_a_rank_that_leaves_early_is_an_error_not_a_hang():
    code, errors, _ = launch("faults.py", "absent")
    assert code != 0
    assert gave_up_in_time(errors)
