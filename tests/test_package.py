"""What holds for the package as it is installed, before any gradient moves."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hvd_sparse

PROJECT = Path(__file__).parents[1]
LAUNCH = sorted(
    path
    for path in (PROJECT / "launch").iterdir()
    if path.is_file() and path.read_text().startswith("#!")
)
SOURCED = PROJECT / "launch" / "mpi-environment.sh"  # by the others, never run

FRAMEWORKS = {"torch", "tensorflow", "keras"}
COLLECTIVES = {"mpi4py", "horovod"}


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def imported_by(statement: str) -> set[str]:
    """Names of the top-level packages in a fresh interpreter after the statement."""
    report = f"{statement}; import sys; print(*(m.split('.')[0] for m in sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", report], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_importing_the_package_imports_no_framework_and_no_mpi() -> None:
    loaded = imported_by("import hvd_sparse")
    assert "hvd_sparse" in loaded
    assert not loaded & (FRAMEWORKS | COLLECTIVES)


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_importing_a_door_imports_neither_mpi_nor_horovod(framework: str) -> None:
    if not installed(framework):
        pytest.skip(f"needs {framework}: pip install hvd-sparse[{framework}]")
    if not installed(f"hvd_sparse.{framework}"):
        pytest.skip(f"hvd_sparse.{framework} is not part of this release")
    assert not imported_by(f"import hvd_sparse.{framework}") & COLLECTIVES


def test_importing_the_mpi_door_starts_no_mpi() -> None:
    assert not imported_by("import hvd_sparse.mpi") & (FRAMEWORKS | COLLECTIVES)


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_a_missing_framework_is_an_error_that_names_the_extra(framework: str) -> None:
    hidden = f"import sys; sys.modules[{framework!r}] = None; import hvd_sparse"
    run = subprocess.run(
        [sys.executable, "-c", f"{hidden}.{framework}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = run.stderr.splitlines()[-1]
    assert last == (
        f"ModuleNotFoundError: {framework} is not installed: "
        f"pip install 'hvd-sparse[{framework}]' brings it"
    )


def test_a_package_shows_what_is_public_and_nothing_else() -> None:
    shown = dir(hvd_sparse)
    assert {*hvd_sparse.__all__, "mpi", "tensorflow", "torch"} <= set(shown)
    assert all(hasattr(hvd_sparse, n) for n in hvd_sparse.__all__)
    assert not {"Any", "import_module", "core", "kernels"} & set(shown)


def test_the_installed_version_is_that_of_the_source() -> None:
    source = (PROJECT / "pyproject.toml").read_text()
    stated = re.search(r'^version = "(.+)"$', source, re.MULTILINE)
    assert stated is not None
    assert importlib.metadata.version("hvd-sparse") == stated[1]


def test_the_version_has_an_entry_in_the_changelog() -> None:
    version = importlib.metadata.version("hvd-sparse")
    headings = re.findall(
        r"^## \[(.+?)\]", (PROJECT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert {"Unreleased", version} & set(headings)


def test_the_extras_are_those_promised() -> None:
    extras = importlib.metadata.metadata("hvd-sparse").get_all("Provides-Extra")
    doors = {"torch", "tensorflow", "horovod", "mpi"}
    assert doors | {"doctor", "examples", "plots", "dev"} == set(extras)


def test_the_base_install_is_numpy_and_numba() -> None:
    requirements = importlib.metadata.requires("hvd-sparse") or []
    base = [line for line in requirements if "extra ==" not in line]
    assert {re.split(r"[^\w-]", line)[0] for line in base} == {"numba", "numpy"}


def test_every_requirement_is_pinned() -> None:
    pins = (PROJECT / "constraints.txt").read_text()
    pinned = set(re.findall(r"^([a-z0-9-]+)==", pins, re.MULTILINE))
    requirements = importlib.metadata.requires("hvd-sparse") or []
    names = {re.split(r"[^\w-]", line)[0].replace("_", "-") for line in requirements}
    assert names <= pinned


@pytest.mark.parametrize("script", LAUNCH, ids=lambda path: path.name)
def test_every_launch_script_is_executable_and_says_how_to_use_it(
    script: Path,
) -> None:
    text = script.read_text()
    assert "\n# usage" in text
    assert os.access(script, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text


def test_what_the_launch_scripts_source_cannot_be_run() -> None:
    assert "\n# usage" in SOURCED.read_text()
    assert not os.access(SOURCED, os.X_OK)
    assert SOURCED not in LAUNCH


@pytest.mark.parametrize("script", ["setup", "test"])
def test_help_prints_the_usage_block_and_does_nothing(script: str) -> None:
    run = subprocess.run(
        [PROJECT / "launch" / script, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0
    assert f"usage: launch/{script}" in run.stdout
    assert "set -euo" not in run.stdout


def test_no_file_names_a_package_registry() -> None:
    for name in ["pyproject.toml", "constraints.txt", "launch/setup", "launch/test"]:
        assert not re.search(r"pypi\.|pythonhosted|://", (PROJECT / name).read_text())
