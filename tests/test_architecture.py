"""Who may import whom, read from the import statements: nothing is imported here.

What `import_module` fetches by a name that is put together is not seen; the tests of
`test_package` look at what a fresh interpreter has loaded.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

import pytest

PROJECT = Path(__file__).parents[1]
SOURCES = {
    ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(
        ".__init__"
    ): path
    for path in sorted((PROJECT / "hvd_sparse").rglob("*.py"))
}

# Per part of the package, what it may import, anywhere in its files, beside itself and
# the standard library. Parts begin with a dot; "." is hvd_sparse/__init__.py. The
# picture of it is in docs/architecture.md.
INTEGRATION = {
    *(".", ".advice", ".carriers", ".core", ".extras", ".mpi", ".transport"),
    *(".watchdog", "numpy", "horovod"),
}
MAY_IMPORT: dict[str, set[str]] = {
    ".kernels": {"numpy", "numba", "llvmlite", "torch"},
    ".core": {".kernels", "numpy"},
    ".advice": {".core"},
    ".carriers": {".core", "numpy"},
    ".watchdog": {".core"},
    ".extras": set(),
    ".table": set(),
    ".forecast": {".core", ".table", ".transport"},
    ".": {".advice", ".carriers", ".core", ".forecast"},
    ".arrays": {".core", "numpy"},
    ".transport": {".core", "numpy", "mpi4py", "torch"},
    ".loopback": {".core", ".transport"},
    ".mpi": {".arrays", ".core", ".transport", "numpy"},
    ".torch": {*INTEGRATION, ".arrays", ".kernels", "torch", "ml_dtypes"},
    ".tensorflow": {*INTEGRATION, "tensorflow", "mpi4py"},
    ".warm_up": {".core", ".kernels", "numpy"},
    ".doctor": {
        *(".carriers", ".core", ".forecast", ".table", ".transport", "numpy"),
        *("torch", "tensorflow", "horovod", "mpi4py", "h5py"),
    },
    ".__main__": {".doctor"},
}
COLLECTIVES = {"mpi4py", "horovod"}

# what walks the frames of callers
FRAMES = {"_getframe", "_current_frames", "currentframe", "f_back", "f_locals"}

# finds out what an object can do, instead of a declaration that says it
SNIFFING = {"hasattr", "getattr", "signature"}

# what tests may ask of others that begins with a line: of named tuples, and of Horovod
KNOWN = {"_replace", "_asdict", "_handles"}
OWN = {  # per test, what it reaches in the module that it is the test of
    "test_adaptive.py": {"_coarse"},
    "test_compiled.py": {"_Files"},
    "test_costs.py": {"_fit"},
    "test_doctor.py": {"_predictions"},
    "test_frame.py": {"_layouts"},
    "test_kernels.py": {"_pool", "_LOCAL_SIZE_VARIABLES"},
    "test_torch_process_group.py": {"_world"},  # where groups meet
}

MOST_LINES = 450  # of a file
MOST_LINES_OF_PATH = 200


class Import(NamedTuple):
    """One module that an import statement names.

    Attributes:
        module: whose source it is in.
        target: the module that it names, or takes a name from.
        at_once: it runs when its module is imported, not in a function later.
        line: of the source.
    """

    module: str
    target: str
    at_once: bool
    line: int

    def __repr__(self) -> str:
        path = SOURCES[self.module].relative_to(PROJECT)
        return f"{path}:{self.line} imports {self.target}"


def statements(tree: ast.AST, at_once: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes, and whether each runs when its module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from ((part, False) for part in ast.walk(node))
            continue
        yield node, at_once
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from statements(node, at_once and not function)


def imports_of(module: str) -> Iterator[Import]:
    path = SOURCES[module]
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node, at_once in statements(ast.parse(path.read_text())):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{base}.{alias.name}" for alias in node.names]
            targets = [name if name in SOURCES else base for name in names]
        for target in targets:
            yield Import(module, target, at_once, node.lineno)


IMPORTS = [found for module in SOURCES for found in imports_of(module)]


def part_of(module: str) -> str:
    """.core of hvd_sparse.core.path, numpy of numpy.typing."""
    root, *rest = module.split(".")
    return "." + "".join(rest[:1]) if root == "hvd_sparse" else root


def within(module: str) -> set[str]:
    """The packages that it is in."""
    parts = module.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def loaded_by(found: Import) -> set[str]:
    """Modules of ours that must be there before: a package before what is in it.

    Not those that the importing module is in itself, which are being loaded.
    """
    targets = {found.target, *within(found.target)} & SOURCES.keys()
    return targets - ({found.module, *within(found.module)} - {found.target})


NEEDS = {
    module: {
        target
        for found in IMPORTS
        if found.module == module and found.at_once
        for target in loaded_by(found)
    }
    for module in SOURCES
}


@pytest.mark.parametrize("part", sorted({part_of(module) for module in SOURCES}))
def test_a_part_imports_what_the_table_allows(part: str) -> None:
    allowed = {part, *MAY_IMPORT.get(part, ()), *sys.stdlib_module_names}
    of_part = [found for found in IMPORTS if part_of(found.module) == part]
    assert [f for f in of_part if part_of(f.target) not in allowed] == []


def test_of_the_kernels_only_those_for_an_accelerator_know_torch() -> None:
    kernels = [found for found in IMPORTS if part_of(found.module) == ".kernels"]
    knowing = {found.module for found in kernels if part_of(found.target) == "torch"}
    assert knowing == {"hvd_sparse.kernels.device"}


def test_of_the_transports_one_file_knows_mpi4py() -> None:
    transports = [found for found in IMPORTS if part_of(found.module) == ".transport"]
    knowing = {
        found.module for found in transports if part_of(found.target) == "mpi4py"
    }
    assert knowing == {"hvd_sparse.transport.mpi.communicator"}


def test_mpi_and_horovod_are_imported_when_they_are_used() -> None:
    collectives = [f for f in IMPORTS if part_of(f.target) in COLLECTIVES]
    assert {part_of(found.target) for found in collectives} == COLLECTIVES
    assert [found for found in collectives if found.at_once] == []


def test_the_package_itself_needs_numpy_and_numba_alone() -> None:
    needed, waiting = set(), ["hvd_sparse"]
    while waiting:
        module = waiting.pop()
        needed.add(module)
        waiting += NEEDS[module] - needed
    assert "hvd_sparse.core.sparsifiers" in needed
    found = {part_of(f.target) for f in IMPORTS if f.at_once and f.module in needed}
    outside = {name for name in found - sys.stdlib_module_names if name[0] != "."}
    assert outside == {"numpy", "numba", "llvmlite"}  # the last comes with numba


def test_no_module_needs_itself() -> None:
    try:
        TopologicalSorter(NEEDS).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_frames_are_walked_in_three_files() -> None:
    """One for TensorFlow, two for PyTorch: whose gradient, and whose scaler."""
    walking = {
        module
        for module, path in SOURCES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in FRAMES
    }
    assert walking == {
        "hvd_sparse.tensorflow.horovod_frames",
        "hvd_sparse.torch.names",
        "hvd_sparse.torch.grad_scaler",
    }


def test_the_core_sniffs_at_nothing() -> None:
    """What may be called is declared in `core/contracts.py`, and asked by `core/roles`.

    Two other files look at objects of any kind: what ranks agree on, and handlers.
    """
    sniffing = {
        module
        for module, path in SOURCES.items()
        if module.startswith("hvd_sparse.core.")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id in SNIFFING
    }
    assert sniffing == {
        "hvd_sparse.core.configuration",
        "hvd_sparse.core.interrupts",
        "hvd_sparse.core.roles",
    }


def test_the_path_knows_no_sparsifier_by_class() -> None:
    kinds = {
        "TopK",
        "RandomK",
        "Threshold",
        "SignTopK",
        "Stochastic",
        "CAT",
        "ExactCAT",
    }
    stages = ("path", "plan", "flight", "outbound", "inbound", "fused", "payload")
    named = {
        (stage, node.id)
        for stage in stages
        for node in ast.walk(ast.parse(SOURCES[f"hvd_sparse.core.{stage}"].read_text()))
        if isinstance(node, ast.Name) and node.id in kinds
    }
    assert named == set()


def test_tests_reach_what_is_private_in_their_own_module_alone() -> None:
    found: dict[str, set[str]] = {}
    for path in Path(__file__).parent.rglob("*.py"):
        names = private_names(ast.parse(path.read_text())) - KNOWN
        if names - OWN.get(path.name, set()):
            found[path.name] = names
    assert found == {}


def private_names(tree: ast.AST) -> set[str]:
    """Attributes of others that begin with one line, and what is imported by name."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            names |= {node.attr} if owner not in ("self", "cls") else set()
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name[0] == "_" and not name.endswith("__")}


def test_path_is_read_in_one_sitting() -> None:
    assert lines(SOURCES["hvd_sparse.core.path"]) <= MOST_LINES_OF_PATH


def test_no_file_grows_beyond_a_size_that_can_be_read() -> None:
    sizes = {module: lines(path) for module, path in SOURCES.items()}
    assert {m: n for m, n in sizes.items() if n > MOST_LINES} == {}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())
