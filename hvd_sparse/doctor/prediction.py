"""What the exchange of a step will take, dense, fp16 and sparse; and the verdict.

Work on this machine and on the network are added up: what a backward pass hides is not
known here. Of a dense exchange only the network counts.
"""

from collections.abc import Sequence
from typing import NamedTuple

from hvd_sparse.doctor.local import Local
from hvd_sparse.doctor.network import Network

PAYS = 0.95  # of the dense time: anything above is within the error of this


class Prediction(NamedTuple):
    """Of one way to exchange.

    Attributes:
        method: "dense", "fp16" or "sparse".
        density: None where all is sent.
        seconds: of a step's exchange.
        local_s: the part of it that this machine takes, not the network.
        bytes: what a rank contributes.
    """

    method: str
    density: float | None
    seconds: float
    local_s: float
    bytes: int


def predict(
    sizes: Sequence[int], network: Network, locals_: dict[float, Local]
) -> list[Prediction]:
    """Rows for dense, fp16 and each density.

    Args:
        sizes: elements of each tensor, float32.
        network: what collectives take.
        locals_: per density, what this machine takes.
    """
    size = 4 * sum(sizes)
    whole = network.allreduce.seconds(size)
    half = network.allreduce_half.seconds(size // 2)
    rows = [
        Prediction("dense", None, whole, 0.0, size),
        Prediction("fp16", None, half, 0.0, size // 2),
    ]
    for density, local in locals_.items():
        moved = network.allgather.seconds(local.payload_bytes)
        moved += network.allreduce.seconds(local.dense_bytes)
        sent = local.payload_bytes + local.dense_bytes
        total = moved + local.seconds
        rows.append(Prediction("sparse", density, total, local.seconds, sent))
    return rows


def verdict(rows: Sequence[Prediction]) -> str:
    """In a sentence, whether sparsification will pay on this network."""
    dense = min((r for r in rows if r.density is None), key=lambda r: r.seconds)
    sparse = min((r for r in rows if r.density is not None), key=lambda r: r.seconds)
    told = (
        f"a step's exchange takes {_ms(sparse.seconds)} at {sparse.density:.2%}, "
        f"{_ms(dense.seconds)} {dense.method}"
    )
    if sparse.seconds > PAYS * dense.seconds:
        return f"Sparsification will not pay here: {told}."
    if sparse.local_s > sparse.seconds / 2:
        told += "; most of it is this machine's own work, which more threads shorten"
    return f"Sparsification will pay here: {told}."


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
