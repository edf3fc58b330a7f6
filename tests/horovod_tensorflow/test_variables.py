"""A variable's residual is its own, whichever variables a step is about; 2 ranks up.

Losses are linear, so the right answer is known exactly: that of a path which never saw
another variable, its payloads exchanged by hand.
"""

import gc

import horovod.tensorflow as hvd
import horovod.tensorflow.keras as hvd_keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_sparse import Never, TopK
from hvd_sparse.core.memory import ErrorFeedback
from hvd_sparse.tensorflow import SparseCompressor

# Keras 2's own, where it draws a seed
pytestmark = pytest.mark.filterwarnings("ignore:non-integer arguments to randrange")

DENSITY = 0.1


@pytest.fixture(autouse=True)
def apart():
    tf.keras.backend.clear_session()
    yield
    gc.collect()
    hvd.allgather_object(0)  # no rank is still in this test when names are used again


def compressor(**options):
    options = {"dense": Never(), "timeout_s": 60, **options}
    return SparseCompressor(TopK(DENSITY), **options)


def draw(shape, rank, *seed):
    rng = np.random.default_rng([rank, *seed])
    return rng.standard_normal(shape).astype(np.float32)


def mine(shape, *seed):
    return draw(shape, hvd.rank(), *seed)


def weights(held) -> list[bytes]:
    return [np.asarray(v.numpy()).tobytes() for v in held]


def agree(value) -> bool:
    return len(set(hvd.allgather_object(value))) == 1


# ---------------------------------------------------------------- which variables, when

WALKS = {  # per step the places of the variables that have a gradient
    "frozen and thawed": [[0, 1, 2], [1, 2], [2], [0, 1, 2]],
    "in turns": [[0], [1], [0], [1], [0], [1]],
    "heads in turns": [[0, 1], [0, 2], [0, 1], [0, 2]],
    "in another order": [[0, 1, 2], [2, 0, 1], [0, 1, 2]],
}
SHAPES = {"alike": [(40,)] * 3, "different": [(40,), (7, 5), (64,)]}


def expected(walk, shapes):
    """Each variable trained by itself, and every rank computed here."""
    result = []
    for place, shape in enumerate(shapes):
        value = np.zeros(shape, np.float32)
        memories = [ErrorFeedback() for _ in range(hvd.size())]
        k = int(np.ceil(DENSITY * value.size))
        for step, places in enumerate(walk):
            if place not in places:
                continue
            total = np.zeros(value.size, np.float32)
            for rank, memory in enumerate(memories):
                gradient = draw(shape, rank, step, place).reshape(-1)
                residual = memory.residual("it", gradient)
                chosen = TopK(DENSITY).select(residual, gradient, k, step)
                np.add.at(total, chosen.indices, chosen.values)
            value -= (total * np.float32(1 / hvd.size())).reshape(shape)
        result.append(value.tobytes())
    return result


class Optimizer:
    """`minimize`, eagerly: Horovod's function is traced once for all of a shape."""

    def __init__(self, held):
        self.held = held
        self.compression = compressor()
        self.optimizer = hvd_keras.DistributedOptimizer(
            tf.keras.optimizers.SGD(1.0), compression=self.compression
        )
        self.optimizer.build(held)

    def step(self, places, gradients):
        held = [self.held[place] for place in places]

        def loss():
            both = zip(held, gradients, strict=True)
            return sum(tf.reduce_sum(v * g) for v, g in both)

        self.optimizer.minimize(loss, held)


class Legacy(Optimizer):
    """The same of a legacy optimizer."""

    def __init__(self, held):
        self.held = held
        self.compression = compressor()
        self.optimizer = hvd_keras.DistributedOptimizer(
            tf.keras.optimizers.legacy.SGD(1.0), compression=self.compression
        )


