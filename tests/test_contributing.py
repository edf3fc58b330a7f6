"""What the documents for contributors say can be done, and what they name is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
CONTRIBUTING = PROJECT / "CONTRIBUTING.md"
DOCUMENTS = [CONTRIBUTING, PROJECT / "docs" / "architecture.md"]
EXAMPLES = re.findall(r"^```python\n(.*?)^```", CONTRIBUTING.read_text(), re.M | re.S)


def title(example: str) -> str:
    return re.findall(r"^class (\w+)", example, re.M)[0]


def test_the_examples_are_a_sparsifier_a_format_and_a_transport() -> None:
    assert list(map(title, EXAMPLES)) == ["InTurn", "IndicesFirst", "InProcess"]


@pytest.mark.parametrize("example", EXAMPLES, ids=title)
def test_an_example_runs_as_it_is_printed(example: str) -> None:
    if "SparseAllreduce" in example:
        pytest.importorskip("mpi4py", reason="needs hvd_sparse[mpi]")
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(document: Path) -> None:
    named = set(re.findall(r"(?<![\w/-])[\w/-]+\.(?:py|md|sh)\b", document.read_text()))
    assert named
    places = (PROJECT, PROJECT / "hvd_sparse")
    yours = {"in_turn.py"}
    assert {n for n in named if not any((p / n).is_file() for p in places)} <= yours


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_of_launch_test_that_is_named_exists(document: Path) -> None:
    commands = re.findall(r"launch/test( -[^`#\n]*)", document.read_text())
    named = set(re.findall(r" (--[a-z][\w-]*)", "".join(commands)))
    usage = (PROJECT / "launch" / "test").read_text().partition("\nset -e")[0]
    assert named <= set(re.findall(r"--[a-z][\w-]*", usage))
