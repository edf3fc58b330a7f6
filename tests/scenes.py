"""Scenes: tensors that travel together, and what each rank sends of them, undamaged."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import ml_dtypes
import numpy as np
from guarded import Fenced

from hvd_sparse import EliasFano, Never, RandomK, RawIndices, Selection, TopK
from hvd_sparse.core.contracts import Located
from hvd_sparse.core.flight import Flight, Phase, Tensor
from hvd_sparse.core.formats import Entries
from hvd_sparse.core.frame import Frame
from hvd_sparse.core.indices import KnownIndices
from hvd_sparse.core.path import GradientPath
from hvd_sparse.core.payload import DTYPES, MOST_ELEMENTS, Header, Payload, encode
from hvd_sparse.core.received import Received
from hvd_sparse.core.values import OURS
from hvd_sparse.kernels.host import is_one_part

VALUES = tuple(kind() for kind in OURS)
INDICES = (EliasFano(), EliasFano(), RawIndices(), KnownIndices())
SCENES = 1 << 16  # that there are
DRAWS = RandomK(density=0.5, seed=3)  # the indices that all ranks know
LARGE = 1 << 17  # elements from which no result is made, so that it costs no memory
_SIZES = (4, 70, 300, 4000, 40_000)
_HUGE = (MOST_ELEMENTS, MOST_ELEMENTS - 1, 1 << 30, LARGE + 1)
_STEPS = (0, 7, 127, 2**32 - 1, 2**32 + 5)
_ARRAYS = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass
class Handed:
    """An exchange that hands over what has arrived, whatever that is."""

    size: int
    uneven: bool
    rank: int = 0
    weight: int = 1
    received: Received | None = None

    def start(self, name: str, payload: Any) -> Any:
        """Nothing leaves."""

    def finish(self, handle: Any) -> list[Payload | None]:
        """As of `Exchange`; the handle is the place in the frame."""
        assert self.received is not None
        return self.received.payloads(handle)

    def locate(self, handles: Sequence[Any]) -> Located | None:
        """As of `Exchange`."""
        assert self.received is not None
        return self.received.locate(handles)


@dataclass
class Scene:
    """What is there before damage.

    Attributes:
        headers: of the tensors, as rank 0 has them.
        frame: what rank 0 sends.
        rows: what each rank sends, as bytes.
        foreign: the same of tensors that have another n or k, in the same order.
        tensors: as the path of rank 0 has them, and so on.
    """

    headers: list[Header]
    frame: Frame
    rows: list[bytes]
    foreign: list[bytes]
    tensors: list[Tensor]
    outs: list[Fenced]
    exchange: Handed
    path: GradientPath

    @property
    def sums(self) -> bool:
        """Whether results are made, or payloads only decoded."""
        return bool(self.outs)

    def flights(self) -> list[Flight]:
        """As after `send`."""
        for tensor, header in zip(self.tensors, self.headers, strict=True):
            tensor.header, tensor.latest = header, 0
            self.path.memory.residuals[tensor.name][:] = 0
        flights = [self._flight(*each) for each in enumerate(self.tensors)]
        for flight in flights:
            flight.depart()
        return flights

    def _flight(self, place: int, tensor: Tensor) -> Flight:
        known = known_indices(tensor.header) if tensor.unindexed else None
        return Flight(tensor, Phase.FILLING, indices=known, handle=place)


@lru_cache(maxsize=512)
def scene_of(seed: int) -> Scene:
    """One of `SCENES`."""
    rng = np.random.default_rng(seed)
    huge = rng.random() < 0.1
    headers = [_header(rng, huge) for _ in range(rng.integers(1, 5))]
    ranks, uneven = int(rng.integers(1, 4)), bool(rng.random() < 0.15)
    sent = [_payloads(rng, headers) for _ in range(ranks)]
    frames = [Frame(_named(own)) for own in sent]
    rows = [frame.bytes().tobytes() for frame in frames]
    tensors = [_tensor(*each) for each in zip(_names(headers), sent[0], strict=True)]
    exchange = Handed(ranks, uneven)
    path = _path(exchange, rng, tensors, huge)
    foreign = [_foreign(rng, headers, rows[0]) for _ in range(3)]
    outs = [] if huge else [Fenced(t.header.n, t.array_dtype) for t in tensors]
    each = headers, frames[0], rows, foreign, tensors, outs, exchange, path
    return Scene(*each)


def known_indices(header: Header) -> np.ndarray:
    """Those that every rank knows in the step of this header."""
    return DRAWS.indices(header.n, header.k, header.step)


def _header(rng: Any, huge: bool) -> Header:
    indices = INDICES[rng.integers(len(INDICES))]
    form = Entries(VALUES[rng.integers(len(VALUES))], indices)
    n = int(rng.choice(_HUGE) if huge else rng.integers(rng.choice(_SIZES)))
    most = min(n, 50 if huge else 1000)
    k = int(rng.integers(most + 1)) if rng.random() < 0.9 else most
    varies = bool(rng.random() < 0.3) and indices != KnownIndices()
    step = int(rng.choice(_STEPS))
    facts = form, str(rng.choice(DTYPES)), n, k
    text = repr((*facts, varies)).encode()
    digest = int.from_bytes(blake2b(text, digest_size=8).digest(), "little")
    return Header(*facts, step, digest, varies)


def _payloads(rng: Any, headers: Sequence[Header]) -> list[Payload]:
    return [_payload(rng, header) for header in headers]


def _payload(rng: Any, header: Header) -> Payload:
    k = int(rng.integers(header.k + 1)) if header.varies else header.k
    if header.form.indices == KnownIndices():
        indices = known_indices(header)
    elif header.n < LARGE:
        indices = np.sort(rng.choice(header.n, k, replace=False)).astype(np.int32)
    else:
        indices = np.unique(rng.integers(header.n, size=3 * k + 9))
        indices = np.sort(rng.choice(indices, k, replace=False)).astype(np.int32)
    values = rng.normal(size=k) * 10.0 ** rng.integers(-9, 9)
    nonfinite = int(rng.random() < 0.03)
    chosen = Selection(indices, values.astype(header.wide), nonfinite)
    return encode(chosen, header)[0]


def _names(headers: Sequence[Header]) -> list[str]:
    return [f"t{place}" for place in range(len(headers))]


def _named(payloads: Sequence[Payload]) -> list[tuple[str, Payload]]:
    return [(f"t{place}", payload) for place, payload in enumerate(payloads)]


def _foreign(rng: Any, headers: Sequence[Header], row: bytes) -> bytes:
    """Entries of tensors of another n or k, behind the header that is expected."""
    others = []
    for header in headers:
        n = min(MOST_ELEMENTS, int(header.n * rng.choice([0.5, 1, 2])) + 1)
        k = min(n, max(0, header.k + int(rng.integers(-3, 4))))
        others.append(header._replace(n=n, k=k, varies=False, digest=int(n * k)))
    entries = [payload.entries.tobytes() for payload in _payloads(rng, others)]
    size = len(row) - sum(map(len, entries))
    return row[: max(24, min(size, len(row)))] + b"".join(entries)


def _tensor(name: str, payload: Payload) -> Tensor:
    header = payload.header
    known = header.form.indices == KnownIndices()
    narrow = header.dtype in ("float16", "bfloat16")
    plain = not (known or narrow or header.varies) and is_one_part(header.n)
    dtype = _ARRAYS.get(header.dtype) or np.dtype(header.dtype)
    about = name, (header.n,), header.dtype, dtype, dtype.itemsize, DRAWS, header
    of = {"follows": False, "unindexed": known, "clears": False, "dense": False}
    of |= {"trusted": True, "plain": plain, "grouped": plain}
    return Tensor(*about, **of, payload=payload)


def _path(
    exchange: Handed, rng: Any, tensors: Sequence[Tensor], huge: bool
) -> GradientPath:
    scaled = {"loss_scale": lambda: 1.0} if rng.random() < 0.3 else {}
    path = GradientPath(TopK(0.5), exchange, dense=Never(), **scaled)
    path.begin()
    for tensor in tensors:
        size = 0 if huge else tensor.header.n
        path.memory.residuals[tensor.name] = np.zeros(size, tensor.header.wide)
    return path
