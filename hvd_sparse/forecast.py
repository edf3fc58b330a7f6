"""Forecast: what every tensor of a model will cost on the wire, before it trains.

Nothing is decided here. Route, format and k are those that `hvd_sparse.core.plan` gives
the path; bytes are those of a step of `hvd_sparse.mpi.SparseAllreduce`, in which all
tensors that go sparse share one frame.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from hvd_sparse.core.configuration import describe
from hvd_sparse.core.contracts import Average, Format, Sparsifier
from hvd_sparse.core.flight import Tensor
from hvd_sparse.core.formats import Entries
from hvd_sparse.core.frame import MARK_BYTES, frame_bytes
from hvd_sparse.core.indices import Indices, KnownIndices
from hvd_sparse.core.payload import entry_bytes
from hvd_sparse.core.plan import ITEMSIZES, Plan
from hvd_sparse.core.routing import Dense, WhenCheaper
from hvd_sparse.core.shapes import Shaped, shapes_of
from hvd_sparse.core.values import Values
from hvd_sparse.table import aligned
from hvd_sparse.transport.mpi.agreement import STEP_HEADER_BYTES

_NUMBER_BYTES = 4  # of each tensor whose k travels, see hvd_sparse.core.frame
_COLUMNS = ["tensor", "elements", "k", "format", "bytes dense", "bytes sent", "route"]


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor goes, and what that costs a rank in a step.

    Attributes:
        name: as the model has it.
        shape: the gradient's.
        dtype: the gradient's.
        elements: of the gradient.
        k: that are sent; the most there may be where `varies`.
        format: of what is sent, such as "Float16, EliasFano"; of a tensor that goes
            dense, the dtype in which it is summed up.
        bytes_dense: of the gradient as it is.
        bytes_sent: of its entries, and of what is said of it alone.
        route: "sparse" or "dense".
        varies: ranks choose k themselves, in every step.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    k: int
    format: str
    bytes_dense: int
    bytes_sent: int
    route: str
    varies: bool = False


@dataclass(frozen=True)
class TrafficPlan:
    """What a rank sends in a step; as text, a table of all tensors.

    Attributes:
        sparsifier: as text.
        ranks: how many exchange.
        rows: of each tensor, in the model's order.
        overhead_bytes: sent that belong to no tensor: headers, and what fills them up.
    """

    sparsifier: str
    ranks: int
    rows: tuple[TensorPlan, ...]
    overhead_bytes: int

    @property
    def dense_bytes(self) -> int:
        """Of all gradients as they are."""
        return sum(row.bytes_dense for row in self.rows)

    @property
    def sent_bytes(self) -> int:
        """Handed to collectives in a step; the most there may be where k varies."""
        return self.overhead_bytes + sum(row.bytes_sent for row in self.rows)

    @property
    def compression_ratio(self) -> float:
        """dense_bytes / sent_bytes; the least there may be where k varies."""
        return self.dense_bytes / self.sent_bytes

    @property
    def varies(self) -> bool:
        """Whether ranks choose how much they send, of any tensor."""
        return any(row.varies for row in self.rows)

    def __str__(self) -> str:
        most, least = ("at most ", "at least ") if self.varies else ("", "")
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"
        told = [
            f"{self.sparsifier} on {ranks}: {most}{self.sent_bytes:,} bytes sent a "
            "step by each",
            f"compression ratio {least}{self.compression_ratio:,.1f}",
        ]
        overhead = ["headers", "", "", "", "", f"{self.overhead_bytes:,}", ""]
        table = [_COLUMNS, *map(_cells, self.rows), overhead, self._sums()]
        return "\n".join([*aligned(table), "", *told])

    def _sums(self) -> list[str]:
        elements = sum(row.elements for row in self.rows)
        k = sum(row.k for row in self.rows)
        ks, sent = (_most(number, self.varies) for number in (k, self.sent_bytes))
        return ["total", f"{elements:,}", ks, "", f"{self.dense_bytes:,}", sent, ""]


@dataclass(frozen=True)
class _Ranks:
    """All that a plan asks of an exchange."""

    size: int

    rank: ClassVar = 0
    weight: ClassVar = 1
    uneven: ClassVar = False


def plan(
    model_or_shapes: Any,
    sparsifier: Sparsifier,
    *,
    ranks: int = 8,
    dense: Dense = WhenCheaper(),  # noqa: B008  # frozen: one instance serves all
    values: Values | Format | None = None,
    indices: Indices | None = None,
) -> TrafficPlan:
    """What every tensor of a model will cost on the wire: nothing is sent.

    It is what `traffic` of a `SparseAllreduce` counts for a step with all gradients; of
    a sparsifier with a schedule, for the first. What else an integration sends is not
    in it: rows of gradients that are sparse already, or, with the first step of a
    PyTorch optimizer over MPI, which of them are.

    Args:
        model_or_shapes: per name a shape or an array; a sequence of these; a
            torch.nn.Module or a Keras model, of which what is trained counts. Shapes
            alone are those of float32.
        sparsifier: as for an integration; so are dense, values and indices.
        ranks: how many will train, which decides what goes dense.
        dense: which tensors go dense.
        values: how values travel.
        indices: how indices travel.

    Raises:
        TypeError: the model is none of these, a tensor is not floating, or what an
            integration raises of its arguments.
        ValueError: there is nothing to train, a tensor is too large, ranks is not
            positive, or what an integration raises.

    Example:
        >>> import hvd_sparse
        >>> shapes = {"weight": (1000, 2048), "bias": (1000,), "scale": (4,)}
        >>> print(hvd_sparse.plan(shapes, hvd_sparse.TopK(density=0.001)))
        tensor    elements      k              format  bytes dense  bytes sent   route
        weight   2,048,000  2,048  Float32, EliasFano    8,192,000      11,257  sparse
        bias         1,000      1  Float32, EliasFano        4,000           9  sparse
        scale            4      4             float32           16          16   dense
        headers                                                             70
        total    2,049,004  2,053                        8,196,016      11,352
        <BLANKLINE>
        TopK(density=0.001) on 8 ranks: 11,352 bytes sent a step by each
        compression ratio 722.0
    """
    if ranks < 1:
        raise ValueError(f"ranks must be positive, got {ranks}")
    exchange: Any = _Ranks(ranks)
    decided = Plan(sparsifier, exchange, Average, dense, values, indices)
    named = shapes_of(model_or_shapes)
    tensors = [_entered(decided, name, gradient) for name, gradient in named]
    rows = tuple(map(_row, tensors))
    overhead = STEP_HEADER_BYTES + _shared_bytes(tensors, rows)
    return TrafficPlan(describe(sparsifier, "sparsifier"), ranks, rows, overhead)


def _entered(decided: Plan, name: str, gradient: Shaped) -> Tensor:
    decided.check(name, gradient)
    return decided.enter(name, gradient, step=0, chosen=0)


def _row(tensor: Tensor) -> TensorPlan:
    form, dtype, n, k, *_ = header = tensor.header
    if tensor.dense:  # whatever is narrower is summed up in float32
        k, text, sent = n, header.wide, n * ITEMSIZES[header.wide]
    else:
        told = MARK_BYTES + _NUMBER_BYTES * header.varies
        text, sent = _text(form), entry_bytes(form, dtype, n, k) + told
    varies = header.varies and not tensor.dense
    size, route = n * tensor.itemsize, tensor.route
    return TensorPlan(
        tensor.name, tensor.shape, dtype, n, k, text, size, int(sent), route, varies
    )


def _shared_bytes(tensors: list[Tensor], rows: tuple[TensorPlan, ...]) -> int:
    """What the frame takes beside what belongs to its tensors."""
    headers = [tensor.header for tensor in tensors if not tensor.dense]
    if not headers:
        return 0
    return frame_bytes(headers) - sum(r.bytes_sent for r in rows if r.route == "sparse")


def _text(form: Format) -> str:
    if not isinstance(form, Entries):
        return type(form).__name__
    known = form.indices == KnownIndices()
    indices = "no indices" if known else type(form.indices).__name__
    return f"{type(form.values).__name__}, {indices}"


def _cells(row: TensorPlan) -> list[str]:
    k, sent = (_most(number, row.varies) for number in (row.k, row.bytes_sent))
    dense = f"{row.bytes_dense:,}"
    return [row.name, f"{row.elements:,}", k, row.format, dense, sent, row.route]


def _most(number: int, varies: bool) -> str:
    return f"<= {number:,}" if varies else f"{number:,}"
