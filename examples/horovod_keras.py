"""model.fit under an unmodified Horovod, dense and sparse side by side.

horovodrun -np 2 python examples/horovod_keras.py --density 0.01
"""

import horovod.tensorflow.keras as hvd
from keras_digits import (
    BATCH,
    Outcome,
    Split,
    arguments,
    dense_bytes,
    network,
    part_of,
    read_digits,
    report,
    sgd,
)

import hvd_sparse.tensorflow as sparse  # hvd_sparse: the door for TensorFlow


def train(split: Split, density: float | None, epochs: int) -> Outcome:
    """Train a new model, dense where ``density`` is None."""
    model = network()
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
    compression = hvd.Compression.none
    if density is not None:
        # hvd_sparse: choose what is worth sending of each gradient
        compression = sparse.SparseCompressor(sparse.TopK(density=density))
        # hvd_sparse: if you like, the compression ratio in the logs
        callbacks.append(sparse.TrafficLogger(compression))
    optimizer = hvd.DistributedOptimizer(
        sgd(len(split[0]), epochs),
        compression=compression,  # hvd_sparse: hand it to Horovod
    )
    model.compile(optimizer, "sparse_categorical_crossentropy")
    logs = model.fit(
        *split, batch_size=BATCH, epochs=epochs, callbacks=callbacks, verbose=0
    ).history
    sent = logs.get("sent_bytes_per_step", [dense_bytes(model)])
    return Outcome(model, logs["loss"][-1], sent[-1])


def main() -> None:
    args = arguments(__doc__)
    hvd.init()
    train_split, test_split = read_digits()
    part = part_of(train_split, hvd.rank(), hvd.size())
    dense, thin = (train(part, d, args.epochs) for d in (None, args.density))
    if hvd.rank() == 0:
        report(dense, thin, test_split, args.density)


if __name__ == "__main__":
    main()
