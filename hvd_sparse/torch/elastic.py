"""Residuals in elastic training: they stay with their process.

    state = hvd.elastic.TorchState(
        model=model, optimizer=optimizer, compression=compression
    )

Commit and restore then cover the residuals. They are never broadcast: a worker keeps
its own whatever its rank becomes, and a newcomer starts with zeros. Steps, which ranks
must agree on, come from rank 0, as weights do: Horovod keeps its hosts in the order in
which they came, so that rank 0 is a survivor as long as there is one.

What a worker has not sent when it is killed is lost with it. Should it die while its
peers commit, some of them may restore an older commit than rank 0; their residuals are
then as much older than the weights. A `timeout_s` of the compressor must be longer than
that of Gloo, HOROVOD_GLOO_TIMEOUT_SECONDS, by which some survivors notice a death.
"""

import os
import threading
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
    """The tensors and steps of rank 0 with the residuals of this process.

    What rank 0 has never sent is at step 0 everywhere, and keeps its residual.
    """
    unknown = {name: {**tensor, "step": 0} for name, tensor in own.items()}
    known = {
        name: {**tensor, "residual": own.get(name, tensor)["residual"]}
        for name, tensor in first.items()
    }
    return {**unknown, **known}


def covers(compressor: Any) -> bool:
    """Whether the state that `hvd.elastic.run` was given has this compressor.

    Returns:
        False outside of `hvd.elastic.run`, or if that state is not a TorchState.

    Raises:
        ValueError: it is a TorchState without the compressor.
    """
    from horovod.common.elastic import notification_manager
    from horovod.torch.elastic.state import TorchState

    # the states of all calls of hvd.elastic.run that have not returned
    states = [s for s in notification_manager._listeners if isinstance(s, TorchState)]
    handlers = [handler for s in states for handler in s._handlers.values()]
    covered = any(handler.value is compressor for handler in handlers)
    if states and not covered:
        raise ValueError(
            "the state of hvd.elastic.run must have the SparseCompressor, or residuals "
            "and steps are neither restored nor synchronised: TorchState(model=model, "
            "optimizer=optimizer, compression=compression)"
        )
    return covered


def is_elastic() -> bool:
    """Whether this process was started by an elastic horovodrun."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def internal_error(text: str) -> Exception:
    """The one error from which elastic training recovers."""
    from horovod.common.exceptions import HorovodInternalError

    error: Exception = HorovodInternalError(text)
    return error


class Shutdown:
    """Frees the threads that wait inside Horovod.

    hvd.shutdown() takes their handles away, which frees them at once, by a ValueError.
    Elastic training recovers from a HorovodInternalError alone: that is what they get
    where the handles stay.
    """

    def __init__(self) -> None:
        """Until `recovers` is set this is no elastic training."""
        self.recovers = False
        self._lock = threading.Lock()

    def __call__(self) -> None:
        """Returns when Horovod is down, which may be never if a peer hangs."""
        from horovod.torch import mpi_ops

        with self._lock:
            if self.recovers:
                mpi_ops._basics.shutdown()
            else:
                mpi_ops.shutdown()

    def wait(self) -> None:
        """Until it is over: Horovod does not survive a second one at the same time."""
        if self.recovers:
            with self._lock:
                pass


def elements_beside(size: int) -> int:
    """Elements of the tensor that is reduced beside each payload; 2 have a meaning.

    In elastic training there are more. After a worker was killed, Horovod 0.28.1 may go
    on to its next negotiation in one survivor while another waits in a reduction still,
    and receives bytes of the negotiation there. Gloo ends the process if they are more
    than it expected. Both come in 2 segments a rank, so none may be the shorter one: a
    negotiation takes 17 words of 64 bits at most.
    """
    if not is_elastic():
        return 2
    segments = 2 * size
    words = -(-17 // segments)
    return segments * 2 * words
