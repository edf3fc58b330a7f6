"""The laws of the design, over every sparsifier, dtype, kind of kernel and shape.

Law 8 is in test_memory_use.py; law 4 for the kernels alone in test_kernels.py.
"""

import copy
import math
import pickle
import random
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from laws import (
    DTYPES,
    SAMPLED_SHAPES,
    SIZES,
    Kernels,
    Kind,
    Ranks,
    as_numpy,
    bits,
    kinds,
    loopback,
    on_device,
    on_the_wire,
    receive,
    rounds,
    same_bits,
    send,
    shares,
    wide,
)

from hvd_sparse import (
    CAT,
    Average,
    Never,
    PayloadError,
    RandomK,
    Selection,
    SignTopK,
    Sum,
    Threshold,
    TopK,
    WhenCheaper,
)
from hvd_sparse.core.memory import ErrorFeedback
from hvd_sparse.core.path import GradientPath
from hvd_sparse.core.sparsifiers import elements
from hvd_sparse.kernels import device, host
from hvd_sparse.kernels.contract import NothingAddedError
from hvd_sparse.kernels.host import candidates


def accumulated(residual: np.ndarray | None, gradient: np.ndarray) -> np.ndarray:
    """residual + gradient, flat, in the residual's dtype."""
    added = gradient.astype(wide(gradient.dtype)).reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return (np.zeros_like(added) if residual is None else residual) + added


def same_but_for_rounding(
    found: np.ndarray, expected: np.ndarray, sent: Selection
) -> None:
    """At what was sent as s and returned; all other elements are the same bits.

    c - s rounds by at most half an eps of |c| + |s|, and adding s again by at most half
    an eps of |c|, and a little.
    """
    error = np.abs(found - expected)
    allowed = np.zeros_like(expected)
    at, eps = sent.indices, np.finfo(expected.dtype).eps
    allowed[at] = eps * (np.abs(expected[at]) + np.abs(sent.values))
    assert np.all(error <= allowed)
    elsewhere = np.delete(np.arange(expected.size), at)
    same_bits(found[elsewhere], expected[elsewhere])


def assert_kept(ranks: Ranks, rank: int, expected: np.ndarray) -> None:
    """What was sent is back in the residual."""
    found = ranks.residuals()[rank]
    if rounds(ranks.paths[rank].plan.sparsifier):
        same_but_for_rounding(found, expected, ranks.sent[rank])
    else:
        same_bits(found, expected)


def rank_ordered_sum(arrays: list[np.ndarray]) -> np.ndarray:
    total = np.zeros_like(arrays[0])
    for array in arrays:
        total += array
    return total


