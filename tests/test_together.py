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
from hvd_sparse.kernels.threads import SMALLEST_PART

WIDE = [np.float32, np.float64]
SEVERAL = {"a": (7, 3), "b": (), "c": (300,), "d": (40000,)}


def several(step: int, rank: int, dtype: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([step, rank])
    return {
        name: np.asarray(rng.standard_normal(shape), dtype)
        for name, shape in SEVERAL.items()
    }


class Groups:
    """The groups of N ranks, and what each of them sent last."""

    def __init__(self, size: int, sparsifier: Any) -> None:
        self.ranks = Ranks(size, sparsifier)
        self.groups = [Together(path) for path in self.ranks.paths]
        self.flights: list[list[Flight]] = []

    def send(self, gradients: list[dict[str, np.ndarray]]) -> np.ndarray:
        """Returns what all ranks gather: one message of each."""
        self.flights = [
            send(group, own) for group, own in zip(self.groups, gradients, strict=True)
        ]
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


def send(group: Together, gradients: dict[str, np.ndarray]) -> list[Flight]:
    tensors = [group.path.admit(name, g) for name, g in gradients.items()]
    assert all(tensor.grouped for tensor in tensors)
    return group.send(tensors, list(gradients.values()))


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

    def grouped(sparsifier: Any, own: Any) -> bool:
        return Ranks(1, sparsifier).paths[0].admit("a", own).grouped

    assert grouped(TopK(0.05), gradient)
    assert not grouped(TopK(0.05), gradient.astype(np.float16))
    for sparsifier in (RandomK(0.05), Custom()):
        assert not grouped(sparsifier, gradient)


def test_large_tensors_go_alone_where_there_are_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large = np.zeros(2 * SMALLEST_PART, np.float32)
    for threads, grouped in (("1", True), ("2", False)):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        path = Ranks(1, TopK(0.05)).paths[0]
        assert path.admit("large", large).grouped == grouped
        assert path.admit("small", large[1:]).grouped


class Custom:
    """Some sparsifier of a user, that has a density and no more."""

    density = 0.05

    def select(self, residual: Any, gradient: Any, k: int, step: int) -> Selection:
        raise NotImplementedError


@pytest.mark.parametrize("name", ["a", "c"])
def test_a_gradient_that_is_kept_is_sent_with_the_next_one(name: str) -> None:
    first, second = (several(step, 0, np.float32)[name] for step in range(2))
    group = Groups(1, TopK(0.05)).groups[0]
    tensor = group.path.admit(name, first)
    group.keep(tensor, first)
    given = (first + second).reshape(-1)
    (flight,) = group.send([tensor], [second])
    group.path.recall(flight)
    same_bits(group.path.memory.residuals[name], given)


@pytest.mark.parametrize("fails", SEVERAL)
def test_gradients_of_a_group_that_does_not_leave_are_in_the_residuals(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = several(0, 0, np.float32)
    given = {name: gradient.copy() for name, gradient in gradients.items()}
    group = Groups(1, TopK(0.05)).groups[0]
    start = group.path.exchange.start

    def refuse(name: str, payload: Any) -> Any:
        if name == fails:
            raise RuntimeError("no")
        return start(name, payload)

    monkeypatch.setattr(group.path.exchange, "start", refuse)
    with pytest.raises(RuntimeError, match="no"):
        send(group, gradients)
    for name, gradient in given.items():
        same_bits(group.path.memory.residuals[name], gradient.reshape(-1))
        same_bits(gradients[name], gradient)


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
