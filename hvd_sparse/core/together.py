"""The path for a group of tensors in one go, which saves small ones a word about each.

    hold, hold, hold, ... -> send \
                                   exchange
                          receive /

What happens to each tensor, and every bit of the result, is as in `path`; only the
loops over the group are in the kernels. It serves gradients in host memory that give
way to their result, of sparsifiers that have `select_group`, and an exchange whose
handles are names. Whatever else there is takes the path by itself.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hvd_sparse.core.contracts import Array, PayloadError
from hvd_sparse.core.path import Flight, GradientPath, Tensor, is_flat
from hvd_sparse.core.payload import Bytes, lay_out, locate, mark_nonfinite
from hvd_sparse.kernels import host


class Together:
    """Groups on a path."""

    def __init__(self, path: GradientPath) -> None:
        """Nothing is held."""
        self.path = path
        self._held: dict[str, Array] = {}

    @property
    def held(self) -> Iterable[str]:
        """The names of what is held."""
        return self._held.keys()

    def hold(self, tensor: Tensor, gradient: Array) -> Flight | None:
        """As `GradientPath.send` in place, but nothing is done until `send`.

        What was held for a step that was given up is accumulated when the next one
        comes, unless that has taken its memory.

        Args:
            tensor: what `GradientPath.admit` said of the gradient.
            gradient: as for GradientPath.send.

        Returns:
            None, and nothing was done, where the group is no place for it.
        """
        if not tensor.grouped or not _is_plain(tensor, gradient):
            return None
        if not host.is_one_part(gradient.size):  # of threads; then it gains by itself
            return None
        name = tensor.name
        earlier = self._held.get(name)
        if earlier is not None and not np.may_share_memory(earlier, gradient):
            host.accumulate(self.path.memory.residual(name, earlier), earlier)
        self._held[name] = gradient
        return Flight(tensor, None, name, cleared=True)

    def send(self, names: Iterable[str]) -> None:
        """Accumulate, select and encode what is held, and start its exchange."""
        groups: dict[str, list[Tensor]] = {}
        for name in names:
            tensor = self.path.tensors[name]
            groups.setdefault(tensor.dtype, []).append(tensor)
        for tensors in groups.values():
            self._send_alike(tensors)

    def _send_alike(self, tensors: list[Tensor]) -> None:
        gradients = [self._held.pop(tensor.name).reshape(-1) for tensor in tensors]
        residuals = [
            self.path.memory.residual(tensor.name, gradient)
            for tensor, gradient in zip(tensors, gradients, strict=True)
        ]
        payloads, table = lay_out([tensor.header for tensor in tensors])
        sparsifier: Any = tensors[0].sparsifier  # it has select_group
        nonfinite = sparsifier.select_group(residuals, gradients, table)
        for tensor, payload, wrong in zip(tensors, payloads, nonfinite, strict=True):
            if wrong:
                mark_nonfinite(payload)
            tensor.payload, tensor.in_flight = payload, True
            tensor.chosen = tensor.header.k
            self.path.exchange.start(tensor.name, payload)

    def receive(
        self, flights: Sequence[Flight], outs: Sequence[Array], gathered: Bytes
    ) -> bool:
        """Aggregate and hand back what arrived in one message.

        Args:
            flights: what left in it, in the order in which it did.
            outs: as for `GradientPath.receive`.
            gathered: the messages of all ranks, at an address that is a multiple of 8.

        Returns:
            False, and nothing was done, where only GradientPath.receive will do.

        Raises:
            PayloadError: a payload is damaged; the text has the tensor.
        """
        path = self.path
        tensors = [flight.tensor for flight in flights]
        alike = len({tensor.dtype for tensor in tensors}) == 1
        cleared = all(flight.cleared for flight in flights)
        if not (alike and cleared and all(map(_is_plain, tensors, outs))):
            return False
        expected = [tensor.header for tensor in tensors]
        table = locate(gathered, expected, path.exchange.size)
        if table is None:
            return False
        wrong = host.aggregate_group(outs, table, path.scale)
        if wrong >= 0:
            name, n = tensors[wrong].name, expected[wrong].n
            raise PayloadError(f"{name}: indices must ascend in [0, {n})")
        others = path.exchange.size - 1
        for flight, tensor in zip(flights, tensors, strict=True):
            assert tensor.payload is not None
            size = tensor.payload.size
            path.count(tensor, tensor.header.k, size, size * others)
            path.settle(flight)
        return True

    def forget(self) -> None:
        """What is held will not be sent."""
        self._held.clear()


def _is_plain(tensor: Tensor, array: Array) -> bool:
    """On the host, unrounded, contiguous, with a k that ranks share."""
    return tensor.plain and isinstance(array, np.ndarray) and is_flat(array)
