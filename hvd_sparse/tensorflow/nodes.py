"""Nodes of a graph: Python functions, and the gradients that they are for."""

from collections.abc import Callable, Iterator, Sequence
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


_EXCHANGED = "_exchanged_by_hvd_sparse"  # an attribute of a graph
# graphs of branches and loops, which may use what is around them
_INNER = ("CondBranchFuncGraph", "WhileBodyFuncGraph")


def note_exchanged(owner: object, result: Tensor) -> None:
    """Where a graph is built: `owner` has exchanged when this is there."""
    if not hasattr(result, "numpy"):
        noted = getattr(result.graph, _EXCHANGED, [])
        setattr(result.graph, _EXCHANGED, [*noted, (owner, result)])


def run_after_exchanges(owner: object, run: Callable[[], None]) -> None:
    """Call it now, or in a graph after all that `owner` exchanges before it there.

    TensorFlow does not order the two by itself: a branch of tf.cond waits for nothing
    but what it uses.
    """
    if not tf.inside_function():
        run()
        return
    graph, used = tf.compat.v1.get_default_graph(), []
    while graph is not None:
        noted = getattr(graph, _EXCHANGED, [])
        used += [tf.reshape(result, [-1])[:1] for of, result in noted if of is owner]
        inner = type(graph).__name__ in _INNER
        graph = graph.outer_graph if inner else None

    def run_with(*_: Any) -> None:
        run()

    tf.numpy_function(run_with, used, [])
