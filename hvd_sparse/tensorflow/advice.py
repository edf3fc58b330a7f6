"""Where Keras's optimizers have momentum: of Keras 2, also the legacy ones, and 3."""

from typing import Any

import tensorflow as tf

from hvd_sparse.advice import ADAM, SGD, Momentum, advice
from hvd_sparse.core.contracts import Sparsifier


def _classes(*names: str) -> tuple[type, ...]:
    places = (tf.keras.optimizers, tf.keras.optimizers.legacy)
    found = (getattr(place, name, None) for place in places for name in names)
    return tuple(kind for kind in found if kind is not None)


_BETA_1 = _classes("Adam", "AdamW", "Nadam", "Adamax")
_MOMENTUM = _classes("SGD", "RMSprop")


def advise(optimizer: Any, sparsifier: Sparsifier) -> str | None:
    """What of an optimizer spoils sparse training, and the line that cures it.

    Args:
        optimizer: Keras's SGD, RMSprop, Adam, AdamW, Nadam or Adamax, also inside of a
            LossScaleOptimizer; of others nothing was measured, and nothing is said.
        sparsifier: what is given to the integration; TopK, SignTopK or RandomK.

    Returns:
        One paragraph, the same that is warned of at the first step; None where nothing
        is known to spoil the quality.
    """
    return advice(_momentum(optimizer), sparsifier)


def _momentum(optimizer: Any) -> Momentum | None:
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    kind = type(optimizer).__name__
    if isinstance(optimizer, _BETA_1):
        beta_1 = _number(optimizer, "beta_1")
        if beta_1 > 0:
            return Momentum(kind, f"beta_1={beta_1:g}", "beta_1=0.0", ADAM)
    elif isinstance(optimizer, _MOMENTUM):
        momentum = _number(optimizer, "momentum")
        if momentum > 0:
            return Momentum(kind, f"momentum={momentum:g}", "momentum=0.0", SGD)
    return None


def _number(optimizer: Any, name: str) -> float:
    """A hyperparameter; 0, of which nothing is said, where it can not be known.

    That is in a session of TensorFlow 1, and where it is a function or a tensor.
    Legacy optimizers make variables of theirs when one is read, in whatever graph that
    is: it is looked up where they keep it.
    """
    kept = vars(optimizer).get("_hyper", {})
    value = kept[name] if name in kept else getattr(optimizer, name)
    if isinstance(value, float | int):
        return float(value)
    if not isinstance(value, tf.Variable):
        return 0.0
    with tf.init_scope():  # out of the graph that is traced
        return float(value.numpy()) if tf.executing_eagerly() else 0.0
