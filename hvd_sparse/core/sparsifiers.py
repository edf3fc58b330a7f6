"""Select: which elements of residual + gradient are worth sending.

Sparsifiers are configuration: frozen, framework-neutral, and their repr rebuilds them.
How the elements are found is the business of `hvd_sparse.kernels`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from typing import ClassVar, TypeVar

import numpy as np

from hvd_sparse.core.contracts import (
    Array,
    FixedDensity,
    Format,
    Formatted,
    Request,
    Selection,
    Sparsifier,
)
from hvd_sparse.core.formats import joined
from hvd_sparse.core.indices import Indices
from hvd_sparse.core.levels import Levels
from hvd_sparse.core.roles import offers
from hvd_sparse.core.values import Sign, Values
from hvd_sparse.kernels import host, kernels_for
from hvd_sparse.kernels.contract import NothingAddedError

_Kind = TypeVar("_Kind")
_ROUNDING = 1e-12  # of sums in float64: k equal magnitudes reach their norm at sqrt(k)


@lru_cache(maxsize=4096)
def elements(density: float, n: int) -> int:
    """k = min(n, max(1, ceil(density * n))), exactly, from the density as written.

    Example:
        >>> elements(0.1, 30)  # 0.1 as a binary float is a little more than 1/10
        3
    """
    return min(n, max(1, math.ceil(Fraction(str(density)) * n)))


def digest(*parts: object) -> int:
    """64 bits that depend on every part and on nothing else."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def fixed_density(sparsifier: Sparsifier) -> float | None:
    """Its density, if its k is the same on every rank."""
    return sparsifier.density if offers(sparsifier, FixedDensity) else None


def format_of(
    sparsifier: Sparsifier,
    values: Values | Format | None = None,
    indices: Indices | None = None,
) -> Format:
    """How its payloads travel: as the user says, as it is made for, or unrounded.

    Raises:
        TypeError: values or indices are no formats.
        ValueError: the user says otherwise than it is made for.
    """
    own = sparsifier.made_for if offers(sparsifier, Formatted) else None
    if own is not None and values not in (None, own):
        raise ValueError(
            f"values must be {own!r}, which {sparsifier!r} is made for, got {values!r}"
        )
    return joined(own if values is None else values, indices)


def proved(kind: type[_Kind]) -> type[_Kind]:
    """A class of ours whose selections tests prove: see `Proved`."""
    kind.proved = kind  # type: ignore[attr-defined]  # declared in the protocol
    return kind


def check_density(density: float, name: str = "density") -> None:
    """Raise ValueError unless it is in (0, 1]."""
    if isinstance(density, bool) or not 0 < density <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {density}")


def check_seed(seed: int) -> None:
    """Raise TypeError unless it is an integer."""
    if not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}")


class Selecting(ABC):
    """What sparsifiers of ours share: `select` is `choose` that clears nothing."""

    @abstractmethod
    def choose(self, asked: Request) -> Selection:
        """As select; see `Proved`."""

    def select(self, residual: Array, gradient: Array, k: int, step: int) -> Selection:
        """Overwrites residual with residual + gradient, the selected entries 0."""
        return self.choose(Request(residual, gradient, k, step))


@proved
@dataclass(frozen=True)
class TopK(Selecting):
    """The k = density * n elements of largest magnitude, ties to the lowest index.

    S = TopK(r + g): no other k entries leave a smaller residual in any p-norm. Exact:
    -0.0 equals 0.0, zeros can be chosen, subnormals count.

    Alistarh et al., The Convergence of Sparsified Gradient Methods, 2018,
    arXiv:1809.10505. Selected per tensor, not over the whole model.

    Args:
        density: k / n, in (0, 1]; at least one element of each tensor is sent.

    Raises:
        ValueError: density is not in (0, 1].

    Example:
        >>> TopK(density=0.01)
        TopK(density=0.01)
    """

    density: float = 0.001

    clears: ClassVar = True

    def __post_init__(self) -> None:
        check_density(self.density)

    def descent(self, levels: Levels, sizes: Array) -> Array:
        """What so many elements are sure to gain, but for a factor they share.

        alpha(T) |g|^2 = sum_T g^2, with F(x - Q(g) / L) <= F(x) - alpha |g|^2 / (2 L):
        Khirirat et al., 2020, arXiv:2003.06377, lemma 1.
        """
        return levels.squares(sizes)

    def turns(self, levels: Levels) -> Array:
        """Sizes at which the descent bends, so that it may be best there."""
        return levels.ends

    def choose(self, asked: Request) -> Selection:
        """Overwrites residual with residual + gradient, its k largest entries 0."""
        residual, gradient, k, _, out = asked
        kernels = kernels_for(residual)
        return Selection(*kernels.select_top(residual, gradient, k, out))

    def select_group(
        self, residuals: Sequence[Array], gradients: Sequence[Array], table: Array
    ) -> Sequence[int]:
        """As `choose`, for many arrays on the host, of one dtype: see `Grouped`."""
        return host.select_group(residuals, gradients, table)


