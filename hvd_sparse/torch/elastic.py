"""Residuals in elastic training: they stay with their process.

    state = hvd.elastic.TorchState(model, optimizer, compression=compression)

Commit and restore then cover the residuals. They are never broadcast: a worker keeps
its own whatever its rank becomes, and a newcomer starts with zeros. Steps, which ranks
must agree on, come from rank 0.
"""

from functools import cache
from typing import Any


@cache
def register(kind: type) -> None:
    """Tell Horovod how the state of a compressor is saved, restored and synchronised.

    Args:
        kind: has state_dict() and adopt(state).
    """
    from horovod.torch.elastic.state import (
        StateHandler,
        get_handler_registry,
    )
    from horovod.torch.functions import broadcast_object

    class ResidualStateHandler(StateHandler):  # type: ignore[misc]  # horovod has no types
        """Of one compressor."""

        def __init__(self, compressor: Any) -> None:
            super().__init__(compressor)
            self.save()

        def save(self) -> None:
            self._saved = self.value.state_dict()

        def restore(self) -> None:
            self.value.adopt(self._saved)

        def sync(self) -> None:
            own = self.value.state_dict()
            bare = {n: {**t, "residual": None} for n, t in own["tensors"].items()}
            first = broadcast_object(
                {**own, "tensors": bare}, root_rank=0, name="hvd_sparse.steps"
            )
            self.value.adopt(
                {**first, "tensors": merged(first["tensors"], own["tensors"])}
            )

    get_handler_registry().insert(0, (kind, ResidualStateHandler))


def merged(first: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The tensors and steps of rank 0 with the residuals of this process."""
    return {
        name: {**tensor, "residual": own.get(name, tensor)["residual"]}
        for name, tensor in first.items()
    }
