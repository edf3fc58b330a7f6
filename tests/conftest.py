"""Options and fixtures of all tests.

A fixture is one table of `laws`, so that a new row is tested at once.
"""

import gc
import os
import signal
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from zlib import crc32

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, seed, settings
from laws import DTYPES, EVERY, KERNELS, SPARSIFIERS, WITH_RESIDUAL

from hvd_sparse import QualityWarning

# a law runs so many times for every row of three tables
EXAMPLES = {"--quick": 2, "": 5, "--thorough": 20}

# their jobs and daemons serve many tests, which one process runs
KEPT_TOGETHER = ("tests/test_elastic.py", "tests/test_slurm.py")

# what only ranks can import; collecting doctests would import, and so run, it
collect_ignore = ["counting.py", "members.py", "programs"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hvd_sparse")
    group.addoption("--quick", action="store_true", help="of each test one row")
    group.addoption("--rows", type=int, help="of each test so many rows at most")
    group.addoption("--thorough", action="store_true", help="laws draw all examples")


def pytest_configure(config: pytest.Config) -> None:
    chosen = next((o for o in ("--quick", "--thorough") if config.getoption(o)), "")
    settings.register_profile(
        "laws",
        max_examples=EXAMPLES[chosen],
        deadline=None,  # the first call of a kernel compiles it
        # fixtures here hold nothing that an example could change
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
        ],
        **({"derandomize": True, "database": None} if in_ci() else {}),
    )
    settings.load_profile("laws")


def in_ci() -> bool:
    return bool(os.environ.get("CI"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Examples that are the same in every run are others in every row of a table."""
    function = getattr(item, "function", None)
    if in_ci() and is_hypothesis_test(function):
        seed(crc32(item.nodeid.encode()))(function)


@pytest.hookimpl(trylast=True)  # of what -k and -m have left
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Of each table the rows that their names draw, on every rank alike.

    A table is one test with all its parameters; with --quick, all of a file that start
    jobs.
    """
    quick = config.getoption("--quick")
    most = 1 if quick else config.getoption("--rows")
    if most is None:
        return
    tables = defaultdict(list)
    for item in items:
        file_only = quick and item.get_closest_marker("jobs")
        tables[item.nodeid.partition("::" if file_only else "[")[0]].append(item)
    taken = {i for rows in tables.values() for i in sorted(rows, key=drawn)[:most]}
    config.hook.pytest_deselected(items=[i for i in items if i not in taken])
    items[:] = [i for i in items if i in taken]


def drawn(item: pytest.Item) -> int:
    """A number that says which rows of a table are taken first: the same everywhere."""
    return crc32(item.nodeid.encode())


def pytest_collection_finish() -> None:
    """What was imported lives on: collections of garbage pass over it.

    Where TensorFlow is, they take most of a test otherwise that asks for states.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each test goes to the next process that is free."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file in KEPT_TOGETHER else nodeid

    return Scheduling(config, log)


@pytest.fixture(autouse=True, scope="session")
def heeds_ctrl_c() -> None:
    """A shell lets what it starts in the background ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


KERNELS_ARE_LOOKED_UP_IN = (
    "adaptive",
    "memory",
    "allgather",
    "outbound",
    "residuals",
    "sparsifiers",
    "stochastic",
)


@pytest.fixture
def advised() -> Iterator[Callable[[], list[str]]]:
    """What was said of quality since the test began; also what was said again."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", QualityWarning)
        yield lambda: [str(w.message) for w in told if w.category is QualityWarning]


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
