"""Logarithmic bins of magnitudes: all kinds of kernels count in the same ones.

A bin holds the magnitudes whose bit patterns agree in all but the lowest bits: 64 bins
from each power of two to the next, so that members of a bin differ by less than 1.6 %.
"""

BINS = {4: 1 << 14, 8: 1 << 17}  # by the bytes of a float: sign-less pattern >> SHIFTS
SHIFTS = {4: 17, 8: 46}  # leaves 6 bits of the fraction
