"""The cost model of exchanges, against hand-made numbers and what real ranks count."""

import json
import math

import pytest
from launching import START_S, launch, needs_mpirun
from laws import DEFAULT, SIGNS

from hvd_sparse.core.payload import payload_bytes
from hvd_sparse.core.rings import (
    Link,
    Transfer,
    allgather,
    dense_allreduce,
    most_ranks,
    split_allreduce,
    union,
)
from hvd_sparse.core.routing import WhenCheaper
from hvd_sparse.core.sparsifiers import elements

DENSITY, STEPS, SIZES = 0.02, 3, 3  # of the program


@needs_mpirun
@pytest.mark.jobs
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_counted_bytes_match_the_model_exactly(ranks: int) -> None:
    job = launch("count_bytes.py", ranks=ranks, timeout_s=START_S + 10 * ranks)
    assert job.code == 0, job.errors
    told = [json.loads(line) for line in job.output.splitlines()]
    assert len(told) == ranks
    for found in told:
        assert found["ranks"] == ranks
        assert len(found["unions"]) == SIZES
        for scheme, form in (("TopK", DEFAULT), ("SignTopK", SIGNS)):
            assert len(found["bytes"][scheme]) == SIZES
            for name, (sent, received) in found["bytes"][scheme].items():
                k = elements(DENSITY, int(name))
                assert (
                    received
                    == STEPS * allgather(ranks, k, n=int(name), form=form).bytes
                )
                assert sent == STEPS * payload_bytes(form, "float32", int(name), k)
        for name, touched in found["unions"].items():
            n, k = int(name), elements(DENSITY, int(name))
            assert touched <= min(n, ranks * k)
            # five standard deviations, if each element is drawn or not by itself
            assert abs(touched - union(ranks, n, k)) < 5 * union(ranks, n, k) ** 0.5


def test_a_ring_moves_what_it_should() -> None:
    assert dense_allreduce(4, 1000) == Transfer(6, 6000)
    assert dense_allreduce(4, 1000, itemsize=2) == Transfer(6, 3000)
    assert allgather(4, 10) == Transfer(3, 3 * 112)


def test_a_link_adds_latency_and_bytes() -> None:
    link = Link(latency_s=0.001, bytes_per_s=1000)
    assert link.seconds(Transfer(6, 3000)) == pytest.approx(3.006)


@pytest.mark.parametrize(("n", "k"), [(25_557_032, 25_558), (100_000, 1000), (64, 1)])
def test_the_automatic_rule_ends_where_the_model_says(n: int, k: int) -> None:
    most = most_ranks(n, k)

    def goes_sparse(ranks: int) -> bool:
        return WhenCheaper().limit(n, "float32", 4, DEFAULT, ranks) >= k

    assert goes_sparse(most)
    assert not goes_sparse(most + 1)
    assert allgather(most, k, n=n).bytes < dense_allreduce(most, n).bytes
    assert allgather(most + 1, k, n=n).bytes >= dense_allreduce(most + 1, n).bytes


def test_a_union_fills_in() -> None:
    assert union(1, 1000, 10) == pytest.approx(10)
    assert union(2, 1000, 10) == pytest.approx(19.9)
    assert union(10_000, 1000, 10) == pytest.approx(1000)


def test_a_sparse_allreduce_is_dense_at_most() -> None:
    n, k = 10**6, 1000
    few, many = (split_allreduce(ranks, n, k) for ranks in (2, 4096))
    own = DEFAULT.bytes(k, "float32", n)
    both = DEFAULT.bytes(math.ceil(union(2, n, k)), "float32", n)
    assert few.bytes == pytest.approx(0.5 * (own + both))
    assert many.bytes == pytest.approx(4095 / 4096 * (own + 4 * n))


def test_bad_links_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="latency_s must not be negative, got -1"):
        Link(-1, 1)
    with pytest.raises(ValueError, match="bytes_per_s must be positive, got 0"):
        Link(0, 0)
