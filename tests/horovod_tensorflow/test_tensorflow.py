"""SparseCompressor in an unmodified Horovod under TensorFlow; 2 ranks or more."""

import horovod.tensorflow as hvd
import horovod.tensorflow.keras as hvd_keras
import members
import numpy as np
import pytest
import tensorflow as tf
from branches import BRANCHES, assert_its_own_step_is_thrown_away
from doors import KERAS_OPTIMIZERS, LOW_DENSITIES, SPARSIFIERS

from hvd_sparse import (
    Never,
    RandomK,
    Sign,
    SignTopK,
    Sum,
    TopK,
    WhenCheaper,
)
from hvd_sparse.tensorflow import SparseCompressor, advise, measure

# Keras 2's own, where it draws a seed
pytestmark = pytest.mark.filterwarnings("ignore:non-integer arguments to randrange")


@pytest.fixture(autouse=True)
def alike():
    tf.keras.backend.clear_session()
    yield
    tf.keras.mixed_precision.set_global_policy("float32")
    hvd.allgather_object(
        0
    )  # a barrier: what a test gave up is over before its names are used again


def compressor(sparsifier=None, **options):
    options = {"dense": Never(), "timeout_s": 60, **options}
    return SparseCompressor(sparsifier or TopK(0.05), **options)


def perceptron():
    tf.keras.utils.set_random_seed(0)
    layers = [
        tf.keras.layers.Input((6,)),
        tf.keras.layers.Dense(32, activation="tanh"),
        tf.keras.layers.Dense(3),
    ]
    return tf.keras.Sequential(layers)


def data(n=96):
    rng = np.random.default_rng(hvd.rank())
    x = rng.standard_normal((n, 6)).astype(np.float32)
    return x, np.tanh(x[:, :3])


def bits(model) -> bytes:
    return b"".join(w.tobytes() for w in model.get_weights())


def agree(value: bytes) -> bool:
    return len(set(hvd.allgather_object(value))) == 1


def optimizer_of(kind):
    if kind.startswith("legacy"):
        return getattr(tf.keras.optimizers.legacy, kind[6:])(0.05)
    return getattr(tf.keras.optimizers, kind)(0.05)


def fit(compression, kind="SGD", **options):
    """Train with fit, twice, with two batch shapes: the graph is traced again."""
    model = perceptron()
    optimizer = hvd_keras.DistributedOptimizer(
        optimizer_of(kind), compression=compression, **options
    )
    model.compile(optimizer, "mse")
    x, y = data()
    for n, size in ((96, 8), (40, 10)):
        model.fit(x[:n], y[:n], batch_size=size, verbose=0, shuffle=False)
    return model


STEPS = 12 + 4


