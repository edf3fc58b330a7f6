"""Real Horovod, initialised once a process: launch/test --horovod starts the ranks."""

import os
from collections.abc import Iterator

import pytest


def _size() -> int:
    variables = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    return next((int(os.environ[v]) for v in variables if v in os.environ), 0)


def pytest_ignore_collect() -> bool | None:
    """These make no sense in a process that no launcher started."""
    return None if _size() else True


@pytest.fixture(scope="session", autouse=True)
def horovod() -> Iterator[None]:
    import horovod.tensorflow as hvd
    from members import process_set

    os.environ["HOROVOD_TIMELINE"] = "DYNAMIC"  # none, until a test asks for one
    hvd.init(process_sets=[process_set])
    yield
    hvd.shutdown()
