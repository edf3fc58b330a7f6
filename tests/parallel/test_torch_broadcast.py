"""Models and optimizers start alike; every test holds at any number of ranks."""

import copy

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

import hvd_sparse.torch as sparse
from hvd_sparse import ExchangeError

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.Get_rank(), COMM.Get_size()
LAST = SIZE - 1

several = pytest.mark.skipif(SIZE == 1, reason="needs mpirun -np 2 or more")


@pytest.fixture(autouse=True)
def apart():
    """Every rank starts with values of its own."""
    torch.manual_seed(RANK)
    torch.set_num_threads(1)


def broadcast(params, **options):
    sparse.broadcast_parameters(
        params, **{"root": LAST, "comm": COMM, "timeout_s": 30, **options}
    )


def bits(tensor) -> bytes:
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def agree(*tensors) -> bool:
    return len(set(COMM.allgather(b"".join(map(bits, tensors))))) == 1


def numbers(*shape, dtype=torch.float32):
    values = torch.randn(shape, dtype=torch.float64) * 100
    if dtype.is_complex:
        return torch.complex(values, values + RANK).to(dtype)
    return values > 0 if dtype is torch.bool else values.to(dtype)


DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.bool,
    torch.int8,
    torch.int64,
    torch.complex64,
    torch.complex128,
]


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 7)], ids=str)
def test_all_take_the_roots_bits(shape, dtype):
    tensor = numbers(*shape, dtype=dtype)
    sent = COMM.bcast(bits(tensor), LAST)
    address = tensor.data_ptr()
    broadcast({"t": tensor})
    assert bits(tensor) == sent
    assert tensor.data_ptr() == address


def transposed():
    return numbers(4, 6).t()


def channels_last():
    return numbers(2, 3, 4, 5).to(memory_format=torch.channels_last)


def every_other():
    return numbers(10)[::2]


def conjugated():
    return numbers(4, dtype=torch.complex64).conj()


def negative():
    return numbers(4, dtype=torch.complex64).conj().imag


def expanded():
    return numbers(3, 1).expand(3, 5)


def overlapping():
    return numbers(8).as_strided((3, 4), (2, 1))


def sparse_rows():
    return (numbers(4, 3) * (torch.arange(4) <= RANK)[:, None]).to_sparse(1)


def contiguous_here_alone():
    return numbers(4, 6) if RANK == 0 else numbers(6, 4).t()


def a_parameter():
    return nn.Parameter(numbers(3))


KINDS = [
    transposed,
    channels_last,
    every_other,
    conjugated,
    negative,
    expanded,
    overlapping,
    sparse_rows,
    contiguous_here_alone,
    a_parameter,
]


@pytest.mark.ranks
@pytest.mark.parametrize("make", KINDS)
def test_tensors_of_any_kind_keep_their_memory(make):
    tensor = make()
    root = COMM.bcast(bits(tensor), LAST)
    broadcast([("first", torch.ones(2)), ("t", tensor), ("z", torch.ones(2))])
    assert bits(tensor) == root
    if not tensor.is_sparse:
        assert tensor.stride() == make().stride()


@pytest.mark.ranks
def test_a_model_with_buffers_and_tied_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    model.register_buffer("positions", torch.arange(4).expand(1, -1))
    model(torch.randn(8, 4))
    for root in range(SIZE):
        broadcast(model.state_dict(), root=root)
        assert agree(*model.state_dict().values())
        with torch.no_grad():
            model[0].weight.add_(RANK)
    assert model[2].weight is model[0].weight
    broadcast(model.named_parameters())
    broadcast({**model.state_dict(), "epoch": RANK})  # what is no tensor stays
    assert agree(*model.state_dict().values())


@pytest.mark.ranks
def test_views_of_one_buffer_are_overwritten_where_they_are():
    flat, table = numbers(20), numbers(4, 6)
    broadcast(
        {
            "a": flat[:10],
            "b": flat[10:],
            "c": table[:, :2],
            "d": table[:, 2:],
            "e": table,
        }
    )
    assert agree(flat, table)


@pytest.mark.ranks
def test_large_tensors_travel_in_pieces(monkeypatch):
    monkeypatch.setattr("hvd_sparse.transport.mpi.broadcast._PIECE_BYTES", 1000)
    monkeypatch.setattr("hvd_sparse.transport.mpi.broadcast._MOST_UNDER_WAY", 3)
    tensors = {"a": numbers(2501), "b": numbers(7, 300).t(), "c": numbers(100)}
    broadcast(tensors)
    assert agree(*tensors.values())


@pytest.mark.ranks
def test_autograd_sees_that_a_parameter_was_overwritten():
    w = nn.Parameter(numbers(3))
    loss = (w * w).sum()
    broadcast({"w": w})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------- an optimizer's state


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.1 * (RANK + 1), amsgrad=True)


def trained(kind, steps=2):
    model = nn.Linear(4, 3)
    optimizer = kind(model)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return model, optimizer


