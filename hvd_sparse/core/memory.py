"""Accumulate: what was not sent comes back next step.

The residual is kept in place: selection adds the gradient into it and zeroes what it
takes, so there is no separate buffer for the sum. It is float32 for 16-bit and float32
gradients and float64 for float64 ones, whatever the gradient's dtype.
"""

from types import MethodType

from hvd_sparse.core.contracts import Array, Correcting, Memory
from hvd_sparse.core.roles import offers
from hvd_sparse.kernels import kernels_for


class ErrorFeedback:
    """r' = r + g - sent: nothing that was not sent is lost.

    Alistarh et al., The Convergence of Sparsified Gradient Methods, 2018,
    arXiv:1809.10505, algorithm 1; Stich et al., Sparsified SGD with Memory, 2018,
    arXiv:1809.07599. Unlike both papers, the residual is in units of the gradient, not
    of the step: the learning rate belongs to the optimizer, after the exchange.
    """

    def __init__(self) -> None:
        """Start with no residuals; each is made, as zeros, at its first use."""
        self.residuals: dict[str, Array] = {}

    def residual(self, name: str, gradient: Array) -> Array:
        """The (n,) residual of this tensor, to be overwritten by the selection."""
        residual = self.residuals.get(name)
        if residual is None:
            residual = self.residuals[name] = kernels_for(gradient).zeros_like(gradient)
        return residual

    def keep(self, name: str, indices: Array, rest: Array) -> None:
        """Add the rounding of the values sent: rest = value - sent."""
        self._add(name, indices, rest)

    def restore(self, name: str, indices: Array, sent: Array) -> None:
        """Undo a sending. Exact: the selection left zeros at these places."""
        self._add(name, indices, sent)

    def _add(self, name: str, indices: Array, values: Array) -> None:
        residual = self.residuals[name]
        kernels_for(residual).add_at(residual, indices, values)


class Kept:
    """All that is kept of each tensor, whatever the memory."""

    def __init__(self, memory: Memory) -> None:
        """Nothing is kept yet."""
        self.memory = memory
        self._correcting = memory if offers(memory, Correcting) else None

    def incoming(self, name: str, gradient: Array) -> Array:
        """What is added to the residual: the gradient, or what a memory makes of it."""
        if self._correcting is None:
            return gradient
        return self._correcting.incoming(name, gradient)

    def sent(self, name: str, indices: Array) -> None:
        """These entries leave."""
        if self._correcting is not None:
            self._correcting.sent(name, indices)

    @property
    def adds_rests(self) -> bool:
        """Whether what rounding takes is added to the residual, and nothing else."""
        keep = self.memory.keep  # of a part that hands it on, or is changed, another
        return isinstance(keep, MethodType) and keep.__func__ is ErrorFeedback.keep

    @property
    def is_corrected(self) -> bool:
        """Whether the memory adds something else than gradients."""
        return self._correcting is not None

    def accumulate(self, name: str, gradient: Array) -> None:
        """r' = r + g where that is finite: nothing is sent; (n,) contiguous."""
        self.memory.residual(name, gradient)  # which a memory may begin with
        self.add(name, gradient, self.incoming(name, gradient))

    def add(self, name: str, gradient: Array, incoming: Array) -> None:
        """The same, where `incoming` has been asked already."""
        residual = self.memory.residual(name, gradient)
        kernels_for(residual).accumulate(residual, incoming.reshape(-1))

    def beside(self, name: str) -> dict[str, Array]:
        """What a memory keeps beside the residual."""
        if self._correcting is None or name not in self.memory.residuals:
            return {}
        return self._correcting.beside(name)

    def arrays(self, name: str) -> list[Array]:
        """The residual first, and what is beside it; of one that is known."""
        return [self.memory.residuals[name], *self.beside(name).values()]

    def forget(self, name: str) -> None:
        """Drop all that is kept of it."""
        self.memory.residuals.pop(name, None)
        if self._correcting is not None:
            self._correcting.forget(name)
