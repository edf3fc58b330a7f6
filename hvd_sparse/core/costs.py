"""What a payload costs on a given network, in any unit: bytes, seconds, joules.

Costs are configuration: frozen, and their repr rebuilds them. `CAT` divides the descent
that a payload promises by its cost.

Khirirat, Magnusson, Aytekin, Johansson, Communication Efficient Sparsification for
Large Scale Machine Learning, 2020, arXiv:2003.06377, has the three forms, on an
idealised count of bits, `PaperPayload`. Unlike there, `Payload` counts the bytes that
this package really sends: header, padding, signs and indices.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.contracts import Format
from hvd_sparse.core.formats import is_ours, is_signs
from hvd_sparse.core.payload import most_elements, payload_bytes
from hvd_sparse.core.values import Float32

Array = npt.NDArray[Any]


class Message(NamedTuple):
    """What a payload is made for.

    Attributes:
        form: of its entries; see `hvd_sparse.core.formats`.
        dtype: the gradient's, as text.
        n: elements of the gradient.
    """

    form: Format
    dtype: str
    n: int

    @property
    def layout(self) -> int:
        """The format's number; 1, 2 and 3 as costs of earlier releases knew them.

        Floats and indices, floats whose indices every rank knows, signs and indices.
        """
        if is_signs(self.form):
            return 3
        if is_ours(self.form) and self.form.values == Float32():
            return 1 if self.form.indices.layout else 2
        return self.form.layout


class Cost(Protocol):
    """What CAT asks of a network; hashable, so that answers can be kept."""

    def of(self, sizes: Array, message: Message) -> Array:
        """Cost, > 0, of payloads of so many elements; (t,) int64 to (t,) float64."""
        ...

    def filled(self, sizes: Array, message: Message) -> Array:
        """The most elements that cost no more than so many; (t,) int64."""
        ...

    def __hash__(self) -> int:
        """That of its fields, as frozen dataclasses have it."""
        ...


class Count(Protocol):
    """How many bytes a payload has."""

    def bytes(self, sizes: Array, message: Message) -> Array:
        """Bytes, whole or not, of payloads of so many elements."""
        ...

    def elements(self, sizes: Array, message: Message) -> Array:
        """The most elements whose payload has at most so many bytes."""
        ...


@dataclass(frozen=True)
class Payload:
    """C(T) = the bytes that are sent for T elements of a tensor that travels alone.

    Header and padding are among them. Together with others it takes fewer: see
    `hvd_sparse.core.frame`.

    With TopK a payload of this kind is best spent on a handful of elements: the header
    is all there is to share. See `PaperPayload` for what becomes of it without one.
    """

    def bytes(self, sizes: Array, message: Message) -> Array:
        """Bytes of payloads of so many elements."""
        return np.asarray(payload_bytes(*message, sizes))

    def elements(self, sizes: Array, message: Message) -> Array:
        """The most elements whose payload has at most so many bytes."""
        return np.asarray(most_elements(*message, sizes))

    def of(self, sizes: Array, message: Message) -> Array:
        """Bytes, as a cost."""
        return self.bytes(sizes, message).astype(np.float64)

    def filled(self, sizes: Array, message: Message) -> Array:
        """The most elements in as many bytes."""
        return self.elements(self.bytes(sizes, message), message)


@dataclass(frozen=True)
class PaperPayload:
    """The idealised counts of the paper, in bytes: no header, indices of log2 n bits.

    TopK and Stochastic: T (ceil(log2 n) + value_bits) bits; SignTopK: value_bits + T
    ceil(log2 n) bits, signs not counted. With TopK this cost alone always chooses
    T = 1, since each further element is worth less than those before: coordinate
    descent, efficient for each byte and hopeless in steps. Use it inside Affine or
    Packet, to compare with the paper.

    Args:
        value_bits: of a value, 32 or 64.
    """

    value_bits: int = 32

    def _bits(self, message: Message) -> tuple[int, int]:
        """Bits of a payload of no elements, and of each element."""
        index = max(1, math.ceil(math.log2(max(message.n, 1))))
        signs = is_signs(message.form)
        return (self.value_bits, index) if signs else (0, index + self.value_bits)

    def bytes(self, sizes: Array, message: Message) -> Array:
        """Bytes of payloads of so many elements; fractions of a byte count."""
        fixed, each = self._bits(message)
        return np.asarray((fixed + each * sizes) / 8)

    def elements(self, sizes: Array, message: Message) -> Array:
        """The most elements whose payload has at most so many bytes."""
        fixed, each = self._bits(message)
        return np.asarray((8 * sizes - fixed) // each, np.int64)

    def of(self, sizes: Array, message: Message) -> Array:
        """Bytes, as a cost."""
        return self.bytes(sizes, message)

    def filled(self, sizes: Array, message: Message) -> Array:
        """One more element always costs more."""
        del message
        return sizes


_REAL = Payload()


def _check(**arguments: float) -> None:
    for name, value in arguments.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    if not any(arguments.values()):
        raise ValueError(f"{' or '.join(arguments)} must be positive")


@dataclass(frozen=True)
class Affine:
    """C(T) = per_byte * bytes(T) + per_message.

    Args:
        per_byte: cost of a byte, >= 0.
        per_message: cost of a message of no bytes, >= 0; one of the two is positive.
        payload: Payload() or PaperPayload().

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> Affine(per_byte=1.0, per_message=54.0)
        Affine(per_byte=1.0, per_message=54.0, payload=Payload())
    """

    per_byte: float
    per_message: float
    payload: Count = _REAL

    def __post_init__(self) -> None:
        _check(per_byte=self.per_byte, per_message=self.per_message)

    def among(self, tensors: int) -> "Affine":
        """That of each of so many tensors whose payloads leave as one message.

        Raises:
            ValueError: tensors is not positive.

        Example:
            >>> Affine(per_byte=1.0, per_message=54.0).among(2).per_message
            27.0
        """
        if tensors < 1:
            raise ValueError(f"tensors must be positive, got {tensors}")
        return replace(self, per_message=self.per_message / tensors)

    def of(self, sizes: Array, message: Message) -> Array:
        """Cost of payloads of so many elements."""
        return self.per_byte * self.payload.bytes(sizes, message) + self.per_message

    def filled(self, sizes: Array, message: Message) -> Array:
        """The most elements in as many bytes."""
        return np.maximum(
            sizes,
            self.payload.elements(self.payload.bytes(sizes, message), message),
        )


@dataclass(frozen=True)
class Packet:
    """C(T) = per_packet * ceil(bytes(T) / packet_bytes) + per_message.

    The best T fills its packets: floor(j packet_bytes / bytes of an element).

    Args:
        per_packet: cost of a packet, >= 0.
        per_message: cost of a message of no packets, >= 0; one of the two is positive.
        packet_bytes: payload of a packet, > 0.
        payload: Payload() or PaperPayload().

    Raises:
        ValueError: an argument is out of range.
    """

    per_packet: float
    per_message: float
    packet_bytes: int
    payload: Count = _REAL

    def __post_init__(self) -> None:
        _check(per_packet=self.per_packet, per_message=self.per_message)
        if not 0 < self.packet_bytes < math.inf:
            raise ValueError(f"packet_bytes must be positive, got {self.packet_bytes}")

    def _packets(self, sizes: Array, message: Message) -> Array:
        return np.asarray(
            np.ceil(self.payload.bytes(sizes, message) / self.packet_bytes)
        )

    def of(self, sizes: Array, message: Message) -> Array:
        """Cost of payloads of so many elements."""
        return self.per_packet * self._packets(sizes, message) + self.per_message

    def filled(self, sizes: Array, message: Message) -> Array:
        """The most elements in as many packets."""
        room = (self._packets(sizes, message) * self.packet_bytes).astype(np.int64)
        return self.payload.elements(room, message)


# ------------------------------------------------------------------ measured costs


@dataclass(frozen=True)
class Measurement:
    """What exchanges took, and the affine cost that fits them best; print it to see.

    Attributes:
        cost: in seconds.
        error: root of the mean square of (fit / measured - 1).
        sizes: bytes that each rank sent.
        seconds: what the exchanges took on the slowest rank, median of their repeats.
    """

    cost: Affine
    error: float
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __str__(self) -> str:
        return (
            f"an exchange takes {1e6 * self.cost.per_message:.0f} us and "
            f"{1e9 * self.cost.per_byte:.3f} ns a byte "
            f"(error of the fit {self.error:.0%})"
        )


Gather = Callable[[Array], Sequence[Array]]  # a rank's bytes to those of all ranks

MEASURED_SIZES = tuple(64 * 4**power for power in range(9))  # 64 bytes to 4 MiB


def measure(
    gather: Gather,
    *,
    sizes: Sequence[int] = MEASURED_SIZES,
    repeats: int = 9,
    exchange: Callable[[Array], object] | None = None,
) -> Measurement:
    """Time exchanges between all ranks and fit a cost; alike on every rank.

    Every rank must call it at the same place. `hvd_sparse.mpi.measure`,
    `hvd_sparse.torch.measure` and `hvd_sparse.tensorflow.measure` know the gather.

    Args:
        gather: sends a uint8 array, a multiple of 8 bytes, and returns every rank's.
        sizes: bytes, multiples of 8, at least two.
        repeats: exchanges of each size; their median counts.
        exchange: what is timed, if not gather itself; of a uint8 array too.

    Raises:
        ValueError: there are fewer than two sizes, or no repeats.
    """
    if len(set(sizes)) < 2 or repeats < 1:
        raise ValueError(
            f"sizes must be two or more, and repeats positive, got {sizes}, {repeats}"
        )
    timed = gather if exchange is None else exchange
    own = np.array([_median_seconds(timed, size, repeats) for size in sizes])
    # all ranks work with the same numbers: those of the slowest
    everyone = [part.view(np.float64) for part in gather(own.view(np.uint8))]
    seconds = tuple(np.max(everyone, axis=0).tolist())
    return _fit(tuple(sizes), seconds)


def _median_seconds(
    exchange: Callable[[Array], object], size: int, repeats: int
) -> float:
    payload = np.zeros(size, np.uint8)
    exchange(payload)  # the first makes connections and buffers
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        exchange(payload)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _fit(sizes: tuple[int, ...], seconds: tuple[float, ...]) -> Measurement:
    """Least squares of relative errors, so that small messages count as large ones do.

    With weights 1 / seconds^2; neither cost is negative.
    """
    weights = [1 / second**2 for second in seconds]
    total = sum(weights)
    mean_size = sum(w * b for w, b in zip(weights, sizes, strict=True)) / total
    mean_time = sum(w * s for w, s in zip(weights, seconds, strict=True)) / total
    rows = list(zip(weights, sizes, seconds, strict=True))
    spread = sum(w * (b - mean_size) ** 2 for w, b, _ in rows)
    both = sum(w * (b - mean_size) * (s - mean_time) for w, b, s in rows)
    per_byte = max(both / spread, 0.0)
    per_message = mean_time - per_byte * mean_size
    if per_message < 0:  # a line through 0 instead
        per_message = 0.0
        squares = sum(w * b * b for w, b, _ in rows)
        per_byte = sum(w * b * s for w, b, s in rows) / squares
    cost = Affine(per_byte=per_byte, per_message=per_message)
    errors = [(per_byte * b + per_message) / s - 1 for _, b, s in rows]
    error = math.sqrt(sum(e * e for e in errors) / len(errors))
    return Measurement(cost, error, sizes, seconds)
