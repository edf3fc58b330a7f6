"""Two real models, each trained in several ways; launch/demo runs it.

Dense; alone, which is one rank's share of each batch and no communication at all; and
sparse. What does not end better than "alone" is not worth its bytes. The second model,
five seeds of a small one, dense and sparse.

mpirun -np 2 python examples/demo.py
mpirun -np 2 python examples/demo.py --sparsifier cat    # dense, and no density given
"""

import argparse
import os
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import pairwise
from pathlib import Path

import torch_digits as digits
import torch_language_model as language
from mpi4py import MPI
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import hvd_sparse
import hvd_sparse.mpi
from hvd_sparse.core.traffic import Traffic


class Baseline(Enum):
    """What sparse training is held against."""

    DENSE = "all ranks together, every gradient whole"
    ALONE = "every rank for itself"


Method = hvd_sparse.Sparsifier | Baseline
COLUMNS: dict[str, Method] = {
    "dense": Baseline.DENSE,
    "alone": Baseline.ALONE,
    "1 %": hvd_sparse.TopK(density=0.01),
    "1 % signs": hvd_sparse.SignTopK(density=0.01),
    "0.1 %": hvd_sparse.TopK(density=0.001),
}
SEEDS = range(5)  # of the digits; their accuracies are averaged
WINDOWS = 5  # into which the steps are cut, to show what changes over time

OnStep = Callable[[float, Traffic], None]


@dataclass
class History:
    """What each step of the latest training sent.

    Attributes:
        sent_bytes: so far, one a step.
        densities: of each tensor that goes sparse, one row a step.
        overall: of their elements together, one a step.
    """

    traffic: Traffic | None = None
    sent_bytes: list[int] = field(default_factory=list)
    densities: list[list[float]] = field(default_factory=list)
    overall: list[float] = field(default_factory=list)
    _elements: dict[str, int] = field(default_factory=dict)

    def add(self, traffic: Traffic) -> None:
        """Another step is over."""
        if traffic is not self.traffic:  # another training begins
            self.traffic, self._elements = traffic, {}
            self.sent_bytes, self.densities, self.overall = [], [], []
        self.sent_bytes.append(traffic.sent_bytes)
        tensors = {n: t for n, t in traffic.tensors.items() if t.route == "sparse"}
        sizes = [t.dense_bytes / 4 / traffic.steps for t in tensors.values()]  # float32
        sent = [t.sent_elements - self._elements.get(n, 0) for n, t in tensors.items()]
        self._elements = {n: t.sent_elements for n, t in tensors.items()}
        self.densities.append([s / n for s, n in zip(sent, sizes, strict=True)])
        self.overall.append(sum(sent) / sum(sizes) if sizes else 0.0)


@dataclass(frozen=True)
class Outcome:
    """One model trained in one column: its quality, and what a step cost."""

    quality: float
    traffic: Traffic
    seconds_per_step: float
    history: History = field(default_factory=History)


@dataclass(frozen=True)
class Task:
    """One model in all columns.

    Attributes:
        train: from a method and a callback to an outcome; alone, the mean over ranks.
        quality: what the outcome's quality is called.
        show: formats a quality.
        gap: formats what is between a quality and that of dense.
        unit: of that, where it is not in its text.
        settings: the dense settings, which hold for every column.
        columns: those of COLUMNS that it is trained in.
    """

    name: str
    title: str
    steps: int
    train: Callable[[Method, OnStep], Outcome]
    quality: str
    show: Callable[[float], str]
    gap: Callable[[float, float], str]
    settings: str
    unit: str = ""
    columns: tuple[str, ...] = tuple(COLUMNS)

    def among(self, columns: dict[str, Method]) -> dict[str, Method]:
        """Those of these columns that it is trained in; others are not of COLUMNS."""
        return {
            name: method
            for name, method in columns.items()
            if name in self.columns or name not in COLUMNS
        }


def share(comm: MPI.Comm, method: Method, seed: int) -> tuple[MPI.Comm, int]:
    """Who trains together, with which seed: alone, every rank has one of its own."""
    if method is Baseline.ALONE:
        return MPI.COMM_SELF, seed * comm.size + comm.rank
    return comm, seed


def sparsifier_of(method: Method) -> hvd_sparse.Sparsifier | None:
    return None if isinstance(method, Baseline) else method


def mean(comm: MPI.Comm, quality: float) -> float:
    """Over ranks; where they trained together it is the same on each."""
    return comm.allreduce(quality) / comm.size


