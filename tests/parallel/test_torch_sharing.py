"""Gradients, parameters and buffers may share memory: results are those of each."""

import weakref

import pytest
import torch
from mpi4py import MPI
from torch import nn

import hvd_sparse.torch as sparse
from hvd_sparse import Average, Never, Sum, TopK, WhenCheaper

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.Get_rank(), COMM.Get_size()
SHAPE, N = (3, 4), 12


class Copies(torch.overrides.TorchFunctionMode):
    """Inside of it, how many tensors were cloned."""

    count = 0

    def __torch_function__(self, function, types, arguments=(), options=None):
        self.count += function is torch.Tensor.clone
        return function(*arguments, **(options or {}))


def weights(count):
    return [nn.Parameter(torch.zeros(SHAPE)) for _ in range(count)]


def distribute(parameters, density=1.0, dense=Never(), **options):  # noqa: B008
    return sparse.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=1.0),
        TopK(density),
        named_parameters=[(f"p{i}", p) for i, p in enumerate(parameters)],
        comm=COMM,
        dense=dense,
        timeout_s=30,
        **options,
    )


def mean(gradient):
    """Over ranks, in rank order, as the exchange adds."""
    parts = [torch.from_numpy(g) for g in COMM.allgather(gradient.numpy().copy())]
    return sum(parts[1:], parts[0].clone()) * torch.tensor(1 / SIZE)


def numbers(*shape):
    generator = torch.Generator().manual_seed(RANK)
    return torch.randn(*shape, generator=generator)


def one_tensor(parameters):
    parameters[0].grad = parameters[1].grad = parameters[2].grad = numbers(*SHAPE)


def overlapping_views(parameters):
    flat = numbers(N + 8)
    for i, parameter in enumerate(parameters):
        parameter.grad = flat[4 * i : 4 * i + N].view(SHAPE)


def columns_that_overlap(parameters):
    table = numbers(3, 8)
    for i, parameter in enumerate(parameters):
        parameter.grad = table[:, 2 * i : 2 * i + 4]


def stride_0(parameters):
    for i, parameter in enumerate(parameters):
        parameter.grad = numbers(*[(1,), (3, 1), (1, 4)][i]).expand(SHAPE)


def sliding_windows(parameters):
    for parameter in parameters:
        parameter.grad = numbers(8).as_strided(SHAPE, (2, 1))


def views_of_parameters(parameters):
    parameters[0].grad = parameters[0].data
    parameters[1].grad = parameters[2].data
    parameters[2].grad = numbers(*SHAPE)


def interleaved(parameters):
    flat = numbers(3 * N)
    for i, parameter in enumerate(parameters):
        parameter.grad = flat[i::3].view(SHAPE)


SHARING = [
    one_tensor,
    overlapping_views,
    columns_that_overlap,
    stride_0,
    sliding_windows,
    views_of_parameters,
    interleaved,
]


@pytest.mark.ranks
@pytest.mark.parametrize("dense", [Never(), WhenCheaper()], ids=repr)
@pytest.mark.parametrize("share", SHARING)
def test_every_gradient_becomes_its_own_mean(share, dense):
    parameters = weights(3)
    optimizer = distribute(parameters, dense=dense)
    for _ in range(3):
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(numbers(*SHAPE))
        share(parameters)
        values = [p.detach().clone() for p in parameters]
        expected = [mean(p.grad) for p in parameters]
        optimizer.synchronize()
        for parameter, value, gradient in zip(
            parameters, values, expected, strict=True
        ):
            assert torch.equal(parameter.detach(), value)  # nobody wrote into it
            if dense == Never():
                assert torch.equal(parameter.grad, gradient)
            else:  # MPI adds in an order of its own
                torch.testing.assert_close(parameter.grad, gradient)
        with optimizer.skip_synchronize():
            optimizer.step()
    optimizer.close()


@pytest.mark.ranks
@pytest.mark.parametrize("density", [1.0, 0.25])
def test_gradients_that_are_views_of_one_buffer_stay_in_it(density):
    parameters = weights(3)
    flat, table = torch.zeros(2 * N), torch.zeros(3, 9)
    optimizer = distribute(parameters, density)
    for _ in range(3):
        flat.copy_(numbers(2 * N))
        table.copy_(numbers(3, 9))
        parameters[0].grad = flat[:N].view(SHAPE)
        parameters[1].grad = flat[N:].view(SHAPE)
        parameters[2].grad = table[:, 5:]
        before = [p.grad for p in parameters]
        beside = table[:, :5].clone()
        optimizer.synchronize()
        for parameter, gradient in zip(parameters, before, strict=True):
            assert parameter.grad is gradient
        assert torch.equal(torch.cat([p.grad.view(-1) for p in parameters[:2]]), flat)
        assert torch.equal(table[:, :5], beside)
        with optimizer.skip_synchronize():
            optimizer.step()
    optimizer.close()


