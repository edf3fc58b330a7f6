"""What a small tensor costs the processor: microseconds of a step beside the elements.

    python benchmarks/per_tensor.py                       # over plain MPI, 1 minute
    launch/horovodrun.sh -n 2 benchmarks/per_tensor.py    # Horovod, PyTorch
    launch/horovodrun.sh -n 2 benchmarks/per_tensor.py --tensorflow
    python benchmarks/per_tensor.py --json FILE

A model of 161 float32 tensors of 512 elements each, TopK at 1 %, all of them sparse: a
step is 1,610 entries, so that what it takes is what surrounds them. Processor time, in
which waiting for peers does not count; over plain MPI on MPI.COMM_SELF. Gradients are
renewed between steps, outside of the time. Beside it, one addition to each tensor in a
loop of Python, which is what a word about each of them costs at best.

Under Horovod a step is `synchronize()` with all gradients ready at once, in the thread
that calls it; the row without a compression is what Horovod takes for itself. With
TensorFlow it is a tape's gradients in a tf.function, and beside it the same graph in
which both Python functions of each tensor do nothing: what TensorFlow and Horovod take.

Fails where a row takes more than its limit.
"""

import argparse
import json
import os
import statistics
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("OMPI_MCA_ess_singleton_isolated", "1")  # no mpirun

import numpy as np
import torch

import hvd_sparse.torch
from hvd_sparse import Never, TopK

TENSORS, ELEMENTS, DENSITY = 161, 512, 0.01
STEADY, ROUNDS = 20, 81


class Numpy:
    name, limit = "NumPy, plain MPI", 30

    def __init__(self):
        from mpi4py import MPI

        import hvd_sparse.mpi

        self.reduce = hvd_sparse.mpi.SparseAllreduce(
            TopK(DENSITY), comm=MPI.COMM_SELF, dense=Never()
        )
        self.gradients = {
            f"layer{i}.weight": np.empty(ELEMENTS, np.float32) for i in range(TENSORS)
        }

    def renew(self, values):
        for gradient, value in zip(self.gradients.values(), values, strict=True):
            gradient[:] = value

    def step(self):
        self.reduce.grouped_allreduce(self.gradients, self.gradients)


class Torch:
    name, limit = "PyTorch, plain MPI", 30

    def __init__(self):
        self.parameters = [
            torch.nn.Parameter(torch.zeros(ELEMENTS)) for _ in range(TENSORS)
        ]
        for parameter in self.parameters:
            parameter.grad = torch.empty(ELEMENTS)
        self.optimizer = self.distribute(torch.optim.SGD(self.parameters, lr=0.0))

    def distribute(self, optimizer):
        from mpi4py import MPI

        return hvd_sparse.torch.DistributedOptimizer(
            optimizer, TopK(DENSITY), comm=MPI.COMM_SELF, dense=Never()
        )

    def renew(self, values):
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.grad.copy_(torch.from_numpy(value))

    def step(self):
        self.optimizer.synchronize()


class Addition(Torch):
    name, limit = "torch.add_, in a loop", None

    def distribute(self, optimizer):
        self.totals = [torch.zeros(ELEMENTS) for _ in range(TENSORS)]
        return optimizer

    def step(self):
        for total, parameter in zip(self.totals, self.parameters, strict=True):
            total.add_(parameter.grad)


class Stock(Torch):
    name, limit = "Horovod, no compression", None

    def compression(self, hvd):
        return hvd.Compression.none

    def distribute(self, optimizer):
        import horovod.torch as hvd

        names = [(f"{self.name}.{i}", p) for i, p in enumerate(self.parameters)]
        return hvd.DistributedOptimizer(
            optimizer, named_parameters=names, compression=self.compression(hvd)
        )

    def step(self):
        super().step()
        self.optimizer._synchronized = False  # as after step(), which is not timed


class Horovod(Stock):
    name, limit = "Horovod, SparseCompressor", 60

    def compression(self, hvd):
        del hvd
        return hvd_sparse.torch.SparseCompressor(TopK(DENSITY), dense=Never())


