"""How many bytes to the same loss: GD, fixed sizes, Alistarh's rule, and CAT.

python examples/cat_logistic_regression.py --problem P-A --json FILE --plot FILE

The experiments of Khirirat et al., 2020 (arXiv:2003.06377): logistic regression, full
gradients, steps of 1 / L (for draws omega / L); workers share the data. One worker
keeps no residual. Several do, except of draws, or their loss would stall (--no-residual
shows it). A worker's cost is counted twice: with the idealised bits of the paper, and
with the bytes that hvd_sparse really sends (wire), float32 values in both. CAT chooses
from all sizes here, as in the paper: ExactCAT.

Rows of the JSON: problem, cost, method, elements (a fixed size), workers; bytes (the
cost, in bytes, until the loss is reached) and iterations, null where it is not reached;
wire_bytes and wire_iterations; mean_elements.
"""

import argparse
import ast
import json
import math
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg

from hvd_sparse import (
    Affine,
    ExactCAT,
    Packet,
    PaperPayload,
    Payload,
    SignTopK,
    Stochastic,
    TopK,
)
from hvd_sparse.core.costs import Message
from hvd_sparse.core.formats import Entries
from hvd_sparse.core.levels import Levels
from hvd_sparse.core.payload import Header, encode
from hvd_sparse.core.sparsifiers import elements, format_of
from hvd_sparse.core.values import Float32, Sign

FORMATS = {"paper": PaperPayload(value_bits=32), "wire": Payload()}
COSTS = {  # bytes; the headers of UDP over Ethernet, the packets of the paper
    "payload": lambda format: format,
    "affine": lambda format: Affine(1.0, 54.0, format),
    "packet": lambda format: Packet(576, 64, 512, format),
}
SCHEMES = {"cat-s": TopK(), "cat-s+q": SignTopK(), "cat-stochastic": Stochastic()}
FIXED = (1, 10, 30, 100, 300, 1000, 3000, 10_000)
MOST = 0.1  # no choice comes near it, and less is sorted


# ------------------------------------------------------------------------ the problems


class Problem(NamedTuple):
    """F(x) = mean log(1 + exp(-b a.x)), from 0.

    Attributes:
        rows: (m, d) sparse; a row is an example.
        labels: (m,) 1 or -1.
        lipschitz: L, the largest eigenvalue of rows' rows / (4 m).
        target: the loss to reach; at 0 it is log 2.
    """

    rows: Any
    labels: np.ndarray
    lipschitz: float
    target: float = 0.5 * math.log(2)

    def loss(self, x: np.ndarray) -> float:
        """F."""
        return float(np.logaddexp(0, -self.labels * (self.rows @ x)).mean())

    def gradient(self, x: np.ndarray) -> np.ndarray:
        """F's, (d,) float64."""
        margin = self.labels * (self.rows @ x)
        return self.rows.T @ (-self.labels / (1 + np.exp(margin))) / len(self.labels)


def problem(rows: Any, labels: np.ndarray) -> Problem:
    start = np.ones(min(rows.shape))  # the default is drawn from numpy's generator
    largest = scipy.sparse.linalg.svds(rows, k=1, v0=start, return_singular_vectors=0)
    return Problem(rows, labels, float(largest[0]) ** 2 / (4 * len(labels)))


def power_law(power: float, d: int = 50_000, m: int = 1000, nnz: int = 80) -> Problem:
    """m examples of nnz features, whose popularity falls as 1 / rank^power."""
    rng = np.random.default_rng(0)
    popularity = 1.0 / np.arange(1, d + 1) ** power
    popularity /= popularity.sum()
    columns = [rng.choice(d, nnz, replace=False, p=popularity) for _ in range(m)]
    values = rng.standard_normal((m, nnz)) / math.sqrt(nnz)
    places = (np.repeat(np.arange(m), nnz), np.concatenate(columns))
    rows = sp.csr_matrix((values.ravel(), places), shape=(m, d))
    noise_free = rows @ rng.standard_normal(d)
    return problem(
        rows, np.where(noise_free + 0.1 * rng.standard_normal(m) >= 0, 1.0, -1.0)
    )


