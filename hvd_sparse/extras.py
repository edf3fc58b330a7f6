"""What an extra of this package installs, said where it is missing."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(package: str, extra: str) -> Iterator[None]:
    """Imports inside name the extra that brings the package, where it is missing.

    Args:
        package: a top-level module.
        extra: of this distribution.

    Raises:
        ModuleNotFoundError: there is no such package; whatever else is missing, or
            broken, is raised as it is.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        if missing.name != package:
            raise
        raise ModuleNotFoundError(
            f"{package} is not installed: pip install 'hvd-sparse[{extra}]' brings it",
            name=package,
        ) from missing
