"""Tables, for people."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print what the doctor found; keys as in its JSON."""
    console.print(_pairs("installed", found["installed"]))
    if found["horovod"]:
        console.print(_pairs("Horovod was built with", found["horovod"]))
    if found["mpi"]:
        console.print(_pairs("MPI", found["mpi"]))
    if "network" in found:
        console.print(_pairs("this job", found["job"]))
        console.print(_network(found["network"]))
        console.print(_predictions(found["model"], found["predictions"]))
    console.print(found["verdict"], style="bold", soft_wrap=True)


def _pairs(title: str, facts: Mapping[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    words = {True: "yes", False: "no"}
    for name, fact in facts.items():
        if isinstance(fact, bool):
            fact = words[fact]
        elif isinstance(fact, list):
            fact = ", ".join(fact) or "none"
        table.add_row(name, str(fact))
    return table


def _network(collectives: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="collectives of this job", title_justify="left")
    for column in ("", "latency", "rate", "measured up to"):
        table.add_column(column, justify="right" if column else "left")
    for name, found in collectives.items():
        latency = f"{1e6 * found['latency_s']:,.0f} us"
        rate = f"{1e-6 / found['per_byte_s']:,.0f} MB/s"
        table.add_row(name, latency, rate, f"{found['sizes'][-1]:,} bytes")
    return table


def _predictions(model: Mapping[str, Any], rows: list[dict[str, Any]]) -> Table:
    title = f"a step's exchange of {model['parameters']:,} parameters, predicted"
    table = Table(title=title, title_justify="left")
    columns = ["", "ms", "of it local", "bytes of a rank", "against dense"]
    steps = [row["step_s"] for row in rows if "step_s" in row]  # of all, or of none
    if steps:
        columns += ["whole step, ms", "against dense"]
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for i, row in enumerate(rows):
        density = row["density"]
        cells = [
            row["method"] if density is None else f"sparse, {density:.2%}",
            f"{1e3 * row['seconds']:.1f}",
            f"{1e3 * row['local_s']:.1f}",
            f"{row['bytes']:,}",
            f"{row['seconds'] / rows[0]['seconds']:.3f}" if rows[0]["seconds"] else "",
        ]
        if steps:
            cells += [f"{1e3 * steps[i]:.1f}", f"{steps[i] / steps[0]:.3f}"]
        table.add_row(*cells)
    return table