def close(one, other) -> bool:
    pairs = zip(one.get_weights(), other.get_weights(), strict=True)
    return all(np.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


def same(one, other) -> bool:
    """Bitwise at 2 ranks; above, Horovod's own sum is in no order of ranks."""
    return bits(one) == bits(other) if hvd.size() == 2 else close(one, other)


# ------------------------------------------------------------------ Keras optimizers

EVERYWHERE = [pytest.mark.ranks, pytest.mark.transport]

# every optimizer, and every option with one of Keras's own and one of the legacy ones
ONE, OTHER = ("SGD", "legacyAdam"), ("Adam", "legacySGD")
OPTIONS = {
    "defaults": ({}, (*ONE, *OTHER)),
    "op=Sum": ({"op": hvd.Sum}, ONE),
    "backward_passes_per_step": ({"backward_passes_per_step": 2}, OTHER),
    "groups": ({"groups": 2}, ONE),
    "gradient_predivide_factor": ({"gradient_predivide_factor": 2.0}, OTHER),
    "sparse_as_dense": ({"sparse_as_dense": True}, ONE),
    "process_set": ({"process_set": hvd.global_process_set}, OTHER),
}


@pytest.mark.parametrize(
    ("option", "kind"),
    [  # with more ranks, and over MPI, each option with one of its optimizers
        pytest.param(option, kind, marks=EVERYWHERE if kind == kinds[0] else [])
        for option, (_, kinds) in OPTIONS.items()
        for kind in kinds
    ],
)
def test_density_one_is_stock_horovod_with_every_option(option, kind):
    options, _ = OPTIONS[option]
    compression = compressor(TopK(1.0), op=options.get("op", hvd.Average))
    ours = fit(compression, kind, **options)
    theirs = fit(hvd.Compression.none, kind, **options)
    assert (
        same(ours, theirs)
        if option != "gradient_predivide_factor"
        else close(ours, theirs)
    )
    assert agree(bits(ours))
    passes = options.get("backward_passes_per_step", 1)
    assert compression.traffic.steps == STEPS // passes
    assert {t.route for t in compression.traffic.tensors.values()} == {"sparse"}


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.parametrize("sparsifier", SPARSIFIERS, ids=repr)
def test_replicas_agree_bitwise(sparsifier):
    assert agree(bits(fit(compressor(sparsifier))))


@pytest.mark.ranks
@pytest.mark.transport
def test_values_choose_how_they_travel():
    signs = compressor(TopK(0.05), values=Sign())
    known = compressor(SignTopK(0.05))
    assert bits(fit(signs)) == bits(fit(known))
    assert signs.traffic.sent_bytes == known.traffic.sent_bytes


@pytest.mark.ranks
@pytest.mark.transport
def test_tensors_routed_dense_are_horovods_own():
    compression = compressor(TopK(1.0), dense=WhenCheaper())
    assert same(fit(compression), fit(hvd.Compression.none))
    assert compression.traffic.steps == 0


@pytest.mark.ranks
def test_mixed_precision_with_a_loss_scale_that_is_fixed():
    tf.keras.mixed_precision.set_global_policy("mixed_float16")
    model = perceptron()
    inner = hvd_keras.DistributedOptimizer(
        tf.keras.optimizers.SGD(0.05), compression=compressor()
    )
    options = {"dynamic": False, "initial_scale": 2.0**10}
    model.compile(tf.keras.mixed_precision.LossScaleOptimizer(inner, **options), "mse")
    before = bits(model)
    x, y = data(40)
    model.fit(x, y, batch_size=8, verbose=0, shuffle=False)
    assert bits(model) != before
    assert np.isfinite(np.concatenate([w.ravel() for w in model.get_weights()])).all()
    assert agree(bits(model))


@pytest.mark.parametrize("prefix", ["my run", "", "a:0", "größe", 3], ids=repr)
def test_a_prefix_that_tensorflow_can_not_have_is_refused(prefix):
    with pytest.raises(ValueError, match="prefix must be letters, digits, and any of"):
        SparseCompressor(TopK(), prefix=prefix)


def test_a_loss_scale_that_changes_is_refused_by_name():
    tf.keras.mixed_precision.set_global_policy("mixed_float16")
    model, optimizer = perceptron(), tf.keras.optimizers.SGD(0.05)
    optimizer = hvd_keras.DistributedOptimizer(optimizer, compression=compressor())
    model.compile(optimizer, "mse")  # which puts a LossScaleOptimizer around it
    with pytest.raises(ValueError, match="must not change its scale"):
        model.fit(*data(40), batch_size=8, verbose=0)


# -------------------------------------------------------------------------------- tape


def tape_steps(compression, how, **options):
    model, optimizer = perceptron(), tf.keras.optimizers.SGD(0.05)
    x, y = data()

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        tape = hvd.DistributedGradientTape(tape, compression=compression, **options)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(
            zip(gradients, model.trainable_variables, strict=True)
        )

    step = tf.function(step) if how == "graph" else step
    for i in range(8):
        step(x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8])
    step(x[:5], y[:5])
    return model


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.parametrize("how", ["eager", "graph"])
@pytest.mark.parametrize("options", [{}, {"op": hvd.Sum}, {"groups": 2}], ids=repr)
def test_density_one_is_stock_horovod_with_a_tape(options, how):
    compression = compressor(TopK(1.0), op=options.get("op", hvd.Average))
    ours = tape_steps(compression, how, **options)
    assert same(ours, tape_steps(hvd.Compression.none, how, **options))
    assert compression.traffic.steps == 9


@pytest.mark.ranks
@pytest.mark.transport
def test_a_process_set_is_a_group_of_its_own():
    mine = members.process_set
    compression = compressor(TopK(1.0), process_set=mine)
    theirs = tape_steps(hvd.Compression.none, "graph", process_set=mine)
    ours = tape_steps(compression, "graph", process_set=mine)
    if mine.included():
        assert bits(ours) == bits(theirs)


