"""The doors for PyTorch.

    import hvd_sparse.torch as sparse

    optimizer = sparse.DistributedOptimizer(
        optimizer, sparse.TopK(density=0.001), named_parameters=model.named_parameters()
    )

Importing this imports torch, and neither MPI nor Horovod: a door does at first use.
"""

from hvd_sparse import (
    CAT,
    Affine,
    Average,
    BFloat16,
    EliasFano,
    Embedded,
    ExchangeError,
    Float16,
    Float32,
    Gathered,
    Int2,
    Int4,
    Int8,
    Never,
    Packet,
    Payload,
    PayloadError,
    QualityWarning,
    RandomK,
    RawIndices,
    Sign,
    SignTopK,
    Stochastic,
    Sum,
    Threshold,
    TopK,
    WhenCheaper,
    checkpoint_path,
)
from hvd_sparse.extras import needs

with needs("torch", extra="torch"):
    from hvd_sparse.torch.advice import advise
    from hvd_sparse.torch.broadcast import (
        broadcast_optimizer_state,
        broadcast_parameters,
    )
    from hvd_sparse.torch.ddp import SparseState, sparse_hook
    from hvd_sparse.torch.horovod import SparseCompressor
    from hvd_sparse.torch.measuring import measure
    from hvd_sparse.torch.mpi import DistributedOptimizer
    from hvd_sparse.torch.registering import register

__all__ = [
    "CAT",
    "Affine",
    "Average",
    "BFloat16",
    "DistributedOptimizer",
    "EliasFano",
    "Embedded",
    "ExchangeError",
    "Float16",
    "Float32",
    "Gathered",
    "Int2",
    "Int4",
    "Int8",
    "Never",
    "Packet",
    "Payload",
    "PayloadError",
    "QualityWarning",
    "RandomK",
    "RawIndices",
    "Sign",
    "SignTopK",
    "SparseCompressor",
    "SparseState",
    "Stochastic",
    "Sum",
    "Threshold",
    "TopK",
    "WhenCheaper",
    "advise",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "checkpoint_path",
    "measure",
    "register",
    "sparse_hook",
]
