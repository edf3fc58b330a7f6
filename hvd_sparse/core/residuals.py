"""Residuals and steps of a path, beside its steps: saved, loaded, thrown away."""

from copy import deepcopy
from typing import Any

import numpy as np

from hvd_sparse.core.contracts import Array, Exchange
from hvd_sparse.core.flight import Tensor
from hvd_sparse.core.loss_scale import LossScale, is_finite
from hvd_sparse.core.memory import Kept
from hvd_sparse.core.plan import Plan, dtype_of
from hvd_sparse.core.traffic import Traffic
from hvd_sparse.core.undo import Undo
from hvd_sparse.kernels import kernels_for

STATE_FORMAT = 1


class Residuals:
    """The state of one path, which belongs to this rank.

    Attributes:
        waiting: per name, what was loaded and not used yet.
    """

    def __init__(
        self,
        plan: Plan,
        kept: Kept,
        exchange: Exchange,
        traffic: Traffic,
        scaling: LossScale,
        undo: Undo | None,
    ) -> None:
        """Nothing is loaded. Args: undo: None where no step can be thrown away."""
        self.waiting: dict[str, dict[str, Any]] = {}
        self._plan = plan
        self._kept = kept
        self._memory = kept.memory
        self._exchange = exchange
        self._traffic = traffic
        self._scaling = scaling
        self._undo = undo

    def state_dict(self) -> dict[str, Any]:
        """All that a restart needs, as copies; it belongs to this rank.

        In the middle of a step, what is on its way is part of the residuals, as if its
        exchange had failed: nothing is lost.
        """
        self._scaling.put_back()
        plan = self._plan
        scaled = {} if plan.loss_scale is None else {"loss_scale": plan.loss_scale}
        return {
            **scaled,
            "format": STATE_FORMAT,
            "rank": self._exchange.rank,
            "size": self._exchange.size,
            "configuration": plan.configuration,
            "step": self._traffic.steps,
            "tensors": {
                # loaded and not used since: still waiting, so still part of the state
                **{
                    name: deepcopy({"chosen": 0, **saved})
                    for name, saved in self.waiting.items()
                },
                **{name: self._saved(tensor) for name, tensor in plan.tensors.items()},
            },
        }

    def _saved(self, tensor: Tensor) -> dict[str, Any]:
        residual, beside = self._copied(tensor), self._kept.beside(tensor.name)
        return {
            "shape": tensor.shape,
            "dtype": tensor.dtype,
            "step": tensor.header.step,
            "residual": None if residual is None else residual.reshape(tensor.shape),
            "chosen": tensor.chosen,
            **({"beside": deepcopy(beside)} if beside else {}),
        }

    def _copied(self, tensor: Tensor) -> Array | None:
        """A copy of its residual, with what is on its way."""
        residual = deepcopy(self._memory.residuals.get(tensor.name))
        flight = tensor.flight
        if flight is not None and flight.is_out and residual is not None:
            sent = flight.selection
            kernels_for(residual).add_at(residual, sent.indices, sent.values)
        return residual

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where state_dict was called, bitwise.

        Raises:
            ValueError: the state belongs to another rank, size or configuration, or a
                tensor of it has another shape or dtype here (then, or at its first
                use); the text has names, expected and found.
        """
        for key, *here in (
            ("format", STATE_FORMAT),
            ("size", self._exchange.size),
            ("rank", self._exchange.rank),
            ("configuration", self._plan.configuration, *self._plan.old_configurations),
        ):
            if state.get(key) not in here:
                raise ValueError(
                    f"state was saved with {key} {state.get(key)}, expected {here[0]}"
                )
        _check_scale(state, scaled=self._scaling.is_used)
        saved = state["tensors"]
        for name, tensor in self._plan.tensors.items():
            if name in saved:
                _check_loaded(name, saved[name], tensor.shape, tensor.dtype)
            elif saved:  # an empty state is that of a start: it resets all
                raise ValueError(f"state has no tensor {name!r}")
        self.adopt(state)

    def adopt(self, state: dict[str, Any]) -> None:
        """Continue from a state of this process in another group of ranks.

        Routes are decided anew, since they depend on how many ranks there are.
        """
        self._plan.tensors.clear()
        for name in [*self._memory.residuals]:
            self._kept.forget(name)
        self._plan.loss_scale = state.get("loss_scale")
        self.waiting = {name: dict(saved) for name, saved in state["tensors"].items()}
        self._traffic.steps = state["step"]
        self._scaling.overflowed = False
        if self._undo:
            self._undo.forget()

    def put_in_place(self, name: str, gradient: Array) -> tuple[int, int]:
        """Put a loaded residual where its gradient is; returns step and chosen."""
        saved = self.waiting.get(name)
        if saved is None:
            return 0, 0
        _check_loaded(name, saved, tuple(gradient.shape), dtype_of(gradient))
        if saved["residual"] is not None:
            copy_to(self._memory.residual(name, gradient), saved["residual"])
            self._put_beside(name, saved.get("beside", {}))
        del self.waiting[name]
        return int(saved["step"]), int(saved.get("chosen", 0))

    def _put_beside(self, name: str, loaded: dict[str, Any]) -> None:
        here = self._kept.beside(name)
        if here.keys() != loaded.keys():
            raise ValueError(
                f"{name}: state has {sorted(loaded)} beside the residual, expected "
                f"{sorted(here)}: it is of another memory"
            )
        for what, array in here.items():
            copy_to(array, loaded[what])

    def take(self, name: str) -> Array | None:
        """The whole residual of a tensor that goes dense by now; it is gone then."""
        residual = self._memory.residuals.get(name)
        self._kept.forget(name)
        if self._undo and residual is not None:
            self._undo.took(name, residual)
        return residual

    def forget(self, name: str) -> None:
        """Drop what is kept of a tensor that is gone; it is not under way."""
        tensor = self._plan.tensors.pop(name, None)
        if tensor is not None:
            tensor.flight = None  # which knows it
        self._kept.forget(name)
        if self._undo:
            self._undo.forget(name)

    @property
    def can_discard(self) -> bool:
        """Whether copies are kept for it."""
        return self._undo is not None

    def applied(self) -> None:
        """The last step was applied: it can not be thrown away any more."""
        if self._undo is not None:
            self._undo.applied()

    def discard(self) -> None:
        """Throw the last step away: residuals and steps are what they were, bitwise.

        Collective: a rank that does not is at another step than its peers.

        Raises:
            RuntimeError: it was not asked for with `undo`, there is no step since the
                last one that was thrown away, it was applied, or its exchange is under
                way.
        """
        if self._undo is None:
            raise RuntimeError(
                "discard() needs undo=True, which keeps a copy of every residual"
            )
        self._undo.discard()


def copy_to(out: Array, source: Any) -> None:
    """Overwrites out, on host or device, with as many numbers, rounding."""
    if isinstance(out, np.ndarray):
        out.reshape(-1)[...] = np.asarray(source).reshape(-1)
    else:
        on_host = isinstance(source, np.ndarray)
        source = out.new_tensor(source) if on_host else source
        out.reshape(-1).copy_(source.reshape(-1))


def _check_scale(state: dict[str, Any], *, scaled: bool) -> None:
    scale, waits = state.get("loss_scale"), bool(state["tensors"])
    if scale is not None and not scaled:
        raise ValueError(
            f"state was saved with loss scale {scale}, expected none: give scaler="
        )
    if scale is None and scaled and waits:
        raise ValueError(
            "state has no loss scale, expected one for scaler=: put the one it was "
            'saved with into state["loss_scale"], 1.0 where there was none'
        )


def _check_loaded(
    name: str, saved: dict[str, Any], shape: tuple[int, ...], dtype: str
) -> None:
    found = (tuple(saved["shape"]), saved["dtype"])
    if found != (shape, dtype):
        raise ValueError(
            f"{name}: state has shape {found[0]} and dtype {found[1]}, expected "
            f"{shape} and {dtype}"
        )
    residual = saved["residual"]
    if residual is not None and not is_finite(np.asarray(residual)):
        raise ValueError(f"{name}: state has a residual that is not finite")