@pytest.mark.ranks
def test_a_frozen_parameters_gradient_may_be_another_ones():
    a, b = weights(2)
    b.requires_grad_(False)
    optimizer = distribute([a, b])
    for _ in range(2):
        a.grad = b.grad = numbers(*SHAPE)
        expected = mean(a.grad)
        optimizer.synchronize()
        assert torch.equal(a.grad, expected)
        assert torch.equal(b.grad, expected)
    optimizer.close()


@pytest.mark.ranks
def test_two_optimizers_keep_two_residuals_of_one_parameter():
    (w,) = weights(1)
    optimizers = [distribute([w], density) for density in (0.25, 0.5)]
    expected = [torch.zeros(SHAPE), torch.zeros(SHAPE)]
    for step in range(4):
        for i, (optimizer, k) in enumerate(zip(optimizers, (3, 6), strict=True)):
            gradient = numbers(*SHAPE) * (1 + step + i)
            w.grad = gradient.clone()
            optimizer.step()
            expected[i] += gradient
            flat = expected[i].view(-1)
            flat[flat.abs().topk(k).indices] = 0
            state = optimizer.residual_state_dict()["tensors"]["p0"]
            torch.testing.assert_close(state["residual"], expected[i])
    assert len(set(COMM.allgather(w.detach().numpy().tobytes()))) == 1
    for optimizer in optimizers:
        optimizer.close()


# --------------------------------------------- several optimizers over one parameter


class Law:
    """What two optimizers, over some parameters in common, are to do with exact sums.

    Each exchanges what the backward pass left, keeps a residual per parameter of its
    own, and steps with its own result.
    """

    def __init__(self, held, k, op):
        self.held, self.k, self.op = held, k, op
        self.weights = {
            name: torch.zeros(N) for names in held.values() for name in names
        }
        self.residuals = {(o, n): torch.zeros(N) for o in held for n in held[o]}
        self.there, self.local, self.results, self.owner = {}, {}, {}, {}
        self.taken = set()

    def backward(self, gradients):
        for name, gradient in gradients.items():
            self.there[name] = self.there.get(name, torch.zeros(N)) + gradient
            self.local[name] = self.there[name]
            self.taken -= {(o, name) for o in self.held}

    def zero(self):
        self.there = {}

    def halve(self, o):
        for name in self.held[o]:
            owner = self.owner[name]
            self.results[owner, name] = self.there[name] = self.there[name] / 2

    def synchronize(self, o):
        for name in self.held[o]:
            first = (o, name) not in self.taken
            whole = (
                self.residuals[o, name] + (self.local if first else self.there)[name]
            )
            sent = torch.zeros(N)
            order = whole.abs().sort(descending=True, stable=True)
            chosen = order.indices[: self.k]
            sent[chosen] = whole[chosen]
            self.residuals[o, name] = whole - sent
            total = sum(map(torch.from_numpy, COMM.allgather(sent.numpy())))
            result = total / SIZE if self.op is Average else total
            self.results[o, name] = self.there[name] = result
            self.owner[name] = o
            self.taken.add((o, name))

    def apply(self, o):
        for name in self.held[o]:
            self.weights[name] = self.weights[name] - RATES[o] * self.results[o, name]
            self.there[name], self.owner[name] = self.results[o, name], o

    def step(self, o):
        self.synchronize(o)
        self.apply(o)


class Real:
    """The same with optimizers."""

    def __init__(self, held, density, op, dense, grads):
        names = sorted({name for names in held.values() for name in names})
        self.weights = {n: nn.Parameter(torch.zeros(SHAPE)) for n in names}
        self.flat = torch.zeros(len(names) * N) if grads == "flat" else None
        self.grads = grads
        self.optimizers = {
            o: sparse.DistributedOptimizer(
                torch.optim.SGD([self.weights[n] for n in held[o]], lr=RATES[o]),
                TopK(density),
                named_parameters=[(n, self.weights[n]) for n in held[o]],
                comm=COMM,
                op=op,
                dense=dense,
                timeout_s=30,
            )
            for o in held
        }
        if self.flat is not None:
            for i, w in enumerate(self.weights.values()):
                w.grad = self.flat[i * N : (i + 1) * N].view(SHAPE)

    def backward(self, gradients):
        used = [(self.weights[n], g.view(SHAPE)) for n, g in gradients.items()]
        sum((w * g).sum() for w, g in used).backward()

    def zero(self):
        if self.flat is not None:
            self.flat.zero_()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=self.grads == "none")

    def halve(self, o):
        for group in self.optimizers[o].param_groups:
            for w in group["params"]:
                w.grad.mul_(0.5)

    def synchronize(self, o):
        self.optimizers[o].synchronize()

    def apply(self, o):
        with self.optimizers[o].skip_synchronize():
            self.optimizers[o].step()

    def step(self, o):
        self.optimizers[o].step()


