"""What the tests of several doors share; imports no framework."""

import signal
from dataclasses import dataclass
from typing import Any

from hvd_sparse import (
    CAT,
    Affine,
    RandomK,
    Selection,
    SignTopK,
    Stochastic,
    Threshold,
    TopK,
)

AFFINE = Affine(per_byte=1.0, per_message=54.0)


class Interrupted(TopK):
    """Ctrl-C comes as soon as it has selected, when nobody has the selection yet."""

    calls = 0  # of which the second one is interrupted

    def select(self, *arguments: Any, **options: Any) -> Selection:
        """As TopK."""
        selection = super().select(*arguments, **options)
        type(self).calls += 1
        if self.calls == 2:
            signal.raise_signal(signal.SIGINT)
        return selection


@dataclass(frozen=True)
class Halving:
    """A user's `Scheduled`: ten times the density at first, half of it a step later."""

    density: float = 0.01
    inner: type = TopK

    def density_at(self, step: int) -> float:
        """At least the one that is given, at most 1."""
        return min(1.0, max(self.density, self.density * 10 / 2**step))

    def select(self, residual: Any, gradient: Any, k: int, step: int) -> Selection:
        """As the inner sparsifier of this step's density."""
        chosen = self.inner(self.density_at(step))
        return chosen.select(residual, gradient, k, step)


# one of each
SPARSIFIERS = [
    TopK(0.05),
    RandomK(0.1),
    Threshold(0.01),
    SignTopK(0.05),
    SignTopK.alistarh(),
    Stochastic(0.05),
    CAT(TopK(), AFFINE),
    CAT(SignTopK(), AFFINE),
    CAT(Stochastic(), AFFINE),
    Halving(0.02),
]

# what a sparse training is warned of: optimizers with momentum, at low densities
TORCH_OPTIMIZERS = [
    ("SGD", {"lr": 0.1, "momentum": 0.9}, True),
    ("SGD", {"lr": 0.1, "momentum": 0.5, "nesterov": True}, True),
    ("SGD", {"lr": 0.1}, False),
    ("Adam", {}, True),
    ("Adam", {"betas": (0.0, 0.999)}, False),
    ("AdamW", {}, True),
    ("NAdam", {}, True),
    ("Adamax", {}, True),
    ("RMSprop", {"momentum": 0.5}, True),
    ("RMSprop", {}, False),
    ("Adagrad", {}, False),
]
KERAS_OPTIMIZERS = [
    ("SGD", {"momentum": 0.9}, True),
    ("SGD", {"momentum": 0.5, "nesterov": True}, True),
    ("SGD", {}, False),
    ("Adam", {}, True),
    ("Adam", {"beta_1": 0.0}, False),
    ("AdamW", {}, True),
    ("Nadam", {}, True),
    ("Adamax", {}, True),
    ("RMSprop", {"momentum": 0.5}, True),
    ("RMSprop", {}, False),
    ("Adagrad", {}, False),
]
LOW_DENSITIES = {0.001: True, 0.01: True, 0.1: False}
