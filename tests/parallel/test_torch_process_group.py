"""The laws of transports over torch.distributed, whose ranks are those of mpirun."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from transports import (
    CARRYING,
    GATHERING,
    UNEVEN,
    WRONG,
    OverMpi,
    is_told_to_all_who_then_go_on,
)

import hvd_sparse.torch as sparse
from hvd_sparse.mpi import SparseAllreduce
from hvd_sparse.transport.mpi.communicator import communicator_of

RANKS = MPI.COMM_WORLD

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("law", [*GATHERING, *UNEVEN], ids=lambda law: law.__name__)
def test_payloads_are_gathered(law, world):
    law(OverMpi(communicator_of(world)))


@pytest.mark.parametrize("law", CARRYING, ids=lambda law: law.__name__)
def test_what_is_more_is_carried(law, world):
    law(communicator_of(world))


@pytest.mark.skipif(RANKS.size == 1, reason="needs mpirun -np 2 or more")
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_told_to_all_who_then_go_on(wrong, world):
    is_told_to_all_who_then_go_on(communicator_of(world), WRONG[wrong])


def trained(comm, sparsifier, steps=10):
    """Weights after some steps, each rank with data of its own."""
    torch.manual_seed(RANKS.rank)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 5))
    sparse.broadcast_parameters(model.state_dict(), comm=comm)
    optimizer = sparse.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        sparsifier,
        named_parameters=model.named_parameters(),
        comm=comm,
        dense=sparse.Never(),  # gloo and MPI add up in orders of their own
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().sum().backward()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()


@pytest.mark.parametrize(
    "sparsifier",
    [
        sparse.TopK(density=0.05),
        sparse.RandomK(density=0.05),
        sparse.Threshold(value=0.1),
        sparse.CAT(sparse.TopK(), sparse.Affine(per_byte=1.0, per_message=54.0)),
    ],
    ids=lambda sparsifier: type(sparsifier).__name__,
)
def test_a_process_group_trains_as_mpi_does_bit_for_bit(sparsifier, world):
    over_mpi, over_gloo = trained(RANKS, sparsifier), trained(world, sparsifier)
    np.testing.assert_array_equal(over_gloo, over_mpi)
    for theirs in RANKS.allgather(over_gloo):
        np.testing.assert_array_equal(theirs, over_gloo)


def test_ranks_of_a_part_exchange_among_themselves(world):
    group = dist.new_group([0])
    if RANKS.rank == 0:
        end = OverMpi(communicator_of(group))
        assert end.exchange.size == 1
        assert end.say("alone") == ["alone"]
    else:
        with pytest.raises(ValueError, match="a process group that this rank is in"):
            communicator_of(group)


def test_it_is_what_carries_a_step_where_it_is_initialized(world):
    """Under mpirun, too: one who has initialized it means it."""
    own, _ = communicator_of(None).duplicate()
    assert type(own) is type(communicator_of(world))
    assert (own.rank, own.size) == (RANKS.rank, RANKS.size)


def test_ranks_with_other_numbers_of_groups_find_each_other(world):
    """What new_group names its groups by counts all those of a process."""
    for _ in range(2):
        group = dist.new_group([RANKS.size - 1])
    del group
    trained(world, sparse.TopK(density=0.1), steps=2)


def test_another_initialization_finds_the_same_ranks(world):
    """In its store are addresses of the first."""
    group = dist.new_group(list(range(RANKS.size)))
    first = trained(group, sparse.TopK(density=0.1), steps=2)
    _, store = dist.distributed_c10d._world.pg_map[group]
    again = dist.distributed_c10d._world.pg_map
    other = dist.new_group(list(range(RANKS.size)))
    again[other] = (again[other][0], store)  # as where names begin anew
    np.testing.assert_array_equal(trained(other, sparse.TopK(0.1), steps=2), first)


@pytest.mark.skipif(RANKS.size == 1, reason="needs mpirun -np 2 or more")
def test_fewer_ranks_than_were_started_do_not_train_alone(monkeypatch, world):
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
    with pytest.raises(
        ValueError, match=rf"has 1 ranks, but {RANKS.size} were started"
    ):
        communicator_of(None)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")
def test_an_exchange_that_is_closed_leaves_no_thread_and_no_socket(world):
    def opened():
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    def one():
        reduce = SparseAllreduce(sparse.TopK(density=0.5), comm=world)
        reduce.allreduce("a", np.ones(10, np.float32))
        reduce.close()

    one()
    before = opened()
    for _ in range(3):
        one()
    assert opened() <= before
