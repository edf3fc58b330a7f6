"""A variable's residual is its own, whichever variables a step is about; over MPI.

Losses are linear, so the right answer is known exactly: that of a SparseAllreduce which
never saw another variable.
"""

import gc
import re

import needs
import numpy as np
import pytest
import tensorflow as tf
from mpi4py import MPI

import hvd_sparse.tensorflow as sparse
from hvd_sparse import ExchangeError, Never, TopK
from hvd_sparse.mpi import SparseAllreduce

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.Get_rank(), COMM.Get_size()
KERAS_3 = str(getattr(tf.keras, "__version__", "2")).startswith("3")

several = pytest.mark.skipif(SIZE == 1, reason="needs mpirun -np 2 or more")
keras_2 = pytest.mark.skipif(KERAS_3, reason=f"needs {needs.KERAS_2}")

# TensorFlow's and Keras's own, at import or first use
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DENSITY = 0.1


@pytest.fixture(autouse=True)
def alone():
    """What a test leaves for the garbage collector is no part of the next."""
    tf.keras.backend.clear_session()
    yield
    gc.collect()


def options(**more):
    return {"comm": COMM, "dense": Never(), "timeout_s": 20, **more}


def distribute(optimizer=None, **more):
    optimizer = optimizer or tf.keras.optimizers.SGD(1.0)
    return sparse.DistributedOptimizer(optimizer, TopK(DENSITY), **options(**more))


def tape_of(**more):
    tape = tf.GradientTape(persistent=more.pop("persistent", False))
    return sparse.DistributedGradientTape(tape, TopK(DENSITY), **options(**more))


def variable(shape=(40,), **named):
    if KERAS_3:
        return tf.keras.Variable(np.zeros(shape, np.float32), **named)
    return tf.Variable(tf.zeros(shape), **named)


def draw(shape, *seed):
    rng = np.random.default_rng([RANK, *seed])
    return rng.standard_normal(shape).astype(np.float32)


def weights(held) -> list[bytes]:
    return [np.asarray(v.numpy()).tobytes() for v in held]


# ---------------------------------------------------------------- which variables, when

# per step the places of the variables that have a gradient
WALKS = {
    "frozen": [[0, 1, 2], [0, 1, 2], [2], [2], [2]],
    "thawed": [[2], [2], [0, 1, 2], [0, 1, 2]],
    "frozen and thawed": [[0, 1, 2], [1, 2], [2], [0, 1, 2]],
    "in turns": [[0], [1], [0], [1], [0], [1]],
    "heads in turns": [[0, 1], [0, 2], [0, 1], [0, 2]],
    "in another order": [[0, 1, 2], [2, 0, 1], [1, 2, 0], [0, 1, 2]],
}
SHAPES = {"alike": [(40,)] * 3, "different": [(40,), (7, 5), (64,)]}


def expected(walk, shapes):
    """Each variable trained by itself."""
    result = []
    for place, shape in enumerate(shapes):
        value = np.zeros(shape, np.float32)
        with SparseAllreduce(TopK(DENSITY), **options()) as reduce:
            for step, places in enumerate(walk):
                if place in places:
                    value -= reduce.allreduce("it", draw(shape, step, place))
        result.append(value.tobytes())
    return result


class Optimizer:
    """One optimizer, eagerly."""

    def __init__(self, held):
        self.held = held
        self.optimizer = distribute()
        self.optimizer.build(held)

    def step(self, places, gradients):
        pairs = zip(gradients, [self.held[p] for p in places], strict=True)
        self.optimizer.apply_gradients(pairs)

    def close(self):
        self.optimizer.close()


class WithNone(Optimizer):
    """What is left out has None for a gradient."""

    def step(self, places, gradients):
        given = dict(zip(places, gradients, strict=True))
        pairs = [(given.get(place), v) for place, v in enumerate(self.held)]
        self.optimizer.apply_gradients(pairs)


