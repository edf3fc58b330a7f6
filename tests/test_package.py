"""What holds for the package as it is installed, before any gradient moves."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import needs
import pytest
from packaging.requirements import Requirement

import hvd_sparse

PROJECT = Path(__file__).parents[1]
LAUNCH = sorted(
    path
    for path in (PROJECT / "launch").iterdir()
    if path.is_file() and path.read_text().startswith("#!")
)
SOURCED = sorted(set((PROJECT / "launch").glob("*.sh")) - set(LAUNCH))  # never run
CONSTRAINTS = {
    "3.10": "constraints.txt",
    "3.11": "constraints.txt",
    "3.12": "constraints-3.12.txt",
    "3.13": "constraints-3.12.txt",
    "3.14": "constraints-3.12.txt",
}

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
        pytest.skip(f"needs {needs.FRAMEWORKS[framework]}")
    if not installed(f"hvd_sparse.{framework}"):
        pytest.skip(f"hvd_sparse.{framework} is not part of this release")
    assert not imported_by(f"import hvd_sparse.{framework}") & COLLECTIVES


@pytest.mark.parametrize("door", ["mpi", "loopback"])
def test_importing_the_mpi_door_starts_no_mpi(door: str) -> None:
    assert not imported_by(f"import hvd_sparse.{door}") & (FRAMEWORKS | COLLECTIVES)


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
    doors = {"loopback", "mpi", "tensorflow", "torch"}
    assert {*hvd_sparse.__all__, *doors} <= set(shown)
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
    assert doors | {"doctor", "examples", "plots", "fuzz", "dev"} == set(extras)


def test_the_base_install_is_numpy_and_numba() -> None:
    requirements = importlib.metadata.requires("hvd-sparse") or []
    base = [line for line in requirements if "extra ==" not in line]
    assert {re.split(r"[^\w-]", line)[0] for line in base} == {"numba", "numpy"}


@pytest.mark.parametrize(("python", "file"), CONSTRAINTS.items())
def test_every_requirement_is_pinned_for_every_python(python: str, file: str) -> None:
    """In the file for that Python, or by the requirement itself."""
    pins = (PROJECT / file).read_text()
    pinned = set(re.findall(r"^([a-z0-9-]+)==", pins, re.MULTILINE))
    for line in importlib.metadata.requires("hvd-sparse") or []:
        needed = Requirement(line)
        extra = re.search(r"""extra == ['"](\w+)['"]""", line)
        where = {"python_version": python, "extra": extra[1] if extra else ""}
        exact = any(part.operator == "==" for part in needed.specifier)
        if needed.marker is None or needed.marker.evaluate(where):
            assert exact or needed.name.replace("_", "-") in pinned


def test_the_classifiers_name_the_pythons_that_have_constraints() -> None:
    listed = importlib.metadata.metadata("hvd-sparse").get_all("Classifier") or []
    named = {line.rpartition(" ")[2] for line in listed if "Python :: 3." in line}
    assert named == set(CONSTRAINTS)
    assert {python: said("constraints_of", python) for python in named} == CONSTRAINTS


def said(*command: str, release: str = "/etc/os-release", path: str = "") -> str:
    """What a function of launch/python.sh prints."""
    script = f'. launch/python.sh; OS_RELEASE={release}; PATH={path or "$PATH"}; "$@"'
    ended = subprocess.run(
        ["bash", "-c", script, "bash", *command],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


@pytest.mark.parametrize(
    ("codename", "python"),
    [("jammy", "3.10"), ("bookworm", "3.11"), ("noble", "3.12"), ("trixie", "3.13")],
)
@pytest.mark.parametrize("variable", ["VERSION_CODENAME", "UBUNTU_CODENAME"])
def test_the_packages_that_bring_a_python_are_those_of_the_system(
    variable: str, codename: str, python: str, tmp_path: Path
) -> None:
    release, apt = tmp_path / "os-release", tmp_path / "apt-get"
    release.write_text(f"VERSION_CODENAME=mint\n{variable}={codename}\n")
    apt.touch(mode=0o755)
    packages = said("missing_packages", release=str(release), path=str(tmp_path))
    assert packages == f"python{python} python{python}-venv"


@pytest.mark.parametrize(
    ("version", "serves"), [("3.9", False), ("3.14", True), ("3.15", False)]
)
def test_a_python_too_old_or_too_new_is_not_taken(
    version: str, serves: bool, tmp_path: Path
) -> None:
    """One that only says its version: no such Python need be there."""
    python = tmp_path / "python3"
    python.write_text(
        f'#!/bin/bash\nexec {sys.executable} -c "import sys; sys.version_info ='
        f" ({version.replace('.', ', ')})"
        ' ; exec(sys.argv[1])" "$2"\n'
    )
    python.chmod(0o755)
    script = "find_python || echo none"
    found = said("eval", script, path=str(tmp_path))
    assert found == (str(python) if serves else "none")


@pytest.mark.parametrize("script", LAUNCH, ids=lambda path: path.name)
def test_every_launch_script_is_executable_and_says_how_to_use_it(
    script: Path,
) -> None:
    text = script.read_text()
    assert "\n# usage" in text
    assert os.access(script, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text


@pytest.mark.parametrize("script", SOURCED, ids=lambda path: path.name)
def test_what_the_launch_scripts_source_cannot_be_run(script: Path) -> None:
    assert "\n# usage" in script.read_text()
    assert not os.access(script, os.X_OK)


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
    files = ["pyproject.toml", "launch/setup", "launch/test", "launch/python.sh"]
    for name in [*files, *CONSTRAINTS.values()]:
        assert not re.search(r"pypi\.|pythonhosted|://", (PROJECT / name).read_text())
