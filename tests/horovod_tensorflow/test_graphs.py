"""What a graph runs at every step, under Horovod and Keras; 2 ranks or more."""

import json
from collections import Counter

import horovod.keras
import horovod.tensorflow as hvd
import horovod.tensorflow.keras as hvd_keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_sparse.tensorflow as sparse
from hvd_sparse import Never, RandomK, TopK, WhenCheaper

# Keras 2's own, where it draws a seed
pytestmark = pytest.mark.filterwarnings("ignore:non-integer arguments to randrange")

STEPS, BATCH = 24, 4


@pytest.fixture(autouse=True)
def apart():
    tf.keras.backend.clear_session()
    yield
    hvd.allgather_object(0)  # no rank is still in this test when names are used again


def compressor(sparsifier=None, **options):
    options = {"dense": Never(), "timeout_s": 60, **options}
    return sparse.SparseCompressor(sparsifier or TopK(0.05), **options)


def perceptron():
    tf.keras.utils.set_random_seed(0)
    layers = [
        tf.keras.layers.Input((6,)),
        tf.keras.layers.Dense(32, activation="tanh"),
        tf.keras.layers.Dense(3),
    ]
    return tf.keras.Sequential(layers)


def compiled(compression, model=None, **options):
    model = model or perceptron()
    optimizer = hvd_keras.DistributedOptimizer(
        tf.keras.optimizers.SGD(0.05), compression=compression, **options
    )
    model.compile(optimizer, "mse")
    return model


def fit(model, *callbacks, epochs=1, **options):
    rng = np.random.default_rng(hvd.rank())
    x = rng.standard_normal((STEPS * BATCH, 6)).astype(np.float32)
    options = {"batch_size": BATCH, "verbose": 0, "shuffle": False, **options}
    y = np.tanh(x[:, :3])
    return model.fit(x, y, epochs=epochs, callbacks=list(callbacks), **options)


def bits(model) -> bytes:
    return b"".join(w.tobytes() for w in model.get_weights())


def same(one, other) -> bool:
    """Bitwise at 2 ranks; above, Horovod's own sum is in no order of ranks."""
    if hvd.size() == 2:
        return bits(one) == bits(other)
    pairs = zip(one.get_weights(), other.get_weights(), strict=True)
    return all(np.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


def agree(value: bytes) -> bool:
    return len(set(hvd.allgather_object(value))) == 1


class EveryWeight(tf.keras.callbacks.Callback):
    """All weights after each step."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append([w.copy() for w in self.model.get_weights()])


# ------------------------------------------------------------------ one collective each


def collectives(timeline) -> Counter:
    """How often each collective ran, by kind and tensor, as Horovod wrote it down."""
    events = json.loads(timeline.read_text())
    names = {
        event["pid"]: event["args"]["name"]
        for event in events
        if event.get("name") == "process_name" and "name" in event["args"]
    }
    kinds = ("ALLGATHER", "ALLREDUCE")
    began = [e for e in events if e["ph"] == "B" and e["name"] in kinds]
    return Counter((event["name"], names[event["pid"]]) for event in began)


@pytest.mark.transport
def test_a_graph_runs_one_collective_per_variable_and_step(tmp_path):
    compression, weights = compressor(), EveryWeight()
    model = compiled(compression)
    timeline = tmp_path / "timeline.json"
    hvd.start_timeline(str(timeline))
    fit(model, weights)
    hvd.stop_timeline()
    if hvd.rank() == 0:  # the coordinator, who writes it
        ran = collectives(timeline)
        expected = {
            ("ALLGATHER", f"HorovodAllgather.hvd_sparse.{layer}.{name}"): STEPS
            for layer in ("dense", "dense-1")
            for name in ("kernel", "bias")
        }
        assert ran == expected  # and so no ALLREDUCE: what nobody uses is pruned
    assert compression.traffic.steps == STEPS
    # not computed once and frozen: each variable moves at every step
    for before, after in zip(weights.seen, weights.seen[1:], strict=False):
        assert all((b != a).any() for b, a in zip(before, after, strict=True))
    assert agree(bits(model))


@pytest.mark.ranks
@pytest.mark.transport
def test_tensors_that_go_dense_are_counted_at_the_steps_of_the_others():
    compression = compressor(dense=WhenCheaper())
    fit(compiled(compression))
    traffic = compression.traffic.tensors["dense+1/bias"]  #: 3 float32
    assert traffic.route == "dense"
    assert traffic.sent_bytes == traffic.dense_bytes == STEPS * 3 * 4
    assert compression.traffic.dense_bytes == STEPS * (6 * 32 + 32 + 32 * 3 + 3) * 4


# ------------------------------------------------------------- local layers, embeddings


def partial(compression, op):
    """The first layer is each rank's own."""
    model = perceptron()
    optimizer = horovod.keras.PartialDistributedOptimizer(
        tf.keras.optimizers.SGD(0.05),
        compression=compression,
        op=op,
        local_layers=[model.layers[0]],
    )
    model.compile(optimizer, "mse")
    fit(model)
    return model


@pytest.mark.ranks
@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum], ids=["Average", "Sum"])
def test_local_layers_are_left_alone_and_the_others_agree(op):
    compression = compressor(TopK(1.0), op=op)
    model = partial(compression, op)
    assert same(model, partial(hvd.Compression.none, op))
    kernels = [layer.get_weights()[0].tobytes() for layer in model.layers]
    assert not agree(kernels[0])
    assert agree(kernels[1])
    counted = [t.dense_bytes for t in compression.traffic.tensors.values()]
    assert counted == [STEPS * 32 * 3 * 4, STEPS * 3 * 4]


