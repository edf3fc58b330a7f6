"""Costs: configuration, the forms of the paper, and the bytes that really travel."""

import dataclasses
import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import PLAIN, SIGNS

from hvd_sparse import Affine, Packet, PaperPayload, Payload
from hvd_sparse.core import costs
from hvd_sparse.core.contracts import Format
from hvd_sparse.core.costs import Message
from hvd_sparse.core.payload import payload_bytes

EXAMPLES = [
    Payload(),
    PaperPayload(),
    PaperPayload(value_bits=64),
    Affine(per_byte=1.0, per_message=54.0),
    Affine(per_byte=1e-9, per_message=0, payload=PaperPayload()),
    Packet(per_packet=576, per_message=64, packet_bytes=512),
    Packet(576, 64, 512, PaperPayload()),
]
MESSAGES = st.builds(
    Message,
    form=st.sampled_from([PLAIN, SIGNS]),
    dtype=st.sampled_from(["float32", "float64"]),
    n=st.integers(1, 2**31 - 1),
)
SIZES = st.lists(st.integers(1, 10**6), min_size=1, max_size=20).map(
    lambda sizes: np.array(sizes, np.int64)
)


@pytest.mark.parametrize("cost", EXAMPLES, ids=repr)
def test_a_repr_rebuilds_its_cost(cost: Any) -> None:
    rebuilt = eval(repr(cost))
    assert rebuilt == cost
    assert hash(rebuilt) == hash(cost)
    for field in dataclasses.fields(cost):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(cost, field.name, 1)


@pytest.mark.parametrize("cost", EXAMPLES, ids=repr)
@given(message=MESSAGES, sizes=SIZES)
def test_more_elements_never_cost_less_and_filled_ones_no_more(
    cost: Any, message: Message, sizes: np.ndarray
) -> None:
    sizes = np.sort(sizes)
    costs = cost.of(sizes, message)
    assert costs.shape == sizes.shape
    assert costs.dtype == np.float64
    assert np.all(costs > 0)
    assert np.all(np.diff(costs) >= 0)
    filled = cost.filled(sizes, message)
    assert np.all(filled >= sizes)
    np.testing.assert_array_equal(cost.of(filled, message), costs)
    # and one more than filled costs more
    assert np.all(cost.of(filled + 1, message) > costs)


@given(message=MESSAGES, sizes=SIZES)
def test_payload_counts_what_is_sent(message: Message, sizes: np.ndarray) -> None:
    expected = [payload_bytes(*message, int(k)) for k in sizes]
    np.testing.assert_array_equal(Payload().of(sizes, message), expected)


@pytest.mark.parametrize(
    ("form", "n", "size", "bits"),
    [
        (PLAIN, 50_000, 7, 7 * (16 + 32)),
        (PLAIN, 65_536, 1, 16 + 32),
        (PLAIN, 65_537, 1, 17 + 32),
        (SIGNS, 50_000, 7, 32 + 7 * 16),
    ],
)
def test_paper_payload_counts_bits_as_the_paper_does(
    form: Format, n: int, size: int, bits: int
) -> None:
    message = Message(form, "float64", n)
    found = PaperPayload().of(np.array([size]), message)
    assert found.tolist() == [bits / 8]
    affine = Affine(1.0, 54.0, PaperPayload())
    assert affine.of(np.array([size]), message).tolist() == [bits / 8 + 54]
    packet = Packet(576, 64, 512, PaperPayload())
    expected = 576 * math.ceil(bits / 4096) + 64
    assert packet.of(np.array([size]), message).tolist() == [expected]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Affine(-1.0, 0.0), "per_byte must be finite and not negative, got -1"),
        (lambda: Affine(1.0, math.nan), "per_message must be finite and not negative"),
        (lambda: Affine(0.0, 0.0), "per_byte or per_message must be positive"),
        (lambda: Packet(math.inf, 1, 8), "per_packet must be finite"),
        (lambda: Packet(1, 1, 0), "packet_bytes must be positive, got 0"),
    ],
)
def test_a_cost_out_of_range_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------ measured costs


class Network:
    """A gather on a clock of its own: what it takes is given, not measured."""

    def __init__(self, ranks: list[Any]) -> None:
        self.ranks, self.now = ranks, 0.0

    def __call__(self, payload: np.ndarray) -> list[np.ndarray]:
        self.now += self.ranks[0](payload.size)
        if payload.size != 2 * 8:
            return [payload] * len(self.ranks)
        # the timings of all ranks
        times = [[rank(size) for size in (800, 80_000)] for rank in self.ranks]
        return [np.array(row).view(np.uint8) for row in times]


def test_an_affine_network_is_fitted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = (lambda b: 2e-9 * b + 3e-5), (lambda b: 1e-9 * b + 2e-5)
    for ranks in ([slow, fast], [fast, slow]):
        network = Network(ranks)
        monkeypatch.setattr(time, "perf_counter", lambda here=network: here.now)
        found = costs.measure(network, sizes=(800, 80_000))
        assert found.cost.per_byte == pytest.approx(2e-9)  # of the slowest
        assert found.cost.per_message == pytest.approx(3e-5)
        assert found.error == pytest.approx(0, abs=1e-9)
        assert found.sizes == (800, 80_000)


def test_no_fitted_cost_is_negative_and_the_error_is_told() -> None:
    sizes = (64, 6400, 640_000)
    for seconds in [(1e-5, 2e-3, 0.3), (1.0, 0.5, 0.2), (1e-3, 1e-3, 1e-3)]:
        found = costs._fit(sizes, seconds)
        assert found.cost.per_byte >= 0
        assert found.cost.per_message >= 0
        fitted = [found.cost.per_byte * b + found.cost.per_message for b in sizes]
        squares = [(f / s - 1) ** 2 for f, s in zip(fitted, seconds, strict=True)]
        assert found.error == pytest.approx(math.sqrt(sum(squares) / 3))
    assert found.error < 1e-12  # the last is flat


def test_a_measurement_prints_the_error_of_its_fit() -> None:
    cost = Affine(per_byte=1.53e-10, per_message=48e-6)
    found = costs.Measurement(cost, 0.16, (64, 6400), (5e-5, 5e-5))
    told = "an exchange takes 48 us and 0.153 ns a byte (error of the fit 16%)"
    assert str(found) == told


def test_tensors_that_leave_together_share_the_cost_of_a_message() -> None:
    whole = Affine(2.0, 54.0, PaperPayload())
    assert whole.among(3) == Affine(2.0, 18.0, PaperPayload())
    with pytest.raises(ValueError, match="tensors must be positive, got 0"):
        whole.among(0)


def test_a_measurement_without_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="sizes must be two or more"):
        costs.measure(lambda payload: [payload], sizes=(64,))
    with pytest.raises(ValueError, match="repeats positive"):
        costs.measure(lambda payload: [payload], repeats=0)
