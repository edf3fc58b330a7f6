"""A GradScaler over MPI: residuals follow its scale, and all skip a step or none."""

import pytest
import scaled
import torch
from doors import SPARSIFIERS
from mpi4py import MPI
from torch import nn

import hvd_sparse.torch as sparse
from hvd_sparse import ExchangeError, Never, Stochastic, TopK

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.Get_rank(), COMM.Get_size()

several = pytest.mark.skipif(SIZE == 1, reason="needs mpirun -np 2 or more")
keeping = [s for s in SPARSIFIERS if "Stochastic" not in repr(s)]


def world(sparsifier, dense=Never()):  # noqa: B008  # frozen
    def distribute(optimizer, named, scaler):
        optimizer = sparse.DistributedOptimizer(
            optimizer,
            sparsifier,
            named_parameters=named,
            comm=COMM,
            dense=dense,
            timeout_s=30,
            scaler=scaler,
        )
        return optimizer, optimizer.residual_state_dict

    return scaled.World(RANK, SIZE, COMM.allgather, distribute)


@pytest.mark.ranks
@pytest.mark.parametrize("sparsifier", keeping, ids=repr)
def test_a_loss_scale_changes_nothing(sparsifier):
    scaled.assert_the_scale_changes_nothing(world(sparsifier))


@pytest.mark.ranks
@pytest.mark.parametrize("sparsifier", keeping, ids=repr)
def test_a_skipped_step_loses_nothing(sparsifier):
    scaled.assert_a_skipped_step_loses_nothing(world(sparsifier))


def one_parameter(sparsifier=None, **options):
    parameter = nn.Parameter(torch.zeros(40))
    optimizer = sparse.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        sparsifier or TopK(0.1),
        named_parameters=[("w", parameter)],
        comm=COMM,
        **{"dense": Never(), "timeout_s": 30, **options},
    )
    return parameter, optimizer


@pytest.mark.ranks
@pytest.mark.parametrize("given", [True, False], ids=["scaler", "no scaler"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "loop"])
def test_a_step_before_the_exchange_is_refused(given, kind, fused):
    """A rank that meets an overflow would skip it alone."""
    scaler = scaled.make_scaler()
    parameter = nn.Parameter(torch.zeros(40))
    optimizer = sparse.DistributedOptimizer(
        kind([parameter], lr=1.0, fused=fused),
        TopK(0.5),
        comm=COMM,
        scaler=scaler if given else None,
    )
    scaler.scale(parameter.sum()).backward()
    with pytest.raises(RuntimeError, match=r"call optimizer\.synchronize\(\), then"):
        scaler.step(optimizer)


@pytest.mark.ranks
def test_scaled_gradients_without_a_scaler_are_refused():
    parameter, optimizer = one_parameter()
    scaler = scaled.make_scaler()
    scaler.scale(parameter.sum()).backward()
    optimizer.synchronize()
    scaler.unscale_(optimizer)
    message = "a loss scale, now 1024, that residuals must follow: give scaler="
    with (
        optimizer.skip_synchronize(),
        pytest.raises(RuntimeError, match=message),
    ):
        scaler.step(optimizer)


@pytest.mark.ranks
@pytest.mark.filterwarnings("ignore:step.. after synchronize")
def test_scaled_gradients_without_a_scaler_are_refused_after_synchronize_too():
    parameter, optimizer = one_parameter()
    scaler = scaled.make_scaler()
    scaler.scale(parameter.sum()).backward()
    optimizer.synchronize()
    with pytest.raises(RuntimeError, match="that residuals must follow: give scaler="):
        scaler.step(optimizer)


@pytest.mark.ranks
def test_gradients_that_were_unscaled_before_the_exchange_are_refused():
    scaler = scaled.make_scaler()
    parameter, optimizer = one_parameter(scaler=scaler)
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="came before optimizer"):
        optimizer.synchronize()


@pytest.mark.ranks
@pytest.mark.parametrize("options", [{"enabled": False}, {"init_scale": 1.0}], ids=str)
def test_a_scaler_that_scales_nothing_needs_no_word(options):
    parameter, optimizer = one_parameter()
    scaler = scaled.make_scaler(**options)
    scaler.scale(parameter.sum()).backward()
    optimizer.synchronize()
    scaler.unscale_(optimizer)
    with optimizer.skip_synchronize():
        scaler.step(optimizer)
    scaler.update()
    optimizer.close()


@several
@pytest.mark.ranks
def test_ranks_with_different_scales_are_an_error_on_all():
    scaler = scaled.make_scaler(init_scale=2.0 ** (10 + (RANK == SIZE - 1)))
    parameter, optimizer = one_parameter(scaler=scaler)
    scaler.scale(parameter.sum()).backward()
    with pytest.raises(
        ExchangeError, match=r"w: rank \d has configuration .*loss scal"
    ):
        optimizer.synchronize()


@pytest.mark.ranks
@pytest.mark.parametrize("late", [False, True], ids=["sent", "found late"])
def test_an_overflow_in_rows_puts_back_what_others_sent(late):
    """Of an embedding, whose gradients are not among those that are selected."""
    table = nn.Embedding(10, 4, sparse=True)
    parameter = nn.Parameter(torch.zeros(40))
    scaler = scaled.make_scaler()
    optimizer = sparse.DistributedOptimizer(
        torch.optim.SGD([parameter, table.weight], lr=1.0),
        TopK(0.1),
        named_parameters=[("w", parameter), ("table", table.weight)],
        comm=COMM,
        dense=Never(),
        scaler=scaler,
    )
    for step in range(2):
        optimizer.zero_grad()
        loss = parameter.sum()
        if step or not late:
            factor = float("inf") if step and RANK == 0 else 1.0
            loss = loss + (table(torch.tensor([1, 2])) * factor).sum()
        scaler.scale(loss).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
    state = optimizer.residual_state_dict()
    residual = state["tensors"]["w"]["residual"] / state["loss_scale"]
    assert float(residual.sum() - parameter.detach().sum()) == 2 * 40
    optimizer.close()


@pytest.mark.ranks
def test_what_is_no_scaler_is_refused():
    with pytest.raises(TypeError, match=r"scaler must have get_scale\(\), such as"):
        one_parameter(Stochastic(0.1), scaler=1024.0)


@pytest.mark.ranks
@pytest.mark.parametrize("growth_interval", [2, 100])
def test_a_step_that_is_left_out_comes_back_with_undo(growth_interval):
    """What was applied and what waits are all that was not left out."""
    scaler = scaled.make_scaler(growth_interval=growth_interval)
    parameter, optimizer = one_parameter(scaler=scaler, undo=True)
    scaled.leave_out(optimizer, parameter, scaler, bad=(3,))
    state = optimizer.residual_state_dict()
    waiting = state["tensors"]["w"]["residual"] / state["loss_scale"]
    good = sum(torch.arange(40.0) - 17 * step for step in range(6) if step != 3)
    torch.testing.assert_close(waiting - parameter.detach(), good)


@pytest.mark.ranks
def test_a_step_that_is_left_out_is_warned_of_without_undo():
    scaler = scaled.make_scaler()
    parameter, optimizer = one_parameter(scaler=scaler)
    with pytest.warns(UserWarning, match="give undo=True"):
        scaled.leave_out(optimizer, parameter, scaler, bad=(3,))