def functions() -> Iterator[tuple[str, float]]:
    """Every function of Python's standard library, 1 where it has a docstring."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "lib2to3"}
    for file in sorted(root.rglob("*.py")):
        if skipped & {*file.parts}:
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                documented = ast.get_docstring(node) is not None
                node.body = node.body[documented:] or [ast.Pass()]
                yield ast.unparse(node), 1.0 if documented else -1.0


def text(m: int = 4000) -> Problem:
    """Has a function a docstring? From the words of its source without it.

    Bag of words of m functions of Python's standard library, half of either kind;
    log(1 + count), rows of norm 1.
    """
    kinds: dict[float, list[str]] = {1.0: [], -1.0: []}
    for source, label in functions():
        kinds[label].append(source)
    draw = random.Random(0)
    sample = [
        (s, k) for k, all_of in kinds.items() for s in draw.sample(all_of, m // 2)
    ]
    draw.shuffle(sample)  # workers take turns
    bags = [Counter(re.findall(r"[A-Za-z_]\w*", source)) for source, _ in sample]
    place = {word: i for i, word in enumerate(sorted(set().union(*bags)))}
    rows = sp.lil_matrix((m, len(place)))
    for row, bag in enumerate(bags):
        counts = np.log1p(list(bag.values()))
        rows[row, [place[word] for word in bag]] = counts / np.linalg.norm(counts)
    labels = np.array([label for _, label in sample])
    # real text is harder: half the loss takes gradient descent a thousand steps
    return problem(rows.tocsr(), labels)._replace(target=0.8 * math.log(2))


PROBLEMS = {"P-A": lambda: power_law(1.1), "P-B": lambda: power_law(0.7), "text": text}


# --------------------------------------------------------------------------- a worker


class Sent(NamedTuple):
    """What a worker sends in a step; the step size is gain / L."""

    indices: np.ndarray
    values: np.ndarray
    size: int
    gain: float = 1.0


def send(
    sparsifier: Any, residual: np.ndarray, gradient: np.ndarray, step: int
) -> Sent:
    """Select and encode; overwrites the residual with what is not sent."""
    d = gradient.size
    cat = isinstance(sparsifier, ExactCAT)
    if isinstance(sparsifier.scheme if cat else sparsifier, Stochastic):
        return draw(sparsifier, gradient, step)
    density = getattr(sparsifier, "density", None)
    k = d if density is None else elements(density, d)
    selection = sparsifier.select(residual, gradient, k, step)
    header = Header(format_of(sparsifier), str(gradient.dtype), d, k, step, 0)
    _, values = encode(selection, header)
    residual[selection.indices] += selection.values - values
    return Sent(selection.indices, values, selection.indices.size)


def draw(cat: Any, gradient: np.ndarray, step: int) -> Sent:
    """As Stochastic does; with omega = |g|^2 / E|Q(g)|^2 for the size of the step."""
    nothing, d = np.zeros_like(gradient), gradient.size
    magnitudes = np.abs(gradient[gradient != 0]).astype(np.float64)
    levels = Levels.of_sorted(np.sort(magnitudes)[::-1])
    size = cat.after(0).best(levels, nothing, d)
    relative = np.sum(gradient**2, dtype=np.float64) / levels.magnitudes[0] ** 2
    gain = relative * cat.scheme.descent(levels, np.array([size]))[0]
    drawn = cat.scheme.draw(nothing, gradient, levels.rate(size), d, step)
    return Sent(drawn.indices, drawn.values, drawn.indices.size, float(gain))


# ------------------------------------------------------------------------------ a run


@dataclass
class Run:
    """One method on its way.

    Attributes:
        target: the loss to reach.
        losses: after each step, the first before any.
        sizes: (steps, workers) elements sent.
    """

    target: float
    losses: list[float]
    sizes: list[list[int]]

    def spent(self, cost: Any, message: Message) -> np.ndarray:
        """What a worker spent until each loss."""
        sizes = np.array(self.sizes, np.int64).reshape(len(self.sizes), -1)
        each = cost.of(sizes.ravel(), message).reshape(sizes.shape).mean(axis=1)
        return np.concatenate(([0.0], np.cumsum(each)))

    @property
    def arrived(self) -> bool:
        """Whether the loss was reached."""
        return self.losses[-1] <= self.target


def train(
    whole: Problem,
    sparsifier: Any,
    workers: int,
    dtype: str,
    limit: int,
    keep: bool = False,
) -> Run:
    """Steps to the target, limit at most; sparsifier None is gradient descent."""
    shares = [
        Problem(whole.rows[w::workers], whole.labels[w::workers], whole.lipschitz)
        for w in range(workers)
    ]
    own = [
        sparsifier.for_rank(worker) if hasattr(sparsifier, "for_rank") else sparsifier
        for worker in range(workers)
    ]
    residuals = [np.zeros(whole.rows.shape[1], dtype) for _ in range(workers)]
    x = np.zeros(whole.rows.shape[1])
    run = Run(whole.target, [whole.loss(x)], [])
    for step in range(limit):
        if run.arrived:
            break
        gradients = [share.gradient(x) for share in shares]
        if sparsifier is None:
            x -= np.mean(gradients, axis=0) / whole.lipschitz
            run.sizes.append([x.size] * workers)
        else:
            sent = [
                send(s, r if keep else np.zeros_like(r), g.astype(dtype), step)
                for s, r, g in zip(own, residuals, gradients, strict=True)
            ]
            gain = min(s.gain for s in sent) / (whole.lipschitz * workers)
            for part in sent:
                x[part.indices] -= gain * part.values
            run.sizes.append([part.size for part in sent])
        run.losses.append(whole.loss(x))
    return run


@dataclass(frozen=True)
class Dense:
    """The bytes of a whole gradient, float32, without a header."""

    def bytes(self, sizes: np.ndarray, message: Message) -> np.ndarray:
        """Of so many elements."""
        return 4.0 * sizes

    of = bytes


def runs(
    whole: Problem, workers: int, limit: int, keep: bool
) -> Iterator[tuple[dict, np.ndarray]]:
    """Rows of the table, each with its losses and what was spent until each."""
    d = whole.rows.shape[1]
    fixed = {
        ("gd", d): (None, Entries(Float32())),
        **{
            ("fixed", t): (TopK(density=t / d), Entries(Float32()))
            for t in FIXED
            if t < d
        },
        ("alistarh", None): (SignTopK.alistarh(), Entries(Sign())),
    }
    for (method, size), (sparsifier, form) in fixed.items():
        run = train(whole, sparsifier, workers, "float64", limit, keep)
        for cost in COSTS:
            spent = {}
            for name, format in FORMATS.items():
                price = COSTS[cost](Dense() if method == "gd" else format)
                spent[name] = run, run.spent(price, Message(form, "float32", d))
            yield row(method, cost, workers, spent, size)
    for method, scheme in SCHEMES.items():
        for cost, priced in COSTS.items():
            spent = {}
            for name, format in FORMATS.items():
                # the wire's values are as wide as the gradient is
                dtype = {"paper": "float64", "wire": "float32"}[name]
                cat = ExactCAT(scheme, priced(format), most=MOST)
                run = train(whole, cat, workers, dtype, limit, keep)
                message = Message(cat.counted, "float32", d)
                spent[name] = run, run.spent(priced(format), message)
            yield row(method, cost, workers, spent, None)


def row(
    method: str, cost: str, workers: int, spent: dict, size: int | None
) -> tuple[dict, np.ndarray]:
    """Numbers are None where the loss was not reached."""
    (paper, bytes_), (wire, wire_bytes) = spent["paper"], spent["wire"]
    told = {
        "cost": cost,
        "method": method,
        "elements": size,
        "workers": workers,
        "bytes": float(bytes_[-1]) if paper.arrived else None,
        "iterations": len(paper.sizes) if paper.arrived else None,
        "wire_bytes": float(wire_bytes[-1]) if wire.arrived else None,
        "wire_iterations": len(wire.sizes) if wire.arrived else None,
        "mean_elements": float(np.mean(paper.sizes)),
    }
    return told, np.array([bytes_, paper.losses])


# ------------------------------------------------------------------------- the report


def best_fixed(rows: list[dict], place: dict) -> float:
    """Bytes of the best fixed size under the same cost."""
    alike = [r["bytes"] for r in rows if r["method"] == "fixed"
             and (r["cost"], r["workers"]) == (place["cost"], place["workers"])
             and r["bytes"]]  # fmt: skip
    return min(alike, default=math.nan)


def report(rows: list[dict]) -> None:
    print(f"{'workers cost':16} {'method':15} {'T':>7} {'bytes':>14} {'GD / it':>8} "
          f"{'it / best fixed':>15} {'iterations':>10} {'wire bytes':>14}")  # fmt: skip
    for line in rows:
        gd = next(
            r["bytes"]
            for r in rows
            if (r["method"], r["cost"], r["workers"])
            == ("gd", line["cost"], line["workers"])
        )
        size = line["elements"] or f"~{line['mean_elements']:.0f}"
        told = f"{line['workers']:7} {line['cost']:8} {line['method']:15} {size:>7} "
        if line["bytes"] is None:
            print(f"{told} not reached in the steps allowed")
            continue
        wire = f"{line['wire_bytes']:,.0f}" if line["wire_bytes"] else "-"
        print(f"{told} {line['bytes']:14,.0f} {gd / line['bytes']:8.1f} "
              f"{line['bytes'] / best_fixed(rows, line):15.2f} "
              f"{line['iterations']:10} {wire:>14}")  # fmt: skip


def plot(file: str, name: str, curves: list[tuple[dict, np.ndarray]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    counts = sorted({line["workers"] for line, _ in curves})
    figure, axes = plt.subplots(
        len(counts), 3, figsize=(13, 3.6 * len(counts)), squeeze=False, sharey=True
    )
    for line, (spent, losses) in curves:
        axis = axes[counts.index(line["workers"])][[*COSTS].index(line["cost"])]
        style = {"color": "0.8", "lw": 1} if line["method"] == "fixed" else {"lw": 1.8}
        label = "fixed T" if line["elements"] == 1 else line["method"]
        label = None if line["method"] == "fixed" and line["elements"] != 1 else label
        axis.semilogx(spent[1:], losses[1:], label=label, **style)
        axis.set_title(f"{line['cost']}, {line['workers']} worker(s)", fontsize=10)
        axis.set_xlabel("bytes of a worker")
    axes[0][0].set_ylabel(f"loss, {name}")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=80, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", choices=PROBLEMS, default="text")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    parser.add_argument("--plot", metavar="FILE", help="losses over bytes, a PNG")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--no-residual", action="store_true", help="as one worker")
    parser.add_argument("--limit", type=int, default=6000, help="steps of a run")
    args = parser.parse_args()

    whole = PROBLEMS[args.problem]()
    m, d = whole.rows.shape
    print(
        f"{args.problem}: {m} examples, {d} features, to a loss of {whole.target:.4f}"
    )
    curves = []
    for workers in args.workers:
        keep = workers > 1 and not args.no_residual
        curves += runs(whole, workers, args.limit, keep)
    rows = [{"problem": args.problem, **line} for line, _ in curves]
    report(rows)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot:
        plot(args.plot, args.problem, curves)


if __name__ == "__main__":
    main()
