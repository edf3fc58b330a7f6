"""SparseCompressor in a real hvd.DistributedOptimizer; 2 ranks or more."""

import contextlib
import copy
import gc
import logging
import pickle
import threading
import time
import weakref

import horovod.torch as hvd
import members
import numpy as np
import pytest
import torch
from doors import AFFINE, LOW_DENSITIES, TORCH_OPTIMIZERS, Halving
from horovod.common.exceptions import HorovodInternalError
from torch import nn

import hvd_sparse.torch as sparse
from hvd_sparse import (
    CAT,
    Embedded,
    ExchangeError,
    Gathered,
    Never,
    RandomK,
    Selection,
    SignTopK,
    Stochastic,
    Threshold,
    TopK,
    WhenCheaper,
)
from hvd_sparse.core.formats import Entries
from hvd_sparse.core.payload import Header, decode, encode, payload_bytes
from hvd_sparse.core.values import Float32
from hvd_sparse.torch import measure
from hvd_sparse.torch.exchanges import GatheredExchange
from hvd_sparse.torch.horovod import SparseCompressor

CARRIERS = [Gathered(), Embedded()]


@pytest.fixture(autouse=True)
def alike():
    """The same model on every rank; data come from rank-seeded generators."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    hvd.barrier()  # what a test gave up is over before its names are used again


def gather(thing):
    return hvd.allgather_object(thing)


def perceptron(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3)).to(dtype)


def batch(step, dtype=torch.float32):
    rng = np.random.default_rng([hvd.rank(), step])
    return torch.from_numpy(rng.standard_normal((16, 6))).to(dtype)


def loss_of(model, step, dtype=torch.float32):
    return model(batch(step, dtype)).square().sum(1).mean()


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def compressor(model, sparsifier=None, **options):
    return SparseCompressor(
        sparsifier or TopK(density=0.05),
        named_parameters=model.named_parameters(),
        **{"dense": Never(), "timeout_s": 60, **options},
    )


def wrap(model, compression, lr=0.1, **options):
    return hvd.DistributedOptimizer(
        sgd(model, lr),
        named_parameters=model.named_parameters(),
        compression=compression,
        **options,
    )


def residual_of(compression, name):
    """What this rank has not sent of it."""
    return compression.state_dict()["tensors"][name]["residual"].numpy()


def share_an_allgather(compression, named):
    """These parameters, from now on: a first step of an optimizer plans it."""
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(named.values(), lr=0.0),
        named_parameters=named.items(),
        compression=compression,
    )
    sum((0 * parameter).sum() for parameter in named.values()).backward()
    optimizer.step()


@pytest.fixture
def allgathers(monkeypatch):
    """Handles of those that are begun."""
    begin, handles = hvd.allgather_async, []

    def noted(*arguments, **options):
        handles.append(begin(*arguments, **options))
        return handles[-1]

    monkeypatch.setattr(hvd, "allgather_async", noted)
    return handles


def train(model, optimizer, steps, dtype=torch.float32):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, dtype).backward()
        optimizer.step()


def weights(model):
    return torch.cat([p.detach().reshape(-1).double() for p in model.parameters()])


def bits(model) -> bytes:
    tensors = [p.detach().reshape(-1).view(torch.uint8) for p in model.parameters()]
    return torch.cat(tensors).numpy().tobytes()


def replicas_agree(model) -> bool:
    return len(set(gather(bits(model)))) == 1


def all_went_sparse(compression) -> bool:
    return {t.route for t in compression.traffic.tensors.values()} == {"sparse"}


# ------------------------------------------------------------------ law 2: replicas


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sparsifier", [TopK(0.05), RandomK(0.1), SignTopK(0.05)], ids=repr
)
def test_replicas_agree_bitwise(sparsifier, dtype, carrier):
    model = perceptron(dtype)
    compression = compressor(model, sparsifier, exchange=carrier)
    optimizer = wrap(model, compression)
    train(model, optimizer, range(4), dtype)
    assert replicas_agree(model)
    assert all_went_sparse(compression)
    assert compression.traffic.steps == 4


CHOOSING = [
    Threshold(0.05),
    SignTopK.alistarh(),
    Stochastic(0.05),
    CAT(TopK(), AFFINE),
    CAT(SignTopK(), AFFINE),
    CAT(Stochastic(), AFFINE),
]


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.parametrize("sparsifier", [*CHOOSING, Halving(0.02)], ids=repr)
def test_replicas_agree_where_ranks_or_steps_choose_k(sparsifier):
    model = perceptron()
    compression = compressor(model, sparsifier)
    train(model, wrap(model, compression), range(6))
    assert replicas_agree(model)
    assert all_went_sparse(compression)


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.parametrize("exchange", [Gathered(), Embedded()], ids=repr)
def test_values_choose_how_they_travel(exchange):
    trained = []
    for sparsifier, values in ((TopK(0.05), sparse.Sign()), (SignTopK(0.05), None)):
        model = perceptron()
        options = {"exchange": exchange, "values": values}
        compression = compressor(model, sparsifier, **options)
        train(model, wrap(model, compression), range(4))
        trained.append((bits(model), compression.traffic.sent_bytes))
    assert trained[0] == trained[1]


class Heads(nn.Module):
    """Uses heads in any order, or not at all."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(6, 40) for _ in range(4))

    def forward(self, x, order):
        for place, i in enumerate(order):
            x = x + 0.01 * (place + 1) * self.heads[i](x)[:, :6].tanh()
        return x


@pytest.mark.ranks
@pytest.mark.transport
def test_replicas_agree_after_200_steps_with_hooks_in_another_order_on_each_rank():
    model = Heads()
    compression = compressor(model, TopK(0.001))
    optimizer = wrap(model, compression)
    for step in range(200):
        optimizer.zero_grad()
        order = np.random.default_rng([hvd.rank(), step]).permutation(4)
        model(batch(step), order).square().mean().backward()
        optimizer.step()
    assert replicas_agree(model)
    assert compression.traffic.steps == 200


@pytest.mark.ranks
@pytest.mark.transport
def test_batches_change_nothing_but_the_number_of_allgathers(monkeypatch, allgathers):
    results = {}
    for limit in (1, 2000, 1 << 30):  # bytes of gradients
        monkeypatch.setattr("hvd_sparse.torch.exchanges.BATCH_BYTES", limit)
        torch.manual_seed(0)
        model = Heads()
        compression = compressor(model, TopK(0.05))
        optimizer = wrap(model, compression)
        for step in range(5):
            optimizer.zero_grad()
            rng = np.random.default_rng([hvd.rank(), step])
            model(batch(step), rng.permutation(3)).square().mean().backward()
            optimizer.step()
        assert replicas_agree(model)
        results[len(allgathers) / 5] = bits(model)
        allgathers.clear()
    # of 8 tensors, weights of 960 bytes and biases of 160
    assert list(results) == [8, 2, 1]
    assert len(set(results.values())) == 1


@pytest.mark.ranks
def test_embedding_gradients_beside_others_do_not_hold_up_their_batch():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.EmbeddingBag(50, 4, sparse=True, mode="sum"), nn.Linear(4, 40)
    )
    compression = compressor(model, TopK(0.1))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compression,
    )
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor([[hvd.rank(), 7, 7]])).square().sum().backward()
        optimizer.step()
    assert replicas_agree(model)
    assert set(compression.traffic.tensors) == {"1.weight", "1.bias"}


# ------------------------------------------------ gradients from backward to step


READ = [TopK(0.05), TopK(1.0), RandomK(0.1), SignTopK(0.05), Threshold(0.05)]


@pytest.mark.parametrize("dense", [Never(), WhenCheaper()], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsifier", READ, ids=repr)
def test_a_gradient_can_be_read_until_its_result_is_asked_for(sparsifier, dtype, dense):
    model, twin = perceptron(dtype), perceptron(dtype)
    optimizer = wrap(model, compressor(model, sparsifier, dense=dense))
    for each in (model, twin):
        loss_of(each, 0, dtype).backward()
    own = [p.grad for p in twin.parameters()]
    for mine, parameter in zip(own, model.parameters(), strict=True):
        assert torch.equal(parameter.grad, mine)
    optimizer.synchronize()
    found = [p.grad for p in model.parameters()]
    assert not all(map(torch.equal, found, own))
    assert len(set(gather(str([g.tolist() for g in found])))) == 1


@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
def test_a_gradient_can_be_read_where_it_is_embedded_too(carrier):
    parameter = nn.Parameter(torch.zeros(1000))
    named = [("p", parameter)]
    compression = SparseCompressor(
        TopK(0.01), named_parameters=named, exchange=carrier, dense=Never()
    )
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        named_parameters=named,
        compression=compression,
    )
    gradient = torch.randn(1000)
    (parameter * gradient).sum().backward()
    assert torch.equal(parameter.grad, gradient)
    optimizer.step()
    assert parameter.grad.count_nonzero() == 10


def added(parameter):
    parameter.grad.add_(1.0)


def clipped(parameter):
    nn.utils.clip_grad_norm_([parameter], 1e-3)


def replaced(parameter):
    parameter.grad = parameter.grad / 2


def part_written(parameter):
    parameter.grad.view(-1)[0] = 7.0


@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
@pytest.mark.parametrize("dense", [Never(), WhenCheaper()], ids=repr)
@pytest.mark.parametrize("write", [added, clipped, replaced, part_written])
def test_writing_into_a_gradient_under_way_is_an_error_with_its_name(
    write, dense, carrier
):
    model = perceptron()
    density = 1.0 if dense == WhenCheaper() else 0.05
    compression = compressor(model, TopK(density), exchange=carrier, dense=dense)
    optimizer = wrap(model, compression)
    loss_of(model, 0).backward()
    write(model[2].weight)
    with pytest.raises(
        ValueError, match=r"2\.weight: its gradient was changed after it"
    ):
        optimizer.step()


