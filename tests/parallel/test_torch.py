"""The PyTorch door over real MPI; every test holds at any number of ranks."""

import copy
import pickle

import numpy as np
import pytest
import torch
from counting import counted
from doors import LOW_DENSITIES, SPARSIFIERS, TORCH_OPTIMIZERS, Interrupted
from laws import same_bits
from mpi4py import MPI
from torch import nn

import hvd_sparse.torch as sparse
from hvd_sparse import (
    ExchangeError,
    Never,
    RandomK,
    SignTopK,
    Sum,
    TopK,
)
from hvd_sparse.mpi import SparseAllreduce

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.Get_rank(), COMM.Get_size()

several = pytest.mark.skipif(SIZE == 1, reason="needs mpirun -np 2 or more")


@pytest.fixture(autouse=True)
def alike():
    """The same model on every rank; data come from rank-seeded generators."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


def perceptron(dtype=torch.float32):
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3)).to(dtype)


def batch(step, dtype=torch.float32, rank=RANK):
    rng = np.random.default_rng([rank, step])
    x = torch.from_numpy(rng.standard_normal((16, 6))).to(dtype)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long()


def loss_of(model, step, dtype=torch.float32, rank=RANK):
    x, y = batch(step, dtype, rank)
    return nn.functional.cross_entropy(model(x).float(), y)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)


def distribute(optimizer, model, sparsifier=None, **options):
    return sparse.DistributedOptimizer(
        optimizer,
        sparsifier or TopK(density=0.05),
        named_parameters=model.named_parameters(),
        **{"comm": COMM, "dense": Never(), "timeout_s": 20, **options},
    )


def train(model, optimizer, steps, dtype=torch.float32):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, dtype).backward()
        optimizer.step()


def bits(model) -> bytes:
    tensors = [p.detach().reshape(-1).view(torch.uint8) for p in model.parameters()]
    return torch.cat(tensors).numpy().tobytes()


def replicas_agree(model) -> bool:
    return len(set(COMM.allgather(bits(model)))) == 1


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsifier", SPARSIFIERS, ids=repr)
def test_replicas_agree_bitwise(sparsifier, dtype):
    model = perceptron(dtype)
    optimizer = distribute(sgd(model), model, sparsifier)
    train(model, optimizer, range(4), dtype)
    assert replicas_agree(model)
    assert {t.route for t in optimizer.traffic.tensors.values()} == {"sparse"}
    optimizer.close()


@pytest.mark.ranks
def test_values_choose_how_they_travel():
    trained = []
    for sparsifier, values in ((TopK(0.05), sparse.Sign()), (SignTopK(0.05), None)):
        torch.manual_seed(0)
        model = perceptron()
        optimizer = distribute(sgd(model), model, sparsifier, values=values)
        train(model, optimizer, range(4))
        trained.append((bits(model), optimizer.traffic.sent_bytes))
        optimizer.close()
    assert trained[0] == trained[1]


@pytest.mark.ranks
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsifier", SPARSIFIERS, ids=repr)
def test_gradients_on_an_accelerator_get_the_bits_of_the_hosts(sparsifier, dtype):
    accelerator = torch.accelerator.current_accelerator()
    here, there = perceptron(dtype), perceptron(dtype).to(accelerator)
    optimizers = [distribute(sgd(model), model, sparsifier) for model in (here, there)]
    for step in range(4):
        here.zero_grad()
        loss_of(here, step, dtype).backward()
        for ours, theirs in zip(here.parameters(), there.parameters(), strict=True):
            theirs.grad = ours.grad.to(accelerator)
        for optimizer in optimizers:
            optimizer.synchronize()
        for ours, theirs in zip(here.parameters(), there.parameters(), strict=True):
            assert theirs.grad.device.type == accelerator.type
            same_bits(theirs.grad, ours.grad)
    for optimizer in optimizers:
        optimizer.close()


@pytest.mark.ranks
def test_density_one_is_dense_training():
    ours, theirs = perceptron(), perceptron()
    theirs.load_state_dict(ours.state_dict())
    optimizer = distribute(sgd(ours), ours, TopK(1.0))
    plain = sgd(theirs)
    train(ours, optimizer, range(5))
    for step in range(5):
        totals = [torch.zeros_like(p) for p in theirs.parameters()]
        for rank in range(SIZE):  # in rank order
            plain.zero_grad()
            loss_of(theirs, step, rank=rank).backward()
            for total, parameter in zip(totals, theirs.parameters(), strict=True):
                total += parameter.grad
        for total, parameter in zip(totals, theirs.parameters(), strict=True):
            parameter.grad = total * torch.tensor(1 / SIZE)
        plain.step()
    assert bits(ours) == bits(theirs)
    optimizer.close()


def test_it_stays_an_optimizer_of_its_class():
    model = perceptron()
    plain = sgd(model)
    optimizer = distribute(plain, model)
    assert optimizer is plain
    assert isinstance(optimizer, torch.optim.SGD)
    assert type(optimizer).__name__ == "SGD"
    train(model, optimizer, range(2))
    fresh = sgd(perceptron())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert fresh.state_dict().keys() == optimizer.state_dict().keys()
    optimizer.close()


@pytest.mark.parametrize("first", ["scheduler", "door"])
def test_learning_rate_schedulers_work_made_before_or_after(first):
    model = perceptron()
    optimizer = sgd(model)
    if first == "door":
        optimizer = distribute(optimizer, model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    if first == "scheduler":
        optimizer = distribute(optimizer, model)
    for step in range(4):
        train(model, optimizer, [step])
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    assert optimizer.traffic.steps == 4
    assert replicas_agree(model)
    optimizer.close()


def test_step_hooks_run_once():
    model = perceptron()
    optimizer = distribute(sgd(model), model)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(model, optimizer, [0])
    assert calls == ["pre", "post"]
    optimizer.close()


@pytest.mark.ranks
def test_every_call_of_a_closure_is_exchanged_and_its_loss_averaged():
    model = perceptron(torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    optimizer = distribute(optimizer, model, TopK(1.0))
    calls = 0
    own = []

    def closure():
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = loss_of(model, 0, torch.float64)
        own.append(loss.item())
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert optimizer.traffic.steps == calls
    assert losses[0] == pytest.approx(np.mean(COMM.allgather(own[0])))
    assert losses[-1] < losses[0]
    assert len(set(COMM.allgather(calls))) == 1
    assert replicas_agree(model)
    optimizer.close()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_takes_its_argument(set_to_none):
    model = perceptron()
    optimizer = distribute(sgd(model), model)
    train(model, optimizer, [0])
    optimizer.zero_grad(set_to_none=set_to_none)
    gradients = [p.grad for p in model.parameters()]
    assert all((g is None) == set_to_none for g in gradients)
    train(model, optimizer, [1])
    assert replicas_agree(model)
    optimizer.close()


@pytest.mark.ranks
def test_gradients_can_be_clipped_between_synchronize_and_step():
    model = perceptron()
    optimizer = distribute(sgd(model), model)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        norm = torch.cat([p.grad.view(-1) for p in model.parameters()]).norm()
        assert norm <= 1.001e-3
        with optimizer.skip_synchronize():
            optimizer.step()
    assert optimizer.traffic.steps == 3
    assert replicas_agree(model)
    optimizer.close()


def test_step_after_synchronize_does_not_exchange_twice():
    model = perceptron()
    optimizer = distribute(sgd(model), model)
    loss_of(model, 0).backward()
    optimizer.synchronize()
    with pytest.warns(UserWarning, match="skip_synchronize"):
        optimizer.step()
    assert optimizer.traffic.steps == 1
    optimizer.close()


def test_parameter_groups_keep_their_options():
    model = perceptron()
    groups = [
        {"params": model[0].parameters(), "lr": 0.0},
        {"params": model[2].parameters()},
    ]
    optimizer = distribute(torch.optim.SGD(groups, lr=0.1), model)
    before = bits(model[0]), bits(model[2])
    train(model, optimizer, [0])
    assert bits(model[0]) == before[0]
    assert bits(model[2]) != before[1]
    optimizer.close()


@pytest.mark.ranks
def test_frozen_parameters_take_no_part_and_may_thaw():
    model = perceptron()
    model[0].weight.requires_grad = False
    optimizer = distribute(sgd(model), model)
    before = model[0].weight.clone()
    train(model, optimizer, [0])
    assert torch.equal(model[0].weight, before)
    assert "0.weight" not in optimizer.traffic.tensors
    model[0].weight.requires_grad = True
    train(model, optimizer, [1, 2])
    assert not torch.equal(model[0].weight, before)
    assert replicas_agree(model)
    optimizer.close()


class TwoHeads(nn.Module):
    """Uses one head, the other, or both, in either order."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))

    def forward(self, x, order):
        return sum(self.heads[i](x) * (place + 1) for place, i in enumerate(order))


