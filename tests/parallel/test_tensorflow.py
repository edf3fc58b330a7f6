"""The TensorFlow doors over real MPI, Keras 2 or 3; at any number of ranks."""

import os
import subprocess
import sys
import warnings
from typing import ClassVar

import needs
import numpy as np
import pytest
import tensorflow as tf
from branches import BRANCHES, assert_its_own_step_is_thrown_away
from doors import KERAS_OPTIMIZERS, LOW_DENSITIES, SPARSIFIERS, Interrupted
from mpi4py import MPI

import hvd_sparse.tensorflow as sparse
from hvd_sparse import (
    ExchangeError,
    Never,
    RandomK,
    SignTopK,
    Sum,
    TopK,
    WhenCheaper,
)
from hvd_sparse.core.memory import ErrorFeedback

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.Get_rank(), COMM.Get_size()
KERAS_3 = str(getattr(tf.keras, "__version__", "2")).startswith("3")

several = pytest.mark.skipif(SIZE == 1, reason="needs mpirun -np 2 or more")
keras_2 = pytest.mark.skipif(KERAS_3, reason=f"needs {needs.KERAS_2}")
keras_3 = pytest.mark.skipif(not KERAS_3, reason="needs Keras 3: launch/test --keras3")

# TensorFlow's and Keras's own, at import or first use
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def perceptron():
    tf.keras.utils.set_random_seed(0)
    layers = [
        tf.keras.layers.Input((6,)),
        tf.keras.layers.Dense(32, activation="tanh"),
        tf.keras.layers.Dense(3),
    ]
    return tf.keras.Sequential(layers)


def data(n=80, rank=RANK):
    rng = np.random.default_rng(rank)
    x = rng.standard_normal((n, 6)).astype(np.float32)
    return x, np.tanh(x[:, :3])


def bits(model) -> bytes:
    return b"".join(w.tobytes() for w in model.get_weights())


def agree(value: bytes) -> bool:
    return len(set(COMM.allgather(value))) == 1


def optimizer_of(kind):
    if kind.startswith("legacy"):
        return getattr(tf.keras.optimizers.legacy, kind[6:])(0.05)
    return getattr(tf.keras.optimizers, kind)(0.05)


def distribute(optimizer, sparsifier=None, **options):
    options = {"comm": COMM, "dense": Never(), "timeout_s": 20, **options}
    return sparse.DistributedOptimizer(optimizer, sparsifier or TopK(0.05), **options)


def tape_of(sparsifier=None, **options):
    options = {"comm": COMM, "dense": Never(), "timeout_s": 20, **options}
    tape = tf.GradientTape()
    return sparse.DistributedGradientTape(tape, sparsifier or TopK(0.05), **options)


def fit(model, x, y, epochs=1, batch_size=8):
    return model.fit(
        x, y, batch_size=batch_size, epochs=epochs, verbose=0, shuffle=False
    )


def stepper(model, tape, optimizer):
    def step(x, y):
        with tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(
            zip(gradients, model.trainable_variables, strict=True)
        )
        return loss

    return step


# ------------------------------------------------------------------------- replicas


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
@pytest.mark.parametrize("sparsifier", SPARSIFIERS, ids=repr)
def test_replicas_agree_bitwise_with_fit(sparsifier, kind):
    model = perceptron()
    optimizer = distribute(optimizer_of(kind), sparsifier)
    model.compile(optimizer, "mse")
    fit(model, *data(), epochs=2)
    fit(model, *data(20), batch_size=5)  # another batch shape: traced again
    assert agree(bits(model))
    assert optimizer.traffic.steps == 2 * 10 + 4
    assert {t.route for t in optimizer.traffic.tensors.values()} == {"sparse"}
    optimizer.close()


@pytest.mark.ranks
def test_values_choose_how_they_travel():
    trained = []
    for sparsifier, values in ((TopK(0.05), sparse.Sign()), (SignTopK(0.05), None)):
        model = perceptron()
        optimizer = distribute(optimizer_of("SGD"), sparsifier, values=values)
        model.compile(optimizer, "mse")
        fit(model, *data())
        tape = tape_of(sparsifier, values=values)
        for _ in range(2):
            stepper(model, tape, tf.keras.optimizers.SGD(0.05))(*data())
        sent = optimizer.traffic.sent_bytes, tape.traffic.sent_bytes
        trained.append((bits(model), sent))
        optimizer.close()
        tape.close()
    assert trained[0] == trained[1]


