"""Residuals as tensors of TensorFlow."""

from typing import Any

import tensorflow as tf

from hvd_sparse.tensorflow.names import Loaded


def as_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """The same state with residuals as tf.Tensor; None stays."""
    tensors = {
        name: saved
        if saved["residual"] is None
        else {**saved, "residual": tf.convert_to_tensor(saved["residual"])}
        for name, saved in state["tensors"].items()
    }
    return {**state, "tensors": tensors}


def complete(loaded: Loaded, here: dict[str, Any]) -> dict[str, Any]:
    """A state that says of what it does not have that nothing of it waits to be sent.

    Variables may have come since it was saved. Not one in common is another model.

    Args:
        loaded: what was saved, with the names of here.
        here: the state as it is.

    Raises:
        ValueError: the state is of another model.
    """
    saved = loaded.state["tensors"]
    now = {name: here["tensors"].get(name) for name in loaded.here}
    sent = [name for name, tensor in now.items() if tensor is not None]
    absent = [name for name in sent if name not in saved]
    if saved and absent and len(absent) == len(sent):
        raise ValueError(
            f"state has no tensor {absent[0]!r}, nor any other of this model; it has "
            f"{', '.join(map(repr, saved))}"
        )
    none = {"step": 0, "residual": None, "chosen": 0}
    started = {name: {**now[name], **none} for name in absent}
    return {**loaded.state, "tensors": {**saved, **started}}
