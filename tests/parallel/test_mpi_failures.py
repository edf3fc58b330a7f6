"""A step fails whole, wherever a rank raises in it: NumPy over plain MPI."""

import numpy as np
import pytest
from mpi4py import MPI
from stages import DAMAGES, STAGES, damage

from hvd_sparse import ExchangeError, Never, PayloadError, SignTopK, TopK
from hvd_sparse.mpi import SparseAllreduce
from hvd_sparse.transport.mpi.exchange import MpiExchange

COMM = MPI.COMM_WORLD
LAST = COMM.size - 1
IS_LAST = COMM.rank == LAST
SIZES = {"first": 300, "middle": 8, "others": 200, "rest": 200}

pytestmark = pytest.mark.ranks


def gradients(step):
    rng = np.random.default_rng([COMM.rank, step])
    return {name: rng.standard_normal(n).astype("f4") for name, n in SIZES.items()}


def residuals(reduce):
    tensors = reduce.state_dict()["tensors"]
    return {name: tensor["residual"] for name, tensor in tensors.items()}


def steps(reduce):
    """Of all ranks' tensors."""
    own = {tensor["step"] for tensor in reduce.state_dict()["tensors"].values()}
    return set().union(*COMM.allgather(own))


def works(reduce, step):
    """It hands back what all ranks have sent, which is missing from the residuals."""
    held = {n: r + gradients(step)[n] for n, r in residuals(reduce).items()}
    means = reduce.grouped_allreduce(gradients(step))
    after = residuals(reduce)
    everyones = COMM.allgather({n: held[n] - after[n] for n in held})
    for name, mean in means.items():
        total = everyones[0][name]
        for others in everyones[1:]:
            total = total + others[name]
        np.testing.assert_array_equal(mean, total * np.float32(1 / COMM.size))


def check(sparsifier, prepare, raised, told, *, refused=False):
    reduce = SparseAllreduce(sparsifier, comm=COMM, dense=Never(), timeout_s=60)
    reduce.grouped_allreduce(gradients(0))
    given = gradients(1)
    expected = residuals(reduce)
    if not (refused and IS_LAST):  # else nothing of the bucket was accumulated
        expected = {name: r + given[name] for name, r in expected.items()}
    with pytest.MonkeyPatch.context() as patch:
        if IS_LAST:
            prepare(patch, "middle")
        error = raised if IS_LAST else ExchangeError
        text = told if error is ExchangeError else None
        with pytest.raises(error, match=text):
            reduce.grouped_allreduce(given)
    rounded = isinstance(sparsifier, SignTopK)
    for name, residual in residuals(reduce).items():
        # (v - s) + s is v but for a rounding of the larger of them
        atol = 3e-7 * np.abs(expected[name]).max() if rounded else 0
        np.testing.assert_allclose(residual, expected[name], 0, atol, err_msg=name)
    assert steps(reduce) == {1}
    reduce.grouped_allreduce(gradients(2)) if rounded else works(reduce, 2)
    assert steps(reduce) == {2}
    reduce.close()


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_that_raises_is_heard_by_all_and_nothing_is_lost(stage):
    prepare, sparsifier, raised, told = STAGES[stage]
    check(
        sparsifier,
        prepare,
        raised,
        f"rank {LAST} raised {told}",
        refused=stage == "admit",
    )


@pytest.mark.skipif(COMM.size == 1, reason="its own payload does not move: mpirun")
@pytest.mark.parametrize("where", DAMAGES)
def test_a_damaged_payload_fails_the_step_of_all_tensors(where):
    spoil, told = DAMAGES[where]
    check(
        TopK(0.05),
        lambda patch, name: damage(patch, MpiExchange, name, spoil),
        PayloadError,
        f"middle: (rank {LAST}: )?.*{told}",
    )
