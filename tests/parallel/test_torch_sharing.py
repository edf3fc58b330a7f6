"""Gradients, parameters and buffers may share memory: results are those of each."""

import pytest
import torch
from mpi4py import MPI
from torch import nn

import hvd_sparse.torch as sparse
from hvd_sparse import Never, TopK, WhenCheaper

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.Get_rank(), COMM.Get_size()
SHAPE, N = (3, 4), 12


def weights(count):
    return [nn.Parameter(torch.zeros(SHAPE)) for _ in range(count)]


def distribute(parameters, density=1.0, dense=Never(), **options):  # noqa: B008
    return sparse.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=1.0),
        TopK(density),
        named_parameters=[(f"p{i}", p) for i, p in enumerate(parameters)],
        comm=COMM,
        dense=dense,
        timeout_s=30,
        **options,
    )


def mean(gradient):
    """Over ranks, in rank order, as the exchange adds."""
    parts = [torch.from_numpy(g) for g in COMM.allgather(gradient.numpy().copy())]
    return sum(parts[1:], parts[0].clone()) * torch.tensor(1 / SIZE)


def numbers(*shape):
    generator = torch.Generator().manual_seed(RANK)
    return torch.randn(*shape, generator=generator)


def one_tensor(parameters):
    parameters[0].grad = parameters[1].grad = parameters[2].grad = numbers(*SHAPE)


def overlapping_views(parameters):
    flat = numbers(N + 8)
    for i, parameter in enumerate(parameters):
        parameter.grad = flat[4 * i : 4 * i + N].view(SHAPE)


def columns_that_overlap(parameters):
    table = numbers(3, 8)
    for i, parameter in enumerate(parameters):
        parameter.grad = table[:, 2 * i : 2 * i + 4]


def stride_0(parameters):
    for i, parameter in enumerate(parameters):
        parameter.grad = numbers(*[(1,), (3, 1), (1, 4)][i]).expand(SHAPE)


def sliding_windows(parameters):
    for parameter in parameters:
        parameter.grad = numbers(8).as_strided(SHAPE, (2, 1))


def views_of_parameters(parameters):
    parameters[0].grad = parameters[0].data
    parameters[1].grad = parameters[2].data
    parameters[2].grad = numbers(*SHAPE)


def interleaved(parameters):
    flat = numbers(3 * N)
    for i, parameter in enumerate(parameters):
        parameter.grad = flat[i::3].view(SHAPE)


SHARING = [
    one_tensor,
    overlapping_views,
    columns_that_overlap,
    stride_0,
    sliding_windows,
    views_of_parameters,
    interleaved,
]


@pytest.mark.ranks
@pytest.mark.parametrize("dense", [Never(), WhenCheaper()], ids=repr)
@pytest.mark.parametrize("share", SHARING)
def test_every_gradient_becomes_its_own_mean(share, dense):
    parameters = weights(3)
    optimizer = distribute(parameters, dense=dense)
    for _ in range(3):
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(numbers(*SHAPE))
        share(parameters)
        values = [p.detach().clone() for p in parameters]
        expected = [mean(p.grad) for p in parameters]
        optimizer.synchronize()
        for parameter, value, gradient in zip(
            parameters, values, expected, strict=True
        ):
            assert torch.equal(parameter.detach(), value)  # nobody wrote into it
            if dense == Never():
                assert torch.equal(parameter.grad, gradient)
            else:  # MPI adds in an order of its own
                torch.testing.assert_close(parameter.grad, gradient)
        with optimizer.skip_synchronize():
            optimizer.step()
    optimizer.close()


@pytest.mark.ranks
@pytest.mark.parametrize("density", [1.0, 0.25])
def test_gradients_that_are_views_of_one_buffer_stay_in_it(density):
    parameters = weights(3)
    flat, table = torch.zeros(2 * N), torch.zeros(3, 9)
    optimizer = distribute(parameters, density)
    for _ in range(3):
        flat.copy_(numbers(2 * N))
        table.copy_(numbers(3, 9))
        parameters[0].grad = flat[:N].view(SHAPE)
        parameters[1].grad = flat[N:].view(SHAPE)
        parameters[2].grad = table[:, 5:]
        before = [p.grad for p in parameters]
        beside = table[:, :5].clone()
        optimizer.synchronize()
        for parameter, gradient in zip(parameters, before, strict=True):
            assert parameter.grad is gradient
        assert torch.equal(torch.cat([p.grad.view(-1) for p in parameters[:2]]), flat)
        assert torch.equal(table[:, :5], beside)
        with optimizer.skip_synchronize():
            optimizer.step()
    optimizer.close()


@pytest.mark.ranks
def test_a_frozen_parameters_gradient_may_be_another_ones():
    a, b = weights(2)
    b.requires_grad_(False)
    optimizer = distribute([a, b])
    for _ in range(2):
        a.grad = b.grad = numbers(*SHAPE)
        expected = mean(a.grad)
        optimizer.synchronize()
        assert torch.equal(a.grad, expected)
        assert torch.equal(b.grad, expected)
    optimizer.close()


@pytest.mark.ranks
def test_two_optimizers_keep_two_residuals_of_one_parameter():
    (w,) = weights(1)
    optimizers = [distribute([w], density) for density in (0.25, 0.5)]
    expected = [torch.zeros(SHAPE), torch.zeros(SHAPE)]
    for step in range(4):
        for i, (optimizer, k) in enumerate(zip(optimizers, (3, 6), strict=True)):
            gradient = numbers(*SHAPE) * (1 + step + i)
            w.grad = gradient.clone()
            optimizer.step()
            expected[i] += gradient
            flat = expected[i].view(-1)
            flat[flat.abs().topk(k).indices] = 0
            state = optimizer.residual_state_dict()["tensors"]["p0"]
            torch.testing.assert_close(state["residual"], expected[i])
    assert len(set(COMM.allgather(w.detach().numpy().tobytes()))) == 1
    for optimizer in optimizers:
        optimizer.close()
