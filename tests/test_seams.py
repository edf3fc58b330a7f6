"""Parts of one's own: a memory that adds a velocity, an observer, a collective."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from laws import Loopback, loopback, same_bits

from hvd_sparse import (
    Never,
    Selection,
    SignTopK,
    Sum,
    Threshold,
    TopK,
    WhenCheaper,
)
from hvd_sparse.core.contracts import Summed
from hvd_sparse.core.memory import ErrorFeedback
from hvd_sparse.core.path import GradientPath

RANKS = 3
STEPS = 6
SHAPES = {"a": (8, 5), "b": (300,), "c": (7, 1, 1)}
SIZES = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}


def gradients(rank: int, step: int) -> dict[str, np.ndarray]:
    """Whole numbers: sums of a few, and their halves, are exact."""
    rng = np.random.default_rng([rank, step])
    drawn = {n: rng.integers(-64, 65, k) for n, k in SIZES.items()}
    return {n: g.astype(np.float32).reshape(SHAPES[n]) for n, g in drawn.items()}


def path_on(exchange: Loopback, sparsifier: Any = None, **options: Any) -> GradientPath:
    options = {"op": Sum, "dense": Never(), **options}
    return GradientPath(sparsifier or TopK(0.1), exchange, **options)


def step_of(paths: Sequence[GradientPath], step: int) -> list[dict[str, np.ndarray]]:
    given = [gradients(rank, step) for rank in range(len(paths))]
    for path in paths:
        path.begin()
    flights = [path.send(each) for path, each in zip(paths, given, strict=True)]
    outs = [{name: np.full_like(g, 7) for name, g in each.items()} for each in given]
    for path, sent, out in zip(paths, flights, outs, strict=True):
        path.receive(sent, [*out.values()])
    return outs


# ---------------------------------------------------------------------------- memory


class Velocity(ErrorFeedback):
    """u = u / 2 + g and r = r + u; of what is sent both are 0.

    Lin et al., Deep Gradient Compression, 2018, arXiv:1712.01887, equation 7.
    """

    def __init__(self) -> None:
        super().__init__()
        self.velocities: dict[str, np.ndarray] = {}
        self._masked: dict[str, np.ndarray] = {}

    def residual(self, name: str, gradient: Any) -> Any:
        residual = super().residual(name, gradient)
        self.velocities.setdefault(name, np.zeros_like(residual))
        return residual

    def incoming(self, name: str, gradient: Any) -> Any:
        velocity = self.velocities[name]
        incoming = velocity / 2 + gradient.reshape(-1)
        np.copyto(velocity, incoming, where=np.isfinite(incoming))
        return incoming

    def sent(self, name: str, indices: Any) -> None:
        self._masked[name] = self.velocities[name][indices]
        self.velocities[name][indices] = 0

    def restore(self, name: str, indices: Any, sent: Any) -> None:
        super().restore(name, indices, sent)
        self.velocities[name][indices] = self._masked[name]

    def beside(self, name: str) -> dict[str, Any]:
        return {"velocity": self.velocities[name]}

    def forget(self, name: str) -> None:
        self.velocities.pop(name, None)


def corrected(size: int = RANKS, sparsifier: Any = None, **options: Any) -> Any:
    return [
        path_on(exchange, sparsifier, memory=Velocity(), **options)
        for exchange in loopback(size)
    ]


def kept(path: GradientPath) -> dict[str, list[np.ndarray]]:
    """Copies: of each tensor its residual and its velocity."""
    memory: Any = path.memory
    return {
        name: [memory.residuals[name].copy(), memory.velocities[name].copy()]
        for name in SIZES
    }


def zeros() -> dict[str, np.ndarray]:
    return {name: np.zeros(n, np.float32) for name, n in SIZES.items()}


def assert_same(found: Any, expected: Any) -> None:
    for name in SIZES:
        for one, other in zip(found[name], expected[name], strict=True):
            same_bits(one, other)


def test_a_velocity_is_added_in_place_of_the_gradient() -> None:
    """Against the equations, with the selections that the path has made."""
    paths = corrected()
    r, u = [zeros() for _ in paths], [zeros() for _ in paths]
    for step in range(STEPS):
        outs = step_of(paths, step)
        for name in SIZES:
            total = np.zeros(SIZES[name], np.float32)
            for rank, path in enumerate(paths):
                u[rank][name] = u[rank][name] / 2 + gradients(rank, step)[name].ravel()
                r[rank][name] += u[rank][name]
                flight = path.plan.tensors[name].flight
                assert flight is not None
                indices = flight.selection.indices
                total[indices] += r[rank][name][indices]
                r[rank][name][indices] = u[rank][name][indices] = 0
            for out in outs:
                same_bits(out[name].ravel(), total)
    for rank, path in enumerate(paths):
        assert_same(kept(path), {n: [r[rank][n], u[rank][n]] for n in SIZES})


@pytest.mark.parametrize("sparsifier", [TopK(0.1), SignTopK(0.1), Threshold(20.0)])
def test_what_is_rolled_back_is_as_if_nothing_had_been_sent(sparsifier: Any) -> None:
    (one,), (other,) = corrected(1, sparsifier), corrected(1, sparsifier)
    for step in range(STEPS):
        given = gradients(0, step)
        one.roll_back(one.send(given))
        for name, gradient in given.items():
            other.keep(name, gradient)
        assert_same(kept(one), kept(other))


class Fails(TopK):
    """Not to be trusted, and raises."""

    def select(self, residual: Any, gradient: Any, k: int, step: int) -> Selection:
        residual[:] = 9
        raise ZeroDivisionError


@pytest.mark.parametrize("failing", ["select", "incoming"])
def test_what_fails_to_leave_is_as_if_it_had_been_kept(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [one] = corrected(1, Fails(0.1) if failing == "select" else None)
    [other] = corrected(1)
    given = gradients(0, 0)
    incoming = Velocity.incoming

    def once(self: Velocity, name: str, gradient: Any) -> Any:
        if name == "b":
            monkeypatch.undo()
            raise ZeroDivisionError
        return incoming(self, name, gradient)

    if failing == "incoming":
        monkeypatch.setattr(Velocity, "incoming", once)
    with pytest.raises(ZeroDivisionError):
        one.send(given)
    for name, gradient in given.items():
        other.keep(name, gradient)
    assert_same(kept(one), kept(other))


def test_a_step_that_is_thrown_away_leaves_no_velocity() -> None:
    paths = corrected(undo=True)
    step_of(paths, 0)
    before = [kept(path) for path in paths]
    step_of(paths, 1)
    for path, expected in zip(paths, before, strict=True):
        path.residuals.discard()
        assert_same(kept(path), expected)


def test_a_restart_goes_on_with_the_velocity() -> None:
    paths, others = corrected(), corrected()
    for step in range(STEPS):
        step_of(paths, step)
    for path, other in zip(paths, others, strict=True):
        other.residuals.load_state_dict(path.residuals.state_dict())
    for one, other in zip(step_of(paths, 9), step_of(others, 9), strict=True):
        for name in SIZES:
            same_bits(one[name], other[name])
    for path, other in zip(paths, others, strict=True):
        assert_same(kept(path), kept(other))


def test_a_state_can_be_saved_where_a_tensor_goes_dense_or_was_never_sent() -> None:
    [path] = corrected(1, dense=WhenCheaper())
    path.admit("d", np.ones(300, np.float32))
    step_of([path], 0)
    tensors = path.residuals.state_dict()["tensors"]
    assert path.plan.tensors["c"].dense
    assert {n for n, saved in tensors.items() if "beside" in saved} == {"a", "b"}


def test_one_that_raises_keeps_no_other_from_the_residual(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [path] = corrected(1, Fails(0.1))
    incoming = Velocity.incoming

    def failing(self: Velocity, name: str, gradient: Any) -> Any:
        if name == "a":
            raise ZeroDivisionError
        return incoming(self, name, gradient)

    monkeypatch.setattr(Velocity, "incoming", failing)
    given = gradients(0, 0)
    with pytest.raises(ZeroDivisionError):
        path.send(given)
    for name in ("b", "c"):
        same_bits(path.memory.residuals[name], given[name].ravel())


def test_a_state_of_another_memory_is_refused_by_name() -> None:
    paths = corrected()
    step_of(paths, 0)
    for exchange, path in zip(loopback(RANKS), paths, strict=True):
        plain = path_on(exchange)
        plain.residuals.load_state_dict(path.residuals.state_dict())
        with pytest.raises(ValueError, match=r"^a: state has \['velocity'\] beside"):
            plain.send(gradients(0, 1))


def test_a_velocity_follows_the_loss_scale() -> None:
    scales = iter([1.0, 4.0, 4.0])
    [path] = corrected(1, loss_scale=lambda: next(scales))
    step_of([path], 0)
    before = kept(path)
    path.begin()
    assert_same(kept(path), {n: [4 * a for a in before[n]] for n in SIZES})


# -------------------------------------------------------------------------- observer


class Seen:
    """Writes down what it sees."""

    def __init__(self) -> None:
        self.selections: dict[str, Selection] = {}
        self.gradients: dict[str, np.ndarray] = {}
        self.outs: dict[str, np.ndarray] = {}

    def sent(self, flight: Any, gradient: Any) -> None:
        if not flight.tensor.dense:
            self.selections[flight.tensor.name] = flight.selection
        self.gradients[flight.tensor.name] = gradient.copy()

    def received(self, flight: Any, out: Any) -> None:
        self.outs[flight.tensor.name] = out.copy()


@pytest.mark.parametrize("sparsifier", [TopK(0.1), SignTopK(0.1)])
def test_an_observer_sees_what_was_given_selected_and_handed_back(
    sparsifier: Any,
) -> None:
    seen = [Seen() for _ in range(RANKS)]
    paths = [
        path_on(exchange, sparsifier, observers=[each])
        for exchange, each in zip(loopback(RANKS), seen, strict=True)
    ]
    outs = step_of(paths, 0)
    for rank, (each, out) in enumerate(zip(seen, outs, strict=True)):
        for name, gradient in gradients(rank, 0).items():
            same_bits(each.gradients[name], gradient)
            same_bits(each.outs[name], out[name])
            total = np.zeros(gradient.size, np.float32)
            for other in seen:
                chosen = other.selections[name]
                total[chosen.indices] += chosen.values
            same_bits(total, out[name].ravel())


class Raises(Seen):
    def sent(self, flight: Any, gradient: Any) -> None:
        raise ZeroDivisionError


def test_what_an_observer_raises_fails_the_step_and_nothing_is_lost() -> None:
    [exchange] = loopback(1)
    path = path_on(exchange, observers=[Raises()])
    with pytest.raises(ZeroDivisionError):
        path.send(gradients(0, 0))
    for name, gradient in gradients(0, 0).items():
        same_bits(path.memory.residuals[name], gradient.ravel())


# ------------------------------------------------------------------------ collective


class AtRoot:
    """Rank 0 alone sees what is sent, sums up, and gives the others the sum."""

    def __init__(self, rank: int, posted: list[dict[str, Selection]]) -> None:
        self._rank = rank
        self._posted = posted

    def start(self, flight: Any) -> None:
        chosen = flight.selection
        copied = chosen._replace(values=chosen.values.copy())
        self._posted[self._rank][flight.tensor.name] = copied
        flight.handle = flight.tensor.name

    def sum(
        self, flights: Sequence[Any], outs: Sequence[Any], scale: float
    ) -> list[Summed]:
        return [self._sum(f, o, scale) for f, o in zip(flights, outs, strict=True)]

    def _sum(self, flight: Any, out: Any, scale: float) -> Summed:
        out[...] = 0
        for rank in self._posted:
            chosen = rank[flight.handle]
            out.reshape(-1)[chosen.indices] += chosen.values * np.float32(scale)
        return Summed(flight.tensor.header.k, flight.tensor.payload.entries.size, 100)


def test_a_collective_of_ones_own_sums_up() -> None:
    posted: list[dict[str, Selection]] = [{} for _ in range(RANKS)]
    ends = loopback(RANKS)
    own = [path_on(e, collective=AtRoot(e.rank, posted)) for e in ends]
    usual = [path_on(exchange) for exchange in loopback(RANKS)]
    for step in range(STEPS):
        pairs = zip(step_of(own, step), step_of(usual, step), strict=True)
        for one, other in pairs:
            for name in SIZES:
                same_bits(one[name], other[name])
    assert [path.traffic.received_bytes for path in own] == [100 * 3 * STEPS] * RANKS
    assert not any(end.wires[end.rank] for end in ends)  # which it does not use
