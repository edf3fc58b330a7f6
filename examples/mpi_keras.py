"""model.fit over plain MPI, dense and sparse side by side; Keras 2 or 3.

mpirun -np 2 python examples/mpi_keras.py --density 0.01
"""

from keras_digits import (
    BATCH,
    Outcome,
    Split,
    arguments,
    network,
    part_of,
    read_digits,
    report,
    sgd,
)
from mpi4py import MPI

import hvd_sparse.tensorflow as sparse  # hvd_sparse: the door for TensorFlow


def train(split: Split, density: float, epochs: int, comm: MPI.Comm) -> Outcome:
    """Train a new model; at density 1 every gradient takes MPI's own allreduce."""
    model = network()
    # hvd_sparse: every rank starts from rank 0's variables
    sparse.broadcast_variables(model.variables, root=0, comm=comm)
    # hvd_sparse: wrap the optimizer
    optimizer = sparse.DistributedOptimizer(
        sgd(len(split[0]), epochs), sparse.TopK(density=density), comm=comm
    )
    # hvd_sparse: if you like, the compression ratio in the logs
    callbacks = [sparse.TrafficLogger(optimizer)]
    model.compile(optimizer, "sparse_categorical_crossentropy")
    logs = model.fit(
        *split, batch_size=BATCH, epochs=epochs, callbacks=callbacks, verbose=0
    ).history
    optimizer.close()
    return Outcome(model, logs["loss"][-1], logs["sent_bytes_per_step"][-1])


def main() -> None:
    args = arguments(__doc__)
    comm = MPI.COMM_WORLD
    train_split, test_split = read_digits()
    part = part_of(train_split, comm.rank, comm.size)
    dense, thin = (train(part, d, args.epochs, comm) for d in (1.0, args.density))
    if comm.rank == 0:
        report(dense, thin, test_split, args.density)


if __name__ == "__main__":
    main()
