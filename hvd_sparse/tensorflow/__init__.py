"""The doors for TensorFlow and Keras.

    import hvd_sparse.tensorflow as sparse

    compression = sparse.SparseCompressor(sparse.TopK(density=0.001))

Importing this imports TensorFlow, and neither MPI nor Horovod: a door does at its
first use.
"""

from hvd_sparse import (
    Average,
    ExchangeError,
    Never,
    PayloadError,
    RandomK,
    SignTopK,
    Stochastic,
    Sum,
    Threshold,
    TopK,
    WhenCheaper,
    checkpoint_path,
)
from hvd_sparse.tensorflow.horovod import SparseCompressor
from hvd_sparse.tensorflow.mpi import (
    DistributedGradientTape,
    DistributedOptimizer,
    broadcast_variables,
)

__all__ = [
    "Average",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "ExchangeError",
    "Never",
    "PayloadError",
    "RandomK",
    "SignTopK",
    "SparseCompressor",
    "Stochastic",
    "Sum",
    "Threshold",
    "TopK",
    "WhenCheaper",
    "broadcast_variables",
    "checkpoint_path",
]
