"""The door for torch.distributed: a communication hook of DistributedDataParallel.

    import hvd_sparse.torch as sparse

    model = DistributedDataParallel(model)
    sparse.register(model, sparse.TopK(density=0.01))  # added

DDP calls the hook with a bucket of gradients as soon as the backward pass has made all
of them; `reducer` has what happens then.
"""

import gc
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from hvd_sparse.core.contracts import Average, Format, Sparsifier
from hvd_sparse.core.indices import Indices
from hvd_sparse.core.interrupts import Uninterrupted
from hvd_sparse.core.loss_scale import scale_of
from hvd_sparse.core.path import GradientPath
from hvd_sparse.core.routing import Dense, WhenCheaper
from hvd_sparse.core.traffic import Traffic
from hvd_sparse.core.values import Values
from hvd_sparse.torch.reducer import Reducer
from hvd_sparse.torch.states import as_tensors, on_host

Tensor = torch.Tensor


class SparseState:
    """What `sparse_hook` keeps of one model on one rank.

    Example:
        state = sparse.SparseState(sparse.TopK(density=0.01))
        ddp_model.register_comm_hook(state, sparse.sparse_hook)
    """

    def __init__(
        self,
        sparsifier: Sparsifier,
        *,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        process_group: Any = None,
        op: int = Average,
        dense: Dense = WhenCheaper(),  # noqa: B008  # frozen: one instance serves all
        values: Values | Format | None = None,
        indices: Indices | None = None,
        start_iter: int = 0,
        timeout_s: float = 600,
        scaler: Any = None,
    ) -> None:
        """Before or after the model is made; ranks meet at its first bucket.

        Args:
            sparsifier: TopK, RandomK, Threshold or your own; the same on every rank.
            named_parameters: of the model; its own unless given.
            process_group: of torch.distributed; the model's own unless given.
            op: hvd_sparse.Average over the ranks, or hvd_sparse.Sum.
            dense: which tensors go dense: WhenCheaper() or Never().
            values: how values travel: Float32(), Float16(), BFloat16(), Int8(), Int4(),
                Int2(), Sign(), or a Format of your own; unless given as the sparsifier
                is made for.
            indices: how indices travel: EliasFano(), some 2 + log2(n / k) bits each, or
                RawIndices(), 32 bits.
            start_iter: so many steps at first go dense, by DDP's own allreduce.
            timeout_s: seconds to wait for peers in a bucket; a warning comes at 60. The
                process group's own timeout, if that is shorter.
            scaler: the GradScaler, where there is one, so that residuals follow its
                scale and a step that it skips leaves what was sent in them.

        Raises:
            TypeError: scaler can not be asked for its scale.
            ValueError: start_iter is negative, or names are not unique.
        """
        if start_iter < 0:
            raise ValueError(f"start_iter must be at least 0, got {start_iter}")
        self._loss_scale = scale_of(scaler)
        self._path_of = partial(
            GradientPath,
            sparsifier,
            op=op,
            dense=dense,
            values=values,
            indices=indices,
            loss_scale=self._loss_scale,
        )
        self._op = op
        self._names = (
            None if named_parameters is None else _given_names(named_parameters)
        )
        self._group = process_group
        self._start_iter = start_iter
        self._timeout_s = timeout_s
        self._steps = 0  # complete
        # parameters that are still to come in the first step of a static_graph, of
        # which DDP calls no bucket the last; below 0 in all other steps
        self._missing = -1
        self._waiting: dict[str, Any] = {}  # a state, loaded before ranks have met
        self._reducer: Reducer | None = None

    # ------------------------------------------------------------------------- buckets

    def exchange(self, bucket: Any) -> Any:
        """As of `sparse_hook`."""
        with Uninterrupted():
            reducer = self._reducer or self.attach(_model_of(self))
            if self._is_dense(bucket):
                future = self._all_reduce(bucket)
                reducer.beside(future)
            else:
                future = reducer.send(bucket)
            self._missing -= len(bucket.parameters())
            if bucket.is_last() or self._missing == 0:
                self._missing = -1
                reducer.receive()
                self._steps += 1
            return future

    def _is_dense(self, bucket: Any) -> bool:
        """At first; and rows of an embedding, which come in a bucket of their own."""
        sparse = bucket.buffer().layout is not torch.strided
        return sparse or self._steps < self._start_iter

    def _all_reduce(self, bucket: Any) -> Any:
        """DDP's own average; or the sum."""
        if self._op == Average:
            averaged: Any = allreduce_hook
            return averaged(self._group, bucket)
        work = dist.all_reduce(bucket.buffer(), group=self._group, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    def attach(self, model: Any) -> Reducer:
        """Meet the ranks of this model; collective. `register` and the hook call it.

        Raises:
            RuntimeError: model is None, and names or the group were not given.
            ExchangeError: a peer did not come.
        """
        if model is None and (self._names is None or self._group is None):
            raise RuntimeError(
                "the model of this SparseState is not found: give it named_parameters= "
                "and process_group=, or use register(model, sparsifier)"
            )
        self._names = self._names or _names(model.module.named_parameters())
        self._group = self._group or model.process_group
        if model is None or model.static_graph:
            self._missing = _count(model, self._names)
        finds_unused = model is not None and (
            model.find_unused_parameters or model.static_graph
        )
        reducer = Reducer(
            self._names,
            self._group,
            self._timeout_s,
            self._path_of,
            finds_unused=finds_unused,
        )
        try:
            self._load(reducer, self._waiting)
        except BaseException as error:
            reducer.exchange.report(error)  # peers may have better states
            raise
        self._reducer, self._waiting = reducer, {}
        return reducer

    @property
    def traffic(self) -> Traffic:
        """Bytes sent and received so far; nothing before ranks have met."""
        return Traffic() if self._reducer is None else self._reducer.path.traffic

    # --------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """What this rank has not sent yet, as copies: save it beside the model.

        Returns:
            under "rank r", which is this one: format, rank, size, configuration, step,
            steps, and under "tensors", per name, shape, dtype, step and residual (a
            tensor; None where it goes dense). Ranks have different keys, so that
            torch.distributed.checkpoint takes the states of all.
        """
        if self._reducer is None:
            return self._waiting
        state = as_tensors(self._reducer.path.residuals.state_dict())
        rank = self._reducer.exchange.rank
        return {f"rank {rank}": {**state, "steps": self._steps}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, bitwise, where state_dict was called; each rank loads its own.

        Raises:
            ValueError: the state is of another rank, size, configuration or model;
                before the first step, that is told in it.
        """
        if self._reducer is None:
            self._waiting = dict(state)
        else:
            self._load(self._reducer, state)

    def _load(self, reducer: Reducer, state: Mapping[str, Any]) -> None:
        if not state:
            return
        own = f"rank {reducer.exchange.rank}"
        if own not in state or "steps" not in state[own]:
            found = ", ".join(map(str, state))
            raise ValueError(f"state must be that of {own} in DDP, got {found}")
        reducer.path.residuals.load_state_dict(on_host(state[own]))
        reducer.exchange.step = state[own]["step"]
        self._steps = state[own]["steps"]

    def _elsewhere(self) -> dict[str, Any]:
        state = {**vars(self), "_waiting": self.state_dict()}
        return {**state, "_reducer": None, "_names": None, "_group": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "SparseState":
        """For another model: of the same residuals, and of no ranks yet."""
        copied = SparseState.__new__(SparseState)
        vars(copied).update(self._elsewhere())
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """All but the model and its ranks, which another process finds anew.

        Raises:
            TypeError: it has a scaler, of which a copy would be another one.
        """
        if self._loss_scale is not None:
            raise TypeError(
                "a SparseState with scaler= can not be pickled: save its state_dict()"
            )
        return self._elsewhere()


def sparse_hook(  # DDP insists on these annotations, or none
    state: SparseState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # its stubs have none
) -> torch.futures.Future[torch.Tensor]:
    """For `register_comm_hook` of DistributedDataParallel, which calls it.

    Args:
        state: of this model and rank.
        bucket: its gradients become their averages over the ranks.

    Raises:
        ExchangeError: a peer disagrees, raised, or did not arrive in time; in the hook
            of the last bucket. What was sent is back in the residuals.
    """
    future: torch.futures.Future[torch.Tensor] = state.exchange(bucket)
    return future


def _names(parameters: Iterable[tuple[str, Tensor]]) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in parameters}


def _given_names(parameters: Iterable[tuple[str, Tensor]]) -> dict[Tensor, str]:
    """Without what DDP puts before the name of every parameter of its model.

    Raises:
        ValueError: names are not unique.
    """
    found = list(parameters)
    twice = [name for name, count in Counter(n for n, _ in found).items() if count > 1]
    if twice:
        raise ValueError(
            f"named_parameters must have unique names, {twice[0]} is twice"
        )
    prefix = "module." if all(n.startswith("module.") for n, _ in found) else ""
    return _names((name.removeprefix(prefix), p) for name, p in found)


def _count(model: Any, names: Mapping[Tensor, str]) -> int:
    """Parameters that the buckets of a step have together."""
    of_ddp = getattr(model, "_module_parameters", names)  # without those to ignore
    return sum(parameter.requires_grad for parameter in of_ddp)


def _model_of(state: SparseState) -> Any:
    """The model that this state is registered with; None if none is found."""
    for found in gc.get_objects():  # a hook is not told
        if issubclass(type(found), DistributedDataParallel):
            hooks = getattr(found, "_comm_hooks", ())
            if any(held is state for _, held in hooks):
                return found
    return None
