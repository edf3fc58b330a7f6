"""What callers know and do not say: for whom Horovod compresses, of which variables.

Horovod calls `compress` with a gradient and nothing else, and a gradient of TensorFlow
does not know its variable. Its own functions, which call, have both, so their frames
are read: those of this thread and no other, since walking those of others crashes
CPython 3.11 now and then, and only while Horovod traces a graph. What the graph then
runs with, which may be another variable, it says itself (see `names`).

Of Horovod 0.28.1, between compress and its caller, under AutoGraph tf__...:

    allreduce, grouped_allreduce           tensor or tensors, op, process_set, name
    allreduce_grads                        grads, vars
    compute_gradients and the like         self, an optimizer with _allreduce_grads

Over plain MPI two things are found the same way: the LossScaleOptimizer that calls the
optimizer inside it, and that it is for a file or a copy that Keras asks for a
configuration.

Of frames of other names nothing is read: a frame whose locals are looked at keeps all
of them alive until it returns, and users' frames hold models and data.
"""

import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

import tensorflow as tf

Tensor = Any  # tf.Tensor: TensorFlow has no types

_KERAS = (tf.keras.optimizers.Optimizer, tf.keras.optimizers.legacy.Optimizer)
_OPTIMIZERS = (*_KERAS, tf.compat.v1.train.Optimizer)
_SCALED = tf.keras.mixed_precision.LossScaleOptimizer
_ALLREDUCE = {"allreduce", "grouped_allreduce"}
_APPLY = {"apply", "apply_gradients", "_apply_gradients"}
_SAVE = {"save_model", "save_model_to_hdf5", "model_metadata"}
_HUSHED = {"_trackable_children"}  # asks too, and lets no warning out
_SERIALIZE = {"serialize_keras_object"}
_METHODS = {"compute_gradients", "_compute_gradients", "get_gradients"}


class Call(NamedTuple):
    """A call of compress.

    Attributes:
        arguments: of the function of Horovod that calls, as far as they are found.
        gradients: that leave together; None in place of those that do not exist.
        variables: or tensors, one for each; None where nobody says so.
        optimizer: of Keras or version 1, made by Horovod; None for a tape.
        loss_scale: the LossScaleOptimizer around it, if any.
    """

    arguments: dict[str, Any]
    gradients: Sequence[Tensor]
    variables: Sequence[Any] | None
    optimizer: Any
    loss_scale: Any

    def place(self, gradient: Tensor) -> int:
        """Where it is among the gradients."""
        return next(p for p, other in enumerate(self.gradients) if other is gradient)


def call_of(compressor: object, gradient: Tensor) -> Call:
    """The call of `compress(gradient)` that the caller of this function is in."""
    arguments: dict[str, Any] = {}
    gradients: Sequence[Tensor] = []
    variables: Sequence[Any] | None = None
    optimizer = loss_scale = None
    for name, frame in _frames(2):
        if name in _ALLREDUCE and not arguments:
            local = frame.f_locals
            found = local.get("compression") is compressor and "op" in local
            arguments = dict(local) if found else {}
        elif name == "allreduce_grads" and variables is None:
            grads, sources = frame.f_locals.get("grads"), frame.f_locals.get("vars")
            if grads is not None and any(g is gradient for g in grads) and sources:
                gradients, variables = list(grads), list(sources)
        elif name in _METHODS:
            owner = frame.f_locals.get("self")
            if optimizer is None:
                made = isinstance(owner, _OPTIMIZERS)
                made = made and hasattr(owner, "_allreduce_grads")
                optimizer = owner if made else None
            elif isinstance(owner, _SCALED) and owner is not optimizer:
                loss_scale = loss_scale or owner
    return Call(arguments, gradients, variables, optimizer, loss_scale)


def optimizer_in_the_making() -> Any:
    """The optimizer in whose __init__ the caller is; None for a tape."""
    for name, frame in _frames(2):
        if name == "__init__":
            owner = frame.f_locals.get("self")
            if isinstance(owner, _OPTIMIZERS):
                return owner
            if isinstance(owner, tf.GradientTape):
                return None
    return None


def loss_scale_around(optimizer: Any) -> Any:
    """The LossScaleOptimizer that applies gradients by this optimizer, or None."""
    for name, frame in _frames(1):
        if name in _APPLY:
            owner = frame.f_locals.get("self")
            if isinstance(owner, _SCALED) and owner is not optimizer:
                return owner
    return None


def is_saving() -> bool:
    """Whether Keras saves a model in this thread, in any of its formats."""
    names = {name for name, _ in _frames(1)}
    return bool(names & _SAVE) and not names & _HUSHED


def is_serializing() -> bool:
    """Whether Keras makes a description in this thread, for a file or for a copy."""
    return any(name in _SERIALIZE for name, _ in _frames(1))


def _frames(depth: int) -> Iterator[tuple[str, FrameType]]:
    """From the one that is `depth` above this function's caller on, outwards."""
    frame: FrameType | None = sys._getframe(depth + 1)
    while frame is not None:
        yield frame.f_code.co_name.removeprefix("tf__"), frame
        frame = frame.f_back
