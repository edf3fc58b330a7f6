r"""CAT: each gradient and the network decide how much to send.

    T = argmax  descent(T) / cost(T)
         T

`descent` is what a scheme's T elements are sure to gain, as a share of what the whole
gradient would (`TopK.descent`, `SignTopK.descent`, `Stochastic.descent`); `cost` is
what their payload costs (`hvd_sparse.core.costs`).

How this costs about as much as a fixed T: selection by magnitude needs no norm of the
whole gradient, which divides all efficiencies alike. So a tenth more than last time are
selected, in the one pass that TopK takes. Efficiencies are worked out from them and
from the others, of which a large gradient's are sampled, 1 in 257. If the best T is
among those looked at, what is beyond it returns to the residual; if not, a tenth more
than T are looked at.

T comes from sizes a quarter apart in bytes, those to which Horovod doors pad payloads:
collectives' cached plans survive. Efficiency is flat at its maximum as a rule, so that
the grid costs little; where it costs more than 1 %, as for signs of a gradient that has
few elements, all of one size, T is where the magnitudes fall instead. Flat as it is, T
would jump by factors from step to step: the last one stays while within 1 % of the
best efficiency.
"""

import math
from copy import copy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.contracts import (
    Array,
    Format,
    Formatted,
    Request,
    Selection,
)
from hvd_sparse.core.costs import Cost, Message
from hvd_sparse.core.formats import is_signs
from hvd_sparse.core.frame import padded_bytes
from hvd_sparse.core.levels import Levels
from hvd_sparse.core.payload import most_elements
from hvd_sparse.core.roles import offers
from hvd_sparse.core.sparsifiers import (
    Selecting,
    SignTopK,
    TopK,
    elements,
    fixed_density,
    format_of,
    proved,
)
from hvd_sparse.core.stochastic import Stochastic, levels_of, most_expected
from hvd_sparse.kernels import kernels_for

_BEYOND = 1.1  # of what was best, or seems so: what is sampled is not known exactly
_SMALL = 1 << 12  # elements of a gradient for which all costs are remembered
_FEW = 4  # sizes, all of which are filled up
_SAMPLED = 1 << 16  # elements, of which all are looked at
_RUN, _STRIDE = 16, 16 * 257  # of more, so many of so many: no width of a layer
_AS_GOOD = 0.99  # the share of the best efficiency that a size of the grid must have

Sizes = npt.NDArray[np.int64]
Scheme = TopK | SignTopK | Stochastic


@lru_cache(maxsize=4096)
def _coarse(cost: Cost, message: Message, most: int) -> tuple[Sizes, Any]:
    """Sizes up to most, ascending, each with its cost: a quarter apart, and filled."""
    sizes, size = [1], 64
    while sizes[-1] < most:
        fitting = most_elements(*message, size)
        sizes.append(min(max(fitting, 1), most))
        size = padded_bytes(size + 1)
    coarse = np.array(sizes, np.int64)
    filled = np.minimum(np.maximum(cost.filled(coarse, message), 1), most)
    every = np.unique(filled)
    return every, cost.of(every, message)


def _all(cost: Cost, message: Message, most: int) -> Any:
    """(most,) costs of every size, 1 first."""
    return np.asarray(cost.of(np.arange(1, most + 1, dtype=np.int64), message))


_every_cost = lru_cache(maxsize=8)(_all)  # of millions of sizes
_small_costs = lru_cache(maxsize=512)(_all)  # of no more than _SMALL


