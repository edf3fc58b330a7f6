"""Entries in bytes: all kinds of them, written and read, alone and in the hot loops."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import FORMATS, KERNELS, STYLES, VALUES, Kernels, same_bits

from hvd_sparse import EliasFano, Float16, Float32, Int8, PayloadError, RawIndices, Sign
from hvd_sparse.core.formats import Entries
from hvd_sparse.core.indices import KnownIndices
from hvd_sparse.core.values import BFloat16, Int2, Int4, Values
from hvd_sparse.kernels import coding, host, reference
from hvd_sparse.kernels.coding import Coded
from hvd_sparse.kernels.host import threads

WIDE = [np.dtype(np.float32), np.dtype(np.float64)]
TRAVELLING = [f for f in FORMATS.values() if f.indices != KnownIndices()]
INTEGERS = (Int8(), Int4(), Int2())


def entries(n: int, k: int, style: str, dtype: np.dtype, seed: int = 0) -> Any:
    """(k,) ascending indices below n, and as many finite values."""
    rng = np.random.default_rng(seed)
    if n < 1 << 20:
        indices = rng.choice(n, k, replace=False)
    else:
        indices = np.array(sorted({*rng.integers(0, n, k).tolist()}))
    values = STYLES[style](rng, len(indices), dtype).astype(dtype)
    return np.sort(indices).astype(np.int32), values


def written(form: Entries, indices: Any, values: Any, n: int) -> tuple[Coded, Any]:
    """Its bytes at an address that is a multiple of 8, and what a reader gets."""
    k, dtype = values.size, values.dtype.name
    out = np.full(form.bytes(k, dtype, n), 0xEE, np.uint8)
    sent = form.write(out, indices, values, n)
    return form.coded(out, k, dtype, n), sent


CASES = st.tuples(
    st.sampled_from(TRAVELLING),
    st.sampled_from(WIDE),
    st.sampled_from(sorted(STYLES)),
    st.sampled_from([(1, 0), (1, 1), (64, 1), (65, 65), (300, 130), (5000, 64)])
    | st.sampled_from([(5000, 65), (100_000, 129), (2**31 - 1, 40)]),
    st.integers(0, 2**32 - 1),
)


@given(CASES)
def test_what_is_written_is_read_as_the_reference_reads_it(case: Any) -> None:
    form, dtype, style, (n, k), seed = case
    indices, values = entries(n, k, style, dtype, seed)
    coded, sent = written(form, indices, values, n)
    for decode in (host.decode, reference.decode):
        found_indices, found = decode(coded, n, values)
        same_bits(np.asarray(found_indices), indices)
        same_bits(np.asarray(found), sent)


@given(CASES)
def test_rounding_loses_nothing_and_never_goes_beyond(case: Any) -> None:
    form, dtype, style, (n, k), seed = case
    indices, values = entries(n, k, style, dtype, seed)
    _, sent = written(form, indices, values, n)
    assert np.isfinite(sent).all()
    if form.values != Sign():
        with np.errstate(over="ignore"):
            rest = values - sent
        exact = [array.astype(np.longdouble) for array in (rest, sent, values)]
        np.testing.assert_array_equal(exact[0] + exact[1], exact[2])
        assert np.all(np.abs(rest) <= np.abs(values))


@given(
    st.sampled_from(WIDE),
    st.sampled_from(["normal", "layers", "heavy tails", "subnormals", "extremes"]),
    st.integers(0, 2**32 - 1),
)
def test_halves_are_those_of_ieee_under_a_power_of_two(
    dtype: np.dtype, style: str, seed: int
) -> None:
    indices, values = entries(1000, 200, style, dtype, seed)
    _, sent = written(Entries(Float16()), indices, values, 1000)
    largest = np.abs(values.astype(np.longdouble)).max()
    power = np.longdouble(2) ** (15 - np.frexp(largest)[1])
    # from what is near: numpy rounds a longdouble through a double
    halves = (values.astype(np.longdouble) * power).astype(np.float64)
    expected = halves.astype(np.float16).astype(np.longdouble) / power
    beyond = np.abs(expected) > np.finfo(dtype).max
    np.testing.assert_array_equal(sent[~beyond], expected[~beyond].astype(dtype))
    assert np.all(np.abs(sent[beyond]) >= np.abs(values[beyond]) * (1 - 2.0**-11))


@given(st.sampled_from(["normal", "layers", "subnormals"]), st.integers(0, 2**32 - 1))
def test_bfloat16_is_rounded_to_even(style: str, seed: int) -> None:
    indices, values = entries(1000, 200, style, WIDE[0], seed)
    _, sent = written(Entries(BFloat16()), indices, values, 1000)
    same_bits(sent, values.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("values", [*INTEGERS, Float16(), BFloat16()], ids=repr)
def test_errors_are_those_that_are_told(values: Values, dtype: np.dtype) -> None:
    indices, given = entries(100_000, 1000, "heavy tails", dtype)
    _, sent = written(Entries(values), indices, given, 100_000)
    for chunk in range(0, 1000, coding.CHUNK):
        part = slice(chunk, chunk + coding.CHUNK)
        error, size = np.abs(given[part] - sent[part]), np.abs(given[part])
        if values in (Int8(), Int4()):
            most = {Int8(): 127, Int4(): 7}[values]
            step = size.max() / most  # but for the scale, of few bits
            assert error.max() <= step / 2 * (1 + 2.0**-4)
        elif values == Int2():
            magnitudes = np.unique(np.abs(sent[part]))
            assert magnitudes.size <= 2
            assert magnitudes.max() == pytest.approx(size.mean(), rel=2.0**-4)
        else:
            bits = {Float16(): 11, BFloat16(): 8}[values]
            assert np.all(error <= size * 2.0**-bits)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("values", VALUES, ids=repr)
def test_the_largest_and_the_least_floats_travel(
    values: Values, dtype: np.dtype
) -> None:
    info = np.finfo(dtype)
    for value in (info.max, info.smallest_normal, info.smallest_subnormal):
        given = np.array([value, -value, 0, -0.0], dtype)
        _, sent = written(Entries(values), np.arange(4, dtype=np.int32), given, 9)
        assert np.isfinite(sent).all()
        if values in (Float32(), Float16(), Int8()):
            assert np.all(np.abs(sent[:2]) >= value / 2)


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS.keys())
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("form", FORMATS.values(), ids=repr)
def test_sums_of_coded_entries_are_those_of_their_arrays(
    form: Entries, dtype: str, kernels: Kernels
) -> None:
    n, wide = 40_000, np.dtype("float64" if dtype == "float64" else "float32")
    parts, arrays = [], []
    for rank, k in enumerate((700, 0, 1)):
        indices, values = entries(n, k, "normal", wide, rank)
        coded, sent = written(form, indices, values, n)
        known = form.indices == KnownIndices()
        parts.append(coded._replace(indices=indices) if known else coded)
        arrays.append((indices, sent))
    expected, found = np.full(n, 7, dtype), kernels.array(np.full(n, 7, dtype))
    reference.aggregate(expected, arrays, 1 / 3)
    kernels.module.aggregate_coded(found, parts, 1 / 3)
    same_bits(found, expected)


@pytest.mark.parametrize("form", FORMATS.values(), ids=repr)
def test_several_threads_find_their_entries(
    form: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each begins in the middle of the payloads, in every place of a byte."""
    monkeypatch.setattr(threads, "SMALLEST_PART", 1 << 10)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    n = 100_000
    for seed, k in enumerate((1, 9, 500, 30_000, 99_999, 100_000)):
        indices, values = entries(n, k, "normal", WIDE[0], seed)
        coded, sent = written(form, indices, values, n)
        if form.indices == KnownIndices():
            coded = coded._replace(indices=indices)
        expected, found = np.zeros(n, np.float32), np.empty(n, np.float32)
        reference.aggregate(expected, [(indices, sent)], 1.0)
        host.aggregate_coded(found, [coded], 1.0)
        same_bits(found, expected)


