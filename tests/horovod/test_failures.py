"""A step fails whole, wherever a rank raises in it; 2 ranks or more.

The last rank raises at each stage in turn. Every rank gets an error by name, long
before the deadline; nothing is lost, no rank is a step ahead, and the next step works.
"""

import signal
import time

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from horovod.common.exceptions import HorovodInternalError
from stages import DAMAGES, STAGES, Users, damage, refused, without_memory
from torch import nn

from hvd_sparse import (
    Embedded,
    ExchangeError,
    Gathered,
    Never,
    SignTopK,
    TopK,
    WhenCheaper,
)
from hvd_sparse.core.path import GradientPath
from hvd_sparse.torch import exchanges
from hvd_sparse.torch.exchanges import EmbeddedExchange, GatheredExchange
from hvd_sparse.torch.horovod import SparseCompressor

DEADLINE_S = 60
SOON_S = DEADLINE_S / 3  # for all that these steps do; the machine is shared
CARRIERS = [Gathered(), Embedded()]
NEVER = Never()


@pytest.fixture(autouse=True)
def alike():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    hvd.barrier()


def is_last():
    return hvd.rank() == hvd.size() - 1


class Job:
    """A model in training."""

    def __init__(self, sparsifier, carrier, dense=NEVER, **options):
        torch.manual_seed(0)
        layers = nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 3)
        self.model = nn.Sequential(*layers)
        self.compression = SparseCompressor(
            sparsifier,
            named_parameters=self.model.named_parameters(),
            dense=dense,
            exchange=carrier,
            timeout_s=DEADLINE_S,
            **options,
        )
        self.optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9),
            named_parameters=self.model.named_parameters(),
            compression=self.compression,
        )

    def loss(self, step):
        rng = np.random.default_rng([hvd.rank(), step])
        x = torch.from_numpy(rng.standard_normal((16, 6)).astype(np.float32))
        return self.model(x).square().sum(1).mean()

    def train(self, step):
        self.optimizer.zero_grad()
        self.loss(step).backward()
        self.optimizer.step()

    def gradients(self, step):
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(self.loss(step), parameters)
        return dict(zip(names, gradients, strict=True))

    @property
    def residuals(self):
        tensors = self.compression.state_dict()["tensors"]
        return {n: t["residual"] for n, t in tensors.items() if t["step"] is not None}

    @property
    def steps(self):
        """Of all ranks' tensors."""
        own = {t["step"] for t in self.compression.state_dict()["tensors"].values()}
        return set().union(*hvd.allgather_object(own))

    @property
    def weights(self):
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])


def added(residuals, gradients):
    """Of those that go sparse."""
    return {n: r + gradients[n] for n, r in residuals.items() if r is not None}


def fails(job, step, own, told):
    """The error of a step, which comes soon."""
    began = time.monotonic()
    kind = own if is_last() else ExchangeError
    text = told if kind is ExchangeError else None
    with pytest.raises(kind, match=text) as raised:
        job.train(step)
    assert time.monotonic() - began < SOON_S
    return raised.value


def works(job, step):
    """It hands back what all ranks have sent, which is missing from the residuals."""
    held = added(job.residuals, job.gradients(step))
    job.train(step)
    after = job.residuals
    sent = {name: (total - after[name]).numpy() for name, total in held.items()}
    everyones = hvd.allgather_object(sent)
    for name, parameter in job.model.named_parameters():
        if name in sent:
            total = everyones[0][name]
            for others in everyones[1:]:
                total = total + others[name]
            mean = total * np.float32(1 / hvd.size())
            np.testing.assert_array_equal(parameter.grad, mean, err_msg=name)
    assert len(set(hvd.allgather_object(job.weights.numpy().tobytes()))) == 1


def same(found, expected, *, rounded):
    assert found.keys() >= expected.keys()
    for name, residual in expected.items():
        if rounded:  # (v - s) + s is v but for a rounding of the larger of them
            scale = float(residual.abs().max())
            torch.testing.assert_close(found[name], residual, rtol=0, atol=scale * 3e-7)
        else:
            assert torch.equal(found[name], residual), name


def check(job, prepare, own, told, *, name="0.bias", refused=False, rounded=False):
    job.train(0)
    weights = job.weights
    before, expected = job.residuals, added(job.residuals, job.gradients(1))
    if refused and is_last():
        expected["0.bias"] = before["0.bias"]  # there is nothing that could be added
    with pytest.MonkeyPatch.context() as patch:
        if is_last():
            prepare(patch, name)
        fails(job, 1, own, told)
    same(job.residuals, expected, rounded=rounded)
    assert torch.equal(job.weights, weights)
    assert job.steps == {1}
    if rounded:
        job.train(2)
    else:
        works(job, 2)
    assert job.steps == {2}


together = pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])


@pytest.mark.ranks
@pytest.mark.transport
@together
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_that_raises_is_heard_by_all_and_nothing_is_lost(
    stage, carrier, apart, monkeypatch
):
    if apart:
        monkeypatch.setattr(exchanges, "BATCH_BYTES", 1)
    prepare, sparsifier, own, told = STAGES[stage]
    if carrier == Embedded():
        told = told[:5]  # a slot has no more room than the payload of its tensor
    check(
        Job(sparsifier, carrier),
        prepare,
        own,
        rf"^\S+: rank {hvd.size() - 1}: raised {told}",
        refused=stage == "admit",
        rounded=isinstance(sparsifier, SignTopK),
    )


