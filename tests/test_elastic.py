"""Elastic training under Horovod: workers are killed, come, and are taken away.

Each job runs on this machine. Horovod knows it by several names, one a worker, because
it gives up a whole host when a worker of it fails.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import needs
import psutil
import pytest
from launching import PROGRAMS

TIMEOUT_S = 85  # one job; it takes about 15 on two idle cores
LEAVING_S = 10  # for what Horovod has started, once the job has ended
HOSTS = ("localhost", "127.0.0.1", "127.1")

pytestmark = pytest.mark.jobs

horovodrun = shutil.which("horovodrun", path=str(Path(sys.executable).parent))
needs_horovod = pytest.mark.skipif(
    horovodrun is None or importlib.util.find_spec("horovod") is None,
    reason=f"needs {needs.HOROVOD}",
)

TORCH = f"needs {needs.FRAMEWORKS['torch']}"
Fact = dict[str, Any]


class Job:
    """A running job whose hosts can be changed."""

    def __init__(self, folder: Path, *arguments: str, workers: int) -> None:
        self._hosts = folder / "hosts"
        self._facts = folder / "facts"
        self._output = folder / "output"
        self._mark = uuid.uuid4().hex  # in the environment of all that it starts
        self._deadline = time.monotonic() + TIMEOUT_S
        self.set_hosts(HOSTS[:workers])
        script = folder / "hosts.sh"
        script.write_text(f"#!/bin/sh\ncat '{self._hosts}'\n")
        script.chmod(0o755)
        command = [str(horovodrun), "--gloo", "-np", str(workers), "--min-np", "2"]
        command += ["--max-np", "3", "--host-discovery-script", str(script)]
        program = str(PROGRAMS / "elastic_torch.py")
        command += [sys.executable, program, str(self._facts), *arguments]
        environment = {
            **os.environ,
            "HOROVOD_GLOO_TIMEOUT_SECONDS": "10",
            "HVD_SPARSE_JOB": self._mark,
            "OMP_NUM_THREADS": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",  # horovodrun imports TensorFlow
        }
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output
            )

    def set_hosts(self, hosts: tuple[str, ...]) -> None:
        """What Horovod finds when it looks for hosts next, within a second."""
        new = self._hosts.with_suffix(".new")
        new.write_text("".join(f"{host}:1\n" for host in hosts))
        new.replace(self._hosts)  # it never sees half of the file

    @property
    def facts(self) -> list[Fact]:
        text = self._facts.read_text() if self._facts.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_until(self, happened: Callable[[list[Fact]], bool]) -> None:
        while not happened(self.facts):
            if self._process.poll() is not None:
                pytest.fail(f"the job ended too early:\n{self.output[-4000:]}")
            if time.monotonic() > self._deadline:
                pytest.fail(f"the job hangs, {self.facts[-3:]}:\n{self.output[-4000:]}")
            time.sleep(0.05)  # until the next look

    def wait(self) -> int:
        """Its exit code."""
        try:
            return self._process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pytest.fail(f"the job does not end:\n{self.output[-4000:]}")

    def processes(self) -> list[psutil.Process]:
        """All that it started and that still run, in whatever session they are."""
        return [process for process in psutil.process_iter() if self._started(process)]

    def _started(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("HVD_SPARSE_JOB") == self._mark
        except psutil.Error:  # it has ended, or belongs to somebody else
            return False

    def end(self) -> list[str]:
        """Kills what is left behind; returns it."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(self.processes(), timeout=LEAVING_S)
        said = [str(process) for process in left]
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=LEAVING_S)
        self._process.wait()
        return said


@contextmanager
def running(folder: Path, *arguments: str, workers: int = 3) -> Iterator[Job]:
    """A job that leaves no process behind, or the test fails."""
    job = Job(folder, *arguments, workers=workers)
    try:
        yield job
    except BaseException:
        job.end()
        raise
    left = job.end()
    assert not left, f"processes left behind: {left}"


class Ended(NamedTuple):
    """What happened in a job; `entries` per size it had, in turn."""

    code: int
    facts: list[Fact]
    entries: list[list[Fact]]

    def trained_on(self, entered: list[Fact]) -> list[Fact]:
        """The same workers, ten batches later."""
        batch, size = entered[0]["batch"] + 10, entered[0]["size"]
        later = [f for f in self.facts if f["event"] == "trains on"]
        return [f for f in later if (f["batch"], f["size"]) == (batch, size)]


def by_entry(facts: list[Fact]) -> list[list[Fact]]:
    """What workers found when they entered the training function, per size in turn."""
    entered = [fact for fact in facts if fact["event"] == "enters"]
    return [list(group) for _, group in groupby(entered, key=itemgetter("size"))]


def trains_on(changes: int) -> Callable[[list[Fact]], bool]:
    """All workers do, after so many changes of size."""

    def happened(facts: list[Fact]) -> bool:
        entries = by_entry(facts)
        if len(entries) <= changes:
            return False
        entered = entries[changes]
        later = Ended(0, facts, entries).trained_on(entered)
        return len(later) == entered[0]["size"]

    return happened


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Three workers, of which the first one kills itself."""
    with running(tmp_path_factory.mktemp("killed"), "kill", "3,2") as job:
        code, facts = job.wait(), job.facts
    return Ended(code, facts, by_entry(facts))


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Two workers and a newcomer, whose host is taken away again."""
    folder = tmp_path_factory.mktemp("grown")
    with running(folder, "none", "2,3,2", workers=2) as job:
        job.wait_until(trains_on(changes=0))
        job.set_hosts(HOSTS)
        job.wait_until(trains_on(changes=1))
        job.set_hosts(HOSTS[:2])
        code, facts = job.wait(), job.facts
    return Ended(code, facts, by_entry(facts))