@pytest.mark.ranks
def test_a_gradient_that_waits_and_is_written_to_is_an_error_with_its_name():
    named = {name: nn.Parameter(torch.zeros(8)) for name in "pq"}
    compression = SparseCompressor(
        TopK(0.5), named_parameters=named.items(), dense=Never()
    )
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(named.values(), lr=1.0),
        named_parameters=named.items(),
        compression=compression,
    )
    (named["p"] * torch.arange(8.0)).sum().backward()  # q is missing: it waits for it
    named["p"].grad.mul_(0.5)
    with pytest.raises(
        ValueError, match="p: its gradient was changed after it was sent"
    ):
        optimizer.synchronize()


@pytest.mark.ranks
def test_clipping_between_synchronize_and_step_is_what_it_was():
    norms = []
    for compression in (hvd.Compression.none, None):
        model = perceptron()
        optimizer = wrap(model, compression or compressor(model, TopK(1.0)))
        clipping(model, optimizer)
        norms.append(weights(model))
    torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-5)


@pytest.mark.ranks
def test_gradients_that_are_parts_of_one_buffer_get_their_results_there():
    model = perceptron()
    compression = compressor(model, TopK(0.5))
    optimizer = wrap(model, compression)
    buffer = torch.zeros(sum(p.numel() for p in model.parameters()))
    at = 0
    for p in model.parameters():
        p.grad = buffer[at : at + p.numel()].view_as(p)
        at += p.numel()
    for step in range(3):
        buffer.zero_()  # all at once, so that gradients are added to in place
        loss_of(model, step).backward()
        optimizer.step()
        found = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        assert torch.equal(found, buffer)
    assert replicas_agree(model)
    assert buffer.count_nonzero() > 0


def test_writing_into_a_part_of_one_buffer_under_way_is_an_error():
    model = nn.Linear(6, 3, bias=False)
    optimizer = wrap(model, compressor(model, TopK(0.5)))
    buffer = torch.zeros(20)
    model.weight.grad = buffer[1:19].view(3, 6)
    loss_of(model, 0).backward()
    buffer[19] = 5.0  # nobody's
    optimizer.step()
    loss_of(model, 1).backward()
    buffer[5] = 5.0
    with pytest.raises(ValueError, match="weight: its gradient was changed after it"):
        optimizer.step()


# ------------------------------------------------------- law 10: memory is shared


def autograds_views(p, q, scale):
    p.grad = q.grad = None
    (
        (p.view(2, 4) + q.view(2, 4)) * scale * torch.arange(8.0).view(2, 4)
    ).sum().backward()
    assert p.grad.data_ptr() == q.grad.data_ptr()


def parts_of_autograds(p, q, scale):
    p.grad = q.grad = None
    (torch.cat([p, q]) * scale * torch.arange(16.0)).sum().backward()


def one_tensor(p, q, scale):
    p.grad = q.grad = scale * torch.arange(8.0)


def overlapping_views(p, q, scale):
    both = scale * torch.arange(12.0)
    p.grad, q.grad = both[:8], both[4:]


def nested_views(p, q, scale):
    both = scale * torch.arange(16.0)
    p.grad, q.grad = both[:8], both[::2]


def stride_0(p, q, scale):
    p.grad, q.grad = torch.full((1,), scale).expand(8), torch.full((8,), scale)


def overlapping_itself(p, q, scale):
    p.grad, q.grad = (scale * torch.arange(8.0)).as_strided((8,), (0,)), torch.ones(8)


SHARED = [
    autograds_views,
    parts_of_autograds,
    one_tensor,
    overlapping_views,
    nested_views,
    stride_0,
    overlapping_itself,
]


def pair(compression_of, sizes=(8, 8), **options):
    """Two parameters in one optimizer, and the compressor."""
    named = {
        name: nn.Parameter(torch.zeros(n)) for name, n in zip("pq", sizes, strict=True)
    }
    compression = compression_of(named.items())
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(named.values(), lr=1.0),
        named_parameters=named.items(),
        compression=compression,
        **options,
    )
    return *named.values(), optimizer, compression


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
@pytest.mark.parametrize("dense", [Never(), WhenCheaper()], ids=repr)
@pytest.mark.parametrize("share", SHARED)
def test_results_are_right_where_gradients_share_memory(share, dense, carrier):
    p, q, optimizer, _ = pair(
        lambda named: SparseCompressor(
            TopK(1.0), named_parameters=named, dense=dense, exchange=carrier
        )
    )
    moved = torch.zeros(2, 8)
    for step in range(2):
        share(p, q, float(hvd.rank() + 1 + step))
        own = torch.stack([p.grad, q.grad])
        means = hvd.allreduce(own, op=hvd.Average, name="means")
        optimizer.step()
        assert torch.equal(torch.stack([p.grad, q.grad]), means)
        moved -= means
    assert torch.equal(torch.stack([p, q]), moved)


@pytest.mark.ranks
@pytest.mark.parametrize("share", SHARED)
def test_nothing_is_lost_where_gradients_share_memory(share):
    p, q, optimizer, compression = pair(
        lambda named: SparseCompressor(
            TopK(0.25), named_parameters=named, dense=Never()
        ),
        op=hvd.Sum,
    )
    given, back = torch.zeros(2, 8), torch.zeros(2, 8)
    for step in range(3):
        share(p, q, float(hvd.rank() + 1 + step))
        given += torch.stack([p.grad, q.grad])
        optimizer.step()
        back += torch.stack([p.grad, q.grad])
    saved = compression.state_dict()["tensors"]
    rest = torch.stack([saved[name]["residual"] for name in "pq"])
    assert torch.equal(hvd.allreduce(given - rest, op=hvd.Sum, name="sent"), back)


@pytest.mark.ranks
@pytest.mark.parametrize("dense", [Never(), WhenCheaper()], ids=repr)
def test_one_tensor_is_shared_in_whatever_order_results_are_asked_for(dense):
    """A second pass that does not come: Horovod gives p last, and asks for it first."""
    p, q, optimizer, _ = pair(
        lambda named: SparseCompressor(TopK(1.0), named_parameters=named, dense=dense),
        backward_passes_per_step=2,
    )
    (p * float(hvd.rank() + 1) * torch.arange(8.0)).sum().backward()
    q.grad = p.grad
    mean = hvd.allreduce(p.grad, op=hvd.Average, name="mean")
    optimizer.synchronize()
    assert torch.equal(p.grad, mean)
    assert torch.equal(q.grad, mean)
    p.grad.zero_()
    assert torch.equal(q.grad, mean)


@pytest.mark.ranks
def test_one_tensor_is_shared_by_parameters_of_two_optimizers():
    named = {name: nn.Parameter(torch.zeros(8)) for name in "pq"}
    p, q = named.values()
    optimizers = [
        hvd.DistributedOptimizer(
            torch.optim.SGD([p, q], lr=1.0),
            named_parameters=[(prefix + n, each) for n, each in named.items()],
            compression=SparseCompressor(
                TopK(1.0),
                named_parameters=[(prefix + n, each) for n, each in named.items()],
                dense=Never(),
                prefix=prefix,
            ),
            groups=[[p, q]],
        )
        for prefix in "ab"
    ]
    p.grad = q.grad = torch.zeros(8)
    ((p + q) * float(hvd.rank() + 1) * torch.arange(8.0)).sum().backward()
    mean = hvd.allreduce(q.grad, op=hvd.Average, name="mean")
    for optimizer in optimizers:
        optimizer.synchronize()
    assert torch.equal(q.grad, mean)
    assert torch.equal(p.grad, mean)


@pytest.mark.ranks
def test_gradients_of_many_elements_that_go_dense_do_not_share_either():
    n = 1 << 19
    p, q, optimizer, _ = pair(
        lambda named: SparseCompressor(TopK(1.0), named_parameters=named), (n, n)
    )
    whole = torch.arange(2.0 * n)
    p.grad, q.grad = whole[:n], whole[n:]  # neighbours
    optimizer.step()
    assert torch.equal(torch.cat([p.grad, q.grad]), whole)
    p.grad = q.grad = torch.ones(n)
    with pytest.raises(
        ValueError, match=r"[pq]: Horovod reduces its gradient in place"
    ):
        optimizer.step()


@pytest.mark.ranks
def test_a_parameter_that_is_its_own_gradient_is_not_overwritten():
    p, q, optimizer, _ = pair(
        lambda named: SparseCompressor(
            TopK(1.0), named_parameters=named, dense=Never()
        ),
        op=hvd.Sum,
    )
    p.data, q.data = torch.arange(8.0), torch.arange(8.0)
    p.grad, q.grad = p.detach(), q.detach().clone()
    optimizer.step()
    assert torch.equal(p, (1 - hvd.size()) * torch.arange(8.0))
    assert torch.equal(p, q)


def over_one_parameter(kinds, sizes, dense):
    """Two optimizers over p; each has a parameter that no loss uses beside it."""
    p = nn.Parameter(torch.zeros(sizes))
    optimizers, compressions = [], []
    for i, prefix in enumerate("ab"):
        named = {"p": p, f"{prefix}.unused": nn.Parameter(torch.zeros(3))}
        compressions.append(
            SparseCompressor(
                kinds[i], named_parameters=named.items(), prefix=prefix, dense=dense
            )
        )
        optimizers.append(
            hvd.DistributedOptimizer(
                torch.optim.SGD(named.values(), lr=10.0**i),
                named_parameters=[(f"{prefix}.{n}", v) for n, v in named.items()],
                compression=compressions[-1],
            )
        )
    return p, optimizers, compressions