class Graphs(Optimizer):
    """The same in graphs, one for each set of variables."""

    def __init__(self, held):
        super().__init__(held)
        self.graphs = {}

    def step(self, places, gradients):
        key = tuple(places)
        if key not in self.graphs:
            self.graphs[key] = tf.function(lambda *g: Optimizer.step(self, places, g))
        self.graphs[key](*gradients)


class Arguments(Optimizer):
    """One graph, to which variables are arguments: it is traced once for a shape."""

    def __init__(self, held):
        super().__init__(held)
        self.tape = tape_of(op=sparse.Average)

        @tf.function
        def step(held, gradients):
            with self.tape:
                pairs = zip(held, gradients, strict=True)
                loss = sum(tf.reduce_sum(v * g) for v, g in pairs)
            for v, g in zip(held, self.tape.gradient(loss, held), strict=True):
                v.assign_sub(g)

        self.graph = step

    def step(self, places, gradients):
        self.graph([self.held[place] for place in places], list(gradients))

    def close(self):
        super().close()
        self.tape.close()


class Tape:
    """One tape for all steps."""

    def __init__(self, held):
        self.held = held
        self.tape = tape_of()

    def step(self, places, gradients):
        with self.tape as tape:
            pairs = zip([self.held[p] for p in places], gradients, strict=True)
            loss = sum(tf.reduce_sum(v * g) for v, g in pairs)
        sources = [self.held[place] for place in places]
        for v, g in zip(sources, tape.gradient(loss, sources), strict=True):
            v.assign_sub(g)

    def close(self):
        self.tape.close()


class Persistent(Tape):
    """Asked for one variable after the other."""

    def __init__(self, held):
        self.held = held
        self.tape = tape_of(persistent=True)

    def step(self, places, gradients):
        with self.tape as tape:
            pairs = zip([self.held[p] for p in places], gradients, strict=True)
            loss = sum(tf.reduce_sum(v * g) for v, g in pairs)
        for place in reversed(places):
            source = self.held[place]
            source.assign_sub(tape.gradient(loss, source))


class Anew(Tape):
    """Each step makes its own."""

    def __init__(self, held):
        super().__init__(held)
        self.tapes = [self.tape]

    def step(self, places, gradients):
        self.tape = tape_of()
        self.tapes.append(self.tape)
        super().step(places, gradients)

    def close(self):
        for tape in self.tapes:
            tape.close()


class Each(Tape):
    """A tape for each variable."""

    def __init__(self, held):
        self.held = held
        self.tapes = [tape_of() for _ in held]

    def step(self, places, gradients):
        for place, gradient in zip(places, gradients, strict=True):
            with self.tapes[place] as tape:
                loss = tf.reduce_sum(self.held[place] * gradient)
            source = self.held[place]
            source.assign_sub(tape.gradient(loss, [source])[0])

    def close(self):
        for tape in self.tapes:
            tape.close()


KINDS = [Optimizer, WithNone, Graphs]
TAPES = [Arguments, Tape, Persistent, Anew, Each]


@pytest.mark.ranks
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
@pytest.mark.parametrize("kind", KINDS + ([] if KERAS_3 else TAPES))
def test_a_variable_never_gets_the_residual_of_another(kind, walk):
    for shapes in SHAPES.values():
        held = [variable(shape) for shape in shapes]
        trainer = kind(held)
        for step, places in enumerate(walk):
            gradients = [tf.constant(draw(shapes[p], step, p)) for p in places]
            trainer.step(places, gradients)
        assert weights(held) == expected(walk, shapes)
        trainer.close()


