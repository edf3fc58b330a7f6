"""A process set that is smaller than the job; made before Horovod starts."""

import os

from horovod.common.process_sets import ProcessSet

SIZE = int(os.environ.get("HOROVOD_SIZE") or os.environ["OMPI_COMM_WORLD_SIZE"])
MEMBERS = [0, SIZE - 1] if SIZE > 2 else [SIZE - 1]

process_set = ProcessSet(MEMBERS)
