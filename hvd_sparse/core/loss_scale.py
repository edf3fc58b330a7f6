"""Gradients that are multiplied with a loss scale, and residuals that follow it.

Training in 16 bits multiplies the loss, and so every gradient, with a number that
changes: halved when a gradient overflows, doubled after many steps without. What waits
in the residuals was multiplied with the number of its own step. So residuals are
multiplied too, by the ratio; a power of two loses no bit.
"""

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np

from hvd_sparse.core.contracts import Array, Scaler
from hvd_sparse.core.flight import Phase
from hvd_sparse.core.memory import Kept
from hvd_sparse.core.plan import Plan
from hvd_sparse.core.roles import offers


class LossScale:
    """The number that gradients of a path are multiplied with, if they are.

    Attributes:
        overflowed: a result of this step was not finite.
    """

    def __init__(self, ask: Callable[[], float] | None, plan: Plan, kept: Kept) -> None:
        """Args: ask: tells the one of the step to come; None where there is none."""
        self.overflowed = False
        self._ask = ask
        self._plan = plan
        self._kept = kept

    @property
    def is_used(self) -> bool:
        """Whether gradients are multiplied."""
        return self._ask is not None

    def begin(self, waiting: dict[str, dict[str, Any]]) -> None:
        """A step begins: bring all that waits to its scale.

        Args:
            waiting: per name, what was loaded and not used yet.

        Raises:
            ValueError: the scale changed by something else than a power of two.
        """
        if self._ask is None:
            return
        self.put_back()
        self.overflowed = False
        for tensor in self._plan.tensors.values():
            if not tensor.in_flight:
                tensor.flight = None
        scale = self._ask()
        if scale != self._plan.loss_scale:
            self._follow(scale, waiting)

    def _follow(self, scale: float, waiting: dict[str, dict[str, Any]]) -> None:
        factor = ratio(scale, self._plan.loss_scale or scale)
        kept = {name: self._kept.arrays(name) for name in self._kept.memory.residuals}
        multiply(kept, factor)
        for saved in waiting.values():
            if saved["residual"] is not None:
                saved["residual"] = saved["residual"] * factor
            for what, array in saved.get("beside", {}).items():
                saved["beside"] = {**saved["beside"], what: array * factor}
        self._plan.follow(scale)

    def put_back(self) -> None:
        """Where a result overflowed nobody applies the step: all keep what they sent.

        Of a tensor that is flagged the path does so at once; others count already.
        """
        if not self.overflowed:
            return
        for tensor in self._plan.tensors.values():
            flight = tensor.flight
            if flight is not None and flight.phase is Phase.DONE:
                flight.put_back(self._kept.memory)

    def overflow(self) -> None:
        """Some result is not finite: a scaler, if there is one, skips this step."""
        self.overflowed = self.is_used

    def look_at(self, out: Array, bound: float = math.inf) -> None:
        """Note whether a result overflowed.

        Args:
            out: the result.
            bound: of the magnitudes of what it is, before that was scaled.
        """
        if not self.is_used:
            return
        # sums are made before they are scaled, in a dtype as wide as the result's
        possible = not bound * max(self._plan.scale, 1.0) <= _most(out)  # nor is NaN
        if possible and not is_finite(out):
            self.overflowed = True


def scale_of(scaler: Any) -> Callable[[], float] | None:
    """What tells the loss scale of the step to come; None where there is no scaler.

    Raises:
        TypeError: scaler can not be asked.
    """
    if scaler is None:
        return None
    if isinstance(scaler, type) or not offers(scaler, Scaler):
        raise TypeError(
            f"scaler must have get_scale(), such as a GradScaler, got {scaler!r}"
        )
    return lambda: float(scaler.get_scale())


def ratio(new: float, old: float) -> float:
    """new / old, by which residuals are multiplied without losing a bit.

    Raises:
        ValueError: new is no scale, or the ratio is no power of two.
    """
    if not 0 < new < math.inf:
        raise ValueError(f"loss scale must be positive and finite, got {new}")
    if math.frexp(new / old)[0] != 0.5:
        raise ValueError(
            f"loss scale must change by powers of two, which residuals follow exactly, "
            f"got {new} after {old}: give the scaler growth_factor=2.0 and "
            "backoff_factor=0.5"
        )
    return new / old


def multiply(kept: dict[str, list[Array]], factor: float) -> None:
    """Overwrites each with factor times itself, none of them if one would overflow.

    Raises:
        ValueError: an element would not be finite; the text has the tensor.
    """
    for name, arrays in kept.items():
        for array in arrays:
            if largest(array) * factor > _most(array):
                raise ValueError(
                    f"{name}: residual overflows where the loss scale grows by "
                    f"{factor:g}"
                )
    for array in chain.from_iterable(kept.values()):
        array *= factor


def is_finite(array: Array) -> bool:
    """Whether all elements are; without a temporary of its size but in rare cases."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(array.sum())
    if math.isfinite(total):
        return True
    wide = array.astype(np.float64) if isinstance(array, np.ndarray) else array.double()
    return math.isfinite(float(abs(wide).max()))


def largest(array: Array) -> float:
    """The largest magnitude, from both ends: no temporary; 0 of none."""
    if not array.shape[0]:
        return 0.0
    return max(-float(array.min()), float(array.max()))


_MOST = {"float16": 65504.0, "float32": float(np.finfo(np.float32).max)}
_MOST |= {"float64": float(np.finfo(np.float64).max)}
_MOST |= {"bfloat16": (2 - 2**-7) * 2.0**127}


def _most(array: Array) -> float:
    """The largest number of its dtype."""
    return _MOST[str(array.dtype).removeprefix("torch.")]
