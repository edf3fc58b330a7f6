"""How many bytes a rank hands to collectives in a step, by door and format.

    launch/mpirun.sh -n 2 benchmarks/volume.py --door mpi
    launch/horovodrun.sh -n 2 benchmarks/volume.py --door horovod
    launch/horovodrun.sh -n 2 benchmarks/volume.py --door tensorflow

Counted in real steps, everything included: headers, padding, dummies of Horovod,
tensors that go dense. The first step is not counted: some doors agree on names in it.
Models are ResNet-50 and the language model of examples/, dense in float32.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import resnet50

import hvd_sparse as sparse
from hvd_sparse.core.traffic import Traffic
from hvd_sparse.core.values import Values

Shapes = Sequence[tuple[int, ...]]
Step = Callable[[], Traffic]

VALUES = (sparse.Float32(), sparse.Float16(), sparse.Int4(), sparse.Sign())
STEPS = 3


def language_model() -> Shapes:
    """Of the trainable parameters of examples/torch_language_model.py."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from torch_language_model import Transformer

    return [tuple(p.shape) for p in Transformer().parameters() if p.requires_grad]


MODELS: dict[str, Callable[[], Shapes]] = {
    "ResNet-50": resnet50.shapes,
    "language model": language_model,
}


def gradients(shapes: Shapes) -> dict[str, np.ndarray]:
    """Noise, by names that sort."""
    rng = np.random.default_rng(0)
    return {
        f"{i:03}": rng.standard_normal(shape, np.float32)
        for i, shape in enumerate(shapes)
    }


def over_mpi(shapes: Shapes, sparsifier: sparse.TopK, values: Values) -> Step:
    """NumPy arrays over MPI."""
    reduce = sparse.mpi.SparseAllreduce(sparsifier, values=values)
    given = gradients(shapes)

    def step() -> Traffic:
        reduce.grouped_allreduce(given, given)
        for name, shape in zip(given, shapes, strict=True):
            given[name] = np.ones(shape, np.float32)
        return reduce.traffic

    return step


def over_horovod(shapes: Shapes, sparsifier: sparse.TopK, values: Values) -> Step:
    """PyTorch under Horovod."""
    import horovod.torch as hvd
    import torch

    hvd.init()
    tensors = {
        f"{values}{n}": torch.nn.Parameter(torch.from_numpy(g))
        for n, g in gradients(shapes).items()
    }
    compression = sparse.torch.SparseCompressor(
        sparsifier, named_parameters=tensors.items(), values=values
    )
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(tensors.values(), lr=0.0),
        named_parameters=tensors.items(),
        compression=compression,
    )

    def step() -> Traffic:
        sum((tensor * tensor).sum() for tensor in tensors.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return compression.traffic

    return step


def over_tensorflow(shapes: Shapes, sparsifier: sparse.TopK, values: Values) -> Step:
    """TensorFlow under Horovod."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()
    variables = [tf.Variable(g) for g in gradients(shapes).values()]
    compression = sparse.tensorflow.SparseCompressor(
        sparsifier, values=values, prefix=type(values).__name__
    )

    @tf.function
    def once() -> None:
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(v * v) for v in variables])
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        for variable, gradient in zip(
            variables, tape.gradient(loss, variables), strict=True
        ):
            variable.assign_sub(1e-3 * gradient)

    def step() -> Traffic:
        once()
        return compression.traffic

    return step


DOORS = {"mpi": over_mpi, "horovod": over_horovod, "tensorflow": over_tensorflow}


def measured(step: Step) -> float:
    """Bytes that this rank sends in a step, after the first."""
    before = step().sent_bytes
    for _ in range(STEPS):
        traffic = step()
    return (traffic.sent_bytes - before) / STEPS


def main() -> None:
    """A table, by the first rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--door", choices=DOORS, required=True)
    parser.add_argument("--density", type=float, default=0.001)
    arguments = parser.parse_args()
    rows = []
    for model, shapes_of in MODELS.items():
        shapes = shapes_of()
        dense = 4 * sum(map(math.prod, shapes))
        for values in VALUES:
            sparsifier = sparse.TopK(arguments.density)
            sent = measured(DOORS[arguments.door](shapes, sparsifier, values))
            rows.append((model, type(values).__name__, dense, sent))
    if rank() == 0:
        print(f"{arguments.door}, TopK at {arguments.density:.1%}, EliasFano")
        for model, name, dense, sent in rows:
            told = f"{dense:12,.0f} dense {sent:10,.0f} sent {dense / sent:8,.0f} x"
            print(f"{model:15} {name:8} {told}")


def rank() -> int:
    """Of this process, whatever launched it."""
    import os

    names = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK")
    return next((int(os.environ[n]) for n in names if n in os.environ), 0)


if __name__ == "__main__":
    main()
