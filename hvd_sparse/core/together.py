"""The path for a group of tensors in one go, which saves small ones a word about each.

    send -> exchange -> receive

What happens to each tensor, and every bit of the result, is as in `path`; only the
loops over the group are in the kernels. It serves gradients in host memory, of
sparsifiers that have `select_group`, and an exchange whose handles are names. Whatever
else there is takes the path by itself.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_sparse.core.contracts import Array, PayloadError
from hvd_sparse.core.path import Flight, GradientPath, Tensor, is_flat
from hvd_sparse.core.payload import Bytes, Message, mark_nonfinite
from hvd_sparse.kernels import host

_MOST_MESSAGES = 1024  # remembered


class Together:
    """Groups on a path."""

    def __init__(self, path: GradientPath) -> None:
        """Nothing is known of any group yet."""
        self.path = path
        self._messages: dict[tuple[int, ...], Message] = {}  # by their digests

    def send(
        self, tensors: Sequence[Tensor], gradients: Sequence[Array]
    ) -> list[Flight]:
        """Accumulate, select and encode, and start the exchanges.

        If that fails each gradient is in its residual, as a whole.

        Args:
            tensors: what `GradientPath.admit` said of the gradients: that they may be
                `grouped`.
            gradients: contiguous; otherwise as for GradientPath.send.
        """
        flights = [Flight(tensor, None, tensor.name) for tensor in tensors]
        try:
            for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
                both = zip(tensors, gradients, strict=True)
                self._send_alike([(t, g.ravel()) for t, g in both if t.dtype == dtype])
        except BaseException:
            for flight, gradient in zip(flights, gradients, strict=True):
                if flight.tensor.in_flight:
                    self.path.recall(flight)
                else:
                    self.keep(flight.tensor, gradient)
            raise
        return flights

    def _send_alike(self, group: Sequence[tuple[Tensor, Array]]) -> None:
        tensors, gradients = zip(*group, strict=True)
        residuals = [self.path.memory.residual(t.name, g) for t, g in group]
        message = self._message(tensors)
        payloads, table = message.lay_out([tensor.header.step for tensor in tensors])
        sparsifier: Any = tensors[0].sparsifier  # it has select_group
        nonfinite = sparsifier.select_group(residuals, gradients, table)
        for tensor, payload, wrong in zip(tensors, payloads, nonfinite, strict=True):
            if wrong:
                mark_nonfinite(payload)
            tensor.payload, tensor.in_flight = payload, True
            tensor.chosen = tensor.header.k
        for tensor, payload in zip(tensors, payloads, strict=True):
            self.path.exchange.start(tensor.name, payload)

    def keep(self, tensor: Tensor, gradient: Array) -> None:
        """Accumulate, and send nothing: a step was given up before it was sent."""
        residual = self.path.memory.residual(tensor.name, gradient)
        host.accumulate(residual, gradient.reshape(-1))

    def receive(
        self, flights: Sequence[Flight], outs: Sequence[Array], gathered: Bytes
    ) -> bool:
        """Aggregate and hand back what arrived in one message.

        Args:
            flights: what left in it, in the order in which it did.
            outs: as for `GradientPath.receive`; no two of them overlap.
            gathered: the messages of all ranks, at an address that is a multiple of 8.

        Returns:
            False, and nothing was done, where only GradientPath.receive will do.

        Raises:
            PayloadError: a payload is damaged; the text has the tensor.
        """
        path = self.path
        tensors = [flight.tensor for flight in flights]
        alike = len({tensor.dtype for tensor in tensors}) == 1
        if not (alike and all(map(_is_plain, tensors, outs))):
            return False
        steps = [tensor.header.step for tensor in tensors]
        table = self._message(tensors).locate(gathered, steps, path.exchange.size)
        if table is None:
            return False
        wrong = host.aggregate_group(outs, table, path.scale)
        if wrong >= 0:
            name, n = tensors[wrong].name, tensors[wrong].header.n
            raise PayloadError(f"{name}: indices must ascend in [0, {n})")
        others = path.exchange.size - 1
        for flight, tensor in zip(flights, tensors, strict=True):
            assert tensor.payload is not None
            size = tensor.payload.size
            path.count(tensor, tensor.header.k, size, size * others)
            path.settle(flight)
        return True

    def _message(self, tensors: Sequence[Tensor]) -> Message:
        """Its layout: most often the same tensors travel together in every step."""
        digests = tuple(tensor.header.digest for tensor in tensors)
        if digests not in self._messages:
            if len(self._messages) == _MOST_MESSAGES:  # gradients come and go
                self._messages.clear()
            self._messages[digests] = Message([tensor.header for tensor in tensors])
        return self._messages[digests]


def _is_plain(tensor: Tensor, array: Array) -> bool:
    """On the host, unrounded, contiguous, with a k that ranks share."""
    return tensor.plain and isinstance(array, np.ndarray) and is_flat(array)
