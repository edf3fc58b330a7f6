"""The doors for TensorFlow and Keras.

    import hvd_sparse.tensorflow as sparse

    compression = sparse.SparseCompressor(sparse.TopK(density=0.001))

Importing this imports TensorFlow, and neither MPI nor Horovod: a door does at its
first use.
"""

from hvd_sparse import (
    CAT,
    Affine,
    Average,
    BFloat16,
    EliasFano,
    ExchangeError,
    Float16,
    Float32,
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

with needs("tensorflow", extra="tensorflow"):
    from hvd_sparse.tensorflow.advice import advise
    from hvd_sparse.tensorflow.broadcast import broadcast_variables
    from hvd_sparse.tensorflow.callbacks import ResidualCheckpoint, TrafficLogger
    from hvd_sparse.tensorflow.horovod import SparseCompressor
    from hvd_sparse.tensorflow.measuring import measure
    from hvd_sparse.tensorflow.mpi import DistributedGradientTape, DistributedOptimizer
    from hvd_sparse.tensorflow.saving import load_model

__all__ = [
    "CAT",
    "Affine",
    "Average",
    "BFloat16",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "EliasFano",
    "ExchangeError",
    "Float16",
    "Float32",
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
    "ResidualCheckpoint",
    "Sign",
    "SignTopK",
    "SparseCompressor",
    "Stochastic",
    "Sum",
    "Threshold",
    "TopK",
    "TrafficLogger",
    "WhenCheaper",
    "advise",
    "broadcast_variables",
    "checkpoint_path",
    "load_model",
    "measure",
]
