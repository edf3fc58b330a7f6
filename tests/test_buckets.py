"""A bucket: the same bits as its tensors get alone, and all or nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import SIZES, VALUES, Kind, Ranks, kinds, loopback, same_bits, send, shares

from hvd_sparse import (
    CAT,
    Affine,
    EliasFano,
    Never,
    PayloadError,
    RandomK,
    RawIndices,
    Selection,
    SignTopK,
    TopK,
)
from hvd_sparse.core.flight import Flight
from hvd_sparse.core.path import GradientPath
from hvd_sparse.kernels.host.threads import SMALLEST_PART

WIDE = [np.float32, np.float64]
SEVERAL = {"a": (7, 3), "b": (), "c": (300,), "d": (40000,)}
DTYPES = [np.dtype(kind) for kind in (np.float16, np.float32, np.float64)]


def several(step: int, rank: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([step, rank])
    return {
        name: np.asarray(rng.standard_normal(shape), dtype)
        for name, shape in SEVERAL.items()
    }


class Buckets:
    """Those of N ranks, in lock step."""

    def __init__(self, size: int, sparsifier: Any, **options: Any) -> None:
        self.ranks = Ranks(size, sparsifier, **options)
        self.paths = self.ranks.paths
        self.flights: list[list[Flight]] = []

    def send(
        self, gradients: Sequence[dict[str, np.ndarray]], in_place: Sequence[str] = ()
    ) -> None:
        self.flights = [
            path.send(own, in_place)
            for path, own in zip(self.paths, gradients, strict=True)
        ]

    def step(
        self, gradients: Sequence[dict[str, np.ndarray]], in_place: Sequence[str] = ()
    ) -> list[dict[str, np.ndarray]]:
        """One exchange; what each rank hands back."""
        self.send(gradients, in_place)
        given = [
            {n: g if n in in_place else np.full(g.shape, 7, g.dtype) for n, g in own}
            for own in (rank.items() for rank in gradients)
        ]
        for path, flights, outs in zip(self.paths, self.flights, given, strict=True):
            path.receive(flights, list(outs.values()))
        return given

    def damage(self, rank: int, name: str, place: int, value: int) -> None:
        """One byte of what a rank sent last, as all of them read it."""
        self.paths[0].exchange.wires[rank][name][-1][place] |= value


def priced(share: float) -> CAT:
    return CAT(TopK(), Affine(per_byte=1.0, per_message=1000 * share))


@given(
    several=st.lists(
        st.tuples(kinds(styles=["normal", "few values", "extremes"]), SIZES),
        min_size=1,
        max_size=6,
    ),
    size=SIZES,
    share=shares(),
    kind=st.sampled_from([TopK, SignTopK, RandomK, priced]),
    in_place=st.booleans(),
)
def test_a_bucket_has_the_bits_of_its_tensors_alone(
    several: list[tuple[Kind, int]], size: int, share: float, kind: Any, in_place: bool
) -> None:
    """Of any dtypes and layouts side by side, whichever of them kernels join."""
    alone, together = Ranks(size, kind(share)), Buckets(size, kind(share))
    for step in range(3):
        gradients = [
            {
                str(i): kind.make(DTYPES[place % 3], step, rank)
                for i, (kind, place) in enumerate(several)
            }
            for rank in range(size)
        ]
        expected = {
            name: alone.step([own[name].copy() for own in gradients], name)
            for name in gradients[0]
        }
        free = [n for n, g in gradients[0].items() if in_place and _may_be_written(g)]
        found = together.step(gradients, free)
        for name in expected:
            for rank in range(size):
                same_bits(found[rank][name], expected[name][rank])
                same_bits(*(r.residuals(name)[rank] for r in (alone, together.ranks)))
    counted = [ranks.paths[0].traffic.tensors for ranks in (alone, together.ranks)]
    assert counted[0] == counted[1]


@pytest.mark.parametrize("indices", [EliasFano(), RawIndices()], ids=repr)
@pytest.mark.parametrize("values", VALUES, ids=repr)
def test_a_bucket_has_the_bits_of_its_tensors_in_every_format(
    values: Any, indices: Any
) -> None:
    travel = {"values": values, "indices": indices}
    alone, together = Ranks(2, TopK(0.05), **travel), Buckets(2, TopK(0.05), **travel)
    for step in range(3):
        given = [several(step, rank) for rank in range(2)]
        found = together.step(given)
        for name in given[0]:
            expected = alone.step([own[name] for own in given], name)
            for rank in range(2):
                same_bits(found[rank][name], expected[rank])
                same_bits(*(r.residuals(name)[rank] for r in (alone, together.ranks)))


def _may_be_written(gradient: np.ndarray) -> bool:
    return gradient.flags.c_contiguous and gradient.flags.writeable


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_elements_stay_out_and_every_rank_is_told(value: float) -> None:
    buckets = Buckets(2, TopK(0.05))
    buckets.step([several(0, rank) for rank in range(2)])
    before = [path.memory.residuals["c"].copy() for path in buckets.paths]
    gradients = [several(1, rank) for rank in range(2)]
    gradients[1]["c"][5] = value
    outs = buckets.step(gradients)
    for rank, path in enumerate(buckets.paths):
        assert np.isnan(outs[rank]["c"]).all()
        assert all(np.isfinite(outs[rank][name]).all() for name in ("a", "b", "d"))
        added = gradients[rank]["c"]
        finite = np.isfinite(added)
        expected = np.where(finite, before[rank] + added, before[rank])
        same_bits(path.memory.residuals["c"], expected)


def test_kernels_join_what_they_can() -> None:
    gradient = several(0, 0)["a"]

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["a", "c"])
def test_a_gradient_that_is_kept_is_sent_with_the_next_one(
    name: str, dtype: Any
) -> None:
    first, second = (several(step, 0, dtype)[name] for step in range(2))
    path = Ranks(1, TopK(0.05)).paths[0]
    path.keep(name, first)
    added = [g.astype(np.promote_types(dtype, np.float32)) for g in (first, second)]
    path.roll_back([send(path, second, name)])
    same_bits(path.memory.residuals[name], (added[0] + added[1]).reshape(-1))


@pytest.mark.parametrize("gives_up", ["before it is sent", "after"])
def test_what_was_given_up_stays_when_the_next_gradient_is_thrown_away(
    gives_up: str,
) -> None:
    [end] = loopback(1)
    path = GradientPath(TopK(0.05), end, dense=Never(), undo=True)
    first, second = (several(step, 0)["c"] for step in range(2))
    path.begin()
    if gives_up == "after":
        path.roll_back([send(path, first)])
    else:
        path.keep("w", first)
    path.receive([send(path, second)], [np.empty_like(second)])
    path.residuals.discard()
    same_bits(path.memory.residuals["w"], first)


# ------------------------------------------------------------------ all or nothing


class Refusing:
    """A user's sparsifier that selects the first element, but of one tensor."""

    density = 0.5

    def __init__(self, refused: int) -> None:
        self.refused = refused

    def select(self, residual: Any, gradient: Any, k: int, step: int) -> Selection:
        residual += gradient
        indices = np.arange(k, dtype=np.int32)
        values = residual[:k].copy()
        residual[:k] = 0
        if residual.size == self.refused:  # in the midst of its work
            raise RuntimeError("no")
        return Selection(indices, values, 0)


