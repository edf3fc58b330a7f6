"""A step fails whole, wherever a rank raises in it; 2 ranks or more.

The last rank raises at each stage in turn. Every rank gets an error by name, long
before the deadline; no weight has moved, nothing is lost, and the next step works.
"""

import signal
import time

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from stages import DAMAGES, STAGES, damage, without_memory

from hvd_sparse import ExchangeError, Never, SignTopK, TopK, WhenCheaper
from hvd_sparse.core.memory import ErrorFeedback
from hvd_sparse.core.path import GradientPath
from hvd_sparse.tensorflow import SparseCompressor
from hvd_sparse.tensorflow.gathers import GraphExchange

DEADLINE_S = 60
SOON_S = DEADLINE_S / 3  # for all that these steps do; the machine is shared
SIZES = {"first": 300, "middle": 8, "last": 200}  # by which they are WhenCheaper
NEVER = Never()


@pytest.fixture(autouse=True)
def alike():
    tf.keras.backend.clear_session()
    yield
    hvd.allgather_object(0)  # a barrier


@pytest.fixture(params=["eager", "graph"])
def mode(request):
    tf.config.run_functions_eagerly(request.param == "eager")
    yield request.param
    tf.config.run_functions_eagerly(False)


def is_last():
    return hvd.rank() == hvd.size() - 1


class Job:
    """Variables in training, whose gradients are what they are multiplied with."""

    def __init__(self, sparsifier, dense=NEVER):
        self.sparsifier = sparsifier
        self.compression = SparseCompressor(
            sparsifier, dense=dense, timeout_s=DEADLINE_S
        )
        self.variables = [tf.Variable(tf.ones(n), name=m) for m, n in SIZES.items()]
        self.step = tf.function(self._step)

    def _step(self, factors):
        with tf.GradientTape() as tape:
            products = zip(self.variables, factors, strict=True)
            loss = sum(tf.reduce_sum(v * factor) for v, factor in products)
        tape = hvd.DistributedGradientTape(tape, compression=self.compression)
        gradients = tape.gradient(loss, self.variables)
        for variable, gradient in zip(self.variables, gradients, strict=True):
            variable.assign_sub(0.1 * gradient)
        return gradients

    def gradients(self, step):
        rng = np.random.default_rng([hvd.rank(), step])
        sizes = SIZES.items()
        return {m: rng.standard_normal(n).astype(np.float32) for m, n in sizes}

    def train(self, step):
        factors = [tf.constant(g) for g in self.gradients(step).values()]
        return dict(zip(SIZES, self.step(factors), strict=True))

    @property
    def residuals(self):
        tensors = self.compression.state_dict()["tensors"]
        return {
            name: tensor["residual"].numpy()
            for name, tensor in tensors.items()
            if tensor["residual"] is not None
        }

    @property
    def steps(self):
        """Of all ranks' tensors that go sparse."""
        tensors = self.compression.state_dict()["tensors"].values()
        own = {t["step"] for t in tensors if t["residual"] is not None}
        return set().union(*hvd.allgather_object(own))

    @property
    def weights(self):
        return np.concatenate([variable.numpy() for variable in self.variables])


def added(residuals, gradients):
    return {name: residual + gradients[name] for name, residual in residuals.items()}


def fails(job, mode, step, own, told):
    """The error of a step, which comes soon; TensorFlow wraps that of a graph."""
    kind = own if is_last() else ExchangeError
    text = told if kind is ExchangeError else ""
    began = time.monotonic()
    with pytest.raises(kind if mode == "eager" else tf.errors.OpError) as raised:
        job.train(step)
    assert time.monotonic() - began < SOON_S
    kinds = (
        ["PayloadError", "RaisedError"] if kind is ExchangeError else [kind.__name__]
    )
    found = f"{type(raised.value).__name__}: {raised.value}"
    assert any(name in found for name in kinds)
    if text:
        raised.match(told)


def works(job, step):
    """It hands back what all ranks have sent, which is missing from the residuals."""
    held = added(job.residuals, job.gradients(step))
    results = job.train(step)
    after = job.residuals
    sent = {name: total - after[name] for name, total in held.items()}
    everyones = hvd.allgather_object(sent)
    for name in sent:
        total = everyones[0][name]
        for others in everyones[1:]:
            total = total + others[name]
        mean = total * np.float32(1 / hvd.size())
        np.testing.assert_array_equal(results[name], mean, err_msg=name)
    assert len(set(hvd.allgather_object(job.weights.tobytes()))) == 1


