"""All ranks start alike: variables of one rank for all, over MPI."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_sparse.transport.mpi.broadcast import Broadcast, Described


def broadcast_variables(
    variables: Iterable[Any], *, root: int = 0, comm: Any = None, timeout_s: float = 600
) -> None:
    """Overwrite variables with those of one rank.

    Beside the model it takes memory for two variables at most.

    Args:
        variables: tf.Variable or Keras variables; the same shapes and dtypes in the
            same order on every rank.
        root: the rank whose values all take.
        comm: an mpi4py communicator, or one of hvd_sparse.loopback; MPI.COMM_WORLD
            unless given.
        timeout_s: seconds to wait for peers without anything that arrives.

    Raises:
        TypeError: a variable holds strings.
        ValueError: root is no rank of comm.
        ExchangeError: a peer has other variables, and nothing has moved; or it did not
            arrive in time.
    """
    with Broadcast(root, comm, timeout_s) as broadcast:
        with broadcast.reported():
            held = list(variables)
            described = [_describe(place, v) for place, v in enumerate(held)]
        broadcast.agree(described)
        for variable, (name, shape, dtype) in zip(held, described, strict=True):
            # one at a time: what TensorFlow has must be copied, and copied back
            array = (
                np.ascontiguousarray(variable.numpy())
                if broadcast.is_root
                else np.empty(shape, tf.as_dtype(dtype).as_numpy_dtype)
            )
            broadcast.send(name, array.reshape(-1).view(np.uint8))
            broadcast.wait(name)
            if not broadcast.is_root:
                variable.assign(array)


def _describe(place: int, variable: Any) -> Described:
    """By its place: Keras numbers the names of what was made before it."""
    value = np.asarray(variable.numpy())
    name = f"variable{place}"
    if value.dtype.kind in "OSU":
        raise TypeError(f"{name}: must be numbers, got {variable.dtype}")
    return Described(name, value.shape, value.dtype.name)
