"""Does sparse training end where dense training ends?

mpirun -np 2 python benchmarks/fidelity.py [--json FILE] [--quick] [--formats]

Trains the language model with five optimizers and the digits, on the ranks it is given,
with several seeds: dense; alone, which is one rank's share of each batch and no
communication at all; TopK and SignTopK at density 1 %; TopK at 0.1 %. A method that
does not end better than "alone" is worth nothing.

Two gaps are shown: against dense training with the same optimizer, and against the best
dense row of its family, with the standard error over seeds. Learning rates are tuned
for dense only: ``--tune`` runs the grids below. Rows that are in FILE already are not
trained again. Exits with 1 when a gap is larger than its limit.

``--formats`` trains the language model with Adam without beta1 alone, at 1 % and 0.1 %,
in each format of values; the first gap is then to Float32 at the same density, and
halves may end worse by no more than twice the standard error of both.
"""

import sys
from pathlib import Path

# what is trained is in the examples
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch_digits as digits
import torch_language_model as language
from mpi4py import MPI

import hvd_sparse

ALONE = "alone"


class Column(NamedTuple):
    """A way to exchange.

    Attributes:
        sparsifier: None for dense, and for no exchange at all.
        values: how they travel.
        against: the column that the first gap is to.
    """

    sparsifier: hvd_sparse.Sparsifier | None = None
    values: object = None
    against: str = "dense"


COLUMNS = {
    "dense": Column(),
    ALONE: Column(),
    "1 %": Column(hvd_sparse.TopK(density=0.01)),
    "1 % signs": Column(hvd_sparse.SignTopK(density=0.01)),
    "0.1 %": Column(hvd_sparse.TopK(density=0.001)),
}
VALUES = (
    hvd_sparse.Float32(),
    hvd_sparse.Float16(),
    hvd_sparse.BFloat16(),
    hvd_sparse.Int8(),
    hvd_sparse.Int4(),
    hvd_sparse.Int2(),
    hvd_sparse.Sign(),
)
FORMATS = {
    "dense": Column(),
    ALONE: Column(),
    **{
        f"{density:.1%} {type(values).__name__}": Column(
            hvd_sparse.TopK(density), values, against=f"{density:.1%} Float32"
        )
        for density in (0.01, 0.001)
        for values in VALUES
    },
}
EVERY = {**COLUMNS, **FORMATS}
KEY = ("model", "column", "seed", "settings")  # of a row that is kept
SEEDS = range(3)
DIGITS_SEEDS = range(20)  # 0.1 % varies by more than half a point from seed to seed


@dataclass(frozen=True)
class Model:
    """What is trained in all columns.

    Attributes:
        name: as the table has it.
        family: of optimizers, whose best dense row is what all are held against.
        settings: all that decides what comes out, for rows that are kept.
        train: a column, a seed and whether to be quick -> quality and traffic.
        gap: of a quality to a better one; 0 is as good.
        limits: per column, the largest gap to dense with the same optimizer.
    """

    name: str
    family: str
    settings: object
    train: Callable[[str, int, bool], tuple[float, object, float]]
    gap: Callable[[float, float], float]
    limits: dict[str, float]
    seeds: range = SEEDS
    rising: bool = False  # the quality is better where it is larger


def sgd(momentum: float, parameters, settings: language.Settings) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=settings.lr, momentum=momentum)


def adam(beta1: float, parameters, settings: language.Settings) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=settings.lr, betas=(beta1, 0.999))


# name, family, optimizer, learning rate, limits against dense with the same optimizer.
# Then the grid of learning rates, and what dense makes of each (2 ranks, seed 0).
OPTIMIZERS = (
    ("Adam (0, 0.999)", "Adam", partial(adam, 0.0), 0.004, {"1 % signs": 0.02}),
    ("Adam (0.9, 0.999)", "Adam", partial(adam, 0.9), 0.004, {}),
    ("SGD", "SGD", partial(sgd, 0.0), 0.7, {}),
    # where dense diverges and 1 % does best; hvd_sparse/advice.py speaks of it
    ("SGD, rate 1", "SGD", partial(sgd, 0.0), 1.0, {}),
    ("SGD 0.5", "SGD", partial(sgd, 0.5), 0.5, {"1 %": 0.02, "0.1 %": 0.08}),
    ("SGD 0.9", "SGD", partial(sgd, 0.9), 0.25, {}),
)
GRIDS = {
    "SGD": (0.5, 0.7, 1.0),  # not known, 2.3377, diverges
    "SGD 0.5": (0.125, 0.25, 0.35, 0.5, 0.7, 1.0),
    # 2.4179, 2.3526, 2.3008, 2.2157, 2.4463, diverges
    "SGD 0.9": (0.125, 0.25, 0.5),  # 2.1876, 1.9799, diverges
    "Adam (0.9, 0.999)": (0.001, 0.002, 0.004, 0.008),  # 1.9712, 1.7539, 1.6268, 1.6527
    "Adam (0, 0.999)": (0.002, 0.004, 0.008),
}
DIGITS_GRID = (0.1, 0.2, 0.4, 0.8)  # 98.20 %, 98.36 %, 98.43 %, diverges


