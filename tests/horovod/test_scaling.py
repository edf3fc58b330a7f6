"""A GradScaler under Horovod: residuals follow its scale, all skip a step or none."""

import horovod.torch as hvd
import pytest
import scaled
import torch
from doors import SPARSIFIERS, Halving
from torch import nn

import hvd_sparse.torch as sparse
from hvd_sparse import Embedded, ExchangeError, Gathered, Never, TopK
from hvd_sparse.torch.horovod import SparseCompressor

keeping = [s for s in SPARSIFIERS if "Stochastic" not in repr(s)]
fixed = [s for s in keeping if getattr(s, "density", None) and s != Halving(0.02)]
CASES = [(s, Gathered()) for s in keeping] + [(s, Embedded()) for s in fixed]


@pytest.fixture(autouse=True)
def alone():
    yield
    hvd.barrier()  # what a test gave up is over before its names are used again


def world(sparsifier, exchange):
    def distribute(optimizer, named, scaler):
        compression = SparseCompressor(
            sparsifier,
            named_parameters=named,
            dense=Never(),
            exchange=exchange,
            timeout_s=60,
            scaler=scaler,
        )
        optimizer = hvd.DistributedOptimizer(
            optimizer, named_parameters=named, compression=compression
        )
        return optimizer, compression.state_dict

    return scaled.World(hvd.rank(), hvd.size(), hvd.allgather_object, distribute)


@pytest.mark.ranks
@pytest.mark.parametrize(("sparsifier", "exchange"), CASES, ids=repr)
def test_a_loss_scale_changes_nothing(sparsifier, exchange):
    scaled.assert_the_scale_changes_nothing(world(sparsifier, exchange))


@pytest.mark.ranks
@pytest.mark.parametrize(("sparsifier", "exchange"), CASES, ids=repr)
def test_a_skipped_step_loses_nothing(sparsifier, exchange):
    scaled.assert_a_skipped_step_loses_nothing(world(sparsifier, exchange))


def one_parameter(optimizer=torch.optim.SGD, dense=Never(), **options):  # noqa: B008
    parameter = nn.Parameter(torch.zeros(40))
    named = [("w", parameter)]
    compression = SparseCompressor(
        TopK(0.1), named_parameters=named, dense=dense, timeout_s=60, **options
    )
    return (
        parameter,
        compression,
        hvd.DistributedOptimizer(
            optimizer([parameter], lr=1.0),
            named_parameters=named,
            compression=compression,
        ),
    )


@pytest.mark.ranks
@pytest.mark.parametrize("given", [True, False], ids=["scaler", "no scaler"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_step_before_the_exchange_is_refused(given, kind):
    """A rank that meets an overflow would skip it alone."""
    scaler = scaled.make_scaler()
    parameter, _, optimizer = one_parameter(kind, scaler=scaler if given else None)
    scaler.scale(parameter.sum()).backward()
    with pytest.raises(RuntimeError, match=r"call optimizer\.synchronize\(\), then"):
        scaler.step(optimizer)


@pytest.mark.ranks
def test_ranks_with_different_scales_are_an_error_on_all():
    last = hvd.rank() == hvd.size() - 1
    scaler = scaled.make_scaler(init_scale=2.0 ** (10 + last))
    parameter, _, optimizer = one_parameter(scaler=scaler)
    scaler.scale(parameter.sum()).backward()
    with pytest.raises(ExchangeError, match="w: rank"):
        optimizer.synchronize()


@pytest.mark.ranks
def test_a_step_that_was_given_up_goes_on_at_another_scale():
    """Its gradient is in the residual, multiplied with the new one."""
    scaler = scaled.make_scaler(growth_interval=1)
    parameter, compression, optimizer = one_parameter(scaler=scaler)
    scaler.scale(parameter.sum()).backward()
    optimizer.synchronize()
    scaler.unscale_(optimizer)
    with optimizer.skip_synchronize():
        scaler.step(optimizer)
    moved, saved = parameter.detach().clone(), optimizer.state_dict()
    optimizer.zero_grad()
    scaler.scale(parameter.sum()).backward()
    optimizer.load_state_dict(saved)  # which gives the step up
    hvd.barrier()  # Horovod has reduced what nobody asks for any more
    scaler.update()
    assert scaler.get_scale() == 2048
    optimizer.zero_grad()
    scaler.scale(parameter.sum()).backward()
    optimizer.synchronize()
    scaler.unscale_(optimizer)
    state = compression.state_dict()
    residual = state["tensors"]["w"]["residual"] / state["loss_scale"]
    assert float(residual.sum() + parameter.grad.sum() - moved.sum()) == 3 * 40


@pytest.mark.ranks
def test_what_is_no_scaler_is_refused():
    with pytest.raises(TypeError, match=r"scaler must have get_scale\(\), such as"):
        sparse.SparseCompressor(TopK(), scaler=1024.0)


@pytest.mark.ranks
@pytest.mark.parametrize("growth_interval", [2, 100])
def test_a_step_that_is_left_out_comes_back_with_undo(growth_interval):
    """What was applied and what waits are all that was not left out."""
    scaler = scaled.make_scaler(growth_interval=growth_interval)
    parameter, compression, optimizer = one_parameter(scaler=scaler, undo=True)
    scaled.leave_out(optimizer, parameter, scaler, bad=(3,))
    state = compression.state_dict()
    waiting = state["tensors"]["w"]["residual"] / state["loss_scale"]
    good = sum(torch.arange(40.0) - 17 * step for step in range(6) if step != 3)
    torch.testing.assert_close(waiting - parameter.detach(), good)


@pytest.mark.ranks
def test_a_step_that_is_left_out_is_warned_of_without_undo():
    scaler = scaled.make_scaler()
    parameter, _, optimizer = one_parameter(scaler=scaler)
    with pytest.warns(UserWarning, match="give undo=True"):
        scaled.leave_out(optimizer, parameter, scaler, bad=(3,))
