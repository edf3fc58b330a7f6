"""What ranks agree on before data moves; nothing here communicates."""

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_sparse.transport.mpi.agreement import (
    ROW_FIELDS,
    STEP_HEADER_BYTES,
    Row,
    StepHeader,
    digest,
    disagreement,
    pack_table,
    unpack,
)

COUNTS = st.integers(0, 2**63 - 1)
HEADERS = st.builds(
    StepHeader,
    step=COUNTS,
    payload_bytes=COUNTS,
    digest=st.binary(min_size=16, max_size=16),
    raised=st.booleans(),
)
W: Row = ("w", (4,), "float32", 1, "sparse", 0)
B: Row = ("b", (), "float32", 1, "dense", 0)


def table(*rows: Row, configuration: str = "TopK()", step: int = 0) -> bytes:
    return pack_table(rows, configuration, step)


# ------------------------------------------------------------------ the step header


@given(HEADERS)
def test_what_is_unpacked_is_what_was_packed(header: StepHeader) -> None:
    data = header.pack()
    assert len(data) == STEP_HEADER_BYTES
    assert unpack(data) == header


@given(HEADERS, HEADERS)
def test_byte_counts_may_differ_between_ranks_and_nothing_else(
    one: StepHeader, other: StepHeader
) -> None:
    alike = StepHeader(one.step, other.payload_bytes, one.digest, raised=other.raised)
    assert alike.common == one.common
    assert (one.common == other.common) == (
        (one.step, one.digest) == (other.step, other.digest)
    )


@pytest.mark.parametrize(
    ("offset", "value", "found"),
    [(0, b"HVSP", r"b'HVSP' version 2"), (4, b"\x01", r"b'HVSA' version 1")],
)
def test_a_header_of_another_release_is_refused(
    offset: int, value: bytes, found: str
) -> None:
    data = bytearray(StepHeader(0, 0, bytes(16)).pack())
    data[offset : offset + len(value)] = value
    with pytest.raises(ValueError, match=f"{found}, expected b'HVSA' version 2"):
        unpack(bytes(data))


@pytest.mark.parametrize("size", [0, 1, STEP_HEADER_BYTES - 1, STEP_HEADER_BYTES + 1])
def test_a_truncated_header_is_refused(size: int) -> None:
    with pytest.raises(struct.error):
        unpack(bytes(size))


# ------------------------------------------------------------------ the digest


@pytest.mark.parametrize("place", range(len(ROW_FIELDS)), ids=ROW_FIELDS)
def test_the_digest_depends_on_every_field_of_a_row(place: int) -> None:
    others: list[Any] = ["v", (2, 2), "float64", 2, "dense", 1]
    changed: Any = (*W[:place], others[place], *W[place + 1 :])
    assert digest([W, B], "TopK()") != digest([changed, B], "TopK()")


def test_the_digest_depends_on_configuration_and_rows() -> None:
    digests = [
        digest([W, B], "TopK()"),
        digest([W, B], "TopK(density=0.5)"),
        digest([W], "TopK()"),
        digest([], "TopK()"),
        digest([B, W], "TopK()"),
    ]
    assert len(set(digests)) == len(digests)
    assert {len(found) for found in digests} == {16}
    assert digest([W, B], "TopK()") == digests[0]


# ------------------------------------------------------------------ who is to blame


@pytest.mark.parametrize(
    ("theirs", "sentence"),
    [
        (
            table(("w", (2, 2), "float32", 1, "sparse", 0), B),
            "w: rank 2 has shape (2, 2), expected (4,)",
        ),
        (
            table(("w", (4,), "float64", 1, "sparse", 0), B),
            "w: rank 2 has dtype float64, expected float32",
        ),
        (
            table(("w", (4,), "float32", 2, "sparse", 0), B),
            "w: rank 2 has k 2, expected 1",
        ),
        (
            table(("w", (4,), "float32", 1, "dense", 0), B),
            "w: rank 2 has route dense, expected sparse",
        ),
        (
            table(("w", (4,), "float32", 1, "sparse", 3), B),
            "w: rank 2 has step 3, expected 0",
        ),
        (table(B), "w: rank 2 does not have it, expected shape (4,)"),
        (table(W, B, ("x", (1,), "float32", 1, "sparse", 0)), "x: rank 2 has it, "),
        (
            table(W, B, configuration="RandomK()"),
            "w: rank 2 has configuration RandomK(), expected TopK()",
        ),
        (table(W, B, step=5), "w: rank 2 is at step 5, expected 0"),
        (
            table(("w", (4,), "float32", 2, "sparse", 0), B, configuration="TopK(0.5)"),
            # the cause, not its consequence
            "w: rank 2 has configuration TopK(0.5), expected TopK()",
        ),
        (table(), "w: rank 2 does not have it, expected shape (4,)"),
    ],
)
def test_the_rank_that_differs_from_most_is_named_with_what_differs(
    theirs: bytes, sentence: str
) -> None:
    assert disagreement([table(W, B), table(W, B), theirs, table(W, B)]).startswith(
        sentence
    )


def test_of_two_the_first_is_right() -> None:
    other: Row = ("w", (3,), "float32", 1, "sparse", 0)
    told = disagreement([table(other), table(W)])
    assert told == "w: rank 1 has shape (4,), expected (3,)"


def test_a_wrong_first_rank_is_named() -> None:
    other: Row = ("w", (3,), "float32", 1, "sparse", 0)
    told = disagreement([table(other), table(W), table(W)])
    assert told == "w: rank 0 has shape (3,), expected (4,)"


def test_a_tensor_that_most_do_not_have_is_named_when_they_have_none() -> None:
    told = disagreement([table(), table(), table(W)])
    assert told.startswith("w: rank 2 has it, expected ")
    assert not told.endswith(" ")


ROWS = st.tuples(
    st.text(max_size=3),
    st.lists(st.integers(0, 3), max_size=2).map(tuple),
    st.sampled_from(["float16", "float32"]),
    st.integers(0, 2),
    st.sampled_from(["sparse", "dense"]),
    st.integers(0, 2),
)
TABLES = st.builds(
    lambda rows, configuration, step: pack_table(rows, configuration, step),
    st.lists(ROWS, max_size=3, unique_by=lambda row: row[0]).map(sorted),
    st.sampled_from(["TopK()", "RandomK()"]),
    st.integers(0, 1),
)


@given(st.lists(TABLES, min_size=2, max_size=4).filter(lambda t: len(set(t)) > 1))
def test_whatever_differs_there_is_a_sentence_about_one_rank(
    tables: list[bytes],
) -> None:
    told = disagreement(tables)
    named = [rank for rank in range(len(tables)) if f"rank {rank} " in told]
    most = max(tables.count(table) for table in tables)
    usual = next(t for t in tables if tables.count(t) == most)
    assert any(tables[rank] != usual for rank in named)
