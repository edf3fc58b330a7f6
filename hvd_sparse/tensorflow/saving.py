"""Keras models saved with a distributed optimizer in them, over plain MPI.

In the file the optimizer is the plain one, so that whoever has Keras can load it, and
Keras's own load_model brings a plain one back, with which every rank would train by
itself. Saving warns of it, loading too (see `marking`), and `load_model` brings a
distributed one back.
"""

from os import PathLike
from typing import Any

import tensorflow as tf

from hvd_sparse.core.contracts import Average, Format, Sparsifier
from hvd_sparse.core.indices import Indices
from hvd_sparse.core.routing import Dense, WhenCheaper
from hvd_sparse.core.values import Values
from hvd_sparse.tensorflow.marking import expecting, watch_loading
from hvd_sparse.tensorflow.mpi import DistributedOptimizer

watch_loading()  # in every process that may go on to train what it loads


def load_model(
    path: str | PathLike[str],
    sparsifier: Sparsifier,
    *,
    comm: Any = None,
    op: int = Average,
    dense: Dense = WhenCheaper(),  # noqa: B008  # frozen: one instance serves all
    values: Values | Format | None = None,
    indices: Indices | None = None,
    timeout_s: float = 600,
    **options: Any,
) -> Any:
    """Load a Keras model whose optimizer is distributed again; every rank calls this.

    The optimizer goes on with its own variables. What was not sent is not in the file:
    see `residual_state_dict` and `ResidualCheckpoint`.

    Args:
        path: of a .keras, an .h5 or a SavedModel that was saved with its optimizer.
        sparsifier: as for DistributedOptimizer.
        comm: as for DistributedOptimizer.
        op: as for DistributedOptimizer.
        dense: as for DistributedOptimizer.
        values: as for DistributedOptimizer.
        indices: as for DistributedOptimizer.
        timeout_s: as for DistributedOptimizer.
        options: of tf.keras.models.load_model, such as custom_objects.

    Returns:
        The model, compiled; its `optimizer` is as DistributedOptimizer returns it.

    Raises:
        ValueError: there is no optimizer in the file.
    """
    with expecting():
        model = tf.keras.models.load_model(path, **options)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        raise ValueError(
            f"{path}: there is no optimizer in it; compile the model with a "
            "DistributedOptimizer"
        )
    DistributedOptimizer(
        optimizer,
        sparsifier,
        comm=comm,
        op=op,
        dense=dense,
        values=values,
        indices=indices,
        timeout_s=timeout_s,
    )
    return model
