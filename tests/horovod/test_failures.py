"""A step fails whole, wherever a rank raises in it; 2 ranks or more.

The last rank raises at each stage in turn. Every rank gets an error by name, long
before the deadline; nothing is lost, no rank is a step ahead, and the next step works.
"""

import signal
import time
from dataclasses import dataclass

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import nn

from hvd_sparse import (
    Embedded,
    ExchangeError,
    Gathered,
    Never,
    Selection,
    SignTopK,
    TopK,
    WhenCheaper,
)
from hvd_sparse.core import outbound
from hvd_sparse.core.payload import Message
from hvd_sparse.kernels import kernels_for
from hvd_sparse.torch import exchanges
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


@dataclass(frozen=True)
class Users:
    """The largest of the first half, by a user who has never heard of a rollback."""

    density: float = 0.05

    def select(self, residual, gradient, k, step):
        kernels = kernels_for(residual)
        indices = np.arange(k, dtype=np.int32)
        return Selection(*kernels.select_at(residual, gradient, indices))


def once(monkeypatch, owner, name, error):
    """From now on its first call raises, whoever calls; then all is as it was."""
    original = getattr(owner, name)

    def raising(*arguments, **options):
        monkeypatch.setattr(owner, name, original)
        raise error

    monkeypatch.setattr(owner, name, raising)


def refused(monkeypatch, compression):
    """In the middle of others: it has another shape than in earlier steps."""
    tensor = compression._path.tensors["0.bias"]
    monkeypatch.setattr(tensor, "shape", (7,))


def selected_badly(monkeypatch, compression):
    def select(self, residual, gradient, k, step):
        residual[:] = 7.0
        monkeypatch.undo()
        raise ZeroDivisionError("in select")

    monkeypatch.setattr(Users, "select", select)


def chosen_badly(monkeypatch, compression):
    def select(self, residual, gradient, k, step):
        monkeypatch.undo()
        return Selection(np.full(k, 1 << 20, np.int32), gradient[:k].copy(), 0)

    monkeypatch.setattr(Users, "select", select)


def without_memory(monkeypatch, compression):
    """For whichever comes first, one alone or many at once."""
    error = MemoryError("no room to encode")
    original = outbound.encode, Message.lay_out

    def raising(*arguments, **options):
        monkeypatch.setattr(outbound, "encode", original[0])
        monkeypatch.setattr(Message, "lay_out", original[1])
        raise error

    monkeypatch.setattr(outbound, "encode", raising)
    monkeypatch.setattr(Message, "lay_out", raising)


def residual_raises(monkeypatch, compression):
    memory = compression._path.memory
    once(monkeypatch, memory, "residual", ZeroDivisionError("in residual"))


def keep_raises(monkeypatch, compression):
    memory = compression._path.memory
    once(monkeypatch, memory, "keep", ZeroDivisionError("in keep"))


def interrupted(monkeypatch, compression):
    memory = compression._path.memory
    once(monkeypatch, memory, "residual", KeyboardInterrupt("in residual"))


def damaged(at, value):
    def damage(monkeypatch, compression):
        """On the wire, what this rank sends of one tensor."""
        carrier = compression._carrier
        start = carrier.start

        def start_damaged(name, payload):
            if name == "0.weight":
                payload = payload.copy()
                payload[at] ^= value
            return start(name, payload)

        monkeypatch.setattr(carrier, "start", start_damaged)

    return damage


LAST_INDEX = slice(-1, None)  # its most significant byte

# the fault, the sparsifier, what the last rank raises, what the others are told
STAGES = {
    "admit": (refused, TopK(0.05), ValueError, "ValueError: 0.bias: gradient has sh"),
    "select": (selected_badly, Users(), ZeroDivisionError, "ZeroDivisionError: in sel"),
    "check": (chosen_badly, Users(), ValueError, "ValueError: .* indices"),
    "memory": (residual_raises, TopK(0.05), ZeroDivisionError, "ZeroDivisionError: in"),
    "user's memory": (residual_raises, Users(), ZeroDivisionError, "ZeroDivisionError"),
    "keep": (keep_raises, SignTopK(0.05), ZeroDivisionError, "ZeroDivisionError: in k"),
    "encode": (without_memory, TopK(0.05), MemoryError, "MemoryError: no room to enc"),
    "user's encode": (without_memory, Users(), MemoryError, "MemoryError: no room to "),
    "interrupt": (interrupted, TopK(0.05), KeyboardInterrupt, "KeyboardInterrupt: in"),
}
DAMAGES = {
    "decode": (damaged(24, 255), "digest"),
    "aggregate": (damaged(LAST_INDEX, 128), "indices must ascend"),
}


class Job:
    """A model in training."""

    def __init__(self, sparsifier, carrier, dense=NEVER):
        torch.manual_seed(0)
        layers = nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 3)
        self.model = nn.Sequential(*layers)
        self.compression = SparseCompressor(
            sparsifier,
            named_parameters=self.model.named_parameters(),
            dense=dense,
            exchange=carrier,
            timeout_s=DEADLINE_S,
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


def check(job, prepare, own, told, *, rounded):
    job.train(0)
    weights = job.weights
    before, expected = job.residuals, added(job.residuals, job.gradients(1))
    if prepare is refused and is_last():
        expected["0.bias"] = before["0.bias"]  # there is nothing that could be added
    with pytest.MonkeyPatch.context() as patch:
        if is_last():
            prepare(patch, job.compression)
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
    told = rf"^\S+: rank {hvd.size() - 1}: raised {told}"
    rounded = isinstance(sparsifier, SignTopK)
    check(Job(sparsifier, carrier), prepare, own, told, rounded=rounded)


@pytest.mark.ranks
@pytest.mark.transport
@together
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_payload_fails_the_step_of_all_tensors(
    damage, carrier, apart, monkeypatch
):
    if apart:
        monkeypatch.setattr(exchanges, "BATCH_BYTES", 1)
    prepare, told = DAMAGES[damage]
    told = rf"^0\.weight: (rank {hvd.size() - 1}: )?.*{told}"
    check(Job(TopK(0.05), carrier), prepare, ExchangeError, told, rounded=False)


@pytest.mark.ranks
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
def test_a_step_with_dense_tensors_fails_whole(carrier):
    job = Job(TopK(0.05), carrier, WhenCheaper())
    told = rf"rank {hvd.size() - 1}: raised Mem"
    check(job, without_memory, MemoryError, told, rounded=False)
    routes = {tensor.route for tensor in job.compression.traffic.tensors.values()}
    assert routes == {"dense", "sparse"}


def test_a_dense_tensor_that_is_refused_on_one_rank_is_an_error_on_all(caplog):
    job = Job(TopK(0.05), Gathered(), WhenCheaper())
    job.train(0)
    with pytest.MonkeyPatch.context() as patch:
        if is_last():
            patch.setattr(job.compression._path.tensors["2.bias"], "shape", (7,))
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
    hand_back = job.compression._path.hand_back

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
        monkeypatch.setattr(job.compression._path, "hand_back", hand_back_interrupted)
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
