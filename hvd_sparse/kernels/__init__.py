"""The hot loops: the same functions for every kind of array.

| module | arrays | made of |
|---|---|---|
| `reference` | numpy | plain numpy: the oracle of the tests |
| `host` | numpy; torch CPU and TensorFlow tensors, viewed | Numba |
| `device` | torch tensors on an accelerator | torch operations |
"""

from typing import Any

import numpy as np

from hvd_sparse.kernels import host
from hvd_sparse.kernels.contract import Kernels


def kernels_for(array: Any) -> Kernels:
    """The kernels that work where this array lives."""
    if isinstance(array, np.ndarray):
        return host
    from hvd_sparse.kernels import device  # needs torch, which numpy users may lack

    return device