@pytest.mark.ranks
def test_ranks_may_use_different_parameters_in_different_order():
    model = TwoHeads()
    optimizer = distribute(sgd(model), model)
    for step in range(4):
        optimizer.zero_grad()
        x, y = batch(step)
        order = [[0, 1], [1, 0], [1], [0]][(RANK + step) % 4]  # head 2: never used
        nn.functional.cross_entropy(model(x, order), y).backward()
        optimizer.step()
        assert replicas_agree(model)
    optimizer.close()


@pytest.mark.ranks
def test_sparse_embedding_gradients_stay_sparse_and_exact():
    embedding = nn.Embedding(50, 4, sparse=True)
    optimizer = distribute(torch.optim.SparseAdam(embedding.parameters()), embedding)
    used = torch.tensor([RANK, 7, 7])
    embedding(used).sum().backward()
    optimizer.step()
    gradient = embedding.weight.grad
    assert gradient.is_sparse
    expected = torch.zeros(50, 4)
    for rank in range(SIZE):
        expected[rank] += 1 / SIZE
        expected[7] += 2 / SIZE
    torch.testing.assert_close(gradient.to_dense(), expected)
    assert replicas_agree(embedding)
    optimizer.close()


@pytest.mark.ranks
def test_gradients_of_several_backward_passes_add_up():
    model, twin = perceptron(torch.float64), perceptron(torch.float64)
    twin.load_state_dict(model.state_dict())
    optimizer = distribute(
        sgd(model), model, TopK(1.0), op=Sum, backward_passes_per_step=3
    )
    for step in range(3):
        loss_of(model, step, torch.float64).backward()
    optimizer.step()
    for rank in range(SIZE):
        for step in range(3):
            loss_of(twin, step, torch.float64, rank).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert optimizer.traffic.steps == 1
    optimizer.close()