@pytest.mark.ranks
@pytest.mark.transport
def test_nothing_is_lost_when_a_graph_is_traced_again():
    weights = tf.Variable(tf.zeros(64))
    compression = compressor(TopK(0.1), op=Sum)

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(weights * tf.reduce_sum(x, axis=0))
        tape = hvd.DistributedGradientTape(tape, compression=compression, op=hvd.Sum)
        return tape.gradient(loss, [weights])[0]

    given, handed_back = np.zeros(64), np.zeros(64)
    for i in range(8):
        rng = np.random.default_rng([hvd.rank(), i])
        x = rng.integers(-8, 8, (1 + i % 3, 64)).astype(np.float32)  # three traces
        handed_back += step(x).numpy()
        given += x.sum(axis=0)
    residual = compression.state_dict()["tensors"]["Variable"]["residual"].numpy()
    missing = sum(hvd.allgather_object(given - residual))
    np.testing.assert_array_equal(missing, handed_back)  # small integers


@pytest.mark.ranks
@pytest.mark.transport
def test_a_nan_on_one_rank_is_seen_by_all_and_forgotten():
    weights = tf.Variable(tf.zeros(16))
    compression = compressor(TopK(0.25))

    @tf.function
    def gradient_of(given):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(weights * given)
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        return tape.gradient(loss, [weights])[0]

    bad = np.arange(1.0, 17.0, dtype=np.float32)
    if hvd.rank() == hvd.size() - 1:
        bad[3] = np.nan
    assert np.isnan(gradient_of(tf.constant(bad)).numpy()).all()
    assert np.isfinite(gradient_of(tf.ones(16)).numpy()).all()


def test_gradients_that_are_none_or_indexed_slices_are_untouched():
    table, used = tf.Variable(tf.zeros((50, 4))), tf.Variable(1.0)
    unused = tf.Variable(1.0)
    compression = compressor(TopK(1.0))

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(table, [hvd.rank(), 7])) + 3 * used
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        return tape.gradient(loss, [table, unused, used])

    rows, none, three = step()
    assert isinstance(rows, tf.IndexedSlices)
    assert none is None
    assert three.numpy() == 3
    assert len(compression.traffic.tensors) == 1


# ------------------------------------------------------------------ a session, TF 1


@pytest.mark.ranks
@pytest.mark.transport
def test_the_v1_optimizer_keeps_residuals_in_a_session():
    compression = compressor(TopK(0.25), op=Sum)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        weights = tf.compat.v1.get_variable("w", initializer=tf.zeros(16))
        given = tf.compat.v1.placeholder(tf.float32, (16,))
        optimizer = hvd.DistributedOptimizer(
            tf.compat.v1.train.GradientDescentOptimizer(1.0),
            compression=compression,
            op=hvd.Sum,
        )
        train = optimizer.minimize(tf.reduce_sum(weights * given))
        session.run(tf.compat.v1.global_variables_initializer())
        total = np.zeros(16)
        for i in range(6):
            rng = np.random.default_rng([hvd.rank(), i])
            gradient = rng.integers(-8, 8, 16).astype(np.float32)
            session.run(train, {given: gradient})
            total += gradient
        moved = session.run(weights)
    residual = compression.state_dict()["tensors"]["w"]["residual"].numpy()
    missing = sum(hvd.allgather_object(total - residual))
    np.testing.assert_array_equal(-moved, missing)
    assert compression.traffic.steps == 6


# ----------------------------------------------------------------------------- state


@pytest.mark.ranks
@pytest.mark.parametrize("sparsifier", [TopK(0.05), RandomK(0.1)], ids=repr)
def test_a_restart_continues_bitwise(sparsifier):
    x, y = data(80)

    def build():
        model, compression = perceptron(), compressor(sparsifier)
        optimizer = hvd_keras.DistributedOptimizer(
            tf.keras.optimizers.SGD(0.05), compression=compression
        )
        model.compile(optimizer, "mse")
        return model, compression

    def half(model, part):
        model.fit(x[part], y[part], batch_size=8, verbose=0, shuffle=False)

    model, compression = build()
    half(model, slice(40))
    weights, state = model.get_weights(), compression.state_dict()
    half(model, slice(40, 80))
    expected = bits(model)
    model, compression = build()
    model.set_weights(weights)
    compression.load_state_dict(state)
    half(model, slice(40, 80))
    assert bits(model) == expected


# --------------------------------------------------------------------------- bad use


def test_another_op_than_the_optimizers_raises_at_the_first_step():
    with pytest.raises(ValueError, match="op must be that of the optimizer, Sum, got"):
        fit(compressor(), op=hvd.Sum)


