"""Values: how the numbers of a payload travel, as `values=` of an integration says.

What rounding takes away stays in the residual and comes back later: nothing is lost,
whatever the format. Selection, residuals and sums are not rounded. The bytes are in
`hvd_sparse.kernels.coding`.

| values | bits each, of a float32 | beside them |
|---|---|---|
| `Float32` | 32 | |
| `Float16` | 16 | 2 bytes a tensor |
| `BFloat16` | 16 | |
| `Int8`, `Int4`, `Int2` | 8, 4, 2 | 2 bytes for each 64 values |
| `Sign` | 1 | 4 bytes a tensor |

Of a float64 gradient `Float32` sends 64 bits, and scales are twice as wide, but for
that of `Float16`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from hvd_sparse.kernels import coding


def float_bytes(dtype: str) -> int:
    """Bytes of one unrounded value of a gradient of this dtype."""
    return 8 if dtype == "float64" else 4


@dataclass(frozen=True)
class Values:
    """What the formats of values have in common.

    Attributes:
        layout: its number, in `hvd_sparse.kernels.coding`.
    """

    layout: ClassVar[int]

    def bytes(self, k: Any, dtype: str) -> Any:
        """Bytes of k values of a gradient; k a number or an array."""
        return coding.value_bytes(self.layout, k, float_bytes(dtype))


@dataclass(frozen=True)
class Float32(Values):
    """Values as they are: float32, or float64 for a float64 gradient.

    Example:
        >>> Float32().bytes(10, "float32")
        40
    """

    layout: ClassVar = coding.FLOAT


@dataclass(frozen=True)
class Float16(Values):
    """IEEE halves, 11 significant bits, under a power of two for the whole tensor.

    The largest magnitude becomes 2^14 to 2^15: nothing overflows, and of what is up to
    2^28 times smaller no bit is lost that a half has. An error is at most 2^-11 of a
    value.

    Example:
        >>> Float16().bytes(10, "float32")
        22
    """

    layout: ClassVar = coding.FLOAT16


@dataclass(frozen=True)
class BFloat16(Values):
    """The upper halves of float32 values, rounded to 8 significant bits, ties to even.

    An error is at most 2^-8 of a value. In a float64 gradient, what is beyond the range
    of float32 becomes the largest there is, and from 2^173 on 0: it stays.
    """

    layout: ClassVar = coding.BFLOAT16


@dataclass(frozen=True)
class Int8(Values):
    """Integers in [-127, 127], times a scale for each 64 values.

    The largest magnitude of these is 127 scales; errors are at most half a scale.
    """

    layout: ClassVar = coding.INT8


@dataclass(frozen=True)
class Int4(Values):
    """Integers in [-7, 7], times a scale for each 64 values: see `Int8`."""

    layout: ClassVar = coding.INT4


@dataclass(frozen=True)
class Int2(Values):
    """-1, 0 or 1, times a scale for each 64 values: their mean magnitude.

    Of what is larger the rest stays in the residual; what is below half of it, all.
    """

    layout: ClassVar = coding.INT2


@dataclass(frozen=True)
class Sign(Values):
    """Every value as plus or minus one scale, the mean magnitude: S+Q.

    A bit a value, and one scale. Of all scales it leaves the smallest residual in the
    2-norm. The sign of a zero is that of its bit. value - sent is rounded here, as a
    sum of floats is; it is exact for all others.

    Khirirat, Magnusson, Aytekin, Johansson, Communication Efficient Sparsification for
    Large Scale Machine Learning, 2020, arXiv:2003.06377; see `SignTopK`.

    Example:
        >>> Sign().bytes(10, "float32")
        6
    """

    layout: ClassVar = coding.SIGN


OURS = (Float32, Float16, BFloat16, Int8, Int4, Int2, Sign)
