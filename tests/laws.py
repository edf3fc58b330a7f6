"""What the tests of the laws share: tables, gradients, and N ranks in one process.

Adding a sparsifier, a dtype or a kind of kernel adds a row to a table here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from doors import Halving
from hypothesis import strategies as st

from hvd_sparse import (
    CAT,
    Affine,
    Average,
    Never,
    RandomK,
    Selection,
    SignTopK,
    Stochastic,
    Threshold,
    TopK,
)
from hvd_sparse.core.contracts import Located
from hvd_sparse.core.flight import Flight
from hvd_sparse.core.formats import Entries, is_signs
from hvd_sparse.core.frame import Frame
from hvd_sparse.core.indices import EliasFano, KnownIndices, RawIndices
from hvd_sparse.core.path import GradientPath
from hvd_sparse.core.payload import decode
from hvd_sparse.core.received import Received
from hvd_sparse.core.sparsifiers import format_of
from hvd_sparse.core.values import OURS, Float32, Sign
from hvd_sparse.kernels import host, reference

try:
    import torch

    from hvd_sparse.kernels import device
except ModuleNotFoundError:  # then tables have no rows of torch: launch/test --keras3
    torch = None

# ---------------------------------------------------------------------- formats

VALUES = tuple(kind() for kind in OURS)
INDICES = (EliasFano(), RawIndices(), KnownIndices())
FORMATS = {
    form.layout: form for form in (Entries(v, i) for v in VALUES for i in INDICES)
}
PLAIN = Entries(Float32(), RawIndices())
UNINDEXED = Entries(Float32(), KnownIndices())
DEFAULT = Entries(Float32())
SIGNS = Entries(Sign(), EliasFano())


# ---------------------------------------------------------------------- arrays


def as_numpy(array: Any) -> np.ndarray:
    """A numpy array over the memory of an array of any kind; a copy of a device's."""
    if isinstance(array, np.ndarray):
        return array
    array = array.cpu()
    if array.dtype is torch.bfloat16:
        return array.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return array.numpy()


def as_torch(array: np.ndarray) -> Any:
    """A CPU tensor of the same strides; over the same memory where torch takes it."""
    if not (array.flags.aligned and array.flags.writeable):
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def on_device(array: np.ndarray) -> Any:
    """A copy on the accelerator; without one, as_torch."""
    tensor = as_torch(array)
    if not torch.accelerator.is_available():
        return tensor
    return tensor.to(torch.accelerator.current_accelerator())


def bits(array: Any) -> np.ndarray:
    """The bit patterns, by which -0.0 differs from 0.0 and NaN equals itself."""
    array = np.ascontiguousarray(as_numpy(array))
    return array.reshape(-1).view(f"u{array.itemsize}")


def same_bits(found: Any, expected: Any) -> None:
    found, expected = as_numpy(found), as_numpy(expected)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    np.testing.assert_array_equal(bits(found), bits(expected))


def wide(dtype: np.dtype) -> np.dtype:
    """What residuals, wire values and sums of a gradient of this dtype have."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


# ---------------------------------------------------------------------- tables


class TakesTurns(NamedTuple):
    """A user's own sparsifier: `select` and nothing else. Takes turns, 1 in stride."""

    stride: int

    def select(self, residual: Any, gradient: Any, k: int, step: int) -> Selection:
        kept, added = as_numpy(residual), as_numpy(gradient)
        with np.errstate(over="ignore", invalid="ignore"):
            total = kept + added.astype(kept.dtype)
        finite = np.isfinite(total)
        kept[finite] = total[finite]
        turn = np.arange(step % self.stride, kept.size, self.stride, np.int32)[:k]
        values = kept[turn]
        kept[turn] = 0
        if not isinstance(residual, np.ndarray):
            residual.copy_(torch.from_numpy(kept))  # which may live elsewhere
        return Selection(turn, values, int(kept.size - finite.sum()))