@pytest.mark.ranks
@pytest.mark.transport
@together
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
@pytest.mark.parametrize("where", DAMAGES)
def test_a_damaged_payload_fails_the_step_of_all_tensors(
    where, carrier, apart, monkeypatch
):
    if apart:
        monkeypatch.setattr(exchanges, "BATCH_BYTES", 1)
    spoil, told = DAMAGES[where]
    told = rf"^0\.weight: (rank {hvd.size() - 1}: )?.*{told}"

    def prepare(patch, name):
        for kind in (GatheredExchange, EmbeddedExchange):
            damage(patch, kind, name, spoil)

    check(Job(TopK(0.05), carrier), prepare, ExchangeError, told, name="0.weight")


@pytest.mark.ranks
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
def test_a_step_with_dense_tensors_fails_whole(carrier):
    job = Job(TopK(0.01), carrier, WhenCheaper())
    told = rf"rank {hvd.size() - 1}: raised Mem"
    check(job, without_memory, MemoryError, told)
    routes = {tensor.route for tensor in job.compression.traffic.tensors.values()}
    assert routes == {"dense", "sparse"}


def test_a_dense_tensor_that_is_refused_on_one_rank_is_an_error_on_all(caplog):
    job = Job(TopK(0.05), Gathered(), WhenCheaper())
    job.train(0)
    with pytest.MonkeyPatch.context() as patch:
        if is_last():
            refused(patch, "2.bias")
        # the first of the step, so that Horovod's own error comes before ours
        with pytest.raises(HorovodInternalError, match="Mismatched ALLREDUCE tensor"):
            job.train(1)
    told = "2.bias: is not reduced: this rank raised ValueError: 2.bias: gradient has"
    assert (told in caplog.text) == is_last()
    hvd.barrier()  # what is on its way is there, on all ranks
    job.optimizer.load_state_dict(job.optimizer.state_dict())  # Horovod's own cure
    works(job, 2)
    assert job.steps == {2}


@pytest.mark.ranks
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
@pytest.mark.parametrize("stage", ["select", "aggregate"])
def test_ctrl_c_waits_until_the_step_is_whole(stage, carrier, monkeypatch):
    """On the last rank; its peers go on, or hear of it: nothing between the two."""
    job = Job(Users(), carrier)
    job.train(0)
    original = Users.select
    hand_back = GradientPath.hand_back

    def interrupt():
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)

    def select(self, *arguments):
        interrupt()
        return original(self, *arguments)

    def hand_back_interrupted(*arguments):
        interrupt()
        return hand_back(*arguments)

    expected = added(job.residuals, job.gradients(1))
    if is_last() and stage == "select":
        monkeypatch.setattr(Users, "select", select)
    elif is_last():
        monkeypatch.setattr(GradientPath, "hand_back", hand_back_interrupted)
    raised = None
    try:
        job.train(1)
    except (KeyboardInterrupt, ExchangeError) as error:
        raised = error
    assert not is_last() or isinstance(raised, KeyboardInterrupt)
    [step] = job.steps
    heard = hvd.allgather_object(raised is not None)
    assert set(heard) == ({True} if step == 1 else {True, False})
    if step == 1:
        same(job.residuals, expected, rounded=False)
    if is_last() and step == 2:  # where it stopped, all is there for its step
        with job.optimizer.skip_synchronize():
            job.optimizer.step()
    works(job, 2)


class RaisesOnce(TopK):
    """On the last rank, when it is told to."""

    told = False

    def select(self, residual, gradient, k, step):
        if RaisesOnce.told and is_last():
            RaisesOnce.told = False
            raise ZeroDivisionError
        return super().select(residual, gradient, k, step)


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
def test_a_failed_step_is_not_taken_for_one_that_was_thrown_away(carrier):
    """What arrived before the error, as a bias that goes dense, was not left unused."""
    job = Job(RaisesOnce(0.02), carrier, WhenCheaper(), undo=True)
    job.train(0)
    RaisesOnce.told = True
    job.optimizer.zero_grad()
    job.loss(1).backward()
    with pytest.raises(ZeroDivisionError if is_last() else ExchangeError):
        job.optimizer.synchronize()
    RaisesOnce.told = False
    works(job, 2)
    routes = {tensor.route for tensor in job.compression.traffic.tensors.values()}
    assert routes == {"dense", "sparse"}


@pytest.mark.ranks
def test_what_no_optimizer_gave_counts_when_it_arrives():
    """Not with others whose results were never asked for."""
    p, q = (torch.zeros(8, requires_grad=True) for _ in range(2))
    named = [("p", p), ("q", q)]
    compression = SparseCompressor(TopK(0.25), named_parameters=named, dense=Never())
    expected = np.zeros(8, np.float32)
    for step in range(3):
        p.grad, q.grad = torch.ones(8), torch.arange(8.0)
        if step == 1:  # this one's result is not asked for
            reduced, _ = compression.compress(p.grad)
            hvd.allreduce(reduced, name="left alone")
        q.grad = hvd.allreduce(q.grad, name="q", compression=compression)
        expected += np.arange(8)
        expected[np.argsort(expected)[-2:]] = 0
    q_state = compression.state_dict()["tensors"]["q"]
    assert q_state["step"] == 3
    assert q_state["residual"].tolist() == expected.tolist()