def language_task(comm: MPI.Comm, data_dir: Path | None, speedup: int) -> Task:
    settings = language.Settings()
    settings = replace(settings, steps=settings.steps // speedup)
    training, validation = language.read_text(data_dir)

    def train(method: Method, on_step: OnStep) -> Outcome:
        ranks, seed = share(comm, method, settings.seed)
        model, traffic, seconds = language.train(
            training,
            sparsifier_of(method),
            ranks,
            replace(settings, seed=seed),
            on_step=on_step,
        )
        loss = mean(comm, language.evaluate(model, validation, ranks))
        return Outcome(loss, traffic, seconds)

    return Task(
        name="language model",
        title=f"language model on {data_dir or 'the source of Python'}",
        steps=settings.steps,
        train=train,
        quality="loss, nats per byte",
        show=lambda loss: f"{loss:.4f}",
        gap=lambda loss, dense: f"{loss / dense - 1:+.1%}",
        settings=settings_text("Adam, betas (0, 0.999)", settings, comm)
        + f" windows of {language.CONTEXT} bytes",
    )


def digits_task(comm: MPI.Comm, speedup: int) -> Task:
    settings = digits.Settings()
    settings = replace(settings, steps=settings.steps // speedup)
    training, test = digits.read_digits()

    def train(method: Method, on_step: OnStep) -> Outcome:
        accuracies, seconds = [], []
        for each in SEEDS:
            ranks, seed = share(comm, method, each)
            model, traffic, taken = digits.train(
                training,
                sparsifier_of(method),
                ranks,
                replace(settings, seed=seed),
                on_step=on_step,
            )
            accuracies.append(mean(comm, digits.accuracy(model, test)))
            seconds.append(taken)
        return Outcome(statistics.mean(accuracies), traffic, statistics.mean(seconds))

    return Task(
        name="digits",
        title="convolutional network on handwritten digits",
        steps=settings.steps * len(SEEDS),
        train=train,
        quality=f"accuracy ({len(SEEDS)} seeds)",
        show=lambda accuracy: f"{accuracy:.2%}",
        gap=lambda accuracy, dense: f"{100 * (accuracy - dense):+.2f}",
        unit=", points",
        settings=settings_text("SGD", settings, comm) + " images",
        columns=("dense", "1 %", "0.1 %"),
    )


def settings_text(
    optimizer: str, settings: language.Settings | digits.Settings, comm: MPI.Comm
) -> str:
    return (
        f"{optimizer}, learning rate {settings.lr} (tuned for dense), "
        f"{settings.steps} steps of {comm.size} x {settings.batch}"
    )


def cat_columns(comm: MPI.Comm, console: Console) -> dict[str, Method]:
    """Dense, and CAT with the cost of this job's own exchanges.

    A step sends all tensors in one exchange: each has its share of the message's cost.
    """
    measured = hvd_sparse.mpi.measure(comm)
    console.print(f"measured: {measured}")
    cost = measured.cost.among(len([*language.Transformer().parameters()]))
    return {"dense": Baseline.DENSE, "CAT": hvd_sparse.CAT(hvd_sparse.TopK(), cost)}


def run(
    tasks: list[Task],
    columns: dict[str, Method],
    console: Console,
) -> list[list[Outcome]]:
    """Train every task in every column: a bar for each, in a file a line for each."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[loss]}"),
        console=console,
        disable=console.quiet or not console.is_terminal,
    )
    outcomes: list[list[Outcome]] = []
    with progress:
        for task in tasks:
            outcomes.append([])
            for column, method in task.among(columns).items():
                begin = time.perf_counter()
                bar = progress.add_task(
                    f"{task.name}, {column}", total=task.steps, loss=""
                )

                history = History()

                def on_step(
                    loss: float, traffic: Traffic, bar=bar, history=history
                ) -> None:
                    progress.update(bar, advance=1, loss=f"loss {loss:.2f}")
                    history.add(traffic)

                outcome = task.train(method, on_step)
                outcomes[-1].append(replace(outcome, history=history))
                if not console.is_terminal:
                    console.print(
                        f"{task.name}, {column}: {task.show(outcome.quality)} after "
                        f"{task.steps} steps, {time.perf_counter() - begin:.0f} s"
                    )
    return outcomes


def per_step(count: int, outcome: Outcome) -> str:
    return f"{count / outcome.traffic.steps:,.0f}"


def ratio(outcome: Outcome) -> str:
    sends = outcome.traffic.sent_bytes > 0
    return f"{outcome.traffic.compression_ratio:,.1f}" if sends else "-"


def table_of(task: Task, columns: list[str], outcomes: list[Outcome]) -> Table:
    """What one task made of the columns."""
    table = Table(
        title=task.title,
        title_justify="left",
        caption=task.settings,
        caption_justify="left",
        box=SIMPLE_HEAD,  # narrow: five columns fit into 80
    )
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    dense = outcomes[0].quality
    rows: dict[str, Callable[[Outcome], str]] = {
        task.quality: lambda o: task.show(o.quality),
        f"  against dense{task.unit}": lambda o: task.gap(o.quality, dense),
        "bytes sent a step": lambda o: per_step(o.traffic.sent_bytes, o),
        "bytes received a step": lambda o: per_step(o.traffic.received_bytes, o),
        "compression ratio": ratio,
        "seconds a step": lambda o: f"{o.seconds_per_step:.4f}",
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(outcome) for outcome in outcomes))
    return table


def over_time(history: History) -> Table:
    """Bytes and densities of CAT, from the first steps to the last."""
    steps = len(history.sent_bytes)
    cuts = [steps * i // WINDOWS for i in range(WINDOWS + 1)]
    table = Table(
        title="what CAT chose, over time",
        title_justify="left",
        caption="densities are those of tensors that go sparse",
        caption_justify="left",
    )
    table.add_column("steps", no_wrap=True)
    for first, last in pairwise(cuts):
        table.add_column(f"{first + 1}-{last}", justify="right", no_wrap=True)
    sent = [0, *history.sent_bytes]
    windows = [(sent[b] - sent[a]) / max(b - a, 1) for a, b in pairwise(cuts)]
    table.add_row("bytes sent per step", *(f"{window:,.0f}" for window in windows))
    means = [statistics.mean(history.overall[a:b] or [0]) for a, b in pairwise(cuts)]
    table.add_row("density", *(f"{mean:.2%}" for mean in means))
    for name, of in {"lowest": min, "highest": max}.items():
        cells = []
        for first, last in pairwise(cuts):
            every = [d for row in history.densities[first:last] for d in row]
            cells.append(f"{of(every):.2%}" if every else "")
        table.add_row(f"  {name} of a tensor", *cells)
    return table


def plot(file: Path, tasks: list[Task], outcomes: list[list[Outcome]]) -> None:
    """Bytes and chosen densities of the last column, step by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(tasks), figsize=(11, 6), squeeze=False)
    for column, (task, row) in enumerate(zip(tasks, outcomes, strict=True)):
        above, below = axes[0][column], axes[1][column]
        for outcome, label in zip(row, ("dense", "CAT"), strict=True):
            sent = [0, *outcome.history.sent_bytes]
            above.plot([b - a for a, b in pairwise(sent)], label=label, lw=1)
        above.set(title=task.name, yscale="log", ylabel="bytes sent in a step")
        above.legend()
        below.plot(row[-1].history.densities, lw=0.5, color="0.8")
        below.plot(row[-1].history.overall, lw=1.5, label="all elements")
        below.set(yscale="log", xlabel="step", ylabel="density (grey: a tensor's)")
        below.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=80, metadata={"Software": None})


