"""What travels together: round trips, bytes that never change, damage is noticed."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import FORMATS, PLAIN

from hvd_sparse import PayloadError, Selection
from hvd_sparse.core import frame as module
from hvd_sparse.core.contracts import RaisedError
from hvd_sparse.core.frame import (
    HEAD_BYTES,
    Frame,
    frame_bytes,
    layout_of,
    padded_bytes,
)
from hvd_sparse.core.indices import KnownIndices
from hvd_sparse.core.payload import (
    DTYPES,
    Header,
    Payload,
    Raised,
    decode,
    encode,
    payload_bytes,
)
from hvd_sparse.core.received import Received, split

FIXTURES = Path(__file__).parent / "fixtures"
# frames as this version writes them, in hex, and what they hold; never rewritten
STORED = [
    stored
    for name in ("frames-v2.json", "frames-v2-formats.json")
    for stored in json.loads((FIXTURES / name).read_text())
]
# payloads as release 0.1.0 wrote them
VERSION_1 = [
    stored
    for name in ("payload-v1.json", "payload-v1-signs.json")
    for stored in json.loads((FIXTURES / name).read_text())
]
Named = tuple[str, Payload]


def header(place: int, layout: int, dtype: str, k: int, varies: bool) -> Header:
    digest = crc32(repr((place, layout, dtype, k, varies)).encode()) * 0x9E3779B9
    return Header(FORMATS[layout], dtype, 300 + place, k, 7, digest, varies)


HEADERS = st.lists(
    st.tuples(
        st.sampled_from([*FORMATS]),
        st.sampled_from(DTYPES),
        st.integers(0, 200),
        st.booleans(),
    ),
    min_size=1,
    max_size=9,
).map(lambda rows: [header(place, *row) for place, row in enumerate(rows)])


def payload(header: Header, rank: int = 0, nonfinite: int = 0) -> Payload:
    """What a rank sends, with a number of its own where ranks choose."""
    rng = np.random.default_rng([header.k, rank])
    k = max(0, header.k - 3 * rank) if header.varies else header.k
    indices = np.sort(rng.choice(header.n, k, replace=False)).astype(np.int32)
    values = rng.normal(size=k).astype(header.wide)
    return encode(Selection(indices, values, nonfinite), header)[0]


def named(headers: Sequence[Header], rank: int = 0) -> list[Named]:
    return [(f"t{place}", payload(each, rank)) for place, each in enumerate(headers)]


def holds(found: Payload | None, sent: Payload) -> None:
    assert found is not None
    assert found[:3] == sent[:3]
    assert found.entries.tobytes() == sent.entries.tobytes()


@given(HEADERS, st.integers(1, 4), st.booleans())
def test_what_all_ranks_send_is_what_each_receives(
    headers: list[Header], ranks: int, padded: bool
) -> None:
    sent = [named(headers, rank) for rank in range(ranks)]
    frames = [Frame(own) for own in sent]
    sizes = [padded_bytes(f.size) if padded else f.size for f in frames]
    row = np.concatenate([f.bytes(s) for f, s in zip(frames, sizes, strict=True)])
    parts = split(row, "t0", ranks=ranks, padded=padded)
    for frame in frames:
        received = Received(frame, parts)
        taken = np.zeros(ranks, int)
        for place in range(len(headers)):
            for rank, found in enumerate(received.payloads(place)):
                holds(found, sent[rank][place][1])
                taken[rank] += found.wire_bytes if found else 0
        assert taken.tolist() == [frame.size for frame in frames]


@given(HEADERS)
def test_a_frame_takes_a_header_and_a_byte_a_tensor(headers: list[Header]) -> None:
    fixed = [
        header._replace(varies=False, digest=header.digest ^ 1) for header in headers
    ]
    entries = sum(payload(each).entries.size for each in fixed)
    beside = Frame(named(fixed)).size - entries
    assert HEAD_BYTES + len(fixed) <= beside < HEAD_BYTES + len(fixed) + 8
    assert frame_bytes(fixed) == beside + entries
    entries = sum(payload(each).entries.size for each in headers)
    beside = Frame(named(headers)).size - entries
    assert beside < HEAD_BYTES + len(headers) + 4 * sum(h.varies for h in headers) + 11


@given(HEADERS)
def test_one_alone_takes_what_it_is_said_to_take(headers: list[Header]) -> None:
    first = headers[0]
    size = payload_bytes(first.form, first.dtype, first.n, first.k)
    assert Frame(named([first])).size == size


def test_161_tensors_take_192_bytes() -> None:
    headers = [header(i, PLAIN.layout, "float32", 1, False) for i in range(161)]
    assert Frame(named(headers)).size == 192 + 161 * 8


def test_entries_are_located_where_all_ranks_send_alike() -> None:
    headers = [header(i, 1, "float32", 4 + i, False) for i in range(3)]
    sent = [named(headers, rank) for rank in range(2)]
    parts = [Frame(own).bytes() for own in sent]
    found = Received(Frame(sent[0]), parts).locate([2, 0])
    assert found is not None
    for rank, part in enumerate(parts):
        for column, place in enumerate((2, 0)):
            at = found.addresses[rank, column] - part.ctypes.data
            entries = sent[rank][place][1].entries
            assert part[at : at + entries.size].tobytes() == entries.tobytes()
    assert found.wire_bytes == [6 * 8 + 1, 4 * 8 + 1 + 24 + 32 - 27]


@pytest.mark.parametrize("what", ["numbers", "nonfinite", "missing"])
def test_entries_are_not_located_where_ranks_differ(what: str) -> None:
    headers = [header(i, 1, "float32", 9, what == "numbers") for i in range(3)]
    sent = [named(headers, rank) for rank in range(2)]
    if what == "nonfinite":
        sent[1][1] = ("t1", payload(headers[1], 1, nonfinite=1))
    parts = [Frame(own).bytes() for own in sent]
    if what == "missing":
        parts[1] = parts[1][:0]
    received = Received(Frame(sent[0]), parts, uneven=what == "missing")
    assert received.locate([0, 1, 2]) is None
    flagged = [[p.nonfinite for p in received.payloads(i) if p] for i in range(3)]
    assert any(map(any, flagged)) == (what == "nonfinite")
    assert (received.payloads(0)[1] is None) == (what == "missing")


@given(st.integers(0, 2**40), st.integers(-5, 5))
def test_a_rank_that_missed_steps_is_at_its_own(step: int, ahead: int) -> None:
    own = header(0, 1, "float32", 5, False)._replace(step=step + 5)
    theirs = own._replace(step=own.step + ahead)
    parts = [Frame(named([each])).bytes() for each in (own, theirs)]
    _, found = Received(Frame(named([own])), parts, uneven=True).payloads(0)
    assert found is not None
    assert found.header == theirs


def test_layouts_that_are_remembered_take_bounded_memory() -> None:
    """As where other gradients are missing in every step."""
    for step in range(50):
        digests = range(3000 * step, 3000 * (step + 1))
        layout_of([GOOD._replace(digest=digest) for digest in digests])
    assert sum(map(len, module._layouts)) <= 1 << 16


# ------------------------------------------------------------------ stored bytes


def stored_frame(stored: dict[str, Any]) -> Frame:
    sent = []
    for tensor in stored["tensors"]:
        known = dict(tensor["header"])
        own = Header(FORMATS[known.pop("layout")], **known)
        values = [float.fromhex(value) for value in tensor["values"]]
        indices = np.array(tensor["indices"], np.int32)
        chosen = Selection(indices, np.array(values, own.wide), tensor["nonfinite"])
        sent.append((tensor["name"], encode(chosen, own)[0]))
    return Frame(sent)


@pytest.mark.parametrize("stored", STORED, ids=lambda stored: stored["what"])
def test_stored_bytes_are_read_and_written_as_ever(stored: dict[str, Any]) -> None:
    data = np.frombuffer(bytes.fromhex("".join(stored["bytes"])), np.uint8)
    frame = stored_frame(stored)
    assert frame.bytes().tobytes() == data.tobytes()
    received = Received(frame, [data])
    for place, tensor in enumerate(stored["tensors"]):
        [found] = received.payloads(place)
        assert found is not None
        assert found.nonfinite == bool(tensor["nonfinite"])
        indexed = found.header.form.indices != KnownIndices()
        indices = tensor["indices"] if indexed else []
        assert decode(found).indices.tolist() == indices


def test_every_dtype_and_layout_has_stored_bytes() -> None:
    rows = [tensor["header"] for stored in STORED for tensor in stored["tensors"]]
    stored = {(row["dtype"], row["layout"]) for row in rows}
    assert stored == {(d, layout) for d in DTYPES for layout in FORMATS}


@pytest.mark.parametrize("stored", VERSION_1, ids=lambda stored: stored["what"])
def test_what_release_0_1_0_sends_is_refused_with_both_versions(
    stored: dict[str, Any],
) -> None:
    """And it refuses ours, since magic and version are where they were."""
    data = np.frombuffer(bytes.fromhex("".join(stored["bytes"])), np.uint8)
    told = r"^t0: rank 1: format b'HVSP' version 1, expected b'HVSP' version 2: do rank"
    frame = Frame(named([GOOD]))
    with pytest.raises(PayloadError, match=told):
        Received(frame, [frame.bytes(), data])
    row = np.concatenate([frame.bytes(), data])
    with pytest.raises(PayloadError, match=told):
        split(row, "t0", ranks=2, padded=False)
    assert frame.bytes()[:5].tobytes() == b"HVSP\2"


# ------------------------------------------------------------------ damage

GOOD = Header(PLAIN, "float32", n=100, k=3, step=7, digest=2**63 + 5)
VARIES = GOOD._replace(varies=True, digest=2**63 + 6)
OTHER = Header(PLAIN, "float64", n=90, k=2, step=7, digest=2**62 + 77)


def damaged(headers: Sequence[Header], offset: int, form: str, value: Any) -> Received:
    """A damaged frame of rank 1, as rank 0 reads it."""
    frame = Frame(named(headers))
    data = frame.bytes()
    struct.pack_into(form, data.data, offset, value)
    return Received(frame, [frame.bytes(), data])


@pytest.mark.parametrize(
    ("offset", "form", "value", "message"),
    [
        (0, "4s", b"HVSX", r"t0: rank 1: format b'HVSX' version 2, expected b'HVSP' v"),
        (
            4,
            "B",
            3,
            r"t0: rank 1: format b'HVSP' version 3, expected b'HVSP' version 2",
        ),
        (5, "B", 4, "t0: rank 1: flags 4, expected 0"),
        (5, "B", 1, "t0: rank 1: flags 1, expected 0"),
        (
            6,
            "<H",
            3,
            "t0: rank 1: 3 payloads came .* expected 2; is one of these param",
        ),
        (6, "<H", 1, "t0: rank 1: 1 payloads came of those that travel together, exp"),
        (12, "<I", 8, "t0: rank 1: or another of 2: step 8, expected 7"),
        (
            16,
            "<Q",
            5,
            r"t0: rank 1: or another of 2: digest 5, expected \d+: shape, dtype, st",
        ),
        (24, "B", 1, r"t0: rank 1: mark 1, expected \d+$"),
        (25, "B", 1, r"t1: rank 1: mark 1, expected \d+$"),
    ],
)
def test_a_damaged_field_is_named_with_expected_and_found(
    offset: int, form: str, value: Any, message: str
) -> None:
    with pytest.raises(PayloadError, match=f"^{message}"):
        damaged([GOOD, OTHER], offset, form, value)


@pytest.mark.parametrize("k", [-1, -(2**31), 4, 2**31 - 1])
def test_more_than_may_be_chosen_is_refused(k: int) -> None:
    with pytest.raises(PayloadError, match=f"^t1: rank 1: k {k}, expected 0 to 3$"):
        damaged([OTHER, VARIES], 28, "<i", k)


def test_a_number_that_does_not_fit_the_bytes_is_refused() -> None:
    with pytest.raises(PayloadError, match="rank 1: frame of 56 bytes, expected 48"):
        damaged([VARIES], 28, "<i", 2)


@pytest.mark.parametrize("step", [6, 8])
@pytest.mark.parametrize("place", range(3))
def test_the_tensor_whose_step_is_another_is_named(place: int, step: int) -> None:
    headers = [header(i, 1, "float32", 4, False) for i in range(3)]
    theirs = list(headers)
    theirs[place] = headers[place]._replace(step=step)
    parts = [Frame(named(each)).bytes() for each in (headers, theirs)]
    told = "step 8, expected 7$" if step == 8 else "digest .* step or configuration"
    with pytest.raises(PayloadError, match=f"^t{place}: rank 1: {told}"):
        Received(Frame(named(headers)), parts)


@pytest.mark.parametrize("headers", [[GOOD], [GOOD, OTHER], [VARIES, GOOD, OTHER]])
def test_a_truncated_frame_is_refused(headers: list[Header]) -> None:
    frame = Frame(named(headers))
    for size in range(frame.size):
        with pytest.raises(PayloadError, match=r"^t0: rank 1: frame of"):
            Received(frame, [frame.bytes(), frame.bytes()[:size]])
        row = np.concatenate([frame.bytes(), frame.bytes()[:size]])
        with pytest.raises(PayloadError, match=r"^t0: "):
            split(row, "t0", ranks=2, padded=False)


def test_bytes_to_spare_are_refused() -> None:
    frame = Frame(named([GOOD]))
    longer = frame.bytes(frame.size + 8)
    with pytest.raises(PayloadError, match="rank 1: frame of 64 bytes, expected 56"):
        Received(frame, [frame.bytes(), longer])


@pytest.mark.parametrize("ranks", [1, 3])
def test_another_number_of_frames_than_ranks_is_refused(ranks: int) -> None:
    row = np.concatenate([Frame(named([GOOD])).bytes()] * 2)
    with pytest.raises(PayloadError, match=f"2 frames in 112 bytes, expected {ranks}"):
        split(row, "t0", ranks=ranks, padded=False)


# ---------------------------------------------------------------- in place of payloads


def test_what_a_rank_raised_is_read_by_the_others() -> None:
    raised = Raised(ZeroDivisionError("in select, größer"))
    theirs = Frame([*named([GOOD]), ("t1", raised)])
    mine = Frame(named([GOOD, OTHER]))
    told = "^t0: rank 1: raised ZeroDivisionError: in select, größer$"
    with pytest.raises(RaisedError, match=told):
        Received(mine, [mine.bytes(), theirs.bytes()])


@given(st.integers(0, 60), st.text(max_size=40))
def test_it_takes_the_room_that_there_is(room: int, text: str) -> None:
    size = HEAD_BYTES + room // 8 * 8
    data = Frame([("t0", Raised(ValueError(text), size))]).bytes()
    assert data.size == size
    mine = Frame(named([GOOD]))
    with pytest.raises(RaisedError) as raised:
        Received(mine, [data])
    whole = f"ValueError: {text}".encode(errors="replace").decode()
    told = str(raised.value).removeprefix("t0: rank 0: raised ")
    assert whole.startswith(told) or told == "an error"


@pytest.mark.parametrize("padded", [False, True])
def test_it_may_stand_among_frames(padded: bool) -> None:
    frames = [
        Frame(named([GOOD])),
        Frame([("t0", Raised(MemoryError("x" * 1000)))]),
        Frame([("t0", Raised(MemoryError()))]),
    ]
    rows = [f.bytes(padded_bytes(f.size) if padded else None) for f in frames]
    found = split(np.concatenate(rows), "t0", ranks=3, padded=padded)
    assert [part.tobytes() for part in found] == [f.bytes().tobytes() for f in frames]
    assert frames[1].size < 500  # whatever a user's error says
