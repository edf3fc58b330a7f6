"""Where a rank keeps its residuals beside the model's checkpoint."""

from os import PathLike, fspath


def checkpoint_path(prefix: str | PathLike[str], rank: int, size: int) -> str:
    """The file of one rank's residuals.

    Example:
        >>> checkpoint_path("run/step1000", rank=3, size=16)
        'run/step1000.residuals-3-of-16'
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank must be in [0, {size}), got {rank}")
    return f"{fspath(prefix)}.residuals-{rank}-of-{size}"
