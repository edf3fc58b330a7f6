"""SparseAllreduce over real MPI; every test holds at any number of ranks."""

import re
import threading
import time
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from counting import counted
from doors import AFFINE, Halving, Interrupted
from mpi4py import MPI

import hvd_sparse
from hvd_sparse import (
    CAT,
    Average,
    ExchangeError,
    Never,
    PayloadError,
    RandomK,
    Selection,
    Sign,
    SignTopK,
    Stochastic,
    Sum,
    Threshold,
    TopK,
    WhenCheaper,
)
from hvd_sparse.core.formats import Entries
from hvd_sparse.core.frame import Frame
from hvd_sparse.core.payload import payload_bytes
from hvd_sparse.core.values import Float32
from hvd_sparse.mpi import SparseAllreduce, measure
from hvd_sparse.transport.mpi import failure, protocol
from hvd_sparse.transport.mpi.exchange import MpiExchange

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.Get_rank(), COMM.Get_size()
SPARSIFIERS = [
    TopK(density=0.05),
    RandomK(density=0.1),
    Threshold(value=1.5),
    SignTopK(density=0.05),
    SignTopK.alistarh(),
    Stochastic(expected_density=0.05),
    CAT(TopK(), AFFINE),
    CAT(SignTopK(), AFFINE, change=2.0),
    CAT(Stochastic(), AFFINE),
    Halving(density=0.02),
]
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]

several = pytest.mark.skipif(SIZE == 1, reason="needs mpirun -np 2 or more")


def gradients(step, dtype=np.float32, rank=RANK):
    """Fresh noise per rank and step, the same shapes everywhere."""
    rng = np.random.default_rng([rank, step])
    shapes = {"conv": (8, 3, 5, 5), "bias": (8,), "scale": (), "none": (0, 4)}
    return {
        name: np.asarray(rng.standard_normal(shape)).astype(dtype)
        for name, shape in shapes.items()
    }


def agree(value: bytes) -> bool:
    return len(set(COMM.allgather(value))) == 1


def same_bits(results) -> bool:
    return agree(b"".join(results[name].tobytes() for name in sorted(results)))


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("sparsifier", SPARSIFIERS, ids=repr)
@pytest.mark.parametrize("dense", [Never(), WhenCheaper()], ids=repr)
def test_replicas_agree_bitwise(sparsifier, dense, dtype):
    with SparseAllreduce(sparsifier, comm=COMM, dense=dense) as reduce:
        for step in range(4):
            given = gradients(step, dtype)
            results = reduce.grouped_allreduce(given)
            assert same_bits(results)
            for name, result in results.items():
                assert result.shape == given[name].shape
                assert result.dtype == given[name].dtype
        routes = {t.route for t in reduce.traffic.tensors.values()}
        assert dense != Never() or routes == {"sparse"}
        assert reduce.traffic.steps == 4


@pytest.mark.ranks
def test_values_choose_how_they_travel():
    reduced = []
    for sparsifier, values in ((TopK(0.05), Sign()), (SignTopK(0.05), None)):
        options = {"comm": COMM, "dense": Never(), "values": values}
        with SparseAllreduce(sparsifier, **options) as reduce:
            results = reduce.grouped_allreduce(gradients(0, np.float32))
            found = {name: result.tobytes() for name, result in results.items()}
            reduced.append((found, reduce.traffic.sent_bytes))
    assert reduced[0] == reduced[1]


@pytest.mark.ranks
@pytest.mark.parametrize("op", [Average, Sum], ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_density_one_is_the_rank_ordered_sum(op, dtype):
    with SparseAllreduce(TopK(1.0), comm=COMM, op=op, dense=Never()) as reduce:
        results = reduce.grouped_allreduce(gradients(0, dtype))
    scale = dtype(1 / SIZE) if op is Average else dtype(1)
    for name, result in results.items():
        total = np.zeros_like(result)
        for rank in range(SIZE):
            total = total + gradients(0, dtype, rank)[name]
        np.testing.assert_array_equal(result, total * scale)


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dense_tensors_are_what_mpi_gives(dtype):
    with SparseAllreduce(TopK(1.0), comm=COMM, op=Sum) as reduce:
        results = reduce.grouped_allreduce(gradients(0, dtype))
        assert {t.route for t in reduce.traffic.tensors.values()} == {"dense"}
    given = gradients(0, dtype)
    flat = np.concatenate([given[name].reshape(-1) for name in sorted(given)])
    total = np.empty_like(flat)
    COMM.Allreduce(flat, total)
    handed = np.concatenate([results[name].reshape(-1) for name in sorted(given)])
    assert handed.tobytes() == total.tobytes()


@pytest.mark.ranks
def test_float32_and_float64_share_a_step():
    with SparseAllreduce(TopK(0.1), comm=COMM) as reduce:
        given = {"a": np.ones(3, np.float32), "b": np.full(4, 2.0)}
        results = reduce.grouped_allreduce(given)
    np.testing.assert_array_equal(results["a"], given["a"])
    np.testing.assert_array_equal(results["b"], given["b"])


@pytest.mark.ranks
def test_order_of_the_mapping_does_not_matter():
    given = gradients(0)
    names = sorted(given, reverse=bool(RANK % 2))
    with SparseAllreduce(TopK(0.1), comm=COMM, dense=Never()) as reduce:
        results = reduce.grouped_allreduce({name: given[name] for name in names})
    assert same_bits(results)


def exchanged(comm, density, dense):
    with SparseAllreduce(TopK(density), comm=comm, dense=dense) as reduce:
        return reduce.grouped_allreduce(gradients(0))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("density", "dense", "collective"),
    [(0.5, Never(), "Iallgatherv"), (1.0, WhenCheaper(), "Iallreduce")],
    ids=["sparse", "dense"],
)
def test_messages_above_the_limit_are_split(density, dense, collective, monkeypatch):
    whole, split = counted(COMM), counted(COMM)
    expected = exchanged(whole, density, dense)
    monkeypatch.setattr(protocol, "MESSAGE_BYTES", 64)
    found = exchanged(split, density, dense)
    assert whole.calls[collective] == 1
    assert split.calls[collective] > 1
    for name, result in expected.items():
        np.testing.assert_array_equal(found[name], result)
    assert same_bits(found)