@proved
@dataclass(frozen=True)
class SignTopK(TopK):
    """TopK with `values=Sign()`: the largest elements as one scale and signs (S+Q).

    sent = (sum_S |c| / k) * sign(c_S), S = TopK(r + g): a bit for each value, and one
    scale. The scale is the one that leaves the smallest residual in the 2-norm:
    |c - sent|^2 = |c|^2 - (sum_S |c|)^2 / k. What rounding to it takes away stays in
    the residual, which stays bounded.

    Khirirat, Magnusson, Aytekin, Johansson, Communication Efficient Sparsification for
    Large Scale Machine Learning, 2020, arXiv:2003.06377. There sent = |g|_2 sign(g),
    with a step size of sqrt(beta) / (sqrt(k) L) that belongs to it; the product of both
    is this scale times 1 / L. |c|_2 alone is no contraction: residuals would explode.
    The sign of a zero is that of its bit.

    Args:
        density: k / n, in (0, 1]; at least one element of each tensor is sent.

    Raises:
        ValueError: density is not in (0, 1].

    Example:
        >>> SignTopK(density=0.01)
        SignTopK(density=0.01)
    """

    made_for: ClassVar = Sign()

    def descent(self, levels: Levels, sizes: Array) -> Array:
        """What so many elements are sure to gain, but for a factor they share.

        beta(T) |g|^2 = (sum_T |g|)^2 / T, with F(x - Q(g) / L) <= F(x) - beta |g|^2 /
        (2 L): Khirirat et al., 2020, arXiv:2003.06377, lemma 2.
        """
        descent: Array = levels.sums(sizes) ** 2 / sizes
        return descent

    @staticmethod
    def alistarh() -> "SignsUntilNorm":
        """The rule of Alistarh et al., 2017, in place of a density."""
        return SignsUntilNorm()


@proved
@dataclass(frozen=True)
class SignsUntilNorm(Selecting):
    """As SignTopK, for the fewest elements with sum |c| >= |c|_2: at most sqrt(n).

    Alistarh, Grubic, Li, Tomioka, Vojnovic, QSGD, 2017, arXiv:1610.02132: the scheme
    for gradient descent, which CAT (arXiv:2003.06377) is measured against. Where fewer
    may be sent than the rule asks for, as many as may. `SignTopK.alistarh()` makes one.
    """

    made_for: ClassVar = Sign()
    clears: ClassVar = True

    def choose(self, asked: Request) -> Selection:
        """Overwrites residual with residual + gradient, the selected entries 0."""
        residual, gradient, k, _, out = asked
        kernels = kernels_for(residual)
        k = min(k, math.isqrt(residual.shape[0]) + 1)
        indices, values, nonfinite = kernels.select_top(residual, gradient, k, out)
        magnitudes = kernels.largest_first(values)
        unit = magnitudes.max(initial=0.0) or 1.0  # so that no sum is out of range
        magnitudes /= unit
        norm = math.hypot(kernels.norm(residual) / unit, np.linalg.norm(magnitudes))
        enough = np.cumsum(magnitudes) >= norm * (1 - _ROUNDING)
        count = int(np.argmax(enough)) + 1 if enough.any() else k
        indices, values = kernels.keep_largest(residual, indices, values, count)
        return Selection(indices, values, nonfinite)


@proved
@dataclass(frozen=True)
class RandomK(Selecting):
    """k = density * n elements drawn at random, the same on every rank.

    Every rank draws the same indices from (seed, name, step), so only values travel,
    and no indices. Stich et al., Sparsified SGD with Memory,
    2018, arXiv:1809.07599, rand-k with memory: values are sent as they are, not scaled
    by n / k; what is not drawn waits in the residual. torch's, numpy's and Python's
    generators are untouched.

    Args:
        density: k / n, in (0, 1].
        seed: any integer, the same on every rank.

    Raises:
        ValueError: density is not in (0, 1].
    """

    density: float = 0.01
    seed: int = 0

    shared_indices: ClassVar = True
    clears: ClassVar = True

    def __post_init__(self) -> None:
        check_density(self.density)
        check_seed(self.seed)

    def for_tensor(self, name: str) -> "RandomK":
        """The same sparsifier, its seed derived from this tensor's name."""
        return replace(self, seed=digest(self.seed, name))

    def indices(self, n: int, k: int, step: int) -> Array:
        """(k,) int32 ascending, distinct: the draw of this step."""
        return host.random_indices(n, k, digest(self.seed, step))

    def choose(self, asked: Request) -> Selection:
        """Overwrites residual with residual + gradient, the entries drawn 0."""
        residual, gradient, k, step, out = asked
        try:
            indices = self.indices(residual.shape[0], k, step)
        except MemoryError as error:
            raise NothingAddedError from error
        kernels = kernels_for(residual)
        return Selection(*kernels.select_at(residual, gradient, indices, out))


@proved
@dataclass(frozen=True)
class Threshold(Selecting):
    """Every element of residual + gradient whose magnitude reaches a fixed value.

    How many that are depends on the data of each rank, so k travels, too. At
    most as many are sent as sparse is cheaper than dense (see `WhenCheaper`), largest
    magnitudes first; the rest stays in the residual. Strom, Scalable Distributed DNN
    Training Using Commodity GPU Cloud Computing, 2015; unlike there, values are sent
    as they are, not as plus or minus the threshold.

    Args:
        value: magnitude in units of the gradient, before any loss scale that the
            integration is told of (`scaler=`); > 0 and finite; compared in the
            residual's dtype.

    Raises:
        ValueError: value is not positive and finite.
    """

    value: float = 1e-3

    clears: ClassVar = True

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise ValueError(f"value must be positive and finite, got {self.value}")

    def for_scale(self, loss_scale: float) -> "Threshold":
        """What selects the same of gradients that are multiplied with loss_scale."""
        return replace(self, value=self.value * loss_scale)

    def choose(self, asked: Request) -> Selection:
        """Overwrites residual with residual + gradient, the selected entries 0."""
        residual, gradient, k, _, out = asked
        kernels = kernels_for(residual)
        return Selection(*kernels.select_above(residual, gradient, self.value, k, out))
