"""Law 8: no dense temporary. Measured in processes of their own."""

import os

import pytest
from launching import START_S, launch, needs_mpirun

ELEMENTS = 8_000_000
GRADIENT_BYTES = 4 * ELEMENTS

pytestmark = [
    needs_mpirun,
    pytest.mark.jobs,
    pytest.mark.skipif(
        not os.access("/proc/self/clear_refs", os.W_OK),
        reason="needs Linux's /proc/self/clear_refs to measure the peak of one step",
    ),
]


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize(
    "sparsifier",
    [
        "TopK(density=0.001)",
        "TopK(density=0.01)",
        "RandomK(density=0.001)",
        "Threshold(value=3.29)",  # 0.1 % of a normal distribution
        "SignTopK(density=0.001)",
        "Stochastic(expected_density=0.001)",
        "CAT(hvd_sparse.TopK(), hvd_sparse.Affine(1.0, 1e4))",
        "CAT(hvd_sparse.SignTopK(), hvd_sparse.Affine(1.0, 1e3))",
    ],
)
def test_a_warm_step_makes_no_dense_temporary(sparsifier: str, ranks: int) -> None:
    job = launch(
        "memory_use.py", str(ELEMENTS), sparsifier, ranks=ranks, timeout_s=4 * START_S
    )
    assert job.code == 0, job.errors
    lines = [tuple(map(int, line.split())) for line in job.output.splitlines()]
    assert len(lines) == ranks
    for grown, payloads in lines:
        assert payloads > 0
        assert grown <= 0.02 * GRADIENT_BYTES + payloads
