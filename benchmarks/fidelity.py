"""Does sparse training end where dense training ends?

mpirun -np 2 python benchmarks/fidelity.py [--json FILE] [--quick]

Trains the two examples on the ranks it is given: the language model, the digits with
five seeds; dense, at density 1 % and at 0.1 %. Learning rates are tuned for dense only:
``--tune`` runs the grids below and prints what dense makes of them. Exits with 1 when a
gap is larger than its limit.

Two more optimizers of the language model are measured without a limit. In the same
steps they take dense further than SGD with momentum 0.5, and leave a larger gap:
momentum raises the learning rate at which dense training is stable, but not the one at
which gradients that come late are.
"""

import sys
from pathlib import Path

# The examples take the place of this folder, whose select.py would hide Python's own.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, replace

import torch
import torch_digits as digits
import torch_language_model as language
from mpi4py import MPI

import hvd_sparse

# name, sparsifier (None: stock dense), how much worse than dense the language model's
# loss may be with SGD, and how far from dense the digits' accuracy may be.
COLUMNS = (
    ("dense", None, 0.0, 0.0),
    ("1 %", hvd_sparse.TopK(density=0.01), 0.02, 0.005),
    ("0.1 %", hvd_sparse.TopK(density=0.001), 0.08, 0.005),
)
SEEDS = range(5)

# Learning rates for --tune, and what dense made of them on 2 ranks: validation loss,
# for the digits the mean accuracy. The best ones are used here and by the examples.
SGD_GRID = (0.125, 0.25, 0.35, 0.5, 0.7, 1.0)
# 2.4179, 2.3526, 2.3008, 2.2157, 2.4463, diverges
MOMENTUM_GRID = (0.125, 0.25, 0.5)  # 2.1876, 1.9799, diverges
ADAM_GRID = (0.001, 0.002, 0.004, 0.008)  # 1.9712, 1.7539, 1.6268, 1.6527
DIGITS_GRID = (0.1, 0.2, 0.4, 0.8)  # 98.20 %, 98.36 %, 98.43 %, diverges

SGD = language.Settings()
MOMENTUM = replace(SGD, lr=0.25, momentum=0.9)
ADAM = replace(SGD, lr=0.004)


@dataclass(frozen=True)
class Row:
    """One model and optimizer trained in one column; ``gap`` is against dense."""

    model: str
    column: str
    value: float
    gap: float
    limit: float | None
    compression_ratio: float
    seconds_per_step: float

    @property
    def fails(self) -> bool:
        """Whether the gap is larger than its limit."""
        return self.limit is not None and not self.gap <= self.limit


def adam(parameters, settings: language.Settings) -> torch.optim.Adam:
    """The optimizer whose gap is measured beside that of SGD."""
    return torch.optim.Adam(parameters, lr=settings.lr)


def language_loss(text, sparsifier, comm, settings, build=language.sgd):
    """Validation loss, traffic and seconds per step of one training."""
    training, validation = text
    model, traffic, seconds = language.train(
        training, sparsifier, comm, settings, build=build
    )
    return language.evaluate(model, validation, comm), traffic, seconds


def digits_accuracy(splits, sparsifier, comm, settings, seeds=SEEDS):
    """Mean test accuracy over seeds; traffic and seconds per step of the last."""
    accuracies = []
    for seed in seeds:
        model, traffic, seconds = digits.train(
            splits[0], sparsifier, comm, replace(settings, seed=seed)
        )
        accuracies.append(digits.accuracy(model, splits[1]))
    return statistics.mean(accuracies), traffic, seconds


def optimizers():
    """Name, settings, constructor, grid and whether there is a limit, for each."""
    return (
        ("LM, SGD, momentum 0.5", SGD, language.sgd, SGD_GRID, True),
        ("LM, SGD, momentum 0.9", MOMENTUM, language.sgd, MOMENTUM_GRID, False),
        ("LM, Adam", ADAM, adam, ADAM_GRID, False),
    )


def measure(comm, quick, report):
    """All rows, each handed to ``report`` when it is known."""
    splits = digits.read_digits()
    settings = replace(digits.Settings(), steps=50) if quick else digits.Settings()
    base = None
    for column, sparsifier, _, limit in COLUMNS:
        accuracy, traffic, seconds = digits_accuracy(
            splits, sparsifier, comm, settings, SEEDS[:2] if quick else SEEDS
        )
        base = accuracy if base is None else base
        ratio = traffic.compression_ratio
        limit = None if quick else limit
        gap = base - accuracy
        report(Row("digits, SGD", column, accuracy, gap, limit, ratio, seconds))

    text = language.read_text()
    for name, settings, build, _, limited in optimizers():
        if quick:
            settings = replace(settings, steps=50)
        base = None
        for column, sparsifier, limit, _ in COLUMNS:
            loss, traffic, seconds = language_loss(
                text, sparsifier, comm, settings, build
            )
            base = loss if base is None else base
            ratio = traffic.compression_ratio
            limit = limit if limited and not quick else None
            report(Row(name, column, loss, loss / base - 1, limit, ratio, seconds))


def tune(comm, report):
    """What dense makes of each learning rate in the grids."""
    text, splits = language.read_text(), digits.read_digits()
    for lr in DIGITS_GRID:
        settings = replace(digits.Settings(), lr=lr)
        report(
            f"digits, SGD: lr {lr}", digits_accuracy(splits, None, comm, settings)[0]
        )
    for name, settings, build, grid, _ in optimizers():
        for lr in grid:
            changed = replace(settings, lr=lr)
            loss = language_loss(text, None, comm, changed, build)[0]
            report(f"{name}: lr {lr}", loss)


def main() -> None:
    """Measure, or tune, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--quick", action="store_true", help="few steps, no limits")
    parser.add_argument("--tune", action="store_true", help="dense, over the grids")
    args = parser.parse_args()
    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)
    root = comm.rank == 0

    def say(line: str) -> None:
        if root:
            print(line, flush=True)

    if args.tune:
        tune(comm, lambda name, value: say(f"{name:<32} {value:.4f}"))
        return

    rows: list[Row] = []

    def report(row: Row) -> None:
        rows.append(row)
        limit = "" if row.limit is None else f"{row.limit:7.1%}"
        say(
            f"{row.model:<21} {row.column:<6} {row.value:8.4f} {row.gap:+7.1%} "
            f"{limit:>7} {row.compression_ratio:7.1f} {row.seconds_per_step:9.4f}"
            + ("  FAILS" if row.fails else "")
        )

    say(f"{'':<29} {'value':>7} {'gap':>7} {'limit':>7} {'ratio':>7} {'s / step':>9}")
    measure(comm, args.quick, report)
    if args.json and root:
        finite = [
            {k: None if v != v else v for k, v in asdict(row).items()} for row in rows
        ]  # JSON has no nan
        document = {"ranks": comm.size, "rows": finite}
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    sys.exit(any(row.fails for row in rows))


if __name__ == "__main__":
    main()