@pytest.mark.ranks
@pytest.mark.parametrize("dense", [Never(), WhenCheaper()], ids=repr)
@pytest.mark.parametrize("order", ["steps", "steps, last first", "both, then steps"])
def test_two_optimizers_over_one_parameter_have_a_residual_each(order, dense):
    p, optimizers, compressions = over_one_parameter([TopK(1.0)] * 2, 8, dense)
    mean = (hvd.size() + 1) / 2 * torch.arange(8.0)
    for step in range(1, 4):
        p.grad = None
        (p * torch.arange(8.0) * (hvd.rank() + 1)).sum().backward()
        if order == "both, then steps":
            for optimizer in optimizers:
                optimizer.synchronize()
                assert torch.equal(p.grad, mean)
        for optimizer in optimizers[:: -1 if "last" in order else 1]:
            with (
                optimizer.skip_synchronize()
                if order == "both, then steps"
                else contextlib.nullcontext()
            ):
                optimizer.step()
            assert torch.equal(p.grad, mean)
        torch.testing.assert_close(p.detach(), -11 * step * mean)
    if dense == Never():
        for compression in compressions:
            assert not compression.state_dict()["tensors"]["p"]["residual"].any()


@pytest.mark.ranks
def test_what_is_done_to_one_optimizers_result_is_no_matter_to_the_others():
    p, (first, second), _ = over_one_parameter([TopK(1.0)] * 2, 8, Never())
    (p * torch.arange(8.0)).sum().backward()
    first.synchronize()
    nn.utils.clip_grad_norm_([p], 1e-3)
    with first.skip_synchronize():
        first.step()
    second.synchronize()
    assert torch.equal(p.grad, torch.arange(8.0))


ORDERS = {
    "steps": ["step 0", "step 1"],
    "both, then steps": ["synchronize 0", "synchronize 1", "apply 0", "apply 1"],
    "both, last first": ["synchronize 0", "synchronize 1", "apply 1", "apply 0"],
    "clipped": ["synchronize 0", "halve", "synchronize 1", "apply 0", "apply 1"],
}


@pytest.mark.ranks
@pytest.mark.parametrize("grad", ["none", "part of a buffer"])
@pytest.mark.parametrize("order", ORDERS)
def test_two_optimizers_over_one_parameter_step_with_their_own_results(order, grad):
    p, optimizers, _ = over_one_parameter([TopK(0.25), TopK(0.5)], 8, Never())
    buffer = torch.zeros(16)
    weight, residuals = torch.zeros(8), [torch.zeros(8), torch.zeros(8)]
    clipped = 2.0 if order == "clipped" else 1.0
    for step in range(4):
        rng = np.random.default_rng([step, hvd.rank()])
        gradient = torch.from_numpy(rng.permutation(8) * 64.0 + step).float()
        p.grad = None if grad == "none" else buffer.zero_()[:8]
        (p * gradient).sum().backward()
        for what in ORDERS[order]:
            call, *of = what.split()
            if call == "halve":
                p.grad.mul_(0.5)
                continue
            optimizer = optimizers[int(*of)]
            if call == "apply":
                with optimizer.skip_synchronize():
                    optimizer.step()
            else:
                getattr(optimizer, call)()
        for i, residual in enumerate(residuals):
            residual += gradient
            sent = torch.zeros(8)
            chosen = (
                residual.abs().sort(descending=True, stable=True).indices[: 2 + 2 * i]
            )
            sent[chosen] = residual[chosen]
            residual -= sent
            mean = hvd.allreduce(sent, op=hvd.Average, name=f"law.{i}")
            weight -= 10**i * mean / (clipped if i == 0 else 1)
        torch.testing.assert_close(p.detach(), weight)


@pytest.mark.ranks
@pytest.mark.parametrize("write", [lambda g: g.mul_(0.5), lambda g: g.data.mul_(0.5)])
def test_a_result_that_was_changed_for_nobody_knows_whose_step_is_refused(write):
    p, (first, second), _ = over_one_parameter([TopK(0.25), TopK(0.5)], 8, Never())
    (p * torch.arange(8.0)).sum().backward()
    first.synchronize()
    second.synchronize()
    write(p.grad)
    with (
        first.skip_synchronize(),
        pytest.raises(ValueError, match="p: several optimizers hold it, and its grad"),
    ):
        first.step()
    assert not p.any()


# -------------------------------------------------- laws 1 and 6: nothing is lost


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
def test_nothing_is_lost(carrier):
    model = nn.Linear(64, 1, bias=False)
    compression = compressor(model, TopK(0.1), exchange=carrier)
    optimizer = wrap(model, compression, lr=0.0, op=hvd.Sum)
    given, handed_back = torch.zeros(64), torch.zeros(64)
    for step in range(10):
        optimizer.zero_grad()
        rng = np.random.default_rng([hvd.rank(), step])
        gradient = torch.from_numpy(rng.integers(-8, 8, 64).astype(np.float32))
        (model.weight[0] * gradient).sum().backward()
        optimizer.step()
        given += gradient
        handed_back += model.weight.grad[0]
    residual = compression.state_dict()["tensors"]["weight"]["residual"].reshape(-1)
    missing = hvd.allreduce(given - residual, op=hvd.Sum, name="missing")
    torch.testing.assert_close(missing, handed_back, rtol=0, atol=0)  # small integers


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_on_one_rank_reaches_all_and_stays_out(value, carrier):
    model = nn.Linear(16, 1, bias=False)
    compression = compressor(model, TopK(0.25), exchange=carrier)
    optimizer = wrap(model, compression, lr=0.0)
    gradient = torch.arange(1.0, 17.0)
    if hvd.rank() == hvd.size() - 1:
        gradient[3] = value
    (model.weight[0] * gradient).sum().backward()
    optimizer.synchronize()
    assert model.weight.grad.isnan().all()
    residual = compression.state_dict()["tensors"]["weight"]["residual"].reshape(-1)
    finite = torch.where(gradient.isfinite(), gradient, 0.0)
    torch.testing.assert_close(residual, finite, rtol=0, atol=0)


# ----------------------------------------------------- law 3: every option, density 1
#
# What each documented option of hvd.DistributedOptimizer does with a compressor:
#
#   named_parameters            names; without them those of the optimizer
#   compression                 this
#   op=Average, Sum             found out from Horovod; the same result as without
#   op=Adasum                   refused by name
#   gradient_predivide_factor   as Average, to rounding
#   backward_passes_per_step    as without
#   num_groups, groups          as without
#   sparse_as_dense             as without: embedding gradients go the sparse path
#   process_set                 given to the compressor too, or refused
#   skip_synchronize            as without
#   hvd.join()                  with exchange=Embedded(); Gathered() ends the job
#   elastic                     tests/test_elastic.py


def plain(model, optimizer, steps=20):
    train(model, optimizer, range(steps))


def accumulating(model, optimizer):
    for step in range(20):
        optimizer.zero_grad()
        loss_of(model, 2 * step).backward()
        loss_of(model, 2 * step + 1).backward()
        optimizer.step()


def clipping(model, optimizer):
    for step in range(20):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        with optimizer.skip_synchronize():
            optimizer.step()


def grouped(model):
    return {"groups": [[model[0].weight, model[2].bias]]}


OPTIONS = {
    "defaults": ({}, plain),
    "op=Average": ({"op": hvd.Average}, plain),
    "op=Sum": ({"op": hvd.Sum}, plain),
    "backward_passes_per_step": ({"backward_passes_per_step": 2}, accumulating),
    "num_groups": ({"num_groups": 2}, plain),
    "groups": ({"groups": 2}, plain),
    "groups of parameters": (grouped, plain),
    "skip_synchronize": ({}, clipping),
    "gradient_predivide_factor": ({"gradient_predivide_factor": 3.0}, plain),
    "process_set=global": ({"process_set": hvd.global_process_set}, plain),
}


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.filterwarnings("ignore:Parameter `num_groups`:DeprecationWarning")
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
@pytest.mark.parametrize("option", OPTIONS)
def test_density_one_is_stock_horovod_with_every_option(option, carrier):
    options, how = OPTIONS[option]
    ours, theirs = perceptron(), perceptron()
    compression = compressor(ours, TopK(1.0), exchange=carrier)
    for model, chosen in ((ours, compression), (theirs, hvd.Compression.none)):
        given = options(model) if callable(options) else options
        how(model, wrap(model, chosen, **given))
    assert all_went_sparse(compression)
    assert replicas_agree(ours)
    if hvd.size() == 2 and option != "gradient_predivide_factor":
        assert bits(ours) == bits(theirs)
    else:  # Horovod's own sum is in no order of ranks, and scales before and after
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-4, atol=1e-5)


# ------------------------------------------------- parameters that come and go


