"""Plan: how each tensor goes, decided by every rank from what all of them know.

Route, format, k and the digest of a tensor follow from its name, shape and dtype, from
the configuration and from the number of ranks. A peer that decided otherwise has
another digest, and is found out before its data is used.
"""

import math
import sys
from collections.abc import Iterator
from hashlib import blake2b
from typing import TypeGuard, cast

import numpy as np

from hvd_sparse.core.configuration import describe
from hvd_sparse.core.contracts import (
    Array,
    Exchange,
    Following,
    Format,
    Grouped,
    Op,
    PerFormat,
    PerRank,
    PerScale,
    PerTensor,
    Proved,
    Scheduled,
    SharedIndices,
    Sparsifier,
)
from hvd_sparse.core.flight import Tensor
from hvd_sparse.core.format_checks import check_format
from hvd_sparse.core.formats import is_ours
from hvd_sparse.core.indices import Indices, KnownIndices, RawIndices
from hvd_sparse.core.payload import DTYPES, MOST_ELEMENTS, Header
from hvd_sparse.core.roles import offers
from hvd_sparse.core.routing import Dense, Never, WhenCheaper
from hvd_sparse.core.sparsifiers import (
    check_density,
    elements,
    fixed_density,
    format_of,
)
from hvd_sparse.core.values import Float32, Values
from hvd_sparse.kernels.host import is_one_part

ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Plan:
    """The tensors of one group of ranks, each as all of these ranks treat it."""

    def __init__(
        self,
        sparsifier: Sparsifier,
        exchange: Exchange,
        op: int,
        dense: Dense | None,
        values: Values | Format | None = None,
        indices: Indices | None = None,
    ) -> None:
        """As for GradientPath, which says what is raised."""
        if isinstance(sparsifier, type) or not offers(sparsifier, Sparsifier):
            raise TypeError(
                "sparsifier must have a select method, such as TopK(density=0.001), "
                f"got {sparsifier!r}"
            )
        if not isinstance(dense, WhenCheaper | Never | None):
            raise TypeError(f"dense must be WhenCheaper() or Never(), got {dense!r}")
        form = format_of(sparsifier, values, indices)
        check_format(form)
        _for_format(sparsifier, form)
        if op not in (Op.Average, Op.Sum):
            raise ValueError(f"op must be Average or Sum, got {op!r}")
        self.sparsifier = sparsifier
        self.dense = dense if dense is not None else WhenCheaper()
        # as they are now: what they count while they select is not part of it
        self._chosen = describe(sparsifier, "sparsifier")
        self._rule = describe(self.dense, "dense")
        self._given = values, indices
        said = _format(sparsifier, values) != _format(sparsifier)
        # where it is nothing new nothing is said: states of old have nothing there
        self._values = f", values={describe(values, 'values')}" if said else ""
        # how indices travel leaves nothing in a state
        self._indices = ", indices=RawIndices()" if indices == RawIndices() else ""
        self.op = Op(op)
        self.op_name = self.op.name  # an integration that finds out later says so here
        self.tensors: dict[str, Tensor] = {}
        self.always_sparse: set[str] = set()  # names of tensors, whatever `dense` says
        self.loss_scale: float | None = None  # that gradients are multiplied with
        self._exchange = exchange

    @property
    def scale(self) -> float:
        """What the sum over ranks is multiplied with."""
        return 1.0 if self.op is Op.Sum else 1.0 / self._exchange.size

    def find(self, name: str, gradient: Array) -> Tensor | None:
        """What is known about this tensor; None at its first use.

        Raises:
            ValueError: its shape or dtype changed, or a schedule is out of range.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        if gradient.shape != tensor.shape or gradient.dtype != tensor.array_dtype:
            raise ValueError(
                f"{name}: gradient has shape {tuple(gradient.shape)} and dtype "
                f"{dtype_of(gradient)}, expected {tensor.shape} and {tensor.dtype} "
                "as in earlier steps"
            )
        if tensor.scheduled:
            self._follow_schedule(tensor)
        return tensor

    def check(self, name: str, gradient: Array) -> None:
        """Refuse what can not be sent.

        Raises:
            TypeError: the gradient is not floating.
            ValueError: it has too many elements.
        """
        dtype, n = dtype_of(gradient), _size(gradient)
        if dtype not in DTYPES:
            raise TypeError(
                f"{name}: gradient must be one of {', '.join(DTYPES)}, got {dtype}"
            )
        if n > MOST_ELEMENTS:
            raise ValueError(
                f"{name}: gradient must have at most 2**31 - 1 elements (indices are "
                f"int32), got {n}; split it"
            )

    def enter(self, name: str, gradient: Array, step: int, chosen: int) -> Tensor:
        """Decide how a tensor goes from its first use on."""
        dtype, n = dtype_of(gradient), _size(gradient)
        sparsifier, form, k, dense = self._decide(name, n, dtype)
        varies = fixed_density(sparsifier) is None
        trusted = _is_proved(sparsifier)
        wide = dtype in ("float32", "float64")
        plain = (
            _is_grouped(form)
            and wide
            and not (dense or varies)
            and isinstance(gradient, np.ndarray)
            and is_one_part(n)  # with more threads it gains more by itself
        )
        tensor = Tensor(
            name,
            tuple(gradient.shape),
            dtype,
            gradient.dtype,
            gradient.dtype.itemsize,
            sparsifier,
            Header(form, dtype, n, k, step, digest=0, varies=varies),
            follows=offers(sparsifier, Following),
            unindexed=_is_shared(sparsifier),
            clears=_is_proved(sparsifier) and sparsifier.clears,
            dense=dense,
            trusted=trusted,
            plain=plain,
            grouped=plain and trusted and offers(sparsifier, Grouped),
            rounds=not is_ours(form) or form.values != Float32(),
            scheduled=offers(sparsifier, Scheduled) and not (dense or varies),
            chosen=chosen,
        )
        self._set_digest(tensor)
        if tensor.scheduled:
            self._follow_schedule(tensor)
        self.tensors[name] = tensor
        return tensor

    def follow(self, loss_scale: float) -> None:
        """From now on gradients are multiplied with another one."""
        self.loss_scale = loss_scale
        for name, tensor in self.tensors.items():
            self._set_digest(tensor)
            tensor.sparsifier = self._own(name)[0]

    def _follow_schedule(self, tensor: Tensor) -> None:
        """Set k to what it is in the step to come."""
        step, scheduled = tensor.header.step, cast(Scheduled, tensor.sparsifier)
        density = scheduled.density_at(step)
        check_density(density, f"{tensor.name}: density_at({step})")
        k = elements(density, tensor.header.n)
        if k != tensor.header.k:
            tensor.header = tensor.header._replace(k=k)
            self._set_digest(tensor)

    def _set_digest(self, tensor: Tensor) -> None:
        """64 bits that stand for all that ranks must have alike for this tensor."""
        _, dtype, n, k, *_ = tensor.header
        form, agreed = tensor.header.form, self.agreed
        # of one's own a class of the same name may be another by now
        ours = is_ours(form)
        layout = form.layout if ours else (form.layout, int(form.bytes(k, dtype, n)))
        text = repr(
            (tensor.name, tensor.shape, tensor.dtype, k, layout, agreed)
        ).encode()
        digest = int.from_bytes(blake2b(text, digest_size=8).digest(), "little")
        facts = tensor.shape, sys.intern(agreed)  # one text for all tensors
        tensor.header = tensor.header._replace(digest=digest, facts=facts)

    def goes_dense(self, name: str, gradient: Array) -> bool:
        """Whether it will, or can not go at all; nothing is remembered."""
        dtype = dtype_of(gradient)
        return dtype not in DTYPES or self._decide(name, _size(gradient), dtype)[3]

    def _decide(
        self, name: str, n: int, dtype: str
    ) -> tuple[Sparsifier, Format, int, bool]:
        """The sparsifier for this tensor, its format, its k, whether it goes dense."""
        sparsifier, form = self._own(name)
        size = self._exchange.size * self._exchange.weight
        dense = Never() if name in self.always_sparse else self.dense
        limit = dense.limit(n, dtype, ITEMSIZES[dtype], form, size)
        density = fixed_density(sparsifier)
        if density is None:
            return sparsifier, form, limit, limit < min(1, n)
        k = elements(density, n)
        return sparsifier, form, k, limit < k

    def _own(self, name: str) -> tuple[Sparsifier, Format]:
        """The sparsifier as this rank and tensor have it, and its format."""
        sparsifier = self.sparsifier
        if offers(sparsifier, PerRank):
            sparsifier = sparsifier.for_rank(self._exchange.rank)
        if offers(sparsifier, PerTensor):
            sparsifier = sparsifier.for_tensor(name)
        if offers(sparsifier, PerScale) and self.loss_scale is not None:
            sparsifier = sparsifier.for_scale(self.loss_scale)
        form = _format(sparsifier, *self._given)
        return _for_format(sparsifier, form), form

    @property
    def configuration(self) -> str:
        """What the user chose, as text: equal on every rank, or an error."""
        chosen = f"{self._chosen}, op={self.op_name}, dense={self._rule}"
        return chosen + self._values

    @property
    def agreed(self) -> str:
        """The configuration, and what belongs to a step."""
        chosen = self.configuration + self._indices
        if self.loss_scale is None:
            return chosen
        return f"{chosen}, loss scale {self.loss_scale}"

    @property
    def old_configurations(self) -> Iterator[str]:
        """As release 0.1.0 wrote it: by repr, or by the name of the class alone."""
        for chosen in (repr(self.sparsifier), type(self.sparsifier).__name__):
            yield f"{chosen}, op={self.op_name}, dense={self.dense!r}{self._values}"


def _format(
    sparsifier: Sparsifier,
    values: Values | Format | None = None,
    indices: Indices | None = None,
) -> Format:
    """Of payloads: their values, and indices unless every rank knows them."""
    form = format_of(sparsifier, values, indices)
    if not _is_shared(sparsifier):
        return form
    bare = form.without_indices()
    if not offers(bare, Format):
        raise TypeError(f"{form!r}: without_indices must give a Format, got {bare!r}")
    return bare


def _for_format(sparsifier: Sparsifier, form: Format) -> Sparsifier:
    if offers(sparsifier, PerFormat):
        return sparsifier.for_format(form)
    return sparsifier


def _is_grouped(form: Format) -> bool:
    """Whether kernels write and read it, indices and all."""
    return is_ours(form) and form.indices != KnownIndices()


def _is_proved(sparsifier: Sparsifier) -> TypeGuard[Proved]:
    """Not what inherits from one that is: it may select as it likes."""
    return offers(sparsifier, Proved) and sparsifier.proved is type(sparsifier)


def _is_shared(sparsifier: Sparsifier) -> bool:
    return offers(sparsifier, SharedIndices) and sparsifier.shared_indices


def dtype_of(array: Array) -> str:
    """A key of DTYPES, where gradients may have it."""
    return str(array.dtype).removeprefix("torch.")


def _size(gradient: Array) -> int:
    return math.prod(gradient.shape)
