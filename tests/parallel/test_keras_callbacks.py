"""The callbacks over real MPI, Keras 2 or 3; at any number of ranks."""

import math
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from mpi4py import MPI

import hvd_sparse.tensorflow as sparse
from hvd_sparse import Never, TopK, checkpoint_path

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.Get_rank(), COMM.Get_size()

# TensorFlow's and Keras's own, at import or first use
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

N, BATCH = 40, 8  # images a rank, hence 5 steps an epoch


def perceptron():
    tf.keras.utils.set_random_seed(0)
    layers = [
        tf.keras.layers.Input((6,)),
        tf.keras.layers.Dense(32, activation="tanh"),
        tf.keras.layers.Dense(3),
    ]
    return tf.keras.Sequential(layers)


def compiled(sparsifier=None):
    model = perceptron()
    optimizer = sparse.DistributedOptimizer(
        tf.keras.optimizers.SGD(0.05),
        sparsifier or TopK(0.05),
        comm=COMM,
        dense=Never(),
        timeout_s=20,
    )
    model.compile(optimizer, "mse")
    return model, optimizer


def fit(model, callbacks, epochs, **options):
    rng = np.random.default_rng(RANK)
    x = rng.standard_normal((N, 6)).astype(np.float32)
    options = {"verbose": 0, "shuffle": False, "batch_size": BATCH, **options}
    return model.fit(
        x, np.tanh(x[:, :3]), epochs=epochs, callbacks=callbacks, **options
    )


def bits(model) -> bytes:
    return b"".join(w.tobytes() for w in model.get_weights())