@pytest.mark.ranks
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
@pytest.mark.parametrize("dense", [Never(), WhenCheaper()], ids=repr)
def test_a_frozen_parameter_stands_still_and_goes_on_when_it_is_thawed(dense, carrier):
    p, q, optimizer, compression = pair(
        lambda named: SparseCompressor(
            TopK(0.25), named_parameters=named, dense=dense, exchange=carrier
        )
    )

    def step():
        optimizer.zero_grad()
        used = [parameter for parameter in (p, q) if parameter.requires_grad]
        sum((each * torch.arange(1.0, 9.0)).sum() for each in used).backward()
        optimizer.step()

    def residual():
        return compression.state_dict()["tensors"]["q"]["residual"]

    step()
    stood, waits = q.detach().clone(), residual()
    q.requires_grad_(False)
    for _ in range(3):
        step()
    assert torch.equal(q, stood)
    assert dense != Never() or torch.equal(residual(), waits)
    q.requires_grad_(True)
    step()
    assert not torch.equal(q, stood)
    assert len(set(gather(str([p.tolist(), q.tolist()])))) == 1
    if dense == Never():  # 4 steps of p, of q 2
        given = 2 * torch.arange(1.0, 9.0)
        assert torch.equal(residual() - q, given)


@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
def test_a_frozen_parameter_is_not_moved_by_momentum(carrier):
    """An optimizer leaves it alone without a gradient, but not with one of zeros."""
    model = perceptron()
    optimizer = wrap(model, compressor(model, exchange=carrier))
    train(model, optimizer, range(2))
    model[0].requires_grad_(False)
    stood = [p.detach().clone() for p in model[0].parameters()]
    train(model, optimizer, range(2, 5))
    assert all(map(torch.equal, model[0].parameters(), stood))
    model[0].requires_grad_(True)
    train(model, optimizer, range(5, 7))
    assert not torch.equal(model[0].weight, stood[0])
    assert len(set(gather(bits(model)))) == 1


def two_optimizers():
    """Each of a model of its own."""
    models, optimizers = [perceptron(), perceptron()], []
    for i, model in enumerate(models):
        named = [(f"{i}.{name}", p) for name, p in model.named_parameters()]
        compression = SparseCompressor(
            TopK(0.1), named_parameters=named, dense=Never(), prefix=f"model{i}"
        )
        optimizers.append(
            hvd.DistributedOptimizer(
                sgd(model), named_parameters=named, compression=compression
            )
        )
    return models, optimizers


def test_a_write_into_a_gradient_is_seen_after_another_optimizers_step():
    models, optimizers = two_optimizers()
    (loss_of(models[0], 0) + loss_of(models[1], 0)).backward()
    optimizers[0].step()
    nn.utils.clip_grad_norm_(models[1].parameters(), 1e-3)
    with pytest.raises(ValueError, match="its gradient was changed after it was sent"):
        optimizers[1].step()


@pytest.mark.parametrize(
    "write",
    [lambda g: g.neg_(), lambda g: g.copy_(g.flip(0)), lambda g: g.mul_(0.5)],
    ids=["sign", "order", "size"],
)
@pytest.mark.parametrize("n", [2, 9000])
def test_a_write_into_a_part_of_a_buffer_is_seen(write, n):
    buffer, weight = torch.zeros(2 * n), nn.Parameter(torch.zeros(n))
    compression = SparseCompressor(
        TopK(0.1), named_parameters=[("w", weight)], dense=Never()
    )
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        named_parameters=[("w", weight)],
        compression=compression,
    )
    weight.grad = buffer[:n]
    (weight * torch.tensor([1.0, -2.0]).repeat(n // 2)).sum().backward()
    write(weight.grad)
    with pytest.raises(ValueError, match="w: its gradient was changed after it was se"):
        optimizer.step()


def test_an_argument_of_step_that_is_no_closure_is_passed_on():
    class Scaled(torch.optim.SGD):
        def step(self, lr_scale=1.0):
            self.seen = lr_scale
            return super().step()

    model = perceptron()
    optimizer = hvd.DistributedOptimizer(
        Scaled(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compressor(model),
    )
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step(0.5)
        assert optimizer.seen == 0.5
    assert len(set(gather(bits(model)))) == 1


def test_a_parameter_that_is_frozen_on_some_ranks_is_an_error_with_its_name():
    p, q, optimizer, _ = pair(
        lambda named: SparseCompressor(
            TopK(0.25), named_parameters=named, dense=Never(), timeout_s=20
        ),
        op=hvd.Sum,
    )
    q.requires_grad_(hvd.rank() != 0)
    loss = (p * torch.ones(8)).sum()
    (loss + (q * torch.ones(8)).sum() if q.requires_grad else loss).backward()
    with pytest.raises((ExchangeError, ValueError), match=r"[pq]: "):
        optimizer.step()


@pytest.mark.ranks
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
@pytest.mark.parametrize("call", ["step", "closure", "accumulated"])
def test_all_parameters_are_frozen_when_the_optimizer_is_made(call, carrier):
    """Horovod hooks none of them, and leaves them to their rank when it is thawed."""
    model = perceptron().requires_grad_(False)
    compression = compressor(model, TopK(1.0), exchange=carrier)
    optimizer = wrap(
        model, compression, backward_passes_per_step=1 + (call == "accumulated")
    )
    still = weights(model)
    for _ in range(2):  # a schedule, say
        optimizer.step()
    assert torch.equal(weights(model), still)
    model.requires_grad_(True)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    twin = perceptron()
    alike = sgd(twin)
    for step in range(4):
        if call == "closure":
            optimizer.step(closure)
        else:
            closure()
            if call == "accumulated":
                loss_of(model, step).backward()
            optimizer.step()
        alike.zero_grad()
        passes = 1 + (call == "accumulated")
        (passes * loss_of(twin, step)).backward()
        for i, p in enumerate(twin.parameters()):
            p.grad = hvd.allreduce(p.grad, name=f"{step}.{i}")
        alike.step()
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-5, atol=1e-6)
    assert replicas_agree(model)
    assert set(compression.traffic.tensors) == set(dict(model.named_parameters()))


def test_what_was_thawed_does_not_move_by_its_ranks_own_gradient():
    model = perceptron().requires_grad_(False)
    optimizer = wrap(model, compressor(model, TopK(1.0)))
    model.requires_grad_(True)
    still = weights(model)

    def step_after_synchronize():
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()

    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match=r"0\.weight: joined the optimizer after hvd"):
        step_after_synchronize()
    assert torch.equal(weights(model), still)
    step_after_synchronize()
    train(model, optimizer, range(1, 3))
    assert not torch.equal(weights(model), still)
    assert replicas_agree(model)


@pytest.mark.ranks
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("dense", [Never(), WhenCheaper()], ids=repr)
@pytest.mark.parametrize("joins", ["added", "thawed"])
@pytest.mark.parametrize("named", ["by the model", "by the optimizer"])
def test_a_parameter_that_joins_later_is_exchanged(named, joins, dense, groups):
    if joins == "added" and named == "by the optimizer":
        return  # see the next test
    model = perceptron()
    head, rest = list(model[2].parameters()), list(model[0].parameters())
    if joins == "thawed":
        model[0].requires_grad_(False)
    names = {"named_parameters": model.named_parameters()}
    compression = SparseCompressor(
        TopK(1.0), dense=dense, **(names if named == "by the model" else {})
    )
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(head if joins == "added" else [*head, *rest], lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compression,
        groups=groups,
    )
    still = [p.detach().clone() for p in rest]
    train(model, optimizer, range(2))
    assert all(map(torch.equal, rest, still))
    if joins == "added":
        optimizer.add_param_group({"params": rest, "lr": 0.1})
    else:
        model[0].requires_grad_(True)
    for p in model.parameters():
        p.grad = None
    train(model, optimizer, range(2, 5))
    assert not any(map(torch.equal, rest, still))
    assert replicas_agree(model)
    assert set(compression.traffic.tensors) == set(dict(model.named_parameters()))

    twin = perceptron()
    alike = torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(5):
        alike.zero_grad()
        loss_of(twin, step).backward()
        for i, p in enumerate(twin.parameters()):
            p.grad = (
                hvd.allreduce(p.grad, name=f"{step}.{i}")
                if p.grad is not None
                else None
            )
            if step < 2 and i < 2:
                p.grad = None
        alike.step()
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-5, atol=1e-6)


def test_a_parameter_that_joins_without_a_name_is_refused():
    model = perceptron()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model[2].parameters(), lr=0.1),
        named_parameters=model[2].named_parameters(),
        compression=SparseCompressor(TopK(1.0), dense=Never()),
    )
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": list(model[0].parameters())})
    with pytest.raises(ValueError, match=r"shape \(32, 6\) that joined the optimizer"):
        train(model, optimizer, [2])


@pytest.mark.ranks
def test_names_of_a_larger_model_than_the_optimizer_holds():
    model = perceptron()
    compression = compressor(model)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model[2].parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compression,
    )
    train(model, optimizer, range(3))
    assert set(compression.traffic.tensors) == {"2.weight", "2.bias"}
    assert replicas_agree(model)


# ---------------------------------------------------------------------- closures


def closing(model, optimizer, step, calls):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        calls.append(loss.item())
        return loss

    return closure


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
@pytest.mark.parametrize("dense", [Never(), WhenCheaper()], ids=repr)
@pytest.mark.parametrize("density", [1.0, 0.05])
def test_steps_with_closures_are_steps_without(density, dense, carrier):
    results = []
    for closed in (False, True):
        model = perceptron()
        compression = compressor(model, TopK(density), dense=dense, exchange=carrier)
        optimizer = wrap(model, compression)
        for step in range(4):
            calls = []
            closure = closing(model, optimizer, step, calls)
            if closed:
                loss = optimizer.step(closure=closure)
                assert loss.item() == calls[0]
            else:
                closure()
                optimizer.step()
            assert len(calls) == 1
        results.append(weights(model))
        assert compression.traffic.steps == 4
    if hvd.size() == 2 or dense == Never():
        assert torch.equal(*results)
    else:  # Horovod's own sum is in no order of ranks
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert replicas_agree(model)


