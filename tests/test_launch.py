"""Each MPI has flags of its own: which it is, what it is told, and that it works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import in_mpi_environment, needs_mpirun, run

PROJECT = Path(__file__).parents[1]
MPIRUN = str(PROJECT / "launch" / "mpirun.sh")

# Pythons that have other MPIs than this one, to be tried too: PATH:PATH:...
OTHERS = [p for p in os.environ.get("HVD_SPARSE_MPI_PYTHONS", "").split(":") if p]

RANKS = """
import os
from mpi4py import MPI
comm = MPI.COMM_WORLD
cores = comm.gather(len(os.sched_getaffinity(0)))
if comm.rank == 0:
    print(comm.size, min(cores) == len(os.sched_getaffinity(0)), flush=True)
"""

# what the libraries say, and then their mpirun --version
VERSIONS = [
    (
        "Open MPI v4.1.8, package: Open MPI user@localhost Distribution, ident: 4.1.8, "
        "repo rev: v4.1.8, Feb 04, 2025",
        ("openmpi", "Open MPI 4.1.8"),
    ),
    (
        "Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4, repo rev: v4.1.4, "
        "May 26, 2022",
        ("openmpi", "Open MPI 4.1.4"),
    ),
    (
        "Open MPI v5.0.11, package: Open MPI user@localhost Distribution, ident: "
        "5.0.11, repo rev: v5.0.11rc1, Sep 16, 2026",
        ("openmpi5", "Open MPI 5.0.11"),
    ),
    (
        "Open MPI v5.0.7, package: Debian OpenMPI, ident: 5.0.7, repo rev: v5.0.7, "
        "Feb 14, 2025",
        ("openmpi5", "Open MPI 5.0.7"),
    ),
    (
        "MPICH Version: 5.0.2 MPICH Release date: Fri Sep 25 20:45:26 UTC 2026 "
        "MPICH ABI: 18:2:6",
        ("mpich", "MPICH 5.0.2"),
    ),
    (
        "Intel(R) MPI Library 2021.18.1 for Linux* OS",
        ("intel", "Intel MPI 2021.18.1"),
    ),
    ("mpirun (Open MPI) 4.1.8", ("openmpi", "Open MPI 4.1.8")),
    ("mpirun (Open MPI) 5.0.11", ("openmpi5", "Open MPI 5.0.11")),
    (
        "HYDRA build details:\n    Version:                                 5.0.2",
        ("mpich", "MPICH 5.0.2"),
    ),
    (
        "Intel(R) MPI Library for Linux* OS, Version 2021.18.1 Build 20260626 (id: "
        "b44796a)",
        ("intel", "Intel MPI 2021.18.1"),
    ),
]


@pytest.mark.parametrize(("said", "expected"), VERSIONS)
def test_an_mpi_is_known_by_what_it_says(said: str, expected: tuple[str, str]) -> None:
    printed = in_mpi_environment('mpi_of "$1" && mpi_name "$1"', said)
    assert tuple(printed.splitlines()) == expected


def test_an_mpi_whose_flags_are_not_known_has_no_name() -> None:
    assert in_mpi_environment('mpi_of "$1"', "CRAY MPICH version 8.1.28") == ""


FLAGS = {
    "openmpi": "--oversubscribe --map-by slot --bind-to none"
    " --mca mpi_yield_when_idle 1 --host a:3,b"
    " -x PATH -x OMP_NUM_THREADS -x HVD_SPARSE_X"
    " --mca btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0 --mca pml ob1"
    " --mca btl ^openib --mca btl_vader_single_copy_mechanism none",
    "openmpi5": "--map-by slot:OVERSUBSCRIBE --bind-to none"
    " --mca mpi_yield_when_idle 1 --host a:3,b"
    " -x PATH -x OMP_NUM_THREADS -x HVD_SPARSE_X"
    " --mca btl_tcp_if_include eth0 --prtemca prte_if_include eth0 --mca pml ob1"
    " --mca smsc ^cma",
    "mpich": "-bind-to none -genv MPIR_CVAR_POLLS_BEFORE_YIELD 1 -hosts a:3,b"
    " -iface eth0 -genv FI_TCP_IFACE eth0 -genv UCX_NET_DEVICES eth0",
    "intel": "-genv I_MPI_PIN 0 -ppn 1 -hosts a,a,a,b"
    " -iface eth0 -genv FI_TCP_IFACE eth0",
}


@pytest.mark.parametrize("mpi", FLAGS)
def test_each_mpi_is_told_in_its_own_words(mpi: str) -> None:
    script = (
        "unset ${!HOROVOD_*} ${!HVD_SPARSE_*} ${!NCCL_*}; export HVD_SPARSE_X=1;"
        'MPI=$1; MPI_COMMAND=(); mpi_placement; mpi_yield; mpi_hosts "a:3,b";'
        'mpi_network eth0; echo "${MPI_COMMAND[*]}"'
    )
    assert in_mpi_environment(script, mpi).strip() == FLAGS[mpi]


@needs_mpirun
@pytest.mark.jobs
@pytest.mark.parametrize("python", [sys.executable, *OTHERS])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_start_under_the_mpi_of_their_python(python: str, ranks: int) -> None:
    command = [MPIRUN, "-n", str(ranks), "--python", python, "--command"]
    job = run([*command, python, "-c", RANKS], timeout_s=120)
    assert job.code == 0, job.errors
    assert job.output.split() == [str(ranks), "True"]  # bound to no core
    (said,) = (s for s in job.errors.splitlines() if s.startswith("mpirun.sh: "))
    assert str(Path(python).parent / "mpirun") in str(PROJECT / said.split("(")[1])


@needs_mpirun
@pytest.mark.jobs
@pytest.mark.parametrize("python", [sys.executable, *OTHERS])
def test_ranks_start_where_there_is_no_ssh(python: str, tmp_path: Path) -> None:
    for folder in ("/usr/bin", "/bin"):
        for tool in Path(folder).iterdir():
            if tool.name not in ("ssh", "rsh") and not (tmp_path / tool.name).exists():
                (tmp_path / tool.name).symlink_to(tool)
    done = subprocess.run(
        [MPIRUN, "-n", "2", "--python", python, "--command", python, "-c", RANKS],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "True"]


def test_a_python_that_does_not_run_is_named() -> None:
    done = subprocess.run(
        [MPIRUN, "--python", "/nowhere/python", "train.py"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "there is no /nowhere/python" in done.stderr