def share(comm, column: str, seed: int):
    """Who trains together, with which seed: alone, every rank has one of its own."""
    if column != ALONE:
        return comm, seed
    return MPI.COMM_SELF, seed * comm.size + comm.rank


def language_loss(text, comm, build, settings, column, seed, quick):
    """Validation loss, traffic and seconds per step; alone, the mean over ranks."""
    training, validation = text
    ranks, seed = share(comm, column, seed)
    settings = replace(settings, seed=seed, steps=40 if quick else settings.steps)
    how = EVERY[column]
    model, traffic, seconds = language.train(
        training, how.sparsifier, ranks, settings, build=build, values=how.values
    )
    loss = language.evaluate(model, validation, ranks)
    return mean_of(comm, loss) if ranks is not comm else loss, traffic, seconds


def digits_accuracy(splits, comm, column, seed, quick, **changed):
    """Test accuracy, traffic and seconds per step; alone, the mean over ranks."""
    ranks, seed = share(comm, column, seed)
    settings = replace(digits.Settings(), seed=seed, **changed)
    settings = replace(settings, steps=40 if quick else settings.steps)
    model, traffic, seconds = digits.train(
        splits[0], EVERY[column].sparsifier, ranks, settings
    )
    accuracy = digits.accuracy(model, splits[1])
    return mean_of(comm, accuracy) if ranks is not comm else accuracy, traffic, seconds


def mean_of(comm, number: float) -> float:
    return comm.allreduce(number) / comm.size


def models(comm) -> Iterator[Model]:
    """All that is trained."""
    text = language.read_text()
    for name, family, build, lr, limits in OPTIMIZERS:
        settings = replace(language.Settings(), lr=lr)
        yield Model(
            f"LM, {name}",
            f"LM, {family}",
            settings,
            partial(language_loss, text, comm, build, settings),
            lambda found, best: found / best - 1,
            limits,
        )
    splits = digits.read_digits()
    yield Model(
        "digits, SGD",
        "digits",
        digits.Settings(),
        partial(digits_accuracy, splits, comm),
        lambda found, best: best - found,
        {"1 %": 0.005, "0.1 %": 0.005},
        DIGITS_SEEDS,
        rising=True,
    )


class Results:
    """Qualities by model, column and seed: kept in a file, so that nothing is lost."""

    def __init__(self, file: Path | None, comm, quick: bool) -> None:
        self.file, self.comm = file, comm
        self.header = {"ranks": comm.size, "quick": quick}
        known = {}
        if file is not None and file.exists():
            known = json.loads(file.read_text())
            if {key: known.get(key) for key in self.header} != self.header:
                raise SystemExit(f"{file} has rows of another run, not {self.header}")
        self.rows = comm.bcast({self.key(row): row for row in known.get("rows", [])})

    @staticmethod
    def key(row: dict) -> tuple:
        return tuple(row[name] for name in KEY)

    def get(self, model: Model, column: str, seed: int) -> dict:
        """From the file, or trained now."""
        key = (model.name, column, seed, repr(model.settings))
        if key not in self.rows:
            value, traffic, seconds = model.train(column, seed, self.header["quick"])
            self.rows[key] = {
                **dict(zip(KEY, key, strict=True)),
                "value": value if math.isfinite(value) else None,  # JSON has no nan
                "sent_bytes": traffic.sent_bytes / traffic.steps,
                "seconds_per_step": seconds,
            }
            self.save()
        return self.rows[key]

    def save(self) -> None:
        if self.file is None or self.comm.rank:
            return
        document = {**self.header, "rows": [*self.rows.values()]}
        unfinished = self.file.with_suffix(".new")
        unfinished.write_text(json.dumps(document, indent=1) + "\n")
        unfinished.replace(self.file)


def values(rows: list[dict]) -> list[float]:
    return [math.nan if row["value"] is None else row["value"] for row in rows]


def error_of(numbers: list[float]) -> float:
    """Standard error of the mean; nan where a run diverged."""
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)):
        return math.nan
    return statistics.stdev(numbers) / math.sqrt(len(numbers))


