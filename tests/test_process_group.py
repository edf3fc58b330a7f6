"""torch.distributed, without MPI: errors everywhere, hangs nowhere.

These start processes themselves, because the whole job ends.
"""

import re
import sys
from pathlib import Path

import pytest
from launching import START_S, Ended, launch_without, run

from hvd_sparse.transport.mpi.communicator import LAUNCHER_VARIABLES

EXAMPLE = Path(__file__).parents[1] / "examples" / "ddp.py"
DEADLINE_S = 5  # what the program gives its peers

pytestmark = pytest.mark.jobs


def fault(kind: str, folder: Path, timeout_s: float = DEADLINE_S + START_S) -> Ended:
    store = str(folder / "store")
    return launch_without("faults.py", kind, store, ranks=2, timeout_s=timeout_s)


def test_a_paused_rank_is_an_error_within_the_deadline(tmp_path: Path) -> None:
    job = fault("pause", tmp_path)
    assert job.code != 0
    assert "rank 0: ExchangeError: layer: step 1: rank 0 gave up after 5" in job.errors
    assert "did not notice" not in job.errors
    assert "terminate called" not in job.errors


@pytest.mark.parametrize("kind", ["kill", "absent"])
def test_a_rank_that_is_gone_is_an_error_at_once(kind: str, tmp_path: Path) -> None:
    job = fault(kind, tmp_path, timeout_s=START_S)
    assert job.code != 0
    assert "rank 0: ExchangeError: layer: a peer is gone" in job.errors
    assert "did not notice" not in job.errors
    assert "terminate called" not in job.errors


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("raise", "ZeroDivisionError: in the loss of this rank"),
        ("interrupt", "KeyboardInterrupt"),
        ("between", "ZeroDivisionError: between start and finish"),
        ("several", "ZeroDivisionError: while it holds six exchanges"),
    ],
)
def test_a_rank_that_raises_is_heard_by_its_peers(
    kind: str, error: str, tmp_path: Path
) -> None:
    job = fault(kind, tmp_path)
    assert job.code != 0
    assert f"rank 0: ExchangeError: layer: rank 1 raised {error}" in job.errors
    assert "terminate called" not in job.errors


def test_a_rank_that_makes_no_exchange_is_an_error_within_the_deadline(
    tmp_path: Path,
) -> None:
    job = fault("construct", tmp_path)
    assert job.code != 0
    assert "ExchangeError: rank 0 gave up after 5" in job.errors
    assert "a peer did not make its exchange" in job.errors
    assert "terminate called" not in job.errors


def test_a_job_that_goes_on_with_another_exchange_ends_well(tmp_path: Path) -> None:
    job = fault("recover", tmp_path)
    assert "rank 0: ExchangeError: layer: step 1: rank 0 gave up after 5" in job.errors
    assert "rank 0: recovered: 10" in job.errors
    assert job.code == 0, job.errors


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("pause", r"step \d+: rank 0 gave up after 5"),
        ("group", "a peer is gone, or did not arrive in time"),
        ("kill", "a peer is gone"),
        ("absent", "a peer is gone"),
        ("raise", "rank 1 raised ZeroDivisionError: in the backward pass"),
        ("select", "rank 1 raised MemoryError: in a sparsifier"),
        ("differ", r"TopK\(density=0\.2\)"),
    ],
)
def test_under_ddp_what_goes_wrong_in_a_step_is_an_error(
    kind: str, told: str, tmp_path: Path
) -> None:
    job = launch_without(
        "ddp_faults.py",
        kind,
        str(tmp_path / "store"),
        ranks=2,
        timeout_s=DEADLINE_S + START_S,
    )
    assert job.code != 0
    assert re.search(rf"rank 0: ExchangeError: .*{told}", job.errors), job.errors
    assert "did not notice" not in job.errors
    assert "terminate called" not in job.errors


def test_under_ddp_a_rank_that_raises_does_not_wait_for_its_peers_to_leave(
    tmp_path: Path,
) -> None:
    """Of which one is stopped; a bucket is on its way, for the 60 s of the deadline."""
    store = str(tmp_path / "store")
    job = launch_without("ddp_faults.py", "leave", store, ranks=2, timeout_s=START_S)
    assert job.code != 0
    assert "ZeroDivisionError: in the backward pass" in job.errors
    assert "terminate called" not in job.errors


STEP = """
import sys, tempfile, torch, torch.distributed as dist
import hvd_sparse.torch as sparse

def step(**comm):
    model = torch.nn.Linear(3, 2)
    optimizer = sparse.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), sparse.TopK(density=0.5),
        named_parameters=model.named_parameters(), **comm
    )
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()

def start():
    store = f"file://{tempfile.mkdtemp()}/store"
    dist.init_process_group("gloo", store, rank=0, world_size=1)
"""


def python(program: str, **variables: str) -> Ended:
    """Runs it in a process that no launcher of MPI has started."""
    given = [f"{name}={value}" for name, value in variables.items()]
    without = [part for name in LAUNCHER_VARIABLES for part in ("-u", name)]
    command = ["env", *without, *given, sys.executable, "-c", STEP + program]
    return run(command, START_S)


@pytest.mark.parametrize("comm", ["", "comm=dist.group.WORLD"])
def test_neither_mpi_nor_horovod_is_imported(comm: str) -> None:
    loaded = 'assert not {"mpi4py", "horovod"} & {*sys.modules}'
    job = python(f"start(); step({comm}); {loaded}")
    assert job.code == 0, job.errors


def test_a_rank_of_torchrun_does_not_train_alone() -> None:
    job = python("step()", TORCHELASTIC_RUN_ID="any", WORLD_SIZE="2", RANK="0")
    assert "ValueError: torch.distributed must be initialized, by init" in job.errors
    alone = python("step()", TORCHELASTIC_RUN_ID="any", WORLD_SIZE="1", RANK="0")
    assert alone.code == 0, alone.errors  # as MPI's one rank


def test_the_example_trains_under_torchrun() -> None:
    torchrun = str(Path(sys.executable).parent / "torchrun")
    job = run(
        [torchrun, "--nproc-per-node", "2", str(EXAMPLE), "--steps", "10"], 4 * START_S
    )
    assert job.code == 0, job.errors
    found = re.search(r"compression ratio +([\d.]+)", job.output)
    assert found, job.output
    assert float(found[1]) > 40
