"""Ranks in one process, for unit tests: what runs over MPI runs here, without MPI.

`run` starts one thread a rank and gives each a communicator, which every MPI
integration takes as its `comm`: SparseAllreduce, the optimizers and tapes, and what
broadcasts. Names, shapes and configurations are agreed on, errors reach all ranks, and
deadlines hold, as between processes. A test of a training step:

    >>> import numpy as np
    >>> import hvd_sparse.loopback, hvd_sparse.mpi
    >>> def train(comm, steps):  # the middle of what every rank has
    ...     weight, own = np.zeros(4, np.float32), np.float32(comm.rank)
    ...     half = hvd_sparse.TopK(density=0.5)
    ...     options = {"comm": comm, "dense": hvd_sparse.Never()}
    ...     with hvd_sparse.mpi.SparseAllreduce(half, **options) as reduce:
    ...         for _ in range(steps):
    ...             weight -= 0.1 * reduce.allreduce("weight", weight - own)
    ...     return weight
    >>> first, second = hvd_sparse.loopback.run(2, train, 200)
    >>> first.tobytes() == second.tobytes()  # replicas agree bitwise
    True
    >>> first.round(1).tolist()
    [0.5, 0.5, 0.5, 0.5]

The ranks share what a process has once. Random generators: give each its own, seeded by
its rank. The cores: nothing is faster here. TensorFlow's threads: in a graph each rank
waits in one of them, so before anything else give at least the number of ranks to
`tf.config.threading.set_inter_op_parallelism_threads`.
"""

import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from hvd_sparse.core.contracts import ExchangeError
from hvd_sparse.core.interrupts import Uninterrupted
from hvd_sparse.transport.loopback import Job, LoopbackCommunicator, this_rank

Result = TypeVar("Result")


def run(ranks: int, function: Callable[..., Result], *arguments: Any) -> list[Result]:
    """Call function(comm, *arguments) in one thread a rank; their results, in order.

    A rank that waits for one that has returned or raised gets an ExchangeError at once;
    for one that does something else it waits as long as its `timeout_s`. All threads
    have ended when this returns or raises.

    Args:
        ranks: how many, at least 1.
        function: of one rank; `comm.rank` and `comm.size` tell it which.
        arguments: the same objects for every rank.

    Raises:
        ValueError: ranks is not positive.
        BaseException: what the first rank to fail raised; not the ExchangeError that
            its peers got of it.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    job = Job(ranks)
    shared: dict[int, dict[int, Any]] = {}
    comms = [LoopbackCommunicator(rank, job, shared) for rank in range(ranks)]
    results: dict[int, Result] = {}
    errors: list[BaseException] = []  # the first one first

    def live(comm: LoopbackCommunicator) -> None:
        why = "has returned, and takes no part in it"
        this_rank.set(comm)
        try:
            results[comm.rank] = function(comm, *arguments)
        except BaseException as error:
            if sys.version_info >= (3, 11):
                error.add_note(f"on rank {comm.rank} of {ranks}")
            errors.append(error)
            why = f"raised {type(error).__name__}: {error}"
        job.end(comm.rank, why)

    threads = [
        threading.Thread(target=live, args=(comm,), name=f"rank {comm.rank}")
        for comm in comms
    ]
    _run_to_end(threads, job)
    for error in [e for e in errors if not isinstance(e, ExchangeError)] or errors:
        raise error
    return [results[rank] for rank in range(ranks)]


def _run_to_end(threads: list[threading.Thread], job: Job) -> None:
    """Also after Ctrl-C, which ends the waits of all ranks."""
    started = []
    try:
        with Uninterrupted():  # or a thread that has just started may not be known
            for thread in threads:
                thread.start()
                started.append(thread)
        for thread in started:
            thread.join()
    except BaseException as error:
        for rank in range(job.size):
            job.end(rank, f"was ended by {type(error).__name__}")
        for thread in started:
            thread.join()
        raise
