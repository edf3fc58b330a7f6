"""Ranks in one process, as a user's unit test has them."""

import signal
import subprocess
import sys
import threading
from typing import Any

import needs
import numpy as np
import pytest

from hvd_sparse import ExchangeError, Never, TopK, loopback
from hvd_sparse.mpi import SparseAllreduce, measure

RANKS = [1, 2, 4, 8]
OPTIONS = {"dense": Never(), "timeout_s": 20}


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Any:
    yield
    assert [t for t in threading.enumerate() if t.name.startswith("rank ")] == []


# ------------------------------------------------------------------------------- run


@pytest.mark.parametrize("ranks", RANKS)
def test_results_come_in_the_order_of_the_ranks(ranks: int) -> None:
    found = loopback.run(
        ranks, lambda comm, *given: (comm.rank, comm.size, given), 1, 2
    )
    assert found == [(rank, ranks, (1, 2)) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [0, -1])
def test_there_is_at_least_one_rank(ranks: int) -> None:
    with pytest.raises(ValueError, match=f"ranks must be at least 1, got {ranks}"):
        loopback.run(ranks, lambda comm: None)


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_what_is_raised_is_the_cause_and_peers_are_told_of_it(ranks: int) -> None:
    told = {}

    def fail(comm: Any) -> None:
        reduce = SparseAllreduce(TopK(0.5), comm=comm, timeout_s=600)
        reduce.allreduce("w", np.ones(8, np.float32))
        if comm.rank == ranks - 1:
            raise ZeroDivisionError("in its loss")
        try:
            reduce.allreduce("w", np.ones(8, np.float32))
        except ExchangeError as error:
            told[comm.rank] = str(error)
            raise

    with pytest.raises(ZeroDivisionError, match="in its loss"):
        loopback.run(ranks, fail)
    said = f"w: rank {ranks - 1} raised ZeroDivisionError: in its loss"
    assert told == dict.fromkeys(range(ranks - 1), said)


def test_a_gradient_that_is_refused_is_told_to_the_peers_by_the_protocol() -> None:
    def refused(comm: Any) -> None:
        gradient = np.ones(8, np.int32 if comm.rank == 1 else np.float32)
        SparseAllreduce(TopK(0.5), comm=comm, **OPTIONS).allreduce("w", gradient)

    with pytest.raises(TypeError, match="w: gradient must be one of"):
        loopback.run(3, refused)


def test_a_rank_that_has_returned_is_not_waited_for() -> None:
    def leave(comm: Any) -> None:
        if comm.rank == 0:
            SparseAllreduce(TopK(0.5), comm=comm, timeout_s=600)

    with pytest.raises(ExchangeError, match="rank 1 has returned"):
        loopback.run(2, leave)


def test_ctrl_c_ends_all_ranks() -> None:
    def wait(comm: Any) -> None:
        if comm.rank == 0:
            SparseAllreduce(TopK(0.5), comm=comm, timeout_s=600)
        else:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert ended.wait(20)

    ended = threading.Event()
    handler = signal.getsignal(signal.SIGINT)

    def interrupt(*arguments: Any) -> None:
        ended.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            loopback.run(2, wait)
    finally:
        signal.signal(signal.SIGINT, handler)


def test_neither_mpi_nor_a_hook_of_the_process_is_needed() -> None:
    program = """
import sys
sys.modules["mpi4py"] = None
hook = sys.excepthook
import numpy as np
from hvd_sparse import ExchangeError, TopK, loopback
from hvd_sparse.mpi import SparseAllreduce

def leave(comm):
    reduce = SparseAllreduce(TopK(0.5), comm=comm)
    if comm.rank == 0:
        reduce.allreduce("w", np.ones(8, np.float32))

try:
    loopback.run(2, leave)
except ExchangeError:
    assert sys.excepthook is hook
    print("ended")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr


def test_a_cost_is_measured_alike_on_all_ranks() -> None:
    first, second = loopback.run(2, lambda comm: measure(comm, sizes=(64, 4096)))
    assert first == second


# -------------------------------------------------------------------------- frameworks


def _train_torch(comm: Any) -> bytes:
    import torch

    import hvd_sparse.torch as sparse

    own = torch.Generator().manual_seed(comm.rank)
    model = torch.nn.Linear(16, 4)
    torch.nn.init.normal_(model.weight, generator=own)
    sparse.broadcast_parameters(model.state_dict(), comm=comm)
    optimizer = sparse.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        TopK(0.1),
        named_parameters=model.named_parameters(),
        comm=comm,
        **OPTIONS,
    )
    sparse.broadcast_optimizer_state(optimizer, comm=comm)
    for _ in range(5):
        model(torch.randn(8, 16, generator=own)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters())


def _train_tape(comm: Any) -> bytes:
    import tensorflow as tf

    import hvd_sparse.tensorflow as sparse

    variable = tf.Variable(np.full(16, comm.rank, np.float32))
    sparse.broadcast_variables([variable], comm=comm)
    for step in range(5):  # made anew, these share what they keep
        tape = sparse.DistributedGradientTape(
            tf.GradientTape(), TopK(0.1), comm=comm, **OPTIONS
        )
        with tape:
            loss = tf.reduce_sum(variable * tf.range(16.0) * (step + comm.rank))
        variable.assign_sub(tape.gradient(loss, variable))
    tape.close()
    return variable.numpy().tobytes()


def _train_keras(comm: Any) -> bytes:
    import tensorflow as tf

    import hvd_sparse.tensorflow as sparse

    variable = tf.Variable(np.zeros(16, np.float32))
    optimizer = sparse.DistributedOptimizer(
        tf.keras.optimizers.SGD(0.1), TopK(0.1), comm=comm, **OPTIONS
    )
    for _ in range(5):
        optimizer.apply_gradients([(tf.range(16.0) * (1 + comm.rank), variable)])
    optimizer.close()
    return variable.numpy().tobytes()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("framework", "train"),
    [
        ("torch", _train_torch),
        ("tensorflow", _train_tape),
        ("tensorflow", _train_keras),
    ],
    ids=["torch", "tape", "keras"],
)
def test_a_training_runs_and_replicas_agree_bitwise(
    framework: str, train: Any, ranks: int
) -> None:
    pytest.importorskip(framework, reason=f"needs {needs.FRAMEWORKS[framework]}")
    found = loopback.run(ranks, train)
    assert found == [found[0]] * ranks
