"""What the tests of several doors share; imports no framework."""

from hvd_sparse import (
    CAT,
    Affine,
    RandomK,
    SignTopK,
    Stochastic,
    Threshold,
    TopK,
)

AFFINE = Affine(per_byte=1.0, per_message=54.0)

# one of each
SPARSIFIERS = [
    TopK(0.05),
    RandomK(0.1),
    Threshold(0.01),
    SignTopK(0.05),
    SignTopK.alistarh(),
    Stochastic(0.05),
    CAT(TopK(), AFFINE),
    CAT(SignTopK(), AFFINE),
    CAT(Stochastic(), AFFINE),
]