@pytest.mark.ranks
def test_gradients_that_are_not_contiguous_are_handed_back_in_place():
    model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    optimizer = distribute(sgd(model), model)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    model(x).sum().backward()
    layout = model.weight.grad.stride()
    optimizer.step()
    assert model.weight.grad.stride() == layout
    assert int((model.weight.grad != 0).sum()) <= 11 * SIZE
    assert replicas_agree(model)
    optimizer.close()


@pytest.mark.ranks
def test_a_nan_on_one_rank_is_seen_by_all_and_forgotten():
    model = perceptron()
    optimizer = distribute(torch.optim.SGD(model.parameters(), lr=0.0), model)
    loss_of(model, 0).backward()
    if RANK == SIZE - 1:
        model[0].bias.grad[3] = float("nan")
    optimizer.step()
    assert model[0].bias.grad.isnan().all()
    assert model[2].bias.grad.isfinite().all()
    with torch.no_grad():
        model[0].bias.zero_()  # lr 0 times nan is nan
    train(model, optimizer, [1])
    assert model[0].bias.grad.isfinite().all()
    optimizer.close()


# --------------------------------------------------------------------------- state


@pytest.mark.ranks
@pytest.mark.parametrize("sparsifier", [TopK(0.05), RandomK(0.1)], ids=repr)
def test_a_restart_continues_bitwise(sparsifier, tmp_path):
    model = perceptron()
    optimizer = distribute(sgd(model), model, sparsifier)
    train(model, optimizer, range(3))
    path = sparse.checkpoint_path(tmp_path / "run", RANK, SIZE)
    state = [model.state_dict(), optimizer.state_dict()]
    torch.save([*state, optimizer.residual_state_dict()], path)
    train(model, optimizer, range(3, 6))
    expected = bits(model)
    optimizer.close()

    model = perceptron()
    optimizer = distribute(sgd(model), model, sparsifier)
    weights, momentum, residuals = torch.load(path)
    model.load_state_dict(weights)
    optimizer.load_state_dict(momentum)
    optimizer.load_residual_state_dict(residuals)
    train(model, optimizer, range(3, 6))
    assert bits(model) == expected
    optimizer.close()


def test_residuals_of_another_model_are_refused_by_name():
    model, other = perceptron(), nn.Sequential(nn.Linear(6, 31), nn.Linear(31, 3))
    optimizer = distribute(sgd(model), model)
    train(model, optimizer, [0])
    state = optimizer.residual_state_dict()
    stranger = distribute(sgd(other), other)
    with pytest.raises(ValueError, match=r"0\.bias: state has shape \(32,\), expected"):
        stranger.load_residual_state_dict(state)
    with pytest.raises(ValueError, match=f"size {SIZE + 1}, expected {SIZE}"):
        optimizer.load_residual_state_dict({**state, "size": SIZE + 1})
    optimizer.close()
    stranger.close()


class Elsewhere(torch.Tensor):
    """As on an accelerator: numpy has no view of it until it is brought to the host."""

    def __array__(self, *arguments):
        raise TypeError("can't convert it to numpy; use Tensor.cpu()")

    def cpu(self):
        return self.as_subclass(torch.Tensor).cpu()


def there(kind, tensor):
    if kind == "stand-in":
        return tensor.as_subclass(Elsewhere)
    return tensor.to(torch.accelerator.current_accelerator())


@pytest.mark.parametrize("saved_on", ["accelerator", "stand-in"])
def test_residuals_saved_on_an_accelerator_load_on_the_host(saved_on):
    if saved_on == "accelerator" and not torch.accelerator.is_available():
        pytest.skip("no accelerator")
    model = perceptron()
    optimizer = distribute(sgd(model), model)
    train(model, optimizer, [0])
    state, weights = optimizer.residual_state_dict(), copy.deepcopy(model.state_dict())
    momentum = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, [1])
    expected = bits(model)
    for saved in state["tensors"].values():
        saved["residual"] = there(saved_on, saved["residual"])
    model.load_state_dict(weights)
    optimizer.load_state_dict(momentum)
    optimizer.load_residual_state_dict(state)
    train(model, optimizer, [1])
    assert bits(model) == expected
    optimizer.close()


