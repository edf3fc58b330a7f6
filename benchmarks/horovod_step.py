"""A step of an unmodified Horovod: stock compressions against SparseCompressor.

    horovodrun -np 2 --gloo python benchmarks/horovod_step.py     # about 3 minutes
    mpirun -np 2 python benchmarks/horovod_step.py --json FILE
    horovodrun -np 2 python benchmarks/horovod_step.py --quick    # a check

The 161 parameters of ResNet-50, in hvd.DistributedOptimizer. A step is its
`synchronize()` with all gradients ready at once: from the first `compress` to the last
`decompress`, no backward pass. Optimizers take turns, on steady residuals; of each step
the slower rank counts.

Fails if density 0.1 % takes more than 0.35 of the stock dense step, or if Horovod
negotiates any tensor of a fixed density anew instead of taking its response from its
cache. The latter is counted in Horovod's timeline, by a run of its own: the thread that
writes the timeline spins, which would change the times.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter

os.environ.setdefault("OMP_NUM_THREADS", "1")
# of 1,024 tensors unless told, which is less than all variants together have
os.environ.setdefault("HOROVOD_CACHE_CAPACITY", "8192")

import horovod.torch as hvd
import resnet50
import torch
from torch import nn

import hvd_sparse.torch as sparse

STOCK, JUDGED, TARGET = "none", "TopK 0.1 %", 0.35
GIGABIT = sparse.Affine(per_byte=8e-9, per_message=2e-6)  # seconds, shared by a batch
RAW = {"indices": sparse.RawIndices()}  # int32 and float32, to compare with
SPARSIFIERS = {
    "TopK 1 %": (sparse.TopK(0.01), {}),
    "1 %, int32": (sparse.TopK(0.01), RAW),
    JUDGED: (sparse.TopK(0.001), {}),
    "0.1 %, int32": (sparse.TopK(0.001), RAW),
    "0.1 %, halves": (sparse.TopK(0.001), {"values": sparse.Float16()}),
    "CAT": (sparse.CAT(sparse.TopK(), GIGABIT), {}),
}
FIXED = tuple(SPARSIFIERS)[:-1]  # CAT's sizes change from step to step
COMPRESSIONS = (STOCK, "fp16", *SPARSIFIERS)
TRACED = 5  # steps of each in the timeline


class Gradients:
    """Other gradients in every step, by reading the same noise from elsewhere."""

    SPAN = 1 << 20

    def __init__(self):
        self.parameters = [nn.Parameter(torch.zeros(s)) for s in resnet50.shapes()]
        self.elements = sum(p.numel() for p in self.parameters)
        generator = torch.Generator().manual_seed(hvd.rank())
        self.noise = torch.randn(self.elements + self.SPAN, generator=generator)
        self.step = 0
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)

    def renew(self):
        self.step += 1
        at = self.step * 7919 % self.SPAN
        for parameter in self.parameters:
            noise = self.noise[at : at + parameter.numel()]
            parameter.grad.copy_(noise.view_as(parameter))
            at += parameter.numel()


class Variant:
    """An optimizer over the parameters, which all variants share."""

    def __init__(self, compression, gradients):
        self.compression = compression
        self.gradients = gradients
        # Horovod knows tensors by their names, so those of variants differ
        self.prefix = f"variant{COMPRESSIONS.index(compression)}."
        named = [
            (f"{self.prefix}{number:03}", parameter)
            for number, parameter in enumerate(gradients.parameters)
        ]
        if compression in SPARSIFIERS:
            sparsifier, formats = SPARSIFIERS[compression]
            self.compressor = sparse.SparseCompressor(
                sparsifier, named_parameters=named, **formats
            )
        else:
            self.compressor = getattr(hvd.Compression, compression)
        self.optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(gradients.parameters, lr=0.0),
            named_parameters=named,
            compression=self.compressor,
        )

    def step(self):
        """Seconds of one step on this rank."""
        self.gradients.renew()
        hvd.barrier()
        start = time.perf_counter()
        self.optimizer.synchronize()
        return time.perf_counter() - start

    def bytes_per_step(self):
        """What this rank hands to collectives."""
        if self.compression in SPARSIFIERS:
            traffic = self.compressor.traffic
            return traffic.sent_bytes / traffic.steps
        itemsize = 2 if self.compression == "fp16" else 4
        return itemsize * self.gradients.elements


# ------------------------------------------------------------------------------ time


def measure(rounds, quick):
    gradients = Gradients()
    variants = [Variant(compression, gradients) for compression in COMPRESSIONS]
    for variant in variants:
        steady = 300 if variant.compression in SPARSIFIERS else 5
        for _ in range(20 if quick else steady):
            variant.step()
    mine = [[variant.step() for variant in variants] for _ in range(rounds)]
    everyone = hvd.allgather(torch.tensor([mine]), name="seconds")
    slowest = everyone.amax(0).T.tolist()
    dense = statistics.median(slowest[0])
    return [
        {
            "compression": variant.compression,
            "ms": 1e3 * statistics.median(seconds),
            "ratio": statistics.median(seconds) / dense,
            "bytes": variant.bytes_per_step(),
        }
        for variant, seconds in zip(variants, slowest, strict=True)
    ]


# ---------------------------------------------------------------------- cache misses


def trace(file):
    """Steady steps in Horovod's timeline; counts misses into the file."""
    gradients = Gradients()
    variants = [Variant(compression, gradients) for compression in COMPRESSIONS]
    for variant in variants * 3:  # by then the cache has all
        variant.step()
    with tempfile.NamedTemporaryFile() as timeline:
        hvd.start_timeline(timeline.name)
        for variant in variants * TRACED:
            variant.step()
        hvd.allreduce(torch.zeros(1), name="never seen")
        hvd.stop_timeline()
        if hvd.rank() == 0:  # the coordinator, who writes it
            with open(file, "w") as out:
                json.dump(misses_in(timeline.name, variants), out)


