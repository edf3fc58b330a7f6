"""How many bytes this rank sends and receives, against a dense exchange."""

from dataclasses import dataclass, field

from hvd_sparse.core.flight import Tensor


@dataclass
class TensorTraffic:
    """Bytes of one tensor since the start.

    What tensors that travel together share, a header and padding, counts with the first
    of them.

    Attributes:
        route: "sparse", "dense" or "rows" (a gradient that already was sparse).
        sent_bytes: what this rank handed to collectives.
        received_bytes: what the other ranks sent, or the reduced tensor.
        dense_bytes: n * itemsize, once a step.
        sent_elements: elements in this rank's payloads.
    """

    route: str
    sent_bytes: int = 0
    received_bytes: int = 0
    dense_bytes: int = 0
    sent_elements: int = 0


@dataclass
class Traffic:
    """Bytes of all tensors since the start; headers, padding and dense ones included.

    Attributes:
        tensors: per name.
        steps: completed exchanges.
        overhead_sent_bytes: what belongs to no tensor, such as the header of a step
            over MPI, or what fills up an allgather.
        overhead_received_bytes: the same, from the other ranks.
    """

    tensors: dict[str, TensorTraffic] = field(default_factory=dict)
    steps: int = 0
    overhead_sent_bytes: int = 0
    overhead_received_bytes: int = 0

    def tensor(self, name: str, route: str) -> TensorTraffic:
        """The counters of one tensor, zeros at first."""
        if name not in self.tensors:
            self.tensors[name] = TensorTraffic(route)
        return self.tensors[name]

    def count(self, tensor: Tensor, elements: int, sent: int, received: int) -> None:
        """Add what one exchange of a tensor moved: elements sent, and bytes."""
        counters = self.tensor(tensor.name, tensor.route)
        counters.sent_bytes += sent
        counters.sent_elements += elements
        counters.received_bytes += received
        counters.dense_bytes += tensor.header.n * tensor.itemsize

    @property
    def sent_bytes(self) -> int:
        """Bytes this rank handed to collectives."""
        tensors = self.tensors.values()
        return self.overhead_sent_bytes + sum(t.sent_bytes for t in tensors)

    @property
    def received_bytes(self) -> int:
        """Bytes of the other ranks' payloads and of reduced dense tensors."""
        tensors = self.tensors.values()
        return self.overhead_received_bytes + sum(t.received_bytes for t in tensors)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all gradients as they came: the sum of n * itemsize."""
        return sum(tensor.dense_bytes for tensor in self.tensors.values())

    @property
    def compression_ratio(self) -> float:
        """dense_bytes / sent_bytes; more is better, nan before the first step."""
        sent = self.sent_bytes
        return self.dense_bytes / sent if sent else float("nan")