def embedding():
    tf.keras.utils.set_random_seed(0)
    layers = [
        tf.keras.layers.Input((6,)),
        tf.keras.layers.Lambda(lambda x: tf.cast(tf.abs(x) * 10, tf.int32)),
        tf.keras.layers.Embedding(60, 8),
        tf.keras.layers.GlobalAveragePooling1D(),
        tf.keras.layers.Dense(3),
    ]
    return tf.keras.Sequential(layers)


@pytest.mark.parametrize("dense", [Never(), WhenCheaper()], ids=repr)
def test_sparse_as_dense_takes_the_sparse_path(dense):
    """Of its gradient only the running graph knows the shape."""
    compression = compressor(TopK(1.0), dense=dense)
    ours = compiled(compression, embedding(), sparse_as_dense=True)
    theirs = compiled(hvd.Compression.none, embedding(), sparse_as_dense=True)
    fit(ours)
    fit(theirs)
    assert same(ours, theirs)
    table = compression.traffic.tensors["embedding/embeddings"]
    assert table.route == "sparse"
    assert table.sent_elements == STEPS * 60 * 8


@pytest.mark.ranks
@pytest.mark.transport
def test_sparse_as_dense_loses_nothing():
    table = tf.Variable(tf.zeros((40, 3)))
    compression = compressor(TopK(0.1), op=hvd.Sum)

    @tf.function
    def step(rows, weights):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(table, rows) * weights)
        tape = hvd.DistributedGradientTape(
            tape, compression=compression, op=hvd.Sum, sparse_as_dense=True
        )
        return tape.gradient(loss, [table])[0]

    given, handed_back = np.zeros((40, 3)), np.zeros((40, 3))
    for i in range(6):
        rng = np.random.default_rng([hvd.rank(), i])
        rows = rng.integers(0, 40, 5)
        weights = rng.integers(-8, 8, (5, 3)).astype(np.float32)
        handed_back += step(rows, weights).numpy()
        np.add.at(given, rows, weights)
    residual = compression.state_dict()["tensors"]["Variable"]["residual"].numpy()
    missing = sum(hvd.allgather_object(given - residual))
    np.testing.assert_array_equal(missing, handed_back)  # small integers
    assert compression.traffic.compression_ratio > 2