@pytest.mark.ranks
def test_the_first_step_after_a_restart_may_have_a_closure():
    results = []
    for closed in (False, True):
        model = perceptron()
        compression = compressor(model)
        optimizer = wrap(model, compression)
        train(model, optimizer, range(3))
        state, own = compression.state_dict(), optimizer.state_dict()
        again = compressor(model)
        again.load_state_dict(state)
        twin = perceptron()
        twin.load_state_dict(model.state_dict())
        again = compressor(twin)
        again.load_state_dict(state)
        optimizer = wrap(twin, again)
        optimizer.load_state_dict(own)
        for step in range(3, 6):
            closure = closing(twin, optimizer, step, [])
            if closed:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        results.append(bits(twin))
    assert results[0] == results[1]


@pytest.mark.ranks
def test_a_closure_may_synchronize_and_clip_by_itself():
    results = []
    for closed in (False, True):
        model = perceptron()
        optimizer = wrap(model, compressor(model))
        for step in range(3):
            closure = closing(model, optimizer, step, [])

            def clipped(closure=closure, model=model, optimizer=optimizer):
                loss = closure()
                optimizer.synchronize()
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                return loss

            if closed == (step != 1):
                optimizer.step(clipped)
            else:
                if not closed:
                    clipped()
                with optimizer.skip_synchronize():
                    optimizer.step(clipped if closed else None)
        results.append(bits(model))
    assert len(set(gather(results[0]))) == 1
    assert results[0] == results[1]


class Twice(torch.optim.SGD):
    """Evaluates the closure twice, as optimizers that look ahead do."""

    def step(self, closure):
        for _ in range(2):
            with torch.enable_grad():
                loss = closure()
            super().step()
        return loss


@pytest.mark.ranks
def test_a_closure_may_be_evaluated_more_than_once():
    results = []
    for kind in (torch.optim.SGD, Twice):
        model = perceptron()
        optimizer = hvd.DistributedOptimizer(
            kind(model.parameters(), lr=0.1),
            named_parameters=model.named_parameters(),
            compression=compressor(model),
        )
        for step in (0, 1):
            closure = closing(model, optimizer, step, [])
            if kind is Twice:
                optimizer.step(closure)
            else:
                for _ in range(2):
                    closure()
                    optimizer.step()
        results.append(bits(model))
    assert results[0] == results[1]
    assert replicas_agree(model)


def test_a_closure_that_fails_leaves_the_optimizer_as_it_was():
    model = perceptron()
    optimizer = wrap(model, compressor(model))

    def fails():
        raise KeyError("data")

    for step in range(2):
        with pytest.raises(KeyError):
            optimizer.step(fails)
        train(model, optimizer, [step])
        assert replicas_agree(model)


def test_lbfgs_is_refused_by_name():
    model = perceptron()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.LBFGS(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compressor(model),
    )
    with pytest.raises(ValueError, match="LBFGS is not supported under Horovod"):
        optimizer.step(closing(model, optimizer, 0, []))


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
def test_a_process_set_is_a_group_of_its_own(carrier):
    mine = members.process_set
    results = []
    for compression in (hvd.Compression.none, None):
        model = perceptron()
        if compression is None:
            compression = compressor(
                model, TopK(1.0), exchange=carrier, process_set=mine
            )
        optimizer = wrap(model, compression, process_set=mine)
        train(model, optimizer, range(5))
        results.append(bits(model))
    if mine.included():
        assert results[0] == results[1]
        assert compression.traffic.steps == 5


def test_another_process_set_than_the_optimizers_is_refused():
    model = perceptron()
    compression = compressor(model, process_set=members.process_set)
    optimizer = wrap(model, compression)
    with pytest.raises(ValueError, match="process_set must be that of the optimizer"):
        loss_of(model, 0).backward()
    del optimizer


@pytest.mark.ranks
@pytest.mark.transport
def test_embedding_gradients_stay_sparse_and_untouched():
    results = []
    for sparsely in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(50, 4, sparse=True)
        compression = compressor(model) if sparsely else hvd.Compression.none
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            named_parameters=model.named_parameters(),
            compression=compression,
        )
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.tensor([hvd.rank(), 7, 7])).sum().backward()
            optimizer.step()
        results.append(bits(model))
    assert results[0] == results[1]
    assert compression.traffic.tensors == {}


@pytest.mark.ranks
@pytest.mark.transport
def test_sparse_as_dense_takes_the_sparse_path():
    results = []
    for sparsely in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(50, 4, sparse=True)
        compression = compressor(model, TopK(1.0)) if sparsely else hvd.Compression.none
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            named_parameters=model.named_parameters(),
            compression=compression,
            sparse_as_dense=True,
        )
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.tensor([hvd.rank(), 7, 7])).sum().backward()
            optimizer.step()
        results.append(model.weight.detach().clone())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert all_went_sparse(compression)


@pytest.mark.ranks
@pytest.mark.transport
def test_parameters_unused_on_some_ranks_take_part():
    model = Heads()
    compression = compressor(model)
    optimizer = wrap(model, compression)
    for step in range(5):
        optimizer.zero_grad()
        order = [(hvd.rank() + step) % 3]  # head 3: never used
        model(batch(step), order).square().mean().backward()
        optimizer.step()
        assert replicas_agree(model)
    tensors = compression.state_dict()["tensors"].values()
    assert {tensor["step"] for tensor in tensors} == {5}


def test_two_optimizers_in_one_process_need_two_prefixes():
    models = [perceptron(), perceptron()]
    optimizers = []
    for i, model in enumerate(models):
        named = [(f"net{i}.{n}", p) for n, p in model.named_parameters()]
        compression = SparseCompressor(
            TopK(0.05), named_parameters=named, dense=Never(), prefix=f"gan{i}"
        )
        optimizers.append(
            hvd.DistributedOptimizer(
                sgd(model), named_parameters=named, compression=compression
            )
        )
    for step in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        sum(loss_of(model, step) for model in models).backward()  # both in flight
        for optimizer in optimizers:
            optimizer.step()
    assert all(replicas_agree(model) for model in models)


def test_one_compressor_for_two_optimizers_is_refused():
    models = [perceptron(), perceptron()]
    named = [
        (f"{i}.{n}", p) for i, m in enumerate(models) for n, p in m.named_parameters()
    ]
    compression = SparseCompressor(TopK(0.05), named_parameters=named)
    optimizers = [wrap(model, compression) for model in models]
    train(models[0], optimizers[0], [0])
    with pytest.raises(ValueError, match="one SparseCompressor serves one optimizer"):
        loss_of(models[1], 0).backward()


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("dense", [Never(), WhenCheaper()], ids=repr)
def test_gradients_of_gradients_train_as_under_stock_horovod(dense):
    results = []
    for compression in (hvd.Compression.none, None):
        model = perceptron()
        optimizer = wrap(
            model, compression or compressor(model, TopK(1.0), dense=dense)
        )
        parameters = list(model.parameters())
        for step in range(3):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            grads = torch.autograd.grad(loss, parameters, create_graph=True)
            penalty = sum(g.square().sum() for g in grads)
            (loss + penalty).backward()
            optimizer.step()
            # gradients that are part of a graph themselves
            grads = torch.autograd.grad(
                loss_of(model, step), parameters, create_graph=True
            )
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
                assert grad.requires_grad
            kept = [g.detach().clone() for g in grads]
            alias = [g.detach() for g in grads]
            optimizer.step()
            if compression is None and dense == Never():
                assert all(map(torch.equal, alias, kept))
        results.append(bits(model))
    assert hvd.size() > 2 or results[0] == results[1]


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_backward_may_create_a_graph_where_stock_horovod_lets_it(linear):
    raised = []
    for compression in (hvd.Compression.none, None):
        model = nn.Linear(6, 3, bias=False)
        optimizer = wrap(model, compression or compressor(model, TopK(1.0)))
        loss = model(batch(0))
        try:
            (loss if linear else loss.square()).sum().backward(create_graph=True)
            optimizer.step()
        except AssertionError as error:
            raised.append(str(error))
        model.weight.grad = None  # a cycle otherwise
    assert raised == ([] if linear else ["", ""])  # Horovod's own assertion


def test_adasum_is_refused_by_name():
    model = perceptron()
    optimizer = wrap(model, compressor(model), op=hvd.Adasum)
    with pytest.raises(ValueError, match="op=Adasum is not supported"):
        train(model, optimizer, [0])


def test_another_op_than_the_optimizers_is_refused_at_the_first_step():
    model = perceptron()
    optimizer = wrap(model, compressor(model, op=hvd.Average), op=hvd.Sum)
    with pytest.raises(ValueError, match="op must be that of the optimizer, Sum, got"):
        train(model, optimizer, [0])


@pytest.mark.transport
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
@pytest.mark.parametrize("op", [hvd.Min, hvd.Max], ids=["Min", "Max"])
def test_ops_that_are_no_sum_are_refused(op, carrier):
    model = perceptron()
    optimizer = wrap(model, compressor(model, exchange=carrier), op=op)
    with pytest.raises((ValueError, ExchangeError), match="op must be Average or Sum"):
        train(model, optimizer, [0])


