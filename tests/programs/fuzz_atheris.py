"""Damaged frames as coverage guides them; needs atheris: pip install -e '.[fuzz]'.

python tests/programs/fuzz_atheris.py [CORPUS] [-max_total_time=300]

Arguments are those of libFuzzer. It sees which branches of the package are taken; those
of compiled loops, it does not.
"""

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))


def compiled() -> list[str]:
    """Modules that Numba must find as they were written."""
    spec = find_spec("hvd_sparse")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    files = [file.relative_to(package.parent) for file in package.rglob("*.py")]
    names = [".".join(file.with_suffix("").parts) for file in files]
    return [n.removesuffix(".__init__") for n in names if ".kernels." in n]


with atheris.instrument_imports(include=["hvd_sparse"], exclude=compiled()):
    from hostile import cases, decode_hostile


def one(data: bytes) -> None:
    decode_hostile(data)


if __name__ == "__main__":
    warnings.simplefilter("error")
    for case in cases(seed=1, count=5000):  # until all kernels are compiled
        decode_hostile(case)
    atheris.Setup([*sys.argv, "-max_len=120", "-timeout=10", "-rss_limit_mb=2048"], one)
    atheris.Fuzz()
