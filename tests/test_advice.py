"""Which settings are warned of: a table of optimizers x densities x sparsifiers."""

import gc
import re
import warnings
from typing import Any

import pytest
import torch

import hvd_sparse.torch as sparse
from hvd_sparse import (
    CAT,
    Affine,
    QualityWarning,
    RandomK,
    SignTopK,
    Stochastic,
    Threshold,
    TopK,
)
from hvd_sparse.advice import Adviser

tf = pytest.importorskip("tensorflow", reason="pip install 'hvd_sparse[tensorflow]'")
import hvd_sparse.tensorflow as sparse_tf  # noqa: E402  # it imports TensorFlow

Weights = list[torch.nn.Parameter]
optim, keras, legacy = torch.optim, tf.keras.optimizers, tf.keras.optimizers.legacy


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
KERAS = {
    "SGD": (lambda k: k.SGD(momentum=0.9), "momentum=0.9", "momentum=0"),
    "RMSprop": (lambda k: k.RMSprop(momentum=0.3), "momentum=0.3", "momentum=0"),
    **{
        name: (lambda k, name=name: getattr(k, name)(), "beta_1=0.9", "beta_1=0")
        for name in ("Adam", "Nadam", "Adamax")
    },
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
GOOD_KERAS = {
    "SGD": lambda k: k.SGD(),
    "RMSprop": lambda k: k.RMSprop(),
    "Adam": lambda k: k.Adam(beta_1=0.0),
    "Nadam": lambda k: k.Nadam(beta_1=0.0),
    "Adamax": lambda k: k.Adamax(beta_1=0.0),
    "Adagrad": lambda k: k.Adagrad(),
}

LATE = [TopK(0.01), TopK(0.09), SignTopK(0.01), RandomK(0.05)]
VERY_LATE = [TopK(0.001), TopK(0.0099), SignTopK(0.001), RandomK(0.005)]
NOT_LATE = [
    TopK(0.1),
    TopK(1.0),
    RandomK(0.5),
    Stochastic(0.01),  # keeps nothing
    # their density is not known before training
    Threshold(0.1),
    SignTopK.alistarh(),
    CAT(TopK(), Affine(1.0, 54.0)),
]


def found_by(optimizer: Any, sparsifier: Any) -> str | None:
    ours = sparse if isinstance(optimizer, optim.Optimizer) else sparse_tf
    return ours.advise(optimizer, sparsifier)


def keras_of(legacy_too: dict[str, Any]) -> list[Any]:
    return [
        pytest.param((k, row), id=f"{k.__name__.rpartition('.')[2]}-{name}")
        for name, row in legacy_too.items()
        for k in (keras, legacy)
    ]


def assert_advised(optimizer: Any, found: str, better: str) -> None:
    for sparsifier in LATE:
        text = found_by(optimizer, sparsifier)
        assert text is not None
        assert f"({found}) with {sparsifier!r}" in text
        assert f"Set {better}: " in text
        assert re.search(r": .*\d %.*\(benchmarks/fidelity.py\)$", text)
    for sparsifier in VERY_LATE:
        text = found_by(optimizer, sparsifier)
        assert text is not None
        assert f"({found}) with {sparsifier!r}" in text
        assert "no setting measured so far" in text
        assert better not in text.replace(found, "")
    for sparsifier in NOT_LATE:
        assert found_by(optimizer, sparsifier) is None


@pytest.mark.parametrize("row", TORCH.values(), ids=TORCH.keys())
def test_momentum_in_pytorch_is_advised_against(row: Any) -> None:
    make, found, better = row
    assert_advised(make(weights()), found, better)


@pytest.mark.parametrize("row", keras_of(KERAS))
def test_momentum_in_keras_is_advised_against(row: Any) -> None:
    kind, (make, found, better) = row
    assert_advised(make(kind), found, better)
    assert_advised(
        tf.keras.mixed_precision.LossScaleOptimizer(make(kind)), found, better
    )


@pytest.mark.parametrize("row", TORCH.values(), ids=TORCH.keys())
def test_what_is_advised_for_pytorch_can_be_written_and_helps(row: Any) -> None:
    make, _, better = row
    cured = type(make(weights()))(weights(), **eval(f"dict({better})"))
    assert sparse.advise(cured, TopK(0.01)) is None


@pytest.mark.parametrize("row", keras_of(KERAS))
def test_what_is_advised_for_keras_can_be_written_and_helps(row: Any) -> None:
    kind, (make, _, better) = row
    cured = type(make(kind))(**eval(f"dict({better})"))
    assert sparse_tf.advise(cured, TopK(0.01)) is None


def test_adamw_of_keras_is_advised_against() -> None:
    assert_advised(keras.AdamW(), "beta_1=0.9", "beta_1=0")


@pytest.mark.parametrize("make", GOOD_TORCH.values(), ids=GOOD_TORCH.keys())
def test_nothing_is_said_of_other_optimizers_of_pytorch(make: Any) -> None:
    optimizer = make(weights())
    assert all(sparse.advise(optimizer, s) is None for s in LATE + VERY_LATE + NOT_LATE)


@pytest.mark.parametrize("row", keras_of(GOOD_KERAS))
def test_nothing_is_said_of_other_optimizers_of_keras(row: Any) -> None:
    kind, make = row
    optimizer = make(kind)
    for sparsifier in LATE + VERY_LATE + NOT_LATE:
        assert sparse_tf.advise(optimizer, sparsifier) is None


@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_nothing_is_said_of_a_hyperparameter_that_is_a_function(name: str) -> None:
    optimizer = getattr(legacy, name)(momentum=lambda: 0.9)
    assert sparse_tf.advise(optimizer, TopK(0.01)) is None


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
    del optimizer
    gc.collect()
    assert adviser._advised() is None
