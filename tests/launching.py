"""Starts real ranks from a test, where the whole job ends or memory is measured."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import needs
import pytest

PROGRAMS = Path(__file__).parent / "programs"
START_S = 25  # to start Python and load the kernels on a loaded machine

BIN = str(Path(sys.executable).parent)
MPI_ENVIRONMENT = Path(__file__).parents[1] / "launch" / "mpi-environment.sh"
horovodrun = shutil.which("horovodrun", path=BIN)


def in_mpi_environment(script: str, *arguments: str) -> str:
    """What a line of shell prints after launch/mpi-environment.sh, for this Python."""
    line = f'. "{MPI_ENVIRONMENT}"; PYTHON=$0; {script}'
    done = subprocess.run(
        ["bash", "-c", line, sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout if done.returncode == 0 else ""


@cache
def mpi_command(ranks: int) -> list[str]:
    """The start of a command line that runs ranks of this Python's MPI; [] without."""
    script = 'mpi_command "$1" && printf "%s\\0" "${MPI_COMMAND[@]}"'
    return in_mpi_environment(script, str(ranks)).split("\0")[:-1]


needs_mpirun = pytest.mark.skipif(
    not mpi_command(1), reason="needs hvd_sparse[mpi] and an MPI with its mpirun"
)
needs_horovodrun = pytest.mark.skipif(
    horovodrun is None, reason=f"needs {needs.HOROVOD}"
)


class Ended(NamedTuple):
    """How a job ended; every rank is gone by then."""

    code: int
    output: str
    errors: str
    seconds: float


def launch(program: str, *arguments: str, ranks: int, timeout_s: float) -> Ended:
    """Run a program of tests/programs under mpirun; a hang fails the test."""
    program = str(PROGRAMS / program)
    return run([*mpi_command(ranks), sys.executable, program, *arguments], timeout_s)


_WITHOUT_LAUNCHER = """
export WORLD_SIZE=$1; shift
for ((RANK = 1; RANK < WORLD_SIZE; RANK++)); do RANK=$RANK "$@" & done
RANK=0 "$@"; code=$?
for rank in $(jobs -p); do kill -CONT "$rank" 2>/dev/null; done
wait
exit $code
"""


def launch_without(
    program: str, *arguments: str, ranks: int, timeout_s: float
) -> Ended:
    """The same with no launcher but what tells a process its rank; ends as rank 0."""
    command = ["bash", "-c", _WITHOUT_LAUNCHER, "bash", str(ranks), sys.executable]
    return run([*command, str(PROGRAMS / program), *arguments], timeout_s)


def launch_horovod(
    program: str, *arguments: str, ranks: int, timeout_s: float, transport: str
) -> Ended:
    """The same under horovodrun, over gloo or mpi."""
    command = [str(horovodrun), "-np", str(ranks), f"--{transport}"]
    command += ["-H", f"localhost:{ranks}"]
    if transport == "mpi":
        command += ["--binding-args=--bind-to none --map-by slot --oversubscribe"]
    return run(
        [*command, sys.executable, str(PROGRAMS / program), *arguments], timeout_s
    )


def run(command: list[str], timeout_s: float) -> Ended:
    """Run a job in a session of its own, of which nothing is left in the end."""
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_plm_rsh_agent": "/bin/false",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    # set by an earlier import of hvd_sparse.mpi in this process; ranks are not alone
    environment.pop("OMPI_MCA_ess_singleton_isolated", None)
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        end_session(process.pid)
        output, errors = process.communicate(timeout=60)
        pytest.fail(f"the job hangs after {timeout_s} s: {errors}")
    return Ended(process.returncode, output, errors, time.monotonic() - started)


def end_session(session: int) -> None:
    """Kill all processes of a session: ranks outlive a launcher that hangs."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(ValueError, ProcessLookupError):
            pid = int(entry.name)
            if os.getsid(pid) == session:
                os.kill(pid, signal.SIGKILL)