def as_handed_back(total: np.ndarray, scale: float, like: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        scaled = np.multiply(total, total.dtype.type(scale))
        return np.asarray(scaled).astype(like.dtype).reshape(like.shape)


# ------------------------------------------------------------------ 1 and 2: the path


@given(kind=kinds(), size=SIZES, share=shares())
def test_nothing_is_lost(
    kernels: Kernels,
    with_residual: Any,
    dtype: np.dtype,
    kind: Kind,
    size: int,
    share: float,
) -> None:
    ranks = Ranks(size, with_residual(share))
    before: list[Any] = [None] * size
    for step in range(3):
        gradients = [kind.make(dtype, step, rank) for rank in range(size)]
        ranks.step([kernels.array(gradient) for gradient in gradients])
        after = ranks.residuals()
        for rank in range(size):
            indices, values, nonfinite = ranks.sent[rank]
            assert nonfinite == 0
            assert values.dtype == after[rank].dtype == wide(dtype)
            expected = accumulated(before[rank], gradients[rank])
            total = after[rank].copy()
            if rounds(ranks.paths[0].plan.sparsifier):
                total[indices] += values
                same_but_for_rounding(total, expected, ranks.sent[rank])
            else:
                assert not after[rank][indices].any()
                total[indices] = values
                same_bits(total, expected)
        before = after
    ranks.assert_all_went_sparse()


@given(kind=kinds(), size=SIZES, share=shares(), op=st.sampled_from([Average, Sum]))
def test_replicas_agree_bitwise(
    kernels: Kernels,
    any_sparsify: Any,
    dtype: np.dtype,
    kind: Kind,
    size: int,
    share: float,
    op: int,
) -> None:
    ranks = Ranks(size, any_sparsify(share), op=op)
    scale = 1 / size if op == Average else 1.0
    for step in range(2):
        gradients = [kind.make(dtype, step, rank) for rank in range(size)]
        outs = ranks.step([kernels.array(gradient) for gradient in gradients])
        decoded = [np.zeros(outs[0].size, wide(dtype)) for _ in range(size)]
        for dense, sent in zip(decoded, ranks.sent, strict=True):
            dense[sent.indices] = sent.values
        expected = as_handed_back(rank_ordered_sum(decoded), scale, outs[0])
        for out in outs:
            same_bits(out, expected)
    ranks.assert_all_went_sparse()


@given(kind=kinds(layouts=["contiguous"]), share=shares())
def test_ranks_with_other_kinds_of_arrays_agree_bitwise(
    any_sparsify: Any, dtype: np.dtype, kind: Kind, share: float
) -> None:
    ranks = Ranks(2, any_sparsify(share))
    for step in range(2):
        of_numpy, of_torch = kind.make(dtype, step, 0), kind.make(dtype, step, 1)
        here, there = ranks.step([of_numpy, on_device(of_torch)])
        same_bits(here, there)
    ranks.assert_all_went_sparse()


@given(kind=kinds(layouts=["contiguous"]), size=SIZES, share=shares())
def test_a_result_in_the_gradients_place_has_the_same_bits(
    kernels: Kernels,
    sparsify: Any,
    dtype: np.dtype,
    kind: Kind,
    size: int,
    share: float,
) -> None:
    ranks, others = Ranks(size, sparsify(share)), Ranks(size, sparsify(share))
    for step in range(3):
        gradients = [kind.make(dtype, step, rank).copy() for rank in range(size)]
        if step == 1 and gradients[0].size:
            gradients[0].reshape(-1)[-1] = np.nan  # nobody applies anything
        expected = ranks.step([kernels.array(g.copy()) for g in gradients])
        found = others.step_in_place([kernels.array(g) for g in gradients])
        for out, other in zip(expected, found, strict=True):
            same_bits(other, out)
        for own, other in zip(ranks.residuals(), others.residuals(), strict=True):
            same_bits(other, own)


def test_small_gradients_do_not_drift(
    kernels: Kernels, sparsify: Any, dtype: np.dtype
) -> None:
    steps, n = 1000, 50
    gradient = np.full(n, 1e-3).astype(dtype)
    ranks = Ranks(1, sparsify(0.02))
    total = np.zeros(n)
    for _ in range(steps):
        ranks.step([kernels.array(gradient)])
        indices, values, _ = ranks.sent[0]
        total[indices] += values
    exact = steps * gradient.astype(np.float64)
    # a residual is at most `exact`, so each of the additions into it rounds by at most
    # half an eps of that; float64 adds the sum of this test
    eps = np.finfo(wide(dtype)).eps + np.finfo(np.float64).eps
    drift = np.abs(total + ranks.residuals()[0] - exact)
    assert np.all(drift <= steps * eps / 2 * exact)
    ranks.assert_all_went_sparse()


# ------------------------------------------------------------------ 3: density 1


@given(kind=kinds(), size=SIZES, op=st.sampled_from([Average, Sum]))
def test_density_one_is_dense(
    kernels: Kernels, sparsify: Any, dtype: np.dtype, kind: Kind, size: int, op: int
) -> None:
    ranks = Ranks(size, sparsify(1), op=op)
    scale = 1 / size if op == Average else 1.0
    for step in range(2):
        gradients = [kind.make(dtype, step, rank) for rank in range(size)]
        # a residual of zeros makes 0.0 of -0.0
        total = rank_ordered_sum([accumulated(None, g) for g in gradients])
        expected = as_handed_back(total, scale, gradients[0])
        for out in ranks.step([kernels.array(gradient) for gradient in gradients]):
            same_bits(out, expected)
        assert not any(residual.any() for residual in ranks.residuals())
    ranks.assert_all_went_sparse()


@given(kind=kinds(), size=SIZES, op=st.sampled_from([Average, Sum]))
def test_a_tensor_routed_dense_is_the_librarys_own_sum(
    kernels: Kernels, dtype: np.dtype, kind: Kind, size: int, op: int
) -> None:
    ranks = Ranks(size, TopK(density=1), op=op, dense=WhenCheaper())
    scale = 1 / size if op == Average else 1.0
    gradients = [kind.make(dtype, 0, rank) for rank in range(size)]
    total = rank_ordered_sum([g.astype(wide(dtype)) for g in gradients])
    expected = as_handed_back(total, scale, gradients[0])
    for out in ranks.step([kernels.array(gradient) for gradient in gradients]):
        same_bits(out, expected)
    for path in ranks.paths:
        traffic = path.traffic.tensors["w"]
        assert traffic.route == "dense"
        assert traffic.sent_bytes == total.nbytes
        assert path.memory.residuals == {}


# ------------------------------------------------------------------ 4: TopK


@given(kind=kinds(), share=shares())
def test_topk_is_exact(
    kernels: Kernels, dtype: np.dtype, kind: Kind, share: float
) -> None:
    ranks = Ranks(1, TopK(density=share))
    residual = None
    for step in range(3):
        gradient = kind.make(dtype, step)
        ranks.step([kernels.array(gradient)])
        total = accumulated(residual, gradient)
        k = elements(share, total.size)
        by_magnitude_then_index = np.lexsort((np.arange(total.size), -np.abs(total)))
        expected = np.sort(by_magnitude_then_index[:k])
        np.testing.assert_array_equal(ranks.sent[0].indices, expected)
        residual = ranks.residuals()[0]
    ranks.assert_all_went_sparse()


@given(
    st.integers(0, 2**31 - 1),
    st.decimals("1e-9", 1, places=9, allow_nan=False).map(float),
)
def test_k_is_exact_for_the_density_as_written(n: int, density: float) -> None:
    k = elements(density, n)
    written = Fraction(str(density))
    if n == 0:
        assert k == 0
    elif written * n <= 1:
        assert k == 1
    else:
        assert k - 1 < written * n <= k <= n


@pytest.mark.parametrize(
    ("density", "n", "k"),
    [
        (0.1, 30, 3),
        (0.1, 31, 4),
        (0.07, 100, 7),  # 0.07 * 100 is 7.000000000000001
        (0.29, 100, 29),
        (1e-05, 100_000, 1),
        (1e-05, 100_001, 2),
        (0.001, 2**31 - 1, 2147484),
        (1, 2**31 - 1, 2**31 - 1),
        (np.float32(0.1), 30, 3),
        (np.float64(0.1), 30, 3),
    ],
)
def test_k_does_not_round(density: float, n: int, k: int) -> None:
    assert elements(density, n) == k


# ------------------------------------------------------------------ 5: same decision


@given(
    kind=kinds(),
    size=SIZES,
    share=shares(),
    dense=st.sampled_from([Never(), WhenCheaper()]),
)
def test_every_rank_decides_alike(
    any_sparsify: Any,
    dtype: np.dtype,
    kind: Kind,
    size: int,
    share: float,
    dense: Any,
) -> None:
    ranks = Ranks(size, any_sparsify(share), dense=dense)
    for step in range(2):
        ranks.step([kind.make(dtype, step, rank) for rank in range(size)])
        tensors = [path.plan.tensors["w"] for path in ranks.paths]
        assert len({(tensor.header, tensor.route) for tensor in tensors}) == 1
        assert tensors[0].header.step == step + 1


def test_the_order_of_names_changes_nothing(any_sparsify: Any) -> None:
    forth, back = Ranks(2, any_sparsify(0.1)), Ranks(2, any_sparsify(0.1))
    kind = Kind((40,), "normal", "contiguous", 1)
    names = ["a", "b", "c"]
    float32 = np.dtype(np.float32)
    for step in range(3):
        gradients = {
            name: [kind.make(float32, step, rank, place) for rank in (0, 1)]
            for place, name in enumerate(names)
        }
        one = {name: forth.step(gradients[name], name) for name in names}
        other = {name: back.step(gradients[name], name) for name in reversed(names)}
        for name in names:
            for found, expected in zip(other[name], one[name], strict=True):
                same_bits(found, expected)


def test_k_of_a_threshold_is_each_ranks_own_and_may_be_0(kernels: Kernels) -> None:
    ranks = Ranks(3, Threshold(value=1.0))
    gradients = [np.full(5, level, np.float32) for level in (0.5, 1.0, 0.25)]
    gradients[2][3] = -7
    outs = ranks.step([kernels.array(gradient) for gradient in gradients])
    assert [sent.values.size for sent in ranks.sent] == [0, 5, 1]
    assert [p.traffic.tensors["w"].sent_elements for p in ranks.paths] == [0, 5, 1]
    expected = np.array([1, 1, 1, -6, 1], np.float32) * np.float32(1 / 3)
    for out in outs:
        same_bits(out, expected)


def test_the_step_travels_and_disagreement_is_an_error(
    kernels: Kernels, any_sparsify: Any
) -> None:
    ranks = Ranks(2, any_sparsify(0.5))
    gradients = [kernels.array(np.ones(8, np.float32)) for _ in range(2)]
    ranks.step(gradients)
    ahead = ranks.paths[1].residuals.state_dict()
    ahead["tensors"]["w"]["step"] = 5
    ranks.paths[1].residuals.load_state_dict(ahead)
    flights = [send(p, g) for p, g in zip(ranks.paths, gradients, strict=True)]
    with pytest.raises(PayloadError, match=r"^w: rank 1: step 5, expected 1$"):
        receive(ranks.paths[0], flights[0], gradients[0])
    with pytest.raises(PayloadError, match=r"^w: rank 0: step 1, expected 5$"):
        receive(ranks.paths[1], flights[1], gradients[1])


# ------------------------------------------------------------------ 6: not finite


NOT_FINITE = [math.nan, math.inf, -math.inf]


@given(
    kind=kinds(),
    size=SIZES,
    share=shares(),
    wrong=st.sampled_from(NOT_FINITE),
    data=st.data(),
)
def test_nonfinite_stays_out(
    kernels: Kernels,
    with_residual: Any,
    dtype: np.dtype,
    kind: Kind,
    size: int,
    share: float,
    wrong: float,
    data: st.DataObject,
) -> None:
    n = math.prod(kind.shape)
    assume(n > 0)
    guilty = data.draw(st.integers(0, size - 1))
    places = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=3))
    ranks = Ranks(size, with_residual(share))
    ranks.step([kernels.array(kind.make(dtype, 0, rank)) for rank in range(size)])
    before = ranks.residuals()
    gradients = [kind.make(dtype, 1, rank).copy() for rank in range(size)]
    gradients[guilty].reshape(-1)[places] = wrong

    outs = ranks.step([kernels.array(gradient) for gradient in gradients])
    for rank, out in enumerate(outs):
        assert out.shape == kind.shape
        assert np.isnan(out.astype(np.float32)).all()
        found = ranks.sent[rank].nonfinite
        assert bool(found) == (rank == guilty)
        total = accumulated(before[rank], gradients[rank])
        kept = np.where(np.isfinite(total), total, before[rank])
        assert_kept(ranks, rank, kept)

    gradients = [kind.make(dtype, 2, rank) for rank in range(size)]
    outs = ranks.step([kernels.array(gradient) for gradient in gradients])
    assert np.isfinite(outs[0].astype(np.float64)).all()
    ranks.assert_all_went_sparse()