@pytest.mark.ranks
@pytest.mark.transport
def test_ranks_may_join_where_payloads_are_embedded():
    results = []
    for compression in (hvd.Compression.none, None):
        model = perceptron()
        if compression is None:
            compression = compressor(model, TopK(1.0), exchange=Embedded())
        optimizer = wrap(model, compression)
        for _ in range(2):  # epochs; the first rank has fewer batches
            train(model, optimizer, range(3 if hvd.rank() == 0 else 5))
            hvd.join()
            hvd.broadcast_parameters(model.state_dict(), root_rank=hvd.size() - 1)
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.parametrize("sparsifier", [TopK(0.05), RandomK(0.1)], ids=repr)
def test_replicas_agree_after_a_join(sparsifier):
    model = perceptron()
    compression = compressor(model, sparsifier, exchange=Embedded())
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),  # no momentum: it would differ
        named_parameters=model.named_parameters(),
        compression=compression,
    )
    for _ in range(2):
        train(model, optimizer, range(3 if hvd.rank() == 0 else 5))
        hvd.join()
        hvd.broadcast_parameters(model.state_dict(), root_rank=hvd.size() - 1)
        train(model, optimizer, range(2))
        assert replicas_agree(model)
    assert len(set(gather(compression.traffic.steps))) == 1


# ---------------------------------------------------------- routes, dtypes, layouts


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_tensors_are_what_horovod_gives(dtype):
    model = perceptron(dtype)
    compression = compressor(model, TopK(1.0), dense=WhenCheaper())
    optimizer = wrap(model, compression)
    twin = perceptron(dtype)  # Horovod reduces in place, and may have begun
    for each in (model, twin):
        loss_of(each, 0, dtype).backward()
    own = [p.grad for p in twin.parameters()]
    optimizer.synchronize()
    assert {t.route for t in compression.traffic.tensors.values()} == {"dense"}
    for i, (mine, parameter) in enumerate(zip(own, model.parameters(), strict=True)):
        wide = mine.float() if dtype is torch.bfloat16 else mine
        expected = hvd.allreduce(wide, op=hvd.Average, name=f"expected.{i}").to(dtype)
        if hvd.size() == 2:
            assert torch.equal(parameter.grad, expected)
        else:  # tensors that are reduced together are added up in another order
            total = hvd.allreduce(wide.abs(), op=hvd.Sum, name=f"total.{i}").to(dtype)
            bound = (hvd.size() - 1) * torch.finfo(dtype).eps * total
            assert ((parameter.grad - expected).abs() <= bound).all()
        assert parameter.grad.dtype == dtype


@pytest.mark.parametrize("dense", [Never(), WhenCheaper()], ids=repr)
def test_channels_last_gradients_keep_their_strides(dense):
    torch.manual_seed(0)
    model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    density = 0.05 if dense == Never() else 1.0
    optimizer = wrap(model, compressor(model, TopK(density), dense=dense))
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        layout = model.weight.grad.stride()
        assert not model.weight.grad.is_contiguous()
        optimizer.step()
        assert model.weight.grad.stride() == layout
    assert replicas_agree(model)


def test_gradients_of_any_shape_are_handed_back():
    parameters = {
        name: nn.Parameter(torch.zeros(shape))
        for name, shape in {"scalar": (), "one": (1,), "matrix": (3, 5)}.items()
    }
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters.values(), lr=1.0),
        named_parameters=parameters.items(),
        compression=SparseCompressor(
            TopK(1.0), named_parameters=parameters.items(), dense=Never()
        ),
    )
    sum((p * 3.0).sum() for p in parameters.values()).backward()
    optimizer.step()
    for parameter in parameters.values():
        assert (parameter == -3.0).all()


@pytest.mark.ranks
@pytest.mark.transport
def test_hooks_may_run_in_several_threads():
    model = Heads()
    compression = compressor(model, TopK(0.05))
    sent, failed = {}, []
    for p in model.parameters():
        p.grad = torch.randn(p.shape)

    def send(name, parameter):
        try:
            sent[name] = compression.compress(parameter.grad)
        except BaseException as error:
            failed.append(error)

    threads = [
        threading.Thread(target=send, args=item) for item in model.named_parameters()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for name, parameter in model.named_parameters():
        dummy, ctx = sent[name]
        assert ctx.name == name
        reduced = hvd.allreduce(dummy, op=hvd.Sum, name=f"dummy.{name}")
        assert compression.decompress(reduced, ctx) is parameter.grad
    assert len(set(gather(float(model.heads[0].weight.grad.sum())))) == 1


# --------------------------------------------------------------------------- state


@pytest.mark.ranks
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
@pytest.mark.parametrize("sparsifier", [TopK(0.05), RandomK(0.1)], ids=repr)
def test_a_restart_continues_bitwise(sparsifier, carrier, tmp_path):
    model = perceptron()
    compression = compressor(model, sparsifier, exchange=carrier)
    optimizer = wrap(model, compression)
    train(model, optimizer, range(3))
    path = sparse.checkpoint_path(tmp_path / "run", hvd.rank(), hvd.size())
    torch.save(
        [model.state_dict(), optimizer.state_dict(), compression.state_dict()], path
    )
    train(model, optimizer, range(3, 6))
    expected = bits(model)

    model = perceptron()
    compression = compressor(model, sparsifier, exchange=carrier)
    optimizer = wrap(model, compression)
    saved = torch.load(path)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    compression.load_state_dict(saved[2])
    train(model, optimizer, range(3, 6))
    assert bits(model) == expected


def test_a_state_of_another_rank_size_or_model_says_so_by_name():
    model = perceptron()
    compression = compressor(model)
    train(model, wrap(model, compression), [0])
    state = compression.state_dict()
    for key in ("rank", "size"):
        with pytest.raises(ValueError, match=f"state was saved with {key}"):
            compression.load_state_dict({**state, key: state[key] + 1})
    other = copy.deepcopy(state)
    other["tensors"]["0.weight"]["shape"] = (7, 7)
    with pytest.raises(ValueError, match=r"0\.weight: state has shape \(7, 7\)"):
        compression.load_state_dict(other)


def test_the_optimizers_own_state_is_what_it_was():
    model, other = perceptron(), perceptron()
    optimizer = wrap(model, compressor(model))
    train(model, optimizer, range(2))
    theirs = sgd(other)
    theirs.load_state_dict(optimizer.state_dict())
    assert theirs.state_dict().keys() == optimizer.state_dict().keys()


@pytest.mark.ranks
@pytest.mark.transport
def test_traffic_counts_what_moves():
    model = nn.Linear(100, 10, bias=False)
    compression = compressor(model, TopK(0.01))
    optimizer = wrap(model, compression)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, 100)).sum().backward()
        optimizer.step()
    dummy, payload = 2 * 4, payload_bytes(Entries(Float32()), "float32", 1000, 10)
    assert payload == 32 + 56  # 10 values, 11 bytes of indices, filled up to 8
    traffic = compression.traffic
    assert traffic.sent_bytes == 3 * (payload + dummy)
    assert traffic.received_bytes == 3 * ((hvd.size() - 1) * payload + dummy)
    assert traffic.dense_bytes == 3 * 4000
    assert traffic.tensors["weight"].route == "sparse"


