"""What compact entries cost in time, beside torch.add_ on the same gradient.

    OMP_NUM_THREADS=1 python benchmarks/coding.py [--quick]

A rank writes its own entries and sums up those of two ranks, the largest of normal
numbers. Told is how much longer that takes than with raw int32 and float32, as a
multiple of torch.add_: medians of interleaved runs.
"""

import argparse
import statistics
import time

import numpy as np
import resnet50
import torch

import hvd_sparse as sparse
from hvd_sparse.core.formats import Entries
from hvd_sparse.core.indices import RawIndices
from hvd_sparse.core.sparsifiers import elements
from hvd_sparse.core.values import Values
from hvd_sparse.kernels import host

VALUES = (
    sparse.Float32(),
    sparse.Float16(),
    sparse.BFloat16(),
    sparse.Int8(),
    sparse.Int4(),
    sparse.Int2(),
    sparse.Sign(),
)
LIMITS = {0.001: 0.1, 0.01: 0.5}  # of torch.add_, for Float32 with EliasFano
RANKS = 2


class Exchange:
    """The bytes of two ranks' entries, in one format."""

    def __init__(self, form: Entries, n: int, k: int) -> None:
        self.form, self.n, self.out = form, n, np.zeros(n, np.float32)
        self.given, self.bytes = [], []
        for rank in range(RANKS):
            gradient = np.random.default_rng(rank).standard_normal(n, np.float32)
            selected = host.select_top(np.zeros(n, np.float32), gradient, k)
            self.given.append([array.copy() for array in selected[:2]])
            self.bytes.append(np.zeros(form.bytes(k, "float32", n) + 8, np.uint8))
        self.k = k

    def __call__(self) -> None:
        """Encode one, decode and sum up both; the result replaces a gradient."""
        coded = []
        for rank, data in enumerate(self.bytes):
            if rank == 0:
                self.form.write(data, *self.given[0], self.n)
            coded.append(self.form.coded(data, self.k, "float32", self.n))
        host.aggregate_coded(self.out, coded, 0.5, cleared=True)

    def prepare(self) -> None:
        """The other rank's bytes do not change."""
        self.form.write(self.bytes[1], *self.given[1], self.n)


def interleaved(runs: dict[object, object], rounds: int) -> dict[object, float]:
    """Seconds, median, of each."""
    times: dict[object, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(each) for name, each in times.items()}


def measure(density: float, n: int, rounds: int) -> None:
    """Print a table of one density."""
    k = elements(density, n)
    total, added = torch.zeros(n), torch.ones(n)
    runs: dict[object, object] = {"add_": lambda: total.add_(added)}
    raw = Entries(sparse.Float32(), RawIndices())
    for form in (raw, *map(Entries, VALUES)):
        runs[form] = Exchange(form, n, k)
        runs[form].prepare()
        runs[form]()
    seconds = interleaved(runs, rounds)
    unit = seconds["add_"]
    print(f"\n{n:,} elements at {density:.1%}; torch.add_ takes {1e3 * unit:.1f} ms")
    print(f"{'format':24}{'bytes an entry':>16}{'ms':>8}{'more, x add_':>14}")
    for form in (raw, *map(Entries, VALUES)):
        size = form.bytes(k, "float32", n) / k
        more = (seconds[form] - seconds[raw]) / unit
        name = told(form.values, form)
        print(f"{name:24}{size:16.2f}{1e3 * seconds[form]:8.2f}{more:14.3f}")


def told(values: Values, form: Entries) -> str:
    """Its short name."""
    return f"{type(values).__name__}, {type(form.indices).__name__}"


def main() -> None:
    """Both densities."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the elements")
    arguments = parser.parse_args()
    n = resnet50.ELEMENTS // (10 if arguments.quick else 1)
    for density in LIMITS:
        measure(density, n, 7 if arguments.quick else 21)


if __name__ == "__main__":
    main()
