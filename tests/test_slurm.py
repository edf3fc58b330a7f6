"""launch/slurm.sbatch in a Slurm of the test's own, on this machine."""

import contextlib
import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # where Debian has its daemons
DAEMONS = ("munged", "slurmctld", "slurmd")
START_S = 30
JOB_S = 120

ENDED = re.compile(r"\bJobState=(?!PENDING|CONFIGURING|RUNNING|COMPLETING)")

pytestmark = [
    pytest.mark.jobs,
    pytest.mark.skipif(
        not all(shutil.which(daemon, path=PATH) for daemon in (*DAEMONS, "sbatch")),
        reason="needs Slurm: apt-get install slurm-wlm munge",
    ),
]

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
KillWait=2
ReturnToService=2
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=5
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def until(reached: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until reached() holds."""
    limit = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < limit, f"{what}: not within {seconds} s"
        time.sleep(0.1)


class Slurm:
    """A controller and two nodes, all in the foreground, all in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = socket.gethostname().partition(".")[0]
        self.environment = {
            **os.environ,
            "PATH": PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=self.folder,
                host=self.host,
                user=getpass.getuser(),
                ports=free_ports(3),
            )
        )
        here = [f"--socket={self.folder}/munge.socket", f"--key-file={key}"]
        here += [
            f"--{name}-file={self.folder}/munged.{name}" for name in ("pid", "seed")
        ]
        # force: the folder is nobody's but this user's, which is what is wanted here
        self.run_daemon("munged", "--foreground", "--force", *here)
        until((self.folder / "munge.socket").exists, START_S, "munged's socket")
        self.run_daemon("slurmctld", "-D")
        for node in ("node1", "node2"):
            self.run_daemon("slurmd", "-D", "-N", node)
        until(self.is_idle, START_S, "idle nodes")

    def is_idle(self) -> bool:
        return self.ask("sinfo", "--noheader", "--format=%D %t").split() == [
            "2",
            "idle",
        ]

    def run_daemon(self, *command: str) -> None:
        with (self.folder / f"{len(self.daemons)}-{command[0]}.log").open("wb") as log:
            self.daemons.append(
                subprocess.Popen(
                    command, env=self.environment, stdout=log, stderr=subprocess.STDOUT
                )
            )

    def ask(self, *command: str) -> str:
        answer = subprocess.run(
            command,
            cwd=PROJECT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return answer.stdout

    def submit(self, *arguments: str, nodes: int = 2) -> tuple[int, str]:
        """Run launch/slurm.sbatch with two tasks; its status and all it printed."""
        output = self.folder / "job.log"
        tasks = [f"--nodes={nodes}", f"--ntasks-per-node={2 // nodes}"]
        submitted = self.ask(
            *("sbatch", "--parsable", *tasks, f"--output={output}"),
            *("launch/slurm.sbatch", *arguments),
        )
        assert submitted.strip().isdigit(), submitted
        # not sbatch --wait, which looks every ten seconds
        job = ("scontrol", "--oneliner", "show", "job", submitted.strip())
        until(lambda: ENDED.search(self.ask(*job)) is not None, JOB_S, "the job's end")
        ((code, signal),) = re.findall(r"\bExitCode=(\d+):(\d+)", self.ask(*job))
        return int(code) or int(signal), output.read_text()

    def stop(self) -> None:
        self.ask("scancel", "--user", getpass.getuser(), "--signal=KILL", "--full")
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.parametrize("nodes", [1, 2])
def test_two_tasks_are_two_ranks_of_one_job(slurm: Slurm, nodes: int) -> None:
    program = (  # one rank prints: lines of two can cut into each other
        "from mpi4py import MPI; import os; c = MPI.COMM_WORLD;"
        "ranks = c.allgather((c.rank, c.size, os.environ['SLURMD_NODENAME']));"
        "print(*ranks) if c.rank == 0 else None"
    )
    code, output = slurm.submit("-c", program, nodes=nodes)
    assert code == 0, output
    last = "node2" if nodes == 2 else "node1"
    assert f"(0, 2, 'node1') (1, 2, '{last}')" in output.splitlines()


def test_an_example_trains(slurm: Slurm) -> None:
    code, output = slurm.submit("examples/mpi_logistic_regression.py", "--steps", "200")
    assert code == 0, output
    assert "accuracy" in output


def test_the_status_of_a_failed_rank_is_the_jobs(slurm: Slurm) -> None:
    code, output = slurm.submit("-c", "raise SystemExit(3)")
    assert code == 3, output


def test_no_script_is_said_so(slurm: Slurm) -> None:
    code, output = slurm.submit()
    assert code == 2
    assert "which script?" in output
