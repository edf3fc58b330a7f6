"""Where the gradients lie that are under way, and whether somebody wrote there since.

Horovod's hooks give gradients away one by one, and the result of each takes its place.
That is right only as long as nobody else needs the memory: autograd lets the gradients
of `(p.view(2, 2) + q.view(2, 2)).sum()` share theirs, a user may set one tensor for two
parameters, and two optimizers may hold one parameter and know nothing of each other. So
this is the one thing that all compressors of a process share.
"""

import threading
import weakref
from bisect import bisect_left, bisect_right
from typing import Any, ClassVar

import torch

from hvd_sparse.core.sharing import repeats, span

Tensor = torch.Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SMALL = 4096  # elements
_SUMS = 64  # each of every 64th element: a sign that changes here and there shows
_lock = threading.Lock()  # never held while something is awaited


class Place:
    """The memory of one gradient, from when it is given until its result is there.

    Attributes:
        gradient: what was given; Horovod may let it point elsewhere.
        memory: the same elements, wherever that points.
        parameter: whose `grad` it is; None if it is nobody's.
        region: set of the places whose memory may overlap.
        reduced: what to call it, where Horovod reduces it in its place.
        contended: another compressor has the gradient of this parameter too.
    """

    __slots__ = (
        "_changed",
        "_sum",
        "_version",
        "contended",
        "gradient",
        "memory",
        "parameter",
        "reduced",
        "region",
    )

    def __init__(self, gradient: Tensor, parameter: Tensor | None) -> None:
        """Remember what it is like now."""
        self.gradient = gradient
        self.memory = gradient.detach()
        self.parameter = parameter
        self.region: _Region | None = None
        self.reduced = ""
        self.contended = False
        self._changed: bool | None = None
        self._version = gradient._version
        # the version of a part counts what is written into the other parts too
        whole = gradient.untyped_storage().nbytes()
        part = gradient.numel() * gradient.element_size() < whole
        self._sum = fingerprint(self.memory) if part else None

    @property
    def changed(self) -> bool:
        """Somebody wrote into the gradient, or gave the parameter another one."""
        return self._is_changed() if self._changed is None else self._changed

    def _is_changed(self) -> bool:
        if self.parameter is not None and self.parameter.grad is not self.gradient:
            return True
        return self.rewritten

    @property
    def rewritten(self) -> bool:
        """Somebody wrote into the memory; where its result is, that too."""
        if self.memory._version == self._version:
            return False
        if self._sum is None:
            return True
        return not torch.equal(fingerprint(self.memory), self._sum)

    def settle(self) -> None:
        """From here on it is results that are written."""
        if self._changed is None:
            self._changed = self._is_changed()

    def seen(self, result: Tensor) -> Tensor:
        """The gradient itself, where the result is what it points to."""
        gradient = self.gradient
        there = result is self.memory and gradient.data_ptr() == result.data_ptr()
        return gradient if there else result


class _Region:
    """An interval of addresses, and all places in it; intervals do not overlap."""

    __slots__ = ("first", "members", "stop")

    def __init__(self, first: int, stop: int, members: list[Place]) -> None:
        self.first, self.stop, self.members = first, stop, members
        for place in members:
            place.region = self


