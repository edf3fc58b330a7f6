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
        value = words[fact] if isinstance(fact, bool) else fact
        table.add_row(name, str(value))
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
    for column in ("", "ms", "of it local", "bytes of a rank", "against dense"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        density = row["density"]
        table.add_row(
            row["method"] if density is None else f"sparse, {density:.2%}",
            f"{1e3 * row['seconds']:.1f}",
            f"{1e3 * row['local_s']:.1f}",
            f"{row['bytes']:,}",
            f"{row['seconds'] / rows[0]['seconds']:.3f}" if rows[0]["seconds"] else "",
        )
    return table
