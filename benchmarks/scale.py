"""Where allgatherv stops paying, on paper: seconds of an exchange by number of ranks.

    python benchmarks/scale.py
    python benchmarks/scale.py --parameters 350000000 --latency-us 20 --plot FILE

The model is hvd_sparse/core/rings.py: links of so many Gbit/s, rings. Neither the time
to select nor what a backward pass hides is in it. tests/test_rings.py compares its
bytes with those that 2 to 16 real ranks count.
"""

import argparse

from rich.console import Console
from rich.table import Table

from hvd_sparse import Float16, Float32
from hvd_sparse.core.formats import Entries
from hvd_sparse.core.rings import (
    Link,
    allgather,
    dense_allreduce,
    most_ranks,
    split_allreduce,
    union,
)
from hvd_sparse.core.sparsifiers import elements

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
GBIT = (1, 10, 100)
DENSITIES = (0.01, 0.001)


def methods(ranks, n):
    """Per method, what a rank sends."""
    found = {
        "dense": dense_allreduce(ranks, n),
        "fp16": dense_allreduce(ranks, n, itemsize=2),
    }
    for density in DENSITIES:
        found[f"{density:.1%}"] = allgather(ranks, elements(density, n), n=n)
    for density in DENSITIES:
        split = split_allreduce(ranks, n, elements(density, n))
        found[f"sparse allreduce, {density:.1%}"] = split
    return found


def show(console, n, latency_s):
    for gbit in GBIT:
        link = Link(latency_s, gbit * 1e9 / 8)
        table = Table(title=f"ms of an exchange at {gbit} Gbit/s", title_justify="left")
        table.add_column("ranks", justify="right")
        for name in methods(2, n):
            table.add_column(name, justify="right")
        for ranks in RANKS:
            sent = methods(ranks, n).values()
            seconds = [1e3 * link.seconds(transfer) for transfer in sent]
            table.add_row(str(ranks), *(f"{s:,.1f}" for s in seconds))
        console.print(table)
    table = Table(title="share of the elements that some rank sends (random)")
    for name in ("ranks", *(f"{density:.1%}" for density in DENSITIES)):
        table.add_column(name, justify="right")
    for ranks in RANKS:
        shares = (union(ranks, n, elements(d, n)) / n for d in DENSITIES)
        table.add_row(str(ranks), *(f"{share:.1%}" for share in shares))
    console.print(table)
    for density in DENSITIES:
        k = elements(density, n)
        for values in (Float32(), Float16()):
            dense, half = (
                most_ranks(n, k, itemsize=size, form=Entries(values)) for size in (4, 2)
            )
            console.print(
                f"{density:.1%}, {values}: fewer bytes than dense up to {dense} ranks, "
                f"than fp16 up to {half}",
                highlight=False,
            )


def plot(file, n, latency_s):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(GBIT), figsize=(12, 3.8), sharey=True)
    for axis, gbit in zip(axes, GBIT, strict=True):
        link = Link(latency_s, gbit * 1e9 / 8)
        for i, name in enumerate(methods(2, n)):
            seconds = [link.seconds(methods(ranks, n)[name]) for ranks in RANKS]
            style = "--" if "allreduce" in name else "-"
            axis.loglog(
                RANKS, seconds, style, label=name, color=f"C{i % 4 + i // 4 * 2}"
            )
        axis.set_title(f"{gbit} Gbit/s", fontsize=10)
        axis.set_xlabel("ranks")
    axes[0].set_ylabel("seconds of an exchange")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=80, metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=int, default=25_557_032)
    parser.add_argument("--latency-us", type=float, default=50, help="of a message")
    parser.add_argument("--plot", metavar="FILE", help="a PNG")
    arguments = parser.parse_args()
    latency_s = 1e-6 * arguments.latency_us
    show(Console(width=110), arguments.parameters, latency_s)
    if arguments.plot:
        plot(arguments.plot, arguments.parameters, latency_s)


if __name__ == "__main__":
    main()
