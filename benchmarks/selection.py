"""What selecting costs, as a multiple of torch.add_ on the same tensor in the same run.

    python benchmarks/selection.py             # everything, about 4 minutes
    python benchmarks/selection.py --quick     # a tenth of the elements: a check
    python benchmarks/selection.py --cat       # CAT alone, against TopK of as many
    python benchmarks/selection.py --json FILE

Every figure is a median over steps in which ours and torch.add_ take turns, on steady
residuals: under error feedback magnitudes pile up just below the threshold, which fresh
noise does not show. One thread unless a row says otherwise. The portable rows run in a
process that is told the processor is a plain x86-64 (SSE2).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

os.environ.setdefault("OMPI_MCA_ess_singleton_isolated", "1")
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import resnet50
import torch
from mpi4py import MPI

from hvd_sparse import CAT, Affine, Never, SignTopK, Stochastic, TopK
from hvd_sparse.core.costs import Message
from hvd_sparse.core.sparsifiers import elements
from hvd_sparse.kernels import host
from hvd_sparse.kernels.host.estimate import estimate_bound
from hvd_sparse.mpi import SparseAllreduce

POOL = 6  # gradients that take turns


def main():
    arguments = parse()
    n = resnet50.ELEMENTS // (10 if arguments.quick else 1)
    rows = []
    if arguments.cat:
        rows += adaptive(n)
    elif arguments.portable:
        for density in (0.001, 0.01):
            rows.append(selection("portable", "normal", n, density))
    else:
        for density in (0.001, 0.01):
            for kind in INPUTS:
                rows.append(selection("native", kind, n, density))
        rows += portable(arguments.quick)
        rows += threads(n)
        rows.append(whole_path(n))
        rows.append(many_tensors())
        rows += adaptive(n)
        if not arguments.quick:
            rows += published(n)
    report(rows, arguments)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer elements")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    parser.add_argument("--cat", action="store_true", help="CAT's rows alone")
    parser.add_argument("--portable", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


# -------------------------------------------------------------------------- inputs


def normal(rng, n):
    return rng.standard_normal(n, dtype=np.float32)


def laplace(rng, n):
    return (rng.standard_exponential(n, dtype=np.float32)) * np.sign(normal(rng, n))


def layers(rng, n):
    """100 layers of equal size whose scales are lognormal (sigma 2)."""
    scales = np.random.default_rng(1).lognormal(sigma=2.0, size=100)
    return normal(rng, n) * np.repeat(scales, -(-n // 100))[:n].astype(np.float32)


INPUTS = {"normal": normal, "laplace": laplace, "100 layers": layers}


def pool(kind, n):
    rng = np.random.default_rng(0)
    return [INPUTS[kind](rng, n) for _ in range(POOL)]


# --------------------------------------------------------------------- measurements


def misses(residual, gradient, k):
    """Whether the estimate that select_top is about to make is too high."""
    bound = estimate_bound(residual, gradient, 1, k, 1)
    return int(np.count_nonzero(np.abs(residual + gradient) >= bound) < k)


class Floor:
    """torch.add_ on tensors of its own, to take turns with what is measured."""

    def __init__(self, n):
        torch.set_num_threads(1)
        self.total, self.gradient = torch.zeros(n), torch.ones(n)

    def interleaved(self, ours, steps, prepare=lambda step: None):
        """Seconds of each step of ours and of torch.add_, in turns."""
        times, floor = [], []
        for step in range(steps):
            prepare(step)
            start = time.perf_counter()
            ours(step)
            middle = time.perf_counter()
            self.total.add_(self.gradient)
            times.append(middle - start)
            floor.append(time.perf_counter() - middle)
        return times, floor


def row(what, detail, density, times, floor, target, **more):
    add = statistics.median(floor)
    mid = statistics.median(times)
    return {
        "what": what,
        "detail": detail,
        "density": density,
        "ratio": mid / add,
        "target": target,
        "slowest_over_median": max(times) / mid,
        "add_ms": add * 1e3,
        **more,
    }


def settle(residual, gradients, k, density):
    """Reach the steady state: about 1 / density steps, 300 at the most."""
    for step in range(min(300, round(1 / density))):
        host.select_top(residual, gradients[step % POOL], k)


def selection(path, kind, n, density, steps=40):
    gradients, k = pool(kind, n), elements(density, n)
    residual = np.zeros(n, np.float32)
    settle(residual, gradients, k, density)

    def select(step):
        host.select_top(residual, gradients[step % POOL], k)

    times, floor = Floor(n).interleaved(select, steps)
    missed = 0
    for step in range(steps):  # not timed: this reads everything once more
        missed += misses(residual, gradients[step % POOL], k)
        select(step)
    target = {
        ("native", 0.001): 1.5,
        ("native", 0.01): 2.2,
        ("portable", 0.001): 2.5,
        ("portable", 0.01): 3.5,
    }[path, density]
    what = f"accumulate + TopK + residual, {path}"
    return row(what, kind, density, times, floor, target, missed=missed)


def adaptive(n):
    """CAT against TopK of the density that it chose."""
    gradients, rows = pool("normal", n), []
    for scheme in (TopK(), SignTopK(), Stochastic()):
        for per_message in (54, 1e5, 2e6):
            cat = CAT(scheme, Affine(1.0, per_message))
            detail = f"{type(scheme).__name__}, {per_message:g} bytes"
            rows.append(choice(cat, detail, gradients))
    return rows


def choice(cat, detail, gradients, steps=30):
    """In turns, each its residual; the first half of the steps is to settle.

    With what share of the exact maximum of its efficiency CAT's choice is, but for
    draws: what is chosen there is an expected number.
    """
    n, chosen, times, floor = gradients[0].size, 0, [], []
    ours, fixed = np.zeros(n, np.float32), np.zeros(n, np.float32)
    for step in range(2 * steps):
        gradient = gradients[step % POOL]
        start = time.perf_counter()
        chosen = cat.after(chosen).select(ours, gradient, n, step).indices.size
        middle = time.perf_counter()
        host.select_top(fixed, gradient, chosen)
        times.append(middle - start)
        floor.append(time.perf_counter() - middle)
    more = {}
    if not isinstance(cat.scheme, Stochastic):
        more["efficiency"] = efficiency(cat, ours, gradients[0], chosen)
    taken = [part[steps:] for part in (times, floor)]
    return row("CAT over TopK of as many", detail, chosen / n, *taken, 2.0, **more)


def efficiency(cat, residual, gradient, chosen):
    """That of the next choice, as a share of the best of all sizes, by a sort."""
    total = residual + gradient
    chosen = cat.after(chosen).select(residual.copy(), gradient, total.size, 0)
    largest = np.sort(np.abs(total))[::-1].astype(np.float64)
    sizes = np.arange(1, total.size + 1)
    if isinstance(cat.scheme, SignTopK):
        descent = np.cumsum(largest) ** 2 / sizes
    else:
        descent = np.cumsum(largest**2)
    message = Message(cat.counted, "float32", total.size)
    descent /= cat.cost.of(sizes, message)
    return float(descent[chosen.indices.size - 1] / descent.max())


def portable(quick):
    """The same in a process whose compiler knows nothing beyond SSE2."""
    environment = {**os.environ, "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    command = [sys.executable, __file__, "--portable", "--json", "/dev/stdout"]
    command += ["--quick"] if quick else []
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])["rows"]


def threads(n, density=0.001):
    """Two threads against one, in turns; the bits must be the same."""
    gradients, k = pool("normal", n), elements(density, n)
    residuals = {1: np.zeros(n, np.float32), 2: np.zeros(n, np.float32)}
    times = {1: [], 2: []}
    for step in range(60):
        found = {}
        for count in (1, 2):
            os.environ["OMP_NUM_THREADS"] = str(count)
            start = time.perf_counter()
            found[count] = host.select_top(residuals[count], gradients[step % POOL], k)
            times[count].append(time.perf_counter() - start)
        for one, two in zip(found[1][:2], found[2][:2], strict=True):
            assert one.tobytes() == two.tobytes()
    os.environ["OMP_NUM_THREADS"] = "1"
    assert residuals[1].tobytes() == residuals[2].tobytes()
    what = "two threads over one thread, same bits"
    return [row(what, "normal", density, times[2][20:], times[1][20:], 1.0)]


def whole_path(n, density=0.001, steps=40):
    gradients, out = pool("normal", n), np.empty(n, np.float32)
    with SparseAllreduce(TopK(density), comm=MPI.COMM_SELF, dense=Never()) as reduce:

        def step_of(step):
            reduce.allreduce("gradient", gradients[step % POOL], out=out)

        for step in range(300):
            step_of(step)
        # the caller's own use of out in between: nothing of it may be left over
        times, floor = Floor(n).interleaved(step_of, steps, prepare=out.fill)
        assert np.count_nonzero(out) <= elements(density, n)
    return row("whole path, one allreduce", "normal", density, times, floor, 2.5)


def many_tensors(density=0.001, steps=40):
    shapes = resnet50.shapes()
    rng = np.random.default_rng(0)
    gradients = [
        {
            f"{i:03}": normal(rng, int(np.prod(s))).reshape(s)
            for i, s in enumerate(shapes)
        }
        for _ in range(POOL)
    ]
    out = {name: np.empty_like(array) for name, array in gradients[0].items()}
    with SparseAllreduce(TopK(density), comm=MPI.COMM_SELF, dense=Never()) as reduce:

        def step_of(step):
            reduce.grouped_allreduce(gradients[step % POOL], out)

        for step in range(300):
            step_of(step)
        times, floor = Floor(resnet50.ELEMENTS).interleaved(step_of, steps)
    detail = f"{len(shapes)} tensors of ResNet-50"
    return row("whole path, grouped_allreduce", detail, density, times, floor, 3.0)


def published(n, density=0.001, steps=7):
    """How others select, each with its own residual update; no target."""
    k = elements(density, n)
    gradients = [torch.from_numpy(g) for g in pool("normal", n)]
    residual = torch.zeros(n)

    def torch_topk(step):
        residual.add_(gradients[step % POOL])
        _, indices = torch.topk(residual.abs(), k, sorted=False)
        values = residual[indices]
        residual[indices] = 0
        return indices, values

    array = np.zeros(n, np.float32)

    def argpartition(step):
        np.add(array, gradients[step % POOL].numpy(), out=array)
        indices = np.argpartition(np.abs(array), n - k)[n - k :]
        values = array[indices]
        array[indices] = 0
        return indices, values

    rows = []
    for name, function in (("torch.topk", torch_topk), ("argpartition", argpartition)):
        times, floor = Floor(n).interleaved(function, steps)
        rows.append(row(f"{name} + residual", "normal", density, times, floor, None))
    return rows


# --------------------------------------------------------------------------- report


def machine():
    with open("/proc/cpuinfo") as file:
        lines = [line.split(":")[1].strip() for line in file if "model name" in line]
    return f"{lines[0] if lines else platform.machine()}, {os.cpu_count()} cores"


def report(rows, arguments):
    if arguments.json != "/dev/stdout":
        print(f"{machine()}; ratio: times torch.add_, medians of steps in turns")
        for line in rows:
            target = f"<= {line['target']}" if line["target"] else ""
            density = f"{line['density']:.1%}"
            missed = f"  missed {line['missed']}" if "missed" in line else ""
            if "efficiency" in line:
                missed = f"  of the best efficiency {line['efficiency']:.1%}"
            print(
                f"{line['what']:42} {line['detail']:24} {density:>5} "
                f"{line['ratio']:6.2f} {target:7} slowest/median "
                f"{line['slowest_over_median']:.2f}{missed}"
            )
    if arguments.json:
        with open(arguments.json, "w") as file:
            file.write(json.dumps({"machine": machine(), "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