# per name, the sparsifier that takes about this share of a gradient; 1 takes it all, as
# it is
SPARSIFIERS: dict[str, Callable[[float], Any]] = {
    "TopK": lambda share: TopK(density=share),
    "RandomK": lambda share: RandomK(density=share, seed=7),
    # the share of a Laplace distribution beyond t is exp(-t)
    "Threshold": lambda share: Threshold(value=max(-math.log(share), 5e-324)),
    "custom": lambda share: TakesTurns(stride=math.ceil(1 / share)),
}

AFFINE = Affine(per_byte=1.0, per_message=54.0)

# and those that take another share, or round what they take: the rest is not lost
WITH_RESIDUAL: dict[str, Callable[[float], Any]] = {
    **SPARSIFIERS,
    "SignTopK": lambda share: SignTopK(density=share),
    "scheduled": lambda share: Halving(density=share),
    "alistarh": lambda share: SignTopK.alistarh(),
    "CAT TopK": lambda share: CAT(TopK(), AFFINE, most=share),
    "CAT SignTopK": lambda share: CAT(SignTopK(), AFFINE, most=share, change=1.5),
}

# and those that keep nothing, because what they send is right on average
EVERY: dict[str, Callable[[float], Any]] = {
    **WITH_RESIDUAL,
    "Stochastic": lambda share: Stochastic(expected_density=share, seed=7),
    "CAT Stochastic": lambda share: CAT(Stochastic(seed=7), AFFINE, most=share),
}


def rounds(sparsifier: Any) -> bool:
    """Whether values are rounded on the wire."""
    return is_signs(format_of(sparsifier))


DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


class Kernels(NamedTuple):
    """Hot loops, and how an array of the kind they take is made from numpy's."""

    module: Any
    array: Callable[[np.ndarray], Any]

    def __repr__(self) -> str:
        return self.module.__name__


KERNELS = {
    "reference": Kernels(reference, lambda array: array),
    "host": Kernels(host, lambda array: array),
}
if torch is not None:
    KERNELS["device"] = Kernels(device, on_device)


# ---------------------------------------------------------------- what to reduce

SHAPES = [(), (0,), (2, 0), (1,), (1, 1, 1), (2,), (15,), (16,), (3, 11), (257,)]
SAMPLED_SHAPES = [(64, 65), (4097,), (9973,)]  # large enough for an estimate


def _subnormals(rng: np.random.Generator, n: int, dtype: np.dtype) -> np.ndarray:
    least = ml_dtypes.finfo(dtype).smallest_subnormal
    return rng.integers(-4, 5, n).astype(dtype) * least


def _extremes(rng: np.random.Generator, n: int, dtype: np.dtype) -> np.ndarray:
    info = ml_dtypes.finfo(dtype)
    # sums of several steps and ranks stay finite
    most = float(info.max) / 64
    least = float(info.smallest_subnormal)
    tiny = float(info.smallest_normal)
    return rng.choice([0.0, -0.0, 1, -1, most, -most, least, -least, tiny, -tiny], n)


