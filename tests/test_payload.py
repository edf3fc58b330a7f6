"""What one tensor sends: round trips, and how many bytes they take."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import FORMATS, PLAIN, same_bits

from hvd_sparse import Selection
from hvd_sparse.core.formats import Entries
from hvd_sparse.core.indices import KnownIndices, RawIndices
from hvd_sparse.core.payload import (
    DTYPES,
    Header,
    decode,
    encode,
    entry_bytes,
    most_elements,
    payload_bytes,
)
from hvd_sparse.core.values import Float32, Sign

SIGNED = Entries(Sign(), RawIndices())

HEADERS = st.builds(
    Header,
    form=st.sampled_from([*FORMATS.values()]),
    dtype=st.sampled_from(sorted(DTYPES)),
    n=st.integers(200, 2**31 - 1),
    k=st.integers(0, 200),
    step=st.integers(0, 2**63 - 1),
    digest=st.integers(0, 2**64 - 1),
)


def selected(header: Header, nonfinite: int = 0) -> Selection:
    rng = np.random.default_rng(header.k)
    indices = (
        np.sort(rng.choice(header.n, header.k, replace=False))
        if header.n < 2**20
        else None
    )
    if indices is None:
        indices = header.n - np.arange(header.k, 0, -1)
    wide = np.float64 if header.dtype == "float64" else np.float32
    values = rng.normal(size=header.k).astype(wide)
    return Selection(indices.astype(np.int32), values, nonfinite)


def assert_holds(found: Selection, expected: Selection, form: Entries) -> None:
    known = form.indices == KnownIndices()
    indices = expected.indices[:0] if known else expected.indices
    assert found.indices.dtype == np.int32
    assert found.values.dtype == expected.values.dtype
    assert found.indices.tobytes() == indices.tobytes()
    assert found.values.tobytes() == expected.values.tobytes()
    assert found.nonfinite == bool(expected.nonfinite)


@given(HEADERS, st.sampled_from([0, 1, 2, 2**31]))
def test_what_is_decoded_is_what_was_encoded(header: Header, nonfinite: int) -> None:
    selection = selected(header, nonfinite)
    payload, sent = encode(selection, header)
    rounds = header.form.values != Float32()
    assert (sent is selection.values) != rounds
    received = selection._replace(values=sent)
    assert (payload.header, payload.k) == (header, header.k)
    assert_holds(decode(payload), received, header.form)


@given(HEADERS)
def test_sizes_follow_from_k_alone_and_are_multiples_of_8(header: Header) -> None:
    entries_of = encode(selected(header), header)[0].entries
    entries = header.form.bytes(header.k, header.dtype, header.n)
    assert entries_of.dtype == np.uint8
    assert entries_of.size % 8 == 0
    assert 0 <= entries_of.size - entries < 8
    asked = header.form, header.dtype, header.n, header.k
    assert entries_of.size == entry_bytes(*asked) == payload_bytes(*asked) - 32
    assert not entries_of[entries:].any()


def test_the_memory_of_an_old_payload_serves_again() -> None:
    header = Header(PLAIN, "float32", n=100, k=5, step=1, digest=2)
    old, _ = encode(selected(header), header)
    new, _ = encode(selected(header)._replace(nonfinite=1), header, old)
    assert new.entries is old.entries
    assert new.nonfinite
    smaller = header._replace(k=3)
    assert encode(selected(smaller), smaller, old)[0].entries.size == 24


@given(
    st.sampled_from([*FORMATS.values()]),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from([1, 1000, 100_000, 2**31 - 1]),
    st.integers(0, 1_000_000),
)
def test_most_elements_is_the_most_that_fit(
    form: Entries, dtype: str, n: int, size: int
) -> None:
    k = most_elements(form, dtype, n, size)
    assert k < 0 or payload_bytes(form, dtype, n, k) <= size
    assert k < -1 or payload_bytes(form, dtype, n, k + 1) > size
    several = most_elements(form, dtype, n, np.array([size, 0, 2 * size]))
    assert several.tolist() == [k, -1, most_elements(form, dtype, n, 2 * size)]
    assert most_elements(form, dtype, n, np.array([size])).tolist() == [k]


def test_signs_and_their_mean_magnitude_are_what_travels() -> None:
    values = np.array([3.0, -1.0, -0.0, 0.0, -6.0], np.float32)
    selection = Selection(np.array([0, 7, 8, 9, 99], np.int32), values, 0)
    header = Header(SIGNED, "float32", n=100, k=5, step=1, digest=2)
    payload, sent = encode(selection, header)
    assert sent.tolist() == [2, -2, -2, 2, -2]
    assert payload.entries.size == 4 + 4 + 5 * 4 + 4  # scale, bits, indices, to 8
    assert_holds(decode(payload), selection._replace(values=sent), SIGNED)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("place", ["max", "smallest_normal", "smallest_subnormal"])
def test_the_mean_magnitude_is_in_range_where_sums_are_not(
    dtype: type, place: str
) -> None:
    value = getattr(np.finfo(dtype), place)
    for values in (np.array([value, -value, value], dtype), np.empty(0, dtype)):
        indices = np.arange(values.size, dtype=np.int32)
        out = np.empty(SIGNED.bytes(values.size, values.dtype.name, 9), np.uint8)
        same_bits(SIGNED.write(out, indices, values, 9), values)
