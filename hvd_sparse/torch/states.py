"""Torch tensors as the core sees them, and residuals as torch tensors."""

from typing import Any

import ml_dtypes
import torch

Tensor = torch.Tensor


def viewed(tensor: Tensor) -> Any:
    """A CPU tensor as a numpy array over the same memory; others stay as they are."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if not tensor.is_cpu:
        return tensor
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def as_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """The same state with residuals as torch tensors; None stays."""
    tensors = {
        name: saved
        if saved["residual"] is None
        else {**saved, "residual": torch.as_tensor(saved["residual"])}
        for name, saved in state["tensors"].items()
    }
    return {**state, "tensors": tensors}


def on_host(state: dict[str, Any]) -> dict[str, Any]:
    """The same state with residuals in host memory, wherever they were saved."""
    tensors = {
        name: {**saved, "residual": saved["residual"].cpu()}
        if isinstance(saved["residual"], Tensor)
        else saved
        for name, saved in state["tensors"].items()
    }
    return {**state, "tensors": tensors}
