"""What tests on several ranks share."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """All ranks as a process group of torch.distributed; rank 0 has the store."""
    import torch.distributed as dist
    from mpi4py import MPI

    ranks = MPI.COMM_WORLD
    folder = ranks.bcast(str(tmp_path_factory.mktemp("store")))
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=ranks.rank, world_size=ranks.size
    )
    yield dist.group.WORLD
    dist.destroy_process_group()