@pytest.mark.ranks
def test_residuals_are_saved_and_loaded_between_synchronize_and_step():
    model = perceptron()
    optimizer = distribute(sgd(model), model)
    train(model, optimizer, [0])
    loss_of(model, 1).backward()
    optimizer.synchronize()
    state = optimizer.residual_state_dict()
    optimizer.load_residual_state_dict(state)
    with optimizer.skip_synchronize():
        optimizer.step()
    after = optimizer.residual_state_dict()
    assert after["step"] == state["step"] == 2
    for name, saved in state["tensors"].items():
        assert torch.equal(after["tensors"][name]["residual"], saved["residual"])
    train(model, optimizer, [2])
    assert replicas_agree(model)
    optimizer.close()


# -------------------------------------------------------------------------- bad use


@pytest.mark.ranks
@several
def test_ranks_that_train_different_models_hear_of_it():
    model = nn.Linear(4, 5 if RANK == SIZE - 1 else 4)
    optimizer = distribute(sgd(model), model)
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(ExchangeError, match=r"bias: rank \d has shape"):
        optimizer.step()
    optimizer.close()


def test_bad_use_is_refused_by_name():
    model = perceptron()
    names = list(model.named_parameters())

    def make(optimizer=None, named=names, **options):
        optimizer = optimizer or sgd(model)
        return sparse.DistributedOptimizer(
            optimizer, TopK(), named_parameters=named, comm=COMM, **options
        )

    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got Seq"):
        make(model)
    with pytest.raises(ValueError, match=r"'0\.weight' comes twice"):
        make(named=[names[0], names[0], *names[1:]])
    with pytest.raises(
        ValueError, match=r"group0\.parameter0 of shape \(32, 6\) has no"
    ):
        make(named=names[1:])
    with pytest.raises(ValueError, match="backward_passes_per_step must be at least 1"):
        make(backward_passes_per_step=0)
    once = make()
    with pytest.raises(TypeError, match="distributed already"):
        make(once)
    with pytest.raises(ValueError, match=r"group1\.parameter0 of shape \(2,\) has no"):
        once.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    once.close()


def test_names_are_made_where_none_are_given():
    model = perceptron()
    optimizer = sparse.DistributedOptimizer(sgd(model), TopK(0.05), comm=COMM)
    train(model, optimizer, [0])
    assert "group0.parameter3" in optimizer.traffic.tensors
    optimizer.close()


# ----------------------------------------------------------------- less usual habits


@pytest.mark.ranks
@pytest.mark.parametrize("users", ["one rank", "no rank"])
def test_a_sparse_embedding_may_be_unused(users):
    model = nn.ModuleList([nn.Embedding(50, 4, sparse=True), nn.Linear(4, 1)])
    optimizer = distribute(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for _ in range(2):
        optimizer.zero_grad()
        model[1](torch.ones(1, 4)).sum().backward()
        if users == "one rank" and RANK == 0:
            model[0](torch.tensor([3])).sum().backward()
        optimizer.step()
        gradient = model[0].weight.grad
        assert gradient is None if users == "no rank" else gradient.is_sparse
        assert replicas_agree(model)
    assert optimizer.traffic.steps == 2
    optimizer.close()


@pytest.mark.ranks
def test_sparse_embedding_gradients_are_counted():
    embedding = nn.Embedding(5000, 4, sparse=True)
    optimizer = distribute(torch.optim.SGD(embedding.parameters(), lr=0.1), embedding)
    embedding(torch.tensor([3, 4])).sum().backward()
    optimizer.step()
    tensor = optimizer.traffic.tensors["weight"]
    assert tensor.route == "rows"
    assert tensor.dense_bytes == 4 * 20_000
    assert tensor.sent_bytes == 8 + 2 * 8 + 8 * 4
    optimizer.close()


@pytest.mark.ranks
@several
def test_sparse_embeddings_of_different_shapes_are_an_error_on_every_rank():
    embedding = nn.Embedding(50, 5 if RANK == SIZE - 1 else 4, sparse=True)
    optimizer = distribute(torch.optim.SGD(embedding.parameters(), lr=0.1), embedding)
    embedding(torch.tensor([3])).sum().backward()
    with pytest.raises(ExchangeError, match=r"weight: rank \d has shape \(50, "):
        optimizer.step()
    optimizer.close()


@pytest.mark.ranks
def test_a_backward_pass_after_synchronize_is_exchanged_again():
    model = perceptron()
    optimizer = distribute(sgd(model), model)
    loss_of(model, 0).backward()
    optimizer.synchronize()  # and the user drops this step
    model.zero_grad()
    loss_of(model, 1).backward()
    with pytest.warns(UserWarning, match="no step used its results"):
        optimizer.step()
    assert optimizer.traffic.steps == 2
    assert replicas_agree(model)
    optimizer.close()


def test_skip_synchronize_without_synchronize_is_refused():
    model = perceptron()
    optimizer = distribute(sgd(model), model)
    loss_of(model, 0).backward()
    with optimizer.skip_synchronize(), pytest.raises(RuntimeError, match="needs sync"):
        optimizer.step()
    optimizer.close()


@pytest.mark.ranks
@pytest.mark.parametrize("users", ["all ranks", "one rank"])
def test_parameters_frozen_after_backward_still_agree(users):
    model = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])
    optimizer = distribute(sgd(model), model)
    for step in range(3):
        optimizer.zero_grad()
        model.requires_grad_(True)
        x, _ = batch(step)
        output = model[1](x).sum()
        if users == "all ranks" or RANK == 0:
            output = output + model[0](x).square().sum()
        output.backward()
        model[0].weight.requires_grad_(False)
        optimizer.step()
        assert replicas_agree(model)
    assert optimizer.traffic.tensors["0.weight"].dense_bytes == 3 * 4 * 18
    assert optimizer.traffic.steps == 3
    optimizer.close()


