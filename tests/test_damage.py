"""Damage: whatever peers send is decoded, or refused in words, and nothing else."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hostile import cases, decode_hostile
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import VALUES, Handed

from hvd_sparse import (
    EliasFano,
    ExchangeError,
    Float16,
    Float32,
    Int8,
    Never,
    PayloadError,
    RawIndices,
    Selection,
    Sign,
    TopK,
)
from hvd_sparse.carriers import extract
from hvd_sparse.core.formats import Entries
from hvd_sparse.core.frame import Frame
from hvd_sparse.core.indices import KnownIndices
from hvd_sparse.core.path import GradientPath
from hvd_sparse.core.payload import Header, Payload, as_coded, decode, encode
from hvd_sparse.core.received import Received, split
from hvd_sparse.kernels import host
from hvd_sparse.kernels.coding import shift, unary_bits
from hvd_sparse.kernels.host import aggregation
from hvd_sparse.transport.mpi.buffers import Buffers

# ---------------------------------------------------------------- any damage at all

DECODES = 12_500  # of each of eight: 100,000
SLOWEST_S = 2  # a decode takes 0.2 ms; a process may wait for its turn


@pytest.mark.parametrize("seed", range(8))
def test_damaged_bytes_are_decoded_or_refused(seed: int) -> None:
    slowest = 0.0
    for i, data in enumerate(cases(seed, DECODES)):
        start = time.perf_counter()
        try:
            decode_hostile(data)
        except Exception as error:
            error.args = (f"{data.hex()}: {error}",)
            raise
        if i > 1000:  # before that kernels are compiled
            slowest = max(slowest, time.perf_counter() - start)
    assert slowest < SLOWEST_S


@given(st.binary(max_size=120))
@settings(max_examples=300)
def test_any_bytes_at_all_are_decoded_or_refused(data: bytes) -> None:
    decode_hostile(data)


# ------------------------------------------------------------------ of one tensor

N, K = 100, 9


def header(values: Any, indices: Any, dtype: str = "float32", n: int = N) -> Header:
    return Header(Entries(values, indices), dtype, n, K, step=3, digest=n * 77 + 1)


def payload(own: Header) -> Payload:
    indices = np.linspace(1, own.n - 1, own.k).astype(np.int32)
    values = np.linspace(-3, 4, own.k).astype(own.wide)
    return encode(Selection(indices, values, 0), own)[0]


def with_bytes(own: Payload, at: int, data: bytes) -> Payload:
    entries = own.entries.copy()
    entries[at : at + len(data)] = np.frombuffer(data, np.uint8)
    return own._replace(entries=entries)


UNORDERED = np.array([7, 7, 9], "<i4").tobytes()  # a tie
OUTSIDE = np.array([N], "<i4").tobytes()
BELOW = np.array([-1], "<i4").tobytes()


@pytest.mark.parametrize("data", [UNORDERED, OUTSIDE, BELOW])
def test_raw_indices_out_of_order_or_range_are_refused(data: bytes) -> None:
    own = payload(header(Float32(), RawIndices()))
    with pytest.raises(
        PayloadError, match=r"^indices must ascend in \[0, 100\), \d of"
    ):
        decode(with_bytes(own, 4 * K + 4, data))


@pytest.mark.parametrize("byte", [b"\0", b"\xff"])
@pytest.mark.parametrize("values", VALUES, ids=repr)
def test_high_parts_all_zeros_or_all_ones_are_refused(values: Any, byte: bytes) -> None:
    own = payload(header(values, EliasFano()))
    at = own.header.form.places(K, "float32", N).indices_at
    with pytest.raises(
        PayloadError, match=r"^indices must ascend in \[0, 100\), \d of"
    ):
        decode(with_bytes(own, at, byte * (own.entries.size - at)))


def test_low_parts_that_fall_in_a_bucket_are_refused() -> None:
    n = 1 << 20
    own = header(Float32(), EliasFano(), n=n)
    chosen = Selection(np.arange(K, dtype=np.int32), np.ones(K, np.float32), 0)
    sent = encode(chosen, own)[0]
    low_parts = unary_bits(n, K, shift(n, K)) // 8
    at = own.form.places(K, "float32", n).indices_at + low_parts + 1
    with pytest.raises(PayloadError, match=r"ascend in \[0, 1048576\), 1 of 9"):
        decode(with_bytes(sent, at, b"\xff"))


NOT_FINITE = {
    "a float32": (Float32(), 0, np.float32(np.nan).tobytes()),
    "the exponent of halves": (Float16(), 0, np.int16(32767).tobytes()),
    "the scale of integers": (Int8(), 0, b"\x80\x7f"),
    "the scale of signs": (Sign(), 0, np.float32(np.inf).tobytes()),
}


@pytest.mark.parametrize("what", NOT_FINITE)
@pytest.mark.parametrize("indices", [EliasFano(), RawIndices()], ids=repr)
def test_values_that_are_not_finite_are_refused(what: str, indices: Any) -> None:
    """No rank sends any: one that meets them says so in its mark."""
    values, at, data = NOT_FINITE[what]
    wrong = with_bytes(payload(header(values, indices)), at, data)
    with pytest.raises(PayloadError, match=r"^values must be finite, \d of 9 are not"):
        decode(wrong)
    out = np.empty(N, np.float32)
    with pytest.raises(ValueError, match="and values be finite: 9 of 9 do not"):
        host.aggregate_coded(out, [as_coded(wrong)], 1.0)


@pytest.mark.parametrize("values", VALUES, ids=repr)
def test_values_travel_where_all_ranks_know_the_indices(values: Any) -> None:
    own = header(values, KnownIndices())
    chosen = Selection(np.arange(K, dtype=np.int32), np.arange(1, K + 1.0), 0)
    chosen = chosen._replace(values=chosen.values.astype(np.float32))
    sent, rounded = encode(chosen, own)
    indices, found, _ = decode(sent)
    assert indices.size == 0
    assert found.tobytes() == rounded.tobytes()


@pytest.mark.parametrize("values", VALUES, ids=repr)
def test_what_is_encoded_may_be_read_only(values: Any) -> None:
    """As what a user's own sparsifier selects, or a format hands on to one of ours."""
    own = header(values, EliasFano())
    chosen = Selection(np.arange(K, dtype=np.int32), np.ones(K, np.float32), 0)
    for array in chosen[:2]:
        array.flags.writeable = False
    assert decode(encode(chosen, own)[0]).indices.tolist() == [*range(K)]


