"""Machine code on disk belongs to the sources, the signature and nobody else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hvd_sparse
from hvd_sparse.kernels.host.jit import _Files
from hvd_sparse.warm_up import warm_up

LOOPS = Path("kernels", "host")

# all of this package that one small kernel needs; what it compiles takes seconds
PROGRAM = """
import numpy as np
from hvd_sparse.kernels import host
from hvd_sparse.kernels.host.candidates import compact
residual = np.zeros(64, np.float32)
host.add_at(residual, np.array([3], np.int32), np.ones(1, residual.dtype))
host.accumulate(residual, np.ones_like(residual))
stats = compact.stats
print(residual[0], sum(stats.cache_misses.values()), sum(stats.cache_hits.values()))
"""


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A package of one's own, whose sources may be edited."""
    package = Path(hvd_sparse.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(package, tmp_path / package.name, ignore=ignored))


def run(package: Path, program: str = PROGRAM, **variables: str) -> list[str]:
    """An accumulated one, and how often machine code was missing and found."""
    elsewhere = {"NUMBA_CACHE_DIR", "PYTHONPATH"}
    environment = {n: v for n, v in os.environ.items() if n not in elsewhere}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=package.parent,  # found before the package that is installed
        env={**environment, "PYTHONPATH": str(package.parent), **variables},
        capture_output=True,
        text=True,
        timeout=200,  # a slow machine compiles
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()


def compiled_in(package: Path) -> set[Path]:
    return set((package / LOOPS / "__pycache__").glob("*.nb*"))


@pytest.mark.jobs
def test_the_next_process_finds_what_was_compiled(copied: Path) -> None:
    assert run(copied) == ["1.0", "1", "0"]
    files = compiled_in(copied)
    assert run(copied) == ["1.0", "0", "1"]
    assert compiled_in(copied) == files


@pytest.mark.jobs
def test_an_edit_of_any_source_is_compiled_and_the_old_code_forgotten(
    copied: Path,
) -> None:
    run(copied)
    old = compiled_in(copied)
    simd = copied / LOOPS / "simd.py"
    added, subtracted = "builder.fadd(old, added)", "builder.fsub(old, added)"
    source = simd.read_text()
    assert added in source
    simd.write_text(source.replace(added, subtracted))
    assert run(copied) == ["-1.0", "1", "0"]
    assert compiled_in(copied)
    assert not compiled_in(copied) & old


def test_two_processes_that_compile_at_once_keep_their_own_code(
    tmp_path: Path,
) -> None:
    """As with an index: both have looked, then both write."""
    one, other = (_Files(tmp_path, "loop-1.py311", "digest") for _ in range(2))
    assert one.load("float32") is other.load("float64") is None
    one.save("float32", "of one")
    other.save("float64", "of the other")
    for files in (one, other):
        assert files.load("float32") == "of one"
        assert files.load("float64") == "of the other"
        assert files.load("float16") is None


def test_damaged_machine_code_is_compiled_again(tmp_path: Path) -> None:
    files = _Files(tmp_path, "loop-1.py311", "digest")
    files.save("float32", "whole")
    assert files.load("float32") == "whole"
    (file,) = tmp_path.iterdir()
    for content in (b"", file.read_bytes()[:-3]):
        file.write_bytes(content)
        assert files.load("float32") is None


GONE = """
import shutil
from pathlib import Path
from hvd_sparse.kernels.host import jit
folder = Path(jit.__file__).parent / "__pycache__"
shutil.rmtree(folder)
folder.touch()  # no folder any more, even for root
"""

GONE_BEFORE = """
import shutil
from importlib.util import find_spec
from pathlib import Path
folder = Path(find_spec("hvd_sparse").origin).parent / "kernels/host/__pycache__"
shutil.rmtree(folder)
folder.touch()
"""


@pytest.mark.jobs
def test_a_folder_that_can_not_be_written_any_more_costs_time_alone(
    copied: Path,
) -> None:
    loaded = PROGRAM.replace("residual =", f"{GONE}\nresidual =", 1)
    assert run(copied, program=loaded) == ["1.0", "1", "0"]
    assert (copied / LOOPS / "__pycache__").is_file()


@pytest.mark.jobs
def test_what_was_warmed_up_beside_the_sources_serves_who_may_not_write_there(
    copied: Path, tmp_path: Path
) -> None:
    run(copied)
    files = compiled_in(copied)
    elsewhere = tmp_path / "elsewhere"
    assert run(copied, NUMBA_CACHE_DIR=str(elsewhere)) == ["1.0", "0", "1"]
    assert compiled_in(copied) == files
    assert not [*elsewhere.rglob("*.nbc")]


@pytest.mark.jobs
def test_compiling_is_said_once_with_how_long_it_takes_and_where_it_is_kept(
    copied: Path,
) -> None:
    kept = copied / LOOPS / "__pycache__"
    two = f"{PROGRAM}\nhost.norm(residual)"  # another loop
    (said,) = said_by(copied, two)
    assert said.startswith(
        "hvd_sparse compiles its hot loops for this processor, 10 to"
    )
    assert str(kept) in said
    assert said_by(copied, two) == []
    (said,) = said_by(copied, GONE_BEFORE + two)
    assert "NUMBA_CACHE_DIR" in said


def said_by(package: Path, program: str) -> list[str]:
    """Lines on standard error, with no other cache to fall back to."""
    file = package.parent / "said"
    program = f"import os\nos.dup2(os.open({str(file)!r}, 577, 0o600), 2)\n{program}"
    run(package, program, HOME="/dev/null", XDG_CACHE_HOME="/dev/null")
    return file.read_text().splitlines()


EVERYTHING = """
import itertools
import sys
import numpy as np
from laws import DTYPES, EVERY, Kind, Ranks
for dtype, sparsify, in_place in itertools.product(DTYPES, EVERY, (False, True)):
    ranks = Ranks(2, EVERY[sparsify](0.01))
    kind = Kind((9973,), "normal", "contiguous", 0)
    for layout in ("contiguous", "read-only")[: 1 if in_place else 2]:
        step = ranks.step_in_place if in_place else ranks.step
        step([kind._replace(layout=layout).make(DTYPES[dtype], r) for r in range(2)])
loops = {loop for name, module in sys.modules.items()
         if name.startswith("hvd_sparse.kernels.host.")
         for loop in vars(module).values() if hasattr(loop, "stats")}
assert sum(sum(loop.stats.cache_hits.values()) for loop in loops) > 30
for loop in loops:
    for signature in loop.stats.cache_misses:
        print(loop.__name__, signature)
"""


def test_after_warming_up_nothing_is_compiled() -> None:
    """Whatever the dtype, the sparsifier, and whether a gradient is read-only."""
    warm_up()
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    ended = subprocess.run(
        [sys.executable, "-c", EVERYTHING],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""