@pytest.mark.ranks
@keras_2
@pytest.mark.parametrize("kind", ["legacySGD", "legacyAdam"])
def test_replicas_agree_bitwise_with_legacy_optimizers(kind):
    model = perceptron()
    optimizer = distribute(optimizer_of(kind))
    model.compile(optimizer, "mse")
    fit(model, *data())
    assert agree(bits(model))
    assert optimizer.traffic.steps == 10
    optimizer.close()


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["eager", "graph"])
def test_replicas_agree_bitwise_with_a_tape(how):
    model, tape = perceptron(), tape_of()
    step = stepper(model, tape, optimizer_of("SGD"))
    step = tf.function(step) if how == "graph" else step
    x, y = data()
    for i in range(10):
        step(x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8])
    step(x[:5], y[:5])
    assert agree(bits(model))
    assert tape.traffic.steps == 11
    tape.close()


class Counting(MPI.Intracomm):
    """Notes every collective of gradients that starts."""

    started: ClassVar[list[str]] = []

    def Iallgather(self, *args, **options):  # noqa: N802  # MPI's name
        self.started.append("Iallgather")
        return super().Iallgather(*args, **options)

    def Iallgatherv(self, *args, **options):  # noqa: N802  # MPI's name
        self.started.append("Iallgatherv")
        return super().Iallgatherv(*args, **options)

    def Iallreduce(self, *args, **options):  # noqa: N802  # MPI's name
        self.started.append("Iallreduce")
        return super().Iallreduce(*args, **options)