@pytest.mark.ranks
def test_keras_freezes_thaws_and_compiles_again():
    """With one optimizer, and layers of the same shape that are frozen in turns."""
    tf.keras.utils.set_random_seed(0)
    layers = [tf.keras.layers.Dense(6, use_bias=False) for _ in range(2)]
    model = tf.keras.Sequential([tf.keras.layers.Input((6,)), *layers])
    optimizer = distribute(tf.keras.optimizers.SGD(0.1))
    optimizer.build(model.trainable_variables)
    x, y = draw((40, 6), 1), draw((40, 6), 2)

    def fit(*frozen):
        for layer in layers:
            layer.trainable = layer not in frozen
        model.compile(optimizer, "mse", jit_compile=False)
        model.fit(x, y, batch_size=8, verbose=0, shuffle=False)

    fit()
    state = optimizer.residual_state_dict()
    before = weights(model.variables)
    fit(layers[0])
    now = optimizer.residual_state_dict()["tensors"]
    second, first = sorted(state["tensors"])  # "dense+1/kernel" and "dense/kernel"
    assert weights(model.variables)[0] == before[0]
    kept = [s["tensors"][first]["residual"].numpy() for s in (state, {"tensors": now})]
    np.testing.assert_array_equal(*kept)
    assert now[second]["step"] == state["tensors"][second]["step"] + 5
    fit()
    assert len(set(COMM.allgather(tuple(weights(model.variables))))) == 1
    optimizer.close()


# ----------------------------------------------------------------------- ranks disagree


@pytest.mark.ranks
@several
def test_a_variable_that_one_rank_leaves_out_is_an_error_on_all_that_names_it():
    used, other = variable(name="used"), variable(name="other")
    for left_out in ({"used"}, {"used", "other"}):
        optimizer = distribute()
        optimizer.build([used, other])
        pairs = {"used": (tf.ones(40), used), "other": (tf.ones(40), other)}
        if RANK == SIZE - 1:
            pairs = {n: pair for n, pair in pairs.items() if n not in left_out}
        with pytest.raises(Exception, match=rf"{min(left_out)}: rank \d.* expected"):
            optimizer.apply_gradients(list(pairs.values()))
        optimizer.close()


@pytest.mark.ranks
@several
def test_a_gradient_that_is_none_on_one_rank_is_an_error_on_all():
    held, tape = variable(name="held"), tape_of()
    value = held.value if KERAS_3 else held
    with tape:
        loss = tf.reduce_sum(value * (1.0 if RANK else 2.0))
        nothing = tf.constant(0.0)
    with pytest.raises(Exception, match=r"held: rank \d"):
        tape.gradient(nothing if RANK == SIZE - 1 else loss, [value])
    tape.close()


@pytest.mark.ranks
@keras_2
def test_ranks_that_built_other_models_before_have_the_same_names():
    for _ in range(RANK):
        tf.keras.layers.Dense(3).build((None, 3))
        tf.keras.Sequential([tf.keras.layers.Dense(3, input_shape=(3,))])
    layers = [tf.keras.layers.Dense(3) for _ in range(2)]
    model = tf.keras.Sequential([tf.keras.layers.Input((3,)), *layers])
    optimizer = distribute()
    model.compile(optimizer, "mse")
    model.fit(draw((8, 3), 0), draw((8, 3), 1), verbose=0)
    assert set(optimizer.residual_state_dict()["tensors"]) == {
        "dense/bias",
        "dense/kernel",
        "dense+1/bias",
        "dense+1/kernel",
    }
    optimizer.close()


# ----------------------------------------------------------------------- what is shared


class Counting(MPI.Intracomm):
    """Counts its duplicates."""

    made = 0

    def Idup(self, *args):  # noqa: N802  # MPI's name
        Counting.made += 1
        return super().Idup(*args)


@pytest.mark.ranks
def test_tapes_made_anew_make_one_communicator():
    Counting.made = 0
    held, tapes = tf.Variable(tf.zeros(40)), []
    for step in range(4):
        tape = tape_of(comm=Counting(COMM))
        with tape:
            loss = tf.reduce_sum(held * draw((40,), step))
        tape.gradient(loss, held)
        tapes.append(tape)
    other = tape_of(comm=Counting(COMM), op=sparse.Sum)
    assert Counting.made == 2
    assert {tape.traffic.steps for tape in tapes} == {4}
    assert other.traffic.steps == 0
    for tape in [*tapes, other]:
        tape.close()
    again = tape_of(comm=Counting(COMM))
    assert Counting.made == 3
    assert again.state_dict()["tensors"] == {}
    again.close()
    with pytest.raises(ExchangeError, match="closed"):
        again.gradient(loss, held)