@pytest.mark.ranks
def test_out_is_written_whole_and_may_be_the_gradient():
    given = np.arange(100, dtype=np.float32) + RANK
    with SparseAllreduce(TopK(0.1), comm=COMM, dense=Never()) as reduce:
        fresh = reduce.allreduce("a", given.copy())
        in_place = given.copy()
        assert reduce.allreduce("b", in_place, out=in_place) is in_place
        strided = np.full(200, np.nan, np.float32)[::2]
        reduce.allreduce("c", given.copy(), out=strided)
    np.testing.assert_array_equal(in_place, fresh)
    np.testing.assert_array_equal(strided, fresh)


# ------------------------------------------------------------- memory that is shared


FLAT = np.arange(40, dtype=np.float32) - 15
SHARED = {
    "one array, two names": lambda flat: {"a": flat, "b": flat},
    "overlapping views": lambda flat: {"a": flat[:25], "b": flat[15:]},
    "one inside another": lambda flat: {"a": flat, "b": flat[10:20], "c": flat[:3]},
    "interleaved": lambda flat: {"a": flat[::2], "b": flat[1::2]},
    "backwards": lambda flat: {"a": flat, "b": flat[::-1]},
    "repeated": lambda flat: {"a": flat, "b": np.broadcast_to(flat[:1], (40,))},
    "other dtype": lambda flat: {"a": flat, "b": flat.view(np.float16)[:8]},
}


@pytest.mark.ranks
@pytest.mark.parametrize("dense", [Never(), WhenCheaper()], ids=repr)
@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_gradients_may_share_memory(make, dense):
    with SparseAllreduce(TopK(1.0), comm=COMM, dense=dense, op=Sum) as reduce:
        given = make((FLAT * (1 + RANK)).copy())
        results = reduce.grouped_allreduce(given)
        for name, gradient in make(FLAT.copy()).items():
            if gradient.dtype == np.float32:
                total = gradient * np.float32(sum(range(1, SIZE + 1)))
                np.testing.assert_array_equal(results[name], total)


@pytest.mark.ranks
@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_one_result_may_take_the_place_of_gradients_that_share_memory(make):
    """Only one of them; the others are read before it is written."""
    fresh = make((FLAT * (1 + RANK)).copy())
    with SparseAllreduce(TopK(1.0), comm=COMM, dense=Never()) as reduce:
        expected = reduce.grouped_allreduce(fresh)
        for name in (n for n, g in fresh.items() if g.flags.writeable):
            given = make((FLAT * (1 + RANK)).copy())
            out = {n: np.empty_like(g) for n, g in given.items()}
            out[name] = given[name]
            results = reduce.grouped_allreduce(given, out)
            for each, result in results.items():
                np.testing.assert_array_equal(result, expected[each])


@pytest.mark.ranks
@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_results_that_share_memory_are_refused_before_anything_moves(make):
    given = {n: g for n, g in make(FLAT.copy()).items() if g.flags.writeable}
    meet = any(
        np.shares_memory(a, b)
        for n, a in given.items()
        for m, b in given.items()
        if n < m
    )
    before = {n: g.copy() for n, g in given.items()}
    with SparseAllreduce(TopK(1.0), comm=COMM, dense=Never(), timeout_s=20) as reduce:
        if not meet:
            results = reduce.grouped_allreduce(given, given)
            assert all(np.array_equal(results[n], before[n]) for n in given)
            return
        with pytest.raises(ValueError, match="out shares memory with that of"):
            reduce.grouped_allreduce(given, given)
        assert reduce.traffic.sent_bytes == 0
        for name, gradient in given.items():
            np.testing.assert_array_equal(gradient, before[name])


@pytest.mark.ranks
def test_a_result_with_elements_that_share_memory_is_refused():
    out = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (8,), (0,))
    with (
        SparseAllreduce(TopK(), comm=COMM, timeout_s=20) as reduce,
        pytest.raises(ValueError, match="w: out has elements that share memory"),
    ):
        reduce.allreduce("w", np.ones(8, np.float32), out)


# --------------------------------------------------------------------- surroundings


@several
@pytest.mark.ranks
def test_an_intercommunicator_is_refused():
    half = COMM.Split(RANK % 2)
    other = half.Create_intercomm(0, COMM, 1 - RANK % 2)
    with pytest.raises(TypeError, match="comm must be an intracommunicator, got an"):
        SparseAllreduce(TopK(), comm=other)
    other.Free()
    half.Free()