RATES = {"a": 1.0, "b": 64.0}
# of a step each: what is done to which optimizer after the backward pass
ORDERS = {
    "steps": ["step a", "step b"],
    "last first": ["step b", "step a"],
    "both, then steps": ["synchronize a", "synchronize b", "apply a", "apply b"],
    "both, last first": ["synchronize a", "synchronize b", "apply b", "apply a"],
    "clipped": ["synchronize a", "halve a", "apply a", "step b"],
    "clipped before": [
        "synchronize a",
        "halve a",
        "synchronize b",
        "apply a",
        "apply b",
    ],
    "one thrown away": ["synchronize a", "step b"],
    "one twice": ["step a", "step a", "step b"],
    "one, then the other": ["step a", "zero", "backward", "step b"],
    "in turns": ["step a", "zero", "backward", "step b", "zero", "backward", "step a"],
    "accumulated": ["step a", "backward", "step b", "step a"],
}
HELD = {
    "the same": {"a": ["w"], "b": ["w"]},
    "some": {"a": ["u", "w"], "b": ["v", "w"]},
    "one of all": {"a": ["w"], "b": ["u", "v", "w"]},
}


def whole_numbers(step, names):
    """So small that sums are exact."""
    generator = torch.Generator().manual_seed(1000 * step + RANK)
    return {
        name: torch.randint(-4096, 4096, (N,), generator=generator).float()
        for name in names
    }


def assert_alike(real, law):
    for name, weight in real.weights.items():
        torch.testing.assert_close(
            weight.detach().view(-1), law.weights[name], rtol=1e-5, atol=1e-5
        )
    for name, gradient in law.there.items():
        torch.testing.assert_close(
            real.weights[name].grad.view(-1), gradient, rtol=1e-5, atol=1e-5
        )
    for (o, name), residual in law.residuals.items():
        kept = real.optimizers[o].residual_state_dict()["tensors"][name]["residual"]
        if kept is not None:
            torch.testing.assert_close(kept.view(-1), residual, rtol=1e-5, atol=1e-5)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("density", "op", "dense", "grads"),
    [
        (0.25, Average, Never(), "none"),
        (0.25, Sum, Never(), "flat"),
        (1.0, Sum, Never(), "zeros"),
        (1.0, Sum, WhenCheaper(), "none"),
    ],
    ids=["none", "flat", "zeros", "dense"],
)
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("order", ORDERS)
def test_optimizers_over_one_parameter_exchange_the_local_gradient_each(
    order, held, density, op, dense, grads
):
    real = Real(HELD[held], density, op, dense, grads)
    law = Law(HELD[held], N if density == 1 else 3, op)
    count = 0
    for _ in range(3):
        for what in ["zero", "backward", *ORDERS[order]]:
            call, *of = what.split()
            if call == "backward":
                count += 1
                of = [whole_numbers(count, real.weights)]
            getattr(law, call)(*of)
            getattr(real, call)(*of)
        assert_alike(real, law)
    for optimizer in real.optimizers.values():
        optimizer.close()


def assign(gradient, values):
    gradient.copy_(values)


def assign_data(gradient, values):
    gradient.data.copy_(values)


def assign_in_numpy(gradient, values):
    gradient.numpy()[...] = values.numpy()


@pytest.mark.ranks
@pytest.mark.parametrize("write", [assign, assign_data, assign_in_numpy])
def test_gradients_by_hand_are_new_ones_whatever_tensor_they_are_written_into(write):
    (w,) = weights(1)
    a, b = (distribute([w], op=Sum) for _ in range(2))
    w.grad = torch.zeros(SHAPE)
    for step in range(1, 4):
        write(w.grad, torch.full(SHAPE, float(step)))
        a.step()
        b.step()
        assert w.grad.unique().tolist() == [SIZE * step]
    for optimizer in (a, b):
        optimizer.close()


@pytest.mark.ranks
@pytest.mark.parametrize("write", [assign, assign_data, assign_in_numpy])
def test_a_gradient_that_may_be_of_either_optimizer_is_refused(write):
    (w,) = weights(1)
    a, b = (distribute([w], op=Sum) for _ in range(2))
    w.sum().backward()
    a.step()
    moved = w.detach().clone()
    write(w.grad, torch.full(SHAPE, 5.0))
    for call in (b.step, b.synchronize):
        with pytest.raises(ValueError, match="p0: several optimizers hold it, and its"):
            call()
    assert torch.equal(w, moved)
    w.grad = torch.full(SHAPE, 5.0)
    b.step()
    assert torch.equal(w.detach(), moved - 5 * SIZE)

    a.synchronize()
    b.synchronize()
    write(w.grad, torch.full(SHAPE, 2.0))
    with a.skip_synchronize(), pytest.raises(ValueError, match="p0: several optim"):
        a.step()
    assert torch.equal(w.detach(), moved - 5 * SIZE)
    for optimizer in (a, b):
        optimizer.close()


