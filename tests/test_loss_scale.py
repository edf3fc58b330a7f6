"""Residuals follow a loss scale exactly; a step that nobody applies leaves no trace."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from laws import (
    Kernels,
    Kind,
    Ranks,
    as_numpy,
    loopback,
    receive,
    same_bits,
    send,
)

from hvd_sparse import Never, PayloadError, SignTopK, Threshold, TopK, WhenCheaper
from hvd_sparse.core.loss_scale import is_finite, ratio, scale_of
from hvd_sparse.core.path import GradientPath

SCALES = [1024.0, 1024.0, 512.0, 2048.0, 2.0, 2.0**20]


class Scaler:
    """What an integration is given: the scale of the step to come."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale

    __call__ = get_scale


def gradients(step: int, size: int, dtype: np.dtype) -> list[np.ndarray]:
    kind = Kind((7, 11), "normal", "contiguous", 5)
    return [kind.make(dtype, step, rank) for rank in range(size)]


def begin(ranks: Ranks) -> None:
    for path in ranks.paths:
        path.begin()


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64)])
def test_a_scaled_training_is_the_same_training(
    kernels: Kernels, with_residual: Any, dtype: np.dtype
) -> None:
    """Bitwise, at every scale: a power of two changes no digit."""
    scaler = Scaler()
    plain, scaled = Ranks(2, with_residual(0.2)), None
    scaled = Ranks(2, with_residual(0.2), loss_scale=scaler)
    for step, scale in enumerate(SCALES):
        scaler.scale = scale
        begin(scaled)
        given = gradients(step, 2, dtype)
        expected = plain.step([kernels.array(g) for g in given])
        multiplied = [kernels.array(g * dtype.type(scale)) for g in given]
        for found, wanted in zip(scaled.step(multiplied), expected, strict=True):
            same_bits(found / dtype.type(scale), wanted)
        both = zip(scaled.residuals(), plain.residuals(), strict=True)
        for found, wanted in both:
            same_bits(found / found.dtype.type(scale), wanted)


def both_steps(ranks: Ranks, bad: Sequence[float], good: np.ndarray, k: Kernels) -> Any:
    """One step of two tensors; of the first one the ranks give such a number each."""
    begin(ranks)
    flights = [
        (send(p, k.array(np.full(9, b, good.dtype)), "bad"), send(p, k.array(good)))
        for p, b in zip(ranks.paths, bad, strict=True)
    ]
    outs = []
    for path, pair in zip(ranks.paths, flights, strict=True):
        for flight, like in zip(pair, (np.zeros(9, good.dtype), good), strict=True):
            outs.append(receive(path, flight, k.array(like.copy())))
    return outs


@pytest.mark.parametrize("dense", [Never(), WhenCheaper()], ids=repr)
@pytest.mark.parametrize("bad", [[np.inf, 1.0], [1.0, np.nan], [3e38, 3e38]], ids=str)
def test_a_step_that_overflows_is_put_back_by_all(
    kernels: Kernels, with_residual: Any, bad: list[float], dense: Any
) -> None:
    """Also of the tensors that were fine, since their optimizer skips the step."""
    ranks = Ranks(2, with_residual(0.2), op=1, dense=dense, loss_scale=Scaler())
    good = Kind((200,), "normal", "contiguous", 5).make(np.dtype(np.float32), 0)
    outs = both_steps(ranks, bad, good, kernels)
    assert not np.isfinite(as_numpy(outs[0])).all()
    for path in ranks.paths:
        assert path.scaling.overflowed
        state = path.residuals.state_dict()["tensors"]["w"]  # already in a checkpoint
        if path.plan.tensors["w"].dense:
            assert state["residual"] is None
            continue
        np.testing.assert_allclose(as_numpy(state["residual"]), good, rtol=1e-5)
    begin(ranks)
    begin(ranks)  # nothing is put back twice
    for path in ranks.paths:
        if not path.plan.tensors["w"].dense:
            kept = as_numpy(path.memory.residuals["w"])
            np.testing.assert_allclose(kept, good, rtol=1e-5)