@pytest.mark.ranks
def test_a_second_thread_is_refused_at_once():
    inside, done = threading.Event(), threading.Event()

    class Waiting(Every):
        def select(self, residual, gradient, k, step):
            inside.set()
            done.wait(20)
            return super().select(residual, gradient, k, step)

    reduce = SparseAllreduce(Waiting(0), comm=COMM, dense=Never(), timeout_s=30)
    gradient = np.ones(8, np.float32)
    first = threading.Thread(target=reduce.allreduce, args=("w", gradient))
    first.start()
    assert inside.wait(20)
    for call in (
        lambda: reduce.allreduce("w", gradient),
        lambda: reduce.start({"w": gradient}),
        reduce.finish,
        reduce.progress,
        reduce.state_dict,
        lambda: reduce.load_state_dict({}),
        reduce.close,
    ):
        with pytest.raises(RuntimeError, match="in use by another thread"):
            call()
    done.set()
    first.join()
    np.testing.assert_array_equal(reduce.allreduce("w", gradient), [1, 0] * 4)
    reduce.close()


@pytest.mark.ranks
@pytest.mark.parametrize("sparsifier", SPARSIFIERS, ids=repr)
def test_a_state_of_the_middle_of_a_step_has_what_is_on_its_way(sparsifier):
    with SparseAllreduce(sparsifier, comm=COMM, dense=Never()) as reduce:
        reduce.grouped_allreduce(gradients(0))
        before = reduce.state_dict()["tensors"]
        given = gradients(1)
        reduce.start(given)
        state = reduce.state_dict()
        with pytest.raises(RuntimeError, match="must come before load_state"):
            reduce.load_state_dict(state)
        reduce.finish()
        after = reduce.state_dict()
        if isinstance(sparsifier, Stochastic) or "Stochastic" in repr(sparsifier):
            return  # it keeps nothing, so there is nothing to be kept
        for name, saved in state["tensors"].items():
            expected = before[name]["residual"] + given[name]
            np.testing.assert_allclose(saved["residual"], expected, rtol=1e-6)
            assert saved["step"] == after["tensors"][name]["step"] - 1
        reduce.load_state_dict(state)  # as if the exchange had failed


@pytest.mark.parametrize("sparsifier", SPARSIFIERS, ids=repr)
def test_a_step_that_is_thrown_away_leaves_no_trace(sparsifier):
    bad = {name: g * g.dtype.type(1e30) for name, g in gradients(1).items()}
    options = {"comm": COMM, "dense": Never(), "timeout_s": 20}
    with (
        SparseAllreduce(sparsifier, **options, undo=True) as reduce,
        SparseAllreduce(sparsifier, **options) as spared,  # the bad step
    ):
        for each in (reduce, spared):
            each.grouped_allreduce(gradients(0))
        before = reduce.state_dict()["tensors"]
        reduce.grouped_allreduce(bad)
        reduce.discard()
        after = reduce.state_dict()["tensors"]
        for name, saved in before.items():
            assert saved["residual"].tobytes() == after[name]["residual"].tobytes()
            assert saved["step"] == after[name]["step"]
        for step in range(2, 4):
            found = reduce.grouped_allreduce(gradients(step))
            for name, wanted in spared.grouped_allreduce(gradients(step)).items():
                assert found[name].tobytes() == wanted.tobytes()


@pytest.mark.ranks
def test_the_same_step_can_not_be_thrown_away_twice_nor_without_undo():
    given = {"w": np.ones(8, np.float32)}
    options = {"comm": COMM, "dense": Never(), "timeout_s": 20}
    with SparseAllreduce(TopK(0.5), **options, undo=True) as reduce:
        with pytest.raises(RuntimeError, match=r"no step that discard\(\) could"):
            reduce.discard()
        reduce.grouped_allreduce(given)
        reduce.discard()
        with pytest.raises(RuntimeError, match=r"no step that discard\(\) could"):
            reduce.discard()
    with SparseAllreduce(TopK(0.5), **options) as reduce:
        reduce.grouped_allreduce(given)
        with pytest.raises(RuntimeError, match=r"discard\(\) needs undo=True"):
            reduce.discard()
        reduce.start(given)
        with pytest.raises(RuntimeError, match=r"discard\(\) needs undo=True"):
            reduce.discard()
        reduce.finish()


@pytest.mark.ranks
@pytest.mark.parametrize("sparsifier", SPARSIFIERS, ids=repr)
def test_a_rank_that_throws_a_step_away_before_finish_takes_part_in_it(sparsifier):
    options = {"comm": COMM, "dense": Never(), "timeout_s": 20, "undo": True}
    with SparseAllreduce(sparsifier, **options) as reduce:
        reduce.grouped_allreduce(gradients(0))
        before = reduce.state_dict()["tensors"]
        reduce.start(gradients(1))
        if RANK < SIZE - 1:
            reduce.finish()
        reduce.discard()
        after = reduce.state_dict()["tensors"]
        for name, saved in before.items():
            assert saved["residual"].tobytes() == after[name]["residual"].tobytes()
        reduce.grouped_allreduce(gradients(1))  # all are at the same step


