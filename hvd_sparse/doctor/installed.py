"""What is installed and built, without starting MPI where there is none."""

import platform
from importlib import import_module, metadata, util
from pathlib import Path

PACKAGES = ("numpy", "numba", "torch", "tensorflow", "keras", "horovod", "mpi4py")
ALIASES = {
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
    "hvd_sparse": ("hvd-sparse",),
}
CONTROLLERS = ("MPI", "Gloo")
OPERATIONS = ("NCCL", "DDL", "CCL", "MPI", "Gloo")
MISSING = "not installed"


def versions() -> dict[str, str]:
    """Per package its version, or "not installed"; Python and this package first."""
    found = {package: _version(package) for package in ("hvd_sparse", *PACKAGES)}
    return {"python": platform.python_version(), **found}


def _version(package: str) -> str:
    for name in ALIASES.get(package, (package,)):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return MISSING


def horovod() -> dict[str, bool | list[str]]:
    """What Horovod was built with; {} if there is none.

    Frameworks, "controllers" (by which ranks agree on what comes next) and "operations"
    (which move tensors), as in `horovodrun --check-build`.
    """
    spec = util.find_spec("horovod")
    if spec is None or spec.origin is None:
        return {}
    folder = Path(spec.origin).parent
    facts: dict[str, bool | list[str]] = {
        f: any(folder.glob(f"{f}/mpi_lib*")) for f in ("torch", "tensorflow")
    }
    usable = [f for f, built in facts.items() if built and util.find_spec(f)]
    if usable:
        door = import_module(f"horovod.{usable[0]}")
        for fact, names in (("controllers", CONTROLLERS), ("operations", OPERATIONS)):
            facts[fact] = [n for n in names if getattr(door, f"{n.lower()}_built")()]
    return facts


def mpi() -> dict[str, str]:
    """Vendor and thread level of MPI, which this starts; {} without mpi4py."""
    if util.find_spec("mpi4py") is None:
        return {}
    import_module(
        "hvd_sparse.transport.mpi.communicator"
    )  # tells MPI whether it is alone
    try:
        library = import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:  # mpi4py is there, no library is
        return {"vendor": f"can not be loaded: {str(error).splitlines()[0]}"}
    vendor, version = library.get_vendor()
    levels = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
    level = next(
        name
        for name in levels
        if getattr(library, f"THREAD_{name}") == library.Query_thread()
    )
    return {"vendor": f"{vendor} {'.'.join(map(str, version))}", "threads": level}