@pytest.mark.parametrize("exponent", [-32768, 0])
def test_any_other_exponent_of_halves_is_read(exponent: int) -> None:
    own = payload(header(Float16(), EliasFano()))
    found = decode(with_bytes(own, 0, np.int16(exponent).tobytes())).values
    assert np.isfinite(found).all()
    assert found.any() == (exponent == 0)


def test_the_integer_that_no_rank_sends_is_read_as_it_stands() -> None:
    own = payload(header(Int8(), RawIndices()))
    found = decode(with_bytes(own, 2, b"\x80")).values
    step = np.frombuffer(b"\0\0" + own.entries[:2].tobytes(), "<f4")[0]
    assert found[0] == -128 * step


# ----------------------------------------------------------- of all that ranks sent


_RAW = Entries(Float32(), RawIndices())


@dataclass(frozen=True)
class Forgetful:
    """A format of one's own that finds no indices where the last byte is damaged."""

    layout: int = 200

    def bytes(self, k: Any, dtype: str, n: int) -> Any:
        return _RAW.bytes(k, dtype, n)

    def most(self, size: Any, dtype: str, n: int) -> Any:
        return _RAW.most(size, dtype, n)

    def write(self, out: Any, indices: Any, values: Any, n: int) -> Any:
        return _RAW.write(out, indices, values, n)

    def read(self, data: Any, k: int, dtype: str, n: int) -> Any:
        if data.size and data[-1] == 255:
            return np.empty(0, np.int32), np.zeros(k, np.float32)
        return _RAW.read(data, k, dtype, n)

    def without_indices(self) -> Any:
        raise ValueError("none")


def path_of(
    names: list[str],
    damage: Callable[[list[np.ndarray]], Any],
    values: Any = _RAW,
) -> tuple[GradientPath, list[Any], list[np.ndarray]]:
    """Flights of a path whose peers sent the same, but for damage."""
    exchange = Handed(2, uneven=False)
    path = GradientPath(TopK(0.1), exchange, dense=Never(), values=values)
    gradients = {name: np.arange(1, N + 1, dtype=np.float32) for name in names}
    flights = path.send(gradients)
    for place, flight in enumerate(flights):
        flight.handle = place
    frame = Frame([(f.tensor.name, f.tensor.payload) for f in flights])
    parts = [frame.bytes() for _ in range(2)]
    damage(parts)
    exchange.received = Received(frame, parts)
    return path, flights, [np.empty(N, np.float32) for _ in names]


def damage_an_index(parts: list[np.ndarray]) -> None:
    parts[1][-4:].view("<i4")[:] = 3  # the last one of the last tensor


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]], ids=["one", "a group"])
def test_whose_entries_are_wrong_is_told(names: list[str]) -> None:
    path, flights, outs = path_of(names, damage_an_index)
    told = rf"^{names[-1]}: rank 1: indices must ascend in \[0, 100\), 1 of 10 do not"
    with pytest.raises(PayloadError, match=told):
        path.receive(flights, outs)
    for name in names:  # nothing is lost
        kept = path.memory.residuals[name]
        np.testing.assert_array_equal(kept, np.arange(1, N + 1))


