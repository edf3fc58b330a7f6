"""The optimizer that one compressor serves, which Horovod made of the user's.

Horovod gives a compressor gradients and never says whose they are. What must be known
of their optimizer, its parameters, whether a step of it has begun, whether anything
became of its results, is found by looking at it when it first calls, and by hooks of
its step from then on.
"""

import threading
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hvd_sparse.advice import Adviser
from hvd_sparse.core.path import GradientPath
from hvd_sparse.torch.advice import advise
from hvd_sparse.torch.contended import Contended
from hvd_sparse.torch.contract import HorovodExchange
from hvd_sparse.torch.exchanges import is_exchanged
from hvd_sparse.torch.names import Caller, ParameterNames
from hvd_sparse.torch.step import Context
from hvd_sparse.torch.unused import Unused, looked_at
from hvd_sparse.torch.wrapped import (
    closure_of,
    enlist,
    exchanging,
    is_frozen,
    newcomers,
    release,
    with_gradients,
)

Tensor = torch.Tensor


def unsent(name: str) -> ValueError:
    """What to raise where a gradient of this rank alone would move a parameter."""
    return ValueError(
        f"{name}: joined the optimizer after hvd.DistributedOptimizer was made, and "
        "its gradient is not sent in this step; in this first one call "
        "optimizer.step() without optimizer.synchronize() before"
    )


