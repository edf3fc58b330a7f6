"""The bytes that are reported are the bytes that were sent."""

import math
from typing import Any

import numpy as np
from hypothesis import given
from laws import SIZES, Kind, Ranks, kinds, shares

from hvd_sparse import TopK, WhenCheaper
from hvd_sparse.core.traffic import Traffic

LARGE = 32 + 512  # bytes of 100 of 10,000: 400 of values, 107 of indices, up to 8


@given(kind=kinds(), size=SIZES, share=shares())
def test_traffic_counts_the_payloads_that_travelled(
    sparsify: Any, dtype: np.dtype, kind: Kind, size: int, share: float
) -> None:
    ranks = Ranks(size, sparsify(share))
    elements = [0] * size
    for step in range(3):
        ranks.step([kind.make(dtype, step, rank) for rank in range(size)])
        for rank, sent in enumerate(ranks.sent):
            elements[rank] += sent.values.size
    wires = ranks.paths[0].exchange.wires
    sizes = [sum(payload.size for payload in wire["w"]) for wire in wires]
    for rank, path in enumerate(ranks.paths):
        traffic = path.traffic
        assert traffic.steps == 3
        assert traffic.sent_bytes == sizes[rank]
        assert traffic.received_bytes == sum(sizes) - sizes[rank]
        assert traffic.dense_bytes == 3 * math.prod(kind.shape) * dtype.itemsize
        assert traffic.tensors["w"].sent_elements == elements[rank]
        assert traffic.compression_ratio == traffic.dense_bytes / sizes[rank]


def test_a_step_that_was_not_finite_is_counted_too() -> None:
    ranks = Ranks(2, TopK(density=0.1))
    for gradient in (np.ones(50, np.float32), np.full(50, np.nan, np.float32)):
        ranks.step([gradient, gradient])
    traffic = ranks.paths[0].traffic.tensors["w"]
    assert traffic.sent_bytes == 2 * (32 + 24)  # 20 bytes of values, 4 of indices
    assert traffic.dense_bytes == 2 * 50 * 4
    assert traffic.sent_elements == 10


def test_totals_are_sums_over_tensors_dense_ones_and_overhead_included() -> None:
    ranks = Ranks(2, TopK(density=0.01), dense=WhenCheaper())
    ranks.step([np.ones(10_000, np.float32)] * 2, "large")
    ranks.step([np.ones(3, np.float16)] * 2, "small")
    traffic = ranks.paths[0].traffic
    assert traffic.tensors["large"].route == "sparse"
    assert traffic.tensors["small"].route == "dense"
    assert traffic.tensors["large"].sent_bytes == LARGE
    assert traffic.tensors["small"].sent_bytes == 3 * 4  # summed as float32
    assert traffic.tensors["small"].sent_elements == 3
    assert traffic.tensors["small"].dense_bytes == 3 * 2
    traffic.overhead_sent_bytes += 56
    traffic.overhead_received_bytes += 8
    assert traffic.sent_bytes == LARGE + 3 * 4 + 56
    assert traffic.received_bytes == LARGE + 3 * 4 + 8
    assert traffic.dense_bytes == 10_000 * 4 + 3 * 2
    assert traffic.compression_ratio == traffic.dense_bytes / traffic.sent_bytes


def test_before_the_first_step_nothing_was_sent() -> None:
    traffic = Traffic()
    assert traffic.steps == traffic.sent_bytes == traffic.received_bytes == 0
    assert traffic.dense_bytes == 0
    assert math.isnan(traffic.compression_ratio)