def same(found, expected, *, rounded):
    for name, residual in expected.items():
        # (v - s) + s is v but for a rounding of the larger of them
        atol = 3e-7 * np.abs(residual).max() if rounded else 0
        np.testing.assert_allclose(found[name], residual, 0, atol, err_msg=name)


def check(job, mode, prepare, own, told, *, refused=False):
    rounded = isinstance(job.sparsifier, SignTopK)
    job.train(0)
    weights = job.weights
    before, expected = job.residuals, added(job.residuals, job.gradients(1))
    if refused and is_last():
        expected["middle"] = before["middle"]  # there is nothing that could be added
    with pytest.MonkeyPatch.context() as patch:
        if is_last():
            prepare(patch, "middle")
        fails(job, mode, 1, own, told)
    same(job.residuals, expected, rounded=rounded)
    np.testing.assert_array_equal(job.weights, weights)
    assert job.steps == {1}
    job.train(2) if rounded else works(job, 2)
    assert job.steps == {2}


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_that_raises_is_heard_by_all_and_nothing_is_lost(stage, mode):
    prepare, sparsifier, own, told = STAGES[stage]
    check(
        Job(sparsifier),
        mode,
        prepare,
        own,
        rf"\S+: rank {hvd.size() - 1}: raised {told}",
        refused=stage == "admit",
    )


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.parametrize("where", DAMAGES)
def test_a_damaged_payload_fails_the_step_of_all_tensors(where, mode):
    spoil, told = DAMAGES[where]
    told = rf"middle: (rank {hvd.size() - 1}: )?.*{told}"

    def prepare(patch, name):
        damage(patch, GraphExchange, name, spoil)

    check(Job(TopK(0.05)), mode, prepare, ExchangeError, told)


@pytest.mark.ranks
def test_a_step_with_dense_tensors_fails_whole(mode):
    job = Job(TopK(0.05), WhenCheaper())
    told = rf"rank {hvd.size() - 1}: raised MemoryError"
    check(job, mode, without_memory, MemoryError, told)
    tensors = job.compression.state_dict()["tensors"].values()
    assert {tensor["residual"] is None for tensor in tensors} == {True, False}


def test_a_graph_that_can_not_tell_its_variables_tells_its_peers(mode):
    if mode == "eager":
        pytest.skip("there is no graph")
    job = Job(TopK(0.05))
    job.train(0)
    weights, expected = job.weights, job.residuals

    def raising(self):
        patch.undo()
        raise ZeroDivisionError("in begin")

    with pytest.MonkeyPatch.context() as patch:
        if is_last():
            patch.setattr(GradientPath, "begin", raising)
        else:
            expected = added(expected, job.gradients(1))
        told = rf"rank {hvd.size() - 1}: raised ZeroDivisionError: in begin"
        fails(job, mode, 1, ZeroDivisionError, told)
    same(job.residuals, expected, rounded=False)
    np.testing.assert_array_equal(job.weights, weights)
    works(job, 2)
    assert job.steps == {2}


@pytest.mark.ranks
@pytest.mark.parametrize("mode", ["eager"], indirect=True)
@pytest.mark.parametrize("where", ["first", "last"])
def test_ctrl_c_waits_until_the_step_is_whole(where, mode, monkeypatch):
    """On the last rank; its peers go on, or hear of it: nothing between the two."""
    job = Job(TopK(0.05))
    job.train(0)
    expected = added(job.residuals, job.gradients(1))
    residual = ErrorFeedback.residual

    def interrupt(self, name, gradient):
        if name == where:
            monkeypatch.undo()
            signal.raise_signal(signal.SIGINT)
        return residual(self, name, gradient)

    if is_last():
        monkeypatch.setattr(ErrorFeedback, "residual", interrupt)
    raised = None
    try:
        job.train(1)
    except (KeyboardInterrupt, ExchangeError) as error:
        raised = error
    assert not is_last() or isinstance(raised, KeyboardInterrupt)
    [step] = job.steps
    assert step == (2 if where == "last" else 1)
    if step == 1:
        assert all(hvd.allgather_object(raised is not None))
        same(job.residuals, expected, rounded=False)
        works(job, 2)
