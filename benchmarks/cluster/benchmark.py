"""Training on several hosts: what a step takes, by method and rate of the network.

    benchmarks/cluster/run --quick            # 2 hosts, 1 Gbit/s: about 3 minutes
    benchmarks/cluster/run --json FILE --plot FILE    # all of it: within an hour

Hosts are network namespaces of this machine (hosts.py); all else is real: mpirun and
horovodrun across them, TCP, a transformer of 25.5 million parameters in training on
Python's source (worker.py). A step is forward, backward, exchange and update; the
median over rounds in which methods take turns, of the slowest rank. The bound is the
same work in the same job with the exchange left out: all hosts compute at the same
time, for they share this machine's cores. It differs by door: Horovod's thread talks to
the other hosts even when there is nothing to exchange. The row "no-communication" is
that under Horovod, and each row has the `bound_s` of its own door. The length of the
pieces of text is found out first: the one with which two hosts alone take 0.2 s.

"Predicted" is the bound plus the exchange that `python -m hvd_sparse.doctor` foretold
on the same hosts from its own measurements, as if the backward pass hid nothing of it.

The time to a loss is computed: a method's steps to that validation loss, counted once
without a limit on the network, times what its step takes. Bytes are what a host's
interface has sent, headers of TCP and acknowledgements among them.

With --int32 the methods of hvd_sparse are there with int32 indices, too, which takes
more memory; nothing is foretold of these, and no steps to a loss are counted.

Fails, unless --quick, if one of these does not hold: on 2 hosts at 1 Gbit/s the step
of 0.1 % under Horovod takes at most 1.25 times the bound, a quarter of dense Horovod
and half of its fp16; at 100 Mbit/s at most 1.4 times the bound; without a limit at most
1.05 times dense Horovod. In DDP, at 1 Gbit/s, at most 1.25 times the bound, 1 / 4.5 of
dense DDP and 1 / 1.6 of PowerSGD; without a limit at most 0.75 of dense DDP. Ends with
an error after an hour, with --quick 10 minutes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import worker
from hosts import Cluster, why_not
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

WORKER = str(Path(__file__).with_name("worker.py"))
DOORS = ("horovod", "mpi", "ddp")
BOUND_DOOR = "horovod"  # whose bound is a row: most methods go through it
RATES = {"100mbit": 100, "1gbit": 1000, "unlimited": None}
LOSS = 3.1  # nats per byte, on validation text
COLUMNS = (
    "method",
    "density",
    "step, s",
    "predicted",
    "its bound",
    "of it",
    "steps/s",
    "bytes a step",
    f"s to {LOSS} (computed)",
)
BOUND_S = 0.2  # of two hosts alone; beside other methods' models it is little more
LIMIT_S = 900  # of one job: it is ended then

console = Console()
if not console.is_terminal:
    console.width = 120  # in a log


# ------------------------------------------------------------------------- the jobs


def run_job(cluster: Cluster, door: str, *options: str) -> list[dict]:
    """The rows of one training job across the hosts."""
    with tempfile.NamedTemporaryFile() as file:
        run(cluster, door, [sys.executable, WORKER, door, file.name, *options])
        return json.loads(Path(file.name).read_text())


def ask_doctor(cluster: Cluster, door: str) -> dict[tuple[str, float | None], float]:
    """Seconds of an exchange that the doctor foretells, by method and density."""
    with tempfile.TemporaryDirectory() as folder:
        model, found = Path(folder, "model.pt"), Path(folder, "found.json")
        torch.save(worker.new_network().state_dict(), model)
        options = ["--checkpoint", str(model), "--json", str(found)]
        run(cluster, door, [sys.executable, "-m", "hvd_sparse.doctor", *options])
        rows = json.loads(found.read_text())["predictions"]
    return {(f"{door}-{r['method']}", r["density"]): r["seconds"] for r in rows}


def run(cluster: Cluster, door: str, program: list[str]) -> None:
    start = cluster.horovodrun if door == "horovod" else cluster.mpirun
    done = subprocess.run(
        start(program),
        env=environment(cluster),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    if done.returncode:
        raise RuntimeError(f"{door}: {done.stderr[-3000:]}")


def environment(cluster: Cluster) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HOROVOD_GLOO_TIMEOUT_SECONDS": "120",
        "GLOO_SOCKET_IFNAME": "eth0",  # of torch.distributed
        "MASTER_ADDR": cluster.addresses[0],
        "MASTER_PORT": "29500",
    }


def find_length() -> int:
    """Of pieces of text, in bytes."""
    with Cluster(2) as cluster, waiting(f"a step of {BOUND_S} s"):
        (found,) = run_job(cluster, BOUND_DOOR, "--find-length", str(BOUND_S))
    return int(found["length"])


def measure(
    hosts: Iterable[int], rates: Iterable[str], options: list[str], length: int
) -> Iterator[dict]:
    for count in hosts:
        for rate in rates:
            with Cluster(count, RATES[rate]) as cluster:
                for door in DOORS:
                    with waiting(f"{count} hosts, {rate}, {door}"):
                        known = {} if door == "ddp" else ask_doctor(cluster, door)
                        rows = run_job(cluster, door, *options)
                    for row in rows:
                        exchange = known.get((row["method"], row["density"]))
                        yield {
                            **row,
                            "door": door,
                            "hosts": count,
                            "rate": rate,
                            "length": length,
                            "predicted_exchange_s": exchange,
                        }


def count_steps(hosts: int, length: int) -> list[dict]:
    """Steps to the loss, per method, without a limit on the network."""
    options = ["--loss", str(LOSS), "--length", str(length)]
    rows = []
    with Cluster(hosts) as cluster:
        for door in DOORS:
            with waiting(f"{hosts} hosts, steps to a loss of {LOSS}, {door}"):
                rows += run_job(cluster, door, *options)
    return [{**row, "hosts": hosts} for row in rows]


def waiting(text: str) -> Progress:
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    progress = Progress(*columns, console=console)
    progress.add_task(text, total=None)
    return progress


# ------------------------------------------------------------------------ the report


def with_bounds(rows: list[dict]) -> list[dict]:
    """Rows with the bound of their door, and foretold; one bound is a row itself."""
    bounds = {place(r): r["step_s"] for r in rows if r["method"] == "no-communication"}
    told = []
    for row in rows:
        if row["method"] == "no-communication" and row["door"] != BOUND_DOOR:
            continue
        bound, exchange = bounds[place(row)], row["predicted_exchange_s"]
        predicted = None if exchange is None else bound + exchange
        told.append(
            {
                **row,
                "bound_s": bound,
                "of_bound": row["step_s"] / bound,
                "predicted_step_s": predicted,
            }
        )
    return told


def place(row: dict) -> tuple:
    return row["hosts"], row["rate"], row["door"]


def with_times(rows: list[dict], steps: list[dict]) -> list[dict]:
    """Rows with the steps and the computed seconds to the loss, where known."""
    known = {(s["method"], s["density"], s["hosts"]): s["steps"] for s in steps}
    told = []
    for row in rows:
        count = known.get((row["method"], row["density"], row["hosts"]))
        seconds = None if count is None else count * row["step_s"]
        told.append({**row, "steps_to_loss": count, "computed_s_to_loss": seconds})
    return told


def show(rows: list[dict]) -> None:
    for hosts, rate in dict.fromkeys((r["hosts"], r["rate"]) for r in rows):
        table = Table(title=f"{hosts} hosts, {rate}", title_justify="left")
        for column in COLUMNS:
            table.add_column(column, justify="right" if column != "method" else "left")
        for row in rows:
            if (row["hosts"], row["rate"]) == (hosts, rate):
                table.add_row(*cells(row))
        console.print(table)


def cells(row: dict) -> list[str]:
    seconds, density = row["computed_s_to_loss"], row["density"]
    predicted = row["predicted_step_s"]
    return [
        row["method"],
        f"{density:.1%}" if density else "",
        f"{row['step_s']:.3f}",
        f"{predicted:.3f}" if predicted else "",
        f"{row['bound_s']:.3f}",
        f"{row['of_bound']:.2f}",
        f"{1 / row['step_s']:.2f}",
        f"{row['bytes']:,.0f}",
        f"{seconds:.0f}" if seconds else "",
    ]


def judge(rows: list[dict]) -> bool:
    """Prints each bar that was measured; returns whether all hold."""
    found = {(r["rate"], r["method"], r["density"]): r for r in rows if r["hosts"] == 2}
    passed = True
    for rate, method, other, most in (
        ("1gbit", "horovod-sparse", "bound", 1.25),
        ("1gbit", "horovod-sparse", "horovod-dense", 1 / 4),
        ("1gbit", "horovod-sparse", "horovod-fp16", 1 / 2),
        ("100mbit", "horovod-sparse", "bound", 1.4),
        ("unlimited", "horovod-sparse", "horovod-dense", 1.05),
        ("1gbit", "ddp-sparse", "bound", 1.25),
        ("1gbit", "ddp-sparse", "ddp-gloo", 1 / 4.5),
        ("1gbit", "ddp-sparse", "ddp-powersgd", 1 / 1.6),
        ("unlimited", "ddp-sparse", "ddp-gloo", 0.75),
    ):
        ours = found.get((rate, method, 0.001))
        if ours is None:
            continue
        theirs = found.get((rate, other, None))
        ratio = (
            ours["of_bound"] if other == "bound" else ours["step_s"] / theirs["step_s"]
        )
        passed &= ratio <= most
        console.print(
            f"{'PASS' if ratio <= most else 'FAIL'}: 2 hosts, {rate}: {method} at "
            f"0.1 % takes {ratio:.3f} of {other}, at most {most:.3g}",
            highlight=False,
            soft_wrap=True,
        )
    return passed


def plot(rows: list[dict], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    counts, rates = (list(dict.fromkeys(r[k] for r in rows)) for k in ("hosts", "rate"))
    figure, axes = plt.subplots(
        len(counts), len(rates), figsize=(4.4 * len(rates), 3.4 * len(counts)),
        squeeze=False, sharey=True,
    )  # fmt: skip
    for i, hosts in enumerate(counts):
        for j, rate in enumerate(rates):
            own = [r for r in rows if (r["hosts"], r["rate"]) == (hosts, rate)]
            bars = [r for r in own if r["method"] != "no-communication"]
            names = [" ".join(filter(None, cells(r)[:2])) for r in bars]
            seconds = [r["step_s"] for r in bars]
            colors = ["C0" if r["density"] else "0.7" for r in bars]
            axes[i][j].barh(names, seconds, color=colors)
            axes[i][j].plot([r["bound_s"] for r in bars], names, "k|", ms=14, mew=2)
            axes[i][j].set_title(f"{hosts} hosts, {rate}", fontsize=10)
    axes[0][0].invert_yaxis()  # of all: they share it
    text = "seconds a step; black: the same work in the same job without communication"
    figure.supxlabel(text, fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=80, metadata={"Software": None})


# ----------------------------------------------------------------------- the command


def end_in_order(limit_s: int) -> None:
    """What else may end this, too, ends what was started and takes the hosts down."""

    def leave(number: int, frame: object) -> None:
        if number == signal.SIGALRM:
            sys.exit(f"not done within {limit_s} s, which is the limit")
        sys.exit(128 + number)

    for ending in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        if signal.getsignal(ending) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(ending, leave)
    signal.alarm(limit_s)


def main() -> None:
    arguments = parse()
    reason = why_not()
    if reason:
        console.print(f"skipped: {reason}")
        return
    end_in_order(600 if arguments.quick else 3600)
    steps: list[dict] = []
    rounds = min(10, arguments.rounds) if arguments.quick else arguments.rounds
    length = arguments.length or find_length()
    options = ["--rounds", str(rounds), "--length", str(length)]
    options += ["--int32"] * arguments.int32
    rows = with_bounds(list(measure(arguments.hosts, arguments.rate, options, length)))
    if not arguments.quick:
        for hosts in arguments.hosts:
            steps += count_steps(hosts, length)
    rows = with_times(rows, steps)
    show(rows)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)
    passed = judge(rows)
    sys.exit(not (passed or arguments.quick))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="2 hosts, 1 Gbit/s")
    parser.add_argument("--hosts", type=int, nargs="+", help="how many (2 4)")
    parser.add_argument("--rate", nargs="+", choices=RATES, help="of links (all)")
    parser.add_argument("--rounds", type=int, default=12, help="steps of each method")
    parser.add_argument("--length", type=int, help="of text, in bytes (found out)")
    parser.add_argument("--int32", action="store_true", help="also with int32 indices")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    parser.add_argument("--plot", metavar="FILE", help="a PNG")
    arguments = parser.parse_args()
    most, length = worker.language.CONTEXT, arguments.length
    if length is not None and not 0 < length <= most:
        parser.error(f"--length must be in [1, {most}], got {length}")
    arguments.hosts = arguments.hosts or ([2] if arguments.quick else [2, 4])
    arguments.rate = arguments.rate or (["1gbit"] if arguments.quick else [*RATES])
    return arguments


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