# no sum of two float16 overflows the float32 residual
@pytest.mark.parametrize("dtype", [d for n, d in DTYPES.items() if n != "float16"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_that_overflows_stays_out(
    kernels: Kernels, dtype: np.dtype, sign: int
) -> None:
    most = np.array([sign * 3e38 if wide(dtype) == np.float32 else sign * 1.7e308])
    gradient = np.repeat(most, 6).astype(dtype)
    ranks = Ranks(1, TopK(density=0.3))
    first = ranks.step([kernels.array(gradient)])[0]
    same_bits(first.reshape(-1)[:2], gradient[:2])
    second = ranks.step([kernels.array(gradient)])[0]
    assert ranks.sent[0].nonfinite
    assert np.isnan(second.astype(np.float64)).all()
    same_bits(ranks.residuals()[0], gradient.astype(wide(dtype)))


def test_a_gradient_of_nothing_but_nan_is_sent_in_vain(
    kernels: Kernels, with_residual: Any, dtype: np.dtype
) -> None:
    ranks = Ranks(2, with_residual(0.1))
    shape = SAMPLED_SHAPES[0]
    start = [np.ones(shape).astype(dtype), np.ones(shape).astype(dtype)]
    ranks.step([kernels.array(gradient) for gradient in start])
    before = ranks.residuals()
    nothing = np.full(shape, np.nan).astype(dtype)
    ranks.step([kernels.array(nothing), kernels.array(nothing)])
    assert all(sent.nonfinite for sent in ranks.sent)
    for rank, expected in enumerate(before):
        assert_kept(ranks, rank, expected)


# ------------------------------------------------------------------ 7: generators


def test_random_generators_are_untouched(
    kernels: Kernels, any_sparsify: Any, dtype: np.dtype
) -> None:
    def states() -> bytes:
        return pickle.dumps(
            (random.getstate(), np.random.get_state(), torch.get_rng_state().numpy())
        )

    kind = Kind((9973,), "normal", "contiguous", 0)
    before = states()
    ranks = Ranks(2, any_sparsify(0.01))
    for step in range(2):
        ranks.step([kernels.array(kind.make(dtype, step, rank)) for rank in (0, 1)])
    assert states() == before


# ------------------------------------------------------------------ restart


@given(kind=kinds(), size=st.integers(1, 3), share=shares())
def test_a_restart_continues_bitwise(
    kernels: Kernels,
    any_sparsify: Any,
    dtype: np.dtype,
    kind: Kind,
    size: int,
    share: float,
) -> None:
    def run(ranks: Ranks, steps: range) -> list[list[np.ndarray]]:
        return [
            ranks.step([kernels.array(kind.make(dtype, s, r)) for r in range(size)])
            for s in steps
        ]

    steady = Ranks(size, any_sparsify(share))
    run(steady, range(2))
    saved = [path.residuals.state_dict() for path in steady.paths]
    saved = copy.deepcopy(saved)
    expected = run(steady, range(2, 5))

    fresh, used = Ranks(size, any_sparsify(share)), Ranks(size, any_sparsify(share))
    run(used, range(7, 8))
    for ranks in (fresh, used):
        for path, state in zip(ranks.paths, saved, strict=True):
            path.residuals.load_state_dict(state)
        for found, wanted in zip(run(ranks, range(2, 5)), expected, strict=True):
            for one, other in zip(found, wanted, strict=True):
                same_bits(one, other)
        for one, other in zip(ranks.residuals(), steady.residuals(), strict=True):
            same_bits(one, other)
        assert ranks.paths[0].traffic.steps == 5


def test_a_state_is_a_copy(kernels: Kernels, any_sparsify: Any) -> None:
    ranks = Ranks(1, any_sparsify(0.1))
    kind = Kind((4, 5), "normal", "contiguous", 3)
    float32 = np.dtype(np.float32)
    ranks.step([kernels.array(kind.make(float32, 0))])
    state = ranks.paths[0].residuals.state_dict()
    residual = state["tensors"]["w"]["residual"]
    assert tuple(residual.shape) == (4, 5)
    before = as_numpy(residual).copy()
    ranks.step([kernels.array(kind.make(float32, 1))])
    same_bits(residual, before)
    ranks.paths[0].residuals.load_state_dict(state)
    ranks.step([kernels.array(kind.make(float32, 2))])
    same_bits(residual, before)


def test_a_state_of_before_numbers_were_chosen_is_read() -> None:
    ranks = Ranks(1, TopK(density=0.1))
    ranks.step([np.arange(20, dtype=np.float32)])
    state = ranks.paths[0].residuals.state_dict()
    assert state["tensors"]["w"].pop("chosen") == 2
    resumed = Ranks(1, TopK(density=0.1))
    resumed.paths[0].residuals.load_state_dict(state)
    resumed.step([np.ones(20, np.float32)])
    assert resumed.paths[0].plan.tensors["w"].header.step == 2


class Every:
    """Every second element from an offset; no dataclass."""

    density = 0.5

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def select(self, residual: Any, gradient: Any, k: int, step: int) -> Selection:
        residual += gradient
        indices = np.arange(self.offset, residual.size, 2, dtype=np.int32)[:k]
        values = residual[indices].copy()
        residual[indices] = 0
        return Selection(indices, values, 0)


def test_a_state_of_before_own_sparsifiers_were_agreed_on_is_read() -> None:
    ranks = Ranks(1, Every(0))
    ranks.step([np.arange(20, dtype=np.float32)])
    state = ranks.paths[0].residuals.state_dict()
    assert state["configuration"] == "Every(offset=0), op=Average, dense=Never()"
    state["configuration"] = "Every, op=Average, dense=Never()"
    Ranks(1, Every(0)).paths[0].residuals.load_state_dict(state)


def test_a_state_of_another_sparsifier_of_ones_own_is_refused_by_name() -> None:
    ranks = Ranks(1, Every(1))
    state = ranks.paths[0].residuals.state_dict()
    with pytest.raises(ValueError, match=r"configuration Every\(offset=1\).* expected"):
        Ranks(1, Every(0)).paths[0].residuals.load_state_dict(state)


def test_a_state_of_the_middle_of_a_step_has_what_is_on_its_way(
    kernels: Kernels, with_residual: Any, dtype: np.dtype
) -> None:
    path = Ranks(1, with_residual(0.2)).paths[0]
    gradient = Kind((4, 5), "normal", "contiguous", 3).make(dtype, 0)
    flight = send(path, kernels.array(gradient))
    saved = path.residuals.state_dict()["tensors"]["w"]
    np.testing.assert_allclose(
        as_numpy(saved["residual"]), gradient.astype(wide(dtype)), rtol=1e-6
    )
    assert saved["step"] == 0
    path.roll_back([flight])  # as when the exchange fails
    same_bits(path.memory.residuals["w"].reshape(4, 5), saved["residual"])


def test_a_state_after_a_gradient_that_was_not_finite_changes_nothing(
    kernels: Kernels, with_residual: Any
) -> None:
    ranks = Ranks(1, with_residual(0.2))
    good = Kind((4, 5), "normal", "contiguous", 3).make(np.dtype(np.float32), 0)
    begun = [(name, ranks.paths[0]) for name in ("bad", "w")]
    flights = [
        send(path, kernels.array(good * (np.nan if name == "bad" else 1)), name)
        for name, path in begun
    ]
    for flight in flights:
        receive(ranks.paths[0], flight, kernels.array(good.copy()))
    ranks.step([kernels.array(good)])
    before = ranks.residuals()[0]
    state = ranks.paths[0].residuals.state_dict()
    same_bits(ranks.residuals()[0], before)
    same_bits(state["tensors"]["w"]["residual"].reshape(-1), before)


class Ignoring(TopK):
    """Its select has an `out`, and leaves it as it is."""

    def select(
        self, residual: Any, gradient: Any, k: int, step: int, out: Any = None
    ) -> Selection:
        return super().select(residual, gradient, k, step)


def test_a_result_takes_the_place_of_its_gradient_whoever_selects() -> None:
    given = [np.array([4, 1 + rank], np.float32) for rank in range(2)]
    for result in Ranks(2, Ignoring(0.5)).step_in_place(given):
        np.testing.assert_array_equal(result, [4, 0])


def test_a_state_survives_being_loaded_and_saved_again(kernels: Kernels) -> None:
    ranks = Ranks(1, TopK(density=0.1))
    for name in ("used", "frozen"):
        ranks.step([kernels.array(np.arange(20, dtype=np.float32))], name)
    state = ranks.paths[0].residuals.state_dict()
    resumed = Ranks(1, TopK(density=0.1))
    resumed.paths[0].residuals.load_state_dict(state)
    resumed.step([kernels.array(np.arange(20, dtype=np.float32))], "used")
    again = resumed.paths[0].residuals.state_dict()
    assert set(again["tensors"]) == {"used", "frozen"}
    same_bits(
        again["tensors"]["frozen"]["residual"], state["tensors"]["frozen"]["residual"]
    )


def stateful(size: int = 2, density: float = 0.5, **options: Any) -> Ranks:
    ranks = Ranks(size, TopK(density=density), **options)
    ranks.step([np.ones((2, 3), np.float32)] * size)
    return ranks


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (stateful(3), "state was saved with size 3, expected 2"),
        (
            stateful(density=0.25),
            r"configuration TopK\(density=0.25\), op=Average, dense=Never\(\)"
            r", expected TopK\(density=0.5\), op=Average, dense=Never\(\)",
        ),
        (
            stateful(op=Sum),
            "saved with configuration .*op=Sum.*, expected .*op=Average",
        ),
    ],
    ids=["size", "density", "op"],
)
def test_a_state_of_another_job_is_refused_by_name(other: Ranks, message: str) -> None:
    path = stateful().paths[0]
    with pytest.raises(ValueError, match=message):
        path.residuals.load_state_dict(other.paths[0].residuals.state_dict())


