"""What the kernels for each kind of array have: a module of functions, all of these.

`hvd_sparse.kernels.reference` is the oracle, `host` and `device` must give its bits.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from hvd_sparse.kernels.coding import Coded

Array = Any  # numpy.ndarray or torch.Tensor


class NothingAddedError(MemoryError):
    """A selection failed before it had added anything; the cause is what to raise.

    What fails later fails when all is in the residual.
    """


class Kernels(Protocol):
    """The hot loops for one kind of array; see `hvd_sparse.kernels.host`."""

    def zeros_like(self, gradient: Array) -> Array:
        """A residual for this gradient, zeros."""
        ...

    def select_top(
        self, residual: Array, gradient: Array, k: int, out: Array | None = None
    ) -> tuple[Array, Array, int]:
        """Accumulate, take the k largest: indices, values, nonfinite; out becomes 0."""
        ...

    def select_above(
        self,
        residual: Array,
        gradient: Array,
        bound: float,
        limit: int,
        out: Array | None = None,
    ) -> tuple[Array, Array, int]:
        """The same for entries that reach a bound, the limit largest."""
        ...

    def select_at(
        self, residual: Array, gradient: Array, indices: Array, out: Array | None = None
    ) -> tuple[Array, Array, int]:
        """The same for entries at given indices."""
        ...

    def select_some(
        self, residual: Array, gradient: Array, k: int, out: Array | None = None
    ) -> tuple[Array, Array, int]:
        """Accumulate and take all that reach some bound: k or a few more."""
        ...

    def select_again(self, residual: Array, k: int) -> tuple[Array, Array]:
        """The same of the residual as it is: indices, values."""
        ...

    def keep_largest(
        self, residual: Array, indices: Array, values: Array, k: int
    ) -> tuple[Array, Array]:
        """The k largest of what was selected; the others return to the residual."""
        ...

    def largest_first(self, values: Array) -> Array:
        """Magnitudes, float64 on the host, falling."""
        ...

    def norm(self, residual: Array) -> float:
        """The 2-norm, summed in float64."""
        ...

    def count_magnitudes(self, values: Array) -> Array:
        """(bins,) int64 on the host: magnitudes in logarithmic bins."""
        ...

    def count_sums(self, residual: Array, gradient: Array) -> Array:
        """The same of residual + gradient, which stay as they are."""
        ...

    def draw(
        self, residual: Array, gradient: Array, rate: float, seed: int
    ) -> tuple[Array, Array, int]:
        """Each entry c with p = min(1, rate |c|), as c / p; residual becomes 0."""
        ...

    def accumulate(self, residual: Array, gradient: Array) -> None:
        """Overwrites residual with residual + gradient where that is finite."""
        ...

    def add_at(self, residual: Array, indices: Array, values: Array) -> None:
        """Overwrites residual[indices] with residual[indices] + values."""
        ...

    def aggregate(
        self,
        out: Array,
        payloads: list[tuple[Array, Array]],
        scale: float,
        cleared: bool = False,
    ) -> None:
        """Overwrites out with the scaled sum of payloads, rank by rank."""
        ...

    def aggregate_coded(
        self,
        out: Array,
        payloads: Sequence[Coded],
        scale: float,
        cleared: bool = False,
    ) -> None:
        """The same of entries as they travel; see `hvd_sparse.kernels.coding`."""
        ...

    def random_indices(self, n: int, k: int, seed: int) -> Array:
        """k distinct ascending indices of range(n) from a seed."""
        ...