@pytest.mark.ranks
@several
def test_a_rank_that_throws_a_step_away_alone_is_an_error_on_all():
    given = {"w": np.ones(8, np.float32)}
    reduce = SparseAllreduce(
        TopK(0.5), comm=COMM, dense=Never(), timeout_s=20, undo=True
    )
    reduce.grouped_allreduce(given)
    reduce.grouped_allreduce(given)
    if RANK == SIZE - 1:
        reduce.discard()
    said = f"w: rank {SIZE - 1} has step 1, expected 2"
    with pytest.raises(ExchangeError, match=said):
        reduce.grouped_allreduce(given)


def test_what_a_failed_exchange_brought_back_can_be_thrown_away():
    given = {"w": np.ones(8, np.float32)}
    with SparseAllreduce(
        Every(0), comm=MPI.COMM_SELF, dense=Never(), undo=True
    ) as reduce:
        reduce.grouped_allreduce(given)
        before = reduce.state_dict()["tensors"]["w"]["residual"]
        reduce.start(given)
        with pytest.raises(ZeroDivisionError):
            reduce.finish(lambda outs: 1 / 0)
        reduce.discard()
        after = reduce.state_dict()["tensors"]["w"]["residual"]
        np.testing.assert_array_equal(after, before)


@pytest.mark.ranks
def test_ctrl_c_is_raised_when_the_step_is_complete(monkeypatch):
    monkeypatch.setattr(Interrupted, "calls", 0)
    given = {name: np.arange(1, 21, dtype=np.float32) for name in "abc"}
    outs = {name: np.zeros(20, np.float32) for name in given}
    with SparseAllreduce(Interrupted(0.2), comm=COMM, dense=Never()) as reduce:
        with pytest.raises(KeyboardInterrupt):
            reduce.grouped_allreduce(given, outs)
        assert Interrupted.calls == 3
        kept = reduce.state_dict()["tensors"]
        for name, gradient in given.items():
            np.testing.assert_allclose(outs[name] + kept[name]["residual"], gradient)
        after = reduce.grouped_allreduce(given)
        assert same_bits(after)


def test_an_interrupt_inside_start_loses_nothing():
    class Raising(Every):
        shared_indices, calls = False, 0

        def select(self, residual, gradient, k, step):
            type(self).calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().select(residual, gradient, k, step)

    given = {name: np.ones(8, np.float32) for name in "ab"}
    with SparseAllreduce(Raising(0), comm=MPI.COMM_SELF, dense=Never()) as reduce:
        with pytest.raises(KeyboardInterrupt):
            reduce.grouped_allreduce(given)
        results = reduce.grouped_allreduce(given)
        kept = reduce.state_dict()["tensors"]["a"]["residual"]
        np.testing.assert_array_equal(results["a"] + kept, 2 * given["a"])


# -------------------------------------------------------------------------- non-finite


@pytest.mark.ranks
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_on_one_rank_reaches_all_and_stays_out(value):
    clean, dirty = gradients(1), gradients(0)
    if RANK == SIZE - 1:
        dirty["conv"].reshape(-1)[7] = value
    with SparseAllreduce(TopK(0.1), comm=COMM, dense=Never()) as reduce:
        results = reduce.grouped_allreduce(dirty)
        assert np.isnan(results["conv"]).all()
        assert np.isfinite(results["bias"]).all()
        residual = reduce.state_dict()["tensors"]["conv"]["residual"]
        finite = np.isfinite(dirty["conv"])
        np.testing.assert_array_equal(residual, np.where(finite, dirty["conv"], 0))
        after = reduce.grouped_allreduce(clean)
        assert all(np.isfinite(result).all() for result in after.values())
        assert same_bits(after)


@pytest.mark.ranks
@pytest.mark.parametrize("sparsifier", SPARSIFIERS, ids=repr)
def test_a_restart_continues_bitwise(sparsifier):
    with SparseAllreduce(sparsifier, comm=COMM, dense=Never()) as straight:
        for step in range(3):
            straight.grouped_allreduce(gradients(step))
        state = straight.state_dict()
        expected = [straight.grouped_allreduce(gradients(s)) for s in range(3, 6)]
        final = straight.state_dict()
    with SparseAllreduce(sparsifier, comm=COMM, dense=Never()) as restarted:
        restarted.load_state_dict(state)
        for step, want in zip(range(3, 6), expected, strict=True):
            got = restarted.grouped_allreduce(gradients(step))
            for name in got:
                assert got[name].tobytes() == want[name].tobytes()
        again = restarted.state_dict()
    for name, tensor in final["tensors"].items():
        assert (
            tensor["residual"].tobytes() == again["tensors"][name]["residual"].tobytes()
        )
    assert final["step"] == again["step"] == 6


def test_a_state_of_another_size_or_model_says_so_by_name():
    with SparseAllreduce(TopK(0.1), comm=COMM, dense=Never()) as reduce:
        reduce.grouped_allreduce(gradients(0))
        state = reduce.state_dict()
        with pytest.raises(ValueError, match=f"size {SIZE + 1}, expected {SIZE}"):
            reduce.load_state_dict({**state, "size": SIZE + 1})
        with pytest.raises(ValueError, match=f"rank {RANK + 1}, expected {RANK}"):
            reduce.load_state_dict({**state, "rank": RANK + 1})
        other = {**state["tensors"], "conv": {**state["tensors"]["bias"]}}
        with pytest.raises(ValueError, match=r"conv: state has shape \(8,\)"):
            reduce.load_state_dict({**state, "tensors": other})


