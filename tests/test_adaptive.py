"""CAT: the lemmas of its source, what it chooses, and how far it is exact."""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import KERNELS, STYLES, Kernels, Kind, Ranks, kinds, wide

from hvd_sparse import (
    CAT,
    Affine,
    ExactCAT,
    Never,
    Packet,
    PaperPayload,
    Payload,
    RandomK,
    SignTopK,
    Stochastic,
    TopK,
    WhenCheaper,
)
from hvd_sparse.core.adaptive import _coarse
from hvd_sparse.core.costs import Message
from hvd_sparse.core.frame import padded_bytes
from hvd_sparse.core.levels import Levels
from hvd_sparse.core.payload import payload_bytes
from hvd_sparse.kernels import reference

SCHEMES = [TopK(), SignTopK(), Stochastic()]
AFFINE = Affine(per_byte=1.0, per_message=54.0)
PACKET = Packet(per_packet=576, per_message=64, packet_bytes=512)
COSTS = [
    Payload(),
    AFFINE,
    Affine(1.0, 1e6),
    PACKET,
    PaperPayload(),
    Affine(1.0, 54.0, PaperPayload()),
    Packet(576, 64, 512, PaperPayload()),
]


def every_size(n: int) -> np.ndarray:
    return np.arange(1, n + 1)


def exact_levels(total: np.ndarray) -> Levels:
    return Levels.of_sorted(reference.largest_first(total))


# ------------------------------------------------------------------ configuration


EXAMPLES = [
    *(CAT(scheme, cost) for scheme in SCHEMES for cost in COSTS),
    CAT(TopK(), AFFINE, least=0.001, most=0.5, change=2.0),
    ExactCAT(SignTopK(), PACKET),
]


