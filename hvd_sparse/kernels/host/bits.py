"""Bit strings in bytes: bit 0 of a byte comes first, so words are little-endian."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hvd_sparse.kernels.host.jit import jit

AT_ONCE = 56  # bits that can be read from anywhere in a byte

_BYTE, _LONG = ir.IntType(8), ir.IntType(64)


@intrinsic
def word_at(typingctx: Any, data: Any, at: Any) -> Any:
    """Eight bytes from this one on, wherever they lie, as a uint64."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, at = arguments
        first = context.make_array(signature.args[0])(context, builder, array).data
        place = builder.bitcast(builder.gep(first, [at]), _LONG.as_pointer())
        return builder.load(place, align=1)

    return types.uint64(data, types.int64), codegen


@intrinsic
def _overwrite(typingctx: Any, data: Any, at: Any, word: Any) -> Any:
    """Eight bytes from this one on, wherever they lie."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, at, word = arguments
        first = context.make_array(signature.args[0])(context, builder, array).data
        place = builder.bitcast(builder.gep(first, [at]), _LONG.as_pointer())
        builder.store(word, place, align=1)
        return context.get_dummy_value()

    return types.void(data, types.int64, types.uint64), codegen


@jit
def put_word(data: Any, at: int, word: Any) -> None:
    """Overwrites eight bytes, from this one on; as many as there are."""
    if at + 8 <= data.size:
        _overwrite(data, at, word)
    else:  # behind the end all is zeros, or somebody else's
        for i in range(at, data.size):
            data[i] = np.uint8(word & np.uint64(255))
            word >>= np.uint64(8)


@jit
def bits_at(data: Any, at: int, count: int) -> Any:
    """Bits [at, at + count) of (bytes,) uint8 as a uint64; at most 56 of them."""
    first = at >> 3
    if first + 8 <= data.size:
        word = word_at(data, first)
    else:  # near the end: what is behind it belongs to somebody else
        word = np.uint64(0)
        for i in range(first, data.size):
            word |= np.uint64(data[i]) << np.uint64(8 * (i - first))
    word >>= np.uint64(at & 7)
    return word & ((np.uint64(1) << np.uint64(count)) - np.uint64(1))


@jit
def set_bits(data: Any, at: int, bits: Any) -> None:
    """Sets those bits of data, from this one on, that are set in a word; at most 56."""
    byte = at >> 3
    word = np.uint64(bits) << np.uint64(at & 7)
    while word:
        data[byte] |= np.uint8(word & np.uint64(255))
        word >>= np.uint64(8)
        byte += 1
