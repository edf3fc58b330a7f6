"""Which tensors go dense, and how many elements are worth sending sparse.

Decided from n, k, the number of ranks and the format alone, so that every rank decides
the same without asking.
"""

from dataclasses import dataclass

from hvd_sparse.core.contracts import Format
from hvd_sparse.core.payload import most_elements


@dataclass(frozen=True)
class WhenCheaper:
    """Dense where payloads would not be smaller than a dense ring allreduce.

    A rank sends (P - 1) payloads in an allgather and 2 (P - 1) / P times the gradient
    in a ring allreduce, so sparse wins when P * payload < 2 * n * itemsize. One rank
    counts as two, so that it runs the whole path. A payload counts as if it travelled
    alone, with 32 bytes beside its entries: a tensor's route does not depend on others.
    """

    def limit(self, n: int, dtype: str, itemsize: int, form: Format, size: int) -> int:
        """The largest k for which sparse is cheaper; negative if none is."""
        dense = 2 * n * itemsize
        payload = (dense - 1) // max(size, 2)  # strictly smaller
        return min(n, int(most_elements(form, dtype, n, payload)))


@dataclass(frozen=True)
class Never:
    """Every tensor goes sparse, whatever it costs."""

    def limit(self, n: int, dtype: str, itemsize: int, form: Format, size: int) -> int:
        """All n."""
        del dtype, itemsize, form, size
        return n


Dense = WhenCheaper | Never