def test_a_state_of_another_rank_is_refused_by_name() -> None:
    here, there = stateful().paths
    with pytest.raises(ValueError, match="state was saved with rank 1, expected 0"):
        here.residuals.load_state_dict(there.residuals.state_dict())


def test_a_state_of_another_format_is_refused_by_name() -> None:
    path = stateful().paths[0]
    with pytest.raises(ValueError, match="state was saved with format 9, expected 1"):
        path.residuals.load_state_dict({**path.residuals.state_dict(), "format": 9})


@pytest.mark.parametrize("used", [True, False], ids=["at loading", "at first use"])
@pytest.mark.parametrize(
    ("other", "found"),
    [
        (np.ones((3, 2), np.float32), r"shape \(3, 2\) and dtype float32"),
        (np.ones((2, 3), np.float64), r"shape \(2, 3\) and dtype float64"),
    ],
    ids=["shape", "dtype"],
)
def test_a_state_of_another_model_is_refused_by_name(
    other: np.ndarray, found: str, used: bool
) -> None:
    model = Ranks(1, TopK(density=0.5))
    model.step([other])
    state = model.paths[0].residuals.state_dict()
    gradient = np.ones((2, 3), np.float32)
    ranks = Ranks(1, TopK(density=0.5))
    if used:
        ranks.step([gradient])
    expected = rf"w: state has {found}, expected \(2, 3\) and float32"

    def load() -> None:
        ranks.paths[0].residuals.load_state_dict(state)
        ranks.step([gradient])

    with pytest.raises(ValueError, match=expected):
        load()


