"""Models and optimizers of one rank to all, over plain MPI: to start alike.

Tensors travel one by one from and into the memory where they are. What is not in host
memory, has gaps there, or has its elements in another order than on a peer, goes
through one buffer of its size; what has no dense memory at all, such as a sparse
tensor, goes as a pickle.
"""

import io
import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from hvd_sparse.core.sharing import repeats
from hvd_sparse.torch.sharing import is_gapless, shared_with
from hvd_sparse.transport.mpi.broadcast import Broadcast, Described

Tensor = torch.Tensor


def broadcast_parameters(
    params: Any, *, root: int = 0, comm: Any = None, timeout_s: float = 600
) -> None:
    """Overwrite parameters and buffers with those of one rank.

    Beside the model it takes memory for one tensor at most.

    Args:
        params: model.state_dict(), or pairs of name and tensor; the same names, shapes
            and dtypes on every rank. What is no tensor is left alone.
        root: the rank whose values all take.
        comm: as of DistributedOptimizer.
        timeout_s: seconds to wait for peers without anything that arrives.

    Raises:
        ValueError: root is no rank of comm.
        ExchangeError: a peer has other tensors, or tensors that share memory otherwise,
            and nothing has moved; or it did not arrive in time.
    """
    with Broadcast(root, comm, timeout_s) as broadcast:
        with broadcast.reported():
            pairs = params.items() if hasattr(params, "items") else params
            found = {name: t for name, t in pairs if isinstance(t, Tensor)}
            tensors = {name: found[name] for name in sorted(found)}
            described = _describe(tensors)
        alike = broadcast.agree(described, layout=_layout(tensors))
        _overwrite(broadcast, tensors, alike)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer,
    *,
    root: int = 0,
    comm: Any = None,
    timeout_s: float = 600,
) -> None:
    """Overwrite the state and the options of an optimizer with those of one rank.

    A rank that has no state yet gets it. Residuals are not part of it: they belong to
    their rank.

    Args:
        optimizer: distributed or not; the same parameters on every rank.
        root: the rank whose state all take.
        comm: as of DistributedOptimizer.
        timeout_s: seconds to wait for peers without anything that arrives.

    Raises:
        ValueError: root is no rank of comm.
        ExchangeError: a peer has other parameters, and nothing has moved; or it did not
            arrive in time.
    """
    with Broadcast(root, comm, timeout_s) as broadcast:
        with broadcast.reported():
            held = {
                f"group{g}.parameter{i}": (tuple(p.shape), _dtype(p))
                for g, group in enumerate(optimizer.param_groups)
                for i, p in enumerate(group["params"])
            }
            own = _Taken(optimizer.state_dict())
        described = [Described(name, *facts) for name, facts in held.items()]
        broadcast.agree(described, type(optimizer).__name__)
        options = broadcast.bytes(own.options)
        with broadcast.reported():
            state, tensors = _put_together(options, own)
            named = {f"state {i}": t for i, t in enumerate(tensors)}
            described = _describe(named)
        alike = broadcast.agree(described, layout=_layout(named))
        _overwrite(broadcast, named, alike)
        optimizer.load_state_dict(state)


# ------------------------------------------------------------------ tensor by tensor


def _describe(tensors: Mapping[str, Tensor]) -> list[Described]:
    """Also which share memory: one that is shared can not hold two values."""
    dense = [name for name, t in tensors.items() if not _is_pickled(t)]
    shared = shared_with(tensors[name] for name in dense)
    also = {dense[i]: f" in the memory of {dense[j]}" for i, j in shared.items()}
    return [
        Described(name, tuple(t.shape), _dtype(t) + _kind(t) + also.get(name, ""))
        for name, t in tensors.items()
    ]


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _kind(tensor: Tensor) -> str:
    if _is_pickled(tensor):
        return f" of layout {str(tensor.layout).removeprefix('torch.')}"
    return " expanded" if repeats(tensor) else ""


def _is_pickled(tensor: Tensor) -> bool:
    return tensor.layout is not torch.strided or tensor.is_quantized


def _layout(tensors: Mapping[str, Tensor]) -> str:
    """In which order elements are in memory."""
    return repr([t.stride() for t in tensors.values() if not _is_pickled(t)])