def _sampled(array: Array) -> tuple[Array, int]:
    """Some of its elements, whole cache lines, and how many each stands for."""
    n = array.shape[0]
    if n <= _SAMPLED:
        return array, 1
    rows = array[: n // _STRIDE * _STRIDE].reshape(-1, _STRIDE)
    return rows[:, :_RUN].reshape(-1), _STRIDE // _RUN


@proved
@dataclass(frozen=True)
class CAT(Selecting):
    """As many elements as are worth most for what they cost, by tensor and step.

    Every rank chooses for itself, from its own gradient; how many travels in the
    payload. The measures are applied to the corrected gradient, residual + gradient:
    the paper leaves error feedback open. With it, a step's choice is the one that moves
    most of what waits for its cost; nothing is promised about descent. Unlike in the
    paper there is no step size here: SignTopK has its own folded in, Stochastic goes
    without its factor omega. Where elements are drawn, the cost is that of the expected
    number.

    Khirirat, Magnusson, Aytekin, Johansson, Communication Efficient Sparsification for
    Large Scale Machine Learning, 2020, arXiv:2003.06377.

    Args:
        scheme: TopK(), SignTopK() or Stochastic(); of its density only where the first
            search begins.
        cost: Affine, Packet, Payload, PaperPayload or your own; see `hvd_sparse.mpi.
            measure` for one that is measured. The same on every rank.
        least: the least density to choose, in [0, most]; one element at the least.
        most: the largest density to choose, in (0, 1]: what memory has room for.
        change: the factor, > 1, by which the number of elements may grow or shrink from
            one step to the next.
        form: of the payloads that cost counts; an integration says it by itself, from
            its `values=` and `indices=`.

    Raises:
        TypeError: scheme is none of these, or cost can not be asked.
        ValueError: a bound is out of range.

    Example:
        >>> from hvd_sparse import Affine
        >>> CAT(TopK(), Affine(per_byte=1.0, per_message=54.0)).most
        1.0
    """

    scheme: Scheme
    cost: Cost
    least: float = 0.0
    most: float = 1.0
    change: float = math.inf
    form: Format | None = field(default=None, repr=False, kw_only=True)

    clears: ClassVar = True

    def __post_init__(self) -> None:
        # nothing that inherits from them: its own select would never be called
        if type(self.scheme) not in (TopK, SignTopK, Stochastic):
            raise TypeError(
                "scheme must be TopK(), SignTopK() or Stochastic(), got "
                f"{self.scheme!r}"
            )
        if isinstance(self.cost, type) or not offers(self.cost, Cost):
            raise TypeError(
                "cost must be such as Affine(per_byte=1, per_message=54), with methods "
                f"of and filled, got {self.cost!r}"
            )
        if not 0 < self.most <= 1:
            raise ValueError(f"most must be in (0, 1], got {self.most}")
        if not 0 <= self.least <= self.most:
            raise ValueError(f"least must be in [0, {self.most}], got {self.least}")
        if not self.change > 1:
            raise ValueError(f"change must be more than 1, got {self.change}")

    @property
    def made_for(self) -> Any:
        """How values of the scheme travel, since its descent depends on it, or None."""
        return self.scheme.made_for if offers(self.scheme, Formatted) else None

    @property
    def counted(self) -> Format:
        """The format of payloads, of which a cost is asked."""
        return format_of(self.scheme) if self.form is None else self.form

    def for_format(self, form: Format) -> "CAT":
        """The same, for payloads of this format.

        Raises:
            ValueError: values travel as signs, and the scheme does not know.
        """
        if isinstance(self.scheme, TopK) and is_signs(form) and self.made_for is None:
            raise ValueError(
                "values must be other than Sign(), which CAT(SignTopK(), ...) is made "
                f"for, with {self!r}"
            )
        own = copy(self)  # what inherits may be made of other arguments
        object.__setattr__(own, "form", form)
        return own

    def for_rank(self, rank: int) -> "CAT":
        """The same, its scheme seeded for this rank where that matters."""
        scheme = self.scheme
        if isinstance(scheme, Stochastic):
            return replace(self, scheme=scheme.for_rank(rank))
        return self

    def for_tensor(self, name: str) -> "CAT":
        """The same, its scheme seeded for this tensor where that matters."""
        scheme = self.scheme
        if isinstance(scheme, Stochastic):
            return replace(self, scheme=scheme.for_tensor(name))
        return self

    def after(self, chosen: int) -> "Choice":
        """What is left to choose when so many were chosen last; 0 for nothing yet."""
        return Choice(self, chosen)

    def choose(self, asked: Request) -> Selection:
        """Overwrites residual with residual + gradient, the selected entries 0."""
        return self.after(0).choose(asked)

    # ----------------------------------------------- exactness, which ExactCAT changes

    def best(
        self, levels: Levels, message: Message, least: int, most: int, last: int = 0
    ) -> int:
        """The number of elements of most descent for its cost; the fewest of equals.

        Or as many as last time, if these are about as good.
        """
        sizes, costs = _coarse(self.cost, message, most)
        first, stay = sizes.searchsorted((least, last))
        efficiencies = self.scheme.descent(levels, sizes) / costs
        place = first + int(np.argmax(efficiencies[first:]))
        fine, best = self._finest(levels, message, least, most)
        enough = _AS_GOOD * max(best, efficiencies[place])
        if first <= stay < sizes.size and sizes[stay] == last:
            place = stay if efficiencies[stay] >= enough else place
        return int(sizes[place]) if efficiencies[place] >= enough else fine

    def _finest(
        self, levels: Levels, message: Message, least: int, most: int
    ) -> tuple[int, float]:
        """The best of the sizes where magnitudes fall, and of those that these fill up.

        The latter cost no more. Of a large gradient of many levels, it is the best fall
        alone that is filled up: to find out how much room there is takes its time.
        """
        falls = np.append(self.scheme.turns(levels), most).clip(least, most)
        falls.sort()
        if message.n <= _SMALL:
            costs = _small_costs(self.cost, message, most)
            filled = costs.searchsorted(costs[falls - 1], "right").clip(falls, most)
            falls = np.concatenate((falls, filled))
            return self._best_of(levels, falls, costs[falls - 1])
        if falls.size > _FEW:
            best, _ = self._best_of(levels, falls, self.cost.of(falls, message))
            falls = np.array([best], np.int64)
        filled = np.clip(self.cost.filled(falls, message), falls, most)
        falls = np.concatenate((falls, filled))
        return self._best_of(levels, falls, self.cost.of(falls, message))

    def _best_of(self, levels: Levels, sizes: Sizes, costs: Any) -> tuple[int, float]:
        efficiencies = self.scheme.descent(levels, sizes) / costs
        place = int(np.argmax(efficiencies))
        return int(sizes[place]), float(efficiencies[place])

    def levels(self, values: Array, rest: Array) -> Levels:
        """The magnitudes of what was selected, and about those of the rest."""
        kernels = kernels_for(values)
        sample, each = _sampled(rest)
        counts = kernels.count_magnitudes(sample)
        counts *= each
        counts += kernels.count_magnitudes(values)
        return Levels.of_bins(counts, values.dtype.itemsize)

    def all_levels(self, residual: Array, gradient: Array) -> Levels:
        """The magnitudes of residual + gradient."""
        return levels_of(residual, gradient)

    def begin(self, n: int, chosen: int) -> int:
        """How many of the largest to look at first."""
        if chosen:
            return math.ceil(_BEYOND * chosen)
        return elements(fixed_density(self.scheme) or 1.0, n)


@proved
@dataclass(frozen=True)
class ExactCAT(CAT):
    """As CAT, from every size and a sort of every magnitude, as in the paper.

    Slow: for tests, and for comparisons with the paper.
    """

    def best(
        self, levels: Levels, message: Message, least: int, most: int, last: int = 0
    ) -> int:
        """The number of elements of most descent for its cost; the fewest of equals."""
        del last
        sizes = np.arange(least, most + 1, dtype=np.int64)
        costs = _every_cost(self.cost, message, most)[least - 1 :]
        return self._best_of(levels, sizes, costs)[0]

    def levels(self, values: Array, rest: Array) -> Levels:
        """The magnitudes of what was selected, each by itself; there is no rest."""
        del rest
        return Levels.of_sorted(kernels_for(values).largest_first(values))

    def all_levels(self, residual: Array, gradient: Array) -> Levels:
        """The magnitudes of residual + gradient, each by itself; makes a copy."""
        kernels, total = kernels_for(residual), residual + 0
        _, values, _ = kernels.select_top(total, gradient, residual.shape[0])
        return self.levels(values, total)

    def begin(self, n: int, chosen: int) -> int:
        """All."""
        return n


@dataclass(frozen=True)
class Choice(Selecting):
    """One choice of CAT, which knows how many were chosen last; 0 for nothing yet."""

    cat: CAT
    chosen: int

    def choose(self, asked: Request) -> Selection:
        """Overwrites residual with residual + gradient, the selected entries 0."""
        residual, gradient, k, step, out = asked
        if k == 0:
            select_top = kernels_for(residual).select_top
            return Selection(*select_top(residual, gradient, 0, out))
        if not isinstance(self.cat.scheme, Stochastic):
            return self._largest(residual, gradient, k, out)
        selection = self._drawn(self.cat.scheme, residual, gradient, k, step)
        if out is not None:
            out[...] = 0
        return selection

    def _drawn(
        self, scheme: Stochastic, residual: Array, gradient: Array, k: int, step: int
    ) -> Selection:
        levels = self.cat.all_levels(residual, gradient)
        size = self.best(levels, residual, most_expected(k, residual.shape[0]))
        return scheme.draw(residual, gradient, levels.rate(size), k, step)

    def _largest(
        self, residual: Array, gradient: Array, k: int, out: Array | None
    ) -> Selection:
        kernels, n = kernels_for(residual), residual.shape[0]
        most = self.bounds(n, k)[1]
        looked = min(most, self.cat.begin(n, self.chosen))
        indices, values, nonfinite = kernels.select_some(
            residual, gradient, looked, out
        )
        while (size := self._worth(residual, indices, values, k)) > values.shape[0]:
            kernels.add_at(residual, indices, values)
            looked = min(most, math.ceil(_BEYOND * size))
            indices, values = kernels.select_again(residual, looked)
        indices, values = kernels.keep_largest(residual, indices, values, size)
        return Selection(indices, values, nonfinite)

    def _worth(self, residual: Array, indices: Array, values: Array, k: int) -> int:
        """How many are worth most.

        These go back to the residual where that can not be told: the cost is the
        user's, and may raise.
        """
        try:
            return self.best(self.cat.levels(values, residual), residual, k)
        except BaseException:
            kernels_for(residual).add_at(residual, indices, values)
            raise

    def bounds(self, n: int, k: int) -> tuple[int, int]:
        """The fewest and the most elements that may be chosen."""
        cat = self.cat
        most = min(k, elements(cat.most, n))
        least = min(most, elements(cat.least, n))
        if self.chosen and cat.change < math.inf:
            most = max(least, min(most, math.floor(self.chosen * cat.change)))
            least = min(most, max(least, math.ceil(self.chosen / cat.change)))
        return least, most

    def best(self, levels: Levels, residual: Array, k: int) -> int:
        """The number of elements to take of these, within the bounds."""
        n = residual.shape[0]
        dtype = "float64" if residual.dtype.itemsize == 8 else "float32"
        least, most = self.bounds(n, k)
        message = Message(self.cat.counted, dtype, n)
        return self.cat.best(levels, message, least, most, self.chosen)