@pytest.mark.parametrize("used", [True, False], ids=["at loading", "at first use"])
def test_a_state_that_is_not_finite_is_refused(used: bool) -> None:
    """It would never heal: what is not finite stays in a residual for ever."""
    state = copy.deepcopy(stateful().paths[0].residuals.state_dict())
    state["tensors"]["w"]["residual"][0, 1] = np.nan
    ranks = stateful() if used else Ranks(2, TopK(density=0.5))

    def load() -> None:
        ranks.paths[0].residuals.load_state_dict(state)
        ranks.step([np.ones((2, 3), np.float32)] * 2)

    with pytest.raises(ValueError, match="w: state has a residual that is not finite"):
        load()


def test_a_refused_state_changes_nothing() -> None:
    path = stateful().paths[0]
    state = path.residuals.state_dict()
    wrong = copy.deepcopy(state)
    wrong["tensors"]["w"]["shape"] = (3, 2)
    wrong["tensors"]["w"]["residual"] = np.zeros((3, 2), np.float32)
    with pytest.raises(ValueError, match=r"^w: state has shape"):
        path.residuals.load_state_dict(wrong)
    same_bits(
        path.residuals.state_dict()["tensors"]["w"]["residual"],
        state["tensors"]["w"]["residual"],
    )


def test_a_state_without_a_tensor_in_use_is_refused_by_name() -> None:
    state = stateful().paths[0].residuals.state_dict()
    ranks = stateful()
    ranks.step([np.ones(3, np.float32)] * 2, "extra")
    with pytest.raises(ValueError, match="state has no tensor 'extra'"):
        ranks.paths[0].residuals.load_state_dict(state)


