"""Which arrays share memory, however they are viewed."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_sparse.core.sharing import repeats, sharing, span

# numpy 2 has moved it
byte_bounds: Any = getattr(np, "byte_bounds", None) or np.lib.array_utils.byte_bounds

FLAT = np.zeros(60, np.float32)
VIEWS = {
    "whole": FLAT,
    "front": FLAT[:30],
    "back": FLAT[30:],
    "middle": FLAT[20:40],
    "even": FLAT[::2],
    "odd": FLAT[1::2],
    "backwards": FLAT[29::-1],
    "square": FLAT[:36].reshape(6, 6).T,
    "columns": FLAT.reshape(6, 10)[:, 2:4],
    "one": FLAT[7:8],
    "scalar": FLAT[8],
    "none": FLAT[5:5],
    "half": FLAT.view(np.float16)[:10],
    "repeated": np.broadcast_to(FLAT[:1], (4, 5)),
    "elsewhere": np.zeros(60, np.float32),
}
VIEWS["scalar"] = FLAT[8:9].reshape(())


@given(st.lists(st.sampled_from(sorted(VIEWS)), unique=True))
def test_pairs_that_share_memory_are_found(names: list[str]) -> None:
    chosen = {name: VIEWS[name] for name in names}
    found = {frozenset(pair) for pair in sharing(chosen)}
    expected = {
        frozenset((a, b))
        for a in names
        for b in names
        if a < b and np.shares_memory(chosen[a], chosen[b])
    }
    assert found == expected


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_span_is_that_of_numpy(view: Any) -> None:
    low, high = byte_bounds(view)
    if view.size:
        assert span(view) == (low, high)
    else:
        start, end = span(view)
        assert start == end


def test_tensors_of_torch_have_the_spans_of_their_arrays() -> None:
    flat = torch.zeros(60)
    for tensor in (flat, flat[::2], flat[10:30].view(4, 5).T, flat[:1].expand(4, 5)):
        assert span(tensor) == span(tensor.numpy())
    assert sharing({"front": flat[:30], "back": flat[30:]}) == []
    assert sharing({"front": flat[:30], "all": flat}) == [("front", "all")]
    assert sharing({"even": flat[::2], "odd": flat[1::2]}) == []
    assert repeats(flat[:1].expand(4, 5))
    assert not repeats(flat.view(6, 10).T)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (FLAT, False),
        (FLAT[::2], False),
        (FLAT.reshape(6, 10).T[::3], False),
        (FLAT[::-1], False),
        (FLAT[:1], False),
        (FLAT[:0], False),
        (np.broadcast_to(FLAT[:1], (6, 10)), True),
        (np.lib.stride_tricks.sliding_window_view(FLAT, 3), True),
        (np.lib.stride_tricks.as_strided(FLAT, (2, 3), (12, 8)), False),  # 0 8 16 12 ..
        (np.lib.stride_tricks.as_strided(FLAT, (3, 3), (8, 8)), True),
    ],
)
def test_elements_that_are_one_in_memory_are_found(array: Any, expected: bool) -> None:
    assert repeats(array) == expected