def _overwrite(
    broadcast: Broadcast, tensors: Mapping[str, Tensor], alike: bool
) -> None:
    """Overwrites tensors with those of the root; alike: in the layout of every rank."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            if _is_pickled(tensor):
                _overwrite_pickled(broadcast, tensor)
            elif not tensor.numel():
                continue
            elif _is_plain(tensor, alike):
                memory = tensor.detach().as_strided((tensor.numel(),), (1,))
                broadcast.send(name, memory.view(torch.uint8).numpy())
                memory[:0].zero_()  # autograd counts that it changed
            else:
                _overwrite_through_a_buffer(broadcast, name, tensor)
        broadcast.wait()


def _is_plain(tensor: Tensor, alike: bool) -> bool:
    """Whether its memory is what travels: in host memory, and in the order of peers."""
    lazy = tensor.is_conj() or tensor.is_neg()
    in_order = tensor.is_contiguous() or (alike and is_gapless(tensor))
    return tensor.is_cpu and in_order and not lazy


def _overwrite_through_a_buffer(
    broadcast: Broadcast, name: str, tensor: Tensor
) -> None:
    buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
    if broadcast.is_root:
        buffer.copy_(tensor)
    broadcast.send(name, buffer.view(-1).view(torch.uint8).numpy())
    broadcast.wait(name)
    if broadcast.is_root:
        return
    for dimension, stride in enumerate(tensor.stride()):
        if stride == 0:  # what is one element here is one on the root
            tensor, buffer = (t.narrow(dimension, 0, 1) for t in (tensor, buffer))
    tensor.copy_(buffer)


def _overwrite_pickled(broadcast: Broadcast, tensor: Tensor) -> None:
    buffer = io.BytesIO()
    if broadcast.is_root:
        torch.save(tensor, buffer)
    data = broadcast.bytes(buffer.getvalue())
    if not broadcast.is_root:
        # from a peer of this job, which could run any code here anyway
        file = io.BytesIO(data)
        tensor.copy_(torch.load(file, map_location="cpu", weights_only=False))


# ---------------------------------------------------------- the state of an optimizer


class _Like(NamedTuple):
    """In place of a tensor among the options.

    Attributes:
        place: among the tensors.
        strides: where its memory has no gaps; else None.
    """

    place: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    strides: tuple[int, ...] | None

    def found_in(self, own: list[Tensor]) -> bool:
        """Whether there is one like it in its place."""
        if self.place >= len(own):
            return False
        here = own[self.place]
        return (tuple(here.shape), here.dtype) == (self.shape, self.dtype)

    def new(self) -> Tensor:
        if self.strides is None:
            return torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return torch.empty_strided(
            self.shape, self.strides, dtype=self.dtype, device=self.device
        )


class _Taken(pickle.Pickler):
    """A state taken apart: its tensors, and as a pickle whatever else is in it."""

    def __init__(self, state: Any) -> None:
        buffer = io.BytesIO()
        super().__init__(buffer, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._places: dict[int, _Like] = {}
        self.dump(state)
        self.options = buffer.getvalue()

    def persistent_id(self, item: Any) -> _Like | None:
        if not isinstance(item, Tensor) or _is_pickled(item):
            return None
        if id(item) not in self._places:  # the same one twice stays one
            self._places[id(item)] = _Like(
                len(self.tensors),
                tuple(item.shape),
                item.dtype,
                item.device.type,
                item.stride() if is_gapless(item) else None,
            )
            self.tensors.append(item.detach())
        return self._places[id(item)]


class _Restored(pickle.Unpickler):
    def __init__(self, data: bytes, own: list[Tensor]) -> None:
        super().__init__(io.BytesIO(data))
        self._own = own
        self.tensors: dict[int, Tensor] = {}

    def persistent_load(self, like: Any) -> Tensor:
        if like.place not in self.tensors:
            here = like.found_in(self._own)
            self.tensors[like.place] = self._own[like.place] if here else like.new()
        return self.tensors[like.place]


def _put_together(options: bytes, own: _Taken) -> tuple[Any, list[Tensor]]:
    """The root's state with tensors of this rank, old ones where they fit; and these.

    The pickle is from a peer of this job, which could run any code here anyway.
    """
    restored = _Restored(options, own.tensors)
    state = restored.load()
    return state, [restored.tensors[place] for place in sorted(restored.tensors)]