# ------------------------------------------------------------------ 9: bad use


@pytest.mark.parametrize("kind", ["int64", "bool", "complex64", ">f4"])
def test_a_gradient_that_is_not_floating_is_refused_by_name(kind: str) -> None:
    path = Ranks(1, TopK()).paths[0]
    with pytest.raises(
        TypeError, match=f"^w: gradient must be one of float16, .*, got {kind}$"
    ):
        send(path, np.ones(3).astype(kind))


def test_a_gradient_that_changed_shape_or_dtype_is_refused_by_name(
    kernels: Kernels,
) -> None:
    ranks = Ranks(1, TopK())
    ranks.step([kernels.array(np.ones((2, 3), np.float32))])
    for other, found in [
        (np.ones((3, 2), np.float32), r"\(3, 2\) and dtype float32"),
        (np.ones((2, 3), np.float64), r"\(2, 3\) and dtype float64"),
    ]:
        with pytest.raises(
            ValueError,
            match=rf"^w: gradient has shape {found}, expected \(2, 3\) and float32",
        ):
            send(ranks.paths[0], kernels.array(other))


def test_a_tensor_too_large_for_int32_indices_is_refused_by_name() -> None:
    # one element of memory, seen 2**31 times
    gradient = np.broadcast_to(np.float32(0), (2, 2**30))
    path = Ranks(1, TopK()).paths[0]
    with pytest.raises(ValueError, match=r"^w: gradient .* 2\*\*31 - 1 .* 2147483648"):
        send(path, gradient)


