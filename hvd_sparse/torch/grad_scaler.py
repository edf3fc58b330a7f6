"""A GradScaler beside a distributed optimizer: what goes wrong if nobody looks.

A GradScaler unscales the gradients of its own process, looks for overflows, and calls
the optimizer's step or does not. So the exchange must come before: then every rank sees
the same overflow and skips alike. And the exchange must know the scale, which changes,
or what waits in the residuals was multiplied with another number than what is added.
"""

import sys
from types import FrameType
from typing import Any

import torch

GradScaler = torch.amp.GradScaler

_FRAMES = 8  # between GradScaler.step and the optimizer's: hooks, profiling
_STEPS = (GradScaler.step.__code__, GradScaler._maybe_opt_step.__code__)


def calling_scaler(depth: int) -> GradScaler | None:
    """The GradScaler whose step calls, some frames above `depth`; None without one."""
    frame: FrameType | None = sys._getframe(depth + 1)
    for _ in range(_FRAMES):
        if frame is None:
            break
        # of no other frame: locals that are looked at live on until it returns
        if frame.f_code in _STEPS:
            scaler: GradScaler = frame.f_locals["self"]
            return scaler if scaler.is_enabled() else None
        frame = frame.f_back
    return None


def refuse_before_exchange(depth: int) -> None:
    """Refuse to exchange gradients that a GradScaler has looked at already.

    Raises:
        RuntimeError: GradScaler.step calls, some frames above `depth`.
    """
    if calling_scaler(depth + 1) is not None:
        raise RuntimeError(
            "scaler.step(optimizer) came before the exchange, so that a rank could "
            "skip a step alone: call optimizer.synchronize(), then scaler.unscale_("
            "optimizer), then scaler.step(optimizer) inside `with "
            "optimizer.skip_synchronize():`"
        )


def refuse_unscaled(scaler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Refuse to exchange gradients that a GradScaler has unscaled before.

    Raises:
        RuntimeError: it has, and has looked for overflows of this rank alone.
    """
    if isinstance(scaler, GradScaler) and scaler.is_enabled():
        state = scaler._per_optimizer_states.get(id(optimizer), {})
        if state.get("stage") is not None and state["stage"].name != "READY":
            raise RuntimeError(
                "scaler.unscale_(optimizer) came before optimizer.synchronize(), so "
                "that a rank could skip a step alone: call it after"
            )


def refuse_unknown_scale(depth: int) -> None:
    """Refuse to train on with residuals that do not follow the loss scale.

    Raises:
        RuntimeError: GradScaler.step calls, some frames above `depth`.
    """
    scaler = calling_scaler(depth + 1)
    if scaler is not None and scaler.get_scale() != 1:
        raise RuntimeError(
            f"gradients are multiplied with a loss scale, now {scaler.get_scale():g}, "
            "that residuals must follow: give scaler= the GradScaler when the "
            "optimizer is made distributed"
        )
