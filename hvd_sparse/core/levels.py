"""The magnitudes of a gradient, largest first: what descent measures are made of.

Either every magnitude is a level of its own, or a level stands for a logarithmic bin,
whose members differ from it by less than 0.8 %. Magnitudes enter the measures relative
to the largest: none depends on the gradient's scale, and no square overflows.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_sparse.kernels.bins import BINS, SHIFTS

Array = npt.NDArray[Any]


@lru_cache(maxsize=2)
def _middles(itemsize: int) -> Array:
    """(bins,) float64: the magnitude in the middle of each logarithmic bin."""
    shift = SHIFTS[itemsize]
    patterns = np.arange(BINS[itemsize], dtype=f"u{itemsize}") << shift
    patterns[1:] += 1 << (shift - 1)  # the first is that of 0
    with np.errstate(invalid="ignore"):  # patterns above are NaN, and count nothing
        return patterns.view(f"f{itemsize}").astype(np.float64)


@dataclass(frozen=True)
class Levels:
    """Magnitudes, falling, and how many elements have each.

    Attributes:
        magnitudes: (levels,) float64, finite, >= 0.
        counts: (levels,) int64, > 0.
    """

    magnitudes: Array
    counts: Array

    @classmethod
    def of_sorted(cls, magnitudes: Array) -> "Levels":
        """Every element its own level."""
        return cls(magnitudes, np.ones(magnitudes.size, np.int64))

    @classmethod
    def of_bins(cls, counts: Array, itemsize: int) -> "Levels":
        """From (bins,) counts of floats of 4 or 8 bytes, as kernels make them."""
        bins = np.flatnonzero(counts != 0)[::-1]  # of booleans it is much faster
        return cls(_middles(itemsize)[bins], counts[bins])

    @cached_property
    def _relative(self) -> Array:
        largest = self.magnitudes[0] if self.magnitudes.size else 0.0
        return self.magnitudes / largest if largest > 0 else self.magnitudes

    @property
    def ends(self) -> Array:
        """(levels,) elements up to the end of each level."""
        return self._ends[1:]

    @cached_property
    def _ends(self) -> Array:
        """(levels + 1,) elements up to the end of each level, 0 first."""
        return np.concatenate(([0], np.cumsum(self.counts)))

    @cached_property
    def _sums(self) -> Array:
        """(levels + 1,) sum |c| up to the end of each level."""
        return np.concatenate(([0], np.cumsum(self.counts * self._relative)))

    @cached_property
    def _squares(self) -> Array:
        """(levels + 1,) sum c^2 up to the end of each level."""
        return np.concatenate(([0], np.cumsum(self.counts * self._relative**2)))

    def sums(self, sizes: Array) -> Array:
        """Sum |c| over the so many largest elements, relative to the largest."""
        return np.interp(sizes, self._ends, self._sums)

    def squares(self, sizes: Array) -> Array:
        """Sum c^2 over the so many largest elements, relative to the largest's."""
        return np.interp(sizes, self._ends, self._squares)

    # -------------------------------------- p = min(1, rate |c|), which sum up to size

    @cached_property
    def limits(self) -> Array:
        """(levels,) float64: the size from which on a level is certain: p = 1."""
        rest = self._sums[-1] - self._sums[:-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            limits = self._ends[:-1] + rest / self._relative
        limits[self._relative == 0] = np.inf
        return np.maximum.accumulate(limits)

    def _certain(self, sizes: Array) -> Array:
        """How many levels have p = 1, where the p sum up to size."""
        return np.searchsorted(self.limits, sizes)

    def rate(self, size: int) -> float:
        """The rate of optimal probabilities, in units of 1 / |c|; inf for all."""
        level = int(self._certain(np.array([size]))[0])
        rest = float(self._sums[-1] - self._sums[level])
        largest = self.magnitudes[0] if self.magnitudes.size else 0.0
        if rest <= 0 or largest == 0:
            return np.inf
        return float((size - self._ends[level]) / rest / largest)

    def second_moments(self, sizes: Array) -> Array:
        """E |Q(c)|^2 = sum c^2 / p of that draw, relative to the largest's square."""
        level = self._certain(sizes)
        rest = self._sums[-1] - self._sums[level]
        left = np.maximum(sizes - self._ends[level], 1e-300)
        drawn: Array = self._squares[level] + np.where(rest > 0, rest**2 / left, 0)
        return drawn
