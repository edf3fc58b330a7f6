"""The hot loops against plain numpy, and what threads, forks and processors change."""

import multiprocessing
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import (
    DTYPES,
    KERNELS,
    SAMPLED_SHAPES,
    Kernels,
    Kind,
    as_numpy,
    as_torch,
    bits,
    kinds,
    same_bits,
    wide,
)

from hvd_sparse.kernels import host, kernels_for, reference
from hvd_sparse.kernels.coding import FLOAT, RAW, plain
from hvd_sparse.kernels.host import selection, threads, zeros
from hvd_sparse.kernels.host.entries import row_of
from hvd_sparse.kernels.host.simd import LANES
from hvd_sparse.kernels.host.workspace import reserve

NOT_FINITE = [np.nan, np.inf, -np.inf]
FLAT = [(0,), (1,), (2,), (15,), (16,), (17,), (33,), (257,), (4096,), (4097,), (9973,)]
STATM = Path("/proc/self/statm")  # its second number: pages of memory in use
BOUNDS = [1e-300, 1e-3, 0.5, 1.5, 3.0, 1e30]


@pytest.fixture(params=["host", "device"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Those that must give the bits of the reference."""
    return KERNELS[request.param]


def flat_kinds() -> st.SearchStrategy[Kind]:
    return kinds(shapes=FLAT, layouts=["contiguous", "read-only"])


def residual_and_gradient(
    kind: Kind, dtype: np.dtype, wrong: int
) -> tuple[np.ndarray, np.ndarray]:
    """A residual of earlier steps, and a gradient with some elements not finite."""
    residual = kind.make(wide(dtype), 0).copy()
    gradient = kind.make(dtype, 1)
    if wrong and gradient.size:
        gradient = gradient.copy()
        rng = np.random.default_rng(kind.seed)
        gradient[rng.integers(gradient.size, size=wrong)] = rng.choice(
            NOT_FINITE, wrong
        )
    return residual, gradient


def assert_as_reference(
    kernels: Kernels,
    function: str,
    residual: np.ndarray,
    gradient: np.ndarray,
    *options: Any,
) -> None:
    expected_residual = residual.copy()
    expected = getattr(reference, function)(expected_residual, gradient, *options)
    changed = kernels.array(residual.copy())
    select = getattr(kernels.module, function)
    indices, values, nonfinite = select(changed, kernels.array(gradient), *options)
    same_bits(indices, expected[0])
    same_bits(values, expected[1])
    assert nonfinite == expected[2]
    same_bits(changed, expected_residual)
    changed, spent = kernels.array(residual.copy()), kernels.array(gradient.copy())
    again = select(changed, spent, *options, out=spent)
    same_bits(again[0], expected[0])
    same_bits(again[1], expected[1])
    same_bits(changed, expected_residual)
    same_bits(spent, np.zeros_like(gradient))


# ------------------------------------------------------------- against the reference


@given(kind=flat_kinds(), share=st.floats(0, 1), wrong=st.integers(0, 3))
def test_select_top_is_the_references(
    kernels: Kernels, dtype: np.dtype, kind: Kind, share: float, wrong: int
) -> None:
    residual, gradient = residual_and_gradient(kind, dtype, wrong)
    k = round(share * gradient.size)
    assert_as_reference(kernels, "select_top", residual, gradient, k)


@given(
    kind=flat_kinds(),
    bound=st.sampled_from(BOUNDS),
    share=st.floats(0, 1),
    wrong=st.integers(0, 3),
)
def test_select_above_is_the_references(
    kernels: Kernels,
    dtype: np.dtype,
    kind: Kind,
    bound: float,
    share: float,
    wrong: int,
) -> None:
    residual, gradient = residual_and_gradient(kind, dtype, wrong)
    limit = round(share * gradient.size)
    assert_as_reference(kernels, "select_above", residual, gradient, bound, limit)


@given(kind=flat_kinds(), share=st.floats(0, 1), wrong=st.integers(0, 3))
def test_select_at_is_the_references(
    kernels: Kernels, dtype: np.dtype, kind: Kind, share: float, wrong: int
) -> None:
    residual, gradient = residual_and_gradient(kind, dtype, wrong)
    k = round(share * gradient.size)
    indices = reference.random_indices(gradient.size, k, kind.seed)
    assert_as_reference(kernels, "select_at", residual, gradient, indices)


@given(kind=flat_kinds(), share=st.floats(0, 1), wrong=st.integers(0, 3))
def test_what_is_selected_roughly_is_the_largest_and_enough(
    kernels: Kernels, dtype: np.dtype, kind: Kind, share: float, wrong: int
) -> None:
    residual, gradient = residual_and_gradient(kind, dtype, wrong)
    k, module = round(share * residual.size), kernels.module
    total, nothing = residual.copy(), np.array([-0.0], dtype)
    nonfinite = reference.select_top(total, gradient, 0)[2]
    for add in (True, False):
        changed = kernels.array(residual.copy() if add else total.copy())
        if add:
            spent = kernels.array(gradient.copy())
            found = module.select_some(changed, spent, k, out=spent)
            assert found[2] == nonfinite
            same_bits(spent, np.zeros_like(gradient))
        else:
            found = module.select_again(changed, k)
        expected = total.copy()
        count = found[0].shape[0]
        assert k <= count <= 2 * k + 5000
        assert_all_same(
            (*found[:2], changed),
            (*reference.select_top(expected, nothing, count)[:2], expected),
        )


def assert_all_same(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        same_bits(one, other)


@given(kind=flat_kinds(), share=st.floats(0, 1), kept=st.floats(0, 1))
def test_keep_largest_is_the_references(
    kernels: Kernels, dtype: np.dtype, kind: Kind, share: float, kept: float
) -> None:
    residual, gradient = residual_and_gradient(kind, dtype, wrong=0)
    k = round(share * residual.size)
    expected, changed = residual.copy(), kernels.array(residual.copy())
    indices, values, _ = reference.select_top(expected, gradient, k)
    wanted = reference.keep_largest(expected, indices, values, round(kept * k))
    module = kernels.module
    indices, values, _ = module.select_top(changed, kernels.array(gradient), k)
    found = module.keep_largest(changed, indices, values, round(kept * k))
    assert_all_same((*found, changed), (*wanted, expected))


@given(kind=flat_kinds(), wrong=st.integers(0, 3))
def test_magnitudes_are_counted_as_the_reference_does(
    kernels: Kernels, dtype: np.dtype, kind: Kind, wrong: int
) -> None:
    residual, gradient = residual_and_gradient(kind, dtype, wrong)
    here = kernels.array(residual.copy())
    same_bits(
        kernels.module.count_sums(here, kernels.array(gradient)),
        reference.count_sums(residual, gradient),
    )
    same_bits(here, residual)
    counted = kernels.module.count_magnitudes(here)
    same_bits(counted, reference.count_magnitudes(residual))
    assert counted.sum() == residual.size


@given(kind=flat_kinds())
def test_magnitudes_and_norms_are_the_references(
    kernels: Kernels, dtype: np.dtype, kind: Kind
) -> None:
    values = kind.make(wide(dtype), 0).copy()
    here = kernels.array(values)
    same_bits(kernels.module.largest_first(here), reference.largest_first(values))
    # n additions in another order: each rounds by half an eps of float64
    rounding = values.size * np.finfo(np.float64).eps
    assert kernels.module.norm(here) == pytest.approx(
        reference.norm(values), rel=rounding + 1e-15
    )


@given(
    kind=flat_kinds(),
    wrong=st.integers(0, 3),
    rate=st.sampled_from([0.0, "least", 1e-3, 0.3, 1.0, 1e30, "most"]),
    seed=st.integers(0, 2**64 - 1),
)
def test_draw_is_the_references(
    kernels: Kernels,
    dtype: np.dtype,
    kind: Kind,
    wrong: int,
    rate: float | str,
    seed: int,
) -> None:
    residual, gradient = residual_and_gradient(kind, dtype, wrong)
    most = float(np.finfo(residual.dtype).max)  # the limits of Stochastic.draw
    rate = {"least": 1024 / most, "most": most}.get(rate, rate)
    expected, changed = residual.copy(), kernels.array(residual.copy())
    wanted = reference.draw(expected, gradient, rate, seed)
    found = kernels.module.draw(changed, kernels.array(gradient), rate, seed)
    assert_all_same((*found[:2], changed), (*wanted[:2], expected))
    assert found[2] == wanted[2]


@given(kind=flat_kinds(), share=st.floats(0, 1))
def test_add_at_is_the_references(
    kernels: Kernels, dtype: np.dtype, kind: Kind, share: float
) -> None:
    residual = kind.make(wide(dtype), 0).copy()
    k = round(share * residual.size)
    indices = reference.random_indices(residual.size, k, kind.seed)
    values = kind.make(wide(dtype), 1)[:k]
    expected, changed = residual.copy(), kernels.array(residual.copy())
    reference.add_at(expected, indices, values)
    kernels.module.add_at(changed, kernels.array(indices), kernels.array(values))
    same_bits(changed, expected)


@pytest.mark.parametrize("index", [-9, -1, 8, 2**31 - 1, -(2**31)])
def test_add_at_refuses_an_index_from_the_wire_before_it_writes(
    kernels: Kernels, index: int
) -> None:
    residual = kernels.array(np.ones(8, np.float32))
    indices = np.array([0, index], np.int32)
    with pytest.raises(IndexError, match=r"indices must be in \[0, 8\)"):
        kernels.module.add_at(residual, indices, np.ones(2, np.float32))
    same_bits(residual, np.ones(8, np.float32))


@given(
    kind=flat_kinds(),
    counts=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    scale=st.sampled_from([1.0, 1 / 2, 1 / 3, 1 / 7]),
)
def test_aggregate_is_the_references(
    kernels: Kernels, dtype: np.dtype, kind: Kind, counts: list[float], scale: float
) -> None:
    payloads = payloads_of(kind, dtype, counts)
    expected = np.full(kind.shape, 7).astype(dtype)
    found = kernels.array(expected.copy())
    reference.aggregate(expected, payloads, scale)
    kernels.module.aggregate(found, payloads, scale)
    same_bits(found, expected)
    cleared = kernels.array(np.zeros_like(expected))
    kernels.module.aggregate(cleared, payloads, scale, cleared=True)
    same_bits(cleared, expected)


def payloads_of(
    kind: Kind, dtype: np.dtype, shares: list[float]
) -> list[tuple[np.ndarray, np.ndarray]]:
    (n,) = kind.shape
    payloads = []
    for rank, share in enumerate(shares):
        indices = reference.random_indices(n, round(share * n), kind.seed + rank)
        values = kind.make(wide(dtype), rank)[: indices.size].copy()
        payloads.append((indices, values))
    return payloads


@pytest.mark.parametrize("chunks", [1, 2, 17])
def test_aggregate_is_the_references_beyond_one_chunk(
    kernels: Kernels, dtype: np.dtype, chunks: int
) -> None:
    kind = Kind((chunks * (1 << 14) + 5,), "normal", "contiguous", 1)
    payloads = payloads_of(kind, dtype, [0.01, 0.0, 0.2])
    expected = np.full(kind.shape, 7).astype(dtype)
    found = kernels.array(expected.copy())
    reference.aggregate(expected, payloads, 1 / 3)
    kernels.module.aggregate(found, payloads, 1 / 3)
    same_bits(found, expected)
    cleared = kernels.array(np.zeros_like(expected))
    kernels.module.aggregate(cleared, payloads, 1 / 3, cleared=True)
    same_bits(cleared, expected)


@pytest.mark.parametrize("part", ["a part of its own", "one in a group"])
@pytest.mark.parametrize("first", [0, 1, 15, 16, 17])
@pytest.mark.parametrize("size", [0, 1, 16, 33, 1000, 40001])
def test_zeros_that_are_streamed_are_the_references_and_stay_inside(
    dtype: np.dtype,
    size: int,
    first: int,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if dtype.itemsize == 2 and part == "one in a group":
        return  # groups are of wide gradients
    monkeypatch.setattr(zeros, "_BEYOND_CACHE", -1)
    payloads = payloads_of(
        Kind((size,), "normal", "contiguous", 1), dtype, [0.01, 0, 0.005]
    )
    around = np.full(size + 40, 7).astype(dtype)
    expected, out = around.copy(), around[first : first + size]
    reference.aggregate(expected[first : first + size], payloads, 1 / 3)
    if part == "one in a group":
        table = [row_of(plain(*payload)) for payload in payloads]
        others = [np.full(5, 7, dtype), out, np.full(6, 7, dtype)]
        nothing = [[0, 0, 0, RAW, FLOAT]] * len(table)
        tables = np.array([nothing, table, nothing])
        assert host.aggregate_group(others, tables, 1 / 3) == -1
        assert not others[0].any()
        assert not others[2].any()
    else:
        host.aggregate(out, payloads, 1 / 3)
    same_bits(around, expected)


def test_large_results_of_few_entries_are_streamed_by_several_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zeros, "_BEYOND_CACHE", 1 << 20)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    size = 3 * threads.SMALLEST_PART + 7
    assert len(threads.parts(size, LANES)) == 3
    assert zeros.are_streamed(size, 4, size // 100)
    kind = Kind((size,), "normal", "contiguous", 1)
    payloads = payloads_of(kind, np.dtype(np.float32), [0.005, 0.001])
    expected, out = np.full((2, size), 7, np.float32)
    reference.aggregate(expected, payloads, 0.5)
    host.aggregate(out, payloads, 0.5)
    same_bits(out, expected)


def test_a_group_leaves_its_gradients_as_they_are() -> None:
    gradients = [np.arange(1.0, n + 1, dtype=np.float32) for n in (3, 50, 5000)]
    residuals = [np.zeros_like(gradient) for gradient in gradients]
    room = [(np.empty(2, np.int32), np.empty(2, np.float32)) for _ in gradients]
    table = np.array([row_of(plain(*each)) for each in room])
    host.select_group(residuals, gradients, table)
    for gradient, (indices, values) in zip(gradients, room, strict=True):
        same_bits(gradient, np.arange(1.0, gradient.size + 1, dtype=np.float32))
        assert indices.tolist() == [gradient.size - 2, gradient.size - 1]
        assert values.tolist() == [gradient.size - 1, gradient.size]


def test_sums_that_overflow_are_handed_back_as_they_are(
    kernels: Kernels, dtype: np.dtype
) -> None:
    most = np.finfo(wide(dtype)).max
    indices = np.arange(3, dtype=np.int32)
    values = np.array([[most, most, 1], [most, -most, 1]], wide(dtype))
    found = kernels.array(np.zeros(4, dtype))
    kernels.module.aggregate(found, [(indices, row) for row in values], 1.0)
    expected = np.array([np.inf, 0, 2, 0]).astype(dtype)
    same_bits(found, expected)


@given(st.integers(1, 10_000), st.floats(0, 1), st.integers(0, 2**64 - 1))
def test_random_indices_are_the_references(
    kernels: Kernels, n: int, share: float, seed: int
) -> None:
    k = round(share * n)
    found = kernels.module.random_indices(n, k, seed)
    same_bits(found, reference.random_indices(n, k, seed))


@pytest.mark.parametrize("n", [2**31 - 1, 2**30, 2**30 + 1])
def test_random_indices_of_the_largest_tensors_are_the_references(n: int) -> None:
    found = host.random_indices(n, 1000, 5)
    same_bits(found, reference.random_indices(n, 1000, 5))
    assert found.min() >= 0
    assert np.unique(found).size == 1000


@pytest.mark.parametrize("estimate", [0.0, 1e-3, 1.0, 2.5, np.inf], ids=str)
@pytest.mark.parametrize("style", ["normal", "few values", "one flat tie"])
@pytest.mark.parametrize("k", [1, 5000, 20_000])
@pytest.mark.parametrize("parted", [False, True], ids=["whole", "parts"])
def test_the_estimate_decides_the_time_and_never_the_result(
    dtype: np.dtype,
    monkeypatch: pytest.MonkeyPatch,
    many_parts: None,
    parted: bool,
    estimate: float,
    style: str,
    k: int,
) -> None:
    if not parted:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
    value = wide(dtype).type(estimate)

    def anything(residual: Any, gradient: Any, stride: int, k: int, wide: int) -> Any:
        return value if wide < residual.size else type(value)(0)  # the last resort

    monkeypatch.setattr(selection, "estimate_bound", anything)
    if not parted:  # what is compiled would not look it up
        at_once = selection.select_at_once.py_func
        monkeypatch.setattr(selection, "select_at_once", at_once)
    kind = Kind((20_000,), style, "contiguous", 2)
    residual, gradient = residual_and_gradient(kind, dtype, wrong=3)
    assert_as_reference(KERNELS["host"], "select_top", residual, gradient, k)


@pytest.mark.skipif(not STATM.exists(), reason="needs Linux's /proc/self/statm")
def test_room_for_candidates_becomes_memory_only_where_it_is_used() -> None:
    room = reserve(16 << 20, np.float32)
    before = int(STATM.read_text().split()[1])
    room[:: 1 << 19] = 1  # one in each 2 MiB, a huge page
    pages = int(STATM.read_text().split()[1]) - before
    assert pages < 512  # the 32 that were touched, and what else happened meanwhile


# ------------------------------------------------------------- what arrives damaged


def assert_refused(kernels: Kernels, dtype: np.dtype, indices: list[int]) -> None:
    """And nothing is written outside of out."""
    memory = np.full(10 + 2 * 64, 7).astype(dtype)
    before = memory.copy()
    out = kernels.array(memory)[64:-64]
    good = (np.array([1, 4], np.int32), np.ones(2, wide(dtype)))
    bad = (np.array(indices, np.int32), np.ones(len(indices), wide(dtype)))
    with pytest.raises(ValueError, match=r"indices must ascend in \[0, 10\)"):
        kernels.module.aggregate(out, [good, bad], 1.0)
    same_bits(memory[:64], before[:64])
    same_bits(memory[-64:], before[-64:])


@pytest.mark.parametrize(
    "indices",
    [[-1], [-1, 0], [-(2**31), 3], [10], [0, 9, 10], [2**31 - 1], [5, 2**31 - 1, 6]],
    ids=str,
)
def test_aggregate_refuses_indices_out_of_range(
    kernels: Kernels, dtype: np.dtype, indices: list[int]
) -> None:
    assert_refused(kernels, dtype, indices)


@pytest.mark.parametrize(
    "indices", [[0, 0], [3, 2], [0, 1, 2, 1, 3], [9, 0, 1, 2]], ids=str
)
def test_aggregate_refuses_indices_that_do_not_ascend(
    kernels: Kernels, dtype: np.dtype, indices: list[int]
) -> None:
    assert_refused(kernels, dtype, indices)


def test_aggregate_refuses_an_index_of_another_part(
    dtype: np.dtype, many_parts: None
) -> None:
    n = 100_000
    indices = np.array([10, 60_000, 20], np.int32)
    with pytest.raises(ValueError, match="indices must ascend"):
        host.aggregate(
            np.empty(n, dtype), [(indices, np.ones(3, wide(dtype)))], scale=1.0
        )


# ------------------------------------------------------------- threads and processes


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads, for tensors that would not be worth it."""
    monkeypatch.setattr(threads, "SMALLEST_PART", 1 << 10)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")


# three chunks of the aggregation and more, so that it is cut as well
SPLIT = Kind((60_007,), "Laplace", "contiguous", 9)


def everything(kind: Kind, dtype: np.dtype) -> list[bytes]:
    """The bits of all that the kernels make of a gradient."""
    residual, gradient = residual_and_gradient(kind, dtype, wrong=5)
    (n,) = kind.shape
    made: list[Any] = []
    for k in (0, 60, 600, n // 2, n):
        made += [*host.select_top(residual, gradient, k)[:2], residual.copy()]
        made += [*host.select_above(residual, gradient, 1.0, k)[:2], residual.copy()]
        made += [*host.select_again(residual, k), residual.copy()]
        made += [host.count_sums(residual, gradient)]
        cleared = residual.copy()
        made += [*host.draw(cleared, gradient, k / n, 3)[:2], cleared]
        indices = host.random_indices(n, k, 3)
        made += [*host.select_at(residual, gradient, indices)[:2], residual.copy()]
        out = np.empty(n, dtype)
        host.aggregate(out, payloads_of(kind, dtype, [0.001, 0.5, k / n]), 1 / 3)
        made.append(out)
    return [bits(array).tobytes() for array in made]


@pytest.mark.parametrize("style", ["Laplace", "one flat tie", "ascending", "zeros"])
def test_any_number_of_threads_gives_the_same_bits(
    dtype: np.dtype, many_parts: None, monkeypatch: pytest.MonkeyPatch, style: str
) -> None:
    kind = SPLIT._replace(style=style)
    results = []
    for count in (1, 2, 3, 4):
        monkeypatch.setenv("OMP_NUM_THREADS", str(count))
        assert len(threads.parts(SPLIT.shape[0], 16)) == count
        results.append(everything(kind, dtype))
    assert all(result == results[0] for result in results)


def test_with_many_threads_the_bits_are_the_references(
    dtype: np.dtype, many_parts: None
) -> None:
    residual, gradient = residual_and_gradient(SPLIT, dtype, wrong=5)
    for k in (60, 600, 30_000):
        assert_as_reference(KERNELS["host"], "select_top", residual, gradient, k)
        assert_as_reference(KERNELS["host"], "select_above", residual, gradient, 1.0, k)


def test_kernels_can_be_called_from_four_threads_at_once(
    dtype: np.dtype, many_parts: None
) -> None:
    jobs = [SPLIT._replace(seed=seed) for seed in range(8)]
    expected = [everything(kind, dtype) for kind in jobs]
    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(lambda kind: everything(kind, dtype), jobs))
    assert found == expected


def test_kernels_work_in_a_forked_worker_after_the_pool_was_used(
    dtype: np.dtype, many_parts: None
) -> None:
    expected = everything(SPLIT, dtype)
    assert threads._pool.cache_info().currsize > 0
    context = multiprocessing.get_context("fork")  # as data loaders do
    mine, theirs = context.Pipe(duplex=False)
    worker = context.Process(target=lambda: theirs.send(everything(SPLIT, dtype)))
    worker.start()
    theirs.close()
    try:
        assert mine.poll(60), "the worker hangs"
        assert mine.recv() == expected
        worker.join(60)
        assert worker.exitcode == 0
    finally:
        worker.kill()
        worker.join()
        mine.close()
    assert everything(SPLIT, dtype) == expected  # and here the pool still works


def digest_of_everything() -> str:
    made = [everything(SPLIT, dtype) for dtype in DTYPES.values()]
    return blake2b(b"".join(b"".join(result) for result in made)).hexdigest()


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="needs an x86-64 processor to be plain"
)
def test_a_plain_processor_gives_the_same_bits() -> None:
    script = (
        "from numba.core import config; assert config.CPU_NAME == 'x86-64'; "
        "import test_kernels; print(test_kernels.digest_of_everything())"
    )
    plain = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **plain, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,  # the first run compiles
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == digest_of_everything()


@pytest.mark.parametrize(
    ("asked", "expected"), [("1", 1), ("3", 3), ("4,2", 4), ("64", 64)]
)
def test_omp_num_threads_decides(
    monkeypatch: pytest.MonkeyPatch, asked: str, expected: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads.thread_count() == expected


@pytest.mark.parametrize("asked", ["", "0", "-1", "many"])
def test_else_ranks_of_a_host_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    for name in threads._LOCAL_SIZE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    assert threads.thread_count() == 12
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "5")
    assert threads.thread_count() == 2
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "50")
    assert threads.thread_count() == 1


