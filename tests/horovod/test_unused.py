"""synchronize() and no step, under Horovod: thrown away; other scripts are not."""

import warnings

import horovod.torch as hvd
import pytest
import torch
from torch import nn
from unused import CORRECT, by_closure, skipping, train

from hvd_sparse.torch import (
    Embedded,
    Gathered,
    Never,
    SparseCompressor,
    TopK,
    WhenCheaper,
)

CARRIERS = [Gathered(), Embedded()]


def gradient_of(name, step):
    generator = torch.Generator().manual_seed(1000 * step + hvd.rank() + 10 * ord(name))
    return torch.randn(300, generator=generator)


def trained(script, steps, undo, carrier, density=0.01, bad=(), dense=None, idle=()):
    """Weights and residuals after a run."""
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(300)) for name in "ab"})
    compression = SparseCompressor(
        TopK(density),
        named_parameters=model.items(),
        dense=dense or Never(),
        exchange=carrier,
        timeout_s=60,
        undo=undo,
    )
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.items(),
        compression=compression,
    )
    train(model, optimizer, script, gradient_of, steps, bad, idle)
    saved = compression.state_dict()["tensors"]
    waiting = [t["residual"] for t in saved.values() if not dense]
    return [p.detach() for p in model.values()], waiting


def same(one, other):
    pairs = zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
@pytest.mark.parametrize("name", CORRECT)
def test_scripts_that_use_their_results_are_not_touched(name, carrier):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "synchronize")
        runs = [
            trained(CORRECT[name](), range(6), undo, carrier) for undo in (False, True)
        ]
    same(*runs)


@pytest.mark.parametrize("script", [skipping, by_closure])
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
@pytest.mark.parametrize("density", [0.01, 1.0])
def test_a_step_that_is_left_out_leaves_no_trace(density, carrier, script):
    found = trained(script, range(6), True, carrier, density, bad=[2, 3])
    same(found, trained(script, [0, 1, 4, 5], True, carrier, density))


@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
def test_a_rank_that_has_no_gradient_next_leaves_the_step_out_as_well(carrier):
    idle = [3] if hvd.rank() == hvd.size() - 1 else []
    found = trained(skipping, range(6), True, carrier, bad=[2], idle=idle)
    same(found, trained(skipping, [0, 1, 3, 4, 5], True, carrier, idle=idle))


@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
def test_a_step_that_is_left_out_is_warned_of_once_without_undo(carrier):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(skipping, range(6), False, carrier, bad=[2, 4])
    said = [str(w.message) for w in caught if "no step used" in str(w.message)]
    assert len(said) == 1
    assert "give undo=True" in said[0]


def test_a_step_of_which_all_went_dense_can_be_thrown_away_too():
    found, expected = (
        trained(skipping, steps, True, Gathered(), 1.0, [2, 3], WhenCheaper())
        for steps in (range(6), [0, 1, 4, 5])
    )
    same(found, expected)