class EveryWeight(tf.keras.callbacks.Callback):
    """All weights after each step."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append([w.copy() for w in self.model.get_weights()])


@pytest.mark.ranks
def test_a_graph_runs_one_exchange_a_step_and_freezes_nothing():
    steps, weights = 24, EveryWeight()
    model = perceptron()  # 4 variables
    optimizer = distribute(optimizer_of("SGD"), comm=Counting(COMM))
    model.compile(optimizer, "mse")
    x, y = data(8 * steps)
    Counting.started.clear()
    model.fit(x, y, batch_size=8, verbose=0, shuffle=False, callbacks=[weights])
    # what ranks must agree on, then all payloads of the four
    assert Counting.started == ["Iallgather", "Iallgatherv"] * steps
    assert optimizer.traffic.steps == len(weights.seen) == steps
    for before, after in zip(weights.seen, weights.seen[1:], strict=False):
        assert all((b != a).any() for b, a in zip(before, after, strict=True))
    optimizer.close()


# ---------------------------------------------------------- density 1, nothing lost


@pytest.mark.ranks
@pytest.mark.parametrize("op", [sparse.Average, Sum], ids=["Average", "Sum"])
@pytest.mark.parametrize("dense", [Never(), WhenCheaper()], ids=repr)
def test_density_one_is_the_rank_ordered_sum(op, dense):
    model, tape = perceptron(), tape_of(TopK(1.0), op=op, dense=dense)
    with tape:
        loss = tf.reduce_mean((model(data()[0]) - data()[1]) ** 2)
    ours = tape.gradient(loss, model.trainable_variables)
    theirs = [0.0] * len(ours)
    for rank in range(SIZE):
        x, y = data(rank=rank)
        with tf.GradientTape() as plain:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        gradients = plain.gradient(loss, model.trainable_variables)
        theirs = [t + g.numpy() for t, g in zip(theirs, gradients, strict=True)]
    scale = np.float32(1 / SIZE if op == sparse.Average else 1)
    for mine, total in zip(ours, theirs, strict=True):
        if dense == Never():
            np.testing.assert_array_equal(mine.numpy(), total * scale)
        else:  # MPI adds up in an order of its own
            np.testing.assert_allclose(mine.numpy(), total * scale, rtol=1e-5)
    tape.close()


@pytest.mark.ranks
def test_nothing_is_lost_when_a_graph_is_traced_again():
    weights = tf.Variable(tf.zeros(64))
    tape = tape_of(TopK(0.1), op=Sum)

    @tf.function
    def step(x):
        with tape:
            loss = tf.reduce_sum(weights * tf.reduce_sum(x, axis=0))
        return tape.gradient(loss, [weights])[0]

    given, handed_back = np.zeros(64), np.zeros(64)
    for i in range(8):
        rows = 1 + i % 3  # three traces
        rng = np.random.default_rng([RANK, i])
        x = rng.integers(-8, 8, (rows, 64)).astype(np.float32)
        handed_back += step(x).numpy()
        given += x.sum(axis=0)
    residual = tape.state_dict()["tensors"]["Variable"]["residual"].numpy()
    missing = COMM.allreduce(given - residual)
    np.testing.assert_array_equal(missing, handed_back)  # small integers
    assert tape.traffic.steps == 8
    tape.close()


@pytest.mark.ranks
def test_the_bits_are_those_of_pytorch():
    torch = pytest.importorskip("torch", reason="needs torch beside TensorFlow 2.15")
    import hvd_sparse.torch

    shapes = [(40, 7), (33,), ()]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = hvd_sparse.torch.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.0), TopK(0.1), comm=COMM, dense=Never()
    )
    variables = [tf.Variable(tf.zeros(shape)) for shape in shapes]
    tape = tape_of(TopK(0.1))
    for i in range(4):
        rng = np.random.default_rng([RANK, i])
        given = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
        for parameter, gradient in zip(parameters, given, strict=True):
            parameter.grad = torch.from_numpy(gradient.copy().reshape(parameter.shape))
        optimizer.step()
        with tape:
            loss = sum(
                tf.reduce_sum(v * g) for v, g in zip(variables, given, strict=True)
            )
        ours = tape.gradient(loss, variables)
        for parameter, gradient in zip(parameters, ours, strict=True):
            assert parameter.grad.numpy().tobytes() == gradient.numpy().tobytes()
    optimizer.close()
    tape.close()


@pytest.mark.ranks
def test_a_nan_on_one_rank_is_seen_by_all_and_forgotten():
    weights = tf.Variable(tf.zeros(16))
    tape = tape_of(TopK(0.25))
    gradient = np.arange(1.0, 17.0, dtype=np.float32)
    if RANK == SIZE - 1:
        gradient[3] = np.nan
    with tape:
        loss = tf.reduce_sum(weights * gradient)
    assert np.isnan(tape.gradient(loss, weights).numpy()).all()
    with tape:
        loss = tf.reduce_sum(weights * 1.0)
    assert np.isfinite(tape.gradient(loss, weights).numpy()).all()
    tape.close()


@pytest.mark.parametrize("how", ["eager", "graph"])
def test_results_that_are_kept_never_change(how):
    """TensorFlow takes them over without a copy, and they are used again after it."""
    weights, tape = tf.Variable(tf.zeros(4096)), tape_of(TopK(1.0))

    def step(gradient):
        with tape:
            same = tf.identity(weights)
        return tape.gradient(same, weights, output_gradients=gradient)

    step = tf.function(step) if how == "graph" else step
    for _ in range(4):  # memory of results that nobody keeps any more
        step(tf.zeros(4096))
    kept = [step(tf.fill([4096], float(i))) for i in range(8)]
    scaled = [2 * result for result in kept]
    for _ in range(4):
        step(tf.fill([4096], -1.0))
    for i, (result, twice) in enumerate(zip(kept, scaled, strict=True)):
        assert (result.numpy() == i).all()
        assert (twice.numpy() == 2 * i).all()
    tape.close()


# ------------------------------------------------------------------ kinds of gradients


def assert_rows_of_all_ranks(gradient):
    """Each used its own row of 50 once, and row 7 twice."""
    expected = np.zeros((50, 4), np.float32)
    for rank in range(SIZE):
        expected[rank] += 1 / SIZE
        expected[7] += 2 / SIZE
    dense = tf.convert_to_tensor(gradient).numpy()
    np.testing.assert_allclose(dense, expected, rtol=1e-6)


@pytest.mark.ranks
def test_embedding_gradients_stay_sparse_and_exact():
    table = tf.Variable(tf.zeros((50, 4)))
    tape = tape_of()
    with tape:
        rows = tf.gather(table, [RANK, 7, 7])
        loss = tf.reduce_sum(rows)
    gradient = tape.gradient(loss, table)
    assert isinstance(gradient, tf.IndexedSlices)
    assert_rows_of_all_ranks(gradient)
    assert tape.traffic.tensors["Variable"].route == "rows"
    tape.close()


@pytest.mark.ranks
def test_ranks_may_have_indices_of_different_dtypes():
    table = tf.Variable(tf.zeros((50, 4)))
    tape = tape_of()
    dtype = tf.int64 if RANK == 0 else tf.int32
    with tape:
        loss = tf.reduce_sum(tf.gather(table, tf.constant([RANK, 7, 7], dtype)))
    gradient = tape.gradient(loss, table)
    assert gradient.indices.dtype == dtype
    assert_rows_of_all_ranks(gradient)
    tape.close()


def test_gradients_that_are_none_stay_none():
    used, unused = tf.Variable(1.0), tf.Variable(1.0)
    tape = tape_of(TopK(1.0))
    with tape:
        loss = 3 * used
    gradients = tape.gradient(loss, {"used": used, "unused": unused})
    assert gradients["unused"] is None
    assert gradients["used"].numpy() == 3
    tape.close()


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_floating_dtype_comes_back_as_it_was(dtype):
    weights = tf.Variable(tf.zeros((8, 5), dtype))
    tape = tape_of(TopK(1.0))
    with tape:
        loss = tf.reduce_sum(weights * tf.cast(2.0, dtype))
    gradient = tape.gradient(loss, weights)
    assert gradient.dtype == weights.dtype
    assert (tf.cast(gradient, tf.float32).numpy() == 2).all()
    tape.close()


@pytest.mark.ranks
def test_loss_scaling_skips_a_step_on_all_ranks_or_on_none():
    policy = tf.keras.mixed_precision.LossScaleOptimizer
    scaled = policy(tf.keras.optimizers.SGD(0.1), initial_scale=1024.0)
    optimizer = distribute(scaled, TopK(1.0))
    weights = tf.Variable(tf.ones(4))
    if KERAS_3:
        weights = tf.keras.Variable(np.ones(4, np.float32))
        optimizer.build([weights])
    values = []
    for step in range(3):
        # that of Keras 2 has unscaled what it applies, that of Keras 3 does so itself
        gradient = np.full(4, 1024.0 if KERAS_3 else 1.0, np.float32)
        if step == 1 and RANK == SIZE - 1:
            gradient[0] = np.inf
        optimizer.apply_gradients([(tf.constant(gradient), weights)])
        values.append(float(np.asarray(weights.numpy())[1]))
    assert values == pytest.approx([0.9, 0.9, values[2]])
    assert values[2] < 0.9
    assert agree(np.asarray(weights.numpy()).tobytes())
    optimizer.close()


def scaled_optimizer(inner=None, **options):
    scaled = tf.keras.mixed_precision.LossScaleOptimizer
    return scaled(inner or tf.keras.optimizers.SGD(1.0), **options)


def trained_by_hand(shape, skipped, draw):
    """What a variable becomes whose optimizer skips steps; all ranks computed here."""
    value, memories = (
        np.zeros(shape, np.float32),
        [ErrorFeedback() for _ in range(SIZE)],
    )
    k = int(np.ceil(0.1 * value.size))
    for step in range(6):
        total = np.zeros(value.size, np.float32)
        for rank, memory in enumerate(memories):
            gradient = draw(rank, step)
            residual = memory.residual("it", gradient)
            chosen = TopK(0.1).select(residual, gradient, k, step)
            if step in skipped:
                memory.restore("it", chosen.indices, chosen.values)
            else:
                np.add.at(total, chosen.indices, chosen.values)
        value -= total * np.float32(1 / SIZE)
    return value


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["eager", "graph"])
def test_residuals_follow_a_loss_scale_and_skipped_steps_lose_nothing(how):
    skipped, bad = (2, 3), SIZE - 1

    def draw(place, rank, step):
        gradient = np.random.default_rng([place, rank, step]).standard_normal(40)
        gradient = gradient.astype(np.float32)
        if step in skipped and place == 0 and rank == bad:
            gradient[7] = np.inf
        return gradient

    optimizer = distribute(
        scaled_optimizer(initial_scale=2.0**10, dynamic_growth_steps=2), TopK(0.1)
    )
    make = tf.keras.Variable if KERAS_3 else tf.Variable
    held = [make(np.zeros(40, np.float32)) for _ in range(2)]
    optimizer.build(held)

    def step(*gradients):
        # that of Keras 2 has unscaled what it applies, that of Keras 3 does so itself
        scale = tf.convert_to_tensor(optimizer.dynamic_scale) if KERAS_3 else 1.0
        pairs = zip([g * scale for g in gradients], held, strict=True)
        optimizer.apply_gradients(list(pairs))

    run, scales = tf.function(step) if how == "graph" else step, []
    for number in range(6):
        run(*[tf.constant(draw(place, RANK, number)) for place in range(2)])
        scale = optimizer.dynamic_scale if KERAS_3 else optimizer.loss_scale
        scales.append(float(np.asarray(scale)))
    assert scales == [2.0**n for n in (10, 11, 10, 9, 9, 10)]
    for place, variable in enumerate(held):
        expected = trained_by_hand(
            40, skipped, lambda rank, step, p=place: draw(p, rank, step)
        )
        np.testing.assert_array_equal(np.asarray(variable.numpy()), expected)
    optimizer.close()


def test_a_loss_scale_around_the_distributed_optimizer_is_refused():
    inner = distribute(tf.keras.optimizers.SGD(1.0))
    optimizer = scaled_optimizer(inner)
    make = tf.keras.Variable if KERAS_3 else tf.Variable
    variable = make(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match=r"DistributedOptimizer\(LossScaleOptimizer\("):
        optimizer.apply_gradients([(tf.ones(4), variable)])
    inner.close()


@keras_2
@pytest.mark.ranks
def test_a_loss_scale_that_is_fixed_may_be_around_it():
    inner = distribute(tf.keras.optimizers.SGD(1.0), TopK(1.0))
    optimizer = scaled_optimizer(inner, dynamic=False, initial_scale=3.0)
    variable = tf.Variable(tf.zeros(4))
    optimizer.apply_gradients([(tf.ones(4), variable)])
    assert (variable.numpy() == -1).all()
    inner.close()


@keras_3
def test_a_loss_scale_that_is_no_power_of_2_is_refused():
    with pytest.raises(ValueError, match=r"initial_scale must be a power of 2.* 3\.0"):
        distribute(scaled_optimizer(initial_scale=3.0))


# ----------------------------------------------------------------------------- state


@pytest.mark.ranks
@pytest.mark.parametrize("sparsifier", [TopK(0.05), RandomK(0.1)], ids=repr)
def test_a_restart_continues_bitwise(sparsifier):
    x, y = data()
    model = perceptron()
    optimizer = distribute(optimizer_of("SGD"), sparsifier)
    model.compile(optimizer, "mse")
    fit(model, x[:40], y[:40])
    weights, state = model.get_weights(), optimizer.residual_state_dict()
    fit(model, x[40:], y[40:])
    expected = bits(model)
    optimizer.close()

    model = perceptron()
    optimizer = distribute(optimizer_of("SGD"), sparsifier)
    model.compile(optimizer, "mse")
    model.set_weights(weights)
    optimizer.load_residual_state_dict(state)
    fit(model, x[40:], y[40:])
    assert bits(model) == expected
    optimizer.close()


# Keras 3 can not train on with what it loads from an .h5, distributed or not
FORMATS = [".keras", *([] if KERAS_3 else [".h5", ""])]


@pytest.mark.ranks
@pytest.mark.filterwarnings("ignore:.*HDF5 file")
@pytest.mark.parametrize("extension", FORMATS)
def test_a_saved_model_comes_back_distributed_and_saving_says_how(tmp_path, extension):
    model, path = perceptron(), f"{tmp_path}/model{extension}"
    optimizer = distribute(optimizer_of("Adam"))
    model.compile(optimizer, "mse", jit_compile=False)
    x, y = data()
    fit(model, x[:40], y[:40])
    with pytest.warns(
        UserWarning, match=r"not distributed: .*tensorflow\.load_model\("
    ):
        model.save(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the optimizer in the saved model")
        model.save(path)  # once is enough
    state = optimizer.residual_state_dict()
    fit(model, x[40:], y[40:])
    optimizer.close()

    with pytest.warns(UserWarning, match=r"is not any more: .*tensorflow\.load_model"):
        plain = tf.keras.models.load_model(path)
    assert not hasattr(plain.optimizer, "traffic")
    assert plain.optimizer.get_config()["name"] == optimizer.get_config()["name"]

    options = {"comm": COMM, "dense": Never(), "timeout_s": 20}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the optimizer that was loaded")
        loaded = sparse.load_model(path, TopK(0.05), **options)
    assert type(loaded.optimizer).__name__ == "Adam"
    loaded.optimizer.load_residual_state_dict(state)
    fit(loaded, x[40:], y[40:])
    assert loaded.optimizer.traffic.steps == 10
    assert agree(bits(loaded))
    if extension:  # Keras leaves the state of an optimizer out of a SavedModel
        assert int(loaded.optimizer.iterations) == 10
        assert bits(loaded) == bits(model)
    loaded.optimizer.close()


@pytest.mark.filterwarnings("ignore:.*HDF5 file", "ignore:the optimizer in the saved")
@pytest.mark.parametrize("extension", FORMATS)
def test_a_saved_model_can_be_loaded_without_this_package(tmp_path, extension):
    model, path = perceptron(), f"{tmp_path}/model{extension}"
    optimizer = distribute(optimizer_of("Adam"))
    model.compile(optimizer, "mse", jit_compile=False)
    x, y = data()
    fit(model, x[:40], y[:40])
    model.save(path)
    optimizer.close()
    code = "import sys, tensorflow as tf; m = tf.keras.models.load_model(sys.argv[1]); "
    code += "print(type(m.optimizer).__name__); assert 'hvd_sparse' not in sys.modules"
    command = [sys.executable, "-c", code, path]
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("OMPI", "PM"))}
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=clean
    )
    assert ended.stdout.split()[-1:] == ["Adam"], ended.stderr[-2000:]


@pytest.mark.filterwarnings("ignore:.*HDF5 file")
@pytest.mark.parametrize("extension", FORMATS)
def test_loading_says_nothing_of_a_model_that_was_not_distributed(tmp_path, extension):
    model, path = perceptron(), f"{tmp_path}/model{extension}"
    model.compile(optimizer_of("Adam"), "mse", jit_compile=False)
    x, y = data()
    fit(model, x[:40], y[:40])
    model.save(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the optimizer")
        tf.keras.models.load_model(path)


def by_serialize(model):
    return tf.keras.optimizers.deserialize(
        tf.keras.optimizers.serialize(model.optimizer)
    )


def by_get(model):
    return tf.keras.optimizers.get(tf.keras.optimizers.serialize(model.optimizer))


def by_compile_config(model):
    copy = perceptron()
    copy.compile_from_config(model.get_compile_config())
    return copy.optimizer


COPIES = [by_serialize, by_get, by_compile_config]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_copy_that_keras_makes_says_that_it_is_not_distributed(copied, scaled):
    model, optimizer = perceptron(), optimizer_of("Adam")
    if scaled:
        optimizer = scaled_optimizer(optimizer, initial_scale=2.0)
    distributed = distribute(optimizer)
    model.compile(distributed, "mse", jit_compile=False)
    with pytest.warns(UserWarning, match=r"copied was distributed and is not any more"):
        copy = copied(model)
    assert not hasattr(copy, "traffic")
    named = [getattr(o, "inner_optimizer", o) for o in (copy, distributed)]
    assert named[0].get_config()["name"] == named[1].get_config()["name"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the optimizer")
        again = distribute(copy)  # nothing more to say
    again.close()
    distributed.close()


def test_a_copy_that_is_distributed_says_nothing():
    first = distribute(optimizer_of("Adam"))
    described = tf.keras.optimizers.serialize(first)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the optimizer")
        second = type(first).from_config(described["config"])
    assert second.get_config()["name"] == first.get_config()["name"]
    second.close()
    first.close()


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_of_a_plain_optimizer_says_nothing(copied):
    model = perceptron()
    model.compile(optimizer_of("Adam"), "mse", jit_compile=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the optimizer")
        copied(model)


def test_a_model_without_an_optimizer_is_refused_by_name(tmp_path):
    perceptron().save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"model\.keras: there is no optimizer in it"):
        sparse.load_model(tmp_path / "model.keras", TopK(0.05), comm=COMM)


@pytest.mark.ranks
def test_broadcasts_make_ranks_alike():
    tf.keras.utils.set_random_seed(RANK)
    model = tf.keras.Sequential([tf.keras.layers.Input((4,)), tf.keras.layers.Dense(4)])
    sparse.broadcast_variables(model.variables, root=SIZE - 1, comm=COMM)
    assert agree(bits(model))


@pytest.mark.ranks
@several
def test_broadcasting_different_models_is_an_error_on_every_rank():
    variable = tf.Variable(tf.zeros(5 if RANK == SIZE - 1 else 4))
    with pytest.raises(ExchangeError, match=rf"rank {SIZE - 1} has .*\(5,\)"):
        sparse.broadcast_variables([variable], comm=COMM)


# --------------------------------------------------------------------------- bad use


def test_it_stays_an_optimizer_of_its_class():
    plain = optimizer_of("SGD")
    optimizer = distribute(plain)
    assert optimizer is plain
    assert isinstance(optimizer, tf.keras.optimizers.SGD)
    assert type(optimizer).__name__ == "SGD"
    again = tf.keras.optimizers.SGD.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()
    optimizer.close()


@keras_3
def test_keras_3_is_refused_under_horovod_with_what_to_use_instead():
    instead = (
        r"plain MPI \(hvd_sparse\.tensorflow\.DistributedOptimizer\), or .*tf_keras"
    )
    with pytest.raises(RuntimeError, match=instead):
        sparse.SparseCompressor(TopK())


def test_bad_use_is_refused_by_name():
    with pytest.raises(TypeError, match=r"tape must be a tf\.GradientTape, got int"):
        sparse.DistributedGradientTape(1, TopK(), comm=COMM)
    with pytest.raises(TypeError, match="optimizer must be a Keras optimizer, got int"):
        sparse.DistributedOptimizer(1, TopK(), comm=COMM)
    optimizer = distribute(optimizer_of("SGD"))
    with pytest.raises(TypeError, match="distributed already"):
        distribute(optimizer)
    optimizer.close()


def test_xla_says_that_it_can_not_compile_it():
    model = perceptron()
    optimizer = distribute(optimizer_of("SGD"))
    model.compile(optimizer, "mse", jit_compile=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="PyFunc"):
        fit(model, *data(8))
    optimizer.close()


@pytest.mark.ranks
@several
def test_ranks_that_train_different_models_hear_of_it():
    weights = tf.Variable(tf.zeros(5 if RANK == SIZE - 1 else 4))
    tape = tape_of()
    with tape:
        loss = tf.reduce_sum(weights * 2.0)
    with pytest.raises(Exception, match=r"Variable: rank \d has shape"):
        tape.gradient(loss, weights)
    tape.close()


@pytest.mark.parametrize("density", LOW_DENSITIES)
@pytest.mark.parametrize(("kind", "options", "momentum"), KERAS_OPTIMIZERS)
def test_momentum_is_warned_of_once_by_the_first_rank(
    kind, options, momentum, density, advised
):
    variable = tf.Variable(tf.zeros(64))
    plain = getattr(tf.keras.optimizers, kind)(**options)
    optimizer = sparse.DistributedOptimizer(plain, TopK(density), dense=Never())

    @tf.function
    def step():
        optimizer.apply_gradients([(tf.ones(64), variable)])

    for _ in range(3):
        step()
    bad = momentum and LOW_DENSITIES[density] and RANK == 0
    assert advised() == [sparse.advise(optimizer, TopK(density))] * bad
    optimizer.close()


def test_momentum_is_warned_of_once_in_a_fit_whose_graph_is_traced_again(advised):
    model = perceptron()
    optimizer = sparse.DistributedOptimizer(optimizer_of("Adam"), TopK(0.01))
    model.compile(optimizer, "mse", jit_compile=False)
    x, y = data()
    for n, size in ((48, 8), (20, 10)):
        model.fit(x[:n], y[:n], batch_size=size, verbose=0)
    assert len(advised()) == (RANK == 0)
    optimizer.close()


@pytest.mark.ranks
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_bad_batch_that_is_thrown_away_leaves_no_trace(graph):
    """Its norm is seen after the exchange, and all ranks leave the step out."""
    variable = tf.Variable(tf.zeros(64))
    tape = tape_of(undo=True)
    slopes = tf.range(1.0, 65.0) * (1 + RANK)

    def exchange(scale):
        with tape:
            loss = tf.reduce_sum(variable * slopes) * scale
        return tape.gradient(loss, [variable])

    if graph:
        exchange = tf.function(exchange)
    exchange(tf.constant(1.0))
    (before,) = tape.state_dict()["tensors"].values()
    exchange(tf.constant(1000.0))
    tape.discard()
    (after,) = tape.state_dict()["tensors"].values()
    np.testing.assert_array_equal(after["residual"], before["residual"])


@pytest.mark.ranks
def test_a_graph_throws_a_step_away_where_it_finds_it_bad():
    variable = tf.Variable(tf.zeros(64))
    tape = tape_of(undo=True)
    slopes = tf.range(1.0, 65.0) * (1 + RANK)

    @tf.function
    def step(scale):
        with tape:
            loss = tf.reduce_sum(variable * slopes) * scale
        [gradient] = tape.gradient(loss, [variable])
        if tf.reduce_max(tf.abs(gradient)) > 1000:
            tape.discard()
        else:
            variable.assign_sub(gradient)

    step(tf.constant(1.0))
    [before] = tape.state_dict()["tensors"].values()
    step(tf.constant(1e6))
    [after] = tape.state_dict()["tensors"].values()
    np.testing.assert_array_equal(after["residual"], before["residual"])
    weights = variable.numpy()
    step(tf.constant(1.0))
    [later] = tape.state_dict()["tensors"].values()
    assert later["step"] == before["step"] + 1
    assert np.count_nonzero(variable.numpy() - weights) in (4, 8)


@pytest.mark.ranks
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_graph_throws_away_its_own_step_whatever_tells_it_to(branch):
    tape = tape_of(undo=True)
    assert_its_own_step_is_thrown_away(lambda: tape, tape, RANK, branch)
    tape.close()


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["eager", "graph"])
def test_ctrl_c_is_raised_when_the_exchange_is_complete(kind, monkeypatch):
    monkeypatch.setattr(Interrupted, "calls", 0)
    variables = [tf.Variable(tf.zeros(20)) for _ in range(3)]
    gradient = np.arange(1, 21, dtype=np.float32)
    tape = tape_of(Interrupted(0.2))

    def step():
        with tape:
            loss = tf.add_n([tf.reduce_sum(v * gradient) for v in variables])
        return tape.gradient(loss, variables)

    step = tf.function(step) if kind == "graph" else step
    with pytest.raises(KeyboardInterrupt):
        step()
    before = tape.state_dict()["tensors"].values()
    after = step()
    both = zip(before, tape.state_dict()["tensors"].values(), after, strict=True)
    for kept, left, mean in both:
        given = np.asarray(kept["residual"]) + gradient
        np.testing.assert_allclose(mean + np.asarray(left["residual"]), given)
        assert np.count_nonzero(gradient - np.asarray(kept["residual"])) == 4