@pytest.mark.parametrize("sparsifier", [TopK, None, "TopK", 0.1, object()])
def test_what_can_not_select_is_refused(sparsifier: Any) -> None:
    with pytest.raises(TypeError, match="sparsifier must have a select method"):
        Ranks(1, sparsifier)


@pytest.mark.parametrize("op", [2, -1, "Average", None])
def test_an_unknown_op_is_refused(op: Any) -> None:
    with pytest.raises(ValueError, match="op must be Average or Sum, got"):
        Ranks(1, TopK(), op=op)


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        (
            np.ones(4, np.float32),
            np.ones(6, np.float32),
            r"w: rank 1: digest \d+, .*; here step 0, 2 elements of \(4,\) float32, "
            r"TopK\(density=0.5\), op=Average, dense=Never\(\)$",
        ),
        (
            np.ones(4, np.float32),
            np.ones(4, np.float64),
            r"w: rank 1: digest \d+, expected \d+: shape, dtype, step or config",
        ),
        (
            np.ones((2, 3), np.float32),
            np.ones((3, 2), np.float32),
            r"w: rank 1: digest \d+, expected \d+: shape, dtype, step or config",
        ),
    ],
    ids=["size", "dtype", "shape"],
)
def test_a_peer_with_another_tensor_is_an_error_on_every_rank(
    mine: np.ndarray, theirs: np.ndarray, message: str
) -> None:
    ranks = Ranks(3, TopK(density=0.5))
    gradients = [mine, theirs, mine]
    flights = [send(p, g) for p, g in zip(ranks.paths, gradients, strict=True)]
    for path, flight, gradient in zip(ranks.paths, flights, gradients, strict=True):
        found = message if path.exchange.rank != 1 else "w: rank 0: "
        with pytest.raises(PayloadError, match=found):
            receive(path, flight, np.empty_like(gradient))


@pytest.mark.parametrize(
    "other",
    [TopK(density=0.25), RandomK(density=0.5), Threshold(value=1.0)],
    ids=["density", "RandomK", "Threshold"],
)
def test_a_peer_with_another_configuration_is_an_error_on_every_rank(
    other: Any,
) -> None:
    chosen = zip((TopK(density=0.5), other), loopback(2), strict=True)
    paths = [GradientPath(one, end, dense=Never()) for one, end in chosen]
    gradient = np.ones(8, np.float32)
    flights = [send(path, gradient) for path in paths]
    for path, flight in zip(paths, flights, strict=True):
        peer = 1 - path.exchange.rank
        with pytest.raises(PayloadError, match=f"^w: rank {peer}: .*digest"):
            receive(path, flight, gradient)


