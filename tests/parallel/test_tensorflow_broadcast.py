"""Variables start alike; every test holds at any number of ranks."""

import numpy as np
import pytest
import tensorflow as tf
from mpi4py import MPI

import hvd_sparse.tensorflow as sparse
from hvd_sparse import ExchangeError

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.Get_rank(), COMM.Get_size()
LAST = SIZE - 1

several = pytest.mark.skipif(SIZE == 1, reason="needs mpirun -np 2 or more")


def broadcast(variables, **options):
    sparse.broadcast_variables(
        variables, **{"root": LAST, "comm": COMM, "timeout_s": 30, **options}
    )


def bits(variables) -> bytes:
    return b"".join(np.asarray(v.numpy()).tobytes() for v in variables)


def numbers(shape, dtype):
    values = np.random.default_rng(RANK).standard_normal(shape) * 100
    return tf.cast(values, dtype)


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool", "int64", "complex64"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5, 7)], ids=str)
def test_all_take_the_roots_bits(shape, dtype):
    variables = [tf.Variable(numbers(shape, dtype)), tf.Variable(RANK)]
    sent = COMM.bcast(bits(variables), LAST)
    broadcast(variables)
    assert bits(variables) == sent
    assert variables[0].shape == shape


@pytest.mark.ranks
def test_a_keras_model_and_its_optimizer():
    drawn = tf.keras.initializers.RandomNormal(seed=RANK)
    model = tf.keras.Sequential(
        [
            tf.keras.layers.Input((4,)),
            tf.keras.layers.Dense(4, kernel_initializer=drawn),
            tf.keras.layers.BatchNormalization(),
        ]
    )
    optimizer = tf.keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    variables = [*model.variables, *optimizer.variables]
    for root in range(SIZE):
        broadcast(variables, root=root)
        assert len(set(COMM.allgather(bits(variables)))) == 1


@pytest.mark.ranks
def test_large_variables_travel_in_pieces(monkeypatch):
    monkeypatch.setattr("hvd_sparse.transport.mpi.broadcast._PIECE_BYTES", 1000)
    variables = [tf.Variable(numbers((2501,), "float32"))]
    broadcast(variables)
    assert len(set(COMM.allgather(bits(variables)))) == 1


@pytest.mark.ranks
@several
def test_variables_that_differ_are_an_error_before_anything_moves():
    variables = [tf.Variable(numbers((3,), "float32")), tf.Variable(RANK)]
    if RANK == LAST:
        variables[1] = tf.Variable(numbers((4,), "float32"))
    before = bits(variables)
    with pytest.raises(ExchangeError, match=r"variable1: rank \d has shape \("):
        broadcast(variables)
    assert bits(variables) == before


@pytest.mark.ranks
@several
def test_what_holds_no_numbers_is_refused_and_heard_of():
    variable = tf.Variable("text") if RANK == LAST else tf.Variable(1.0)
    error = TypeError if RANK == LAST else ExchangeError
    with pytest.raises(error, match="variable0: must be numbers, got <dtype: 'string'"):
        broadcast([variable])
