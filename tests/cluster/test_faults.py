"""Hosts that are cut off, ranks that are paused or killed: on several real hosts.

The hosts are network namespaces (benchmarks/cluster/hosts.py), the launchers are real.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hosts import Cluster, why_not
from launching import PROGRAMS, START_S, needs_horovodrun

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks" / "cluster")
DEADLINE_S = 5  # what the program gives its peers
LATE_S = 4  # seconds that a rank of a busy machine may be late to say so
END_S = 45  # for launchers to find out, and to end all
BEGIN_S = 100  # for a launcher and what it starts to come up: nobody's promise
STEPS = 5  # that show that training goes on

pytestmark = [
    pytest.mark.jobs,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
    # above the sum of a test's own limits: pytest's would leave hosts and ranks behind
    pytest.mark.timeout(900),
]
doors = pytest.mark.parametrize(
    "door", ["mpi", pytest.param("horovod", marks=needs_horovodrun)]
)


def wait_until(
    happened: Callable[[], bool], seconds: float, what: Callable[[], str]
) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s: {what()}")
        time.sleep(0.05)  # until the next look


def namespaces() -> set[str]:
    command = ["ip", "netns", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


class Job:
    """A program on its way on all hosts of a cluster, one rank a host."""

    def __init__(self, cluster: Cluster, folder: Path, command: list[str]) -> None:
        self.cluster, self.folder = cluster, folder
        self._output = folder / "output"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",  # horovodrun imports TensorFlow
            # for ranks to meet, too: hosts that share a core start one after the other.
            # Gloo counts the time in which a whole machine stands still, ranks do not:
            # far more than their deadline, or Horovod's own error comes before it
            "HOROVOD_GLOO_TIMEOUT_SECONDS": "120",
        }
        environment.pop("OMPI_MCA_ess_singleton_isolated", None)
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def _told(self, rank: int) -> list[int]:
        file = self.folder / f"rank-{rank}"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [int(line) for line in lines]

    def pid(self, rank: int) -> int:
        return self._told(rank)[0]

    def steps(self, rank: int) -> int:
        return max(self._told(rank)[1:], default=0)

    def trains_on(self, rank: int = 0) -> None:
        """From here on it does so many more steps."""
        begin = self.steps(rank)
        self.comes_to(
            lambda: self.steps(rank) >= begin + STEPS,
            START_S,
            f"steps after {begin} of rank {rank}",
        )

    def comes_to(self, state: Callable[[], bool], seconds: float, what: str) -> None:
        wait_until(state, seconds, lambda: f"{what}: {self.output[-4000:]}")

    def begins(self) -> None:
        def begun() -> bool:
            if self._process.poll() is not None:
                pytest.fail(f"the job ended before it began: {self.output[-4000:]}")
            return self.steps(0) > 0

        self.comes_to(begun, BEGIN_S, "a first step")

    def pause(self, rank: int) -> None:
        """On return it stands still."""
        os.kill(self.pid(rank), signal.SIGSTOP)
        self.comes_to(lambda: self._state(rank) == "T", START_S, f"pause of {rank}")

    def ended(self, rank: int) -> bool:
        return self._state(rank) in ("", "Z", "X")

    def _state(self, rank: int) -> str:
        """A letter, as in ps; nothing if the process is gone."""
        status = Path("/proc", str(self.pid(rank)), "stat")
        try:
            return status.read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):  # gone before or while read
            return ""

    def wait(self, seconds: float) -> int:
        """The launcher's exit code; nothing is left on any host."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        if self._process.poll() is None:
            pytest.fail(f"the job does not end: {self.output[-4000:]}")
        for host in range(len(self.cluster.addresses)):
            wait_until(
                lambda h=host: not self.cluster.pids(h),
                END_S,
                lambda h=host: f"the end of {self.cluster.pids(h)} on host {h}",
            )
        return self._process.returncode

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def training(door: str, folder: Path, hosts: int = 2) -> Iterator[Job]:
    """Ranks in the middle of their training, one a host."""
    with Cluster(hosts) as cluster:
        program = [sys.executable, str(PROGRAMS / "cluster_faults.py"), door]
        start = cluster.mpirun if door == "mpi" else cluster.horovodrun
        job = Job(cluster, folder, start([*program, str(folder)]))
        try:
            job.begins()
            job.trains_on()
            yield job
        finally:
            job.end()


def gave_up(output: str, rank: int) -> bool:
    """It says so at the deadline, or little later: the machine is shared."""
    found = re.search(rf"rank {rank} gave up after (\d+)", output)
    return found is not None and DEADLINE_S <= int(found[1]) <= DEADLINE_S + LATE_S