def test_a_step_that_is_finite_is_not_put_back(kernels: Kernels) -> None:
    ranks = Ranks(2, TopK(0.2), loss_scale=Scaler())
    good = np.arange(1, 201, dtype=np.float32)
    both_steps(ranks, [1.0, 2.0], good, kernels)
    assert not ranks.paths[0].scaling.overflowed
    begin(ranks)
    assert np.count_nonzero(ranks.residuals()[0]) == 160


def test_what_was_put_back_goes_with_a_later_step(kernels: Kernels) -> None:
    scaler = Scaler(1024.0)
    ranks = Ranks(2, TopK(1.0), loss_scale=scaler)
    good = np.arange(1, 21, dtype=np.float32)
    both_steps(ranks, [np.inf, 1.0], 1024 * good, kernels)
    scaler.scale = 512.0
    outs = both_steps(ranks, [1.0, 1.0], 512 * good, kernels)
    np.testing.assert_array_equal(as_numpy(outs[1]), 512 * (good + good))


def test_a_threshold_is_that_of_the_gradient_before_it_was_scaled() -> None:
    scaler = Scaler(1024.0)
    ranks = Ranks(1, Threshold(5.5), loss_scale=scaler)
    for scale in (1024.0, 256.0):
        scaler.scale = scale
        begin(ranks)
        ranks.step([np.arange(10, dtype=np.float32) * np.float32(scale)])
        assert np.all(ranks.sent[0].values >= 5.5 * scale)
        assert ranks.sent[0].values.size >= 4


