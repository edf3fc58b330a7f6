"""Accumulate: what was not sent comes back next step.

The residual is kept in place: selection adds the gradient into it and zeroes what it
takes, so there is no separate buffer for the sum. It is float32 for 16-bit and float32
gradients and float64 for float64 ones, whatever the gradient's dtype.
"""

from hvd_sparse.core.contracts import Array
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

    def accumulate(self, name: str, gradient: Array) -> None:
        """r' = r + g where that is finite: nothing is sent; (n,) contiguous."""
        residual = self.residual(name, gradient)
        kernels_for(gradient).accumulate(residual, gradient)

    def keep(self, name: str, indices: Array, rest: Array) -> None:
        """Add the rounding of the values sent: rest = value - sent."""
        self._add(name, indices, rest)

    def restore(self, name: str, indices: Array, sent: Array) -> None:
        """Undo a sending. Exact: the selection left zeros at these places."""
        self._add(name, indices, sent)

    def _add(self, name: str, indices: Array, values: Array) -> None:
        residual = self.residuals[name]
        kernels_for(residual).add_at(residual, indices, values)
