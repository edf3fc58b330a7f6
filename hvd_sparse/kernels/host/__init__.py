"""The hot loops for arrays in host memory: numpy, torch CPU tensors, TensorFlow.

How exact TopK costs about as much as the addition it follows:

1. `estimate`: from a sample of the sums, a magnitude that some more than k reach;
2. `candidates`: accumulate and compact in one pass. The residual takes the gradient,
   the few elements above the estimate (the candidates) move out in ascending order;
3. `largest`: finish exactly. The k-th largest magnitude among the candidates, ties to
   the lowest index; the others return. If the candidates outgrow their buffer on the
   way, it is cut back to the k largest so far and the bound rises; if fewer than k turn
   up, the residual is scanned again with a lower bound.

`selection` puts the three together, `entries` makes bytes of what was selected, or
reads them, `aggregation` sums up what all ranks sent, and `groups` does either for many
arrays in one call.

Where the result will take the gradient's place at once, pass 2 may leave zeros there
while it has the gradient in cache: the result is then a few additions, and no pass of
its own. Elsewhere the `zeros` of a large result are streamed: written, and never read.

The sample decides the time, never the result, which is the same for every estimate,
every thread count and every processor.

What is used elsewhere is here; the modules themselves are for those who change them.
"""

from hvd_sparse.kernels.host.aggregation import aggregate, aggregate_coded
from hvd_sparse.kernels.host.arrays import address, zeros_like
from hvd_sparse.kernels.host.entries import decode, encode
from hvd_sparse.kernels.host.groups import aggregate_group, select_group
from hvd_sparse.kernels.host.largest import keep_largest
from hvd_sparse.kernels.host.magnitudes import (
    count_magnitudes,
    count_sums,
    largest_first,
    norm,
)
from hvd_sparse.kernels.host.permutation import random_indices
from hvd_sparse.kernels.host.sampling import draw
from hvd_sparse.kernels.host.selection import (
    accumulate,
    add_at,
    is_one_part,
    select_above,
    select_again,
    select_at,
    select_some,
    select_top,
)

__all__ = [
    "accumulate",
    "add_at",
    "address",
    "aggregate",
    "aggregate_coded",
    "aggregate_group",
    "count_magnitudes",
    "count_sums",
    "decode",
    "draw",
    "encode",
    "is_one_part",
    "keep_largest",
    "largest_first",
    "norm",
    "random_indices",
    "select_above",
    "select_again",
    "select_at",
    "select_group",
    "select_some",
    "select_top",
    "zeros_like",
]
