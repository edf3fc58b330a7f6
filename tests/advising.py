"""What advice must say, whatever the framework."""

import re
from typing import Any

from hvd_sparse import CAT, Affine, RandomK, SignTopK, Stochastic, Threshold, TopK

LATE = [TopK(0.01), TopK(0.09), SignTopK(0.01), RandomK(0.05)]
VERY_LATE = [TopK(0.001), TopK(0.0099), SignTopK(0.001), RandomK(0.005)]
NOT_LATE = [
    TopK(0.1),
    TopK(1.0),
    RandomK(0.5),
    Stochastic(0.01),  # keeps nothing
    # their density is not known before training
    Threshold(0.1),
    SignTopK.alistarh(),
    CAT(TopK(), Affine(1.0, 54.0)),
]


def assert_advised(advise: Any, optimizer: Any, found: str, better: str) -> None:
    for sparsifier in LATE:
        text = advise(optimizer, sparsifier)
        assert text is not None
        assert f"({found}) with {sparsifier!r}" in text
        assert f"Set {better}: " in text
        assert re.search(r": .*\d %.*\(benchmarks/fidelity.py\)$", text)
    for sparsifier in VERY_LATE:
        text = advise(optimizer, sparsifier)
        assert text is not None
        assert f"({found}) with {sparsifier!r}" in text
        assert "no setting measured so far" in text
        assert better not in text.replace(found, "")
    for sparsifier in NOT_LATE:
        assert advise(optimizer, sparsifier) is None
