"""The hook of DistributedDataParallel, whose ranks are those of mpirun."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import hvd_sparse.torch as sparse
from hvd_sparse import ExchangeError

RANKS = MPI.COMM_WORLD
LAST = RANKS.size - 1

pytestmark = [pytest.mark.ranks, pytest.mark.usefixtures("world")]
several = pytest.mark.skipif(RANKS.size == 1, reason="needs mpirun -np 2 or more")

SPARSIFIERS = {
    "TopK": sparse.TopK(density=0.05),
    "RandomK": sparse.RandomK(density=0.05),
    "Threshold": sparse.Threshold(value=0.05),
    "SignTopK": sparse.SignTopK(density=0.05),
    "Stochastic": sparse.Stochastic(expected_density=0.1),
    "CAT": sparse.CAT(sparse.TopK(), sparse.Affine(per_byte=1.0, per_message=54.0)),
}

# of DistributedDataParallel; buckets so small that there are several
OPTIONS = {
    "defaults": {},
    "views": {"gradient_as_bucket_view": True},
    "static_graph": {"static_graph": True},
    "both": {"gradient_as_bucket_view": True, "static_graph": True},
    "find_unused_parameters": {"find_unused_parameters": True},
}


class Net(nn.Module):
    """Convolutions in two orders of memory, a norm, and what some steps do not use."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.norm = nn.GroupNorm(2, 8)
        self.second = nn.Conv2d(8, 6, 3)
        self.sometimes = nn.Linear(96, 5)
        self.last = nn.Linear(96, 5)
        self.to(dtype)

    def forward(self, x, which="last"):
        x = self.norm(self.first(x)).relu()
        x = self.second(x).relu().flatten(1)
        return getattr(self, which)(x)


def model_of(options=None, *, dtype=torch.float32, used_everywhere=True):
    torch.manual_seed(0)
    net = Net(dtype)
    if used_everywhere:
        del net.sometimes
    return DistributedDataParallel(net, **{"bucket_cap_mb": 0.002, **(options or {})})


def batch(step, rank=RANKS.rank, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(4, 3, 8, 8, generator=generator).to(dtype)


def train(model, steps, *, first=0, which=lambda step: "last", lr=0.05):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(first, first + steps):
        dtype = model.module.first.weight.dtype
        optimizer.zero_grad()
        model(batch(step, dtype=dtype), which(step)).square().mean().backward()
        optimizer.step()
    return model


def weights(model):
    flat = [p.detach().double().reshape(-1) for p in model.parameters()]
    return torch.cat(flat).numpy()


def agree(model):
    return len(set(RANKS.allgather(weights(model).tobytes()))) == 1


def residuals(state):
    [own] = state.state_dict().values()
    return {name: saved["residual"] for name, saved in own["tensors"].items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_density_one_is_plain_ddp(options):
    ours, theirs = model_of(options), model_of(options)
    state = sparse.register(ours, sparse.TopK(density=1.0), dense=sparse.Never())
    train(ours, 10)
    train(theirs, 10)
    if RANKS.size <= 2:  # above, gloo adds up in an order of its own
        np.testing.assert_array_equal(weights(ours), weights(theirs))
    else:
        np.testing.assert_allclose(weights(ours), weights(theirs), 1e-4, 1e-5)
    assert {t.route for t in state.traffic.tensors.values()} == {"sparse"}
    assert state.traffic.steps == 10


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("sparsifier", SPARSIFIERS.values(), ids=SPARSIFIERS)
def test_replicas_agree_bitwise(sparsifier, options):
    model = model_of(options)
    sparse.register(model, sparsifier)
    assert agree(train(model, 10))


def test_replicas_agree_after_200_steps_of_other_graphs_on_each_rank():
    model = model_of({"find_unused_parameters": True}, used_everywhere=False)
    sparse.register(model, sparse.TopK(density=0.02), dense=sparse.Never())
    which = ("last", "sometimes")
    train(model, 200, which=lambda step: which[(step + RANKS.rank) % 3 == 0])
    assert agree(model)


@pytest.mark.parametrize(
    "sparsifier",
    [sparse.TopK(density=0.05), sparse.RandomK(density=0.05)],
    ids=lambda sparsifier: type(sparsifier).__name__,
)
def test_it_trains_as_the_optimizer_over_mpi_does_bit_for_bit(sparsifier):
    model = model_of()
    sparse.register(model, sparsifier, dense=sparse.Never())
    train(model, 10)
    torch.manual_seed(0)
    net = Net()
    del net.sometimes
    optimizer = sparse.DistributedOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.05),
        sparsifier,
        named_parameters=net.named_parameters(),
        comm=RANKS,
        dense=sparse.Never(),
    )
    for step in range(10):
        optimizer.zero_grad()
        net(batch(step)).square().mean().backward()
        optimizer.step()
    np.testing.assert_array_equal(weights(model), weights(net))