class Graphs(Optimizer):
    """The same in graphs, one for each set of variables, which share Horovod's."""

    def __init__(self, held):
        super().__init__(held)
        self.graphs = {}

    def step(self, places, gradients):
        key = tuple(places)
        if key not in self.graphs:
            self.graphs[key] = tf.function(
                lambda *gradients: Optimizer.step(self, places, gradients)
            )
        self.graphs[key](*gradients)


class Groups(Optimizer):
    """In groups."""

    def __init__(self, held):
        super().__init__(held)
        self.optimizer = hvd_keras.DistributedOptimizer(
            tf.keras.optimizers.SGD(1.0), compression=self.compression, groups=1
        )
        self.optimizer.build(held)


class Tape:
    """A tape made in every step, as Horovod's examples do."""

    def __init__(self, held):
        self.held = held
        self.compression = compressor()

    def tape(self, tape):
        return hvd.DistributedGradientTape(tape, compression=self.compression)

    def step(self, places, gradients):
        held = [self.held[place] for place in places]
        self.of(held, list(gradients))

    def of(self, held, gradients):
        with tf.GradientTape() as tape:
            both = zip(held, gradients, strict=True)
            loss = sum(tf.reduce_sum(v * g) for v, g in both)
        for v, g in zip(held, self.tape(tape).gradient(loss, held), strict=True):
            v.assign_sub(g)


class Arguments(Tape):
    """In one graph, to which variables are arguments: traced once for a shape."""

    def __init__(self, held):
        super().__init__(held)
        self.graph = tf.function(super().of)

    def of(self, held, gradients):
        self.graph(held, gradients)


class Eagerly(Tape):
    """No function is traced at all."""

    def of(self, held, gradients):
        tf.config.run_functions_eagerly(True)
        try:
            super().of(held, gradients)
        finally:
            tf.config.run_functions_eagerly(False)


KINDS = [Optimizer, Legacy, Graphs, Groups, Tape, Arguments, Eagerly]


@pytest.mark.ranks
@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_variable_never_gets_the_residual_of_another(kind, walk):
    for shapes in SHAPES.values():
        held = [tf.Variable(tf.zeros(shape)) for shape in shapes]
        trainer = kind(held)
        for step, places in enumerate(walk):
            gradients = [tf.constant(mine(shapes[p], step, p)) for p in places]
            trainer.step(places, gradients)
        assert weights(held) == expected(walk, shapes)
        steps = {t.route for t in trainer.compression.traffic.tensors.values()}
        assert steps == {"sparse"}


@pytest.mark.ranks
def test_keras_freezes_thaws_and_compiles_again():
    tf.keras.utils.set_random_seed(0)
    layers = [tf.keras.layers.Dense(6, use_bias=False) for _ in range(2)]
    model = tf.keras.Sequential([tf.keras.layers.Input((6,)), *layers])
    compression = compressor()
    optimizer = hvd_keras.DistributedOptimizer(
        tf.keras.optimizers.SGD(0.1), compression=compression
    )
    optimizer.build(model.trainable_variables)

    def fit(*frozen):
        for layer in layers:
            layer.trainable = layer not in frozen
        model.compile(optimizer, "mse")
        x, y = mine((40, 6), 1), mine((40, 6), 2)
        model.fit(x, y, batch_size=8, verbose=0, shuffle=False)
        return compression.state_dict()["tensors"]

    before, kernel = fit(), layers[0].kernel.numpy()
    after = fit(layers[0])
    np.testing.assert_array_equal(layers[0].kernel.numpy(), kernel)
    first, second = "dense/kernel", "dense+1/kernel"
    kept = [state[first]["residual"].numpy() for state in (before, after)]
    np.testing.assert_array_equal(*kept)
    assert after[second]["step"] == before[second]["step"] + 5
    fit()
    assert agree(tuple(weights(model.variables)))


# ------------------------------------------------------------------ several optimizers


def optimizer_of(compression):
    return hvd_keras.DistributedOptimizer(
        tf.keras.optimizers.SGD(1.0), compression=compression
    )