def test_elias_fano_takes_the_bits_that_are_told() -> None:
    """At most 1.06 x what there must be, log2 of n over k, from a thousand on."""
    n = 25_600_000
    for k in (25_600, 256_000):
        least = sum(np.log2((n - i) / (k - i)) for i in range(k))
        assert 8 * EliasFano().bytes(k, n) <= 1.06 * least
        assert RawIndices().bytes(k, n) == 4 * k


def test_raw_indices_travel_where_they_are_smaller() -> None:
    n = 2**31 - 1
    form = Entries(Float32())
    assert EliasFano().bytes(1, n) == 4
    places = form.places(1, "float32", n)
    assert (places.index_kind, places.size) == (coding.RAW, 8)
    assert form.places(100, "float32", n).index_kind == coding.ELIAS_FANO


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS.keys())
@pytest.mark.parametrize("byte", [0, 0xFF])
def test_indices_that_are_damaged_are_refused(byte: int, kernels: Kernels) -> None:
    """None at all, or all the same."""
    indices, values = entries(1000, 30, "normal", WIDE[0])
    coded, _ = written(Entries(Float32()), indices, values, 1000)
    coded.indices[:] = byte
    out = kernels.array(np.empty(1000, np.float32))
    with pytest.raises(ValueError, match=r"indices must ascend in \[0, 1000\)"):
        kernels.module.aggregate_coded(out, [coded], 1.0)


def test_too_few_indices_are_found_out_as_they_are_read() -> None:
    form = Entries(Float32())
    data = np.zeros(form.bytes(30, "float32", 1000), np.uint8)
    with pytest.raises(PayloadError, match=r"indices must ascend in .*, 30 of 30 do"):
        form.read(data, 30, "float32", 1000)