@pytest.mark.parametrize("fails", SEVERAL)
@pytest.mark.parametrize("in_place", [[], list(SEVERAL)], ids=["beside", "in place"])
@pytest.mark.parametrize("dtype", WIDE)
def test_gradients_of_a_bucket_that_does_not_leave_are_in_the_residuals(
    fails: str, in_place: list[str], dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = several(0, 0, dtype)
    given = {name: gradient.copy() for name, gradient in gradients.items()}
    path = Ranks(1, TopK(0.05)).paths[0]
    start = path.exchange.start

    def refuse(name: str, payload: Any) -> Any:
        if name == fails:
            raise RuntimeError("no")
        return start(name, payload)

    with monkeypatch.context() as patch:
        patch.setattr(path.exchange, "start", refuse)
        with pytest.raises(RuntimeError, match="no"):
            path.send(gradients, in_place)
    for name, gradient in given.items():
        same_bits(path.memory.residuals[name], gradient.reshape(-1))
        left = np.zeros_like(gradient) if in_place else gradient
        same_bits(gradients[name], left)
    path.send(several(1, 0, dtype))  # the next step works


@pytest.mark.parametrize("fails", SEVERAL)
def test_a_bucket_of_which_a_users_sparsifier_raises_is_in_the_residuals(
    fails: str,
) -> None:
    [end] = loopback(1)
    size = int(np.prod(SEVERAL[fails]))
    path = GradientPath(Refusing(size), end, dense=Never())
    gradients = several(0, 0)
    with pytest.raises(RuntimeError, match="no"):
        path.send(gradients)
    for name in gradients:
        same_bits(path.memory.residuals[name], gradients[name].reshape(-1))


def test_a_refused_gradient_spoils_no_other_of_its_bucket() -> None:
    path = Ranks(1, TopK(0.05)).paths[0]
    with pytest.raises(TypeError, match="z: gradient must be one of"):
        path.send({**several(0, 0), "z": np.ones(3, np.int32)})
    assert not any(residual.any() for residual in path.memory.residuals.values())
    path.send(several(0, 0))


def test_a_tensor_that_is_under_way_stops_its_bucket_before_anything_is_sent() -> None:
    path = Ranks(1, TopK(0.05)).paths[0]
    gradients = several(0, 0)
    flight = send(path, gradients["c"], "c")
    before = path.memory.residuals["c"].copy()
    with pytest.raises(ValueError, match="c: was sent already and not received yet"):
        path.send(gradients)
    same_bits(path.memory.residuals["c"], before)
    assert set(path.memory.residuals) == {"c"}
    path.receive([flight], [gradients["c"]])


def test_what_arrived_otherwise_than_expected_is_received_one_by_one() -> None:
    buckets = Buckets(2, TopK(0.05))
    gradients = [several(0, rank) for rank in range(2)]
    buckets.send(gradients)
    buckets.damage(1, "c", 24, 128)  # a rank that met something not finite
    outs = [np.empty_like(g) for g in gradients[0].values()]
    buckets.paths[0].receive(buckets.flights[0], outs)
    found = dict(zip(SEVERAL, outs, strict=True))
    assert np.isnan(found["c"]).all()
    assert all(np.isfinite(found[name]).all() for name in ("a", "b", "d"))


def test_a_damaged_payload_of_a_bucket_is_an_error_that_names_the_tensor() -> None:
    buckets = Buckets(2, TopK(0.05), indices=RawIndices())
    gradients = [several(0, rank) for rank in range(2)]
    buckets.send(gradients)
    buckets.damage(1, "d", -1, 127)  # the last index
    outs = [np.empty_like(g) for g in gradients[0].values()]
    path = buckets.paths[0]
    with pytest.raises(PayloadError, match=r"d: .*indices must ascend in \[0, 40000\)"):
        path.receive(buckets.flights[0], outs)
    for name, gradient in gradients[0].items():  # all of them are back
        same_bits(path.memory.residuals[name], gradient.reshape(-1))