# --------------------------------------------------------------------------- callbacks


@pytest.mark.ranks
def test_a_restart_from_checkpoints_continues_bitwise(tmp_path):
    weights = str(tmp_path / "epoch-{epoch}.weights.h5")

    def start(epoch, epochs, *callbacks):
        compression = compressor()
        model = compiled(compression)
        if epoch:
            model.load_weights(weights.format(epoch=epoch))
        checkpoint = sparse.ResidualCheckpoint(compression, tmp_path / "epoch-{epoch}")
        fit(model, checkpoint, *callbacks, epochs=epochs, initial_epoch=epoch)
        return model, compression

    save = tf.keras.callbacks.ModelCheckpoint(weights, save_weights_only=True)
    expected, _ = start(0, 4, save)
    restarted, compression = start(2, 4)
    assert bits(restarted) == bits(expected)
    assert compression.traffic.steps == 4 * STEPS
    other = compiled(compressor())
    other.load_weights(weights.format(epoch=2))
    fit(other, epochs=4, initial_epoch=2)
    assert bits(other) != bits(expected)  # so it was the residuals


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("extension", [".h5", ""])
def test_horovods_load_model_brings_models_back_distributed(tmp_path, extension):
    path = f"{tmp_path}/model{extension}"
    model = compiled(compressor())
    fit(model)
    model.save(path)
    compression = compressor(prefix="again")
    loaded = hvd_keras.load_model(path, compression=compression)
    fit(loaded)
    assert compression.traffic.steps == STEPS
    assert agree(bits(loaded))


def test_logs_have_what_traffic_counted():
    compression = compressor()
    history = fit(compiled(compression), sparse.TrafficLogger(compression)).history
    traffic = compression.traffic
    assert history["compression_ratio"] == [pytest.approx(traffic.compression_ratio)]
    assert history["sent_bytes_per_step"] == [traffic.sent_bytes / STEPS]


@pytest.mark.ranks
def test_a_graph_may_make_several_steps_of_the_same_variables():
    targets = [tf.random.stateless_normal([40], [hvd.rank(), i]) for i in range(2)]

    def trained(steps_a_graph):
        variables = [tf.Variable(tf.zeros(40)) for _ in targets]
        compression = compressor(prefix=f"several{steps_a_graph}")

        @tf.function
        def steps():
            for _ in range(steps_a_graph):
                with tf.GradientTape() as tape:
                    pairs = zip(variables, targets, strict=True)
                    loss = sum(tf.reduce_sum((v - t) ** 2) for v, t in pairs)
                tape = hvd.DistributedGradientTape(tape, compression=compression)
                gradients = tape.gradient(loss, variables)
                for variable, gradient in zip(variables, gradients, strict=True):
                    variable.assign_sub(0.1 * gradient)

        for _ in range(4 // steps_a_graph):
            steps()
        return np.stack([variable.numpy() for variable in variables])

    np.testing.assert_array_equal(trained(2), trained(1))


@pytest.mark.ranks
def test_variables_that_share_a_gradient_get_each_its_own_result():
    """Each draws other elements of it, and keeps the rest."""
    first, second = tf.Variable(tf.zeros(64)), tf.Variable(tf.zeros(64))
    compression = compressor(RandomK(0.25, seed=3), prefix="shared")

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((first + second) * x)
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        return tape.gradient(loss, [first, second])

    given = np.arange(1, 65, dtype=np.float32) * (1 + hvd.rank())
    means = [mean.numpy() for mean in step(tf.constant(given))]
    tensors = compression.state_dict()["tensors"].values()
    kept = [tensor["residual"].numpy() for tensor in tensors]
    sent = [np.flatnonzero(residual == 0) for residual in kept]
    assert [places.size for places in sent] == [16, 16]
    assert sent[0].tolist() != sent[1].tolist()
    for mean, places in zip(means, sent, strict=True):
        assert np.flatnonzero(mean).tolist() == places.tolist()