class Places:
    """Those of one compressor; they know of the others'."""

    # a list, since a WeakSet takes a microsecond to say how many there are
    _all: ClassVar[list["weakref.ref[Places]"]] = []

    def __init__(self) -> None:
        """Empty."""
        self._starts: list[int] = []  # ascending, of the regions
        self._regions: list[_Region] = []
        with _lock:
            Places._all.append(weakref.ref(self, Places._all.remove))

    def enter(self, gradient: Tensor, parameter: Tensor | None) -> Place:
        """A gradient was given.

        The parameter gets a `grad` of its own where this one is another's too: each is
        to point to its result.

        Raises:
            ValueError: Horovod is just writing there.
        """
        with _lock:
            first, stop = span(gradient)
            met = self._between(first, stop)
            members = [p for region in self._regions[met] for p in region.members]
            others = self._others(first, stop)
            _check_unreduced([*members, *others])
            if parameter is not None and any(p.gradient is gradient for p in members):
                parameter.grad = gradient = gradient.detach()
            place = Place(gradient, parameter)
            for other in others:
                if parameter is not None and other.parameter is parameter:
                    place.contended = other.contended = True
            if first < stop:
                self._join(met, _Region(first, stop, [place, *members]))
            return place

    def _between(self, first: int, stop: int) -> slice:
        """The regions that an interval meets."""
        low = bisect_right(self._starts, first)
        if low and self._regions[low - 1].stop > first:
            low -= 1
        return slice(low, max(low, bisect_left(self._starts, stop)))

    def _join(self, met: slice, region: _Region) -> None:
        for other in self._regions[met]:
            region.first = min(region.first, other.first)
            region.stop = max(region.stop, other.stop)
        self._starts[met], self._regions[met] = [region.first], [region]

    def leave(self, place: Place) -> None:
        """Its result is there, or nobody will ask for it."""
        with _lock:
            region, place.region = place.region, None
            if region is None:
                return
            region.members.remove(place)
            if not region.members:
                at = bisect_left(self._starts, region.first)
                del self._starts[at], self._regions[at]

    def clear(self) -> None:
        """Nothing is under way any more."""
        with _lock:
            for region in self._regions:
                for place in region.members:
                    place.region = None
            self._starts.clear()
            self._regions.clear()

    def settle(self) -> None:
        """Results come now: whose gradient, where they are written, has changed?"""
        with _lock:
            for region in self._regions:
                for place in (
                    *region.members,
                    *self._others(region.first, region.stop),
                ):
                    place.settle()

    def may_give_way(self, place: Place) -> bool:
        """Whether the result may be written where the gradient is.

        Not where others need it: gradients that are under way, the parameter itself,
        whoever may ask for derivatives. Elements that overlap can not hold it either.
        """
        return not (_is_needed(place) or repeats(place.memory) or self._shares(place))

    def result(self, place: Place) -> Tensor:
        """Where to write the result."""
        if self.may_give_way(place):
            return place.memory
        memory_format = torch.contiguous_format
        return torch.empty_like(place.memory, memory_format=memory_format)

    def _shares(self, place: Place) -> bool:
        with _lock:
            if place.region is None:
                return False
            alone = len(place.region.members) == 1
            return not alone or bool(self._others(*span(place.memory)))

    def _others(self, first: int, stop: int) -> list[Place]:
        """What other compressors have there."""
        if len(Places._all) == 1:  # asked three times a gradient
            return []
        return [
            place
            for reference in list(Places._all)
            if (places := reference()) is not None and places is not self
            for region in places._regions[places._between(first, stop)]
            for place in region.members
        ]


def _check_unreduced(places: list[Place]) -> None:
    for place in places:
        if place.reduced:
            raise ValueError(
                f"{place.reduced}: Horovod reduces its gradient in place, and that of "
                "another parameter is in the same memory; give each its own"
            )


def fingerprint(tensor: Tensor) -> Tensor:
    """Of small tensors all bits; of others sums, whatever threads add them up."""
    bits = tensor.view(_INTEGERS[tensor.element_size()])
    if bits.numel() <= _SMALL:
        return bits.clone()
    if not bits.is_contiguous():
        return bits.sum(0)
    whole = bits.numel() // _SUMS * _SUMS
    flat = bits.view(-1)
    return torch.cat([flat[:whole].view(-1, _SUMS).sum(0), flat[whole:].long()])


def _is_needed(place: Place) -> bool:
    if place.gradient.requires_grad:
        return True
    if place.parameter is None:
        return False
    weights: Any = place.parameter.untyped_storage()
    return bool(weights.data_ptr() == place.memory.untyped_storage().data_ptr())