def test_a_recalled_sending_leaves_nothing_lost(
    kernels: Kernels, with_residual: Any, dtype: np.dtype
) -> None:
    ranks = Ranks(1, with_residual(0.1))
    kind = Kind((3, 11), "normal", "contiguous", 5)
    ranks.step([kernels.array(kind.make(dtype, 0))])
    before = ranks.residuals()[0]
    path, gradient = ranks.paths[0], kind.make(dtype, 1)
    flight = send(path, kernels.array(gradient))
    ranks.sent = [on_the_wire(path, flight)]
    path.roll_back([flight])
    assert_kept(ranks, 0, accumulated(before, gradient))


@given(kind=kinds(), share=shares())
def test_a_gradient_is_only_read(
    kernels: Kernels, any_sparsify: Any, dtype: np.dtype, kind: Kind, share: float
) -> None:
    gradient = kernels.array(kind.make(dtype, 0))
    before = bits(gradient).copy()
    Ranks(1, any_sparsify(share)).step([gradient])
    np.testing.assert_array_equal(bits(gradient), before)


# ------------------------------------------------------- an error inside of a step


class Forgetful(ErrorFeedback):
    """There is no memory left for what rounding took."""

    def keep(self, name: str, indices: Any, rest: Any) -> None:
        raise MemoryError


@pytest.mark.parametrize("stage", ["encode", "keep"])
def test_an_error_between_selection_and_exchange_loses_nothing(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise MemoryError

    [end] = loopback(1)
    memory = Forgetful() if stage == "keep" else ErrorFeedback()
    path = GradientPath(SignTopK(0.2), end, dense=Never(), memory=memory)
    gradient = np.arange(1, 21, dtype=np.float32)
    with monkeypatch.context() as patch:
        if stage == "encode":
            patch.setattr("hvd_sparse.core.outbound.encode", fail)
        with pytest.raises(MemoryError):
            send(path, gradient)
    np.testing.assert_array_equal(path.memory.residuals["w"], gradient)


def keeps_all_when(fails: Callable[[], None], sparsifier: Any, n: int) -> None:
    """From the second step on there is no memory to select with."""
    path = Ranks(1, sparsifier).paths[0]
    gradient = np.arange(1, n + 1, dtype=np.float32)
    send(path, gradient)  # in place or not, it is in the residual, and then sent
    path.roll_back([path.plan.tensors["w"].flight])
    before = path.memory.residuals["w"].copy()
    fails()
    given = gradient.copy()
    with pytest.raises(MemoryError):
        send(path, given, in_place=["w"])
    np.testing.assert_array_equal(path.memory.residuals["w"], before + gradient)
    assert not given.any()  # all of it is in the residual


@pytest.mark.parametrize("sparsifier", [TopK(0.2), Threshold(5.0)], ids=repr)
@pytest.mark.parametrize("n", [20, 1 << 18])
def test_a_selection_without_memory_on_the_host_loses_nothing(
    sparsifier: Any, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers, asked = candidates.buffers, []

    def fail_once(*arguments: Any) -> Any:
        asked.append(arguments)
        if len(asked) == 1:
            raise MemoryError
        return buffers(*arguments)

    fails = partial(monkeypatch.setattr, candidates, "buffers", fail_once)
    keeps_all_when(fails, sparsifier, n)


def test_a_draw_without_memory_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise MemoryError

    fails = partial(monkeypatch.setattr, host, "random_indices", fail)
    keeps_all_when(fails, RandomK(0.2), 20)


def test_a_selection_without_memory_on_a_device_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gradient = torch.arange(1, 21, dtype=torch.float32)
    residual, isfinite = torch.ones(20), torch.Tensor.isfinite

    def fail(self: Any) -> Any:
        monkeypatch.undo()
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.Tensor, "isfinite", fail)
    with pytest.raises(NothingAddedError):
        device.select_top(residual, gradient, 3)
    assert torch.Tensor.isfinite is isfinite
    assert (residual == 1).all()
    device.accumulate(residual, gradient)
    assert (residual == gradient + 1).all()

    path = Ranks(1, TopK(0.2)).paths[0]
    monkeypatch.setattr(torch.Tensor, "isfinite", fail)
    with pytest.raises(torch.OutOfMemoryError):
        send(path, gradient)
    assert torch.equal(path.memory.residuals["w"], gradient)


class Priceless:
    """A cost that can not be told."""

    def of(self, sizes: Any, message: Any) -> Any:
        raise ZeroDivisionError

    def filled(self, sizes: Any, message: Any) -> Any:
        return sizes


@pytest.mark.parametrize("scheme", [TopK(), SignTopK()], ids=repr)
def test_a_cost_that_raises_loses_nothing(scheme: Any) -> None:
    path = Ranks(1, CAT(scheme, Priceless())).paths[0]
    gradient = np.arange(1, 21, dtype=np.float32)
    with pytest.raises(ZeroDivisionError):
        send(path, gradient)
    np.testing.assert_array_equal(path.memory.residuals["w"], gradient)