@pytest.mark.ranks
@pytest.mark.transport
def test_embedded_traffic_counts_what_moves():
    model = nn.Linear(100, 10, bias=False)
    compression = compressor(model, TopK(0.01), exchange=Embedded())
    optimizer = wrap(model, compression)
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    buffer = 4 * (1 + hvd.size() * (1 + (32 + 56) // 2))
    assert compression.traffic.sent_bytes == buffer


# ------------------------------------------------------------------------- bad use


def test_names_may_come_from_the_optimizer():
    model = perceptron()
    compression = SparseCompressor(TopK(0.05), dense=Never())
    optimizer = hvd.DistributedOptimizer(sgd(model), compression=compression)
    train(model, optimizer, range(2))
    assert "allreduce.noname.0.3" in compression.traffic.tensors
    assert replicas_agree(model)


def test_bad_arguments_are_refused_by_name():
    model = perceptron()
    named = list(model.named_parameters())
    with pytest.raises(TypeError, match="sparsifier must have a select method"):
        SparseCompressor(0.01)
    with pytest.raises(ValueError, match=r"'0\.weight' comes twice"):
        SparseCompressor(TopK(), named_parameters=[*named, named[0]])
    with pytest.raises(ValueError, match="timeout_s must be positive, got -1"):
        SparseCompressor(TopK(), timeout_s=-1)
    with pytest.raises(ValueError, match="op must be Average or Sum, got 2"):
        SparseCompressor(TopK(), op=hvd.Adasum)
    with pytest.raises(TypeError, match=r"exchange must be Gathered\(\) or Embedded"):
        SparseCompressor(TopK(), exchange="embedded")
    with pytest.raises(ValueError, match=r"Threshold\(value=0.001\) has none"):
        SparseCompressor(Threshold(1e-3), exchange=Embedded())
    with pytest.raises(
        ValueError, match=r"in every step, such as .*; Halving\(.* has no"
    ):
        SparseCompressor(Halving(), exchange=Embedded())
    with pytest.raises(ValueError, match=r"shape \(2,\) belongs to no parameter"):
        SparseCompressor(TopK(), named_parameters=named).compress(torch.ones(2))


def test_integer_gradients_and_changed_shapes_are_refused_by_name():
    parameter = nn.Parameter(torch.ones(4))
    compression = SparseCompressor(TopK(1.0), named_parameters=[("p", parameter)])
    parameter.grad = torch.ones(4)
    dummy, ctx = compression.compress(parameter.grad)
    reduced = hvd.allreduce(dummy, op=hvd.Sum, name="changed")
    compression.decompress(reduced, ctx)
    parameter.data = torch.ones(5)
    parameter.grad = torch.ones(5)
    dummy, ctx = compression.compress(parameter.grad)
    reduced = hvd.allreduce(dummy, op=hvd.Sum, name="changed")
    with pytest.raises(ValueError, match=r"p: gradient has shape \(5,\)"):
        compression.decompress(reduced, ctx)


@pytest.mark.ranks
@pytest.mark.transport
def test_a_rank_with_another_configuration_is_named():
    model = perceptron()
    seed = 1 if hvd.rank() == hvd.size() - 1 else 0
    compression = compressor(model, RandomK(0.1, seed=seed))
    optimizer = wrap(model, compression)
    loss_of(model, 0).backward()
    others = hvd.size() - 1 if hvd.rank() != hvd.size() - 1 else 0
    with pytest.raises(ExchangeError, match=rf"rank {others}: digest"):
        optimizer.step()
    residual = compression.state_dict()["tensors"]["0.weight"]["residual"]
    assert residual.abs().sum() > 0


@pytest.mark.ranks
@pytest.mark.transport
def test_a_step_that_was_given_up_loses_nothing(allgathers):
    parameter = nn.Parameter(torch.zeros(8))
    compression = SparseCompressor(
        TopK(0.5), named_parameters=[("p", parameter)], dense=Never()
    )
    parameter.grad = torch.arange(1.0, 9.0)
    compression.compress(parameter.grad)
    hvd.synchronize(allgathers[0])  # it is sent, and its result never asked for
    parameter.grad = torch.arange(1.0, 9.0)
    dummy, ctx = compression.compress(parameter.grad)
    reduced = hvd.allreduce(dummy, op=hvd.Sum, name="given up")
    compression.decompress(reduced, ctx)
    np.testing.assert_array_equal(
        parameter.grad, 2 * hvd.size() * np.array([0, 0, 0, 0, 5, 6, 7, 8])
    )
    residual = residual_of(compression, "p")
    np.testing.assert_array_equal(residual, 2 * np.array([1, 2, 3, 4, 0, 0, 0, 0]))


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.parametrize(
    ("elastic", "kind"), [("1", HorovodInternalError), ("0", ValueError)]
)
def test_elastic_training_recovers_from_a_shutdown(monkeypatch, elastic, kind):
    class Gone:
        def rank(self):
            raise ValueError("Horovod has not been initialized; use hvd.init().")

    monkeypatch.setenv("HOROVOD_ELASTIC", elastic)
    exchange = GatheredExchange(Gone, "gone", padded=False)
    with pytest.raises(kind, match="has not been initialized"):
        exchange.to_reduce("p")


@pytest.mark.transport
@pytest.mark.parametrize("taken", [False, True], ids=["kept", "its memory taken"])
def test_what_waited_for_its_batch_in_a_step_that_was_given_up_is_kept(taken):
    named = {name: nn.Parameter(torch.zeros(8)) for name in "pq"}
    p, q = named.values()
    compression = SparseCompressor(
        TopK(0.5), named_parameters=named.items(), dense=Never()
    )
    share_an_allgather(compression, named)
    p.grad, q.grad = torch.arange(8.0), torch.ones(8)
    compression.compress(p.grad)  # waits for q, in vain
    if taken:
        p.grad.fill_(16)
    else:
        p.grad = torch.full((8,), 16.0)
    for parameter, (dummy, ctx) in [
        (parameter, compression.compress(parameter.grad)) for parameter in (p, q)
    ]:
        reduced = hvd.allreduce(dummy, op=hvd.Average, name="waited")
        assert compression.decompress(reduced, ctx) is parameter.grad
    expected = np.full(8, 16.0) if taken else 16 + np.arange(8.0)
    np.testing.assert_array_equal(
        p.grad.numpy() + residual_of(compression, "p"), expected
    )


@pytest.mark.ranks
@pytest.mark.parametrize("where", ["last", "first"])
@pytest.mark.parametrize("alone", ["half", "strided"])
def test_a_batch_leaves_with_its_last_member_whoever_that_is(where, alone, allgathers):
    p, q = torch.randint(-99, 99, (2, 8, 6)).float()  # of which any sum is exact
    own = {"p": p, "q": q.half() if alone == "half" else q.T.contiguous().T}
    named = {name: nn.Parameter(torch.zeros_like(g)) for name, g in own.items()}
    compression = SparseCompressor(
        TopK(0.5), named_parameters=named.items(), dense=Never()
    )
    share_an_allgather(compression, named)
    allgathers.clear()
    sent = []
    for name in sorted(named, reverse=where == "first"):
        named[name].grad = own[name].clone()
        assert named[name].grad.stride() == own[name].stride()
        assert not allgathers
        sent.append(compression.compress(named[name].grad))
    assert len(allgathers) == 1
    for dummy, ctx in sent:
        compression.decompress(hvd.allreduce(dummy, name="member", op=hvd.Sum), ctx)
    for name, parameter in named.items():
        residual = compression.state_dict()["tensors"][name]["residual"]
        share = parameter.grad.float().numpy() / hvd.size()
        total = residual.numpy().reshape(8, 6) + share
        np.testing.assert_array_equal(total, own[name].float().numpy())  # of each rank


@pytest.mark.ranks
@pytest.mark.transport
@pytest.mark.parametrize("alone", [False, True])
def test_what_horovod_does_not_take_is_taken_back(monkeypatch, alone):
    gradient = torch.arange(8.0).half() if alone else torch.arange(8.0)
    parameter = nn.Parameter(torch.zeros_like(gradient))
    compression = SparseCompressor(
        TopK(0.5), named_parameters=[("p", parameter)], dense=Never()
    )

    def refuse(*arguments, **options):
        raise RuntimeError("no")

    parameter.grad = gradient.clone()
    with monkeypatch.context() as patch:
        patch.setattr(hvd, "allgather_async", refuse)
        with pytest.raises(RuntimeError, match="no"):
            compression.compress(parameter.grad)
    residual = residual_of(compression, "p")
    np.testing.assert_array_equal(residual, gradient.float().numpy())
    parameter.grad = gradient.clone()
    dummy, ctx = compression.compress(parameter.grad)
    compression.decompress(hvd.allreduce(dummy, name="taken back"), ctx)
    residual = residual_of(compression, "p")
    np.testing.assert_array_equal(
        residual + parameter.grad.float().numpy(), 2 * gradient.float().numpy()
    )


@pytest.mark.ranks
def test_a_refused_gradient_does_not_stand_in_the_way_of_the_next():
    named = {name: nn.Parameter(torch.zeros(8)) for name in "pq"}
    p, q = named.values()
    compression = SparseCompressor(
        TopK(0.5), named_parameters=named.items(), dense=Never()
    )
    share_an_allgather(compression, named)
    given = np.zeros((2, 8))  # to p and q, and not handed back

    def send():
        return [compression.compress(parameter.grad) for parameter in (p, q)]

    def receive(sent):
        for dummy, ctx in sent:
            compression.decompress(hvd.allreduce(dummy, name="refused"), ctx)

    for wrong in (None, torch.ones(5), torch.ones(8).double(), None):
        p.grad, q.grad = torch.arange(8.0), torch.ones(8)
        if wrong is None:
            receive(send())
            given += np.stack([np.arange(8.0), np.ones(8)])
            given -= np.stack([p.grad.numpy(), q.grad.numpy()])
        else:
            p.data, p.grad = wrong, wrong.clone()
            with pytest.raises(ValueError, match="p: gradient has shape"):
                receive(send())
            p.data = torch.zeros(8)
            given[1] += 1  # q came, and is kept
        residuals = [residual_of(compression, name) for name in "pq"]
        np.testing.assert_array_equal(np.stack(residuals), given)


@pytest.mark.transport
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
@pytest.mark.parametrize("dense", [Never(), WhenCheaper()], ids=repr)
def test_a_state_that_is_loaded_in_the_middle_of_a_step_is_an_error(dense, carrier):
    model = perceptron()
    compression = compressor(model, dense=dense, exchange=carrier)
    optimizer = wrap(model, compression)
    train(model, optimizer, [0])
    state = compression.state_dict()
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    with pytest.raises(
        ValueError, match=r"0\.bias: its gradient is under way, so that"
    ):
        compression.load_state_dict(state)
    optimizer.step()
    compression.load_state_dict(state)
    train(model, optimizer, [2])
    assert replicas_agree(model)
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    compression.adopt(compression.state_dict())  # as elastic training does
    with pytest.raises(ExchangeError, match="is not on its way: a state was"):
        optimizer.step()
    hvd.barrier()


@pytest.mark.ranks
def test_a_state_loads_after_a_step_that_was_given_up():
    model = perceptron()
    compression = compressor(model)
    optimizer = wrap(model, compression)
    train(model, optimizer, range(2))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    residuals = compression.state_dict()
    train(model, optimizer, range(2, 4))
    expected = bits(model)
    loss_of(model, 7).backward()  # its loss is bad, say, and all ranks start again
    optimizer.load_state_dict(saved[1])
    model.load_state_dict(saved[0])
    compression.load_state_dict(residuals)
    hvd.barrier()  # Horovod has reduced what nobody asks for any more
    train(model, optimizer, range(2, 4))
    assert bits(model) == expected


STATES = [TopK(0.25), RandomK(0.25), SignTopK(0.25), Threshold(2.0), Stochastic(0.25)]


@pytest.mark.ranks
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
@pytest.mark.parametrize("sparsifier", STATES, ids=repr)
@pytest.mark.parametrize("waits", [False, True], ids=["sent", "waits"])
def test_a_state_that_is_saved_in_the_middle_of_a_step_has_all_of_it(
    waits, sparsifier, carrier
):
    if carrier == Embedded() and isinstance(sparsifier, Threshold | Stochastic):
        return  # refused: they have no fixed density
    p, q, optimizer, compression = pair(
        lambda named: SparseCompressor(
            sparsifier, named_parameters=named, dense=Never(), exchange=carrier
        )
    )

    def backward():
        loss = (p * torch.arange(1.0, 9.0)).sum()
        (loss if waits else loss + (q * torch.ones(8)).sum()).backward()

    def residuals():
        saved = compression.state_dict()["tensors"]
        return [saved[name]["residual"] for name in "pq"]

    backward()
    optimizer.step()
    before = residuals()
    optimizer.zero_grad()
    backward()
    given = [g for g in (p.grad, q.grad) if g is not None]
    state = compression.state_dict()
    between = [state["tensors"][name]["residual"] for name in "pq"][: len(given)]
    if not isinstance(sparsifier, Stochastic):  # which forgets what it does not draw
        for found, old, new in zip(between, before, given, strict=False):
            assert torch.equal(found, old + new)
    optimizer.step()  # the flight was not disturbed
    assert len(set(gather(str([p.tolist(), q.tolist()])))) == 1
    compression.load_state_dict(state)
    for found, saved in zip(residuals(), between, strict=False):
        assert torch.equal(found, saved)
    optimizer.zero_grad()
    backward()
    optimizer.step()
    assert len(set(gather(str([p.tolist(), q.tolist()])))) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_residuals_of_an_accelerator_load_where_there_is_none():
    model = perceptron()
    compression = compressor(model)
    optimizer = wrap(model, compression)
    train(model, optimizer, range(2))
    state = compression.state_dict()
    for saved in state["tensors"].values():
        saved["residual"] = saved["residual"].cuda()
    train(model, optimizer, [2])
    compression.load_state_dict(state)
    train(model, optimizer, [3])
    assert replicas_agree(model)


def test_a_compressor_is_not_copied():
    compression = compressor(perceptron())
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="can not be copied or pickled, it serves"):
            copied(compression)


@pytest.mark.transport
def test_a_batch_that_came_in_a_step_that_was_given_up_is_not_taken_for_the_next():
    exchange = GatheredExchange(lambda: hvd.global_process_set, "twice", padded=False)
    exchange.plan({"a": 8, "b": 8})
    header = Header(Entries(Float32()), "float32", n=9, k=1, step=0, digest=5)
    for value in (1.0, 2.0):  # of both steps, only the second is asked for
        entry = Selection(np.array([3], np.int32), np.array([value], np.float32), 0)
        for name in "ab":
            exchange.start(name, encode(entry, header)[0])
        exchange.arrive("a")
    for name in "ab":
        payloads = exchange.finish(name)
        found = [decode(payload).values.tolist() for payload in payloads]
        assert found == [[2.0]] * hvd.size()


@pytest.mark.transport
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
@pytest.mark.parametrize("dense", [Never(), WhenCheaper()], ids=repr)
def test_no_gradient_outlives_its_step(dense, carrier):
    model = perceptron()
    compression = compressor(model, dense=dense, exchange=carrier)
    optimizer = wrap(model, compression)
    loss_of(model, 0).backward()
    gradients = [weakref.ref(p.grad) for p in model.parameters()]
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert [ref() for ref in gradients] == [None] * 4


@pytest.mark.ranks
@pytest.mark.transport
def test_a_straggler_is_warned_about_and_awaited(monkeypatch, caplog):
    monkeypatch.setattr("hvd_sparse.watchdog.WARNING_S", 0.5)
    model = perceptron()
    compression = compressor(model, timeout_s=20)
    optimizer = wrap(model, compression)
    with caplog.at_level(logging.WARNING, logger="hvd_sparse"):
        if hvd.rank() == 0:
            time.sleep(3)  # this is the fault, not a wait for something
        train(model, optimizer, [0])
    said = [r.getMessage() for r in caplog.records]
    if hvd.rank() != 0:
        assert any("step 0: rank" in line for line in said)
    assert replicas_agree(model)


@pytest.mark.transport
def test_no_warning_on_a_path_that_works(caplog, recwarn):
    model = perceptron()
    with caplog.at_level(logging.WARNING):
        train(model, wrap(model, compressor(model, TopK(0.5))), range(3))
    assert not caplog.records
    assert not recwarn.list


@pytest.mark.ranks
@pytest.mark.transport
def test_a_measured_cost_is_the_same_on_every_rank():
    found = measure(sizes=(64, 4096, 65536), repeats=3)
    assert len(set(gather(repr(found)))) == 1
    assert found.cost.per_byte + found.cost.per_message > 0


@pytest.mark.parametrize("density", LOW_DENSITIES)
@pytest.mark.parametrize(("kind", "options", "momentum"), TORCH_OPTIMIZERS)
def test_momentum_is_warned_of_once_by_the_first_rank(
    kind, options, momentum, density, advised
):
    model = perceptron()
    optimizer = hvd.DistributedOptimizer(
        getattr(torch.optim, kind)(model.parameters(), **options),
        named_parameters=model.named_parameters(),
        compression=compressor(model, TopK(density)),
    )
    train(model, optimizer, range(3))
    bad = momentum and LOW_DENSITIES[density] and hvd.rank() == 0
    assert advised() == [sparse.advise(optimizer, TopK(density))] * bad


@pytest.mark.parametrize("kind", ["whole", "frozen", "failed"])
def test_after_a_step_nothing_is_awaited(kind):
    """Or what the user waits for himself would be ended at the deadline."""
    model = perceptron()
    compression = compressor(model, timeout_s=4)
    optimizer = wrap(model, compression)
    train(model, optimizer, range(2))
    if kind == "frozen":
        model.requires_grad_(requires_grad=False)
        optimizer.zero_grad()
        optimizer.step()
    elif kind == "failed":
        optimizer.zero_grad()
        loss_of(model, 2).backward()
        for parameter in model.parameters():
            parameter.grad.add_(1)
        with pytest.raises(ValueError, match="its gradient was changed"):
            optimizer.step()
    if hvd.rank() == 0:
        time.sleep(6)  # saves, or evaluates, while its peers wait
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum, name="saved") == hvd.size()


