"""What SignTopK and Stochastic promise beyond the laws: bounds, averages, draws."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import STYLES, Kernels, Kind, Ranks, kinds, wide

from hvd_sparse import SignTopK, Stochastic, WhenCheaper
from hvd_sparse.core.levels import Levels
from hvd_sparse.core.sparsifiers import elements
from hvd_sparse.core.stochastic import most_expected
from hvd_sparse.kernels import reference

# ------------------------------------------------------------------ SignTopK


@given(kind=kinds(), share=st.sampled_from([0.001, 0.1, 0.5]))
def test_the_largest_go_as_their_signs_and_mean_magnitude(
    kernels: Kernels, dtype: np.dtype, kind: Kind, share: float
) -> None:
    ranks = Ranks(1, SignTopK(density=share))
    gradient = kind.make(dtype)
    ranks.step([kernels.array(gradient)])
    total = np.zeros(gradient.size, wide(dtype)) + gradient.astype(wide(dtype)).ravel()
    k = elements(share, total.size)
    largest = np.sort(np.lexsort((np.arange(total.size), -np.abs(total)))[:k])
    indices, values, _ = ranks.sent[0]
    np.testing.assert_array_equal(indices, largest)
    np.testing.assert_array_equal(np.signbit(values), np.signbit(total[largest]))
    if k:
        scale = np.abs(total[largest].astype(np.longdouble)).mean()
        np.testing.assert_allclose(
            np.abs(values).astype(np.longdouble), scale, rtol=1e-6, atol=1e-45
        )


@pytest.mark.parametrize("density", [0.002, 0.05, 1.0])
@pytest.mark.parametrize("scales", [np.zeros(500), np.linspace(-6, 6, 500)], ids=len)
def test_the_residual_of_signs_stays_bounded(
    density: float, scales: np.ndarray
) -> None:
    steps, n = 10_000, 500
    ranks = Ranks(1, SignTopK(density=density))
    k = elements(density, n)
    rng = np.random.default_rng(0)
    most, total, sent = 0.0, np.zeros(n), np.zeros(n)
    largest = 0.0
    for _ in range(steps):
        gradient = (rng.standard_normal(n) * np.exp(scales)).astype(np.float32)
        ranks.step([gradient])
        total += gradient
        sent[ranks.sent[0].indices] += ranks.sent[0].values
        largest = max(largest, float(np.linalg.norm(gradient)))
        most = max(most, float(np.linalg.norm(ranks.residuals()[0])))
        for path in ranks.paths:  # the wires of these ranks remember everything
            path.exchange.wires[0].clear()
    # (sum_S |c|)^2 / k >= sum_S c^2 / k >= |c|^2 / n, so |c - sent| <= q |c| with
    # q = sqrt(1 - 1 / n), and |r| <= q (|r| + |g|), step by step
    q = math.sqrt(1 - 1 / n)
    assert most <= largest * q / (1 - q)
    assert k < n or most <= 60 * largest  # in fact far less than 2 n times
    drift = np.abs(sent + ranks.residuals()[0] - total)
    # two roundings a step, of sums that |r| + |g| bounds
    eps = float(np.finfo(np.float32).eps)
    assert np.all(drift <= steps * eps * (most + largest))


@given(kind=kinds(styles=["normal", "Laplace", "layers", "ascending", "one spike"]))
def test_the_rule_of_alistarh_takes_the_fewest_that_reach_the_norm(
    kernels: Kernels, dtype: np.dtype, kind: Kind
) -> None:
    ranks = Ranks(1, SignTopK.alistarh())
    gradient = kind.make(dtype)
    ranks.step([kernels.array(gradient)])
    total = gradient.astype(wide(dtype)).astype(np.float64).ravel()
    count = ranks.sent[0].indices.size
    sums = np.cumsum(np.sort(np.abs(total))[::-1])
    norm = np.linalg.norm(total)
    assert count <= math.isqrt(total.size) + 1
    if total.size:
        assert sums[count - 1] >= norm * (1 - 1e-9)
    if count > 1:
        assert sums[count - 2] < norm * (1 + 1e-9)


# ------------------------------------------------------------------ Stochastic


NORMAL = [style for style in STYLES if style not in ("subnormals", "extremes")]


@given(
    kind=kinds(shapes=[(50,), (9973,)], styles=NORMAL),
    share=st.sampled_from([0.001, 0.01, 0.1, 0.5, 1.0]),
)
def test_the_expected_number_is_met_within_one_percent(
    dtype: np.dtype, kind: Kind, share: float
) -> None:
    gradient = kind.make(dtype).astype(wide(dtype))
    size = elements(share, gradient.size)
    counts = reference.count_magnitudes(gradient)
    rate = Levels.of_bins(counts, gradient.itemsize).rate(size)
    magnitudes = np.abs(gradient.astype(np.longdouble))
    with np.errstate(invalid="ignore"):  # all for which inf stands
        chances = np.where(magnitudes > 0, np.minimum(1, rate * magnitudes), 0)
    wanted = min(size, np.count_nonzero(gradient))
    assert float(chances.sum()) == pytest.approx(wanted, rel=0.01)


def test_what_is_sent_at_random_is_right_on_average(
    kernels: Kernels, dtype: np.dtype
) -> None:
    # one of 8 elements is off by z standard deviations of its mean once in 10^6 tests
    steps, false_alarms = 4000, 1e-6
    gradient = np.array([40, -1.5, 1, -0.5, 0.25, 0.125, -0.0625, 0]).astype(dtype)
    ranks = Ranks(1, Stochastic(expected_density=3 / 8, seed=3))
    total, squares = np.zeros(8), np.zeros(8)
    for _ in range(steps):
        ranks.step([kernels.array(gradient)])
        indices, values, _ = ranks.sent[0]
        total[indices] += values
        squares[indices] += values.astype(np.float64) ** 2
        assert not ranks.residuals()[0].any()
    mean = total / steps
    deviation = np.sqrt(np.maximum(squares / steps - mean**2, 0) / steps)
    z = NormalDist().inv_cdf(1 - false_alarms / 2 / 8)
    exact = gradient.astype(np.float64)
    assert np.all(np.abs(mean - exact) <= z * deviation + 1e-6 * np.abs(exact))
    assert deviation[4] > 0  # it could have failed
    assert abs(mean[0] - exact[0]) <= 1e-6  # certain


def test_the_variance_is_what_the_measure_says() -> None:
    rng = np.random.default_rng(1)
    gradient = rng.standard_t(2, size=2000)
    size = 200
    levels = Levels.of_sorted(reference.largest_first(gradient))
    rate = levels.rate(size)
    chances = np.minimum(1, rate * np.abs(gradient))
    assert chances.sum() == pytest.approx(size)
    second = np.sum(gradient**2 / chances) / np.max(np.abs(gradient)) ** 2
    measured = levels.second_moments(np.array([size]))[0]
    assert measured == pytest.approx(second)


def test_draws_are_independent_of_rank_name_step_and_seed() -> None:
    gradient = np.ones(2000, np.float32)
    drawn = []
    for seed in (0, 1):
        ranks = Ranks(2, Stochastic(expected_density=0.5, seed=seed))
        for name in ("a", "b"):
            for _ in range(2):
                ranks.step([gradient] * 2, name)
                for sent in ranks.sent:
                    drawn.append(np.isin(np.arange(2000), sent.indices))
    for place, one in enumerate(drawn):
        for other in drawn[:place]:
            # 120 pairs of fair coins: six standard deviations, once in 4 million tests
            assert abs(np.mean(one == other) - 0.5) < 6 * 0.5 / math.sqrt(2000)


def test_more_than_may_be_sent_wait() -> None:
    # the expected number leaves room, so that this takes a draw that is made to fail
    gradient = np.linspace(1, 2, 1000, dtype=np.float32)
    sparsifier = Stochastic(seed=1)
    residual = np.zeros(1000, np.float32)
    indices, values, _ = sparsifier.draw(residual, gradient, 1.0, k=10, step=0)
    assert indices.size == 10
    assert np.count_nonzero(residual) == 990
    assert values.min() >= residual.max()


@pytest.mark.parametrize("k", [0, 1, 2, 10, 100, 10_000])
def test_the_expected_number_leaves_room(k: int) -> None:
    assert most_expected(k, k) == k
    size = most_expected(k, 20_000)
    assert min(k, 1) <= size <= k
    assert k < 50 or size + 6 * math.sqrt(size) <= k + 1


def test_a_draw_that_went_wrong_is_sent_later(kernels: Kernels) -> None:
    ranks = Ranks(2, Stochastic(expected_density=0.5), dense=WhenCheaper())
    gradients = [np.ones(400, np.float32), np.ones(400, np.float32)]
    gradients[1][3] = np.nan
    outs = ranks.step([kernels.array(gradient) for gradient in gradients])
    assert all(np.isnan(out).all() for out in outs)
    for sent, residual in zip(ranks.sent, ranks.residuals(), strict=True):
        assert sent.indices.size > 0
        np.testing.assert_array_equal(residual[sent.indices], sent.values)
    ranks.step([kernels.array(np.zeros(400, np.float32))] * 2)
    assert all(sent.indices.size > 0 for sent in ranks.sent)
