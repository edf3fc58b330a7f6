"""synchronize() and no step, over plain MPI: thrown away; other scripts are not."""

import warnings

import pytest
import torch
import unused
from mpi4py import MPI
from torch import nn
from unused import CORRECT, by_closure, skipping, train

import hvd_sparse.torch as sparse
from hvd_sparse import Never, TopK, WhenCheaper

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size

pytestmark = pytest.mark.ranks


def gradient_of(name, step):
    generator = torch.Generator().manual_seed(1000 * step + RANK + 10 * ord(name))
    return torch.randn(300, generator=generator)


def trained(script, steps, undo, density=0.01, bad=(), dense=None, idle=()):
    """Weights and residuals after a run."""
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(300)) for name in "ab"})
    optimizer = sparse.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        TopK(density),
        named_parameters=model.items(),
        comm=COMM,
        dense=dense or Never(),
        timeout_s=20,
        undo=undo,
    )
    train(model, optimizer, script, gradient_of, steps, bad, idle)
    saved = optimizer.residual_state_dict()["tensors"]
    optimizer.close()
    waiting = [t["residual"] for t in saved.values() if not dense]
    return [p.detach() for p in model.values()], waiting


def same(one, other):
    pairs = zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("name", CORRECT)
@pytest.mark.parametrize("density", [0.01, 1.0])
def test_scripts_that_use_their_results_are_not_touched(name, density):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "synchronize")
        runs = [
            trained(CORRECT[name](), range(6), undo, density) for undo in (False, True)
        ]
    same(*runs)


@pytest.mark.parametrize("script", [skipping, by_closure])
@pytest.mark.parametrize("density", [0.01, 1.0])
def test_a_step_that_is_left_out_leaves_no_trace(density, script):
    steps = [0, 1, 2, 3, 4, 5]
    found = trained(script, steps, undo=True, density=density, bad=[2, 3])
    same(found, trained(script, [0, 1, 4, 5], undo=True, density=density))


def test_a_rank_that_has_no_gradient_next_leaves_the_step_out_as_well():
    idle = [3] if RANK == SIZE - 1 else []
    found = trained(skipping, range(6), undo=True, bad=[2], idle=idle)
    same(found, trained(skipping, [0, 1, 3, 4, 5], undo=True, idle=idle))


def test_a_step_that_is_left_out_is_warned_of_once_without_undo():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(skipping, range(6), undo=False, bad=[2, 4])
    [said] = [w for w in caught if "no step used" in str(w.message)]
    assert "give undo=True" in str(said.message)
    assert said.filename == unused.__file__  # the line of the user that came next


def test_a_step_of_which_all_went_dense_can_be_thrown_away_too():
    found, expected = (
        trained(skipping, steps, True, 1.0, [2, 3], WhenCheaper())
        for steps in (range(6), [0, 1, 4, 5])
    )
    same(found, expected)
