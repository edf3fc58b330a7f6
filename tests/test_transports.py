"""The laws of transports, over ranks in one process."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from transports import (
    CARRYING,
    GATHERING,
    UNEVEN,
    WRONG,
    OverMpi,
    gathered,
    is_told_to_all_who_then_go_on,
)

from hvd_sparse import ExchangeError, loopback

RANKS = [1, 2, 4, 8]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("law", [*GATHERING, *UNEVEN], ids=lambda law: law.__name__)
def test_payloads_are_gathered(law: Callable[[Any], None], ranks: int) -> None:
    loopback.run(ranks, lambda comm: law(OverMpi(comm)))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("law", CARRYING, ids=lambda law: law.__name__)
def test_what_mpi_carries_is_carried(law: Callable[[Any], None], ranks: int) -> None:
    loopback.run(ranks, law)


@pytest.mark.parametrize("ranks", RANKS[1:])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_told_to_all_who_then_go_on(wrong: str, ranks: int) -> None:
    loopback.run(ranks, is_told_to_all_who_then_go_on, WRONG[wrong])


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_a_rank_that_does_not_come_is_an_error_at_the_deadline(ranks: int) -> None:
    """Over MPI that ends the process: see test_faults."""
    told = threading.Barrier(ranks)

    def law(comm: Any) -> None:
        end = OverMpi(comm, timeout_s=3)
        gathered(end, lambda rank, place: 3)
        if comm.rank < ranks - 1:
            said = rf"w0 .*: step 1: rank {comm.rank} gave up after \d\.\d s "
            with pytest.raises(ExchangeError, match=said):
                gathered(end, lambda rank, place: 3)
            with pytest.raises(ExchangeError, match="can not be used any more: w0"):
                gathered(end, lambda rank, place: 3)
        told.wait(20)

    loopback.run(ranks, law)


def test_a_rank_that_makes_no_exchange_is_an_error_at_the_deadline() -> None:
    told = threading.Event()

    def law(comm: Any) -> None:
        if comm.rank == 1:
            assert told.wait(20)
            return
        with pytest.raises(ExchangeError, match=r"rank 0 gave up .* did not make its"):
            OverMpi(comm, timeout_s=0.2)
        told.set()

    loopback.run(2, law)
