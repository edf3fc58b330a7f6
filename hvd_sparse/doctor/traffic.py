"""What each tensor of the model will cost on the wire: no job is needed to know it."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hvd_sparse.core.indices import EliasFano, Indices, RawIndices
from hvd_sparse.core.sparsifiers import TopK
from hvd_sparse.core.values import OURS, Values
from hvd_sparse.forecast import TrafficPlan, plan

# as a command line has them
VALUES: dict[str, Values] = {kind.__name__: kind() for kind in OURS}
INDICES = {type(form).__name__: form for form in (EliasFano(), RawIndices())}


def plans(
    model: Any,
    densities: Sequence[float],
    *,
    ranks: int,
    values: Values | None,
    indices: Indices | None,
) -> list[TrafficPlan]:
    """Of each density, with TopK; raises as `hvd_sparse.plan`."""
    return [
        plan(model, TopK(density=d), ranks=ranks, values=values, indices=indices)
        for d in densities
    ]


def told(planned: Sequence[TrafficPlan]) -> dict[str, Any]:
    """As JSON has it: rows, and what they come to."""
    return {"plans": [{**asdict(each), **_totals(each)} for each in planned]}


def _totals(each: TrafficPlan) -> dict[str, Any]:
    return {
        "dense_bytes": each.dense_bytes,
        "sent_bytes": each.sent_bytes,
        "compression_ratio": each.compression_ratio,
    }


def text(planned: Sequence[TrafficPlan]) -> str:
    """As tables, for people."""
    return "\n\n".join(map(str, planned)) + "\n"
