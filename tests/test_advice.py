"""Which settings are warned of: a table of optimizers x densities x sparsifiers."""

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from advising import LATE, NOT_LATE, VERY_LATE, assert_advised

import hvd_sparse.torch as sparse
from hvd_sparse import QualityWarning, TopK
from hvd_sparse.advice import Adviser

Weights = list[torch.nn.Parameter]
optim = torch.optim


def weights() -> Weights:
    return [torch.nn.Parameter(torch.zeros(3))]


def mixed_groups(weights: Weights) -> Any:
    other = {"params": [torch.nn.Parameter(torch.zeros(2))], "momentum": 0.9}
    return optim.SGD([{"params": weights}, other], lr=0.1)


class Own(optim.Optimizer):
    """Whatever somebody wrote: its momentum may mean anything."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights, {"momentum": 0.9, "betas": (0.9, 0.999)})


class OwnAdam(optim.Adam):
    """A subclass that keeps something else where Adam has its betas."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self.param_groups[0]["betas"] = (0.9, 0.99, 0.999)


# what is found, and what it should be
TORCH = {
    "SGD": (lambda w: optim.SGD(w, momentum=0.9), "momentum=0.9", "momentum=0"),
    "Nesterov": (
        lambda w: optim.SGD(w, momentum=0.5, nesterov=True),
        "momentum=0.5, nesterov=True",
        "momentum=0, nesterov=False",
    ),
    "groups": (mixed_groups, "momentum=0.9", "momentum=0"),
    "RMSprop": (lambda w: optim.RMSprop(w, momentum=0.3), "momentum=0.3", "momentum=0"),
    **{
        name: (getattr(optim, name), "betas=(0.9, 0.999)", "betas=(0.0, 0.999)")
        for name in ("Adam", "AdamW", "NAdam", "Adamax")
    },
    "a list in one group": (
        lambda w: optim.Adam(
            [
                {"params": w},
                {"params": [torch.nn.Parameter(torch.zeros(2))], "betas": [0.95, 0.99]},
            ]
        ),
        "betas=(0.95, 0.99)",
        "betas=(0.0, 0.99)",
    ),
    "a tensor": (
        lambda w: optim.Adam(w, betas=(torch.tensor(0.5), torch.tensor(0.9))),
        "betas=(0.5, 0.9)",
        "betas=(0.0, 0.9)",
    ),
}
GOOD_TORCH = {
    "SGD": lambda w: optim.SGD(w, lr=0.1),
    "RMSprop": optim.RMSprop,
    "Adam": lambda w: optim.Adam(w, betas=(0.0, 0.999)),
    "AdamW": lambda w: optim.AdamW(w, betas=(0.0, 0.999)),
    "NAdam": lambda w: optim.NAdam(w, betas=(0.0, 0.999)),
    "Adamax": lambda w: optim.Adamax(w, betas=(0.0, 0.999)),
    "Adagrad": optim.Adagrad,
    "nobody measured": Own,
    "a subclass of its own kind": OwnAdam,
}


@pytest.mark.parametrize("row", TORCH.values(), ids=TORCH.keys())
def test_momentum_in_pytorch_is_advised_against(row: Any) -> None:
    make, found, better = row
    assert_advised(sparse.advise, make(weights()), found, better)


@pytest.mark.parametrize("row", TORCH.values(), ids=TORCH.keys())
def test_what_is_advised_for_pytorch_can_be_written_and_helps(row: Any) -> None:
    make, _, better = row
    cured = type(make(weights()))(weights(), **eval(f"dict({better})"))
    assert sparse.advise(cured, TopK(0.01)) is None


@pytest.mark.parametrize("make", GOOD_TORCH.values(), ids=GOOD_TORCH.keys())
def test_nothing_is_said_of_other_optimizers_of_pytorch(make: Any) -> None:
    optimizer = make(weights())
    assert all(sparse.advise(optimizer, s) is None for s in LATE + VERY_LATE + NOT_LATE)


def test_each_optimizer_is_warned_of_once_by_the_first_rank() -> None:
    first, second = (optim.Adam(weights()) for _ in range(2))
    adviser, other_rank = (Adviser(sparse.advise, TopK(0.01)) for _ in range(2))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for optimizer in (first, first, second, second):
            adviser.step(optimizer, rank=0, stacklevel=1)
            other_rank.step(optimizer, rank=1, stacklevel=1)
    assert [w.category for w in told] == [QualityWarning] * 2
    assert {str(w.message) for w in told} == {sparse.advise(first, TopK(0.01))}
    assert {w.filename for w in told} == {__file__}


def test_advice_does_not_keep_an_optimizer_alive() -> None:
    adviser = Adviser(sparse.advise, TopK(0.5))
    optimizer = optim.Adam(weights())
    adviser.step(optimizer, rank=0, stacklevel=1)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