def leave_quietly(console: Console) -> None:
    """End this rank at once when mpirun says so: the user pressed Ctrl-C."""

    def leave(*_: object) -> None:
        if console.is_terminal and not console.quiet:
            os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # the bar hid the cursor
        os._exit(143)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="your own text, any files")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    parser.add_argument(
        "--sparsifier", choices=["topk", "cat"], default="topk", help="what selects"
    )
    parser.add_argument("--plot", type=Path, help="of CAT's choices, a PNG")
    parser.add_argument("--terminal", action="store_true", help="stdout is a terminal")
    args = parser.parse_args()

    # the digits, with momentum, are warned of; what comes of it is in the table
    warnings.simplefilter("ignore", hvd_sparse.QualityWarning)
    comm = MPI.COMM_WORLD
    console = Console(force_terminal=args.terminal, quiet=comm.rank != 0)
    leave_quietly(console)
    speedup = 10 if args.quick else 1
    begin = time.perf_counter()
    try:
        tasks = [
            language_task(comm, args.data_dir, speedup),
            digits_task(comm, speedup),
        ]
    except ValueError as error:
        sys.exit(f"demo: {error}" if comm.rank == 0 else 1)
    columns = cat_columns(comm, console) if args.sparsifier == "cat" else COLUMNS
    outcomes = run(tasks, columns, console)
    for task, row in zip(tasks, outcomes, strict=True):
        console.print()
        console.print(table_of(task, [*task.among(columns)], row))
        if args.sparsifier == "cat":
            console.print(over_time(row[-1].history))
    if args.plot and comm.rank == 0:
        plot(args.plot, tasks, outcomes)
        console.print(f"\nplot: {args.plot}")
    console.print(
        f"\n{comm.size} ranks, {time.perf_counter() - begin:.0f} seconds in all"
    )


if __name__ == "__main__":
    main()
