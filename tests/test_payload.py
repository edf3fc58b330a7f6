"""What travels: round trips, bytes that never change, and damage that is noticed."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_sparse import PayloadError, Selection
from hvd_sparse.core.contracts import Format
from hvd_sparse.core.formats import FORMATS, Float32, Sign, ValuesOnly, mean_magnitude
from hvd_sparse.core.payload import (
    DTYPES,
    HEADER_BYTES,
    Header,
    decode,
    encode,
    encode_error,
    most_elements,
    padded_bytes,
    payload_bytes,
    split,
)

# payloads as release 0.1.0 wrote them, in hex, each with what it holds; never rewritten
FIXTURES = [
    stored
    for name in ("payload-v1.json", "payload-v1-signs.json")
    for stored in json.loads((Path(__file__).parent / "fixtures" / name).read_text())
]

HEADERS = st.builds(
    Header,
    layout=st.sampled_from([*FORMATS]),
    dtype=st.sampled_from(sorted(DTYPES)),
    n=st.integers(200, 2**31 - 1),
    k=st.integers(0, 200),
    step=st.integers(0, 2**63 - 1),
    digest=st.integers(0, 2**64 - 1),
)


def selected(header: Header, nonfinite: int = 0) -> Selection:
    rng = np.random.default_rng(header.k)
    indices = np.sort(rng.choice(header.n, header.k)) if header.n < 2**20 else None
    if indices is None:
        indices = header.n - np.arange(header.k, 0, -1)
    wide = np.float64 if header.dtype == "float64" else np.float32
    values = rng.normal(size=header.k).astype(wide)
    return Selection(indices.astype(np.int32), values, nonfinite)


def assert_holds(found: Selection, expected: Selection, layout: int) -> None:
    indices = expected.indices[:0] if layout == ValuesOnly.layout else expected.indices
    assert found.indices.dtype == np.int32
    assert found.values.dtype == expected.values.dtype
    assert found.indices.tobytes() == indices.tobytes()
    assert found.values.tobytes() == expected.values.tobytes()
    assert found.nonfinite == bool(expected.nonfinite)


@given(HEADERS, st.sampled_from([0, 1, 2, 2**31]))
def test_what_is_decoded_is_what_was_encoded(header: Header, nonfinite: int) -> None:
    selection = selected(header, nonfinite)
    buffer, sent = encode(selection, header)
    assert (sent is selection.values) == (header.layout != Sign.layout)  # else rounded
    received = selection._replace(values=sent)
    assert_holds(decode(buffer, header), received, header.layout)


@given(HEADERS)
def test_sizes_follow_from_k_alone_and_are_multiples_of_8(header: Header) -> None:
    buffer, _ = encode(selected(header), header)
    value = 8 if header.dtype == "float64" else 4
    entries = {
        Float32.layout: header.k * (value + 4),
        ValuesOnly.layout: header.k * value,
        Sign.layout: value + header.k * 4,
    }[header.layout]
    assert HEADER_BYTES == 32
    assert buffer.dtype == np.uint8
    assert buffer.size % 8 == 0
    assert 0 <= buffer.size - 32 - entries < 8
    assert buffer.size == payload_bytes(FORMATS[header.layout], header.dtype, header.k)
    assert not buffer[32 + entries :].any()


@given(HEADERS)
def test_payloads_can_follow_each_other(header: Header) -> None:
    selection = selected(header)
    buffer, sent = encode(selection, header)
    received = selection._replace(values=sent)
    for part in split(np.concatenate([buffer, buffer]), padded=False):
        assert_holds(decode(part, header), received, header.layout)


@given(HEADERS, st.integers(0, 200))
def test_a_rank_that_chooses_its_own_k_may_send_less(header: Header, less: int) -> None:
    smaller = header._replace(k=min(header.k, less))
    selection = selected(smaller)
    buffer, sent = encode(selection, header)
    received = selection._replace(values=sent)
    assert_holds(decode(buffer, header, varies=True), received, header.layout)


@given(
    st.sampled_from([*FORMATS.values()]),
    st.sampled_from(sorted(DTYPES)),
    st.integers(0, 10_000),
)
def test_most_elements_is_the_most_that_fit(
    form: Format, dtype: str, size: int
) -> None:
    k = most_elements(form, dtype, size)
    assert k < 0 or payload_bytes(form, dtype, k) <= size
    assert k < -1 or payload_bytes(form, dtype, k + 1) > size


def test_signs_and_their_mean_magnitude_are_what_travels() -> None:
    values = np.array([3.0, -1.0, -0.0, 0.0, -6.0], np.float32)
    selection = Selection(np.array([0, 7, 8, 9, 99], np.int32), values, 0)
    header = Header(Sign.layout, "float32", n=100, k=5, step=1, digest=2)
    buffer, sent = encode(selection, header)
    assert sent.tolist() == [2, -2, -2, 2, -2]
    assert buffer.size == 32 + 4 + 5 * 4
    assert_holds(decode(buffer, header), selection._replace(values=sent), Sign.layout)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("place", ["max", "smallest_normal", "smallest_subnormal"])
def test_the_mean_magnitude_is_in_range_where_sums_are_not(
    dtype: type, place: str
) -> None:
    value = getattr(np.finfo(dtype), place)
    assert mean_magnitude(np.array([value, -value, value], dtype)) == value
    assert mean_magnitude(np.empty(0, dtype)) == 0


def test_more_than_may_be_chosen_is_refused() -> None:
    header = Header(Float32.layout, "float32", 100, 5, 0, 0)
    buffer, _ = encode(selected(header), header)
    with pytest.raises(PayloadError, match=r"^k 5, expected 4$"):
        decode(buffer, header._replace(k=4), varies=True)


# ------------------------------------------------------------------ stored bytes


@pytest.mark.parametrize("stored", FIXTURES, ids=lambda stored: stored["what"])
def test_stored_bytes_are_read_and_written_as_ever(stored: dict[str, Any]) -> None:
    header = Header(**stored["header"])
    wide = np.float64 if header.dtype == "float64" else np.float32
    selection = Selection(
        np.array(stored["indices"], np.int32),
        np.array([float.fromhex(value) for value in stored["values"]], wide),
        stored["nonfinite"],
    )
    data = bytes.fromhex("".join(stored["bytes"]))
    received = selection._replace(values=encode(selection, header)[1])
    found = decode(np.frombuffer(data, np.uint8), header)
    assert_holds(found, received, header.layout)
    assert encode(selection, header)[0].tobytes() == data


def test_every_dtype_and_layout_has_stored_bytes() -> None:
    stored = {(row["header"]["dtype"], row["header"]["layout"]) for row in FIXTURES}
    assert stored == {(d, layout) for d in DTYPES for layout in FORMATS}


# ------------------------------------------------------------------ damage

GOOD = Header(Float32.layout, "float32", n=100, k=3, step=7, digest=2**63 + 5)


def damaged(offset: int, form: str, value: Any) -> np.ndarray:
    buffer, _ = encode(selected(GOOD), GOOD)
    struct.pack_into(form, buffer.data, offset, value)
    return buffer


@pytest.mark.parametrize(
    ("offset", "form", "value", "message"),
    [
        (0, "4s", b"HVSX", r"format b'HVSX' version 1, expected b'HVSP' version 1"),
        (4, "B", 2, r"format b'HVSP' version 2, expected b'HVSP' version 1"),
        (5, "B", 2, "layout 2, expected 1"),
        (5, "B", 0, "layout 0, expected 1"),
        (6, "B", 4, "dtype 4, expected 3"),
        (6, "B", 0, "dtype 0, expected 3"),
        (7, "B", 4, "flags 4"),
        (7, "B", 0x81, "flags 129"),
        (8, "<i", 101, "n 101, expected 100"),
        (8, "<i", -1, "n -1, expected 100"),
        (12, "<i", 4, "k 4, expected 3"),
        (12, "<i", -3, "k -3, expected 3"),
        (16, "<q", 8, "step 8, expected 7"),
        (24, "<Q", 5, "digest 5, expected 9223372036854775813"),
    ],
)
def test_a_damaged_field_is_named_with_expected_and_found(
    offset: int, form: str, value: Any, message: str
) -> None:
    with pytest.raises(PayloadError, match=message):
        decode(damaged(offset, form, value), GOOD)


@pytest.mark.parametrize("k", [-1, -(2**31), 4, 2**31 - 1])
def test_a_damaged_k_is_refused_also_where_ranks_choose_it(k: int) -> None:
    with pytest.raises(PayloadError, match=f"k {k}, expected 3"):
        decode(damaged(12, "<i", k), GOOD, varies=True)


def test_a_k_that_does_not_fit_the_bytes_is_refused() -> None:
    with pytest.raises(PayloadError, match="of 56 bytes, expected 48 for k = 2"):
        decode(damaged(12, "<i", 2), GOOD, varies=True)


def test_all_fields_that_disagree_are_named_at_once() -> None:
    buffer, _ = encode(selected(GOOD), GOOD)
    other = GOOD._replace(n=50, step=9)
    with pytest.raises(PayloadError, match=r"^n 100, expected 50; step 7, expected 9$"):
        decode(buffer, other)


@pytest.mark.parametrize("size", range(56))
def test_a_truncated_payload_is_refused(size: int) -> None:
    buffer, _ = encode(selected(GOOD), GOOD)
    assert buffer.size == 56
    expected = "at least 32" if size < 32 else "56 for k = 3"
    with pytest.raises(PayloadError, match=f"of {size} bytes, expected {expected}"):
        decode(buffer[:size], GOOD)


def test_a_payload_with_bytes_to_spare_is_refused() -> None:
    buffer, _ = encode(selected(GOOD), GOOD)
    longer = np.concatenate([buffer, np.zeros(8, np.uint8)])
    with pytest.raises(PayloadError, match="of 64 bytes, expected 56 for k = 3"):
        decode(longer, GOOD)


# ---------------------------------------------------------------- in place of a payload


def test_what_a_rank_raised_is_read_by_the_others() -> None:
    header = Header(Float32.layout, "float32", n=9, k=4, step=3, digest=7)
    payload = encode_error(ZeroDivisionError("in select, größer"))
    with pytest.raises(
        PayloadError, match=r"^raised ZeroDivisionError: in select, grö"
    ):
        decode(payload, header)


@given(st.integers(0, 60), st.text(max_size=40))
def test_it_takes_the_room_that_there_is(room: int, text: str) -> None:
    size = HEADER_BYTES + room
    payload = encode_error(ValueError(text), size)
    assert payload.size == size
    with pytest.raises(PayloadError) as raised:
        decode(
            payload, Header(Float32.layout, "float32", n=9, k=room, step=0, digest=0)
        )
    whole = f"ValueError: {text}".encode(errors="replace").decode()
    told = str(raised.value).removeprefix("raised ")
    assert whole.startswith(told) or not told.removeprefix("an error")
    assert payload_is_zero_after(payload, told)


def payload_is_zero_after(payload: Any, told: str) -> bool:
    taken = 0 if told == "an error" else len(told.encode())
    return not payload[HEADER_BYTES + taken :].any()


@pytest.mark.parametrize("padded", [False, True])
def test_it_may_stand_among_payloads(padded: bool) -> None:
    header = Header(Float32.layout, "float32", n=300, k=5, step=0, digest=0)
    parts = [
        encode(selected(header), header)[0],
        encode_error(MemoryError("x" * 1000)),
        encode_error(MemoryError()),
    ]
    row = np.concatenate(parts)
    if padded:
        row = np.concatenate([row, np.zeros(padded_bytes(row.size) - row.size, "u1")])
    found = split(np.concatenate([row, row]), each=3, padded=padded)
    assert [p.tobytes() for p in found] == [p.tobytes() for p in parts * 2]
    assert parts[1].size < 500  # whatever a user's error says
