"""A step fails whole, wherever a rank raises in it: TensorFlow over plain MPI."""

import numpy as np
import pytest
import tensorflow as tf
from mpi4py import MPI
from stages import STAGES

import hvd_sparse.tensorflow as sparse
from hvd_sparse import ExchangeError, Never, SignTopK

COMM = MPI.COMM_WORLD
LAST = COMM.size - 1
IS_LAST = COMM.rank == LAST
SIZES = {"first": 300, "middle": 8, "others": 200}

pytestmark = pytest.mark.ranks


class Job:
    """Variables in training, whose gradients are what they are multiplied with."""

    def __init__(self, sparsifier, mode):
        self.tape = sparse.DistributedGradientTape(
            tf.GradientTape(persistent=True),
            sparsifier,
            comm=COMM,
            dense=Never(),
            timeout_s=60,
        )
        self.variables = [tf.Variable(tf.ones(n), name=m) for m, n in SIZES.items()]
        self.step = tf.function(self._step) if mode == "graph" else self._step

    def _step(self, factors):
        with self.tape:
            products = zip(self.variables, factors, strict=True)
            loss = sum(tf.reduce_sum(v * factor) for v, factor in products)
        gradients = self.tape.gradient(loss, self.variables)
        for variable, gradient in zip(self.variables, gradients, strict=True):
            variable.assign_sub(0.1 * gradient)

    def gradients(self, step):
        rng = np.random.default_rng([COMM.rank, step])
        sizes = SIZES.items()
        return {m: rng.standard_normal(n).astype(np.float32) for m, n in sizes}

    def train(self, step):
        self.step([tf.constant(g) for g in self.gradients(step).values()])

    @property
    def tensors(self):
        return self.tape.state_dict()["tensors"]

    @property
    def residuals(self):
        return {n: np.asarray(t["residual"]) for n, t in self.tensors.items()}

    @property
    def steps(self):
        """Of all ranks' tensors."""
        own = {tensor["step"] for tensor in self.tensors.values()}
        return set().union(*COMM.allgather(own))

    @property
    def weights(self):
        return np.concatenate([variable.numpy() for variable in self.variables])


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_that_raises_is_heard_by_all_and_nothing_is_lost(stage, mode):
    prepare, sparsifier, raised, told = STAGES[stage]
    job = Job(sparsifier, mode)
    job.train(0)
    weights, expected = job.weights, job.residuals
    if not (stage == "admit" and IS_LAST):  # else nothing was accumulated
        expected = {n: r + job.gradients(1)[n] for n, r in expected.items()}
    with pytest.MonkeyPatch.context() as patch:
        if IS_LAST:
            prepare(patch, "middle")
        kinds = (raised if IS_LAST else ExchangeError, tf.errors.OpError)
        text = None if IS_LAST else f"rank {LAST} raised {told}"
        with pytest.raises(kinds, match=text):
            job.train(1)
    for name, residual in job.residuals.items():
        # (v - s) + s is v but for a rounding of the larger of them
        rounded = isinstance(sparsifier, SignTopK)
        atol = 3e-7 * np.abs(expected[name]).max() if rounded else 0
        np.testing.assert_allclose(residual, expected[name], 0, atol, err_msg=name)
    np.testing.assert_array_equal(job.weights, weights)
    assert job.steps == {1}
    job.train(2)
    assert job.steps == {2}
    assert len(set(COMM.allgather(job.weights.tobytes()))) == 1
    job.tape.close()