class TensorFlow:
    name, limit = "TensorFlow, plain MPI", 80

    def distribute(self, tape):
        from mpi4py import MPI

        import hvd_sparse.tensorflow

        return hvd_sparse.tensorflow.DistributedGradientTape(
            tape, TopK(DENSITY), comm=MPI.COMM_SELF, dense=Never()
        )

    def __init__(self):
        import tensorflow as tf

        self.constant = tf.constant
        tape = self.distribute(tf.GradientTape())
        variables = [tf.Variable(tf.zeros(ELEMENTS)) for _ in range(TENSORS)]

        @tf.function
        def exchange(gradients):
            with tape:
                same = [tf.identity(variable) for variable in variables]
            return tape.gradient(same, variables, output_gradients=gradients)

        self.exchange = exchange

    def renew(self, values):
        self.gradients = [self.constant(value) for value in values]

    def step(self):
        self.exchange(self.gradients)


class EmptyFunctions(TensorFlow):
    name, limit = "Horovod, empty functions", None

    def compression(self):
        return DoesNothing

    def distribute(self, tape):
        import horovod.tensorflow as hvd

        return hvd.DistributedGradientTape(tape, compression=self.compression())


class HorovodTensorFlow(EmptyFunctions):
    name, limit = "Horovod, SparseCompressor", 1.5  # times the row above

    def compression(self):
        import hvd_sparse.tensorflow

        return hvd_sparse.tensorflow.SparseCompressor(TopK(DENSITY), dense=Never())


class DoesNothing:
    """A compression of the same operations, without what is done in them."""

    payload = np.zeros(80, np.uint8)
    result = np.zeros(ELEMENTS, np.float32)

    @classmethod
    def compress(cls, tensor):
        import horovod.tensorflow as hvd
        import tensorflow as tf

        payload = tf.numpy_function(lambda _: cls.payload, [tensor], tf.uint8)
        payload.set_shape([None])
        gathered = hvd.allgather(payload, name=f"empty.{tensor.name}".replace(":", "_"))
        return tf.cast(payload[:1], tf.float32), gathered

    @classmethod
    def decompress(cls, tensor, gathered):
        import tensorflow as tf

        del tensor
        result = tf.numpy_function(lambda _: cls.result, [gathered], tf.float32)
        result.set_shape([ELEMENTS])
        return result


def microseconds(doors):
    """Of processor time, per step and tensor: the median, by name."""
    random = np.random.default_rng(0)
    seconds = {door.name: [] for door in doors}
    for number in range(STEADY + ROUNDS):
        values = random.standard_normal((TENSORS, ELEMENTS), np.float32)
        for door in doors:
            # TensorFlow computes in threads of its own, Horovod waits in its
            now = time.thread_time if isinstance(door, Torch) else time.process_time
            door.renew(values)
            start = now()
            door.step()
            if number >= STEADY:
                seconds[door.name].append(now() - start)
    return {n: 1e6 * statistics.median(each) / TENSORS for n, each in seconds.items()}


def under_horovod():
    return any(name in os.environ for name in ("HOROVOD_RANK", "HOROVOD_SIZE"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument(
        "--tensorflow", action="store_true", help="under Horovod: not PyTorch"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kinds, rank = [Numpy, Torch, TensorFlow, Addition], 0
    if under_horovod() and arguments.tensorflow:
        import horovod.tensorflow as hvd

        hvd.init()
        kinds, rank = [EmptyFunctions, HorovodTensorFlow], hvd.rank()
    elif under_horovod():
        import horovod.torch as hvd

        hvd.init()
        kinds, rank = [Stock, Horovod, Addition], hvd.rank()
    limits = {kind.name: kind.limit for kind in kinds}
    figures = microseconds([kind() for kind in kinds])
    if HorovodTensorFlow in kinds:
        limits[HorovodTensorFlow.name] *= figures[EmptyFunctions.name]
    missed = [n for n, limit in limits.items() if limit and figures[n] > limit]
    if rank == 0:
        print(f"{TENSORS} tensors of {ELEMENTS} float32, us of processor time a tensor")
        for name, figure in figures.items():
            limit = f" (at most {limits[name]:.0f})" if limits[name] else ""
            print(f"{name:26} {figure:6.1f}{limit}")
        print(f"FAIL: {', '.join(missed)}" if missed else "PASS")
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(figures, file)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