def _layers(rng: np.random.Generator, n: int) -> np.ndarray:
    scales = rng.lognormal(0, 2, 10).repeat(-(-n // 10))[:n]
    return scales * rng.normal(size=n)


STYLES: dict[str, Callable[[np.random.Generator, int, np.dtype], np.ndarray]] = {
    "normal": lambda rng, n, dtype: rng.normal(size=n),
    "Laplace": lambda rng, n, dtype: rng.laplace(size=n),
    "heavy tails": lambda rng, n, dtype: rng.standard_cauchy(n).clip(-900, 900),
    "layers": lambda rng, n, dtype: _layers(rng, n).clip(-900, 900),
    "one flat tie": lambda rng, n, dtype: np.full(n, -1.5),
    "ties of both signs": lambda rng, n, dtype: rng.choice([-1.5, 1.5], n),
    "few values": lambda rng, n, dtype: rng.integers(-2, 3, n) / 2,
    "zeros": lambda rng, n, dtype: np.zeros(n),
    "negative zeros": lambda rng, n, dtype: np.full(n, -0.0),
    "almost zeros": lambda rng, n, dtype: rng.choice([0.0, -0.0, 1e-3], n),
    "subnormals": _subnormals,
    "extremes": _extremes,
    "ascending": lambda rng, n, dtype: np.arange(n) / 64,
    "descending": lambda rng, n, dtype: np.arange(n, 0, -1) / 64,
    "one spike": lambda rng, n, dtype: np.arange(n) == rng.integers(max(n, 1)),
}

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "contiguous": lambda array: array,
    "Fortran": lambda array: array.copy(order="F"),
    "strided": lambda array: (
        np.repeat(array, 2, axis=-1)[..., ::2] if array.ndim else array
    ),
    "read-only": lambda array: _read_only(array),
    "misaligned": lambda array: _misaligned(array),
}


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _misaligned(array: np.ndarray) -> np.ndarray:
    data = np.frombuffer(b"\1" + array.tobytes(), np.uint8)[1:]
    return np.ndarray(array.shape, array.dtype, data.data) if data.size else array


class Kind(NamedTuple):
    """All that a gradient is made from: small enough to read in a failure."""

    shape: tuple[int, ...]
    style: str
    layout: str
    seed: int

    def make(self, dtype: np.dtype, *place: int) -> np.ndarray:
        """The gradient of this (step, rank)."""
        rng = np.random.default_rng((self.seed, *place))
        values = STYLES[self.style](rng, math.prod(self.shape), dtype)
        return LAYOUTS[self.layout](values.astype(dtype).reshape(self.shape))


def kinds(
    shapes: Sequence[tuple[int, ...]] = (*SHAPES, *SAMPLED_SHAPES),
    styles: Sequence[str] = tuple(STYLES),
    layouts: Sequence[str] = tuple(LAYOUTS),
) -> st.SearchStrategy[Kind]:
    return st.builds(
        Kind,
        st.sampled_from(shapes),
        st.sampled_from(styles),
        st.sampled_from(layouts),
        st.integers(0, 2**32 - 1),
    )


SIZES = st.integers(1, 4)


def shares() -> st.SearchStrategy[float]:
    return st.sampled_from([0.001, 0.01, 0.1, 0.5, 1])


# ------------------------------------------------------------- ranks in one process


@dataclass
class Loopback:
    """One rank's end of a list that joins N ranks in one process."""

    rank: int
    wires: list[dict[str, list[Any]]]  # per rank and name, all that was ever sent
    weight: int = 1
    uneven: bool = False
    frames: dict[str, Frame] = field(default_factory=dict)  # the last ones

    @property
    def size(self) -> int:
        return len(self.wires)

    def start(self, name: str, payload: Any) -> tuple[str, int]:
        """In a frame of its own."""
        frame = self.frames[name] = Frame([(name, payload)])
        return self.put(name, frame.bytes())

    def put(self, name: str, data: np.ndarray) -> tuple[str, int]:
        sent = self.wires[self.rank].setdefault(name, [])
        sent.append(data)
        return name, len(sent) - 1

    def sent(self, handle: tuple[str, int]) -> list[Any]:
        """By all ranks."""
        name, place = handle
        return [wire[name][place] for wire in self.wires]

    def received(self, handle: tuple[str, int]) -> Received:
        return Received(self.frames[handle[0]], self.sent(handle))

    def finish(self, handle: tuple[str, int]) -> list[Any]:
        return self.received(handle).payloads(0)

    def locate(self, handles: Sequence[tuple[str, int]]) -> Located | None:
        found = [self.received(handle).locate([0]) for handle in handles]
        if not all(found):
            return None
        addresses = np.concatenate([f.addresses for f in found if f], axis=1)
        return Located(addresses, [f.wire_bytes[0] for f in found if f])

    def start_dense(self, name: str, gradient: Any) -> tuple[str, int]:
        return self.put(name, np.array(as_numpy(gradient)))

    def finish_dense(self, handle: tuple[str, int]) -> tuple[np.ndarray, int]:
        gradients = self.sent(handle)
        total = np.zeros(gradients[0].size, wide(gradients[0].dtype))
        with np.errstate(over="ignore", invalid="ignore"):  # as in MPI
            for gradient in gradients:
                total += gradient.astype(total.dtype)
        return total, total.nbytes


def loopback(size: int) -> list[Loopback]:
    """The ends of N ranks: all send, then all receive."""
    wires: list[dict[str, list[Any]]] = [{} for _ in range(size)]
    return [Loopback(rank, wires) for rank in range(size)]


def send(
    path: GradientPath, gradient: Any, name: str = "w", *, in_place: Sequence[str] = ()
) -> Flight:
    """A bucket of one."""
    [flight] = path.send({name: gradient}, in_place)
    return flight


def receive(path: GradientPath, flight: Flight, out: Any) -> Any:
    """The same on its way back; returns out."""
    path.receive([flight], [out])
    return out


class Ranks:
    """N gradient paths in lock step, and what each of them sent last."""

    def __init__(
        self,
        size: int,
        sparsifier: Any,
        *,
        op: int = Average,
        dense: Any = None,
        values: Any = None,
        indices: Any = None,
        loss_scale: Any = None,
    ) -> None:
        given = {
            "op": op,
            "dense": dense or Never(),
            "values": values,
            "indices": indices,
            "loss_scale": loss_scale,
        }
        self.paths = [GradientPath(sparsifier, e, **given) for e in loopback(size)]
        self.sent: list[Selection] = []

    def residuals(self, name: str = "w") -> list[np.ndarray]:
        """Copies, one a rank, flat; call it after the first step."""
        return [as_numpy(p.memory.residuals[name]).copy() for p in self.paths]

    def step(self, gradients: Sequence[Any], name: str = "w") -> list[np.ndarray]:
        """One exchange; what each rank hands back, in memory that held other things."""
        sends = zip(self.paths, gradients, strict=True)
        flights = [send(path, gradient, name) for path, gradient in sends]
        self.sent = list(map(on_the_wire, self.paths, flights))
        outs = [_used_memory(gradient) for gradient in gradients]
        for path, flight, out in zip(self.paths, flights, outs, strict=True):
            path.receive([flight], [out])
            path.traffic.steps += 1
        return [as_numpy(out) for out in outs]

    def step_in_place(self, gradients: Sequence[Any], name: str = "w") -> list[Any]:
        """One exchange whose results take the place of the gradients."""
        sends = zip(self.paths, gradients, strict=True)
        flights = [send(path, g, name, in_place=[name]) for path, g in sends]
        for path, flight, gradient in zip(self.paths, flights, gradients, strict=True):
            path.receive([flight], [gradient])
            path.traffic.steps += 1
        return [as_numpy(gradient) for gradient in gradients]

    def assert_all_went_sparse(self) -> None:
        """By the traffic: what was handed over is payloads and nothing else."""
        for path in self.paths:
            wire = path.exchange.wires[path.exchange.rank]
            assert set(path.traffic.tensors) == set(wire)
            for name, traffic in path.traffic.tensors.items():
                assert traffic.route == "sparse"
                assert traffic.sent_bytes == sum(sent.size for sent in wire[name])


def on_the_wire(path: GradientPath, flight: Flight) -> Selection:
    """What the other ranks read from this rank's payload; nothing if it went dense."""
    if flight.tensor.dense:
        return Selection(np.empty(0), np.empty(0), 0)
    found = decode(path.exchange.finish(flight.handle)[path.exchange.rank])
    if not flight.tensor.unindexed:
        return found
    return found._replace(indices=as_numpy(flight.indices))


def _used_memory(gradient: Any) -> Any:
    shape, dtype = tuple(gradient.shape), as_numpy(gradient.flatten()).dtype
    out = np.full(shape, 7).astype(dtype)
    return (
        out if isinstance(gradient, np.ndarray) else as_torch(out).to(gradient.device)
    )
