"""What every transport must keep: each law is called on every rank, and asserts there.

A new transport adds an end, or what its integrations take as `comm`, and a test file
that calls the laws of these tables.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pytest

from hvd_sparse import ExchangeError, Selection
from hvd_sparse.core.formats import Entries
from hvd_sparse.core.payload import Header, Payload, encode
from hvd_sparse.core.values import Float32
from hvd_sparse.transport.mpi.agreement import Row
from hvd_sparse.transport.mpi.broadcast import Broadcast, Described
from hvd_sparse.transport.mpi.exchange import MpiExchange

N = 64  # elements of every gradient
TIMEOUT_S = 20


class End(Protocol):
    """One rank's end of an exchange."""

    exchange: Any

    def travel(self, handles: Sequence[Any]) -> None:
        """All payloads of these handles, and no others, have been started."""
        ...

    def close(self) -> None:
        """All that came has been looked at."""
        ...


class OverMpi:
    """The exchange of MPI, over whatever is its communicator."""

    def __init__(self, comm: Any, timeout_s: float = TIMEOUT_S) -> None:
        self.exchange = MpiExchange(comm, timeout_s)

    def travel(
        self, handles: Sequence[int], *rows: Row, configuration: str = "TopK"
    ) -> None:
        sent = [row(f"w{handle}") for handle in handles]
        self.exchange.open([*sent, *rows], configuration)
        self.exchange.close_step()

    def close(self) -> None:
        self.exchange.clear()

    def say(self, text: str) -> list[str]:
        """One more step: what every rank says."""
        data = np.frombuffer(text.encode().ljust(-(-len(text) // 8) * 8), np.uint8)
        handle = self.exchange.start_bytes(data)
        self.travel([])
        found = self.exchange.finish_bytes(handle)
        said = [part.tobytes().rstrip().decode() for part in found]
        self.close()
        return said


def row(name: str = "w", **others: Any) -> Row:
    shape, dtype, step = (N,), "float32", 0
    found = {"shape": shape, "dtype": dtype, "step": step, **others}
    return name, found["shape"], found["dtype"], 1, "sparse", found["step"]


def payload(rank: int, place: int, k: int, most: int | None = None) -> Payload:
    """What this rank sends of the tensor at this place; all ranks know it.

    Args: most: that any rank may send, where they choose.
    """
    random = np.random.default_rng([rank, place, k])
    indices = np.sort(random.choice(N, k, replace=False)).astype(np.int32)
    values = random.standard_normal(k).astype(np.float32)
    varies, known = most is not None, k if most is None else most
    digest = 1 + place + 1000 * known + 10**6 * varies
    header = Header(Entries(Float32()), "float32", N, known, 0, digest, varies)
    return encode(Selection(indices, values, 0), header)[0]


def is_same(found: Payload | None, sent: Payload) -> None:
    """What has arrived is what was sent."""
    assert found is not None
    assert found[:3] == sent[:3]
    assert found.entries.dtype == np.uint8
    assert found.entries.ctypes.data % 8 == 0
    np.testing.assert_array_equal(found.entries, sent.entries)


def gathered(
    end: End,
    k: Callable[[int, int], int],
    tensors: int = 3,
    most: Callable[[int], int] | None = None,
) -> None:
    """A step.

    Args:
        k: of (rank, place), the elements that it sends.
        most: of a place, where these differ.
    """
    exchange = end.exchange

    def of(rank: int, place: int) -> Payload:
        return payload(rank, place, k(rank, place), most and most(place))

    own = [of(exchange.rank, place) for place in range(tensors)]
    handles = [exchange.start(f"w{place}", one) for place, one in enumerate(own)]
    end.travel(handles)
    for place, handle in enumerate(handles):
        found = exchange.finish(handle)
        assert len(found) == exchange.size
        for rank, part in enumerate(found):
            is_same(part, of(rank, place))
    end.close()


# ------------------------------------------------------- what all transports must keep


def all_ranks_get_the_payloads_of_all_rank_0_first(end: End) -> None:
    for k in (3, 3, 5):  # twice into the same memory, then into other
        gathered(end, lambda rank, place, k=k: k + place)


def a_payload_may_have_no_elements(end: End) -> None:
    gathered(end, lambda rank, place: 0)
    gathered(end, lambda rank, place: 2 * (place % 2))


def where_they_lie_is_where_they_are_found(end: End) -> None:
    exchange, places = end.exchange, range(3)
    own = [payload(exchange.rank, place, 3 + place) for place in places]
    handles = [
        exchange.start(f"w{p}", part) for p, part in zip(places, own, strict=True)
    ]
    end.travel(handles)
    located = exchange.locate(handles)
    if located is not None:
        assert located.addresses.shape == (exchange.size, len(handles))
        assert (located.addresses % 8 == 0).all()
        for place, handle in enumerate(handles):
            found = exchange.finish(handle)
            at = [part.entries.ctypes.data for part in found]
            assert located.addresses[:, place].tolist() == at
            taken = {part.wire_bytes for part in found}
            assert taken == {located.wire_bytes[place]}
    end.close()


GATHERING = [
    all_ranks_get_the_payloads_of_all_rank_0_first,
    a_payload_may_have_no_elements,
    where_they_lie_is_where_they_are_found,
]

# ------------------------------------------------ where ranks choose sizes themselves


def sizes_may_differ_between_ranks(end: End) -> None:
    last = end.exchange.size - 1
    gathered(
        end,
        lambda rank, place: 3 * rank + place,
        most=lambda place: 3 * last + place,
    )
    gathered(end, lambda rank, place: N if rank == last else 0, most=lambda place: N)


UNEVEN = [sizes_may_differ_between_ranks]

# ----------------------------------------- what MPI, and what runs its steps, must keep


def payloads_of_other_sizes_are_not_located(comm: Any) -> None:
    end = OverMpi(comm)
    own = payload(comm.rank, 0, 1 + comm.rank, most=comm.size)
    handle = end.exchange.start("w0", own)
    end.travel([handle])
    assert end.exchange.locate([handle]) is None


def bytes_travel_beside_payloads_and_without(comm: Any) -> None:
    end, last = OverMpi(comm), comm.size - 1
    own = np.full(16 * (comm.rank == last), 7, np.uint8)
    for tensors in (0, 1):
        handles = [
            end.exchange.start(f"w{i}", payload(comm.rank, i, 3))
            for i in range(tensors)
        ]
        blob = end.exchange.start_bytes(own)
        end.travel(handles)
        found = end.exchange.finish_bytes(blob)
        assert [part.tolist() for part in found] == [[]] * last + [[7] * 16]
        for handle in handles:
            is_same(end.exchange.finish(handle)[last], payload(last, 0, 3))
        end.close()


def dense_tensors_are_summed_beside_payloads(comm: Any) -> None:
    end, ranks = OverMpi(comm), np.arange(comm.size)
    given = [np.full(5, 1 + comm.rank, t) for t in (np.float16, np.float32, np.float64)]
    for _ in range(2):
        handles = [end.exchange.start_dense("d", tensor) for tensor in given]
        end.travel([end.exchange.start("w0", payload(comm.rank, 0, 3))], row("d"))
        for handle, tensor in zip(handles, given, strict=True):
            total, sent_bytes = end.exchange.finish_dense(handle)
            assert total.dtype == np.result_type(tensor.dtype, np.float32)
            assert sent_bytes == total.nbytes
            np.testing.assert_array_equal(total, np.full(5, (1 + ranks).sum()))
        is_same(end.exchange.finish(0)[-1], payload(comm.size - 1, 0, 3))
        end.close()


def two_exchanges_do_not_mix(comm: Any) -> None:
    first, second = OverMpi(comm), OverMpi(comm)
    for end, k in ((first, 2), (second, 4)):
        end.exchange.start("w", payload(comm.rank, 0, k))
        end.exchange.open([row()], "TopK")
    for end, k in ((second, 4), (first, 2)):
        end.exchange.close_step()
        for rank, part in enumerate(end.exchange.finish(0)):
            is_same(part, payload(rank, 0, k))


def arrays_of_one_rank_come_to_all(comm: Any) -> None:
    for root in {0, comm.size - 1}:
        array = np.full(1000, comm.rank, np.uint8)
        array.flags.writeable = comm.rank != root
        with Broadcast(root, comm, TIMEOUT_S) as broadcast:
            assert broadcast.agree([Described("a", array.shape, "uint8")])
            broadcast.send("a", array)
            broadcast.wait("a")
            text = broadcast.bytes(b"from rank %d" % comm.rank)
        assert (array == root).all()
        assert text == b"from rank %d" % root


def what_is_closed_refuses_further_use(comm: Any) -> None:
    end = OverMpi(comm)
    gathered(end, lambda rank, place: 3)
    end.exchange.free()
    with pytest.raises(ExchangeError, match="can not be used any more: it was closed"):
        gathered(end, lambda rank, place: 3)


CARRYING = [
    payloads_of_other_sizes_are_not_located,
    bytes_travel_beside_payloads_and_without,
    dense_tensors_are_summed_beside_payloads,
    two_exchanges_do_not_mix,
    arrays_of_one_rank_come_to_all,
    what_is_closed_refuses_further_use,
]

# ------------------------------------------------- what is wrong, and said on all ranks


class Wrong(NamedTuple):
    """What the last rank does otherwise, and what all are told of it."""

    told: str
    rows: Sequence[Row] = (row(),)
    configuration: str = "TopK"
    step: int = 0
    error: BaseException | None = None


LAST = "LAST"  # stands for the last rank in what is told
WRONG = {
    "name": Wrong(f"w: rank {LAST} does not have it", [row("other")]),
    "shape": Wrong(f"w: rank {LAST} has shape (2,), expected (64,)", [row(shape=(2,))]),
    "dtype": Wrong(f"w: rank {LAST} has dtype float64", [row(dtype="float64")]),
    "step of a tensor": Wrong(f"w: rank {LAST} has step 7, expected 0", [row(step=7)]),
    "one tensor more": Wrong(f"x: rank {LAST} has it, expected", [row(), row("x")]),
    "configuration": Wrong(
        f"w: rank {LAST} has configuration CAT, expected TopK", configuration="CAT"
    ),
    "step": Wrong(f"w: rank {LAST} is at step 6, expected 1", step=5),
    "raised": Wrong(
        f"w: rank {LAST} raised ZeroDivisionError: in its loss",
        error=ZeroDivisionError("in its loss"),
    ),
}


def is_told_to_all_who_then_go_on(comm: Any, wrong: Wrong) -> None:
    """Needs two ranks. The same sentence everywhere, and no data has moved."""
    end, differs = OverMpi(comm), comm.rank == comm.size - 1
    gathered(end, lambda rank, place: 2)
    told = _told(end, wrong if differs else Wrong(""))
    end.close()
    expected = wrong.told.replace(LAST, str(comm.size - 1))
    if not (differs and wrong.error):
        assert told.startswith(expected)
        assert end.exchange.step == 1 + differs * wrong.step
    end.exchange.step = 1
    everyone = end.say(told)
    assert len(set(everyone[: comm.size - bool(wrong.error)])) == 1


def _told(end: OverMpi, mine: Wrong) -> str:
    exchange = end.exchange
    if mine.error:
        exchange.report(mine.error)
        return "nothing"
    exchange.step += mine.step
    handles = [exchange.start(r[0], payload(exchange.rank, 0, 3)) for r in mine.rows]
    with pytest.raises(ExchangeError) as caught:
        end.travel([], *mine.rows, configuration=mine.configuration)
    for handle in handles:
        with pytest.raises(IndexError):  # nothing has come
            exchange.finish(handle)
    return str(caught.value)