@pytest.mark.parametrize("cat", EXAMPLES, ids=repr)
def test_a_repr_rebuilds_it(cat: Any) -> None:
    rebuilt = eval(repr(cat), {**globals(), "inf": math.inf})
    assert rebuilt == cat
    assert type(rebuilt) is type(cat)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"most": 0}, r"most must be in \(0, 1\], got 0"),
        ({"most": 1.5}, r"most must be in \(0, 1\], got 1.5"),
        ({"least": 0.5, "most": 0.1}, r"least must be in \[0, 0.1\], got 0.5"),
        ({"least": -1}, r"least must be in \[0, 1.0\], got -1"),
        ({"change": 1}, "change must be more than 1, got 1"),
        ({"change": math.nan}, "change must be more than 1, got nan"),
    ],
)
def test_a_bound_out_of_range_is_refused_by_name(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CAT(TopK(), AFFINE, **options)


class Own(TopK):
    """Its own select, which CAT would not call."""

    def select(self, *arguments: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("scheme", [TopK, RandomK(), None, Own()])
def test_a_scheme_that_has_no_measure_is_refused(scheme: Any) -> None:
    with pytest.raises(TypeError, match="scheme must be TopK"):
        CAT(scheme, AFFINE)


@pytest.mark.parametrize("cost", [Affine, None, 1.0])
def test_a_cost_that_can_not_be_asked_is_refused(cost: Any) -> None:
    with pytest.raises(TypeError, match="cost must be such as"):
        CAT(TopK(), cost)


# ------------------------------------------------------------------ the lemmas


def quadratics(rng: np.random.Generator, n: int) -> tuple[np.ndarray, float]:
    """H of F(x) = x'Hx / 2, convex or not, and L, its largest |eigenvalue|."""
    root = rng.standard_normal((n, n)) * rng.lognormal(sigma=1, size=n)
    hessian = root @ (np.sign(rng.standard_normal(n))[:, None] * root.T)
    hessian = root @ root.T if rng.random() < 0.5 else (hessian + hessian.T) / 2
    return hessian, float(np.abs(np.linalg.eigvalsh(hessian)).max())


def sent_of(scheme: Any, gradient: np.ndarray, size: int) -> np.ndarray:
    """What is sent of the gradient, the rest 0."""
    largest = np.argsort(-np.abs(gradient), kind="stable")[:size]
    sent = np.zeros_like(gradient)
    sent[largest] = gradient[largest]
    if isinstance(scheme, SignTopK):
        sent = np.sign(sent) * np.abs(sent).sum() / size
    return sent


@pytest.mark.parametrize("scheme", [TopK(), SignTopK()], ids=repr)
def test_the_descent_is_at_least_what_the_measure_promises(scheme: Any) -> None:
    # 2,000 functions, 50 points and sizes each: 100,000 steps of 1 / L a scheme
    rng, n = np.random.default_rng(0), 20
    for _ in range(2000):
        hessian, lipschitz = quadratics(rng, n)
        points = rng.standard_normal((50, n)) * rng.lognormal(sigma=2, size=(50, n))
        gradients, sizes = points @ hessian, rng.integers(1, n + 1, size=(50, 1))
        measures = [
            scheme.descent(exact_levels(gradient), size)[0]
            for gradient, size in zip(gradients, sizes, strict=True)
        ]
        sent = map(sent_of, [scheme] * 50, gradients, sizes[:, 0])
        steps = np.array([*sent]) / lipschitz
        descents = np.sum(steps * (gradients - steps @ hessian / 2), axis=1)
        promised = measures * np.abs(gradients).max(axis=1) ** 2 / (2 * lipschitz)
        assert np.all(descents >= promised * (1 - 1e-9))


def test_the_measures_are_those_of_the_paper() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        gradient = rng.standard_t(2, size=50)
        levels, sizes = exact_levels(gradient), every_size(50)
        largest = np.sort(np.abs(gradient))[::-1]
        norm2 = np.sum(gradient**2) / largest[0] ** 2
        alpha = np.cumsum(largest**2) / np.sum(gradient**2)
        beta = np.cumsum(largest) ** 2 / (sizes * np.sum(gradient**2))
        np.testing.assert_allclose(TopK().descent(levels, sizes) / norm2, alpha)
        np.testing.assert_allclose(SignTopK().descent(levels, sizes) / norm2, beta)
        # its step size, and the scale that it belongs to, are what is folded into one
        steps = np.sqrt(beta) / np.sqrt(sizes) * np.linalg.norm(gradient)
        np.testing.assert_allclose(steps, np.cumsum(largest) / sizes)
        omega = Stochastic().descent(levels, sizes) * norm2
        assert np.all(np.diff(omega) > -1e-12)
        assert omega[-1] == pytest.approx(1)
        assert np.all(alpha >= beta - 1e-12)
        assert np.all(alpha >= sizes / 50 - 1e-12)


def test_the_descent_of_draws_is_on_average_what_the_measure_promises() -> None:
    # 200 points, 500 draws each; the mean over all is off by 5 deviations once in 10^6
    rng, n, draws = np.random.default_rng(2), 20, 500
    surplus = []
    for point in range(200):
        hessian, lipschitz = quadratics(rng, n)
        x = rng.standard_normal(n) * rng.lognormal(sigma=2, size=n)
        gradient = hessian @ x
        levels, size = exact_levels(gradient), 1 + point % n
        omega = Stochastic().descent(levels, np.array([size]))[0]
        omega *= np.sum(gradient**2) / np.abs(gradient).max() ** 2
        promised = omega * np.sum(gradient**2) / (2 * lipschitz)
        steps = np.zeros((draws, n))
        for draw in range(draws):
            residual = np.zeros(n)
            indices, values, _ = reference.draw(
                residual, gradient, min(levels.rate(size), 1e300), point * draws + draw
            )
            steps[draw, indices] = omega * values / lipschitz
        descent = steps @ gradient - np.einsum("ij,jk,ik->i", steps, hessian, steps) / 2
        surplus.append((descent - promised) / promised)
    mean = np.mean(surplus)
    deviation = np.std(surplus) / math.sqrt(np.size(surplus))
    assert mean >= -5 * deviation


# ------------------------------------------------------------------ what is chosen


def chosen(cat: CAT, total: np.ndarray, hint: int = 0, kernels: Any = None) -> int:
    """How many of these a fresh choice takes; for draws, how many it expects."""
    array = kernels.array if kernels else (lambda values: values)
    residual = array(np.zeros_like(total))
    choice, gradient = cat.after(hint), array(total)
    if isinstance(cat.scheme, Stochastic):
        levels = cat.all_levels(residual, gradient)
        return choice.best(levels, residual, total.size)
    return int(choice.select(residual, gradient, total.size, 0).indices.shape[0])


def efficiency(cat: CAT, total: np.ndarray) -> np.ndarray:
    """Of every size, exactly."""
    sizes = every_size(total.size)
    message = Message(cat.counted, str(total.dtype), total.size)
    measure = cat.scheme.descent(exact_levels(total), sizes)
    return np.asarray(measure / cat.cost.of(sizes, message))


GRADIENTS = kinds(
    shapes=[(1,), (2,), (15,), (257,), (4097,), (9973,)],
    styles=[style for style in STYLES if style != "subnormals"],
    layouts=["contiguous"],
)


@given(kind=GRADIENTS, scheme=st.sampled_from(SCHEMES), cost=st.sampled_from(COSTS))
def test_the_exact_choice_is_the_best_of_all(
    kernels: Kernels, dtype: np.dtype, kind: Kind, scheme: Any, cost: Any
) -> None:
    total = kind.make(dtype).astype(wide(dtype))
    cat = ExactCAT(scheme, cost)
    size = chosen(cat, total, kernels=kernels)
    every = efficiency(cat, total)
    assert every[size - 1] >= every.max() * (1 - 1e-9)
    assert np.all(every[: size - 1] <= every[size - 1] * (1 + 1e-9))


@given(
    kind=GRADIENTS,
    scheme=st.sampled_from(SCHEMES),
    cost=st.sampled_from(COSTS),
    hint=st.sampled_from([0, 1, 10, 5000]),
)
def test_the_fast_choice_is_as_good_within_three_percent(
    kernels: Kernels, dtype: np.dtype, kind: Kind, scheme: Any, cost: Any, hint: int
) -> None:
    total = kind.make(dtype).astype(wide(dtype))
    cat = CAT(scheme, cost)
    size = chosen(cat, total, hint, kernels)
    every = efficiency(cat, total)
    assert every[size - 1] >= 0.97 * every.max()


@given(kind=GRADIENTS, scheme=st.sampled_from(SCHEMES), cost=st.sampled_from(COSTS))
def test_every_kind_of_kernel_chooses_alike(
    dtype: np.dtype, kind: Kind, scheme: Any, cost: Any
) -> None:
    total = kind.make(dtype).astype(wide(dtype))
    sizes = {
        chosen(CAT(scheme, cost), total, kernels=kernels)
        for kernels in KERNELS.values()
    }
    assert len(sizes) == 1


def test_packets_are_filled() -> None:
    rng = np.random.default_rng(3)
    for cat in (CAT, ExactCAT):
        found = set()
        for point in range(600):
            # with a set-up of 64 bytes one packet is best of all; dearer ones share it
            cost = Packet(576, 64 * 10 ** (point % 4), 512, PaperPayload())
            spread = rng.uniform(0, 2)
            total = rng.standard_normal(4000) * rng.lognormal(sigma=spread, size=4000)
            found.add(chosen(cat(TopK(), cost), total))
        filled = {512 * 8 * j // (12 + 32) for j in range(1, 44)}
        assert found <= filled
        assert len(found) > 3


def test_a_payload_without_a_header_is_best_of_one_element() -> None:
    rng = np.random.default_rng(4)
    for _ in range(100):
        total = rng.standard_t(2, size=1000)
        assert chosen(CAT(TopK(), PaperPayload()), total) == 1
        assert chosen(ExactCAT(TopK(), PaperPayload()), total) == 1
        total = rng.standard_normal(1000)
        assert chosen(CAT(SignTopK(), PaperPayload()), total) > 1


def test_dearer_messages_are_larger() -> None:
    total = np.random.default_rng(5).standard_normal(20_000)
    for scheme in SCHEMES:
        overheads = [0, 100, 10_000, 1e6, 1e9]
        sizes = [chosen(CAT(scheme, Affine(1.0, o)), total) for o in overheads]
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[-1]
        assert sizes[-1] > 19_000 or isinstance(scheme, SignTopK)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sizes_are_those_that_doors_pad_payloads_to(scheme: Any, dtype: str) -> None:
    message = Message(CAT(scheme, AFFINE).counted, dtype, 1_000_000)
    sizes, costs = _coarse(AFFINE, message, 500_000)
    np.testing.assert_array_equal(costs, AFFINE.of(sizes, message))
    assert sizes[0] <= 2  # two signs are as many bytes as one
    assert sizes[-1] == 500_000
    assert sizes.size < 60
    for size in sizes[1:-1].tolist():
        taken = payload_bytes(message.form, dtype, message.n, size)
        room = padded_bytes(taken)
        assert taken <= room
        assert payload_bytes(message.form, dtype, message.n, size + 1) > room


def test_the_grid_costs_one_percent_at_most_and_a_thousandth_on_average() -> None:
    rng, losses = np.random.default_rng(6), []
    for scheme in SCHEMES:
        for cost in (AFFINE, Affine(1.0, 3000.0), PACKET, Payload()):
            for _ in range(20):
                total = rng.standard_t(3, size=5000)
                cat = CAT(scheme, cost)
                levels = exact_levels(total)
                size = cat.after(0).best(levels, total, total.size)
                every = efficiency(cat, total)
                losses.append(1 - every[size - 1] / every.max())
    assert np.mean(losses) < 0.001
    assert np.max(losses) < 0.01


def test_the_last_size_stays_while_it_is_about_as_good() -> None:
    total, stayed = np.random.default_rng(9).standard_t(3, size=5000), 0
    for scheme in SCHEMES:
        for cost in (AFFINE, Affine(1.0, 3000.0), PACKET, Payload()):
            cat = CAT(scheme, cost)
            every = efficiency(cat, total)
            every /= every.max()
            message = Message(cat.counted, "float64", total.size)
            for last in _coarse(cost, message, total.size)[0].tolist():
                size = cat.after(last).best(exact_levels(total), total, total.size)
                assert every[size - 1] >= 0.99
                if abs(every[last - 1] - 0.99) > 1e-6:
                    assert (size == last) == (every[last - 1] >= 0.99)
                stayed += size == last
    assert stayed > 20


# ------------------------------------------------------------------ bounds


@given(
    kind=GRADIENTS,
    scheme=st.sampled_from(SCHEMES),
    bounds=st.sampled_from([(0.0, 0.01), (0.2, 1.0), (0.1, 0.1)]),
)
def test_densities_stay_between_their_bounds(
    kind: Kind, scheme: Any, bounds: tuple[float, float]
) -> None:
    least, most = bounds
    total = kind.make(np.dtype(np.float64))
    cat = CAT(scheme, AFFINE, least=least, most=most)
    size, n = chosen(cat, total), total.size
    assert max(1, math.ceil(least * n - 1e-9)) <= size <= math.ceil(most * n + 1e-9)


@pytest.mark.parametrize("scheme", [TopK(), SignTopK()], ids=repr)
def test_numbers_change_by_the_given_factor_at_most(
    kernels: Kernels, scheme: Any
) -> None:
    rng = np.random.default_rng(7)
    ranks = Ranks(2, CAT(scheme, Affine(1.0, 1000.0), change=1.5))
    counts = []
    for step in range(12):
        scale = 1 if step < 6 else rng.lognormal(sigma=3, size=5000)
        gradients = [scale * rng.standard_normal(5000) for _ in range(2)]
        ranks.step([kernels.array(gradient) for gradient in gradients])
        counts.append([sent.indices.size for sent in ranks.sent])
    counts = np.array(counts)
    assert np.all(counts[1:] <= counts[:-1] * 1.5)
    assert np.all(counts[1:] >= counts[:-1] / 1.5)
    assert np.unique(counts).size > 3


def test_each_rank_chooses_for_itself() -> None:
    rng = np.random.default_rng(8)
    ranks = Ranks(2, CAT(TopK(), AFFINE))
    ranks.step([rng.standard_normal(5000), rng.standard_t(1, size=5000)])
    one, other = (sent.indices.size for sent in ranks.sent)
    assert one != other


def test_where_dense_is_cheaper_no_more_is_chosen_than_that() -> None:
    total = np.ones(10_000, np.float32)  # the best would be all
    ranks = Ranks(4, CAT(TopK(), Affine(1.0, 1e6)), dense=WhenCheaper())
    ranks.step([total] * 4)
    assert {t.route for t in ranks.paths[0].traffic.tensors.values()} == {"sparse"}
    assert (
        ranks.sent[0].indices.size == ranks.paths[0].plan.tensors["w"].header.k < 10_000
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_nothing_to_send_and_nothing_but_zeros(kernels: Kernels, scheme: Any) -> None:
    ranks = Ranks(1, CAT(scheme, AFFINE), dense=Never())
    for n in (0, 1, 100):
        gradient = kernels.array(np.zeros(n, np.float32))
        out = ranks.step([gradient], f"{n}")[0]
        assert out.size == n
        assert not out.any()
        assert ranks.sent[0].indices.size <= min(n, 1) + 4


class Mine(CAT):
    """Made of other arguments than CAT is."""

    def __init__(self) -> None:
        super().__init__(TopK(0.1), AFFINE)


class Remembered(NamedTuple):
    """A cost of an earlier release, which knew formats by their numbers."""

    name: str = "by number"

    def of(self, sizes: Any, message: Message) -> Any:
        return sizes * {1: 8.0, 2: 4.0, 3: 4.0}[message.layout] + 100

    def filled(self, sizes: Any, message: Message) -> Any:
        del message
        return sizes


@pytest.mark.parametrize(
    "cat",
    [
        Mine(),
        CAT(TopK(), Remembered()),
        CAT(SignTopK(), Remembered()),
        CAT(Stochastic(), Remembered()),
    ],
    ids=repr,
)
def test_what_was_made_for_earlier_releases_still_chooses(cat: Any) -> None:
    ranks = Ranks(2, cat)
    ranks.step([np.arange(1, 301, dtype=np.float32)] * 2)
    assert ranks.paths[0].traffic.tensors["w"].sent_elements > 0


def test_a_sample_does_not_follow_the_rows_of_a_layer() -> None:
    """Of 4,096 inputs the first 16 are always 0, as at the rim of images."""
    gradient = np.random.default_rng(0).standard_normal((1000, 4096)).astype(np.float32)
    gradient[:, :16] = 0
    cost = Affine(per_byte=1.0, per_message=100_000.0)
    fast, exact = Ranks(1, CAT(TopK(), cost)), Ranks(1, ExactCAT(TopK(), cost))
    for ranks in (fast, exact):
        ranks.step([gradient])
    found, best = (r.paths[0].traffic.tensors["w"].sent_elements for r in (fast, exact))
    assert 0.8 * best < found < 1.25 * best