def gaps(model: Model, found: list[dict], best: list[dict]) -> list[float]:
    """Seed by seed, against the row of the same seed."""
    pairs = zip(values(found), values(best), strict=True)
    return [model.gap(one, other) for one, other in pairs]


def within(limit: float, found: list[float]) -> bool:
    """On average, and for the seed in the middle.

    A dense seed that does not train at all makes any average gap look good.
    """
    return statistics.mean(found) <= limit and statistics.median(found) <= limit


def limit_of(
    model: Model, column: str, rows: list[dict], beside: list[dict]
) -> float | None:
    """The largest gap that passes; that of halves to floats is twice their noise."""
    if not isinstance(EVERY[column].values, hvd_sparse.Float16):
        return model.limits.get(column)
    noise = math.hypot(error_of(values(rows)), error_of(values(beside)))
    return 2 * noise / statistics.mean(values(beside))


def best_dense(results: Results, family: list[Model], seeds) -> list[dict]:
    """The rows of the optimizer that is best when dense, on average over seeds."""
    rows = [[results.get(m, "dense", seed) for seed in seeds] for m in family]
    sign = -1 if family[0].rising else 1

    def order(row: list[dict]) -> float:
        mean = sign * statistics.mean(values(row))
        return mean if math.isfinite(mean) else math.inf

    return min(rows, key=order)


def measure(comm, results: Results, columns, quick: bool, say) -> bool:
    """All rows, each told when it is known; returns whether a gap is too large."""
    every = list(models(comm))
    say(
        f"{'':<22} {'column':<13} {'value':>8} {'+-':>6} {'own gap':>8} "
        f"{'+-':>6} {'limit':>6} "
        f"{'best gap':>8} {'+-':>6} {'bytes':>9} {'s / step':>8}"
    )
    fails = False
    for model in every[:1] if columns is FORMATS else every:
        seeds = model.seeds[:1] if quick else model.seeds
        family = [other for other in every if other.family == model.family]
        best = best_dense(results, family, seeds)
        for column, how in columns.items():
            rows = [results.get(model, column, seed) for seed in seeds]
            beside = [results.get(model, how.against, seed) for seed in seeds]
            own, over = gaps(model, rows, beside), gaps(model, rows, best)
            limit = None if quick else limit_of(model, column, rows, beside)
            failed = limit is not None and not within(limit, own)
            fails |= failed
            say(
                f"{model.name:<22} {column:<13} {statistics.mean(values(rows)):8.4f} "
                f"{error_of(values(rows)):6.4f} {statistics.mean(own):+8.1%} "
                f"{error_of(own):6.1%} "
                f"{'' if limit is None else f'{limit:.1%}':>6} "
                f"{statistics.mean(over):+8.1%} {error_of(over):6.1%} "
                f"{rows[0]['sent_bytes']:9,.0f} "
                f"{statistics.mean(r['seconds_per_step'] for r in rows):8.4f}"
                + ("  FAILS" if failed else "")
            )
    return fails


def tune(comm, say) -> None:
    """What dense makes of each learning rate in the grids."""
    text, splits = language.read_text(), digits.read_digits()
    for lr in DIGITS_GRID:
        found = [
            digits_accuracy(splits, comm, "dense", seed, False, lr=lr)[0]
            for seed in range(5)
        ]
        say(f"{'digits, SGD':<22} lr {lr:<6} {statistics.mean(found):.4f}")
    for name, _, build, _, _ in OPTIMIZERS:
        for lr in GRIDS.get(name, ()):
            settings = replace(language.Settings(), lr=lr)
            loss = language_loss(text, comm, build, settings, "dense", 0, False)[0]
            say(f"{f'LM, {name}':<22} lr {lr:<6} {loss:.4f}")


def main() -> None:
    """Measure, or tune, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep rows here")
    parser.add_argument("--quick", action="store_true", help="few steps, no limits")
    parser.add_argument(
        "--formats", action="store_true", help="of values, in place of optimizers"
    )
    parser.add_argument("--tune", action="store_true", help="dense, over the grids")
    args = parser.parse_args()
    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", hvd_sparse.QualityWarning)  # it is the subject

    def say(line: str) -> None:
        if comm.rank == 0:
            print(line, flush=True)

    if args.tune:
        tune(comm, say)
        return
    results = Results(args.json, comm, args.quick)
    columns = FORMATS if args.formats else COLUMNS
    sys.exit(measure(comm, results, columns, args.quick, say))


if __name__ == "__main__":
    main()
