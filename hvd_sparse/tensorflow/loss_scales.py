"""What a LossScaleOptimizer does to residuals, and what is done about it, over MPI.

What waits in a residual must be in the units of the gradients that come after it, and a
step that is skipped, because a gradient is not finite, must be skipped on every rank:

    wrapped               Keras 2                        Keras 3
    LossScaleOptimizer    its gradients are unscaled     they are scaled: unscaled for
                                                         the exchange, scaled after it
    the optimizer in it   it is reached by the ranks     the same: refused
                          whose gradients are finite:
                          refused, unless the scale
                          is fixed

Where the LossScaleOptimizer is wrapped it decides by what was exchanged, the same on
every rank, and what was sent in a step that it skips is put back.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_sparse.tensorflow.horovod_frames import loss_scale_around

Tensor = Any  # TensorFlow has no types

_SCALED = tf.keras.mixed_precision.LossScaleOptimizer


def skips_steps(optimizer: Any) -> bool:
    """Whether it leaves out a step whose gradients are not finite."""
    return isinstance(optimizer, _SCALED) and bool(getattr(optimizer, "dynamic", True))


def is_finite(arrays: Iterable[Any]) -> bool:
    """As a LossScaleOptimizer asks it."""
    return all(
        bool(np.isfinite(array).all())
        for array in arrays
        if np.issubdtype(array.dtype, np.inexact) or array.dtype.kind == "V"
    )


def refuse_outside(optimizer: Any) -> None:
    """Raises: ValueError: a LossScaleOptimizer around it may skip this rank's step."""
    if skips_steps(loss_scale_around(optimizer)):
        raise ValueError(
            "a LossScaleOptimizer whose scale changes must be inside of "
            "DistributedOptimizer, or a rank would skip a step alone: "
            "DistributedOptimizer(LossScaleOptimizer(optimizer), ...), also where "
            "model.compile would add one"
        )


def check_scale(optimizer: Any) -> None:
    """Raises: ValueError: to unscale gradients would round them; of Keras 3."""
    scale = getattr(optimizer, "initial_scale", 1.0)
    if isinstance(optimizer, _SCALED) and math.frexp(float(scale))[0] != 0.5:
        raise ValueError(
            f"initial_scale must be a power of 2, such as 2.0**15, got {scale}: "
            "residuals could not follow the scale exactly"
        )


def times(gradients: Iterable[Tensor], factor: Tensor) -> list[Tensor]:
    """Every gradient multiplied; None stays None."""
    return [_times(gradient, factor) for gradient in gradients]


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        values = _times(gradient.values, factor)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    gradient = tf.convert_to_tensor(gradient)
    return gradient * tf.cast(factor, gradient.dtype)