# --------------------------------------------------------------------- nothing is lost


class Scaled(nn.Module):
    """The gradient of a parameter is what it is multiplied with."""

    def __init__(self, sizes=(60, 7, 40)):
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.zeros(n)) for n in sizes)

    def forward(self, factors):
        used = [(p * f).sum() for p, f in zip(self.parts, factors, strict=True)]
        return sum(used)


def factors_of(step, sizes=(60, 7, 40), rank=RANKS.rank):
    """Whole numbers: their sums are exact."""
    rng = np.random.default_rng([step, rank])
    return [torch.from_numpy(rng.integers(-9, 10, n).astype(np.float32)) for n in sizes]


def scaled(sparsifier, options=None, **given):
    model = DistributedDataParallel(Scaled(), bucket_cap_mb=0.0001, **(options or {}))
    state = sparse.register(
        model, sparsifier, op=sparse.Sum, dense=sparse.Never(), **given
    )
    return model, state


def everything(model, state):
    """Per parameter, what all ranks applied and have left; gradients count -1."""
    own = residuals(state)
    left = {name: RANKS.allreduce(own[name].numpy()) for name in own}
    held = dict(model.module.named_parameters())
    return {name: left[name] - held[name].detach().numpy() for name in left}


def given_so_far(steps):
    names = [f"parts.{i}" for i in range(3)]
    sums = [sum(factors_of(s)[i] for s in steps).numpy() for i in range(3)]
    return {
        name: RANKS.allreduce(total) for name, total in zip(names, sums, strict=True)
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_is_lost(options):
    model, state = scaled(sparse.TopK(density=0.1), options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(6):
        optimizer.zero_grad()
        model(factors_of(step)).backward()
        optimizer.step()
    same(everything(model, state), given_so_far(range(6)))


def test_nothing_is_lost_of_several_passes_without_synchronization():
    model, state = scaled(sparse.TopK(density=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(0, 6, 3):
        optimizer.zero_grad()
        with model.no_sync():
            model(factors_of(step)).backward()
            model(factors_of(step + 1)).backward()
        model(factors_of(step + 2)).backward()
        optimizer.step()
    assert state.traffic.steps == 2
    same(everything(model, state), given_so_far(range(6)))


class Chosen(Scaled):
    """Uses only some of its parameters."""

    def forward(self, factors, places):
        return sum((self.parts[i] * factors[i]).sum() for i in places)


@pytest.mark.parametrize("used_by", ["nobody", "the last rank"])
def test_nothing_is_lost_of_a_parameter_that_is_not_used(used_by):
    """DDP throws the results away of what no rank has used."""
    model = DistributedDataParallel(
        Chosen(), bucket_cap_mb=0.0001, find_unused_parameters=True
    )
    state = sparse.register(
        model, sparse.TopK(density=0.1), op=sparse.Sum, dense=sparse.Never()
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(factors_of(0), [0, 1, 2]).backward()
    optimizer.step()
    before = residuals(state)["parts.0"]
    uses = used_by == "the last rank" and RANKS.rank == LAST
    for step in range(1, 4):
        optimizer.zero_grad()
        model(factors_of(step), [0, 1, 2] if uses else [1, 2]).backward()
        optimizer.step()
    first = given_so_far([0])["parts.0"]
    own = sum(factors_of(step)[0].numpy() for step in range(1, 4))
    more = RANKS.allreduce(own if uses else np.zeros_like(own))
    np.testing.assert_array_equal(everything(model, state)["parts.0"], first + more)
    if used_by == "nobody":
        assert torch.equal(residuals(state)["parts.0"], before)
    assert agree(model)


# --------------------------------------------------------------- what users do with DDP


@pytest.mark.parametrize("registered", ["as PowerSGD's is", "by its state alone"])
def test_a_state_made_before_the_model_finds_it(registered):
    state = sparse.SparseState(sparse.TopK(density=0.05))
    model, other = model_of(), model_of()
    sparse.register(other, sparse.TopK(density=0.05))
    if registered == "by its state alone":
        state = pickle.loads(pickle.dumps(state))
    model.register_comm_hook(state, sparse.sparse_hook)
    train(model, 5)
    train(other, 5)
    np.testing.assert_array_equal(weights(model), weights(other))
    assert "first.weight" in state.traffic.tensors


def test_several_models_take_turns():
    models = [model_of(), model_of()]
    for model in models:
        sparse.register(model, sparse.TopK(density=0.05))
    for step in range(5):
        for model in models:
            train(model, 1, first=step)
    np.testing.assert_array_equal(weights(models[0]), weights(models[1]))
    assert agree(models[0])


def test_the_first_steps_go_dense_where_that_is_asked():
    model, theirs = model_of(), model_of()
    state = sparse.register(model, sparse.TopK(density=0.02), start_iter=4)
    train(model, 4)
    train(theirs, 4)
    np.testing.assert_array_equal(weights(model), weights(theirs))
    assert state.traffic.steps == 0
    train(model, 2, first=4)
    assert state.traffic.steps == 2
    assert agree(model)


def test_the_first_steps_are_sums_where_these_are_asked():
    model, state = scaled(sparse.TopK(density=0.1), start_iter=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(4):
        optimizer.zero_grad()
        model(factors_of(step)).backward()
        optimizer.step()
    same(everything(model, state), given_so_far(range(4)))


class Inside(Net):
    """Of whose parameters some have the name that DDP puts before all."""

    def __init__(self):
        super().__init__()
        self.module = self.last
        del self.sometimes, self.last

    def forward(self, x):
        return super().forward(x, "module")


@pytest.mark.parametrize("of", ["the model", "DDP"])
def test_names_are_those_of_the_model(of):
    torch.manual_seed(0)
    model = DistributedDataParallel(Inside())
    given = {"named_parameters": model.named_parameters()} if of == "DDP" else {}
    state = sparse.register(model, sparse.TopK(density=0.1), **given)
    model(batch(0)).sum().backward()
    names = {name for name, _ in model.module.named_parameters()}
    assert "module.weight" in names
    assert set(residuals(state)) == names


def test_names_that_end_alike_are_of_several_parameters():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(8, 8, bias=False)
            self.weight = nn.Parameter(torch.ones(8, 8))

        def forward(self, x):
            return self.module(x @ self.weight)

    torch.manual_seed(0)
    model = DistributedDataParallel(Both())
    state = sparse.register(model, sparse.TopK(density=0.1), dense=sparse.Never())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(torch.full((2, 8), RANKS.rank + 1.0)).sum().backward()
    optimizer.step()
    assert set(residuals(state)) == {"module.weight", "weight"}
    assert agree(model)


def test_names_that_are_not_unique_are_refused():
    pairs = [("a", torch.zeros(1)), ("a", torch.zeros(1))]
    with pytest.raises(ValueError, match=r"must have unique names, a is twice$"):
        sparse.SparseState(sparse.TopK(density=0.1), named_parameters=pairs)


class Kinds(nn.Module):
    """Of a dtype each, or sparse: in its first step, DDP has a bucket for each kind."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Embedding(30, 4, sparse=kind == "sparse")
        self.out = nn.Linear(4, 3)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        if kind == "dtypes":
            self.out.double()

    def forward(self, words):
        rows = self.rows(words)
        return self.out(rows.to(self.out.weight.dtype))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", ["dtypes", "sparse"])
def test_parameters_of_several_kinds(kind, static):
    model = DistributedDataParallel(Kinds(kind), static_graph=static)
    state = sparse.register(model, sparse.TopK(density=0.1), dense=sparse.Never())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + RANKS.rank)
        optimizer.zero_grad()
        model(torch.randint(30, (5,), generator=generator)).square().sum().backward()
        optimizer.step()
    assert state.traffic.steps == 4
    assert agree(model)


def test_an_overflow_in_rows_alone_loses_nothing():
    model = DistributedDataParallel(Kinds("sparse"))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    state = sparse.register(
        model, sparse.TopK(density=0.2), dense=sparse.Never(), scaler=scaler
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    words = torch.arange(5)

    def step(factor):
        optimizer.zero_grad()
        loss = (model(words) * 2).sum() + model.module.rows(words).sum() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    def unscaled():
        [own] = state.state_dict().values()
        return own["tensors"]["out.weight"]["residual"] / own["loss_scale"]

    step(1.0)
    before = unscaled()
    weights_before = weights(model)
    step(float("inf") if RANKS.rank == LAST else 1.0)
    np.testing.assert_array_equal(weights(model), weights_before)
    gradient = model.module.rows(words).detach().sum(0).expand(3, 4) * 2
    np.testing.assert_allclose(unscaled(), before + gradient, 1e-5, 1e-6)


def test_a_copy_for_averages_of_weights_needs_no_ranks():
    model = model_of()
    scaler = torch.amp.GradScaler("cpu")
    sparse.register(model, sparse.TopK(density=0.1), scaler=scaler)
    train(model, 1)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    train(model, 1, first=1)
    assert agree(model)


@several
def test_a_wrong_state_on_one_rank_is_told_to_all():
    model = model_of()
    state = sparse.SparseState(sparse.TopK(density=0.1))
    model.register_comm_hook(state, sparse.sparse_hook)
    if RANKS.rank == LAST:
        state.load_state_dict({"rank 17": {}})
    kind = ValueError if RANKS.rank == LAST else ExchangeError
    with pytest.raises(
        kind, match=rf"state must be that of rank {LAST} in DDP, got ra"
    ):
        train(model, 1)


def test_a_restart_continues_bitwise():
    def made():
        model = model_of()
        options = {"start_iter": 2, "dense": sparse.Never()}
        return model, sparse.register(model, sparse.TopK(density=0.05), **options)

    model, state = made()
    train(model, 6)
    saved = copy.deepcopy((model.module.state_dict(), state.state_dict()))
    train(model, 6, first=6)
    for pickled in (False, True):
        other = model_of()
        other.module.load_state_dict(saved[0])
        if pickled:
            whole = pickle.loads(pickle.dumps(state))
            whole.load_state_dict(saved[1])
            other.register_comm_hook(whole, sparse.sparse_hook)
        else:
            again = sparse.register(
                other, sparse.TopK(density=0.05), start_iter=2, dense=sparse.Never()
            )
            again.load_state_dict(saved[1])
        train(other, 6, first=6)
        np.testing.assert_array_equal(weights(other), weights(model))


@several
def test_a_state_of_another_rank_is_refused():
    model = model_of()
    state = sparse.register(model, sparse.TopK(density=0.05))
    train(model, 1)
    others = RANKS.allgather(state.state_dict())[(RANKS.rank + 1) % RANKS.size]
    with pytest.raises(ValueError, match=rf"must be that of rank {RANKS.rank} in DDP"):
        state.load_state_dict(others)


def test_ranks_with_more_batches_than_others_go_on():
    model = model_of()
    sparse.register(model, sparse.TopK(density=0.05))
    with warnings.catch_warnings(), model.join():
        train(model, 3 + RANKS.rank)
    assert agree(model)


def test_rows_of_an_embedding_are_averaged_as_ever():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Embedding(50, 4, sparse=True)
            self.out = nn.Linear(4, 3)

        def forward(self, words):
            return self.out(self.rows(words))

    def made():
        torch.manual_seed(0)
        return DistributedDataParallel(Words())

    ours, theirs = made(), made()
    sparse.register(ours, sparse.TopK(density=1.0), dense=sparse.Never())
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(5):
            generator = torch.Generator().manual_seed(100 * step + RANKS.rank)
            optimizer.zero_grad()
            words = torch.randint(50, (6,), generator=generator)
            model(words).square().sum().backward()
            optimizer.step()
    assert agree(ours)
    np.testing.assert_allclose(weights(ours), weights(theirs), 1e-5, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model = model_of(dtype=dtype)
    state = sparse.register(model, sparse.TopK(density=0.05))
    assert agree(train(model, 5, lr=0.001))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    kept = [residual for residual in residuals(state).values() if residual is not None]
    assert kept
    assert {residual.dtype for residual in kept} == {wide}


def test_an_overflow_on_one_rank_is_skipped_by_all_and_loses_nothing():
    model = DistributedDataParallel(Scaled(), bucket_cap_mb=0.0001)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    state = sparse.register(
        model,
        sparse.TopK(density=0.1),
        op=sparse.Sum,
        dense=sparse.Never(),
        scaler=scaler,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    counted = []
    for step in range(6):
        optimizer.zero_grad()
        factors = factors_of(step)
        if step == 3 and RANKS.rank == LAST:
            factors[1][2] = float("inf")
        else:
            counted.append(step)
        scaler.scale(model(factors)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert len(set(RANKS.allgather(scaler.get_scale()))) == 1
    assert scaler.get_scale() == 2.0
    [own] = state.state_dict().values()
    left = [own["tensors"][f"parts.{i}"]["residual"].numpy() / 2.0 for i in (0, 2)]
    for i, rest in zip((0, 2), left, strict=True):
        total = sum(factors_of(s)[i] for s in range(6)).numpy()
        applied = model.module.parts[i].detach().numpy()
        expected, found = RANKS.allreduce(total), RANKS.allreduce(rest) - applied
        np.testing.assert_array_equal(found, expected)
    assert agree(model)


def test_activation_checkpoints():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()
            del self.net.sometimes

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    torch.manual_seed(0)
    model = DistributedDataParallel(Checkpointed(), bucket_cap_mb=0.002)
    sparse.register(model, sparse.TopK(density=0.05))
    plain = model_of()
    sparse.register(plain, sparse.TopK(density=0.05))
    for each in (model, plain):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05)
        for step in range(4):
            optimizer.zero_grad()
            each(batch(step)).square().mean().backward()
            optimizer.step()
    np.testing.assert_array_equal(weights(model), weights(plain))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_models(backend):
    if backend == "inductor" and RANKS.size != 2:
        pytest.skip("on 2 ranks: a minute of compiling")
    model, plain = (model_of({"bucket_cap_mb": 25}) for _ in range(2))
    for each in (model, plain):
        sparse.register(each, sparse.TopK(density=0.05))
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(4):
        optimizer.zero_grad()
        compiled(batch(step)).square().mean().backward()
        optimizer.step()
    train(plain, 4)
    assert agree(model)
    if backend == "eager":  # inductor's own kernels round otherwise
        np.testing.assert_array_equal(weights(model), weights(plain))


def test_ranks_of_a_part_exchange_among_themselves():
    groups = [dist.new_group([0]), dist.new_group([*range(1, RANKS.size)] or [0])]
    group = groups[min(RANKS.rank, 1)]
    torch.manual_seed(0)
    net = Net()
    del net.sometimes
    model = DistributedDataParallel(net, process_group=group)
    sparse.register(model, sparse.TopK(density=0.05))
    train(model, 3)
    found = RANKS.allgather(weights(model).tobytes())
    assert len(set(found[1:])) <= 1
    if RANKS.size > 1:
        assert found[0] != found[1]


# --------------------------------------------------------------------------- errors


def test_what_is_no_ddp_is_refused():
    with pytest.raises(
        TypeError, match=r"^model must be a DistributedDataParallel, got"
    ):
        sparse.register(Net(), sparse.TopK(density=0.1))


def test_a_second_hook_is_refused():
    model = model_of()
    sparse.register(model, sparse.TopK(density=0.1))
    with pytest.raises(ValueError, match="has a communication hook already"):
        sparse.register(model, sparse.TopK(density=0.1))


def test_a_negative_number_of_dense_steps_is_refused():
    with pytest.raises(ValueError, match=r"^start_iter must be at least 0, got -1$"):
        sparse.SparseState(sparse.TopK(density=0.1), start_iter=-1)


@several
def test_ranks_that_differ_in_configuration_are_told_so():
    model = model_of()
    density = 0.05 if RANKS.rank else 0.1
    sparse.register(model, sparse.TopK(density=density), dense=sparse.Never())
    with pytest.raises(ExchangeError, match=r"TopK\(density=0\.1\)"):
        train(model, 1)


class Raising(sparse.TopK):
    """Raises in the third step, on the last rank, in the middle bucket."""

    calls = 0

    def select(self, residual, gradient, k, step):
        if step == 2 and gradient.size == 7 and RANKS.rank == LAST:
            raise ZeroDivisionError("in a sparsifier of one's own")
        return super().select(residual, gradient, k, step)


@several
def test_a_rank_that_raises_is_heard_by_all_and_nothing_is_lost():
    model, state = scaled(Raising(density=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    own = RANKS.rank == LAST
    kind = ZeroDivisionError if own else ExchangeError
    told = "in a sparsifier" if own else f"rank {LAST} raised ZeroDivisionError"
    for step in range(3):
        optimizer.zero_grad()
        if step < 2:
            model(factors_of(step)).backward()
            optimizer.step()
            continue
        with pytest.raises(kind, match=told):
            model(factors_of(step)).backward()
    same(everything(model, state), given_so_far(range(3)))