def keeps(compression, before):
    """Every residual is what it was, bit by bit."""
    for name, saved in compression.state_dict()["tensors"].items():
        assert torch.equal(saved["residual"], before[name]["residual"])


@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
def test_a_bad_batch_that_is_thrown_away_leaves_no_trace(carrier):
    """Its norm is seen after the exchange, and all ranks leave the step out."""
    model = perceptron()
    compression = compressor(model, exchange=carrier, undo=True)
    optimizer = wrap(model, compression)
    train(model, optimizer, range(2))
    before = compression.state_dict()["tensors"]
    optimizer.zero_grad()
    (1000 * loss_of(model, 2)).backward()
    optimizer.synchronize()
    compression.discard()
    keeps(compression, before)


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
def test_a_rank_that_throws_a_step_away_before_its_exchange_takes_part_in_it(
    carrier, backward
):
    """It has seen its loss, or its batch, which its peers have not."""
    model = perceptron()
    compression = compressor(model, exchange=carrier, undo=True)
    optimizer = wrap(model, compression)
    train(model, optimizer, range(2))
    before = compression.state_dict()["tensors"]
    alone = hvd.rank() == hvd.size() - 1
    optimizer.zero_grad()
    if backward or not alone:
        (1e30 * loss_of(model, 2)).backward()
    if not (backward and alone):
        optimizer.synchronize()
        optimizer.zero_grad()  # which makes no other step of it
    compression.discard()
    with pytest.raises(RuntimeError, match=r"no step that discard\(\) could"):
        compression.discard()  # moves nothing that peers could take for a step
    keeps(compression, before)
    train(model, optimizer, range(3, 5))  # all are at the same step
    for parameter in model.parameters():
        assert parameter.isfinite().all()


def test_of_a_step_that_was_given_up_nothing_is_exchanged_to_throw_it_away():
    """Its peers may be in their next step, and would take it for that."""
    model = perceptron()
    compression = compressor(model, undo=True)
    optimizer = wrap(model, compression)
    train(model, optimizer, range(2))
    loss_of(model, 2).backward()
    for handle, _ in optimizer._handles.values():
        hvd.synchronize(handle)
    optimizer._handles.clear()
    with pytest.raises(RuntimeError, match="its exchange is under way"):
        compression.discard()
    assert not optimizer._handles


@pytest.mark.parametrize("carrier", CARRIERS, ids=repr)
def test_a_step_that_was_applied_can_not_be_thrown_away(carrier):
    """It would be in the weights, and in the residuals again."""
    model = perceptron()
    compression = compressor(model, exchange=carrier, undo=True)
    optimizer = wrap(model, compression)
    train(model, optimizer, range(2))
    before = compression.state_dict()["tensors"]
    with pytest.raises(RuntimeError, match=r"in place of step\(\)"):
        compression.discard()
    keeps(compression, before)


def test_a_step_that_the_base_optimizer_applied_can_not_be_thrown_away():
    model = perceptron()
    compression = compressor(model, undo=True)
    optimizer = wrap(model, compression)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, 0).backward()
    optimizer.synchronize()
    base.step()
    with pytest.raises(RuntimeError, match=r"in place of step\(\)"):
        compression.discard()
    compression.load_state_dict(compression.state_dict())
    with pytest.raises(RuntimeError, match=r"no step that discard\(\) could"):
        compression.discard()


def test_nothing_can_be_thrown_away_before_the_first_gradient():
    compression = compressor(perceptron(), undo=True)
    with pytest.raises(RuntimeError, match=r"no step that discard\(\) could"):
        compression.discard()