def test_parameters_that_stay_frozen_keep_no_gradient():
    model = perceptron()
    optimizer = distribute(sgd(model), model)
    train(model, optimizer, [0])
    optimizer.zero_grad()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    train(model, optimizer, [1, 2])
    assert model[0].weight.grad is None
    assert torch.equal(model[0].weight, before)
    optimizer.close()


def test_a_parameter_that_is_never_used_costs_no_exchange():
    model, comm = TwoHeads(), counted(COMM)
    optimizer = distribute(sgd(model), model, comm=comm)
    for step in range(5):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x, [0, 1]), y).backward()
        optimizer.step()
    assert optimizer.traffic.steps == 5
    assert comm.calls["Iallgather"] == 6  # the first step learned the kinds
    assert model.heads[2].weight.grad is None
    optimizer.close()


@pytest.mark.ranks
@pytest.mark.parametrize("first", ["rows", "dense"])
def test_a_gradient_may_be_sparse_in_one_step_and_dense_in_the_next(first):
    embedding = nn.Embedding(50, 4, sparse=first == "rows")
    optimizer = distribute(torch.optim.SGD(embedding.parameters(), lr=0.1), embedding)
    for _ in range(3):
        optimizer.zero_grad()
        embedding(torch.tensor([RANK, 7])).sum().backward()
        optimizer.step()
        assert embedding.weight.grad.is_sparse == (first == "rows")
        assert replicas_agree(embedding)
        embedding.sparse = not embedding.sparse
    optimizer.close()


@pytest.mark.ranks
def test_a_gradient_may_be_sparse_on_one_rank_and_dense_on_another():
    embedding = nn.Embedding(50, 4, sparse=RANK == 0)
    optimizer = distribute(torch.optim.SGD(embedding.parameters(), lr=0.1), embedding)
    for _ in range(3):
        optimizer.zero_grad()
        embedding(torch.tensor([RANK, 7])).sum().backward()
        optimizer.step()
        assert embedding.weight.grad.is_sparse  # rank 0 came first
        assert replicas_agree(embedding)
    optimizer.close()