class Served:
    """Of one compressor; no optimizer is known before its first gradient.

    Attributes:
        names: of its parameters.
    """

    def __init__(
        self,
        names: ParameterNames,
        path: GradientPath,
        exchange: HorovodExchange,
        group: Callable[[], Any],
        lock: threading.RLock,
    ) -> None:
        """Args: group: returns the process set. lock: of the compressor."""
        self.names = names
        self._path = path
        self._exchange = exchange
        self._group = group
        self._lock = lock
        self._contended = Contended()
        self._unused = Unused(path.residuals.applied)
        self._adviser = Adviser(advise, path.plan.sparsifier)
        self._optimizer: weakref.ref[Any] | None = None
        self._looked: set[str] = set()  # names of tensors that tell what is unused
        self._planned = False
        self._before_closure = False
        self._stepping = False

    def meet(self, optimizer: Any, caller: Caller | None) -> None:
        """It calls, or is about to step.

        Args:
            optimizer: Horovod's.
            caller: where it calls.

        Raises:
            ValueError: it is another one than before, or of another process set.
        """
        if self._known is not optimizer:
            with self._lock:
                self._get_to_know(optimizer, caller)

    @property
    def _known(self) -> Any:
        """None, too, if it is gone."""
        return None if self._optimizer is None else self._optimizer()

    def _get_to_know(self, optimizer: Any, caller: Caller | None) -> None:
        if self._known is not None:
            raise ValueError(
                "one SparseCompressor serves one optimizer, got a second: give each "
                "its own, with another prefix"
            )
        theirs, ours = getattr(optimizer, "process_set", None), self._group()
        if theirs is not None and theirs is not ours:
            raise ValueError(
                f"process_set must be that of the optimizer, {theirs}, got {ours}"
            )
        self._optimizer = weakref.ref(optimizer)
        self._before_closure = caller is not None and caller.steps_with_closure
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        self._adviser.step(optimizer, self._exchange.rank, stacklevel=4)

    def begin(self, caller: Caller | None) -> None:
        """The first gradient of a step comes.

        Args:
            caller: the optimizer that gives it, where it is one.

        Raises:
            ValueError: a parameter has joined, too late for this step.
        """
        joined: list[str] = []
        if caller is not None:
            joined = enlist(caller.optimizer, self.names)
            if not self._planned:  # before anything that may fail on this rank alone
                self._plan(caller.optimizer)
            if caller.synchronizing and not self._unused.were_zeroed():
                self._unused.forget()  # no backward pass since: they are sent again
        self._throw_away()
        self._path.begin()
        self._contended.clear()
        if joined and caller is not None and caller.synchronizing:
            raise unsent(joined[0])  # too late for this time

    def _plan(self, optimizer: Any) -> None:
        """Which tensors travel together; from facts that all ranks share."""
        named = self.names.of(optimizer)
        names = {named[p]: p for p in optimizer._requires_update if p in named}
        self._exchange.plan(
            {
                name: parameter.numel() * parameter.element_size()
                for name, parameter in names.items()
                if not self._path.plan.goes_dense(name, parameter)
            }
        )
        self._looked = looked_at(names)
        self._planned = True

    def _throw_away(self) -> None:
        """The step before, if nothing became of it."""
        if not self._unused.is_thrown_away() or self._path.scaling.overflowed:
            return
        if self._path.residuals.can_discard:
            self._path.residuals.discard()
        else:
            self._unused.warn(stacklevel=6)

    def is_idle(self, caller: Caller, parameter: Tensor) -> bool:
        """Whether there is nothing to send, nor would the result be of use.

        Of a parameter that is frozen, whose residual waits until it is thawed, and
        before a closure has computed gradients.
        """
        if is_frozen(caller.optimizer, parameter):
            return True
        self._before_closure = self._before_closure and caller.steps_with_closure
        return self._before_closure

    def hand_back(self, context: Context) -> Tensor:
        """The result of a gradient, as Horovod gets it.

        Outside of a step that is after `synchronize`, by the user, who may do with it
        what he likes.
        """
        result, place = context.result, context.place
        assert result is not None
        parameter = place.parameter if context.name in self._looked else None
        if parameter is not None and not self._stepping:
            self._unused.note(parameter, result)
        self._contended.keep(context.name, place, result)
        return place.seen(result)

    def release(self) -> None:
        """Let go what it waits for: its step has failed."""
        release(self._known)

    def synchronize(self) -> None:
        """In its place: exchange the gradients that are under way."""
        if (optimizer := self._known) is not None:
            optimizer.synchronize()

    def end(self) -> None:
        """Its step has been taken back, or thrown away: no result can be unused."""
        self._unused.forget()
        self._stepping = False
        if (optimizer := self._known) is not None:
            optimizer._synchronized = False  # its step exchanges what comes next

    def forget_plan(self) -> None:
        """Routes depend on the number of ranks, which may be another."""
        self._planned = False

    @property
    def may_ask(self) -> bool:
        """Whether somebody may ask for results; nobody does once it gave up a step."""
        if self._optimizer is None:
            return True
        optimizer = self._optimizer()
        return optimizer is not None and bool(optimizer._handles)

    def _before_step(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        with self._lock:
            self._stepping = True
            exchanges = callable(closure_of(args, kwargs))
            if not (exchanges or optimizer._should_synchronize):
                self._unused.forget()  # else `begin` tells whether they are used
            late = [] if optimizer._should_synchronize else with_gradients(optimizer)
            enlist(optimizer, self.names)
            if late:
                raise unsent(self.names.of(optimizer)[late[0]])
            if optimizer._synchronized and not optimizer._should_synchronize:
                self._contended.recall()
        return exchanging(optimizer, args, kwargs)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        del optimizer, args, kwargs
        self._stepping = False
        self._contended.stepped()
        self._path.residuals.applied()


@cache
def watch_steps(served: Callable[[Any], Served | None]) -> None:
    """Meet optimizers before their first step, too.

    Horovod calls no compressor where all was frozen when it took the optimizer.

    Args:
        served: finds what belongs to an optimizer; None where its compressor is none
            of ours.
    """

    def before_any_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        """What `meet` registers is called after this."""
        del args, kwargs
        ours = served(optimizer)
        if ours is not None and is_exchanged(optimizer) and newcomers(optimizer):
            ours.meet(optimizer, None)

    register_optimizer_step_pre_hook(before_any_step)