def test_residuals_of_variables_that_are_gone_are_dropped_and_their_names_stay_taken():
    tape = tape_of()
    for number in range(3):
        held = tf.Variable(tf.zeros(40), name="held")
        with tape:
            loss = tf.reduce_sum(held * draw((40,), number))
        tape.gradient(loss, held)
        names = list(tape.state_dict()["tensors"])
        assert names == ["held" if number == 0 else f"held#{number}"]
        del held, loss
    tape.close()


@pytest.mark.ranks
def test_a_variable_that_is_a_source_twice_has_two_residuals():
    held, tape = tf.Variable(tf.zeros(40)), tape_of()
    for step in range(3):
        with tape:
            loss = tf.reduce_sum(held * draw((40,), step))
        one, other = tape.gradient(loss, [held, held])
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    tape.close()


@pytest.mark.ranks
def test_tensors_go_by_their_place_among_the_tensors():
    held, tape = tf.Variable(tf.zeros(40)), tape_of()
    for step in range(2):
        first, second = tf.zeros(40), tf.zeros(8)
        with tape:
            tape.watch([first, second])
            loss = tf.reduce_sum((held + first) * draw((40,), step))
            loss += tf.reduce_sum(second)
        sources = [first, held, second] if step else [held, first, second]
        tape.gradient(loss, sources)
    assert set(tape.state_dict()["tensors"]) == {"Variable", "source0", "source1"}
    tape.close()


@pytest.mark.ranks
def test_a_copy_of_an_optimizer_is_distributed_with_residuals_of_its_own():
    held = variable()
    first = distribute()
    second = first.from_config(first.get_config())
    assert type(second).__name__ == "SGD"
    assert second.get_config() == first.get_config()
    for step in range(3):
        for optimizer in (first, second):
            optimizer.apply_gradients([(tf.constant(draw((40,), step)), held)])
    residuals = [
        optimizer.residual_state_dict()["tensors"].popitem()[1]["residual"].numpy()
        for optimizer in (first, second)
    ]
    np.testing.assert_array_equal(*residuals)
    assert first.traffic.steps == second.traffic.steps == 3
    first.close()
    second.close()


# ------------------------------------------------------------------------------- states


def stepped(optimizer, held, *steps):
    """Some steps; per step the places of the variables."""
    for step, places in steps:
        pairs = [(tf.constant(draw(held[p].shape, step, p)), held[p]) for p in places]
        optimizer.apply_gradients(pairs)


def restarted(state, held, *, build=True):
    optimizer = distribute()
    optimizer.load_residual_state_dict(state)
    optimizer.build(held) if build else None
    return optimizer


@pytest.mark.ranks
@pytest.mark.parametrize("names", [("Variable",) * 3, ("a", "b", "c")])
def test_a_restart_may_begin_with_other_variables(names):
    def start():
        return [variable(name=name) for name in names]

    held, optimizer = start(), distribute()
    optimizer.build(held)
    stepped(optimizer, held, (0, [2]), (1, [0, 2]), (2, [1]))
    state, values = optimizer.residual_state_dict(), [v.numpy() for v in held]
    rest = [(3, [1]), (4, [0, 1, 2])]
    stepped(optimizer, held, *rest)
    expected_weights = weights(held)
    optimizer.close()

    held = start()
    for v, value in zip(held, values, strict=True):
        v.assign(value)
    optimizer = restarted(state, held)
    assert optimizer.residual_state_dict()["tensors"].keys() == state["tensors"].keys()
    stepped(optimizer, held, *rest)
    assert weights(held) == expected_weights
    optimizer.close()


