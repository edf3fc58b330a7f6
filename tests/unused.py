"""Scripts that synchronize and then do something else than `optimizer.step()`.

Each takes the gradients of a step as a script of dense training would: `synchronized`
has left the mean over ranks in p.grad.
"""

from functools import partial

import torch


def own_step(optimizer, parameters, bad):
    """Looks at the norm, as clipping does, and steps in any case."""
    torch.nn.utils.clip_grad_norm_(parameters, 100.0)
    with optimizer.skip_synchronize():
        optimizer.step()


def by_hand(optimizer, parameters, bad):
    """SGD through p.data, which counts no versions."""
    for parameter in parameters:
        parameter.data -= 0.1 * parameter.grad


def in_no_grad(optimizer, parameters, bad):
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(parameter.grad, alpha=-0.1)


class Base:
    """Another optimizer steps: the base of SAM or of a lookahead, a fused one."""

    def __init__(self, kind, **options):
        self.kind, self.options, self.made = kind, options, None

    def __call__(self, optimizer, parameters, bad):
        if self.made is None or self.made.param_groups[0]["params"] != parameters:
            self.made = self.kind(parameters, **self.options)
        self.made.step()


class Sam:
    """Two backward passes a step; weights move between them, and back."""

    def __init__(self):
        self.moves = None

    def __call__(self, optimizer, parameters, bad):
        with torch.no_grad():
            if self.moves is None:
                self.moves = [0.05 * p.grad for p in parameters]
                for parameter, move in zip(parameters, self.moves, strict=True):
                    parameter.add_(move)
                return
            for parameter, move in zip(parameters, self.moves, strict=True):
                parameter.sub_(move)
        self.moves = None
        with optimizer.skip_synchronize():
            optimizer.step()


def skipping(optimizer, parameters, bad):
    """Leaves a bad step out, without a word."""
    if not bad:
        own_step(optimizer, parameters, bad)


def by_closure(optimizer, parameters, bad):
    """Leaves a bad step out; `train` gives the others to step(closure)."""
    assert bad


CORRECT = {
    "own step": lambda: own_step,
    "by hand": lambda: by_hand,
    "in no_grad": lambda: in_no_grad,
    "base optimizer": lambda: Base(torch.optim.SGD, lr=0.1, momentum=0.9),
    "base, lr 0": lambda: Base(torch.optim.SGD, lr=0.0),
    "base, fused": lambda: Base(torch.optim.Adam, lr=0.1, fused=True),
    "SAM": Sam,
}


def train(model, optimizer, script, gradient_of, steps, bad=(), idle=()):
    """The script, for some steps; those in `bad` have gradients of 1e30.

    In steps of `idle` this rank has no backward pass.
    """
    parameters = list(model.values())
    for step in steps:
        for parameter in parameters:
            parameter.grad = None
        loss = sum(
            (p * gradient_of(name, step)).sum() for name, p in sorted(model.items())
        )
        loss = loss * (1e30 if step in bad else 1.0)
        if script is by_closure and step not in bad:
            optimizer.step(partial(backward, loss))
            continue
        if step not in idle:
            loss.backward()
        optimizer.synchronize()
        script(optimizer, parameters, step in bad)


def backward(loss):
    loss.backward()
    return loss