@pytest.mark.ranks
def test_a_part_of_the_ranks_is_a_group_of_its_own():
    half = COMM.Split(RANK % 2, RANK)
    with SparseAllreduce(TopK(1.0), comm=half, op=Sum, dense=Never()) as reduce:
        result = reduce.allreduce("a", np.ones(5, np.float32))
    np.testing.assert_array_equal(result, half.Get_size())
    half.Free()


@pytest.mark.ranks
def test_traffic_counts_what_moves():
    n, k = 10_000, 100
    with SparseAllreduce(TopK(0.01), comm=COMM, dense=Never()) as reduce:
        reduce.allreduce("a", np.random.default_rng(RANK).standard_normal(n))
        tensor = reduce.traffic.tensors["a"]
        size = payload_bytes(Entries(Float32()), "float64", n, k)
        assert 32 + 8 * k < size < 32 + 10 * k  # about 9 bits an index
        assert tensor.sent_bytes == size
        assert tensor.received_bytes == (SIZE - 1) * size
        assert tensor.dense_bytes == 8 * n
        assert tensor.sent_elements == k
        overhead = reduce.traffic.overhead_sent_bytes
        assert reduce.traffic.sent_bytes == tensor.sent_bytes + overhead


def test_closed_means_closed():
    reduce = SparseAllreduce(TopK(0.1), comm=COMM)
    reduce.close()
    with pytest.raises(ExchangeError, match="closed"):
        reduce.allreduce("a", np.ones(3, np.float32))


@pytest.mark.ranks
def test_start_and_finish_take_turns():
    with SparseAllreduce(TopK(0.1), comm=COMM, dense=Never()) as reduce:
        reduce.start({"a": np.ones(8, np.float32)})
        while not reduce.progress():
            pass
        with pytest.raises(RuntimeError, match="finish"):
            reduce.start({"a": np.ones(8, np.float32)})
        np.testing.assert_array_equal(reduce.finish()["a"][0], 1)


# ------------------------------------------------------------- peers that disagree


def different(name, shape=(4,), dtype=np.float32):
    return {"same": np.ones(4, np.float32), name: np.ones(shape, dtype)}


DISAGREEMENTS = {
    "name": ({"name": "one"}, {"name": "other"}, "does not have it"),
    "shape": ({"name": "a"}, {"name": "a", "shape": (2, 2)}, r"a: rank \d has shape"),
    "dtype": ({"name": "a"}, {"name": "a", "dtype": np.float64}, r"rank \d has dtype"),
}


@pytest.mark.ranks
@several
@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_a_disagreement_is_an_error_on_every_rank(case):
    most, last, message = DISAGREEMENTS[case]
    mine = different(**(last if RANK == SIZE - 1 else most))
    with SparseAllreduce(TopK(0.5), comm=COMM, dense=Never(), timeout_s=5) as reduce:
        with pytest.raises(ExchangeError, match=message) as caught:
            reduce.grouped_allreduce(mine)
        assert agree(str(caught.value).encode())
        for name, gradient in mine.items():  # what was sent is back
            residual = reduce.state_dict()["tensors"][name]["residual"]
            np.testing.assert_array_equal(residual, gradient)


@pytest.mark.ranks
@several
def test_a_majority_is_believed():
    rank = 0 if SIZE > 2 else 1
    mine = different("a", shape=(9,) if rank == RANK else (4,))
    with (
        SparseAllreduce(TopK(0.5), comm=COMM, timeout_s=5) as reduce,
        pytest.raises(ExchangeError, match=rf"a: rank {rank} has shape \(9,\), exp"),
    ):
        reduce.grouped_allreduce(mine)


@pytest.mark.ranks
@several
@pytest.mark.parametrize(
    ("most", "last"),
    [(TopK(0.5), TopK(0.25)), (RandomK(0.5), RandomK(0.5, seed=1))],
    ids=["k", "seed"],
)
def test_another_configuration_is_named(most, last):
    sparsifier = last if RANK == SIZE - 1 else most
    with (
        SparseAllreduce(sparsifier, comm=COMM, dense=Never(), timeout_s=5) as reduce,
        pytest.raises(ExchangeError, match=r"has configuration .*, expected"),
    ):
        reduce.allreduce("a", np.ones(8, np.float32))


@pytest.mark.ranks
@several
def test_another_step_is_named():
    with SparseAllreduce(TopK(0.5), comm=COMM, dense=Never(), timeout_s=5) as reduce:
        reduce.allreduce("a", np.ones(8, np.float32))
        if RANK == SIZE - 1:
            state = reduce.state_dict()
            state["tensors"]["a"]["step"] = 7
            reduce.load_state_dict(state)
        with pytest.raises(ExchangeError, match=r"a: rank \d has step 7, expected 1"):
            reduce.allreduce("a", np.ones(8, np.float32))


