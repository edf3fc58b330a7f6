"""A step fails whole, wherever a rank raises in it: PyTorch over plain MPI."""

import numpy as np
import pytest
import torch
from mpi4py import MPI
from stages import STAGES
from torch import nn

import hvd_sparse.torch as sparse
from hvd_sparse import ExchangeError, Never, SignTopK

COMM = MPI.COMM_WORLD
LAST = COMM.size - 1
IS_LAST = COMM.rank == LAST

pytestmark = pytest.mark.ranks


class Job:
    """A model in training."""

    def __init__(self, sparsifier):
        torch.manual_seed(0)
        layers = nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 3)
        self.model = nn.Sequential(*layers)
        self.optimizer = sparse.DistributedOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=0.1),
            sparsifier,
            named_parameters=self.model.named_parameters(),
            comm=COMM,
            dense=Never(),
            timeout_s=60,
        )

    def loss(self, step):
        rng = np.random.default_rng([COMM.rank, step])
        x = torch.from_numpy(rng.standard_normal((16, 6)).astype(np.float32))
        return self.model(x).square().sum(1).mean()

    def train(self, step):
        self.optimizer.zero_grad()
        self.loss(step).backward()
        self.optimizer.step()

    def added(self, step):
        """Residuals with the gradients of a step."""
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(self.loss(step), parameters)
        return {
            name: self.residuals[name] + gradient
            for name, gradient in zip(names, gradients, strict=True)
        }

    @property
    def tensors(self):
        return self.optimizer.residual_state_dict()["tensors"]

    @property
    def residuals(self):
        return {name: tensor["residual"] for name, tensor in self.tensors.items()}

    @property
    def steps(self):
        """Of all ranks' tensors."""
        own = {tensor["step"] for tensor in self.tensors.values()}
        return set().union(*COMM.allgather(own))

    @property
    def weights(self):
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_that_raises_is_heard_by_all_and_nothing_is_lost(stage):
    prepare, sparsifier, raised, told = STAGES[stage]
    job = Job(sparsifier)
    job.train(0)
    weights = job.weights
    expected = job.added(1)
    if stage == "admit" and IS_LAST:  # nothing of the bucket was accumulated
        expected = job.residuals
    with pytest.MonkeyPatch.context() as patch:
        if IS_LAST:
            prepare(patch, "0.bias")
        error = raised if IS_LAST else ExchangeError
        text = None if IS_LAST else f"rank {LAST} raised {told}"
        with pytest.raises(error, match=text):
            job.train(1)
    for name, residual in job.residuals.items():
        # (v - s) + s is v but for a rounding of the larger of them
        rounded = isinstance(sparsifier, SignTopK)
        atol = 3e-7 * float(expected[name].abs().max()) if rounded else 0.0
        torch.testing.assert_close(residual, expected[name], rtol=0, atol=atol)
    assert torch.equal(job.weights, weights)
    assert job.steps == {1}
    job.train(2)
    assert job.steps == {2}
    assert len(set(COMM.allgather(job.weights.numpy().tobytes()))) == 1
    job.optimizer.close()
