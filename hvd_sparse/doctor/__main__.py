"""The command: python -m hvd_sparse.doctor, alone or after mpirun or horovodrun."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hvd_sparse.doctor import installed
from hvd_sparse.doctor.local import measure_local
from hvd_sparse.doctor.model import tensors_in, tensors_of, weights_in
from hvd_sparse.doctor.network import Network, measure_network
from hvd_sparse.doctor.prediction import Prediction, predict, verdict
from hvd_sparse.doctor.report import report
from hvd_sparse.doctor.traffic import INDICES, VALUES, plans, text, told
from hvd_sparse.doctor.transport import DOORS, Transport, found_door, open_door
from hvd_sparse.forecast import TrafficPlan

DESCRIPTION = """What is installed and built; and, after mpirun or horovodrun, what the
network of this job can do, and whether sparsification will pay on it:

  python -m hvd_sparse.doctor
  mpirun -np 2 python -m hvd_sparse.doctor --parameters 25000000
  horovodrun -np 2 python -m hvd_sparse.doctor --checkpoint model.pt

With --plan it says what each tensor of the model will cost on the wire, at once and
without a job:

  python -m hvd_sparse.doctor --plan --checkpoint model.pt --density 0.001 --ranks 8

Told what a step takes on one rank, without communication (--compute-s), it predicts
whole steps, as if the backward pass hid nothing of an exchange.
"""
STDOUT = Path("-")
RANKS = 8  # of a job that is planned


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hvd_sparse.doctor",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--parameters", type=int, default=25_000_000, help="of the model (25000000)"
    )
    model.add_argument(
        "--checkpoint", type=Path, help="of the model: torch, .npz, .h5 or .keras"
    )
    parser.add_argument(
        "--density", type=float, nargs="+", default=[0.01, 0.001], help="in (0, 1]"
    )
    parser.add_argument("--values", choices=VALUES, help="how values travel (Float32)")
    parser.add_argument(
        "--indices", choices=INDICES, help="how indices travel (EliasFano)"
    )
    parser.add_argument(
        "--plan", action="store_true", help="what each tensor will cost on the wire"
    )
    parser.add_argument(
        "--ranks", type=int, help=f"of the job that is planned ({RANKS})"
    )
    parser.add_argument(
        "--door", choices=DOORS, help="horovod in a job of horovodrun --mpi"
    )
    parser.add_argument(
        "--compute-s",
        type=_seconds,
        metavar="S",
        help="what a step takes without communication: predicts whole steps",
    )
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="write what was found there too; without FILE, that and nothing else",
    )
    found = parser.parse_args(arguments)
    if found.ranks is not None and not found.plan:
        parser.error("--ranks must come with --plan: a job has those it was started on")
    return found


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return seconds


def examine(arguments: argparse.Namespace, transport: Transport) -> dict[str, Any]:
    """All facts; collective over the job's ranks."""
    over_gloo = transport.door == "horovod" and "MPI" not in transport.carrier
    found: dict[str, Any] = {
        "installed": installed.versions(),
        "horovod": installed.horovod(),
        "mpi": {}
        if over_gloo
        else installed.mpi(),  # a job over Gloo must not start it
    }
    if transport.size == 1:
        found["verdict"] = (
            "To learn what the network can do, start this on several ranks: "
            "mpirun -np 2 python -m hvd_sparse.doctor"
        )
        return found
    return {**found, **_prognosis(arguments, transport)}


def _prognosis(arguments: argparse.Namespace, transport: Transport) -> dict[str, Any]:
    sizes = _tensors(arguments, transport)
    network = measure_network(transport)
    ranks = transport.size
    formats = _formats(arguments)
    locals_ = {d: measure_local(sizes, d, ranks, **formats) for d in arguments.density}
    rows = predict(sizes, network, locals_)
    hosts = transport.hosts()
    return {
        "job": {
            "ranks": ranks,
            "hosts": len(set(hosts)),
            "host names": ", ".join(sorted(set(hosts))),
            "carried by": transport.carrier,
        },
        "network": _collectives(network),
        "model": {"parameters": sum(sizes), "tensors": len(sizes)},
        "predictions": [_told(row, arguments.compute_s) for row in rows],
        "verdict": verdict(rows),
    }


def _told(row: Prediction, compute_s: float | None) -> dict[str, Any]:
    whole = {} if compute_s is None else {"step_s": compute_s + row.seconds}
    return {**row._asdict(), **whole}


def _tensors(arguments: argparse.Namespace, transport: Transport) -> list[int]:
    """Of the model; other hosts need not have the checkpoint: rank 0 reads it."""
    path, sizes, wrong = arguments.checkpoint, None, "rank 0 can not read the model"
    if transport.rank == 0:
        try:
            sizes = tensors_in(path) if path else tensors_of(arguments.parameters)
        except Exception as error:  # whatever it is: the others wait to hear of it
            wrong = _naming(path, error)
    shared = transport.share(sizes)
    if shared is None:
        raise ValueError(wrong)
    return shared


def _collectives(network: Network) -> dict[str, dict[str, Any]]:
    named = {
        "allgather": network.allgather,
        "allreduce": network.allreduce,
        "allreduce fp16": network.allreduce_half,
    }
    return {
        name: {
            "latency_s": collective.latency_s,
            "per_byte_s": collective.per_byte_s,
            **asdict(collective),
        }
        for name, collective in named.items()
    }


def _formats(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "values": VALUES.get(arguments.values),
        "indices": INDICES.get(arguments.indices),
    }


def planned(arguments: argparse.Namespace) -> list[TrafficPlan]:
    """What the model will cost on the wire, of each density.

    Raises:
        ValueError: there is no such model, or its gradients can not be sent.
    """
    ranks = RANKS if arguments.ranks is None else arguments.ranks
    model, formats = _model(arguments), _formats(arguments)
    try:
        return plans(model, arguments.density, ranks=ranks, **formats)
    except TypeError as error:  # weights have dtypes that gradients have not
        raise ValueError(str(error)) from None


def _model(arguments: argparse.Namespace) -> Any:
    path = arguments.checkpoint
    if not path:
        return [(size,) for size in tensors_of(arguments.parameters)]
    try:
        return weights_in(path)
    except Exception as error:  # what reads it may raise anything
        raise ValueError(_naming(path, error)) from error


def _naming(path: Path | None, error: Exception) -> str:
    """What is wrong, and with which file."""
    wrong = str(error)
    return f"{path}: {wrong}" if path and str(path) not in wrong else wrong


def main() -> None:
    """Examine, and report on rank 0; or plan."""
    arguments = parse(sys.argv[1:])
    try:
        if arguments.plan:
            tables = planned(arguments)
            _write(arguments.json, told(tables), text(tables))
            return
        transport = open_door(arguments.door or found_door())
        found = examine(arguments, transport)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"hvd_sparse.doctor: {error}")
    if transport.rank == 0:
        _write(arguments.json, found, report(found))


def _write(file: Path | None, found: dict[str, Any], for_people: str) -> None:
    """To a file as JSON, too; or that alone."""
    if file:
        data = json.dumps(found, indent=1) + "\n"
        if file == STDOUT:
            sys.stdout.write(data)
            return
        file.write_text(data)
    sys.stdout.write(for_people)


if __name__ == "__main__":
    main()