@pytest.mark.ranks
@several
def test_a_rank_that_raises_is_heard_by_all():
    bad = np.ones(8, np.int32 if RANK == SIZE - 1 else np.float32)
    with SparseAllreduce(TopK(0.5), comm=COMM, dense=Never(), timeout_s=5) as reduce:
        if RANK == SIZE - 1:
            with pytest.raises(TypeError, match="a: gradient must be one of"):
                reduce.allreduce("a", bad)
        else:
            with pytest.raises(ExchangeError, match=f"rank {SIZE - 1} raised TypeErr"):
                reduce.allreduce("a", bad)
        result = reduce.allreduce("b", np.ones(8, np.float32))  # and goes on
        assert same_bits({"b": result})


@pytest.mark.ranks
def test_all_ranks_may_raise_together():
    with SparseAllreduce(TopK(0.5), comm=COMM, dense=Never(), timeout_s=5) as reduce:
        reduce.allreduce("a", np.ones(8, np.float32))
        with pytest.raises(ValueError, match=r"a: gradient has shape \(9,\)"):
            reduce.allreduce("a", np.ones(9, np.float32))
        reduce.allreduce("a", np.ones(8, np.float32))


# ----------------------------------------------------------------------- bad use


MASKED = np.ma.masked_array(np.ones(4), mask=[0, 1, 0, 0])


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(TypeError, match="sparsifier must have a select method"):
        SparseAllreduce(0.01, comm=COMM)
    with pytest.raises(TypeError, match="sparsifier must have a select method"):
        SparseAllreduce(TopK, comm=COMM)
    with pytest.raises(TypeError, match="comm must be an mpi4py communicator"):
        SparseAllreduce(TopK(), comm="world")
    with pytest.raises(ValueError, match="timeout_s must be positive, got 0"):
        SparseAllreduce(TopK(), comm=COMM, timeout_s=0)
    with pytest.raises(ValueError, match="op must be Average or Sum, got 2"):
        SparseAllreduce(TopK(), comm=COMM, op=2)
    with SparseAllreduce(TopK(), comm=COMM) as reduce:
        with pytest.raises(TypeError, match="a: gradient must be an array, got list"):
            reduce.allreduce("a", [1.0])
        with pytest.raises(ValueError, match=r"a: out has shape \(3,\)"):
            reduce.allreduce("a", np.ones(4), out=np.ones(3))
        for array, kind in (
            (np.ones((1, 4)).view(np.matrix), "matrix"),
            (MASKED, "MaskedArr"),
        ):
            with pytest.raises(TypeError, match=f"a: gradient must be .*, got {kind}"):
                reduce.allreduce("a", array)
        with pytest.raises(TypeError, match="a: out must be a plain array, got Masked"):
            reduce.allreduce("a", np.ones(4), out=MASKED)
        with pytest.raises(TypeError, match="names must be str, got 3"):
            reduce.grouped_allreduce({"a": np.ones(4), 3: np.ones(4)})
        more = {"a": np.ones(4), "b": np.ones(4)}
        with pytest.raises(ValueError, match="b: out has it, but there is no such"):
            reduce.grouped_allreduce({"a": np.ones(4)}, more)
        frozen = np.ones(4)
        frozen.flags.writeable = False
        with pytest.raises(ValueError, match="a: out is read-only"):
            reduce.allreduce("a", np.ones(4), out=frozen)


def test_more_elements_than_an_index_can_name_are_refused():
    huge = np.broadcast_to(np.float32(1), (2**31,))
    with (
        SparseAllreduce(TopK(), comm=COMM) as reduce,
        pytest.raises(ValueError, match=r"huge: gradient must have at most 2\*\*31"),
    ):
        reduce.allreduce("huge", huge)


def test_horovods_constants_are_accepted():
    assert hvd_sparse.Average == 0
    assert hvd_sparse.Sum == 1
    with SparseAllreduce(TopK(1.0), comm=COMM, op=1, dense=Never()) as reduce:
        result = reduce.allreduce("a", np.ones(3, np.float32))
    np.testing.assert_array_equal(result, SIZE)


class Careless:
    """A custom sparsifier that does not keep its promise."""

    density = 0.5

    def __init__(self, count, dtype=np.int32, values=np.float32):
        self.count, self.dtype, self.values = count, dtype, values

    def select(self, residual, gradient, k, step):
        residual += gradient
        indices = np.arange(self.count, dtype=self.dtype)
        values = residual[indices]
        residual[indices] = 0
        return Selection(indices, values.astype(self.values), 0)


class Changing(Careless):
    """Another selection than the right one is handed back."""

    def __init__(self, change):
        super().__init__(4)
        self.change = change

    def select(self, residual, gradient, k, step):
        return self.change(super().select(residual, gradient, k, step))


def not_a_number(right):
    right.values[1] = np.nan
    return right


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("sparsifier", "message"),
    [
        (Careless(3), "w: 4 must be selected, got 3"),
        (Careless(4, np.int64), "w: indices must be int32, got int64"),
        (Careless(4, values=np.float64), "w: values must be float32, got float64"),
        (Changing(tuple), "w: select must return a Selection, got tuple"),
        (
            Changing(lambda right: None),
            "w: select must return a Selection, got NoneType",
        ),
        (
            Changing(lambda right: right._replace(values=right.values.tolist())),
            "w: values must be an array, got list",
        ),
        (
            Changing(lambda right: right._replace(indices=right.indices[:, None])),
            r"w: indices must have shape \(k,\), got \(4, 1\)",
        ),
        (Changing(not_a_number), "w: values must be finite"),
    ],
)
def test_a_careless_sparsifier_is_named_and_loses_nothing(sparsifier, message):
    gradient = np.arange(1, 9, dtype=np.float32)
    with SparseAllreduce(sparsifier, comm=COMM, dense=Never(), timeout_s=5) as reduce:
        for times in (1, 2):  # nor is it on its way any more
            with pytest.raises((ValueError, TypeError), match=message):
                reduce.allreduce("w", gradient)
            residual = reduce.state_dict()["tensors"]["w"]["residual"]
            np.testing.assert_array_equal(residual, times * gradient)


