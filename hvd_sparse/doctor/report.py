"""What the doctor found as text, for people."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hvd_sparse.table import aligned

_WORDS = {True: "yes", False: "no"}


def report(found: Mapping[str, Any]) -> str:
    """Paragraphs of aligned columns; keys as in the doctor's JSON."""
    return "\n\n".join("\n".join(paragraph) for paragraph in _paragraphs(found)) + "\n"


def _paragraphs(found: Mapping[str, Any]) -> Iterator[list[str]]:
    yield _pairs("installed", found["installed"])
    if found["horovod"]:
        yield _pairs("Horovod was built with", found["horovod"])
    if found["mpi"]:
        yield _pairs("MPI", found["mpi"])
    if "network" in found:
        yield _pairs("this job", found["job"])
        yield _network(found["network"])
        yield _predictions(found["model"], found["predictions"])
    yield [found["verdict"]]


def _pairs(title: str, facts: Mapping[str, Any]) -> list[str]:
    width = max(map(len, facts))
    return [title, *(f"  {name:{width}}  {_told(f)}" for name, f in facts.items())]


def _told(fact: Any) -> str:
    if isinstance(fact, bool):
        return _WORDS[fact]
    if isinstance(fact, list):
        return ", ".join(fact) or "none"
    return str(fact)


def _table(title: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """The first row has the headings, the first column what is to be read left."""
    return [title, *(f"  {line}" for line in aligned(rows))]


def _network(collectives: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = [["", "latency", "rate", "measured up to"]]
    for name, found in collectives.items():
        latency = f"{1e6 * found['latency_s']:,.0f} us"
        rate = f"{1e-6 / found['per_byte_s']:,.0f} MB/s"
        rows.append([name, latency, rate, f"{found['sizes'][-1]:,} bytes"])
    return _table("collectives of this job", rows)


def _predictions(model: Mapping[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    columns = ["", "ms", "of it local", "bytes of a rank", "saved", "against dense"]
    steps = [row["step_s"] for row in rows if "step_s" in row]  # of all, or of none
    if steps:
        columns += ["whole step, ms", "against dense"]
    table = [columns]
    for i, row in enumerate(rows):
        cells = _prediction(row, rows[0])
        if steps:
            cells += [f"{1e3 * steps[i]:.1f}", f"{steps[i] / steps[0]:.3f}"]
        table.append(cells)
    title = f"a step's exchange of {model['parameters']:,} parameters, predicted"
    return _table(title, table)


def _prediction(row: Mapping[str, Any], dense: Mapping[str, Any]) -> list[str]:
    density, dense_s = row["density"], dense["seconds"]
    return [
        row["method"] if density is None else f"sparse, {density:.2%}",
        f"{1e3 * row['seconds']:.1f}",
        f"{1e3 * row['local_s']:.1f}",
        f"{row['bytes']:,}",
        f"{1 - row['bytes'] / dense['bytes']:.2%}" if dense["bytes"] else "",
        f"{row['seconds'] / dense_s:.3f}" if dense_s else "",
    ]
