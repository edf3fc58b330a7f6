"""Which parameter does this gradient belong to? Horovod does not say.

The name must come from the parameter, never from the order of calls: hooks fire in
another order on every rank. `p.grad` is handed to the compressor itself, so its
identity tells; where Horovod made a new tensor of it, the caller's frame does.
"""

import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any, NamedTuple

import torch

Tensor = torch.Tensor


class ParameterNames:
    """Finds the name of a gradient's parameter."""

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]] | None) -> None:
        """Without named_parameters the optimizer's own names are taken at first use.

        Raises:
            ValueError: a name comes twice.
        """
        self._names: dict[Tensor, str] = {}
        self._after: dict[Tensor | None, Tensor] = {}  # what came after it last
        self._last: Tensor | None = None
        for name, parameter in named_parameters or ():
            if name in self._names.values():
                raise ValueError(
                    f"named_parameters must be unique, {name!r} comes twice"
                )
            self._names[parameter] = name

    def find(self, gradient: Tensor, caller: "Caller | None") -> tuple[str, Tensor]:
        """The name of the parameter whose gradient this is, and the parameter.

        Args:
            gradient: what the compressor was given.
            caller: the Horovod optimizer that gives it, where it is one.

        Raises:
            ValueError: it belongs to no parameter that is known.
        """
        if not self._names and caller is not None:
            self._names = self.of(caller.optimizer)
        parameter = None if caller is None else caller.parameter
        if parameter is None or parameter.grad is not gradient:
            parameter = self._by_identity(gradient)
        if parameter is None and caller is not None:
            parameter = caller.parameter
        name = None if parameter is None else self._names.get(parameter)
        if name is None or parameter is None:
            raise ValueError(
                f"a gradient of shape {tuple(gradient.shape)} belongs to no parameter "
                "that SparseCompressor knows: give it "
                "named_parameters=model.named_parameters()"
            )
        return name, parameter

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether it is a parameter, and no gradient."""
        return tensor in self._names

    def add(self, parameter: Tensor, name: str) -> None:
        """A parameter that joined its optimizer later."""
        self._names[parameter] = name

    def of(self, optimizer: Any) -> dict[Tensor, str]:
        """Per parameter, its name; those of the optimizer unless others were given."""
        return self._names or dict(optimizer._parameter_names)

    def _by_identity(self, gradient: Tensor) -> Tensor | None:
        """The parameter with this grad; what came next last time is tried first."""
        expected = self._after.get(self._last)
        if expected is None or expected.grad is not gradient:
            expected = next((p for p in self._names if p.grad is gradient), None)
        if expected is not None:
            self._after[self._last] = expected
            self._last = expected
        return expected


class Caller(NamedTuple):
    """The Horovod optimizer that calls compress, and for which parameter.

    Attributes:
        optimizer: has _parameter_names.
        parameter: None if not known.
        frame: of its method.
    """

    optimizer: Any
    parameter: Tensor | None
    frame: FrameType

    @property
    def synchronizing(self) -> bool:
        """All gradients of this step that will be sent by themselves have been."""
        return self._called_by("synchronize") is not None

    @property
    def steps_with_closure(self) -> bool:
        """The gradients of this step have not been computed: a closure will do that."""
        frame = self._called_by("synchronize")
        frame = None if frame is None else frame.f_back
        if frame is None or frame.f_code.co_name != "step":
            return False
        return callable(frame.f_locals.get("closure"))

    def _called_by(self, method: str) -> FrameType | None:
        frame = self.frame.f_back
        return frame if frame is not None and frame.f_code.co_name == method else None


def find_caller(depth: int) -> Caller | None:
    """The optimizer whose method calls, at most two frames above `depth`."""
    frame = sys._getframe(depth + 1)
    for _ in range(2):
        if frame is None:
            return None
        local = frame.f_locals
        if hasattr(local.get("self"), "_parameter_names"):
            return Caller(local["self"], local.get("p"), frame)
        frame = frame.f_back  # type: ignore[assignment]  # None at the top
    return None
