"""A process set that is smaller than the job; made before Horovod starts."""

import os

from horovod.common.process_sets import ProcessSet

# of horovodrun, of Open MPI, of all others
VARIABLES = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
SIZE = next(int(os.environ[v]) for v in VARIABLES if v in os.environ)
MEMBERS = [0, SIZE - 1] if SIZE > 2 else [SIZE - 1]

process_set = ProcessSet(MEMBERS)
