"""Fixtures of all tests: one a table of `laws`, so that a new row is tested at once."""

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from laws import DTYPES, EVERY, KERNELS, SPARSIFIERS, WITH_RESIDUAL

settings.register_profile(
    "laws",
    max_examples=20,  # a law runs so many times for every row of three tables
    deadline=None,  # the first call of a kernel compiles it
    # fixtures here hold nothing that an example could change
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile(
    "ci", settings.get_profile("laws"), derandomize=True, database=None
)
settings.load_profile("ci" if os.environ.get("CI") else "laws")

# what only ranks can import; collecting doctests would import, and so run, it
collect_ignore = ["members.py", "programs"]

KERNELS_ARE_LOOKED_UP_IN = ("adaptive", "memory", "path", "sparsifiers", "stochastic")


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def dtype(request: pytest.FixtureRequest) -> Any:
    """The gradient's."""
    return request.param


@pytest.fixture(params=SPARSIFIERS.values(), ids=SPARSIFIERS.keys())
def sparsify(request: pytest.FixtureRequest) -> Any:
    """share -> a sparsifier that takes about this share of a gradient, as it is."""
    return request.param


@pytest.fixture(params=WITH_RESIDUAL.values(), ids=WITH_RESIDUAL.keys())
def with_residual(request: pytest.FixtureRequest) -> Any:
    """share -> a sparsifier that loses nothing."""
    return request.param


@pytest.fixture(params=EVERY.values(), ids=EVERY.keys())
def any_sparsify(request: pytest.FixtureRequest) -> Any:
    """share -> any sparsifier there is."""
    return request.param


@pytest.fixture(params=KERNELS.values(), ids=KERNELS.keys())
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels in use; `kernels.array` makes what they take from a numpy array."""
    chosen = request.param
    for module in KERNELS_ARE_LOOKED_UP_IN:
        place = f"hvd_sparse.core.{module}.kernels_for"
        monkeypatch.setattr(place, lambda array: chosen.module)
    return chosen