def misses_in(timeline, variants):
    """Per compression, how often a rank announced one of its tensors.

    A rank announces a tensor, an event of phase X, if there is no response in its
    cache. Otherwise it only sets a bit.
    """
    with open(timeline) as file:
        events = json.load(file)
    names = {
        event["pid"]: event["args"]["name"]
        for event in events
        if event.get("name") == "process_name" and "name" in event["args"]
    }
    announced = Counter(names[e["pid"]] for e in events if e["ph"] == "X")
    assert announced["allreduce.never seen"] == hvd.size(), "misses do not show"
    misses = {}
    for variant in variants:
        own = {name for name in names.values() if variant.prefix in name}
        assert len(own) >= len(variant.gradients.parameters), "tensors do not show"
        misses[variant.compression] = sum(announced[name] for name in own)
    return misses


def count_misses(ranks):
    """The same in a job of its own, over Gloo; the cache is that of any transport."""
    launcher = os.path.join(os.path.dirname(sys.executable), "horovodrun")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HOROVOD_", "OMPI_", "PMIX_"))  # of this job
    }
    with tempfile.NamedTemporaryFile() as file:
        command = [launcher, "-np", str(ranks), "--gloo", sys.executable, __file__]
        subprocess.run(
            [*command, "--trace", file.name],
            env={**environment, "HOROVOD_TIMELINE": "DYNAMIC"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return json.load(file)


# ---------------------------------------------------------------------------- report


def report(rows, ranks, arguments):
    """Prints, and returns whether all is well."""
    print(f"{ranks} ranks, {len(resnet50.shapes())} tensors of ResNet-50, each step")
    for row in rows:
        print(
            f"{row['compression']:13} {row['ms']:7.1f} ms, {row['ratio']:.2f} of stock "
            f"dense, {row['bytes']:11,.0f} bytes sent",
            flush=True,
        )
    misses = count_misses(ranks)
    print(f"cache misses in {TRACED} steps: {misses}")
    for row in rows:
        row["misses"] = misses[row["compression"]]
    ratio = next(row["ratio"] for row in rows if row["compression"] == JUDGED)
    missed = sum(misses[compression] for compression in FIXED)
    passed = ratio <= TARGET and missed == 0
    print(
        f"{'PASS' if passed else 'FAIL'}: {JUDGED} takes {ratio:.2f} of stock dense, "
        f"at most {TARGET}; {missed} cache misses, at most 0"
    )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file)
    return passed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    parser.add_argument("--trace", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    hvd.init()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rank, ranks = hvd.rank(), hvd.size()
    if arguments.trace:
        trace(arguments.trace)
        return
    rows = measure(10 if arguments.quick else 40, arguments.quick)
    hvd.shutdown()
    if rank == 0:
        sys.exit(not report(rows, ranks, arguments))


if __name__ == "__main__":
    main()