@pytest.mark.ranks
@keras_2
def test_where_names_do_not_tell_a_restart_refuses_to_guess():
    held, optimizer = [variable() for _ in range(2)], distribute()
    optimizer.build(held)
    stepped(optimizer, held, (0, [0]), (1, [1]))
    state = optimizer.residual_state_dict()
    optimizer.close()
    optimizer = distribute()
    optimizer.load_residual_state_dict(state)
    with pytest.raises(ValueError, match=r"Variable: state has 2 .*show all of them"):
        optimizer.apply_gradients([(tf.ones(40), variable())])
    optimizer.close()


@pytest.mark.ranks
def test_a_running_optimizer_goes_back_to_an_earlier_state():
    held, optimizer = [variable(name=n) for n in "ab"], distribute()
    optimizer.build(held)
    stepped(optimizer, held, (0, [0]))
    state, values = optimizer.residual_state_dict(), [v.numpy() for v in held]
    results = []
    for _ in range(2):
        stepped(optimizer, held, (1, [0, 1]), (2, [1, 0]))
        results.append(weights(held))
        optimizer.load_residual_state_dict(state)
        for v, value in zip(held, values, strict=True):
            v.assign(value)
    assert results[0] == results[1]
    optimizer.close()


@pytest.mark.ranks
@pytest.mark.parametrize("when", ["before the first step", "later"])
def test_states_of_version_0_1_0_load_by_place(when):
    held, optimizer = [variable(s) for s in ((40,), (7, 5), (40,))], distribute()
    optimizer.build(held)
    steps = [(0, [0, 1, 2]), (1, [0, 1, 2])]
    stepped(optimizer, held, *steps)
    state, values = optimizer.residual_state_dict(), [v.numpy() for v in held]
    stepped(optimizer, held, (2, [0, 1, 2]))
    after = weights(held)
    del state["variables"]
    residuals = [state["tensors"][name] for name in names_of(state, held)]
    state["tensors"] = {f"gradient{i}": saved for i, saved in enumerate(residuals)}
    if when == "before the first step":
        optimizer.close()
        optimizer = distribute()
    optimizer.load_residual_state_dict(state)
    for v, value in zip(held, values, strict=True):
        v.assign(value)
    stepped(optimizer, held, (2, [0, 1, 2]))
    assert weights(held) == after
    wrong = [variable(shape) for shape in ((40,), (3,))]
    if when == "before the first step":
        other = distribute()
        other.load_residual_state_dict(state)
        with pytest.raises(Exception, match=r"gradient1: state has shape \(7, 5\)"):
            stepped(other, wrong, (0, [0, 1]))
        other.close()
    optimizer.close()


def names_of(state, held):
    """In the order of the variables; they are equal but for their numbers."""
    shapes = [tuple(v.shape) for v in held]
    left = dict(state["tensors"])
    order = []
    for shape in shapes:
        name = next(n for n in sorted(left) if left[n]["shape"] == shape)
        order.append(name)
        del left[name]
    return order


@pytest.mark.ranks
def test_another_models_state_is_refused():
    optimizer = distribute()
    held = [variable((40,), name="w")]
    stepped(optimizer, held, (0, [0]))
    state = optimizer.residual_state_dict()
    optimizer.close()
    optimizer = restarted(state, [], build=False)
    message = re.escape("w: state has shape (40,), expected (8,)")
    with pytest.raises(ValueError, match=message):
        stepped(optimizer, [variable((8,), name="w")], (0, [0]))
    optimizer.close()


def test_a_state_can_be_saved_before_a_step():
    held, tape = tf.Variable(tf.zeros(40)), tape_of()
    with tape:
        loss = tf.reduce_sum(held * draw((40,), 0))
    tape.gradient(loss, held)
    state = tape.state_dict()
    tape.close()
    tape = tape_of()
    tape.load_state_dict(state)
    again = tape.state_dict()["tensors"]["Variable"]
    saved = state["tensors"]["Variable"]["residual"].numpy()
    assert isinstance(again["residual"], tf.Tensor)
    np.testing.assert_array_equal(again["residual"].numpy(), saved)
    tape.close()
