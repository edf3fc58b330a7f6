"""Where a rank keeps its residuals beside the model's checkpoint, and how."""

import json
import os
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np


def checkpoint_path(prefix: str | PathLike[str], rank: int, size: int) -> str:
    """The file of one rank's residuals.

    Example:
        >>> checkpoint_path("run/step1000", rank=3, size=16)
        'run/step1000.residuals-3-of-16'
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank must be in [0, {size}), got {rank}")
    return f"{fspath(prefix)}.residuals-{rank}-of-{size}"


def write_state(path: str | PathLike[str], state: dict[str, Any]) -> None:
    """Put a state_dict into a file, all of it or nothing.

    The form is that of numpy.savez: one array a residual, and a text that says what
    they are. A file of this name is replaced at once, when the new one is on the disk.

    Args:
        path: of this rank alone; its folder is made.
        state: of any door; residuals are arrays in host memory, or None.
    """
    tensors = state["tensors"]
    residuals = {name: saved["residual"] for name, saved in tensors.items()}
    bare = {name: {**saved, "residual": None} for name, saved in tensors.items()}
    arrays: dict[str, Any] = {
        f"residual {name}": np.asarray(residual)
        for name, residual in residuals.items()
        if residual is not None
    }
    text = json.dumps({**state, "tensors": bare}).encode()
    partial = Path(f"{fspath(path)}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            np.savez(file, state=np.frombuffer(text, np.uint8), **arrays)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_state(path: str | PathLike[str]) -> dict[str, Any]:
    """What write_state was given; residuals are numpy arrays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: write_state did not write it.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            state: dict[str, Any] = json.loads(arrays["state"].tobytes())
            for name, saved in state["tensors"].items():
                saved["shape"] = tuple(saved["shape"])
                saved["residual"] = arrays.get(f"residual {name}")
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{fspath(path)} holds no residuals: {error}") from error
    return state
