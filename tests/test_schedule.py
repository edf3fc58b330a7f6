"""A density that changes with the steps: k is the same on every rank, in every step."""

from typing import Any

import numpy as np
import pytest
from doors import Halving
from laws import Ranks, receive, same_bits, send

from hvd_sparse import Never, PayloadError, RandomK, Sign, TopK, WhenCheaper
from hvd_sparse.core.path import GradientPath
from hvd_sparse.core.sparsifiers import elements

N = 1000


def gradients(step: int, ranks: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(step)
    return [rng.standard_normal(N).astype(np.float32) for _ in range(ranks)]


@pytest.mark.parametrize("values", [None, Sign()], ids=repr)
@pytest.mark.parametrize("inner", [TopK, RandomK])
def test_k_follows_the_schedule_and_nothing_is_lost(inner: type, values: Any) -> None:
    ranks, kept = Ranks(2, Halving(inner=inner), values=values), np.zeros((2, N))
    for step in range(6):
        given = gradients(step)
        outs = ranks.step(given)
        same_bits(*outs)
        k = elements(max(0.01, 0.1 / 2**step), N)
        for rank, sent in enumerate(ranks.sent):
            assert sent.values.size == k
            found = ranks.residuals()[rank].astype(np.float64)
            found[sent.indices] += sent.values
            np.testing.assert_allclose(found, kept[rank] + given[rank], atol=1e-5)
        kept = np.array(ranks.residuals(), np.float64)


def test_a_step_that_is_thrown_away_or_loaded_has_its_own_k() -> None:
    ranks = Ranks(1, Halving())
    for step in range(3):
        ranks.step(gradients(step, 1))
    state = ranks.paths[0].residuals.state_dict()
    again = Ranks(1, Halving())
    again.paths[0].residuals.load_state_dict(state)
    for each in (ranks, again):
        each.step(gradients(3, 1))
        assert each.sent[0].values.size == elements(0.1 / 8, N)
    same_bits(ranks.residuals()[0], again.residuals()[0])


def test_the_route_goes_by_the_density_where_it_ends() -> None:
    """Whatever it is in a step: what waits in a residual could not change its route."""
    ranks = Ranks(2, Halving(), dense=WhenCheaper())
    for step in range(5):
        ranks.step(gradients(step))
    assert ranks.paths[0].traffic.tensors["w"].route == "sparse"


@pytest.mark.parametrize("density", [0, -1.0, 1.5, float("nan")])
def test_a_density_out_of_range_is_refused_before_anything_moves(
    density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(1, Halving())
    ranks.step(gradients(0, 1))
    before = ranks.residuals()[0]
    monkeypatch.setattr(Halving, "density_at", lambda self, step: density)
    told = rf"^w: density_at\(1\) must be in \(0, 1\], got {density}"
    with pytest.raises(ValueError, match=told):
        send(ranks.paths[0], gradients(1, 1)[0])
    same_bits(ranks.residuals()[0], before)


def test_ranks_with_other_schedules_are_told() -> None:
    """Though their k is the same in this step."""
    ends = [path.exchange for path in Ranks(2, TopK(0.01)).paths]
    paths = [
        GradientPath(kind, end, dense=Never())
        for kind, end in zip((Halving(0.02), TopK(0.2)), ends, strict=True)
    ]
    flights = [send(path, gradients(0)[0]) for path in paths]
    for path, flight in zip(paths, flights, strict=True):
        with pytest.raises(PayloadError, match=r"w: rank \d: digest"):
            receive(path, flight, np.empty(N, np.float32))
