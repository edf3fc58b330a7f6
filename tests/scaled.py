"""Training with a GradScaler, as the tests of both PyTorch integrations do it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn


class World(NamedTuple):
    """One integration, seen from one rank.

    Attributes:
        gather: an object of every rank.
        distribute: (optimizer, named parameters, scaler or None) -> the optimizer, and
            what gives its state of residuals.
    """

    rank: int
    size: int
    gather: Callable[[Any], list[Any]]
    distribute: Callable[[Any, Any, Any], tuple[Any, Callable[[], Any]]]


class Linear:
    """Two parameters whose gradients are known: whole numbers, others on each rank."""

    def __init__(self, world: World) -> None:
        rng = np.random.default_rng(world.rank)
        self.named = [
            (name, nn.Parameter(torch.zeros(n))) for name, n in (("a", 8), ("b", 60))
        ]
        self.gradients = [
            torch.from_numpy(rng.integers(-9, 10, p.numel()).astype(np.float32))
            for _, p in self.named
        ]

    def loss(self) -> torch.Tensor:
        both = zip(self.named, self.gradients, strict=True)
        return sum(((p * g).sum() for (_, p), g in both), torch.zeros(()))


def leave_out(
    optimizer: Any, parameter: nn.Parameter, scaler: Any, bad: tuple[int, ...]
) -> None:
    """Six steps of README's recipe; a bad batch is left out without a word."""
    for step in range(6):
        optimizer.zero_grad()
        gradient = torch.arange(40.0) - 17 * step
        scaler.scale((parameter * gradient).sum()).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        if step not in bad:
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
        scaler.update()


def make_scaler(**options: Any) -> torch.amp.GradScaler:
    """One whose scale moves within a few steps."""
    given = {"init_scale": 1024.0, "growth_interval": 2, **options}
    return torch.amp.GradScaler("cpu", **given)


def train(
    world: World, model: Linear, steps: int, *, scaled: bool, bad: tuple[int, ...] = ()
) -> tuple[dict[str, Any], list[float]]:
    """SGD with rate 1; the last rank meets an overflow in `a` in the steps of `bad`.

    Returns:
        The state of residuals at the end, and the loss scales that there were.
    """
    scaler = make_scaler() if scaled else None
    optimizer = torch.optim.SGD([p for _, p in model.named], lr=1.0)
    optimizer, state = world.distribute(optimizer, model.named, scaler)
    scales = []
    for step in range(steps):
        optimizer.zero_grad()
        factor = scaler.get_scale() if scaler is not None else 1.0
        scales.append(factor)
        loss = model.loss() * factor
        if step in bad and world.rank == world.size - 1:
            loss = loss + model.named[0][1][0] * float("inf")
        loss.backward()
        optimizer.synchronize()
        if scaler is not None:
            scaler.scale(torch.zeros(1))  # which makes it ready
            scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
    return state(), scales


def assert_the_scale_changes_nothing(world: World) -> None:
    """Weights and residuals are the bits of a training without a scaler."""
    plain, scaled = Linear(world), Linear(world)
    expected, _ = train(world, plain, 7, scaled=False)
    state, scales = train(world, scaled, 7, scaled=True)
    assert len(set(scales)) > 2
    for (name, found), (_, wanted) in zip(scaled.named, plain.named, strict=True):
        assert torch.equal(found.detach(), wanted.detach())
        residual = state["tensors"][name]["residual"] / state["loss_scale"]
        assert torch.equal(residual, expected["tensors"][name]["residual"])


def assert_a_skipped_step_loses_nothing(world: World) -> None:
    """Also of the parameter that was fine; what was not finite alone is gone."""
    model, steps, bad = Linear(world), 7, (2, 5)
    state, scales = train(world, model, steps, scaled=True, bad=bad)
    assert scales[bad[0] + 1] < scales[bad[0]]
    name, parameter = model.named[1]
    residual = state["tensors"][name]["residual"] / state["loss_scale"]
    # all that was ever applied, and all that waits, is all that ever was
    sent = steps * model.gradients[1].double() - residual.double()
    total = torch.stack(world.gather(sent)).sum(0)
    found = -world.size * parameter.detach().double()
    torch.testing.assert_close(found, total, rtol=1e-6, atol=1e-3)
    assert all(torch.equal(p, parameter.detach()) for p in world.gather(parameter.data))
