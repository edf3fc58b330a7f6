"""What SparseCompressor calls of an exchange, beside what the path does.

Horovod reduces one tensor of each gradient, whatever else is sent. So an exchange gives
it something, and learns from what became of that which op Horovod applies.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from hvd_sparse.core.contracts import Exchange, Op
from hvd_sparse.core.payload import Payload, Raised


class HorovodExchange(Exchange, Protocol):
    """Carries the payloads of one optimizer through Horovod.

    Attributes:
        batched: payloads wait for others, with which they travel.
    """

    @property
    def batched(self) -> bool: ...  # noqa: D102  # see above

    # ------------------------------------------------------------------ the way there

    def plan(self, sizes: dict[str, int]) -> None:
        """Decide what travels together, from facts that all ranks share.

        Args:
            sizes: per name, bytes of the gradient; of what goes sparse.
        """
        ...

    def announce(self, name: str) -> list[str]:
        """A payload of this tensor will come.

        Returns:
            Names of which the payloads are due now, for others wait for them.
        """
        ...

    def start(self, name: str, payload: Payload | Raised) -> Any:
        """As of `Exchange`; also what this rank raised in place of a payload."""
        ...

    def to_reduce(self, handle: Any) -> torch.Tensor:
        """What Horovod is to reduce for this tensor; on the host."""
        ...

    def nothing(self) -> torch.Tensor:
        """The same where no rank sends a payload: zeros."""
        ...

    # ------------------------------------------------------------------ the way back

    def reduced(self, handle: Any, result: torch.Tensor) -> Op:
        """Which op made this of `to_reduce`.

        Raises:
            ValueError: none that is known; some ranks sent nothing.
            PayloadError: a rank disagrees, or raised.
        """
        ...

    def arrive(self, handle: Any) -> Sequence[str]:
        """Wait for a payload of every rank; names of all that came with this one.

        All that will be sent in this step has been: what waits for others leaves now.
        """
        ...

    def drop(self, names: Sequence[str]) -> None:
        """Payloads that have arrived need not be kept."""
        ...

    def bytes_beside(self, reduced: torch.Tensor, tensors: int) -> tuple[int, int]:
        """Bytes sent and received that the path does not count: not of a payload.

        Args:
            reduced: what Horovod made of `to_reduce` of one of these tensors.
            tensors: how many have arrived together.
        """
        ...

    # ---------------------------------------------------------- a step that fails

    def withdraw(self) -> None:
        """The step was given up: what waits for others does not leave."""
        ...

    def forsake(self, handle: Any) -> None:
        """Do not await it: not all ranks have sent something that travels with it."""
        ...

    def drain(self) -> None:
        """Wait for all that is on its way, and drop it: the step has failed.

        What waits for others leaves: peers wait for it.
        """
        ...

    def forget(self) -> None:
        """Nothing is on its way, or planned, and ranks may be others."""
        ...