@pytest.mark.ranks
def test_a_selection_may_be_a_view_with_gaps():
    def with_gaps(right):
        wide = [np.repeat(array, 2)[::2] for array in (right.indices, right.values)]
        return right._replace(indices=wide[0], values=wide[1])

    gradient = np.arange(1, 9, dtype=np.float32)
    with SparseAllreduce(Changing(with_gaps), comm=COMM, dense=Never()) as reduce:
        mean = reduce.allreduce("w", gradient)
    np.testing.assert_allclose(mean, [1, 2, 3, 4, 0, 0, 0, 0], rtol=1e-6)


class Unordered(Careless):
    """Indices that go astray: only the receiver can tell."""

    def select(self, residual, gradient, k, step):
        selection = super().select(residual, gradient, k, step)
        return selection._replace(indices=np.ascontiguousarray(selection.indices[::-1]))


@pytest.mark.ranks
def test_indices_that_do_not_ascend_are_an_error_and_lose_nothing():
    gradient = np.ones(8, np.float32)
    with SparseAllreduce(Unordered(4), comm=COMM, dense=Never()) as reduce:
        for times in (1, 2):
            with pytest.raises(ValueError, match="indices must ascend"):
                reduce.allreduce("w", gradient)
            residual = reduce.state_dict()["tensors"]["w"]["residual"]
            np.testing.assert_array_equal(residual, times * gradient)


class Astray(Careless):
    """Indices that no tensor of this size has."""

    def select(self, residual, gradient, k, step):
        selection = super().select(residual, gradient, k, step)
        return selection._replace(indices=selection.indices + np.int32(100))


@pytest.mark.ranks
def test_indices_out_of_range_are_an_error_before_anything_moves():
    with SparseAllreduce(Astray(4), comm=COMM, dense=Never(), timeout_s=5) as reduce:
        with pytest.raises(ValueError, match="indices must"):
            reduce.allreduce("w", np.ones(8, np.float32))
        assert reduce.traffic.sent_bytes == 0


@dataclass(frozen=True)
class Shifted(TopK):
    """What inherits from ours is checked like any other."""

    by: int = 100_000_000

    def select(self, residual, gradient, k, step):
        selection = TopK.select(self, residual, gradient, k, step)
        return selection._replace(indices=selection.indices + np.int32(self.by))


class Renamed(TopK):
    """The same, though no dataclass."""

    def select(self, residual, gradient, k, step):
        return Shifted.select(Shifted(self.density), residual, gradient, k, step)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "sparsifier",
    [Shifted(0.5), Shifted(0.5, by=-100_000_000), Renamed(0.5)],
    ids=["above", "below", "no dataclass"],
)
def test_what_inherits_from_ours_is_checked(sparsifier):
    with SparseAllreduce(sparsifier, comm=COMM, dense=Never(), timeout_s=20) as reduce:
        with pytest.raises((ValueError, IndexError), match="indices must"):
            reduce.allreduce("w", np.arange(1, 9, dtype=np.float32))
        assert reduce.traffic.sent_bytes == 0


class Every:
    """Every second element from an offset; no dataclass."""

    density = 0.5
    shared_indices = True

    def __init__(self, offset, **held):
        self.offset = offset
        self.__dict__.update(held)

    def indices(self, n, k, step):
        return np.arange(self.offset, n, 2, dtype=np.int32)[:k]

    def select(self, residual, gradient, k, step):
        residual += gradient
        indices = self.indices(residual.size, k, step)
        values = residual[indices].copy()
        residual[indices] = 0
        return Selection(indices, values, 0)


@several
@pytest.mark.ranks
def test_ranks_agree_on_all_of_a_sparsifier_not_on_its_class():
    expected = r"w: rank \d has configuration Every\(offset=\d\).*, expected Every"
    mine = Every(int(RANK == SIZE - 1))
    with (
        SparseAllreduce(mine, comm=COMM, dense=Never(), timeout_s=20) as reduce,
        pytest.raises(ExchangeError, match=expected),
    ):
        reduce.allreduce("w", np.ones(8, np.float32))


@pytest.mark.ranks
def test_a_sparsifier_may_count_while_it_selects():
    class Counting(Every):
        def select(self, residual, gradient, k, step):
            self.offset += 1 + RANK
            self.offset %= 2
            return TopK(0.5).select(residual, gradient, k, step)

        shared_indices = False

    with SparseAllreduce(Counting(0), comm=COMM, dense=Never()) as reduce:
        for _ in range(3):
            reduce.allreduce("w", np.ones(8, np.float32))


