"""Logistic regression on real data, with numpy and mpi4py: no framework.

mpirun -np 2 python examples/mpi_logistic_regression.py --density 0.1
"""

import argparse

import numpy as np
from mpi4py import MPI
from sklearn.datasets import load_digits

import hvd_sparse.mpi  # hvd_sparse: the door for numpy


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--density", type=float, default=0.01, help="in (0, 1]")
    parser.add_argument("--dense", action="store_true", help="stock dense allreduce")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=0.5)
    args = parser.parse_args()

    comm = MPI.COMM_WORLD
    digits = load_digits()
    images = (digits.data / 16).astype(np.float32)  # (1797, 64)
    classes = np.eye(10, dtype=np.float32)[digits.target]  # (1797, 10)
    mine = slice(comm.rank, None, comm.size)  # this rank's share of the data
    weight = np.zeros((64, 10), dtype=np.float32)

    # hvd_sparse: sums what the ranks send, keeps what they do not
    reduce = hvd_sparse.mpi.SparseAllreduce(
        hvd_sparse.TopK(density=args.density), comm=comm
    )
    for _ in range(args.steps):
        errors = softmax(images[mine] @ weight) - classes[mine]
        gradient = images[mine].T @ errors / len(errors)
        if args.dense:
            mean = comm.allreduce(gradient) / comm.size
        else:
            # hvd_sparse: in place of comm.allreduce(gradient) / comm.size
            mean = reduce.allreduce("weight", gradient)
        weight -= args.lr * mean

    chances = softmax(images @ weight)
    loss = -np.log((chances * classes).sum(axis=1)).mean()
    accuracy = (chances.argmax(axis=1) == digits.target).mean()
    ratio = 1.0 if args.dense else reduce.traffic.compression_ratio
    reduce.close()  # hvd_sparse: frees its communicator
    if comm.rank == 0:
        print(f"loss               {loss:.4f} after {args.steps} steps")
        print(f"accuracy           {accuracy:.2%}")
        print(f"compression ratio  {ratio:.1f}")


if __name__ == "__main__":
    main()
