"""The tensors of the model in question: of a checkpoint, or of so many parameters."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from hvd_sparse.core.shapes import Shaped, dtype_named

Named = tuple[str, Shaped]

TYPICAL = 160  # tensors of a model of which only the parameters are known
_STATES = ("state_dict", "model_state_dict", "model")  # where a checkpoint has weights


def tensors_of(parameters: int) -> list[int]:
    """Elements per tensor, of a model of so many parameters: half of them small.

    As in ResNet-50, where biases and norms are many and weigh nothing.

    Raises:
        ValueError: parameters is not positive.
    """
    if parameters < 1:
        raise ValueError(f"parameters must be positive, got {parameters}")
    large = min(TYPICAL // 2, parameters)
    small = min(TYPICAL // 2, max(0, parameters - large) // 512)
    rest, extra = divmod(parameters - 256 * small, large)
    return [256] * small + [rest + 1] * extra + [rest] * (large - extra)


def tensors_in(checkpoint: Path) -> list[int]:
    """Elements of each floating tensor of a checkpoint: see `weights_in`."""
    return [math.prod(weight.shape) for weight in weights_in(checkpoint).values()]


def weights_in(checkpoint: Path) -> dict[str, Shaped]:
    """Each floating tensor of a checkpoint, by its name there.

    Args:
        checkpoint: .npz; .h5 or .keras; else what torch.load reads, weights only.

    Raises:
        ValueError: there is no floating tensor in it.
        ImportError: what reads it is not installed.
    """
    readers = {".npz": _of_numpy, ".h5": _of_hdf5, ".keras": _of_keras}
    found = dict(readers.get(checkpoint.suffix, _of_torch)(checkpoint))
    if not found:
        raise ValueError(f"{checkpoint} must have floating tensors, got none")
    return found


def _of_numpy(file: Path) -> Iterator[Named]:
    with np.load(file, allow_pickle=False) as arrays:
        for name, array in arrays.items():
            if array.dtype.kind == "f":
                yield name, _shaped(array)


def _of_keras(file: Path) -> Iterator[Named]:
    with ZipFile(file) as archive, archive.open("model.weights.h5") as weights:
        yield from _of_hdf5(weights)


def _of_hdf5(file: Any) -> Iterator[Named]:
    import h5py

    found: list[Named] = []

    def visit(name: str, item: Any) -> None:
        floating = isinstance(item, h5py.Dataset) and item.dtype.kind == "f"
        if floating and "optimizer" not in name:
            found.append((name, _shaped(item)))

    with h5py.File(file, "r") as weights:
        weights.visititems(visit)
    yield from found


def _of_torch(file: Path) -> Iterator[Named]:
    import torch

    saved = torch.load(file, map_location="cpu", weights_only=True)
    for key in _STATES:
        if isinstance(saved, Mapping) and isinstance(saved.get(key), Mapping):
            saved = saved[key]
    if not isinstance(saved, Mapping):
        saved = {f"tensor {place}": value for place, value in enumerate(saved)}
    for name, value in saved.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield str(name), _shaped(value)


def _shaped(array: Any) -> Shaped:
    return Shaped(tuple(array.shape), dtype_named(array.dtype))