@pytest.fixture(params=["killed", "grown"])
def job(request: pytest.FixtureRequest) -> Ended:
    ended: Ended = request.getfixturevalue(request.param)
    return ended


def pids(facts: list[Fact]) -> set[int]:
    return {fact["pid"] for fact in facts}


@needs_horovod
def test_a_killed_worker_leaves_the_others_training_on(killed: Ended) -> None:
    first, fewer = killed.entries
    (death,) = (fact for fact in killed.facts if fact["event"] == "dies")
    assert killed.code == 0
    assert pids(fewer) == pids(first) - {death["pid"]}
    later = killed.trained_on(fewer)
    assert pids(later) == pids(fewer)
    assert all(fact["loss"] < fewer[0]["loss"] for fact in later)


@needs_horovod
def test_a_worker_taken_away_leaves_the_others_training_on(grown: Ended) -> None:
    first, _, fewer = grown.entries
    assert grown.code == 0
    assert pids(fewer) == pids(first)
    assert pids(grown.trained_on(fewer)) == pids(first)


@needs_horovod
def test_residuals_stay_with_their_process(job: Ended) -> None:
    for entered in job.entries[1:]:
        survivors = [fact for fact in entered if "committed" in fact]
        assert len(survivors) == 2
        for fact in survivors:
            assert fact["residuals"] == fact["committed"]
            assert fact["largest"] > 0


@needs_horovod
def test_residuals_stay_with_their_process_whatever_its_rank(killed: Ended) -> None:
    first, fewer = killed.entries
    ranks = {fact["pid"]: fact["rank"] for fact in first}
    for fact in fewer:
        assert fact["rank"] == ranks[fact["pid"]] - 1
        assert fact["residuals"] == fact["committed"]


@needs_horovod
def test_what_was_not_committed_is_undone(killed: Ended) -> None:
    for fact in killed.entries[1]:
        assert fact["batch"] == 10
        assert fact["residuals"] == fact["committed"] != fact["latest"]


@needs_horovod
def test_residuals_are_never_broadcast(job: Ended) -> None:
    for entered in job.entries[1:]:
        assert len({fact["residuals"] for fact in entered}) == entered[0]["size"]


@needs_horovod
def test_a_newcomer_starts_with_zero_residuals_and_rank_0s_steps(grown: Ended) -> None:
    first, more, _ = grown.entries
    (newcomer,) = (fact for fact in more if fact["pid"] not in pids(first))
    (rank_0,) = (fact for fact in more if fact["rank"] == 0)
    assert rank_0["pid"] in pids(first)
    assert newcomer["largest"] == 0
    assert newcomer["steps"] == rank_0["steps"]
    assert set(newcomer["steps"].values()) == {newcomer["batch"]}


@needs_horovod
def test_nothing_is_lost_in_the_first_step_after_a_change(job: Ended) -> None:
    for entered in job.entries:
        for fact in job.trained_on(entered):
            # about ten float32 roundings of numbers below 1
            assert fact["lost"] < 1e-6
    for entered in job.entries[1:]:
        assert max(fact["largest"] for fact in entered) > 1e-3


@needs_horovod
def test_replicas_agree_bitwise_after_every_change(job: Ended) -> None:
    for entered in job.entries:
        for facts in (entered, job.trained_on(entered)):
            assert len(facts) == entered[0]["size"]
            assert len({fact["weights"] for fact in facts}) == 1
            assert all(fact["steps"] == facts[0]["steps"] for fact in facts)


@needs_horovod
def test_a_late_worker_is_waited_for_and_all_train_on(tmp_path: Path) -> None:
    with running(tmp_path, "late", "3") as job:
        assert job.wait() == 0, job.output
        facts = job.facts
        assert "gave up" in job.output
    entered = [fact for fact in facts if fact["event"] == "enters"]
    first, last = entered[:3], entered[-3:]
    assert pids(first) == pids(last) == pids(facts[-3:])
    for fact in last:
        assert fact["batch"] == 5
        assert fact["residuals"] == fact["committed"]
    for fact in facts[-3:]:
        assert fact["event"] == "ends"
        assert fact["batch"] == 15
        assert fact["weights"] == facts[-1]["weights"]


@needs_horovod
def test_a_state_without_the_compressor_is_an_error_that_says_so(
    tmp_path: Path,
) -> None:
    with running(tmp_path, "forget", "3") as job:
        assert job.wait() != 0
        said = "ValueError: the state of hvd.elastic.run must have the SparseCompressor"
        assert said in job.output
        assert "compression=compression" in job.output


def test_residuals_that_rank_0_does_not_know_are_not_lost() -> None:
    torch_elastic = pytest.importorskip("hvd_sparse.torch.elastic", reason=TORCH)
    here = {"shape": (2,), "dtype": "float32", "step": 7, "residual": "kept"}
    there = {**here, "step": 9, "residual": None}
    newcomer = {"known": there}
    own = {"known": here, "unknown": here}
    assert torch_elastic.merged(newcomer, own) == {
        "known": {**here, "step": 9},
        "unknown": {**here, "step": 0},
    }


def test_no_segment_is_shorter_than_one_of_a_negotiation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch_elastic = pytest.importorskip("hvd_sparse.torch.elastic", reason=TORCH)
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    for size in range(1, 100):
        segments = 2 * size
        segment, rest = divmod(4 * torch_elastic.elements_beside(size), segments)
        assert rest == 0
        assert segment >= 8 * -(-17 // segments)
    monkeypatch.delenv("HOROVOD_ELASTIC")
    assert torch_elastic.elements_beside(size) == 2
