"""Takes many damaged frames through all that reads bytes of peers; run by hand.

python tests/programs/fuzz.py --decodes 10000000 [--seed 1]
python tests/programs/fuzz.py --bytes 3fa0...      # one of them again

Says how many a second, the slowest, and how memory grew; of the first that is neither
decoded nor refused in words, its bytes: also where the process dies of it.
"""

import argparse
import mmap
import os
import resource
import signal
import struct
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile import cases, decode_hostile  # beside this folder

WARM = 5000  # decodes in which kernels are loaded, and scenes made
MOST_S, COMPILED_S = 10, 120  # after which a decode has hung: SIGALRM ends the process
REPORT = 1_000_000


def memory_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def decode_all(seed: int, count: int, last: mmap.mmap) -> None:
    """Notes each case in what outlives the process."""
    start, before, slowest, decoded = time.perf_counter(), 0, 0.0, 0
    for i, data in enumerate(cases(seed, count)):
        last[: 4 + len(data)] = struct.pack("<I", len(data)) + data
        signal.alarm(MOST_S if i > WARM else COMPILED_S)
        began = time.perf_counter()
        decoded += not decode_hostile(data)
        if i == WARM:
            before = memory_kib()
        elif i > WARM:
            slowest = max(slowest, time.perf_counter() - began)
        if (i + 1) % REPORT == 0 or i + 1 == count:
            rate = (i + 1) / (time.perf_counter() - start)
            grown = memory_kib() - before
            print(
                f"seed {seed}: {i + 1} decodes, {decoded} of them not refused, "
                f"{rate:.0f} a second, slowest {slowest:.4f} s, {grown} KiB more",
                flush=True,
            )


def in_a_child(seed: int, count: int) -> int:
    last = mmap.mmap(-1, 4096)
    child = os.fork()
    if child == 0:
        decode_all(seed, count, last)
        sys.exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        [size] = struct.unpack_from("<I", last)
        print(f"seed {seed}: ended with {code} in --bytes {last[4 : 4 + size].hex()}")
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decodes", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bytes", type=bytes.fromhex)
    options = parser.parse_args()
    warnings.simplefilter("error")
    if options.bytes is not None:
        print(decode_hostile(options.bytes) or "decoded")
        return 0
    return 1 if in_a_child(options.seed, options.decodes) else 0


if __name__ == "__main__":
    sys.exit(main())
