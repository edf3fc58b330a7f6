"""Sparsified gradient exchange for Horovod and MPI: TopK SGD with error feedback.

The map of the package:

| where | what |
|---|---|
| `hvd_sparse.core.path` | START HERE: the six stages a gradient passes |
| `hvd_sparse.core` | memory, sparsifiers, payload, routing, traffic |
| `hvd_sparse.core.adaptive` | CAT: how many elements, and `costs` of sending them |
| `hvd_sparse.kernels` | the hot loops: numpy oracle, Numba, accelerator |
| `hvd_sparse.mpi` | numpy arrays over plain MPI: SparseAllreduce |
| `hvd_sparse.loopback` | ranks in one process, without MPI: for unit tests |
| `hvd_sparse.transport` | what moves bytes over MPI, and when ranks disagree |
| `hvd_sparse.forecast` | `plan`: what a model will cost on the wire |
| `hvd_sparse.advice` | what of an optimizer spoils sparse training |
| `hvd_sparse.carriers` | how payloads travel through Horovod |
| `hvd_sparse.watchdog` | waits that nothing else can end |
| `hvd_sparse.torch` | PyTorch: SparseCompressor (Horovod), DistributedOptimizer |
| `hvd_sparse.tensorflow` | TensorFlow and Keras: the same two doors, and a tape |

Importing this package imports no framework and no MPI.
"""

from importlib import import_module
from typing import Any

from hvd_sparse.advice import QualityWarning
from hvd_sparse.carriers import Embedded, Gathered
from hvd_sparse.core.adaptive import CAT, ExactCAT
from hvd_sparse.core.contracts import (
    Average,
    ExchangeError,
    Format,
    Op,
    PayloadError,
    Selection,
    Sparsifier,
    Sum,
)
from hvd_sparse.core.costs import Affine, Packet, PaperPayload, Payload
from hvd_sparse.core.indices import EliasFano, RawIndices
from hvd_sparse.core.routing import Never, WhenCheaper
from hvd_sparse.core.sparsifiers import RandomK, SignTopK, Threshold, TopK
from hvd_sparse.core.state import checkpoint_path
from hvd_sparse.core.stochastic import Stochastic
from hvd_sparse.core.values import (
    BFloat16,
    Float16,
    Float32,
    Int2,
    Int4,
    Int8,
    Sign,
)
from hvd_sparse.forecast import plan

__version__ = "0.1.0"

__all__ = [
    "CAT",
    "Affine",
    "Average",
    "BFloat16",
    "EliasFano",
    "Embedded",
    "ExactCAT",
    "ExchangeError",
    "Float16",
    "Float32",
    "Format",
    "Gathered",
    "Int2",
    "Int4",
    "Int8",
    "Never",
    "Op",
    "Packet",
    "PaperPayload",
    "Payload",
    "PayloadError",
    "QualityWarning",
    "RandomK",
    "RawIndices",
    "Selection",
    "Sign",
    "SignTopK",
    "Sparsifier",
    "Stochastic",
    "Sum",
    "Threshold",
    "TopK",
    "WhenCheaper",
    "checkpoint_path",
    "plan",
]

_DOORS = ("loopback", "mpi", "tensorflow", "torch")


def __getattr__(name: str) -> Any:
    """Doors are imported when they are named: `hvd_sparse.mpi`."""
    if name in _DOORS:
        return import_module(f"hvd_sparse.{name}")
    raise AttributeError(f"module 'hvd_sparse' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is public; doors also before they are imported."""
    return sorted([*__all__, *_DOORS, "__version__"])