def events_below(folder: Path) -> dict[str, list[float]]:
    """Per tag, the scalars that TensorBoard wrote, in their order."""
    found: dict[str, list[float]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name in ("", "scalars"):
                    number = float(tf.make_ndarray(value.tensor))
                    found.setdefault(value.tag, []).append(number)
    return found


# ---------------------------------------------------------------------------- the logs


@pytest.mark.ranks
def test_history_progress_bar_and_tensorboard_show_what_traffic_counted(
    tmp_path, capsys
):
    model, optimizer = compiled()
    callbacks = [
        sparse.TrafficLogger(optimizer),
        tf.keras.callbacks.TensorBoard(tmp_path, update_freq=1),
    ]
    history = fit(model, callbacks, epochs=2, verbose=1).history
    traffic = optimizer.traffic
    assert traffic.steps == 2 * N // BATCH
    # TopK sends as much in every step, so each epoch has the ratio of the whole
    ratio = pytest.approx(traffic.compression_ratio)
    assert history["compression_ratio"] == [ratio, ratio]
    sent = pytest.approx(traffic.sent_bytes / traffic.steps)
    assert history["sent_bytes_per_step"] == [sent, sent]

    shown = capsys.readouterr().out
    assert f"compression_ratio: {traffic.compression_ratio:.4f}" in shown
    events = events_below(tmp_path)
    rounded = pytest.approx(traffic.compression_ratio, rel=1e-6)  # to float32
    assert events["epoch_compression_ratio"] == [rounded, rounded]
    assert len(events["epoch_sent_bytes_per_step"]) == 2
    assert len(events["batch_compression_ratio"]) == traffic.steps
    optimizer.close()


def test_each_epoch_counts_from_its_own_begin():
    model, optimizer = compiled()
    logger = sparse.TrafficLogger(optimizer)
    fit(model, [], epochs=1)
    optimizer.traffic.overhead_sent_bytes += 10**9  # of earlier, and nobody's ratio
    logs = fit(model, [logger], epochs=1).history
    assert logs["compression_ratio"][0] > 1
    assert optimizer.traffic.compression_ratio < 1
    optimizer.close()


def test_nothing_is_logged_where_nothing_was_sent():
    _, optimizer = compiled()
    logger = sparse.TrafficLogger(optimizer)
    plain = perceptron()
    plain.compile("sgd", "mse")
    assert set(fit(plain, [logger], epochs=1).history) == {"loss"}
    assert math.isnan(optimizer.traffic.compression_ratio)
    optimizer.close()


# ---------------------------------------------------------------------------- residuals


@pytest.mark.ranks
@pytest.mark.parametrize("epochs_in_the_name", [True, False])
def test_a_restart_from_checkpoints_continues_bitwise(tmp_path, epochs_in_the_name):
    weights = tmp_path / "epoch-{epoch}.weights.h5"
    prefix = tmp_path / ("new/epoch-{epoch}" if epochs_in_the_name else "last")

    def callbacks(optimizer):
        return [
            sparse.ResidualCheckpoint(optimizer, prefix),
            tf.keras.callbacks.ModelCheckpoint(str(weights), save_weights_only=True),
        ]

    model, optimizer = compiled()
    fit(model, callbacks(optimizer), epochs=2)
    if not epochs_in_the_name:  # the run ended here, before epoch 3 replaced the file
        files = {path: path.read_bytes() for path in tmp_path.glob("last.*")}
    fit(model, callbacks(optimizer)[:1], epochs=4, initial_epoch=2)
    expected = bits(model)
    optimizer.close()
    if not epochs_in_the_name:
        for path, content in files.items():
            path.write_bytes(content)

    model, optimizer = compiled()
    model.load_weights(str(weights).format(epoch=2))
    fit(model, callbacks(optimizer), epochs=4, initial_epoch=2)
    assert bits(model) == expected
    assert optimizer.traffic.steps == 4 * N // BATCH
    optimizer.close()

    # and the residuals are what made it so
    model, optimizer = compiled()
    model.load_weights(str(weights).format(epoch=2))
    fit(model, [], epochs=4, initial_epoch=2)
    assert bits(model) != expected
    optimizer.close()


class FailsIn(tf.keras.callbacks.Callback):
    """As if the job were killed."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise RuntimeError("killed")


@pytest.mark.ranks
def test_a_run_that_was_killed_continues_bitwise_with_backup_and_restore(tmp_path):
    model, optimizer = compiled()
    fit(model, [], epochs=4)
    expected = bits(model)
    optimizer.close()

    def start(*more):
        model, optimizer = compiled()
        backup = tf.keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
        residuals = sparse.ResidualCheckpoint(optimizer, tmp_path / "{epoch}")
        try:
            fit(model, [*more, residuals, backup], epochs=4)
        finally:
            optimizer.close()
        return model, optimizer

    with pytest.raises(RuntimeError, match="killed"):
        start(FailsIn(2))
    model, optimizer = start()
    assert bits(model) == expected
    assert optimizer.traffic.steps == 4 * N // BATCH


def test_a_fit_that_starts_at_epoch_0_restores_nothing(tmp_path):
    results = []
    for _ in range(2):
        model, optimizer = compiled()
        fit(model, [sparse.ResidualCheckpoint(optimizer, tmp_path / "last")], epochs=1)
        results.append(bits(model))
        optimizer.close()
    assert results[0] == results[1]


def test_a_tape_in_a_train_step_can_be_saved_too(tmp_path):
    tape = sparse.DistributedGradientTape(
        tf.GradientTape(), TopK(0.25), comm=COMM, dense=Never(), timeout_s=20
    )
    weights = tf.Variable(tf.zeros(16))
    with tape:
        loss = tf.reduce_sum(weights * np.arange(16, dtype=np.float32))
    tape.gradient(loss, weights)
    checkpoint = sparse.ResidualCheckpoint(tape, tmp_path / "tape")
    checkpoint.save(1)
    saved = tape.state_dict()["tensors"]["Variable"]["residual"].numpy()
    assert saved.any()
    with tape:
        loss = tf.reduce_sum(weights * 1.0)
    tape.gradient(loss, weights)
    checkpoint.restore(1)
    restored = tape.state_dict()["tensors"]["Variable"]["residual"].numpy()
    np.testing.assert_array_equal(restored, saved)
    tape.close()


@pytest.mark.ranks
def test_another_number_of_ranks_is_an_error_that_says_so(tmp_path):
    model, optimizer = compiled()
    fit(model, [sparse.ResidualCheckpoint(optimizer, tmp_path / "last")], epochs=1)
    for size in (SIZE + 1, SIZE + 2):
        for rank in range(size):
            Path(checkpoint_path(tmp_path / "last", rank, size)).touch()
    Path(checkpoint_path(tmp_path / "last", RANK, SIZE)).unlink()
    checkpoint = sparse.ResidualCheckpoint(optimizer, tmp_path / "last")
    sizes = f"by {SIZE + 1} and {SIZE + 2} ranks, expected {SIZE}"
    with pytest.raises(ValueError, match=sizes):
        fit(model, [checkpoint], epochs=2, initial_epoch=1)
    optimizer.close()


def test_bad_checkpoints_are_refused_by_name(tmp_path):
    _, optimizer = compiled()
    checkpoint = sparse.ResidualCheckpoint(optimizer, tmp_path / "last")
    with pytest.raises(FileNotFoundError, match=f"last.residuals-{RANK}-of-{SIZE}"):
        checkpoint.restore(1)
    checkpoint.save(3)
    assert [path.name for path in tmp_path.iterdir()] == [
        f"last.residuals-{RANK}-of-{SIZE}"  # and nothing half-written
    ]
    with pytest.raises(ValueError, match="those of epoch 3, expected 2"):
        checkpoint.restore(2)
    _, other = compiled(TopK(0.5))
    with pytest.raises(ValueError, match="saved with configuration TopK"):
        sparse.ResidualCheckpoint(other, tmp_path / "last").restore(3)
    path = Path(checkpoint_path(tmp_path / "last", RANK, SIZE))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="holds no residuals"):
        checkpoint.restore(3)
    optimizer.close()
    other.close()


def test_a_save_that_fails_leaves_the_last_one_whole(tmp_path, monkeypatch):
    _, optimizer = compiled()
    checkpoint = sparse.ResidualCheckpoint(optimizer, tmp_path / "last")
    checkpoint.save(1)

    def full(*args):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            checkpoint.save(2)
    assert len(list(tmp_path.iterdir())) == 1
    checkpoint.restore(1)
    optimizer.close()


def test_bad_arguments_are_refused_by_name():
    for callback in (sparse.TrafficLogger, lambda h: sparse.ResidualCheckpoint(h, "x")):
        with pytest.raises(TypeError, match="holder must be a SparseCompressor, or"):
            callback(tf.keras.optimizers.SGD())
    _, optimizer = compiled()
    with pytest.raises(ValueError, match="prefix can have the field"):
        sparse.ResidualCheckpoint(optimizer, "run/{loss}")
    optimizer.close()