@pytest.mark.ranks
@several
def test_an_error_on_the_way_into_the_exchange_is_heard_by_all():
    model = perceptron()
    optimizer = distribute(sgd(model), model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return "no number" if RANK == SIZE - 1 else loss

    error = ValueError if RANK == SIZE - 1 else ExchangeError
    said = "could not convert" if RANK == SIZE - 1 else f"rank {SIZE - 1} raised Value"
    with pytest.raises(error, match=said):
        optimizer.step(closure)
    train(model, optimizer, [1])  # and goes on
    assert replicas_agree(model)
    optimizer.close()


@pytest.mark.ranks
def test_loss_scaling_skips_a_step_on_all_ranks_or_on_none():
    model = perceptron()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = distribute(sgd(model), model, scaler=scaler)
    taken = []
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 2 and RANK == SIZE - 1:
            model[0].bias.grad[0] = float("inf")
        before = bits(model)
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        taken.append(bits(model) != before)
        assert replicas_agree(model)
    assert taken == [True, True, False, True]
    assert scaler.get_scale() == 512.0
    optimizer.close()


def test_closing_leaves_the_parameters_as_they_were(monkeypatch):
    register, hooked = torch.Tensor.register_post_accumulate_grad_hook, []

    def registered(parameter, hook):
        def noted(gradient_of):
            hooked.append(gradient_of)
            hook(gradient_of)

        return register(parameter, noted)

    monkeypatch.setattr(torch.Tensor, "register_post_accumulate_grad_hook", registered)
    model = perceptron()
    optimizer = distribute(sgd(model), model)
    train(model, optimizer, [0, 1])
    assert set(hooked) == set(model.parameters())
    optimizer.close()
    hooked.clear()
    loss_of(model, 2).backward()
    assert not hooked


def test_tensors_that_are_not_contiguous_take_the_accelerators_path():
    mine = torch.arange(1.0, 25.0).reshape(4, 6).t() * (RANK + 1)
    results = []
    for gradient in (mine, mine.contiguous().numpy()):
        out = torch.empty(4, 6).t() if gradient is mine else np.empty_like(gradient)
        with SparseAllreduce(TopK(0.2), comm=COMM, dense=Never()) as reduce:
            for _ in range(2):
                reduce.allreduce("w", gradient, out=out)
        results.append(np.asarray(out))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("route", ["strided", "rows"])
def test_what_is_unused_after_a_restart_is_still_part_of_the_state(route):
    def build():
        embedding = nn.Embedding(50, 4, sparse=route == "rows")
        model = nn.ModuleDict({"used": nn.Linear(4, 1), "unused": embedding})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, distribute(optimizer, model)

    def steps(model, optimizer, unused):
        optimizer.zero_grad()
        for rank_uses in unused:
            loss = model["used"](torch.ones(1, 4)).sum()
            if rank_uses:
                loss = loss + model["unused"](torch.tensor([RANK, 3])).square().sum()
            loss.backward()
            optimizer.step()

    model, optimizer = build()
    steps(model, optimizer, [True])
    for _ in range(2):
        saved = optimizer.residual_state_dict()
        weights = copy.deepcopy(model.state_dict())
        optimizer.close()
        model, optimizer = build()
        model.load_state_dict(weights)
        optimizer.load_residual_state_dict(saved)
        assert optimizer.residual_state_dict()["tensors"].keys() == (
            saved["tensors"].keys()
        )
        if RANK == 0:
            steps(model, optimizer, [False, True])
        else:
            steps(model, optimizer, [False, False])
        assert replicas_agree(model)
    optimizer.close()


def test_copies_and_pickles_are_of_the_plain_class_and_say_so():
    model = perceptron()
    optimizer = distribute(sgd(model), model)
    train(model, optimizer, [0])
    pickled = pickle.dumps(optimizer)
    for copying in (copy.copy, copy.deepcopy, lambda _: pickle.loads(pickled)):
        with pytest.warns(UserWarning, match="was distributed and is not any more"):
            copied = copying(optimizer)
        assert type(copied) is torch.optim.SGD
        assert (
            copied.state_dict()["param_groups"]
            == sgd(model).state_dict()["param_groups"]
        )
        copied.step()
    optimizer.close()


def test_residuals_can_be_rolled_back_to_the_start():
    model = perceptron()
    optimizer = distribute(sgd(model), model)
    start = optimizer.residual_state_dict()
    train(model, optimizer, [0])
    optimizer.load_residual_state_dict(start)
    assert optimizer.residual_state_dict()["step"] == 0
    train(model, optimizer, [1])
    assert replicas_agree(model)
    optimizer.close()


def test_a_rule_given_as_a_class_is_refused():
    model = perceptron()
    with pytest.raises(TypeError, match=r"dense must be WhenCheaper\(\) or Never\(\)"):
        distribute(sgd(model), model, dense=Never)


@pytest.mark.parametrize("density", LOW_DENSITIES)
@pytest.mark.parametrize(("kind", "options", "momentum"), TORCH_OPTIMIZERS)
def test_momentum_is_warned_of_once_by_the_first_rank(
    kind, options, momentum, density, advised
):
    model = perceptron()
    plain = getattr(torch.optim, kind)(model.parameters(), **options)
    optimizer = distribute(plain, model, TopK(density))
    train(model, optimizer, range(3))
    bad = momentum and LOW_DENSITIES[density] and RANK == 0
    assert advised() == [sparse.advise(optimizer, TopK(density))] * bad
    optimizer.close()


@pytest.mark.ranks
def test_a_closure_may_synchronize_by_itself():
    """To clip, say: its gradients are exchanged once, its loss is still the mean."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = sparse.DistributedOptimizer(
        torch.optim.SGD([weight], lr=1.0), TopK(1.0), comm=COMM, op=Sum, dense=Never()
    )

    def closure():
        optimizer.zero_grad()
        loss = (weight * torch.tensor([1.0, 2.0])).sum() + RANK
        loss.backward()
        optimizer.synchronize()
        return loss

    assert float(optimizer.step(closure)) == (SIZE - 1) / 2
    assert weight.tolist() == [-SIZE, -2 * SIZE]
    assert optimizer.traffic.steps == 1
    optimizer.close()


@pytest.mark.parametrize("density", [1.0, 0.01])
def test_a_bad_batch_that_is_thrown_away_leaves_no_trace(density):
    """Its norm is seen after the exchange, and all ranks leave the step out."""
    weight = nn.Parameter(torch.zeros(4000))
    optimizer = sparse.DistributedOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        TopK(density),
        comm=COMM,
        dense=Never(),
        undo=True,
    )
    good = torch.randn(4000, generator=torch.Generator().manual_seed(RANK))
    for step in range(20):
        optimizer.zero_grad()
        (weight * good * (1000 if step == 3 else 1)).sum().backward()
        optimizer.synchronize()
        if step == 3:
            optimizer.discard()
            continue
        with optimizer.skip_synchronize():
            optimizer.step()
    waits = optimizer.residual_state_dict()["tensors"]["group0.parameter0"]["residual"]
    total = sum(COMM.allgather(waits.numpy())) / SIZE - weight.detach().numpy()
    expected = 19 * sum(COMM.allgather(good.numpy())) / SIZE
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.ranks
@pytest.mark.parametrize("backward", [True, False])
def test_a_rank_that_throws_a_step_away_before_its_exchange_takes_part_in_it(backward):
    """It has seen its loss, or its batch, which its peers have not."""
    model = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(400))})
    weight = model["weight"]
    optimizer = distribute(torch.optim.SGD([weight], lr=1.0), model, undo=True)
    own = torch.randn(400, generator=torch.Generator().manual_seed(RANK))
    alone = RANK == SIZE - 1
    for step in range(4):
        before = optimizer.residual_state_dict()["tensors"]
        optimizer.zero_grad()
        bad = step == 2
        loss = (weight * own * (1e30 if bad else 1)).sum()
        if backward or not (bad and alone):
            loss.backward()
        if not bad:
            optimizer.step()
            continue
        if not (backward and alone):
            optimizer.synchronize()
            optimizer.zero_grad()  # which makes no other step of it
        optimizer.discard()
        with pytest.raises(RuntimeError, match=r"no step that discard\(\) could"):
            optimizer.discard()  # moves nothing that peers could take for a step
        for name, kept in optimizer.residual_state_dict()["tensors"].items():
            assert kept["residual"].equal(before[name]["residual"])
    assert weight.isfinite().all()
    assert weight.abs().max() < 100
    optimizer.close()


@pytest.mark.ranks
def test_a_closure_that_raises_is_heard_by_the_peers_at_once():
    weight = nn.Parameter(torch.zeros(40))
    model = nn.ParameterDict({"weight": weight})
    optimizer = distribute(torch.optim.SGD([weight], lr=1.0), model)

    def closure():
        optimizer.zero_grad()
        loss = weight.sum()
        loss.backward()
        if RANK == SIZE - 1:
            raise ZeroDivisionError("in the loss of this rank")
        return loss

    alone = RANK == SIZE - 1
    expected = ZeroDivisionError if alone else sparse.ExchangeError
    with pytest.raises(expected, match="in the loss of this rank"):
        optimizer.step(closure)
    train_one = (weight * 2).sum()
    optimizer.zero_grad()
    train_one.backward()
    optimizer.step()
    optimizer.close()


@pytest.mark.ranks
def test_a_parameter_may_have_the_name_of_a_loss():
    weight = nn.Parameter(torch.zeros(4))
    optimizer = sparse.DistributedOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        TopK(1.0),
        named_parameters=[("(loss)", weight)],
        comm=COMM,
        dense=Never(),
        timeout_s=20,
    )

    def closure():
        optimizer.zero_grad()
        loss = (weight * RANK).sum() + RANK
        loss.backward()
        return loss

    mean = (SIZE - 1) / 2
    losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert losses[0] == pytest.approx(mean)
    torch.testing.assert_close(weight.detach(), torch.full((4,), -3 * mean))
    optimizer.close()


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["added", "thawed"])
def test_a_parameter_that_joins_after_synchronize_is_refused(how):
    """Its gradient is this rank's alone."""
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(4)) for name in "ab"})
    one, other = model["a"], model["b"]
    other.requires_grad_(how == "added")
    held = [one] if how == "added" else [one, other]
    optimizer = distribute(torch.optim.SGD(held, lr=1.0), model)
    other_loss = other.sum() * (RANK + 1) if how == "added" else 0
    (one.sum() + other_loss).backward()
    optimizer.synchronize()
    if how == "added":
        optimizer.add_param_group({"params": [other]})
    else:
        other.requires_grad_(True)
        other.grad = torch.full((4,), RANK + 1.0)
    with (
        optimizer.skip_synchronize(),
        pytest.raises(ValueError, match=r"^b: joined the optimizer, or was thawed"),
    ):
        optimizer.step()
    assert not one.detach().any()
    optimizer.close()


