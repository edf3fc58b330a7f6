"""Which tensors go dense: a fact that every rank works out alone."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import DTYPES, FORMATS, Ranks

from hvd_sparse import (
    Never,
    RandomK,
    SignTopK,
    Stochastic,
    Threshold,
    TopK,
    WhenCheaper,
)
from hvd_sparse.core.contracts import Format
from hvd_sparse.core.payload import payload_bytes

FORMS = st.sampled_from([*FORMATS.values()])
NAMES = st.sampled_from(sorted(DTYPES))


@given(st.integers(0, 10_000), NAMES, FORMS, st.integers(1, 64))
def test_sparse_is_chosen_exactly_where_its_bytes_are_fewer(
    n: int, dtype: str, form: Format, size: int
) -> None:
    itemsize = DTYPES[dtype].itemsize

    def cheaper(k: int) -> bool:
        # P payloads in an allgather against a ring allreduce, both times P / (P - 1)
        return payload_bytes(form, dtype, n, k) * max(size, 2) < 2 * n * itemsize

    limit = WhenCheaper().limit(n, dtype, itemsize, form, size)
    assert limit <= n
    if limit >= 0:
        assert cheaper(limit)
    if limit < n:
        assert not cheaper(max(limit, -1) + 1)


@given(st.integers(0, 2**31 - 1), NAMES, FORMS, st.integers(1, 4096))
def test_never_lets_every_element_go_sparse(
    n: int, dtype: str, form: Format, size: int
) -> None:
    assert Never().limit(n, dtype, DTYPES[dtype].itemsize, form, size) == n


@pytest.mark.parametrize(
    ("sparsifier", "shape", "size", "route"),
    [
        (TopK(density=0.001), (100_000,), 1, "sparse"),
        (TopK(density=0.001), (100_000,), 64, "sparse"),
        (TopK(density=0.1), (100_000,), 4, "sparse"),
        (TopK(density=0.4), (100_000,), 4, "sparse"),
        (TopK(density=0.5), (100_000,), 4, "dense"),
        (RandomK(density=0.3), (100_000,), 4, "sparse"),  # no indices travel
        (RandomK(density=0.6), (100_000,), 4, "dense"),
        (SignTopK(density=1), (100_000,), 16, "sparse"),  # a bit, and indices
        (SignTopK(density=0.9), (100_000,), 32, "dense"),
        (Stochastic(expected_density=1), (100_000,), 4, "sparse"),  # as many as may be
        (TopK(density=0.001), (8,), 2, "dense"),
        (TopK(density=0.001), (), 2, "dense"),
        (TopK(density=0.001), (0,), 2, "dense"),
        (Threshold(value=1e9), (8,), 2, "dense"),
        (Threshold(value=1e9), (1000,), 2, "sparse"),
    ],
    ids=str,
)
def test_the_route_follows_from_facts_all_ranks_share(
    sparsifier: Any, shape: tuple[int, ...], size: int, route: str
) -> None:
    ranks = Ranks(size, sparsifier, dense=WhenCheaper())
    ranks.step([np.ones(shape, np.float32)] * size)
    for path in ranks.paths:
        assert path.plan.tensors["w"].route == route
        assert path.traffic.tensors["w"].route == route


@given(st.integers(1, 3000), NAMES, st.integers(2, 6))
def test_what_goes_sparse_sends_less_than_a_ring_allreduce(
    n: int, dtype: str, size: int
) -> None:
    ranks = Ranks(size, TopK(density=0.05), dense=WhenCheaper())
    ranks.step([np.ones(n, DTYPES[dtype])] * size)
    traffic = ranks.paths[0].traffic.tensors["w"]
    if traffic.route == "sparse":
        sent_in_allgather = traffic.sent_bytes * (size - 1)
        assert sent_in_allgather * size < 2 * (size - 1) * traffic.dense_bytes


def test_rules_are_values_that_their_repr_rebuilds() -> None:
    for rule in (WhenCheaper(), Never()):
        assert eval(repr(rule)) == rule
    assert WhenCheaper() != Never()