# ------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("new", "old", "message"),
    [
        (3.0, 1.0, "loss scale must change by powers of two, .* got 3.0 after 1.0"),
        (0.0, 1.0, "loss scale must be positive and finite, got 0.0"),
        (float("inf"), 1.0, "loss scale must be positive and finite, got inf"),
        (float("nan"), 1.0, "loss scale must be positive and finite, got nan"),
        (-2.0, 1.0, "loss scale must be positive and finite, got -2.0"),
    ],
)
def test_a_scale_that_residuals_can_not_follow_is_refused(
    new: float, old: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ratio(new, old)


def test_any_first_scale_will_do_and_powers_of_two_of_it() -> None:
    assert ratio(3 * 2.0**16, 3 * 2.0**15) == 2
    ranks = Ranks(1, TopK(0.5), loss_scale=Scaler(1000.0))
    begin(ranks)


def test_a_residual_that_would_overflow_is_named(kernels: Kernels) -> None:
    scaler = Scaler()
    ranks = Ranks(1, TopK(0.1), loss_scale=scaler)
    begin(ranks)
    ranks.step([kernels.array(np.full(20, 3e38, np.float32))])
    before = ranks.residuals()[0]
    scaler.scale = 4.0
    with pytest.raises(ValueError, match="w: residual overflows where the loss scale"):
        begin(ranks)
    same_bits(ranks.residuals()[0], before)


@pytest.mark.parametrize("scaler", [1024.0, Scaler, "scaler"])
def test_what_is_no_scaler_is_refused(scaler: Any) -> None:
    with pytest.raises(TypeError, match=r"scaler must have get_scale\(\), such as"):
        scale_of(scaler)


def test_a_peer_with_another_scale_is_an_error_on_every_rank() -> None:
    scales = (Scaler(2.0), Scaler(4.0))
    paths = [
        GradientPath(TopK(0.5), end, dense=Never(), loss_scale=scale)
        for end, scale in zip(loopback(2), scales, strict=True)
    ]
    for path in paths:
        path.begin()
    flights = [send(path, np.ones(4, np.float32)) for path in paths]
    for path, flight in zip(paths, flights, strict=True):
        with pytest.raises(PayloadError, match="w: rank"):
            receive(path, flight, np.ones(4, np.float32))


# ---------------------------------------------------------------------------- states


def trained(scaler: Scaler | None, steps: int = 2) -> Ranks:
    ranks = Ranks(1, TopK(0.2), loss_scale=scaler)
    for step in range(steps):
        begin(ranks)
        for name in ("w", "late"):
            ranks.step(gradients(step, 1, np.dtype(np.float32)), name)
    return ranks


def test_a_state_goes_on_at_another_scale() -> None:
    scaler = Scaler(1024.0)
    ranks = trained(scaler)
    state = ranks.paths[0].residuals.state_dict()
    assert state["loss_scale"] == 1024.0
    resumed = Ranks(1, TopK(0.2), loss_scale=Scaler(256.0))
    resumed.paths[0].residuals.load_state_dict(state)
    begin(resumed)
    again = resumed.paths[0].residuals.state_dict()  # before any tensor was used
    for found, wanted in (("w", "w"), ("late", "late")):
        expected = as_numpy(state["tensors"][wanted]["residual"]) / 4
        same_bits(as_numpy(again["tensors"][found]["residual"]), expected)
    scaler.scale = 256.0
    begin(ranks)
    given = gradients(9, 1, np.dtype(np.float32))
    for found, wanted in zip(resumed.step(given), ranks.step(given), strict=True):
        same_bits(found, wanted)


def test_a_state_with_a_scale_needs_a_scaler() -> None:
    state = trained(Scaler(1024.0)).paths[0].residuals.state_dict()
    with pytest.raises(ValueError, match=r"saved with loss scale 1024\.0, expected"):
        Ranks(1, TopK(0.2)).paths[0].residuals.load_state_dict(state)


def test_a_state_without_a_scale_must_be_given_one() -> None:
    state = trained(None).paths[0].residuals.state_dict()
    resumed = Ranks(1, TopK(0.2), loss_scale=Scaler(1024.0))
    with pytest.raises(ValueError, match="state has no loss scale, expected one"):
        resumed.paths[0].residuals.load_state_dict(state)
    resumed.paths[0].residuals.load_state_dict({**state, "loss_scale": 1.0})


# ----------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    "values",
    [[1.0], [], [np.inf], [np.nan], [np.inf, -np.inf], [3e38] * 3, [-3e38, 3e38]],
    ids=str,
)
def test_finite_is_finite(values: list[float], kernels: Kernels) -> None:
    array = np.array(values, np.float32)
    assert is_finite(kernels.array(array)) == bool(np.isfinite(array).all())


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("n", [20, 70_000])
def test_what_overflows_is_noticed_by_all_ranks_also_before_it_is_scaled(
    n: int, in_place: bool
) -> None:
    """The mean of two is in range; their sum, which is made first, is not."""
    ranks = Ranks(2, TopK(0.2), loss_scale=Scaler())
    begin(ranks)
    gradient = np.zeros(n, np.float32)
    gradient[3] = 3e38
    step = ranks.step_in_place if in_place else ranks.step
    outs = step([gradient.copy(), gradient.copy()])
    assert [as_numpy(out)[3] for out in outs] == [np.inf, np.inf]
    assert [path.scaling.overflowed for path in ranks.paths] == [True, True]
    begin(ranks)
    assert [residual[3] for residual in ranks.residuals()] == [gradient[3]] * 2


def test_what_is_in_range_is_no_overflow(dtype: np.dtype) -> None:
    largest = float(torch.finfo(getattr(torch, dtype.name)).max) / 2
    ranks = Ranks(2, TopK(1.0), loss_scale=Scaler())
    begin(ranks)
    [first, _] = ranks.step([np.full(9, largest, dtype) for _ in range(2)])
    assert np.isfinite(first.astype(np.float64)).all()
    assert not any(path.scaling.overflowed for path in ranks.paths)


def test_signs_are_put_back_with_what_rounding_kept() -> None:
    ranks = Ranks(1, SignTopK(0.5), loss_scale=Scaler())
    begin(ranks)
    gradient = np.arange(1, 9, dtype=np.float32)
    ranks.step([gradient])
    ranks.paths[0].scaling.overflowed = True
    begin(ranks)
    np.testing.assert_allclose(ranks.residuals()[0], gradient)