@pytest.mark.ranks
def test_a_step_that_was_applied_can_not_be_thrown_away():
    """It would be in the weights, and in the residuals again."""
    model = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(40))})
    optimizer = torch.optim.SGD(model.values(), lr=1.0)
    optimizer = distribute(optimizer, model, undo=True)
    for _ in range(2):
        (model["weight"] * torch.arange(40.0)).sum().backward()
        optimizer.step()
        before = optimizer.residual_state_dict()["tensors"]["weight"]["residual"]
        with pytest.raises(RuntimeError, match=r"in place of step\(\)"):
            optimizer.discard()
        after = optimizer.residual_state_dict()["tensors"]["weight"]["residual"]
        assert torch.equal(before, after)
    (model["weight"] * torch.arange(40.0)).sum().backward()
    optimizer.discard()
    optimizer.close()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skipped_can_be_thrown_away(fused):
    """A fused optimizer's step is called all the same, and its kernel does nothing."""
    model = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(8))})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = torch.optim.Adam(model.values(), fused=fused)
    optimizer = distribute(optimizer, model, undo=True, scaler=scaler)
    factors = torch.tensor([float("inf"), *[1.0] * 7])
    scaler.scale((model["weight"] * factors).sum()).backward()
    optimizer.synchronize()
    scaler.unscale_(optimizer)
    with optimizer.skip_synchronize():
        scaler.step(optimizer)
    scaler.update()
    assert not model["weight"].any()
    optimizer.discard()
    optimizer.close()


