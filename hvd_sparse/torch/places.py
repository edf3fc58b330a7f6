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
from collections.abc import Iterable, Sequence
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
        region: set of the places whose memory may overlap; None until that is known.
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
        part = gradient.nbytes < gradient.untyped_storage().nbytes()
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

    __slots__ = ("members", "start", "stop")

    def __init__(self, place: Place) -> None:
        self.start, self.stop = span(place.memory)
        self.members = [place]

    def swallow(self, other: "_Region") -> None:
        """It overlaps."""
        for place in other.members:
            place.region = self
        self.members += other.members
        self.start = min(self.start, other.start)
        self.stop = max(self.stop, other.stop)


class Places:
    """Those of one compressor; they know of the others'.

    A gradient is given where every microsecond delays the backward pass, with its
    caches full of other things. So it is only noted there; whose memory overlaps is
    found out when that is first asked, of all that were given by then.
    """

    # a list, since a WeakSet takes a microsecond to say how many there are
    _all: ClassVar[list["weakref.ref[Places]"]] = []
    _reduced: ClassVar[int] = 0  # by Horovod in their place; more if one was dropped

    def __init__(self) -> None:
        """Empty."""
        self._gradients: set[int] = set()  # ids of what was given, and is under way
        self._noted: list[Place] = []
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
            if Places._reduced:
                _check_unreduced(_everybodys(span(gradient)))
            if parameter is not None and id(gradient) in self._gradients:
                parameter.grad = gradient = gradient.detach()
            self._gradients.add(id(gradient))
            place = Place(gradient, parameter)
            self._noted.append(place)
            return place

    def leave(self, places: Iterable[Place]) -> None:
        """Their results are there, or nobody will ask for them."""
        with _lock:
            self._find_regions()
            for place in places:
                self._leave(place)

    def _leave(self, place: Place) -> None:
        region, place.region = place.region, None
        if region is None:
            return
        _end_reduction(place)
        region.members.remove(place)
        if all(other.gradient is not place.gradient for other in region.members):
            self._gradients.discard(id(place.gradient))
        at = bisect_left(self._starts, region.start)
        if not region.members and self._regions[at : at + 1] == [region]:
            del self._starts[at], self._regions[at]

    def clear(self) -> None:
        """Nothing is under way any more."""
        with _lock:
            self._find_regions()
            for region in self._regions:
                for place in region.members:
                    place.region = None
                    _end_reduction(place)
            self._gradients, self._regions, self._starts = set(), [], []

    def reduce(self, place: Place, name: str) -> None:
        """Horovod reduces it in its place from now on."""
        with _lock:
            place.reduced = name
            Places._reduced += 1

    def settle(self) -> None:
        """Results come now: whose gradient, where they are written, has changed?"""
        with _lock:
            _find_regions()
            for region in self._regions:
                for place in (*region.members, *self._others(region)):
                    place.settle()

    def results(self, places: Sequence[Place]) -> list[Tensor]:
        """Where to write the result of each."""
        return [
            place.memory if free else _another(place)
            for place, free in zip(places, self.may_give_way(places), strict=True)
        ]

    def may_give_way(self, places: Sequence[Place]) -> list[bool]:
        """Whether the result of each may be written where the gradient is.

        Not where others need it: gradients that are under way, the parameter itself,
        whoever may ask for derivatives. Elements that overlap can not hold it either.
        """
        with _lock:
            _find_regions()
            shared = [self._shares(place) for place in places]
        return [
            not (needed or _is_needed(place))
            for place, needed in zip(places, shared, strict=True)
        ]

    def _shares(self, place: Place) -> bool:
        region = place.region
        if region is None:
            return False
        return len(region.members) > 1 or bool(self._others(region))

    def _find_regions(self) -> None:
        """Of what was noted, beside those that are known."""
        for place in self._noted:
            place.region = region = _Region(place)
            if region.start < region.stop:
                self._join(region)
        if len(Places._all) > 1:
            for place in self._noted:
                self._find_contenders(place)
        self._noted = []

    def _join(self, region: _Region) -> None:
        met = self._met(region.start, region.stop)
        for other in self._regions[met]:
            other.swallow(region)
            region = other
        self._starts[met], self._regions[met] = [region.start], [region]

    def _met(self, start: int, stop: int) -> slice:
        """The regions that an interval of addresses meets."""
        low = bisect_right(self._starts, start)
        if low and self._regions[low - 1].stop > start:
            low -= 1
        return slice(low, max(low, bisect_left(self._starts, stop)))

    def _find_contenders(self, place: Place) -> None:
        if place.parameter is None or place.region is None:
            return
        for other in self._others(place.region):
            if other.parameter is place.parameter:
                place.contended = other.contended = True

    def _others(self, region: _Region) -> list[Place]:
        """What other compressors have there."""
        if len(Places._all) == 1:  # most often
            return []
        interval = region.start, region.stop
        others = (places for places in _living() if places is not self)
        return [place for places in others for place in places._within(interval)]

    def _within(self, interval: tuple[int, int]) -> list[Place]:
        return [
            place
            for region in self._regions[self._met(*interval)]
            for place in region.members
        ]


def _living() -> list[Places]:
    return [places for ref in list(Places._all) if (places := ref()) is not None]


def _find_regions() -> None:
    for places in _living():
        places._find_regions()


def _everybodys(interval: tuple[int, int]) -> list[Place]:
    """All that any compressor has there."""
    _find_regions()
    return [place for places in _living() for place in places._within(interval)]


def _end_reduction(place: Place) -> None:
    if place.reduced:
        place.reduced = ""
        Places._reduced -= 1


def _another(place: Place) -> Tensor:
    return torch.empty_like(place.memory, memory_format=torch.contiguous_format)


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
    """As it is: by others than gradients, or by another element of its own."""
    if place.gradient.requires_grad or repeats(place.memory):
        return True
    if place.parameter is None:
        return False
    weights: Any = place.parameter.untyped_storage()
    return bool(weights.data_ptr() == place.memory.untyped_storage().data_ptr())
