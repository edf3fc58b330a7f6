"""What of an optimizer spoils sparse training, said before the first step is over.

Error feedback is momentum already: at density d an element waits about 1 / d steps and
then arrives as the sum of what was kept. An optimizer with momentum replays that sum
many times over. Here is what is said of it, and what was measured; integrations know
where an optimizer of their framework keeps its momentum.
"""

import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from hvd_sparse.core.contracts import Sparsifier
from hvd_sparse.core.sparsifiers import RandomK, SignTopK, TopK

HARMLESS = 0.1  # from this density on what is late is not late enough
MEASURED = 0.01  # the lowest density at which a setting beats training alone

# what was found at 1 %, on the language model of benchmarks/fidelity.py
ADAM = "that ended 0.6 % above the best dense loss, beta1 = 0.9 29 % above it"
SGD = (
    "with the learning rate raised to what holds, 0 ended as 0.5 and 0.9 did, 12 to "
    "14 % above the best dense loss, and 0.9 diverges at 0.1 %; Adam without beta1 "
    "ended 0.6 % above its own"
)

_WITH_RESIDUAL = TopK | SignTopK | RandomK


class QualityWarning(UserWarning):
    """A setting of the optimizer makes sparse training end worse than it need."""


class Momentum(NamedTuple):
    """Where an optimizer has momentum, as its user writes it.

    Attributes:
        optimizer: the name of its class.
        found: the argument and its value.
        better: the same argument without momentum.
        measured: what became of both, in one sentence.
    """

    optimizer: str
    found: str
    better: str
    measured: str


def advice(momentum: Momentum | None, sparsifier: Sparsifier) -> str | None:
    """What to change, or None where nothing is known to spoil the quality.

    Args:
        momentum: of the optimizer; None for none, and for an optimizer that nobody
            measured.
        sparsifier: only TopK, SignTopK and RandomK have a density to judge by.
    """
    if momentum is None or not isinstance(sparsifier, _WITH_RESIDUAL):
        return None
    density = sparsifier.density
    if density >= HARMLESS:
        return None
    met = (
        f"{momentum.optimizer}({momentum.found}) with {sparsifier!r}: error feedback "
        "is momentum already, and a second one multiplies what arrives late"
    )
    if density < MEASURED:
        return (
            f"{met}. At densities below 1 % no setting measured so far ends better "
            "than one rank that trains alone, within the 800 steps of "
            "benchmarks/fidelity.py"
        )
    return f"{met}. Set {momentum.better}: {momentum.measured} (benchmarks/fidelity.py)"


class Adviser:
    """Warns once of each optimizer, at its first step, on the first rank alone."""

    def __init__(
        self, advise: Callable[[Any, Sparsifier], str | None], sparsifier: Sparsifier
    ) -> None:
        """Args: advise: that of the framework. sparsifier: that of the integration."""
        self._advise = advise
        self._sparsifier = sparsifier
        self._advised: Callable[[], Any] = lambda: None

    def step(self, optimizer: Any, rank: int, stacklevel: int) -> None:
        """Another step of this optimizer begins.

        Args:
            optimizer: of the framework.
            rank: of this process among those that train together.
            stacklevel: frames between this function and the user's own.
        """
        if self._advised() is optimizer:
            return
        self._advised = weakref.ref(optimizer)
        if rank == 0 and (text := self._advise(optimizer, self._sparsifier)):
            warnings.warn(text, QualityWarning, stacklevel=stacklevel + 1)