class Failing(TopK):
    """On the last rank, in its second step."""

    def select(self, residual, gradient, k, step):
        if step == 1 and RANK == SIZE - 1:
            raise ZeroDivisionError
        return super().select(residual, gradient, k, step)


@pytest.mark.ranks
def test_a_step_that_failed_can_be_thrown_away():
    model = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(40))})
    weight = model["weight"]
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer = distribute(optimizer, model, Failing(0.1), undo=True)

    def residual():
        return optimizer.residual_state_dict()["tensors"]["weight"]["residual"]

    (weight * torch.arange(40.0)).sum().backward()
    optimizer.step()
    before = residual()
    (weight * torch.arange(40.0)).sum().backward()
    with pytest.raises((ZeroDivisionError, ExchangeError)):
        optimizer.step()
    assert not residual().equal(before)
    optimizer.discard()
    assert residual().equal(before)
    optimizer.close()


@pytest.mark.ranks
def test_ctrl_c_is_raised_when_the_exchange_is_complete(monkeypatch):
    monkeypatch.setattr(Interrupted, "calls", 0)
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(20)) for name in "abc"})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = distribute(optimizer, model, Interrupted(0.2))
    gradient = torch.arange(1.0, 21.0)
    for step in range(2):
        for parameter in model.values():
            parameter.grad = gradient.clone()
        if step:
            optimizer.step()
            continue
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        kept = optimizer.residual_state_dict()["tensors"]
        for name, parameter in model.items():
            assert not parameter.any()
            whole = parameter.grad + kept[name]["residual"]
            torch.testing.assert_close(whole, gradient)
    assert all(parameter.any() for parameter in model.values())


@pytest.mark.ranks
@several
def test_gradients_that_are_sparse_in_other_ways_are_an_error_on_every_rank():
    """One index a row, or one for each element: bytes of one can not be read as two."""
    weight = nn.Parameter(torch.zeros(6, 4))
    options = {"named_parameters": [("w", weight)], "comm": COMM, "timeout_s": 20}
    sgd_of = torch.optim.SGD([weight], lr=1.0)
    optimizer = sparse.DistributedOptimizer(sgd_of, TopK(0.25), **options)
    last = RANK == SIZE - 1
    weight.grad = torch.eye(6, 4).to_sparse(2 if last else 1)
    with pytest.raises(
        ExchangeError, match=r"w: rank \d+ has dtype .*sparse dimensions"
    ):
        optimizer.step()
    assert not weight.any()
    optimizer.close()


@pytest.mark.ranks
def test_the_gradient_of_a_thawed_parameter_can_be_thrown_away():
    """No hook has told of it yet; one rank synchronizes before, others do not."""
    first, second = (nn.Parameter(torch.zeros(40)) for _ in range(2))
    second.requires_grad_(False)
    optimizer = sparse.DistributedOptimizer(
        torch.optim.SGD([first, second], lr=1.0),
        TopK(0.25),
        named_parameters=[("first", first), ("second", second)],
        comm=COMM,
        dense=Never(),
        timeout_s=20,
        undo=True,
    )
    (first * torch.arange(1.0, 41.0)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    weights = first.detach().clone()
    before = optimizer.residual_state_dict()["tensors"]["first"]["residual"]
    first.requires_grad_(False)
    second.requires_grad_(True)
    (second * torch.arange(1.0, 41.0)).sum().backward()
    if RANK == SIZE - 1:
        optimizer.synchronize()
    optimizer.discard()
    after = optimizer.residual_state_dict()["tensors"]
    assert torch.equal(after["first"]["residual"], before)
    assert not after["second"]["residual"].any()
    assert torch.equal(first.detach(), weights)
    optimizer.close()


def test_an_optimizer_that_can_not_be_wrapped_is_what_it_was():
    weight = torch.zeros(4, requires_grad=True) * 1
    weight.retain_grad()  # no leaf, which differentiable optimizers take
    plain = torch.optim.SGD([weight], lr=1.0, differentiable=True)
    with pytest.raises(RuntimeError, match="non-leaf"):
        sparse.DistributedOptimizer(plain, TopK(0.5), comm=COMM)
    assert type(plain) is torch.optim.SGD
    plain.zero_grad()
    plain.step()


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["step", "synchronize"])
def test_a_step_may_be_compiled(how):
    """Not the exchange in it: the rest, and what a user has around it."""
    weight = nn.Parameter(torch.zeros(40))
    optimizer = sparse.DistributedOptimizer(
        torch.optim.SGD([weight], lr=1.0), TopK(1.0), comm=COMM, dense=Never()
    )

    @torch.compile(backend="eager")
    def step():
        if how == "synchronize":
            optimizer.synchronize()
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            optimizer.step()

    for _ in range(3):
        optimizer.zero_grad()
        (weight * (1.0 + RANK)).sum().backward()
        step()
    assert (weight == -3 * (SIZE + 1) / 2).all()
    optimizer.close()