@pytest.mark.ranks
def test_what_was_seen_of_an_exchange_that_was_refused_is_forgotten():
    u, w = weights(2)
    a, b = (distribute([u, w], op=Sum) for _ in range(2))
    (u.sum() + w.sum()).backward()
    a.step()
    u.grad = torch.full(SHAPE, 8.0)
    w.grad.mul_(0.5)
    with pytest.raises(ValueError, match="p1: several optimizers hold it"):
        b.step()
    u.grad.fill_(2.0)
    w.grad = torch.full(SHAPE, 3.0)
    b.step()
    a.step()
    assert u.unique().tolist() == [-(1 + 2 * 2) * SIZE]
    assert w.unique().tolist() == [-(1 + 2 * 3) * SIZE]
    for optimizer in (a, b):
        optimizer.close()


def close(optimizers, w):
    optimizers.pop(0).close()


def abandon(optimizers, w):
    del optimizers[0]


def set_an_alias(optimizers, w):
    w.grad = w.grad.detach()


@pytest.mark.ranks
@pytest.mark.parametrize("then", [close, abandon, set_an_alias])
def test_the_gradient_is_there_for_the_next_optimizer_whatever_becomes_of_the_last(
    then,
):
    (w,) = weights(1)
    optimizers = [distribute([w], op=Sum) for _ in range(2)]
    w.sum().backward()
    optimizers[0].step()
    then(optimizers, w)
    optimizers[-1].step()
    assert w.unique().tolist() == [-2 * SIZE]
    for optimizer in optimizers:
        optimizer.close()


@pytest.mark.ranks
@pytest.mark.parametrize("share", [one_tensor, overlapping_views, columns_that_overlap])
@pytest.mark.parametrize("order", ["steps", "both, then steps"])
def test_two_optimizers_gradients_share_memory(order, share):
    parameters = weights(3)
    optimizers = [
        distribute(parameters[:2], op=Sum),
        distribute(parameters[2:], op=Sum),
    ]
    for _ in range(2):
        share(parameters)
        expected = [p.detach() - SIZE * mean(p.grad) for p in parameters]
        if order == "steps":
            for optimizer in optimizers:
                optimizer.step()
        else:
            for optimizer in optimizers:
                optimizer.synchronize()
            for optimizer in optimizers:
                with optimizer.skip_synchronize():
                    optimizer.step()
        for parameter, value in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.detach(), value)
    for optimizer in optimizers:
        optimizer.close()


@pytest.mark.ranks
@pytest.mark.parametrize("used", ["by all ranks", "by the last rank"])
def test_two_optimizers_exchange_rows_and_gradients_that_not_all_ranks_have(used):
    table = nn.Embedding(4, 3, sparse=True)
    (w,) = weights(1)
    nn.init.zeros_(table.weight)
    optimizers = [distribute([table.weight, w], op=Sum) for _ in range(2)]
    users = SIZE if used == "by all ranks" else 1
    for step in range(1, 4):
        if SIZE - users <= RANK:
            (table(torch.tensor([1, 1, 3])).sum() + w.sum()).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(w, torch.full(SHAPE, -2.0 * users * step))
        rows = torch.tensor([0.0, 2.0, 0.0, 1.0])[:, None].expand(4, 3)
        assert torch.equal(table.weight, -2 * users * step * rows)
        for optimizer in optimizers:
            optimizer.zero_grad()
    for optimizer in optimizers:
        optimizer.close()


def test_gradients_are_copied_only_where_another_living_optimizer_has_them():
    parameters = weights(3)
    a, b = distribute(parameters[:1]), distribute(parameters[1:])
    sum(p.sum() for p in parameters).backward()
    before = [p.grad for p in parameters]
    with Copies() as copies:
        for optimizer in (a, b):
            optimizer.step()
    assert copies.count == 0
    assert all(p.grad is g for p, g in zip(parameters, before, strict=True))
    again, gone = distribute(parameters), weakref.ref(b)
    a.close()
    del b, optimizer
    assert gone() is None  # nor does a parameter's hook keep it
    with Copies() as copies:
        again.step()
        assert copies.count == 0
        other = distribute(parameters)
        again.step()
        assert copies.count > 0
    for optimizer in (again, other):
        optimizer.close()
