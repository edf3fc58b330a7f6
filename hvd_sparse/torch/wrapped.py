"""What hvd.DistributedOptimizer leaves undone, and this rank would not notice.

Horovod 0.28.1 exchanges the parameters that it found when it was made, and gives
`step(closure)` a closure whose gradients it has not exchanged. Replicas drift apart
then, silently. So a parameter that joins later gets what Horovod gave the others, and
what a closure computes is exchanged before the optimizer sees it.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from hvd_sparse.torch.exchanges import horovod
from hvd_sparse.torch.names import ParameterNames

Tensor = torch.Tensor


def is_frozen(optimizer: Any, parameter: Tensor) -> bool:
    """Whether no backward pass of this step had a gradient for it, nor could have."""
    return not parameter.requires_grad and parameter not in optimizer._handles


def newcomers(optimizer: Any) -> list[Tensor]:
    """Parameters that Horovod does not exchange: they were added, or frozen before."""
    known = optimizer._requires_update
    return [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter not in known and parameter.requires_grad
    ]


def with_gradients(optimizer: Any) -> list[Tensor]:
    """Those of them that the optimizer would move."""
    return [p for p in newcomers(optimizer) if p.grad is not None and p.grad.any()]


def enlist(optimizer: Any, names: ParameterNames) -> list[str]:
    """Let Horovod exchange all parameters that the optimizer has.

    Returns:
        The names of those that it did not.

    Raises:
        ValueError: one of them has no name.
    """
    return [_enlist(optimizer, p, names) for p in newcomers(optimizer)]


def _enlist(optimizer: Any, parameter: Tensor, names: ParameterNames) -> str:
    name = names.of(optimizer).get(parameter)
    if name is None:
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} that joined the optimizer "
            "after hvd.DistributedOptimizer was made has no name: give "
            "SparseCompressor named_parameters=model.named_parameters() of all that "
            "will be trained"
        )
    names.add(parameter, name)
    optimizer._parameter_names.setdefault(parameter, name)
    optimizer._allreduce_delay[parameter] = optimizer.backward_passes_per_step
    optimizer._requires_update.add(parameter)
    if optimizer._groups is not None:
        optimizer._p_to_group[parameter] = (parameter,)
        optimizer._group_counts[(parameter,)] = 0
    with torch.enable_grad():
        view: Any = parameter.expand_as(parameter)
    accumulator = view.grad_fn.next_functions[0][0]
    accumulator.register_hook(optimizer._make_hook(parameter))
    optimizer._grad_accs.append(accumulator)
    return name


def release(optimizer: Any) -> None:
    """A step of it has failed: wait for what is on its way, and let it go.

    Otherwise it refuses `zero_grad()` and the next backward pass, and that would send
    under names for which peers still wait. Does nothing for None.
    """
    if optimizer is None:
        return
    for handle, _ in list(optimizer._handles.values()):
        with suppress(Exception):  # it failed as well, or was awaited before
            handle() if callable(handle) else horovod().synchronize(handle)
    optimizer._handles.clear()
    optimizer._synchronized = False
    for parameter in optimizer._allreduce_delay:
        optimizer._allreduce_delay[parameter] = optimizer.backward_passes_per_step
    for group in optimizer._group_counts:
        optimizer._group_counts[group] = 0


class Exchanged:
    """A closure whose gradients have been exchanged when it returns.

    Its loss stays that of this rank.
    """

    def __init__(self, closure: Callable[[], Any], optimizer: Any) -> None:
        """From here on `step` does not synchronize before it calls the closure."""
        self._closure = closure
        self._optimizer = optimizer
        self._skipping = None
        if optimizer._should_synchronize:
            self._skipping = optimizer.skip_synchronize()
            self._skipping.__enter__()  # when this object goes, it is left in any case

    def __call__(self) -> Any:
        """What the closure returns; it may synchronize, and clip, by itself."""
        optimizer = self._optimizer
        if self._skipping is not None:
            self._skipping.__exit__(None, None, None)
            self._skipping = None
        optimizer._synchronized = False
        loss = self._closure()
        if optimizer._handles or not optimizer._synchronized:
            optimizer.synchronize()
        optimizer._synchronized = False
        return loss


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `step` is given, of its arguments with self; None where there is none."""
    return args[1] if len(args) > 1 else kwargs.get("closure")


def exchanging(
    optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of `step` with such a closure; None where there is no closure.

    For `register_step_pre_hook`: PyTorch calls it before the step of Horovod's class,
    and again before that of the class that it wraps.
    """
    closure = closure_of(args, kwargs)
    if not callable(closure) or isinstance(closure, Exchanged):
        return None
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS is not supported under Horovod: it decides by the loss, and each "
            "rank has a loss of its own"
        )
    if optimizer._should_synchronize and optimizer._handles:
        optimizer.synchronize()  # a backward pass before the step, not of the closure
    exchanged = Exchanged(closure, optimizer)
    if len(args) > 1:
        return (args[0], exchanged, *args[2:]), kwargs
    return args, {**kwargs, "closure": exchanged}