def test_a_format_of_ones_own_must_find_the_indices() -> None:
    def damage(parts: list[np.ndarray]) -> None:
        parts[1][-1] = 255

    path, flights, outs = path_of(["a"], damage, Forgetful())
    told = r"^a: rank 1: Forgetful\(.*\): read must give 10 indices, got 0$"
    with pytest.raises(PayloadError, match=told):
        path.receive(flights, outs)


def test_a_payload_of_ones_own_must_come_back() -> None:
    path, flights, outs = path_of(["a"], lambda parts: None)
    exchange: Any = path.exchange
    exchange.locate = lambda handles: None
    exchange.finish = lambda handle: [None, flights[0].tensor.payload]
    with pytest.raises(PayloadError, match=r"^a: rank 0: no payload, expected this ra"):
        path.receive(flights, outs)


def test_a_step_before_the_first_one_is_refused() -> None:
    own = payload(header(Float32(), RawIndices()))
    frame = Frame([("a", own)])
    data = frame.bytes()
    data[15] ^= 128  # bit 31 of the step, of which marks know seven
    told = r"^a: rank 1: step 2147483651, expected about 3$"
    with pytest.raises(PayloadError, match=told):
        Received(frame, [frame.bytes(), data], uneven=True)


def test_frames_beyond_those_of_the_ranks_are_not_looked_at() -> None:
    data = Frame([("a", payload(header(Float32(), RawIndices())))]).bytes()
    row = np.concatenate([data] * 50)
    told = rf"^a: 3 or more frames in {row.size} bytes, expected 2"
    with pytest.raises(PayloadError, match=told):
        split(row, "a", ranks=2, padded=False)


def test_blobs_of_fewer_than_no_bytes_are_refused() -> None:
    """Though sizes add up."""
    there = Buffers(size=1)
    there.blobs = [np.zeros(8, np.uint8), np.zeros(8, np.uint8)]
    counts = [there.close() // 8]
    there.frame(counts, 0)[:2] = -8, 24
    with pytest.raises(ExchangeError, match="sizes do not add up to 32 bytes"):
        there.open(counts)


BUFFERS = {
    "the reduced buffer has numbers that are not finite": [np.inf, np.inf, 1.0],
    "a slot of the reduced buffer has no 16-bit integers": [1e-40, 1e-40, 3e38],
}


@pytest.mark.parametrize("told", BUFFERS)
def test_a_sum_of_embedded_payloads_may_be_any_numbers(told: str) -> None:
    with pytest.raises(PayloadError, match=told):
        extract(np.array(BUFFERS[told], np.float32), 1)


# ------------------------------------------------------------------ in several parts

CHUNK = 1 << 14
LONG = 5 * CHUNK + 17
CUTS = [(0, CHUNK), (CHUNK, 3 * CHUNK), (3 * CHUNK, 4 * CHUNK), (4 * CHUNK, LONG)]


def long_payload(own: Header, rng: np.random.Generator) -> Payload:
    indices = np.sort(rng.choice(own.n, own.k, replace=False)).astype(np.int32)
    return encode(Selection(indices, rng.normal(size=own.k).astype(own.wide), 0), own)[
        0
    ]


def in_parts(monkeypatch: Any, out: np.ndarray, sent: list[Payload], cuts: Any) -> str:
    """What was told; out is overwritten."""
    monkeypatch.setattr(aggregation, "parts", lambda size, chunk: cuts)
    try:
        host.aggregate_coded(out, [as_coded(each) for each in sent], 0.5)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("indices", [EliasFano(), RawIndices()], ids=repr)
@pytest.mark.parametrize("values", VALUES, ids=repr)
def test_parts_give_the_bits_of_the_whole(
    values: Any, indices: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(5)
    for k in (1, 9, 700, LONG // 3, LONG):
        own = header(values, indices, dtype, LONG)._replace(k=k)
        sent = [long_payload(own, rng) for _ in range(2)]
        whole, cut = np.empty((2, LONG), dtype)
        assert in_parts(monkeypatch, whole, sent, [(0, LONG)]) == ""
        assert in_parts(monkeypatch, cut, sent, CUTS) == ""
        assert whole.tobytes() == cut.tobytes()


@given(st.integers(0, 2**32), st.sampled_from([1, 40, 900, LONG // 3]), st.data())
@settings(max_examples=200)
@pytest.mark.parametrize("indices", [EliasFano(), RawIndices()], ids=repr)
def test_parts_refuse_what_the_whole_refuses(
    indices: Any, seed: int, k: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    own = header(Int8(), indices, n=LONG)._replace(k=k)
    sent = [long_payload(own, rng) for _ in range(2)]
    entries = sent[1].entries
    at = own.form.places(k, "float32", LONG).indices_at
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(at, entries.size - 1))
        entries[place] = data.draw(st.sampled_from([0, 255, 1, 128]))
    whole, cut = np.empty((2, LONG), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        told = in_parts(patch, whole, sent, [(0, LONG)])
        again = in_parts(patch, cut, sent, CUTS)
    assert bool(told) == bool(again)
    assert told or whole.tobytes() == cut.tobytes()
