"""The example's numbers are those of a plain implementation of the paper."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_sparse import ExactCAT, PaperPayload, SignTopK, TopK
from hvd_sparse.core.costs import Message

pytest.importorskip("scipy", reason="pip install .[examples]")

# bytes of gradient descent over bytes of the method, to a loss of log(2) / 2 on P-A;
# bits counted as in the paper; made by numpy's sorting and cumulative sums alone
ANCHORS = {
    ("cat-s", "affine"): 43.6,
    ("cat-s", "packet"): 44.2,
    ("cat-s+q", "affine"): 111.2,
    ("cat-s+q", "packet"): 104.3,
    ("alistarh", "affine"): 69.1,
    ("alistarh", "packet"): 13.0,
}


@pytest.fixture(scope="module")
def example() -> Any:
    file = Path(__file__).parents[1] / "examples" / "cat_logistic_regression.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[file.stem]


@pytest.fixture(scope="module")
def whole(example: Any) -> Any:
    return example.PROBLEMS["P-A"]()


@pytest.mark.parametrize(("method", "cost"), ANCHORS, ids=str)
def test_bytes_to_the_same_loss_are_the_papers_own(
    example: Any, whole: Any, method: str, cost: str
) -> None:
    price = example.COSTS[cost](PaperPayload())
    sparsifier: Any = {
        "cat-s": ExactCAT(TopK(), price, most=example.MOST),
        "cat-s+q": ExactCAT(SignTopK(), price, most=example.MOST),
        "alistarh": SignTopK.alistarh(),
    }[method]
    d = whole.rows.shape[1]
    run = example.train(whole, sparsifier, 1, "float64", 400)
    dense = example.train(whole, None, 1, "float64", 400)
    assert run.arrived
    assert dense.arrived
    spent = run.spent(price, Message(sparsifier.layout, "float64", d))[-1]
    dense_price = example.COSTS[cost](example.Dense())
    all_of_it = dense.spent(dense_price, Message(1, "float64", d))[-1]
    assert all_of_it / spent == pytest.approx(ANCHORS[method, cost], rel=0.02)


def test_the_loss_falls_at_every_step_with_deterministic_schemes(
    example: Any, whole: Any
) -> None:
    price = example.COSTS["affine"](PaperPayload())
    for scheme in (TopK(), SignTopK()):
        sparsifier = ExactCAT(scheme, price, most=example.MOST)
        run = example.train(whole, sparsifier, 1, "float64", 30)
        assert np.all(np.diff(run.losses) < 0)
