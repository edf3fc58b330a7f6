"""Law 8: no dense temporary. Measured in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ELEMENTS = 25_000_000
GRADIENT_BYTES = 4 * ELEMENTS

# the peak of a warm step, less what was resident before it: gradient, residual and out
SCRIPT = f"""
import sys
from pathlib import Path
import numpy as np
import hvd_sparse, hvd_sparse.mpi
from mpi4py import MPI

def resident(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if which in line)

n = {ELEMENTS}
sparsifier = eval("hvd_sparse." + sys.argv[1])
reduce = hvd_sparse.mpi.SparseAllreduce(
    sparsifier, comm=MPI.COMM_SELF, dense=hvd_sparse.Never()
)
gradient = np.random.default_rng(0).standard_normal(n, np.float32)
out = np.full(n, 7, np.float32)
for step in range(3):  # warm: everything is compiled, and all pages are there
    reduce.allreduce("w", gradient, out=out)
    np.negative(gradient, out=gradient)  # another gradient, in place
sent_before = reduce.traffic.sent_bytes
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
reduce.allreduce("w", gradient, out=out)
assert reduce.traffic.tensors["w"].route == "sparse"
print(resident("VmHWM") - before)
print(reduce.traffic.sent_bytes - sent_before)
reduce.close()
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="needs Linux's /proc/self/clear_refs to measure the peak of one step",
)
@pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None,
    reason="needs mpi4py: pip install hvd-sparse[mpi]",
)
@pytest.mark.parametrize(
    "sparsifier",
    [
        "TopK(density=0.001)",
        "RandomK(density=0.001)",
        "Threshold(value=3.29)",  # 0.1 % of a normal distribution
    ],
)
def test_a_warm_step_makes_no_dense_temporary(sparsifier: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, sparsifier],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 0, run.stderr
    grown, sent = map(int, run.stdout.split())
    assert 0 < sent < 0.01 * GRADIENT_BYTES
    assert grown <= 0.02 * GRADIENT_BYTES + sent