@doors
def test_a_link_that_goes_down_is_an_error_on_both_of_its_sides(
    door: str, tmp_path: Path
) -> None:
    with training(door, tmp_path) as job:
        job.cluster.set_link(1, up=False)
        for rank in (0, 1):
            end = f"end of rank {rank}"
            job.comes_to(lambda r=rank: job.ended(r), DEADLINE_S + END_S, end)
        job.cluster.set_link(1, up=True)  # the launcher hears of the other side again
        assert job.wait(END_S) != 0
        assert gave_up(job.output, 0), job.output[-4000:]  # complete only by now


@doors
@pytest.mark.parametrize("hosts", [2, 3])
def test_a_rank_paused_past_the_deadline_is_an_error_on_all_others(
    hosts: int, door: str, tmp_path: Path
) -> None:
    with training(door, tmp_path, hosts) as job:
        job.pause(1)
        others = [rank for rank in range(hosts) if rank != 1]
        for rank in others:
            end = f"end of rank {rank}"
            job.comes_to(lambda r=rank: job.ended(r), DEADLINE_S + END_S, end)
        with contextlib.suppress(ProcessLookupError):  # mpirun has killed it by now
            os.kill(job.pid(1), signal.SIGCONT)
        assert job.wait(END_S) != 0
        for rank in others:
            assert gave_up(job.output, rank), (rank, job.output[-4000:])


@doors
def test_a_rank_paused_and_resumed_in_time_is_waited_for(
    door: str, tmp_path: Path
) -> None:
    with training(door, tmp_path) as job:
        job.pause(1)
        before = job.steps(0)
        pause_ends = time.monotonic() + DEADLINE_S / 2
        job.comes_to(lambda: time.monotonic() > pause_ends, DEADLINE_S, "half of it")
        assert job.steps(0) <= before + 1
        os.kill(job.pid(1), signal.SIGCONT)
        job.trains_on(0)
        job.trains_on(1)
        (tmp_path / "stop").touch()
        assert job.wait(START_S) == 0, job.output
        assert job.output.count("stopped as told") == 2


@doors
def test_a_killed_rank_ends_the_job_within_seconds(door: str, tmp_path: Path) -> None:
    with training(door, tmp_path) as job:
        os.kill(job.pid(1), signal.SIGKILL)
        assert job.wait(START_S) != 0


def elastic(folder: Path, fault: str, sizes: str) -> list[dict]:
    """What workers on three hosts told, of 60 batches."""
    folder.mkdir()
    with Cluster(3) as cluster:
        hosts = folder / "hosts.sh"
        lines = "".join(f"echo {address}:1\n" for address in cluster.addresses)
        hosts.write_text(f"#!/bin/sh\n{lines}")
        hosts.chmod(0o755)
        facts = folder / "facts"
        program = [sys.executable, str(PROGRAMS / "elastic_torch.py"), str(facts)]
        options = ("-np", "3", "--min-np", "2", "--max-np", "3")
        options += ("--host-discovery-script", str(hosts))
        command = cluster.horovodrun([*program, fault, sizes, "60"], *options)
        job = Job(cluster, folder, command)
        try:
            assert job.wait(BEGIN_S + 3 * START_S) == 0, job.output[-4000:]
        finally:
            job.end()
        return [json.loads(line) for line in facts.read_text().splitlines()]


@needs_horovodrun
def test_elastic_training_goes_on_without_the_host_of_a_killed_worker(
    tmp_path: Path,
) -> None:
    undisturbed = elastic(tmp_path / "undisturbed", "none", "3")
    killed = elastic(tmp_path / "killed", "kill", "3,2")
    assert {f["size"] for f in killed} == {2, 3}
    ends = [
        [f for f in facts if f["event"] == "ends"] for facts in (undisturbed, killed)
    ]
    assert [len(workers) for workers in ends] == [3, 2]
    assert {f["batch"] for workers in ends for f in workers} == {60}
    expected, found = (workers[0]["loss"] for workers in ends)
    assert found == pytest.approx(expected, rel=0.1)


def test_nothing_is_left_of_a_cluster() -> None:
    with Cluster(2, mbit=100) as cluster:
        sleeper = subprocess.Popen(cluster.on(1, ["sleep", "600"]))
        what = "a process on host 1"
        wait_until(lambda: bool(cluster.pids(1)), START_S, lambda: what)
        own = set(cluster.namespaces)
        assert own <= namespaces()
    assert sleeper.wait() != 0
    assert not own & namespaces()


def test_nothing_is_left_after_ctrl_c() -> None:
    program = (
        "import signal, subprocess, sys\n"
        # a shell's background jobs ignore it, and so would this
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path.insert(0, {BENCHMARKS!r})\n"
        "from hosts import Cluster\n"
        "with Cluster(2) as cluster:\n"
        "    print(*cluster.namespaces, flush=True)\n"
        "    subprocess.run(cluster.on(1, ['sleep', '600']))\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        own = set(process.stdout.readline().split())
        assert len(own) == 3
        assert own <= namespaces()
        os.killpg(process.pid, signal.SIGINT)  # to all of them, as a terminal does
        assert process.wait(START_S) != 0
    assert not own & namespaces()