def test_adasum_is_refused_by_name():
    compression = compressor()
    with pytest.raises(ValueError, match="op=Adasum is not supported"):
        hvd.allreduce(tf.ones(4), op=hvd.Adasum, compression=compression, name="a")


def test_another_process_set_than_the_optimizers_is_refused():
    with pytest.raises(ValueError, match="process_set must be that of the optimizer"):
        fit(compressor(process_set=members.process_set))


def test_outside_of_a_graph_a_name_is_needed():
    compression = compressor(TopK(1.0))
    with pytest.raises(ValueError, match="needs name="):
        hvd.allreduce(tf.ones(4), compression=compression)
    result = hvd.allreduce(tf.ones(4) * 3, compression=compression, name="named")
    assert (result.numpy() == 3).all()


@pytest.mark.ranks
@pytest.mark.transport
def test_a_measured_cost_is_the_same_on_every_rank():
    found = measure(sizes=(64, 4096, 65536), repeats=3)
    assert agree(repr(found).encode())
    assert found.cost.per_byte + found.cost.per_message > 0


@pytest.mark.parametrize("density", LOW_DENSITIES)
@pytest.mark.parametrize(("kind", "options", "momentum"), KERAS_OPTIMIZERS)
def test_momentum_is_warned_of_once_by_the_first_rank(
    kind, options, momentum, density, advised
):
    variable = tf.Variable(tf.zeros(64))
    optimizer = hvd_keras.DistributedOptimizer(
        getattr(tf.keras.optimizers, kind)(**options),
        compression=compressor(TopK(density)),
    )
    for _ in range(3):
        optimizer.minimize(lambda: tf.reduce_sum(variable * 2), [variable])
    bad = momentum and LOW_DENSITIES[density] and hvd.rank() == 0
    assert advised() == [advise(optimizer, TopK(density))] * bad


@pytest.mark.parametrize("kind", ["Adam", "legacyAdam"])
def test_momentum_is_warned_of_once_in_a_fit_whose_graph_is_traced_again(kind, advised):
    fit(compressor(TopK(0.01)), kind)
    assert len(advised()) == (hvd.rank() == 0)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_bad_batch_that_is_thrown_away_leaves_no_trace(graph):
    """Its norm is seen after the exchange, and all ranks leave the step out."""
    variable = tf.Variable(tf.zeros(64))
    compression = compressor(undo=True)
    slopes = tf.range(1.0, 65.0) * (1 + hvd.rank())

    def exchange(scale):
        with hvd.DistributedGradientTape(
            tf.GradientTape(), compression=compression
        ) as tape:
            loss = tf.reduce_sum(variable * slopes) * scale
        return tape.gradient(loss, [variable])

    if graph:
        exchange = tf.function(exchange)
    exchange(tf.constant(1.0))
    (before,) = compression.state_dict()["tensors"].values()
    exchange(tf.constant(1000.0))
    compression.discard()
    (after,) = compression.state_dict()["tensors"].values()
    np.testing.assert_array_equal(after["residual"], before["residual"])


def test_a_graph_throws_a_step_away_where_it_finds_it_bad():
    variable = tf.Variable(tf.zeros(64))
    compression = compressor(undo=True)
    slopes = tf.range(1.0, 65.0) * (1 + hvd.rank())

    @tf.function
    def step(scale):
        with hvd.DistributedGradientTape(
            tf.GradientTape(), compression=compression
        ) as tape:
            loss = tf.reduce_sum(variable * slopes) * scale
        [gradient] = tape.gradient(loss, [variable])
        if tf.reduce_max(tf.abs(gradient)) > 1000:
            compression.discard()
        else:
            variable.assign_sub(gradient)

    step(tf.constant(1.0))
    [before] = compression.state_dict()["tensors"].values()
    step(tf.constant(1e6))
    [after] = compression.state_dict()["tensors"].values()
    np.testing.assert_array_equal(after["residual"], before["residual"])
    weights = variable.numpy()
    step(tf.constant(1.0))
    [later] = compression.state_dict()["tensors"].values()
    assert later["step"] == before["step"] + 1
    assert np.count_nonzero(variable.numpy() - weights)


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_graph_throws_away_its_own_step_whatever_tells_it_to(branch):
    compression = compressor(undo=True)

    def make_tape():
        plain = tf.GradientTape()
        return hvd.DistributedGradientTape(plain, compression=compression)

    assert_its_own_step_is_thrown_away(make_tape, compression, hvd.rank(), branch)