STATES = {
    "adam": adam,
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=RANK + 1.0, momentum=0.9),
    "lbfgs": lambda m: torch.optim.LBFGS(m.parameters(), max_iter=3 + RANK),
    "adafactor": lambda m: torch.optim.Adamax(m.parameters(), lr=0.5 / (RANK + 1)),
}


def flattened(state):
    if isinstance(state, torch.Tensor):
        return [(tuple(state.shape), str(state.dtype), bits(state))]
    if isinstance(state, dict):
        return [(key, flattened(value)) for key, value in state.items()]
    if isinstance(state, list | tuple):
        return [flattened(value) for value in state]
    return state


@pytest.mark.ranks
@pytest.mark.parametrize("fresh", ["nobody", "all but the root", "the root"])
@pytest.mark.parametrize("kind", STATES.values(), ids=STATES)
def test_all_take_the_roots_state_and_options(kind, fresh):
    is_fresh = {"nobody": False, "the root": RANK == LAST}.get(fresh, RANK != LAST)
    _, optimizer = trained(kind, steps=0 if is_fresh else 1 + RANK)
    root = COMM.bcast(flattened(optimizer.state_dict()), LAST)
    sparse.broadcast_optimizer_state(optimizer, root=LAST, comm=COMM, timeout_s=30)
    assert flattened(optimizer.state_dict()) == root


@pytest.mark.ranks
def test_a_state_that_is_there_is_overwritten_in_place():
    _, optimizer = trained(adam)
    before = [s["exp_avg"].data_ptr() for s in optimizer.state.values()]
    sparse.broadcast_optimizer_state(optimizer, root=LAST, comm=COMM, timeout_s=30)
    assert [s["exp_avg"].data_ptr() for s in optimizer.state.values()] == before


def test_numpy_numbers_in_options_can_be_broadcast():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=np.float64(0.1))
    sparse.broadcast_optimizer_state(optimizer, comm=COMM)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.ranks
@several
def test_optimizers_of_different_parameters_are_an_error_on_every_rank():
    model = nn.Linear(4, 5 if RANK == LAST else 4)
    with pytest.raises(
        ExchangeError, match=r"group0\.parameter0: rank \d has shape \(\d, 4\), expect"
    ):
        sparse.broadcast_optimizer_state(adam(model), comm=COMM, timeout_s=30)


# ------------------------------------------------------------------------ bad use


def other_shape():
    return {"a": torch.ones(3), "b": torch.ones(5 if RANK == LAST else 4)}


def other_dtype():
    return {"b": torch.ones(4, dtype=torch.int64 if RANK == LAST else torch.int32)}


def other_names():
    return {"a": torch.ones(3), **({"b": torch.ones(4)} if RANK == LAST else {})}


def tied_here_alone():
    tensor = torch.ones(4)
    return {"a": tensor, "b": tensor if RANK == LAST else torch.ones(4)}


def expanded_here_alone():
    return {"b": torch.ones(1).expand(4) if RANK == LAST else torch.ones(4)}


DIFFERENT = {
    other_shape: r"b: rank \d has shape \(\d,\), expected \(\d,\)",
    other_dtype: r"b: rank \d has dtype int\d\d, expected int\d\d",
    other_names: rf"b: rank {LAST} has it, expected only a",
    tied_here_alone: rf"b: rank {LAST} has dtype float32 in the memory of a, expected",
    expanded_here_alone: rf"b: rank {LAST} has dtype float32 expanded, expected float",
}


@pytest.mark.ranks
@several
@pytest.mark.parametrize(("make", "said"), DIFFERENT.items())
def test_ranks_that_differ_hear_of_it_before_anything_moves(make, said):
    tensors = make()
    before = copy.deepcopy(tensors)
    with pytest.raises(ExchangeError, match=said):
        broadcast(tensors)
    assert all(map(torch.equal, tensors.values(), before.values()))


@pytest.mark.ranks
@several
def test_different_roots_are_an_error_on_every_rank():
    with pytest.raises(ExchangeError, match="root"):
        broadcast({"a": torch.ones(3)}, root=min(RANK, 1))


@pytest.mark.ranks
def test_a_root_that_is_no_rank_is_refused_and_heard_of():
    with pytest.raises(ValueError, match=rf"root must be in \[0, {SIZE}\), got -1"):
        broadcast({"a": torch.ones(3)}, root=-1)
    if SIZE > 1:
        error = ValueError if RANK == LAST else ExchangeError
        with pytest.raises(error, match="root must be in"):
            broadcast({"a": torch.ones(3)}, root=SIZE if RANK == LAST else 0)


@pytest.mark.ranks
@several
def test_an_error_while_a_rank_looks_at_its_tensors_is_heard_by_all():
    def pairs():
        yield "a", torch.ones(3)
        if RANK == LAST:
            raise KeyError("no such layer")

    error = KeyError if RANK == LAST else ExchangeError
    with pytest.raises(error, match="no such layer"):
        broadcast(pairs())
