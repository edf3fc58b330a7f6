"""A group in one go: the same bits as the path gives each of its tensors alone."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import SIZES, Kind, Ranks, kinds, same_bits, shares

from hvd_sparse import PayloadError, RandomK, Selection, TopK
from hvd_sparse.core.path import Flight
from hvd_sparse.core.together import Together

WIDE = [np.float32, np.float64]
SEVERAL = {"a": (7, 3), "b": (), "c": (300,), "d": (40000,)}


def several(step: int, rank: int, dtype: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([step, rank])
    return {
        name: np.asarray(rng.standard_normal(shape), dtype)
        for name, shape in SEVERAL.items()
    }


class Groups:
    """The groups of N ranks, and what each of them held last."""

    def __init__(self, size: int, sparsifier: Any) -> None:
        self.ranks = Ranks(size, sparsifier)
        self.groups = [Together(path) for path in self.ranks.paths]
        self.flights: list[list[Flight]] = []

    def send(self, gradients: list[dict[str, np.ndarray]]) -> np.ndarray:
        """Returns what all ranks gather: one message of each."""
        self.flights = [
            [hold(group, name, g) for name, g in own.items()]
            for group, own in zip(self.groups, gradients, strict=True)
        ]
        for group in self.groups:
            group.send(list(group.held))
            assert not group.held
        return np.concatenate(
            [wire[name][-1] for wire in self.wires for name in gradients[0]]
        )

    def step(self, gradients: list[dict[str, np.ndarray]]) -> None:
        """One exchange whose results take the place of the gradients."""
        gathered = self.send(gradients)
        for group, flights, own in zip(
            self.groups, self.flights, gradients, strict=True
        ):
            assert group.receive(flights, list(own.values()), gathered)

    @property
    def wires(self) -> list[dict[str, list[np.ndarray]]]:
        return self.ranks.paths[0].exchange.wires


def hold(group: Together, name: str, gradient: np.ndarray) -> Flight:
    flight = may_hold(group, name, gradient)
    assert flight is not None
    return flight


def may_hold(group: Together, name: str, gradient: np.ndarray) -> Flight | None:
    return group.hold(group.path.admit(name, gradient), gradient)


@pytest.mark.parametrize("dtype", WIDE)
@given(
    shapes=st.lists(
        kinds(styles=["normal", "few values", "extremes"], layouts=["contiguous"]),
        min_size=1,
        max_size=4,
    ),
    size=SIZES,
    share=shares(),
)
def test_a_group_has_the_bits_of_its_tensors_alone(
    dtype: Any, shapes: list[Kind], size: int, share: float
) -> None:
    alone, together = Ranks(size, TopK(share)), Groups(size, TopK(share))
    for step in range(3):
        gradients = [
            {
                str(i): kind.make(np.dtype(dtype), step, rank)
                for i, kind in enumerate(shapes)
            }
            for rank in range(size)
        ]
        expected = {
            name: alone.step([own[name].copy() for own in gradients], name)
            for name in gradients[0]
        }
        together.step(gradients)
        for name in expected:
            for rank in range(size):
                same_bits(gradients[rank][name], expected[name][rank])
                same_bits(*(r.residuals(name)[rank] for r in (alone, together.ranks)))
    counted = [
        [t.sent_bytes for t in r.paths[0].traffic.tensors.values()]
        for r in (alone, together.ranks)
    ]
    assert counted[0] == counted[1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_elements_stay_out_and_every_rank_is_told(value: float) -> None:
    groups = Groups(2, TopK(0.05))
    groups.step([several(0, rank, np.float32) for rank in range(2)])
    before = [path.memory.residuals["c"].copy() for path in groups.ranks.paths]
    gradients = [several(1, rank, np.float32) for rank in range(2)]
    gradients[1]["c"][5] = value
    added = [own["c"].copy() for own in gradients]
    gathered = groups.send(gradients)
    for rank, path in enumerate(groups.ranks.paths):
        flights, own = groups.flights[rank], gradients[rank]
        assert not groups.groups[rank].receive(flights, list(own.values()), gathered)
        flight = flights[2]._replace(handle=("c", 1))  # of the loopback
        assert np.isnan(path.receive(flight, own["c"])).all()
        finite = np.isfinite(added[rank])
        expected = np.where(finite, before[rank] + added[rank], before[rank])
        same_bits(path.memory.residuals["c"], expected)


def test_what_the_group_can_not_do_is_left_to_the_path() -> None:
    gradient = several(0, 0, np.float32)["a"]
    half, strided = gradient.astype(np.float16), gradient.T
    for own in (half, strided):
        group = Groups(1, TopK(0.05)).groups[0]
        assert may_hold(group, "a", own) is None
        assert not group.held
    for sparsifier in (RandomK(0.05), Custom()):
        assert may_hold(Groups(1, sparsifier).groups[0], "a", gradient) is None


class Custom:
    """Some sparsifier of a user, that has a density and no more."""

    density = 0.05

    def select(self, residual: Any, gradient: Any, k: int, step: int) -> Selection:
        raise NotImplementedError


def test_a_gradient_held_in_vain_is_accumulated_when_the_next_one_comes() -> None:
    first, second = (several(step, 0, np.float32)["c"] for step in range(2))
    group = Groups(1, TopK(0.05)).groups[0]
    hold(group, "c", first)
    hold(group, "c", second)
    given = first + second
    group.send(["c"])
    path = group.path
    path.recall(Flight(path.tensors["c"], None, "c"))
    same_bits(path.memory.residuals["c"], given)


def test_memory_that_the_next_gradient_took_is_not_accumulated() -> None:
    gradient = several(0, 0, np.float32)["c"]
    group = Groups(1, TopK(0.05)).groups[0]
    hold(group, "c", gradient)
    gradient[:] = several(1, 0, np.float32)["c"]
    given = gradient.copy()
    hold(group, "c", gradient)
    group.send(["c"])
    path = group.path
    path.recall(Flight(path.tensors["c"], None, "c"))
    same_bits(path.memory.residuals["c"], given)


def test_a_group_with_anything_unexpected_is_left_to_be_received_one_by_one() -> None:
    groups = Groups(2, TopK(0.05))
    gradients = [several(0, rank, np.float32) for rank in range(2)]
    gathered = groups.send(gradients)
    gathered[7] = 1  # a rank that met something not finite
    flights, outs = groups.flights[1], list(gradients[1].values())
    assert not groups.groups[1].receive(flights, outs, gathered)
    assert not groups.groups[1].receive(flights, outs, gathered[:-8])
    assert all(flight.tensor.in_flight for flight in flights)


def test_a_damaged_payload_of_a_group_is_an_error_that_names_the_tensor() -> None:
    groups = Groups(2, TopK(0.05))
    gradients = [several(0, rank, np.float32) for rank in range(2)]
    gathered = groups.send(gradients)
    gathered[-4:] = 255  # the last index
    flights, outs = groups.flights[0], list(gradients[0].values())
    with pytest.raises(PayloadError, match=r"d: indices must ascend in \[0, 40000\)"):
        groups.groups[0].receive(flights, outs, gathered)
    path = groups.ranks.paths[0]
    before = path.memory.residuals["d"].copy()
    path.recall(flights[-1])
    assert not np.array_equal(path.memory.residuals["d"], before)