@pytest.mark.ranks
def test_a_sparsifier_that_ranks_can_not_agree_on_is_refused():
    with (
        open(__file__, encoding="utf-8") as file,
        pytest.raises(TypeError, match="sparsifier must be such that ranks can agree"),
    ):
        SparseAllreduce(Every(0, log=file), comm=COMM, timeout_s=20)


@pytest.mark.ranks
def test_a_step_that_is_refused_leaves_all_residuals_as_they_were():
    given = {"a": np.array([4, 1], np.float32), "b": np.ones(3, np.float32)}
    with SparseAllreduce(TopK(0.5), comm=COMM, dense=Never(), timeout_s=20) as reduce:
        reduce.grouped_allreduce(given)
        before = reduce.state_dict()["tensors"]["a"]["residual"]
        for wrong in (np.ones(4, np.float32), [1, 2, 3], np.ones(3)):
            with pytest.raises((TypeError, ValueError), match="b: gradient"):
                reduce.grouped_allreduce({**given, "b": wrong})
        after = reduce.state_dict()["tensors"]["a"]["residual"]
        np.testing.assert_array_equal(after, before)


class Twice(Careless):
    """The same element twice."""

    def select(self, residual, gradient, k, step):
        residual += gradient
        values = residual[[0, 0, 1, 2]]
        residual[[0, 1, 2]] = 0
        return Selection(np.array([0, 0, 1, 2], self.dtype), values, 0)


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32], ids=str)
def test_what_was_selected_twice_is_put_back_once(dtype):
    gradient = np.arange(1, 9, dtype=np.float32)
    with SparseAllreduce(
        Twice(4, np.int32), comm=COMM, dense=Never(), timeout_s=20
    ) as reduce:
        with pytest.raises(ValueError, match="w: "):
            reduce.allreduce("w", gradient)
        residual = reduce.state_dict()["tensors"]["w"]["residual"]
        np.testing.assert_array_equal(residual, gradient)
    with (
        SparseAllreduce(Twice(4, dtype), comm=COMM, dense=Never()) as reduce,
        pytest.raises(ValueError, match="w: "),
    ):
        reduce.allreduce("w", gradient)


@pytest.mark.ranks
@pytest.mark.parametrize("where", ["magic", "first index"])
def test_a_damaged_payload_returns_what_all_tensors_of_its_group_sent(
    where, monkeypatch
):
    mine = {name: np.arange(1, 9, dtype=np.float32) for name in "abc"}
    with SparseAllreduce(TopK(0.5), comm=COMM, dense=Never(), timeout_s=5) as reduce:
        close, write = MpiExchange.close_step, Frame.write

        def damaged(self):
            close(self)
            self.finish(1)[-1].entries[16:20] = 0xEE

        def damaged_magic(self, out):
            write(self, out)
            out[0] ^= RANK == SIZE - 1

        if where == "magic":
            monkeypatch.setattr(Frame, "write", damaged_magic)
            told = f"a: rank {SIZE - 1}: format b'IVSP' version 2, expected b'HVSP'"
        else:
            monkeypatch.setattr(MpiExchange, "close_step", damaged)
            told = "b: "
        with pytest.raises(PayloadError, match=told):
            reduce.grouped_allreduce(mine)
        for name, gradient in mine.items():
            residual = reduce.state_dict()["tensors"][name]["residual"]
            np.testing.assert_array_equal(residual, gradient)
        monkeypatch.undo()
        reduce.grouped_allreduce(mine)


@pytest.mark.ranks
@several
def test_a_rank_that_can_not_construct_is_heard_by_those_who_can():
    if RANK == SIZE - 1:
        with pytest.raises(ValueError, match="op must be Average or Sum, got 2"):
            SparseAllreduce(TopK(), comm=COMM, op=2, timeout_s=5)
        return
    reduce = SparseAllreduce(TopK(), comm=COMM, timeout_s=5)
    with pytest.raises(ExchangeError, match=f"rank {SIZE - 1} raised ValueError: op"):
        reduce.allreduce("a", np.ones(8, np.float32))


@pytest.mark.ranks
@several
def test_a_straggler_is_warned_about_and_awaited(monkeypatch, caplog):
    monkeypatch.setattr(failure, "WARNING_S", 0.2)
    with SparseAllreduce(TopK(0.5), comm=COMM, dense=Never(), timeout_s=20) as reduce:
        reduce.allreduce("late", np.ones(8, np.float32))  # now all are here, compiled
        if RANK == SIZE - 1:
            time.sleep(1)  # this is the fault, not a wait for something
            result = reduce.allreduce("late", np.ones(8, np.float32))
        else:
            result = reduce.allreduce("late", np.ones(8, np.float32))
            (told,) = [r for r in caplog.records if r.name == "hvd_sparse"]
            assert re.match("late: step 1: rank . has waited", told.getMessage())
    assert same_bits({"late": result})


@pytest.mark.ranks
def test_a_measured_cost_is_the_same_on_every_rank_and_serves():
    found = measure(COMM, sizes=(64, 4096, 65536), repeats=3)
    assert agree(repr(found).encode())
    assert len(found.seconds) == 3
    assert all(seconds > 0 for seconds in found.seconds)
    with SparseAllreduce(CAT(TopK(), found.cost), comm=COMM) as reduce:
        assert same_bits(reduce.grouped_allreduce(gradients(0)))
