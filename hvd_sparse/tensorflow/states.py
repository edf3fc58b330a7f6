"""Residuals as tensors of TensorFlow."""

from typing import Any

import tensorflow as tf


def as_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """The same state with residuals as tf.Tensor; None stays."""
    tensors = {
        name: saved
        if saved["residual"] is None
        else {**saved, "residual": tf.convert_to_tensor(saved["residual"])}
        for name, saved in state["tensors"].items()
    }
    return {**state, "tensors": tensors}
