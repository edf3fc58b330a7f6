"""Nodes of a graph: Python functions, and the gradients that they are for."""

from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

Tensor = Any  # tf.Tensor: TensorFlow has no types

FLOATING = (tf.float16, tf.bfloat16, tf.float32, tf.float64)


def python_node(function: Any, inputs: list[Tensor], dtype: Any, shape: Any) -> Tensor:
    """A Python function on host memory as a node of the graph."""
    with tf.device("/cpu:0"):
        result = tf.numpy_function(function, inputs, dtype, stateful=True)
    if isinstance(dtype, list):  # several results, of a graph
        for each, its_shape in zip(result, shape, strict=True):
            each.set_shape(its_shape)
    elif not hasattr(result, "numpy"):
        result.set_shape(shape)
    return result


def floating(gradients: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Those that are compressed, each with its place."""
    for place, gradient in enumerate(gradients):
        if isinstance(gradient, tf.Tensor) and gradient.dtype in FLOATING:
            yield place, gradient


def places_of(gradients: Sequence[Tensor]) -> list[int]:
    """Among those that are compressed: by these version 0.1.0 knew them."""
    places = [-1] * len(gradients)
    for count, (place, _) in enumerate(floating(gradients)):
        places[place] = count
    return places
