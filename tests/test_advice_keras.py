"""The same of Keras: Keras 2 with its legacy optimizers, and Keras 3."""

from typing import Any

import needs
import pytest
from advising import LATE, NOT_LATE, VERY_LATE, assert_advised

from hvd_sparse import TopK

tf = pytest.importorskip("tensorflow", reason=f"needs {needs.TENSORFLOW}")
import hvd_sparse.tensorflow as sparse  # noqa: E402  # it imports TensorFlow

KERAS_3 = str(getattr(tf.keras, "__version__", "2")).startswith("3")
keras_2 = pytest.mark.skipif(KERAS_3, reason=f"needs {needs.KERAS_2}")
keras, legacy = tf.keras.optimizers, tf.keras.optimizers.legacy

# what is found, and what it should be
KERAS = {
    "SGD": (lambda k: k.SGD(momentum=0.9), "momentum=0.9", "momentum=0.0"),
    "RMSprop": (lambda k: k.RMSprop(momentum=0.3), "momentum=0.3", "momentum=0.0"),
    **{
        name: (lambda k, name=name: getattr(k, name)(), "beta_1=0.9", "beta_1=0.0")
        for name in ("Adam", "Nadam", "Adamax")
    },
}
GOOD_KERAS = {
    "SGD": lambda k: k.SGD(),
    "RMSprop": lambda k: k.RMSprop(),
    "Adam": lambda k: k.Adam(beta_1=0.0),
    "Nadam": lambda k: k.Nadam(beta_1=0.0),
    "Adamax": lambda k: k.Adamax(beta_1=0.0),
    "Adagrad": lambda k: k.Adagrad(),
}


def keras_of(rows: dict[str, Any]) -> list[Any]:
    return [
        pytest.param((k, row), id=f"{k.__name__.rpartition('.')[2]}-{name}")
        for name, row in rows.items()
        for k in (keras, legacy)[: 1 if KERAS_3 else 2]
    ]


@pytest.mark.parametrize("row", keras_of(KERAS))
def test_momentum_in_keras_is_advised_against(row: Any) -> None:
    kind, (make, found, better) = row
    assert_advised(sparse.advise, make(kind), found, better)
    assert_advised(
        sparse.advise,
        tf.keras.mixed_precision.LossScaleOptimizer(make(kind)),
        found,
        better,
    )


@pytest.mark.parametrize("row", keras_of(KERAS))
def test_what_is_advised_for_keras_can_be_written_and_helps(row: Any) -> None:
    kind, (make, _, better) = row
    cured = type(make(kind))(**eval(f"dict({better})"))
    assert sparse.advise(cured, TopK(0.01)) is None


def test_adamw_of_keras_is_advised_against() -> None:
    assert_advised(sparse.advise, keras.AdamW(), "beta_1=0.9", "beta_1=0.0")


@pytest.mark.parametrize("row", keras_of(GOOD_KERAS))
def test_nothing_is_said_of_other_optimizers_of_keras(row: Any) -> None:
    kind, make = row
    optimizer = make(kind)
    for sparsifier in LATE + VERY_LATE + NOT_LATE:
        assert sparse.advise(optimizer, sparsifier) is None


@keras_2
@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_nothing_is_said_of_a_hyperparameter_that_is_a_function(name: str) -> None:
    optimizer = getattr(legacy, name)(momentum=lambda: 0.9)
    assert sparse.advise(optimizer, TopK(0.01)) is None
