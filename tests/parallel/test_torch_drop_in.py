"""Optimizers of one's own, and habits that torch allows, distributed over MPI."""

import copy
import functools
import inspect
import io

import pytest
import torch
from counting import counted
from mpi4py import MPI
from torch import nn

import hvd_sparse.torch as sparse
from hvd_sparse import ExchangeError, Never, TopK

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.Get_rank(), COMM.Get_size()
LAST = SIZE - 1

several = pytest.mark.skipif(SIZE == 1, reason="needs mpirun -np 2 or more")


@pytest.fixture(autouse=True)
def alike():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def distribute(optimizer, named=None, density=1.0, comm=COMM):
    return sparse.DistributedOptimizer(
        optimizer,
        TopK(density),
        named_parameters=named,
        comm=comm,
        dense=Never(),
        timeout_s=30,
    )


def weight(value=0.0, n=8):
    return nn.Parameter(torch.full((n,), value))


def mean_rank_plus_one():
    return (SIZE + 1) / 2


def pull(*weights):
    """Loss whose gradient is rank + 1 everywhere; its mean is known."""
    return sum((RANK + 1) * w.sum() for w in weights)


def agree(*tensors) -> bool:
    own = b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)
    return len(set(COMM.allgather(own))) == 1


# ------------------------------------------------------------------ own optimizers


class ZeroWithoutArguments(torch.optim.SGD):
    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


class MoreOptions(torch.optim.SGD):
    def step(self, closure=None, lr_scale=1.0):
        for group in self.param_groups:
            group["lr"] *= lr_scale
        super().step(closure)
        for group in self.param_groups:
            group["lr"] /= lr_scale


class Required(torch.optim.SGD):
    def step(self, scale, closure=None):
        for group in self.param_groups:
            group["lr"] *= scale
        super().step(closure)
        for group in self.param_groups:
            group["lr"] /= scale

    @property
    def rate(self):
        return self.param_groups[0]["lr"]