def moved(optimizer, held, steps):
    """What an optimizer does to a variable, step by step."""
    seen = []
    for step in steps:
        gradient = mine((40,), step)
        before = held.numpy()
        optimizer.minimize(lambda g=gradient: tf.reduce_sum(held * g), [held])
        seen.append(held.numpy() - before)
    return np.stack(seen)


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.parametrize("copied", [True, False])
def test_each_optimizer_of_a_compressor_has_residuals_of_its_own(copied):
    held = tf.Variable(tf.zeros(40))
    compression = compressor()
    first = optimizer_of(compression)
    second = (
        first.from_config(first.get_config()) if copied else optimizer_of(compression)
    )
    alone, other = [], []
    for step in range(4):
        held.assign(tf.zeros(40))
        alone.append(moved(first, held, [step]))
        held.assign(tf.zeros(40))
        other.append(moved(second, held, [step]))
    np.testing.assert_array_equal(alone, other)
    assert set(compression.state_dict()["tensors"]) == {"Variable", "Variable@1"}
    del first
    gc.collect()
    assert set(compression.state_dict()["tensors"]) == {"Variable@1"}


@pytest.mark.ranks
def test_ranks_that_built_other_models_before_have_the_same_names():
    for _ in range(hvd.rank()):
        tf.keras.Sequential([tf.keras.layers.Dense(3, input_shape=(3,))])
    layers = [tf.keras.layers.Dense(3) for _ in range(2)]
    model = tf.keras.Sequential([tf.keras.layers.Input((3,)), *layers])
    compression = compressor()
    model.compile(optimizer_of(compression), "mse")
    model.fit(mine((8, 3), 0), mine((8, 3), 1), verbose=0)
    assert set(compression.state_dict()["tensors"]) == {
        "dense/bias",
        "dense/kernel",
        "dense+1/bias",
        "dense+1/kernel",
    }


# ---------------------------------------------------------------- where nobody says so


def test_a_gradient_of_nobody_is_refused_in_a_graph_too():
    compression = compressor()

    @tf.function
    def reduce(gradient, **named):
        return hvd.allreduce(gradient, compression=compression, **named)

    with pytest.raises(
        ValueError, match=r"shape \(5,\) belongs to no variable .*name="
    ):
        reduce(tf.ones(5))
    assert (reduce(tf.ones(5), name="five").numpy().max()) == 1
    assert list(compression.state_dict()["tensors"]) == ["five"]


# ------------------------------------------------------------------------------- states


@pytest.mark.ranks
@pytest.mark.parametrize("version", ["0.1.0", "now"])
def test_a_restart_continues_and_states_of_version_0_1_0_load_by_place(version):
    def start():
        held = [tf.Variable(tf.zeros(s)) for s in ((40,), (7, 5), (40,))]
        return held, Optimizer(held)

    def steps(trainer, *numbers):
        for step in numbers:
            gradients = [
                tf.constant(mine(v.shape, step, p)) for p, v in enumerate(held)
            ]
            trainer.step([0, 1, 2], gradients)

    held, trainer = start()
    steps(trainer, 0, 1)
    state = trainer.compression.state_dict()
    values = [v.numpy() for v in held]
    steps(trainer, 2, 3)
    after = weights(held)
    if version == "0.1.0":
        del state["variables"]
        names = ("Variable", "Variable#1", "Variable#2")
        state["tensors"] = {
            f"gradient{place}": state["tensors"][name]
            for place, name in enumerate(names)
        }
    held, trainer = start()
    for v, value in zip(held, values, strict=True):
        v.assign(value)
    trainer.compression.load_state_dict(state)
    again = trainer.compression.state_dict()["tensors"]
    assert again.keys() == state["tensors"].keys()
    steps(trainer, 2, 3)
    assert weights(held) == after
    gc.collect()
