"""What ranks agree on is the whole of a part, not the name of its class."""

import re
import threading
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pytest
from doors import AFFINE, SPARSIFIERS, Halving

from hvd_sparse import Never, TopK, WhenCheaper
from hvd_sparse.core.configuration import describe


class Holding:
    """Any attributes."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


class Slotted:
    __slots__ = ("offset",)

    def __init__(self, offset: int) -> None:
        self.offset = offset


@dataclass(frozen=True)
class Scaled(TopK):
    factor: Any = 1


class Undeclared(Scaled):
    """No dataclass itself, though it inherits from one."""

    def __init__(self, offset: int) -> None:
        super().__init__()
        object.__setattr__(self, "offset", offset)


def multiply(factor: int) -> Any:
    return lambda gradient: factor * gradient


OURS = [part for part in SPARSIFIERS if not isinstance(part, Halving)]


@pytest.mark.parametrize("part", [*OURS, Never(), WhenCheaper(), AFFINE])
def test_what_is_ours_is_described_by_its_repr(part: Any) -> None:
    assert describe(part) == repr(part)


# pairs of equal parts, and one that differs
KINDS: list[tuple[Any, Any, Any]] = [
    (Holding(a=1), Holding(a=1), Holding(a=2)),
    (Holding(a=1, b=2), Holding(b=2, a=1), Holding(a=1)),
    (Slotted(1), Slotted(1), Slotted(2)),
    (Scaled(0.5), Scaled(np.float64(0.5)), Scaled(np.float64(0.25))),
    (Scaled(0.1, 2), Scaled(0.1, 2), Scaled(0.1, 3)),
    (Scaled(0.1, Holding(a=1)), Scaled(0.1, Holding(a=1)), Scaled(0.1, Holding(a=2))),
    (Undeclared(1), Undeclared(1), Undeclared(2)),
    (Holding(a=[1, 2]), Holding(a=[1, 2]), Holding(a=(1, 2))),
    (Holding(a={"x": 1, "y": 2}), Holding(a={"y": 2, "x": 1}), Holding(a={"x": 1})),
    (Holding(a={"x", "y"}), Holding(a={"y", "x"}), Holding(a={"x"})),
    (Holding(a=np.arange(3)), Holding(a=np.arange(3)), Holding(a=np.arange(4))),
    (Holding(a=multiply(2)), Holding(a=multiply(2)), Holding(a=multiply(3))),
    (Holding(a=multiply), Holding(a=multiply), Holding(a=describe)),
    (Holding(a=len), Holding(a=len), Holding(a=max)),
    (Holding(a=TopK), Holding(a=TopK), Holding(a=Scaled)),
    (Holding(a=TopK().select), Holding(a=TopK().select), Holding(a=TopK(0.5).select)),
    (
        Holding(a=np.random.default_rng(0)),
        Holding(a=np.random.default_rng(0)),
        Holding(a=np.random.default_rng(1)),
    ),
]


@pytest.mark.parametrize(("one", "same", "other"), KINDS)
def test_equal_parts_have_one_description_and_others_another(
    one: Any, same: Any, other: Any
) -> None:
    assert describe(one) == describe(same)
    assert describe(one) != describe(other)


def test_two_lambdas_of_one_line_differ() -> None:
    one, other = (lambda x: x + 1), (lambda x: x + 2)
    assert describe(Holding(f=one)) != describe(Holding(f=other))


def test_what_was_computed_from_the_rest_is_no_part_of_it() -> None:
    class Cached(Holding):
        @cached_property
        def doubled(self) -> int:
            return 2 * int(self.a)

    used = Cached(a=1)
    assert used.doubled == 2
    assert describe(used) == describe(Cached(a=1))


def test_fields_without_a_repr_are_left_out() -> None:
    @dataclass
    class Hiding:
        shown: int = 1
        hidden: int = field(default=0, repr=False)

    assert describe(Hiding(hidden=1)) == describe(Hiding(hidden=2))


def test_what_can_not_be_described_is_refused_by_name() -> None:
    with (
        open(__file__, encoding="utf-8") as file,
        pytest.raises(
            TypeError, match=r"sparsifier must be such .*Holding holds a TextIOWrapper"
        ),
    ):
        describe(Holding(log=file), "sparsifier")


def test_compiled_parts_are_told_apart_by_what_they_hold() -> None:
    """They have no attributes, whether their type is static or on the heap."""
    one, other = Holding(names=re.compile("a")), Holding(names=re.compile("b"))
    assert describe(one) == describe(Holding(names=re.compile("a")))
    assert describe(one) != describe(other)
    with pytest.raises(TypeError, match="Holding holds a lock"):
        describe(Holding(lock=threading.Lock()))


def test_what_a_class_borrows_from_a_compiled_one_does_not_make_it_one() -> None:
    class Borrowing(Holding):
        __hash__ = object.__hash__

    assert describe(Borrowing(a=1)).endswith("Borrowing(a=1)")


def test_parts_that_hold_each_other_are_refused() -> None:
    part = Holding()
    part.itself = part
    with pytest.raises(TypeError, match="parts that hold each other"):
        describe(part)