class Delegating(torch.optim.SGD):
    """Finds unknown attributes elsewhere, and sets none of its own lightly."""

    def __init__(self, params, lr):
        self.__dict__["elsewhere"] = {"answer": 42}
        super().__init__(params, lr=lr)

    def __getattr__(self, name):
        try:
            return self.__dict__["elsewhere"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        if name.startswith("_sparse"):
            raise AttributeError(f"{name} is none of mine")
        super().__setattr__(name, value)


class Slotted(torch.optim.SGD):
    __slots__ = ("calls",)

    def step(self, closure=None):
        self.calls = getattr(self, "calls", 0) + 1
        return super().step(closure)


class Adding(torch.optim.SGD):
    """Has a rule of its own for groups, and makes two of one."""

    def add_param_group(self, param_group, halve=False):
        params = list(param_group["params"])
        if halve:
            super().add_param_group({**param_group, "params": params[:1]})
            params = params[1:]
        super().add_param_group({**param_group, "params": params})


OWN = [
    (ZeroWithoutArguments, lambda o: (o.zero_grad, o.step, 1.0)),
    (
        MoreOptions,
        lambda o: (o.zero_grad, functools.partial(o.step, lr_scale=0.5), 0.5),
    ),
    (MoreOptions, lambda o: (o.zero_grad, functools.partial(o.step, None, 0.5), 0.5)),
    (Required, lambda o: (o.zero_grad, functools.partial(o.step, 0.25), 0.25)),
    (Required, lambda o: (o.zero_grad, functools.partial(o.step, scale=0.25), 0.25)),
    (Delegating, lambda o: (o.zero_grad, o.step, 1.0)),
    (Slotted, lambda o: (o.zero_grad, o.step, 1.0)),
    (Adding, lambda o: (functools.partial(o.zero_grad, set_to_none=False), o.step, 1)),
]


@pytest.mark.ranks
@pytest.mark.parametrize(("kind", "calls"), OWN)
def test_optimizers_of_ones_own_keep_their_signatures(kind, calls):
    w = weight()
    optimizer = distribute(kind([w], lr=1.0), [("w", w)])
    zero_grad, step, scale = calls(optimizer)
    for _ in range(2):
        zero_grad()
        pull(w).backward()
        step()
    torch.testing.assert_close(
        w.detach(), torch.full((8,), -2 * scale * mean_rank_plus_one())
    )
    asked = inspect.signature(optimizer.step).parameters
    assert list(asked) == list(inspect.signature(kind.step).parameters)[1:]
    assert optimizer.traffic.steps == 2
    optimizer.close()


@pytest.mark.ranks
@pytest.mark.parametrize("given", ["by name", "by place"])
@pytest.mark.parametrize("kind", [MoreOptions, Required, torch.optim.SGD])
def test_closures_are_found_wherever_the_optimizer_has_them(kind, given):
    w = weight()
    optimizer = distribute(kind([w], lr=1.0), [("w", w)])

    def closure():
        optimizer.zero_grad()
        loss = pull(w)
        loss.backward()
        return loss

    first = (1.0,) if kind is Required else ()
    if given == "by name":
        optimizer.step(*first, closure=closure)
    else:
        optimizer.step(*first, closure)
    torch.testing.assert_close(w.detach(), torch.full((8,), -mean_rank_plus_one()))
    optimizer.close()


def test_properties_and_attributes_of_its_own_are_there():
    w = weight()
    required = distribute(Required([w], lr=0.5), [("w", w)])
    assert required.rate == 0.5
    delegating = distribute(Delegating([w], lr=0.5), [("w", w)])
    assert delegating.answer == 42
    with pytest.raises(AttributeError, match="nothing"):
        _ = delegating.nothing
    required.close()
    delegating.close()


# ------------------------------------------------------- parameters that come later


@pytest.mark.ranks
@pytest.mark.parametrize("named", ["all", "places"])
def test_parameter_groups_may_be_added_later(named):
    a, b, c = weight(), weight(), weight()
    names = [("a", a), ("b", b), ("c", c)] if named == "all" else None
    optimizer = distribute(torch.optim.SGD([a], lr=1.0), names)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    for held in ([a], [a, b], [a, b, c]):
        if held[-1] is not a:
            # as an iterator, and with options of its own
            optimizer.add_param_group({"params": iter(held[-1:]), "lr": 0.5})
        optimizer.zero_grad()
        pull(a, b, c).backward()
        optimizer.step()
        scheduler.step()
    mean = mean_rank_plus_one()
    assert [w[0].item() for w in (a, b, c)] == [-3 * mean, -mean, -0.5 * mean]
    expected = ["group0.parameter0", "group1.parameter0", "group2.parameter0"]
    assert sorted(optimizer.traffic.tensors) == (
        ["a", "b", "c"] if named == "all" else expected
    )
    state = optimizer.residual_state_dict()
    assert len(state["parameters"]) == 3
    optimizer.load_residual_state_dict(state)
    optimizer.close()


@pytest.mark.ranks
def test_an_added_group_without_a_name_is_refused_and_not_added():
    a, stranger = weight(), weight(n=3)
    optimizer = distribute(Adding([a], lr=1.0), [("a", a)])
    with pytest.raises(ValueError, match=r"group1\.parameter0 of shape \(3,\) has no"):
        optimizer.add_param_group({"params": [stranger]})
    with pytest.raises(ValueError, match="has no name"):
        optimizer.add_param_group({"params": [stranger, weight()]}, halve=True)
    assert len(optimizer.param_groups) == 1
    pull(a).backward()
    optimizer.step()
    assert agree(a)
    optimizer.close()


@pytest.mark.ranks
@several
def test_a_group_added_on_one_rank_is_an_error_on_all_that_names_it():
    a, late = weight(), weight()
    optimizer = distribute(torch.optim.SGD([a], lr=1.0), [("a", a), ("late", late)])
    pull(a).backward()
    optimizer.step()
    if RANK == LAST:
        optimizer.add_param_group({"params": [late]})
    for used in (False, True):
        pull(a, *([late] if used else [])).backward()
        with pytest.raises(ExchangeError, match=f"late: rank {LAST} has it, expected"):
            optimizer.step()
    if RANK != LAST:
        optimizer.add_param_group({"params": [late]})
    optimizer.step()  # and goes on
    assert agree(a, late)
    optimizer.close()


@pytest.mark.ranks
def test_torchs_own_names_of_an_added_group_are_taken():
    a, late = weight(), weight()
    try:
        plain = torch.optim.SGD([("a", a)], lr=1.0)
    except TypeError:
        pytest.skip("needs torch 2.6: optimizers of named parameters")
    optimizer = distribute(plain, [("a", a)])
    optimizer.add_param_group({"params": [("late", late)]})
    pull(a, late).backward()
    optimizer.step()
    assert sorted(optimizer.traffic.tensors) == ["a", "late"]
    optimizer.close()


@pytest.mark.ranks
def test_residuals_stay_with_their_parameters_when_groups_change_places():
    a, b, c = weight(), weight(), weight(n=5)
    groups = [{"params": [w]} for w in (a, b)]
    optimizer = distribute(torch.optim.SGD(groups, lr=1.0))
    pull(a, b).backward()
    optimizer.step()
    del optimizer.param_groups[0]
    optimizer.add_param_group({"params": [c]})  # where b was
    optimizer.zero_grad()
    pull(b, c).backward()
    optimizer.step()
    assert sorted(optimizer.traffic.tensors) == [
        "group0.parameter0",
        "group1.parameter0",
        "group1.parameter0+",
    ]
    assert agree(a, b, c)
    optimizer.close()


@pytest.mark.ranks
def test_the_names_may_be_those_of_a_larger_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = distribute(
        torch.optim.SGD(model[1].parameters(), lr=1.0), model.named_parameters()
    )
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert sorted(optimizer.traffic.tensors) == ["1.bias", "1.weight"]
    optimizer.close()


def test_a_tied_parameter_has_the_first_of_its_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    names = list(model.named_parameters(remove_duplicate=False))
    optimizer = distribute(torch.optim.SGD(model.parameters(), lr=1.0), names)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert sorted(optimizer.traffic.tensors) == ["0.bias", "0.weight", "1.bias"]
    optimizer.close()


def test_names_that_are_no_pairs_are_refused():
    model = nn.Linear(2, 2)
    for named in (model.parameters(), dict(model.named_parameters())):
        with pytest.raises(TypeError, match="must be pairs of a name and a tensor"):
            distribute(torch.optim.SGD(model.parameters(), lr=1.0), named)


# --------------------------------------------------------------- frozen parameters


@pytest.mark.ranks
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_frozen_parameter_stands_still_and_goes_on_with_its_residual(set_to_none):
    a, b, comm = weight(1.0), weight(1.0), counted(COMM)
    slope = torch.arange(8.0)

    def step():
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = (slope * b).sum()
        if a.requires_grad:
            loss = loss + (slope * a).sum()
        loss.backward()
        optimizer.step()

    named = [("a", a), ("b", b)]
    optimizer = distribute(torch.optim.SGD([a, b], lr=1.0), named, 0.25, comm)
    step()
    a.requires_grad_(False)
    before, residual = a.clone(), residual_of(optimizer, "a")
    assert residual.any()
    for _ in range(3):
        comm.calls.clear()
        step()
        assert comm.calls["Iallgather"] == 1
        assert torch.equal(a, before)
    assert torch.equal(residual_of(optimizer, "a"), residual)
    a.requires_grad_(True)
    step()
    kept = residual + slope  # and the two largest of it were sent
    expected = before - torch.where(kept >= kept.sort().values[-2], kept, 0.0)
    torch.testing.assert_close(a.detach(), expected.detach())
    assert agree(a, b)
    optimizer.close()


def residual_of(optimizer, name):
    return optimizer.residual_state_dict()["tensors"][name]["residual"].clone()


@pytest.mark.ranks
@several
@pytest.mark.parametrize("trained", [0, 2])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_freezing_on_one_rank_is_an_error_on_all_that_names_it(set_to_none, trained):
    a, b = weight(), weight()
    optimizer = distribute(torch.optim.SGD([a, b], lr=1.0), [("a", a), ("b", b)])
    for _ in range(trained):
        optimizer.zero_grad(set_to_none=set_to_none)
        pull(a, b).backward()
        optimizer.step()
    a.requires_grad_(RANK != LAST)
    optimizer.zero_grad(set_to_none=set_to_none)
    pull(*([a] if RANK != LAST else []), b).backward()
    said = rf"a: rank {LAST} has dtype float32 \(frozen\), expected float32"
    with pytest.raises(ExchangeError, match=said if SIZE > 2 else "a: rank"):
        optimizer.step()
    a.requires_grad_(True)
    optimizer.step()  # and goes on
    assert agree(a, b)
    optimizer.close()


# ------------------------------------------------------- what surrounds an optimizer


@pytest.mark.ranks
def test_averaged_models_and_schedulers_of_all_kinds_go_along():
    model = nn.Linear(4, 2)
    optimizer = distribute(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), 0.5
    )
    averaged = torch.optim.swa_utils.AveragedModel(model)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=2)
    later = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05)
    chained = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, later], [2])
    for step in range(4):
        optimizer.zero_grad()
        model(torch.full((3, 4), RANK + step + 1.0)).square().mean().backward()
        optimizer.step()
        chained.step()
        averaged.update_parameters(model)
    assert optimizer.traffic.steps == 4
    assert agree(*model.parameters(), *averaged.module.parameters())
    optimizer.close()


class Holding(nn.Module):
    """Has its optimizer as an attribute, as training frameworks do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.optimizer = distribute(
            torch.optim.Adam(self.layer.parameters(), betas=(0.0, 0.999)),
            self.layer.named_parameters(),
        )

    def train_a_step(self):
        self.optimizer.zero_grad()
        self.layer(torch.ones(1, 4)).sum().backward()
        self.optimizer.step()


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.filterwarnings("ignore:.*was distributed and is not any more")
@pytest.mark.parametrize("how", [copy.deepcopy, saved_and_loaded])
def test_a_model_that_holds_its_optimizer_can_be_copied(how):
    model = Holding()
    model.train_a_step()
    copied = how(model)
    assert type(copied.optimizer) is torch.optim.Adam
    (group,) = copied.optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in copied.parameters()]
    before = [p.clone() for p in model.parameters()]
    steps = model.optimizer.traffic.steps
    copied.train_a_step()  # alone, and nothing of the original moves
    assert model.optimizer.traffic.steps == steps
    assert all(map(torch.equal, before, model.parameters()))
    model.train_a_step()
    assert model.optimizer.traffic.steps == steps + 1
    model.optimizer.close()