@given(
    size=st.integers(0, 10_000), count=st.integers(1, 70), alignment=st.integers(1, 99)
)
def test_parts_cover_a_tensor_once_at_aligned_cuts(
    monkeypatch: pytest.MonkeyPatch, size: int, count: int, alignment: int
) -> None:
    monkeypatch.setattr(threads, "SMALLEST_PART", 100)
    monkeypatch.setenv("OMP_NUM_THREADS", str(count))
    cuts = threads.parts(size, alignment)
    assert cuts[0][0] == 0
    assert cuts[-1][1] == size
    assert len(cuts) <= count
    for (_, stop), (first, _) in pairwise(cuts):
        assert stop == first
        assert first % alignment == 0


# ------------------------------------------------------------- kinds of arrays


def test_torch_tensors_in_host_memory_are_viewed_not_copied(dtype: np.dtype) -> None:
    from hvd_sparse.torch.states import viewed

    tensor = as_torch(np.arange(6).astype(dtype).reshape(2, 3))
    view = viewed(tensor)
    assert kernels_for(view) is host
    assert view.dtype == dtype
    assert view.__array_interface__["data"][0] == tensor.data_ptr()
    view[1, 2] = 9
    assert tensor[1, 2] == 9


def test_each_kind_of_array_finds_its_kernels() -> None:
    assert kernels_for(np.empty(1)) is host
    assert kernels_for(torch.empty(1)) is KERNELS["device"].module


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), *SAMPLED_SHAPES])
def test_a_residual_starts_as_wide_flat_zeros(
    dtype: np.dtype, shape: tuple[int, ...]
) -> None:
    for kind in KERNELS.values():
        residual = kind.module.zeros_like(kind.array(np.ones(shape, dtype)))
        same_bits(residual, np.zeros(int(np.prod(shape)), wide(dtype)))
        assert as_numpy(residual).flags.c_contiguous


def test_a_user_who_may_write_nowhere_can_import_the_kernels() -> None:
    script = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import numpy as np\n"
        "from hvd_sparse.kernels import host\n"
        "host.add_at(np.zeros(3), np.array([1], np.int32), np.ones(1))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
