"""The host time of a step: TensorFlow's door against PyTorch's, over plain MPI.

    python benchmarks/tensorflow_step.py           # 25.6 M elements; about 2 minutes
    python benchmarks/tensorflow_step.py --quick   # a check

One float32 gradient, TopK at 0.1 %, on MPI.COMM_SELF: the whole path of a step, with no
peer to wait for. PyTorch's is `optimizer.synchronize()` on `p.grad`. TensorFlow's is a
tf.function with a DistributedGradientTape around an identity, so that nothing but the
exchange is left in the graph. The two take turns, on the same gradients and on steady
residuals. torch.add_, once over the gradient, is what the machine could do at best.

Fails if TensorFlow takes more than 2 times as long as PyTorch.
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

import tensorflow as tf
import torch
from mpi4py import MPI

import hvd_sparse.tensorflow
import hvd_sparse.torch
from hvd_sparse import Never, TopK

ELEMENTS, TARGET = 25_600_000, 2.0
SPAN = 1 << 20
OPTIONS = {"comm": MPI.COMM_SELF, "dense": Never()}


class Torch:
    name = "PyTorch, synchronize()"

    def __init__(self, density):
        self.parameter = torch.nn.Parameter(torch.zeros(ELEMENTS))
        self.parameter.grad = torch.empty(ELEMENTS)
        self.optimizer = hvd_sparse.torch.DistributedOptimizer(
            torch.optim.SGD([self.parameter], lr=0.0), TopK(density), **OPTIONS
        )

    def renew(self, gradient):
        self.parameter.grad.copy_(gradient)

    def step(self):
        self.optimizer.synchronize()


class TensorFlow:
    name = "TensorFlow, tf.function"

    def __init__(self, density):
        tape = hvd_sparse.tensorflow.DistributedGradientTape(
            tf.GradientTape(), TopK(density), **OPTIONS
        )
        weights = tf.Variable(tf.zeros(ELEMENTS))

        @tf.function
        def exchange(gradient):
            with tape:
                same = tf.identity(weights)
            return tape.gradient(same, weights, output_gradients=gradient)

        self.exchange = exchange

    def renew(self, gradient):
        self.gradient = self.result = None
        self.gradient = tf.constant(gradient.numpy())

    def step(self):
        self.result = self.exchange(self.gradient)


class Addition:
    name = "torch.add_"

    def __init__(self, density):
        self.total = torch.zeros(ELEMENTS)

    def renew(self, gradient):
        self.gradient = gradient.clone()

    def step(self):
        self.total.add_(self.gradient)


def gradients():
    """Another one in every step, by reading the same noise from elsewhere."""
    noise = torch.randn(ELEMENTS + SPAN, generator=torch.Generator().manual_seed(0))
    step = 0
    while True:
        step += 1
        at = step * 7919 % SPAN
        yield noise[at : at + ELEMENTS]


def measure(density, steady, rounds):
    """Milliseconds per step, the median, by name."""
    doors = [door(density) for door in (Torch, TensorFlow, Addition)]
    seconds = {door.name: [] for door in doors}
    for number, gradient in zip(range(steady + rounds), gradients(), strict=False):
        for door in doors:
            door.renew(gradient)
            start = time.perf_counter()
            door.step()
            if number >= steady:
                seconds[door.name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(each) for name, each in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--density", type=float, default=0.001)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steady, rounds = (20, 11) if arguments.quick else (200, 41)
    figures = measure(arguments.density, steady, rounds)
    ratio = figures[TensorFlow.name] / figures[Torch.name]
    print(f"{ELEMENTS:,} float32, TopK({arguments.density:g}), medians of {rounds}")
    for name, milliseconds in figures.items():
        print(f"{name:24} {milliseconds:7.1f} ms")
    passed = ratio <= TARGET
    print(f"{'PASS' if passed else 'FAIL'}: {ratio:.2f} times, at most {TARGET:g}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({**figures, "ratio": ratio}, file)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
