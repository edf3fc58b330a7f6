"""Select at random: unbiased, so that nothing needs to be remembered."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from hvd_sparse.core.contracts import Array, Request, Selection
from hvd_sparse.core.levels import Levels
from hvd_sparse.core.sparsifiers import (
    Selecting,
    check_density,
    check_seed,
    digest,
    elements,
    proved,
)
from hvd_sparse.core.values import Float32
from hvd_sparse.kernels import kernels_for


@proved
@dataclass(frozen=True)
class Stochastic(Selecting):
    """Each element c is sent as c / p, with probability p = min(1, rate |c|).

    E[sent] = c, so there is no residual, except of a step that failed. Of all p that
    sum up to the same expected number of elements these leave the least variance. The
    rate is worked out from magnitudes in logarithmic bins: the expected number is met
    within 1 %, but for subnormals; that E[sent] = c does not depend on it. A draw
    decides with 52 bits. Every rank draws for itself, from (seed, rank, name, step).
    torch's, numpy's and Python's generators are untouched.

    Wangni, Wang, Liu, Zhang, Gradient Sparsification for Communication-Efficient
    Distributed Optimization, 2018, arXiv:1710.09854; Khirirat et al., 2020,
    arXiv:2003.06377, section on stochastic sparsification.

    Args:
        expected_density: expected k / n, in (0, 1]; k itself travels, too.
        seed: any integer, the same on every rank.

    Raises:
        ValueError: expected_density is not in (0, 1].
        TypeError: seed is no integer.

    Example:
        >>> Stochastic(expected_density=0.01)
        Stochastic(expected_density=0.01, seed=0)
    """

    expected_density: float = 0.001
    seed: int = 0

    made_for: ClassVar = Float32()  # rounded, what is sent would not be c on average
    clears: ClassVar = False

    def __post_init__(self) -> None:
        check_density(self.expected_density, "expected_density")
        check_seed(self.seed)

    def for_rank(self, rank: int) -> "Stochastic":
        """The same sparsifier, its seed derived from this rank."""
        return replace(self, seed=digest(self.seed, "rank", rank))

    def for_tensor(self, name: str) -> "Stochastic":
        """The same sparsifier, its seed derived from this tensor's name."""
        return replace(self, seed=digest(self.seed, name))

    def descent(self, levels: Levels, sizes: Array) -> Array:
        """What so many expected elements gain on average, but for a shared factor.

        omega(T) = |g|^2 / E|Q(g)|^2, with E F(x - omega Q(g) / L) <= F(x) - omega |g|^2
        / (2 L): Khirirat et al., 2020, arXiv:2003.06377, lemma 3.
        """
        moments = levels.second_moments(sizes)
        return 1 / np.where(moments > 0, moments, np.inf)

    def turns(self, levels: Levels) -> Array:
        """Sizes at which the descent bends, so that it may be best there."""
        limits = levels.limits[np.isfinite(levels.limits)]
        turns = np.concatenate((np.floor(limits), np.ceil(limits)))
        return np.minimum(turns, levels.ends[-1]).astype(np.int64)

    def choose(self, asked: Request) -> Selection:
        """Overwrites residual with 0; see draw."""
        residual, gradient, k, step, _ = asked
        levels = levels_of(residual, gradient)
        n = residual.shape[0]
        size = min(most_expected(k, n), elements(self.expected_density, n))
        return self.draw(residual, gradient, levels.rate(size), k, step)

    def draw(
        self, residual: Array, gradient: Array, rate: float, k: int, step: int
    ) -> Selection:
        """Overwrites residual with 0.

        Should more than k be drawn, the smallest of them wait in the residual. Unless k
        is a handful, `most_expected` makes that rarer than one step in 10^8.
        """
        kernels = kernels_for(residual)
        wide = "float64" if residual.dtype.itemsize == 8 else "float32"
        most = float(np.finfo(wide).max)
        # no c / p is out of range, nor the sum of a thousand of them
        rate = min(max(rate, 1024 / most), most)
        indices, values, nonfinite = kernels.draw(
            residual, gradient, rate, digest(self.seed, step)
        )
        if indices.shape[0] > k:
            indices, values = kernels.keep_largest(residual, indices, values, k)
        return Selection(indices, values, nonfinite)


def levels_of(residual: Array, gradient: Array) -> Levels:
    """The magnitudes of residual + gradient; reads both, writes neither."""
    counts = kernels_for(residual).count_sums(residual, gradient)
    return Levels.of_bins(counts, residual.dtype.itemsize)


def most_expected(k: int, n: int) -> int:
    """The largest expected number of n that is six standard deviations below k."""
    return k if k >= n else max(min(k, 1), int(k + 18 - 6 * (k + 9) ** 0.5))
