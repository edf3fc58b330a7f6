"""Payloads side by side: gathered in one buffer, or embedded in a sum."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import PLAIN

from hvd_sparse import PayloadError, Selection
from hvd_sparse.carriers import embed, extract, slot_floats
from hvd_sparse.core.frame import Frame, padded_bytes
from hvd_sparse.core.payload import Header, encode

FACTORS = st.sampled_from([1.0, 2.0, 3.0, 7.0])


def payload(k: int, seed: int = 0) -> np.ndarray:
    """In a frame."""
    rng = np.random.default_rng([k, seed])
    values = rng.standard_normal(k).astype(np.float32)
    indices = np.arange(k, dtype=np.int32)
    header = Header(PLAIN, "float32", 1000, k, 5, digest=k)
    return Frame([("w", encode(Selection(indices, values, 0), header)[0])]).bytes()


@given(st.integers(1, 10**9))
def test_padded_sizes_are_few_and_little_larger(size: int) -> None:
    padded = padded_bytes(size)
    assert padded >= size
    assert padded % 8 == 0
    assert padded <= max(64, 1.25 * size + 8)
    assert padded_bytes(padded) == padded


@given(st.integers(1, 64), st.integers(0, 30), FACTORS, st.booleans(), st.data())
def test_embedded_payloads_survive_what_a_reduction_does_to_them(
    size: int, k: int, factor: float, average: bool, data: st.DataObject
) -> None:
    present = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=8))
    sent = {rank: payload(k, rank) for rank in present}
    # as Horovod: multiply before and after in float32
    before = np.float32(1 / factor if average else 1)
    after = np.float32(factor / size if average else 1)
    total = np.zeros(1 + size * slot_floats(payload(k).size), np.float32)
    for rank in sorted(present):
        total += embed(sent[rank], rank, size) * before
    received, scale = extract(total * after, size)
    for rank in range(size):
        expected = sent[rank].tobytes() if rank in present else b""
        assert received[rank].tobytes() == expected
    assert scale == pytest.approx(1 / size if average else 1)


@pytest.mark.parametrize("reduce", [np.maximum, np.minimum], ids=["Max", "Min"])
def test_what_is_no_sum_is_refused(reduce: np.ufunc) -> None:
    buffers = [embed(payload(3, rank), rank, 2) for rank in range(2)]
    with pytest.raises(PayloadError, match="op must be Average or Sum"):
        extract(reduce(*buffers), 2)
