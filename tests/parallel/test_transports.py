"""The laws of transports, over real MPI; every one holds at any number of ranks."""

import pytest
from mpi4py import MPI
from transports import (
    CARRYING,
    GATHERING,
    UNEVEN,
    WRONG,
    OverMpi,
    is_told_to_all_who_then_go_on,
)

COMM = MPI.COMM_WORLD

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("law", [*GATHERING, *UNEVEN], ids=lambda law: law.__name__)
def test_payloads_are_gathered(law):
    law(OverMpi(COMM))


@pytest.mark.parametrize("law", CARRYING, ids=lambda law: law.__name__)
def test_what_is_more_is_carried(law):
    law(COMM)


@pytest.mark.skipif(COMM.size == 1, reason="needs mpirun -np 2 or more")
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_told_to_all_who_then_go_on(wrong):
    is_told_to_all_who_then_go_on(COMM, WRONG[wrong])
