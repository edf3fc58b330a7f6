"""The door for PyTorch under an unmodified Horovod.

    import horovod.torch as hvd, hvd_sparse.torch as sparse

    compression = sparse.SparseCompressor(
        sparse.TopK(density=0.001), named_parameters=model.named_parameters()
    )
    optimizer = hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=compression
    )

Horovod calls `compress` with a gradient, reduces what it returns, and calls
`decompress` with the result. So `compress` sends the gradient on its path and returns
two numbers for Horovod to reduce, and `decompress` receives it. From what became of the
two numbers it learns the op, which Horovod does not tell. Most gradients wait until the
last one of their batch is there, and are then sent together.

Until `synchronize()` or `step()` a gradient stays what the backward pass made it, and
may be read. Then the result takes its place: to write there in between is an error.
A write through `p.grad.data` or `p.grad.numpy()` is not noticed.
"""

import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hvd_sparse.advice import Adviser
from hvd_sparse.carriers import Carrier, Embedded, Gathered
from hvd_sparse.core.contracts import Average, ExchangeError, Op, Sparsifier
from hvd_sparse.core.flight import Flight
from hvd_sparse.core.formats import Values
from hvd_sparse.core.path import GradientPath
from hvd_sparse.core.routing import Dense, WhenCheaper
from hvd_sparse.core.scaling import scale_of
from hvd_sparse.core.traffic import Traffic
from hvd_sparse.kernels import host
from hvd_sparse.torch import elastic
from hvd_sparse.torch.advice import advise
from hvd_sparse.torch.contended import Contended
from hvd_sparse.torch.exchanges import (
    EmbeddedExchange,
    GatheredExchange,
    horovod,
    is_exchanged,
    waits_for_peers,
)
from hvd_sparse.torch.names import Caller, ParameterNames, find_caller
from hvd_sparse.torch.places import Place, Places
from hvd_sparse.torch.scaling import refuse_before_exchange
from hvd_sparse.torch.states import as_tensors, on_host, viewed
from hvd_sparse.torch.unused import Unused, looked_at
from hvd_sparse.torch.wrapped import (
    enlist,
    exchanging,
    is_frozen,
    newcomers,
    with_gradients,
)
from hvd_sparse.watchdog import Watchdog

Tensor = torch.Tensor

_COPIED = 1 << 20  # bytes of a gradient that goes dense: no more than that are copied
_REDUCIBLE = (torch.float16, torch.float32, torch.float64)  # by Horovod 0.28.1


@dataclass(slots=True)
class Context:
    """What decompress must know of a gradient that compress was given.

    Attributes:
        name: of its parameter.
        place: where the gradient is.
        dense: it is reduced by Horovod.
        flight: None until it is on its way.
        result: None until it is there.
    """

    name: str
    place: Place
    dense: bool = False
    flight: Flight | None = None
    result: Tensor | None = None

    @property
    def sent(self) -> Flight:
        """The flight of a gradient that is on its way."""
        if self.flight is None:
            raise forgotten(self.name)
        return self.flight

    @property
    def array(self) -> Any:
        """The gradient as the path sees it."""
        return viewed(self.place.memory)


@dataclass(slots=True)
class Idle:
    """In place of a Context: no rank sends anything of this parameter.

    Attributes:
        name: of the parameter.
        gradient: stays as it is.
        frozen: the parameter, if that is why; None before a closure.
    """

    name: str
    gradient: Tensor
    frozen: Tensor | None


def forgotten(name: str) -> ExchangeError:
    """What to raise where the state is not that in which a gradient left."""
    return ExchangeError(
        f"{name}: is not on its way: a state was loaded between the backward pass and "
        "the optimizer's step"
    )


def unsent(name: str) -> ValueError:
    """What to raise where a gradient of this rank alone would move a parameter."""
    return ValueError(
        f"{name}: joined the optimizer after hvd.DistributedOptimizer was made, and "
        "its gradient is not sent in this step; in this first one call "
        "optimizer.step() without optimizer.synchronize() before"
    )


def changed(name: str) -> ValueError:
    """What to raise where the result would overwrite what somebody wrote."""
    return ValueError(
        f"{name}: its gradient was changed after it was sent; call "
        "optimizer.synchronize() before you change gradients, and optimizer.step() "
        "within optimizer.skip_synchronize()"
    )


def _add_waiting(saved: dict[str, Any], context: Context) -> None:
    """Overwrites the copy of a residual with what it is if the step is given up."""
    if saved["residual"] is None:
        saved["residual"] = host.zeros_like(context.array)
    flat = saved["residual"].reshape(-1)
    host.accumulate(flat, context.array.reshape(-1))
    saved["residual"] = flat.reshape(saved["shape"])


class SparseCompressor:
    """Sends what is worth it of each gradient; for `compression=` of Horovod.

    One compressor serves one optimizer. With a single process Horovod calls no
    compressor, and training is dense; in elastic training it calls one all the same.

    To write into a gradient between the backward pass and `synchronize()` is a
    ValueError. A write through `p.grad.data` or `p.grad.numpy()`, which PyTorch does
    not count, is not noticed: the result takes its place.
    """

    def __init__(
        self,
        sparsifier: Sparsifier,
        *,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        op: int | None = None,
        dense: Dense = WhenCheaper(),  # noqa: B008  # frozen: one instance serves all
        values: Values | None = None,
        exchange: Carrier = Gathered(),  # noqa: B008  # frozen as well
        prefix: str = "hvd_sparse",
        process_set: Any = None,
        timeout_s: float = 600,
        scaler: Any = None,
        undo: bool = False,
    ) -> None:
        """Decide what to send; no communication yet.

        Args:
            sparsifier: TopK, RandomK, Threshold or your own; the same on every rank.
            named_parameters: model.named_parameters(). Without it the names are those
                of the optimizer.
            op: found out from Horovod unless given; then a mismatch is an error.
            dense: which tensors go dense, by Horovod's own allreduce: WhenCheaper() or
                Never().
            values: how values travel: Float32(), or Sign(), which takes half the bytes;
                unless given as the sparsifier is made for.
            exchange: Gathered(), or Embedded() where ranks may call hvd.join().
            prefix: of the names of collectives. Optimizers that work at the same time
                on parameters of equal names need different ones.
            process_set: the one that is given to the optimizer, if any.
            timeout_s: seconds in which nothing moves after which to give up and shut
                Horovod down; a warning is logged at 60.
            scaler: the GradScaler, where there is one, so that residuals follow its
                scale and a step that it skips leaves what was sent in them.
            undo: keep a copy of every residual, so that `discard` can bring it back:
                memory of the gradients' size, and one pass more over it.

        Raises:
            TypeError: sparsifier can not select, exchange is no carrier, or scaler can
                not be asked for its scale.
            ValueError: an argument is out of range, a name comes twice, or exchange is
                Embedded() and the sparsifier has no fixed density.
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        if not isinstance(exchange, Gathered | Embedded):
            raise TypeError(
                f"exchange must be Gathered() or Embedded(), got {exchange!r}"
            )
        fixed = getattr(sparsifier, "density", None) is not None
        if isinstance(exchange, Embedded) and not fixed:
            raise ValueError(
                "exchange=Embedded() needs a k that is the same on every rank, such as "
                f"that of TopK or RandomK; {sparsifier!r} has none"
            )
        self.op = op
        self._process_set = process_set
        self._carrier: EmbeddedExchange | GatheredExchange = (
            EmbeddedExchange(self._group)
            if isinstance(exchange, Embedded)
            else GatheredExchange(self._group, prefix, padded=not fixed)
        )
        expected = Average if op is None else op
        self._path = GradientPath(
            sparsifier,
            self._carrier,
            op=expected,
            dense=dense,
            values=values,
            loss_scale=scale_of(scaler),
            undo=undo,
        )
        if op is None:
            self._path.plan.op_name = "the optimizer's"
        self._names = ParameterNames(named_parameters)
        self._under_way: dict[str, Context] = {}
        self._waiting: dict[str, Context] = {}  # for the last one of their batch
        self._places = Places()
        self._contended = Contended()
        self._planned = False
        self._arriving = False  # results of this step
        self._before_closure = False
        self._unused = Unused()
        self._looked: set[str] = set()  # names of tensors that tell what is unused
        self._stepping = False
        self._optimizer: weakref.ref[Any] | None = None
        self._adviser = Adviser(advise, sparsifier)
        self._elastic = elastic.is_elastic()
        self._shutdown = elastic.Shutdown()
        self._lock = threading.RLock()  # hooks run in several autograd threads
        self._watchdog = Watchdog(
            timeout_s,
            rank=lambda: horovod().rank(),
            shutdown=self._shutdown,
            waiting=waits_for_peers,
        )
        weakref.finalize(self, self._watchdog.stop)
        horovod()
        elastic.register(SparseCompressor)
        _watch_steps()

    def __reduce__(self) -> Any:
        """Not to be copied or pickled: a copy would send the same residuals again."""
        raise TypeError(
            "SparseCompressor can not be copied or pickled, it serves one optimizer: "
            "make another, or save its state_dict()"
        )

    def __repr__(self) -> str:
        """What was chosen."""
        return f"SparseCompressor({self._path.plan.configuration})"

    # ------------------------------------------------------------- called by Horovod

    def compress(self, tensor: Tensor) -> tuple[Tensor, Context | Idle]:
        """Send a gradient on its path; returns what Horovod is to reduce.

        Raises:
            TypeError: the gradient is not floating.
            ValueError: op is Adasum, the parameter is unknown, its gradient changed its
                shape, one that waits was changed, the optimizer is another than before,
                or the state of elastic training does not have this compressor.
        """
        with self._lock:
            caller = find_caller(depth=1)
            self._check_gradient(tensor, caller)
            if caller is not None:
                self._check_optimizer(
                    caller.optimizer, before_closure=caller.steps_with_closure
                )
            if self._elastic and not self._shutdown.recovers:
                self._shutdown.recovers = elastic.covers(self)
            name, parameter = self._names.find(tensor, caller)
            if name in self._under_way and self._path.scaling.is_used:
                self._give_up_all()  # before the loss scale changes
            if not self._under_way:
                self._begin(caller)
            if caller is not None and self._is_idle(caller, parameter):
                frozen = None if parameter.requires_grad else parameter
                return self._carrier.nothing(), Idle(name, tensor, frozen)
            return self._send(name, tensor, parameter)

    def _begin(self, caller: Caller | None) -> None:
        """The first gradient of a step."""
        if caller is not None and caller.synchronizing:  # no backward pass since
            self._unused.forget()
        self._throw_away()
        self._path.begin()
        self._contended.clear()
        if caller is None:
            return
        joined = enlist(caller.optimizer, self._names)
        if joined and caller.synchronizing:  # too late for this time
            raise unsent(joined[0])
        if not self._planned:
            self._plan(caller.optimizer)

    def _throw_away(self) -> None:
        """The step before, if nothing became of it."""
        if not self._unused.is_thrown_away():
            return
        if self._path.residuals.can_discard:
            self._path.residuals.discard()
        else:
            self._unused.warn(stacklevel=5)

    def _is_idle(self, caller: Caller, parameter: Tensor) -> bool:
        """Whether there is nothing to send, nor would the result be of use.

        Of a parameter that is frozen, whose residual waits until it is thawed, and
        before a closure has computed gradients.
        """
        if is_frozen(caller.optimizer, parameter):
            return True
        self._before_closure = self._before_closure and caller.steps_with_closure
        return self._before_closure

    def _check_gradient(self, tensor: Tensor, caller: Caller | None) -> None:
        """Adasum gives weights: the parameter itself."""
        given = None if caller is None else caller.parameter
        if tensor is given or tensor in self._names:
            raise ValueError(
                "op=Adasum is not supported: it combines weights, not gradients; use "
                "op=hvd.Average or hvd.Sum"
            )

    def decompress(self, tensor: Tensor, ctx: Context | Idle | None) -> Tensor:
        """Receive the gradient that was sent; `tensor` is what Horovod reduced.

        Returns:
            The gradient's own tensor, overwritten with the mean or sum over ranks;
            another where its memory is needed by others.

        Raises:
            ExchangeError: a peer disagrees, or did not arrive before Horovod was shut
                down. What was sent is back in the residual.
            ValueError: the gradient was changed after it was sent.
        """
        if ctx is None:  # a sparse gradient: Horovod gathers its rows itself
            self._look_for_overflow(tensor)
            return tensor
        if isinstance(ctx, Idle):
            return self._receive_nothing(tensor, ctx)
        with self._lock:
            if ctx.result is None:  # some were received with the first of their batch
                if not self._arriving:  # the first result of this step
                    refuse_before_exchange(depth=1)
                    self._places.settle()
                    self._arriving = True
                if ctx.dense:
                    self._receive_dense(tensor, ctx)
                else:
                    self._receive(tensor, ctx)
            assert ctx.result is not None
            self._note(ctx)
            self._contended.keep(ctx.name, ctx.place, ctx.result)
            return ctx.place.seen(ctx.result)

    def _note(self, ctx: Context) -> None:
        """After `synchronize`, by the user, who may do with it what he likes."""
        if self._stepping or self._path.scaling.is_used or ctx.name not in self._looked:
            return
        if ctx.place.parameter is not None and ctx.result is not None:
            self._unused.note(ctx.place.parameter, ctx.result)

    # ---------------------------------------------------------------------- there

    def _plan(self, optimizer: Any) -> None:
        """Which tensors travel together; from facts that all ranks share."""
        names = self._names.of(optimizer)
        self._carrier.plan(
            {
                names[p]: p.numel() * p.element_size()
                for p in optimizer._requires_update
                if p in names and not self._path.plan.goes_dense(names[p], p)
            }
        )
        self._looked = looked_at(
            names[p] for p in optimizer._requires_update if p in names
        )
        self._planned = True

    def _send(
        self, name: str, gradient: Tensor, parameter: Tensor
    ) -> tuple[Tensor, Context]:
        """As little as can be: what the backward pass has in cache stays there."""
        self._arriving = False
        known = self._path.plan.tensors.get(name)
        if known is None or known.dense or known.shape != gradient.shape:
            known = self._path.admit(name, viewed(gradient))
        self._watchdog.sent(name, known.header.step)
        self._give_up(name, gradient)
        holder = parameter if parameter.grad is gradient else None
        context = Context(name, self._places.enter(gradient, holder), known.dense)
        self._under_way[name] = context
        if known.dense:
            return self._send_dense(context), context
        due = self._carrier.announce(name)
        if known.grouped and self._carrier.batched and gradient.is_contiguous():
            self._waiting[name] = context
        else:
            self._send_alone(context)
        self._send_together(due)
        return self._carrier.to_reduce(name), context

    def _give_up(self, name: str, gradient: Tensor) -> None:
        """The step of an earlier gradient, whose result was never asked for."""
        context = self._under_way.pop(name, None)
        if context is None:
            return
        self._places.leave(context.place)
        if self._waiting.pop(name, None) is not None:
            self._keep(context, gradient)
        elif context.flight is not None:
            self._path.recall([context.flight])

    def _give_up_all(self) -> None:
        """A step without its results."""
        for context in list(self._under_way.values()):
            self._forget(context)
            waited = self._waiting.pop(context.name, None) is not None
            if waited and not context.place.changed:
                self._path.keep(context.name, context.array)
            elif context.flight is not None:
                self._path.recall([context.flight])

    def _keep(self, waiting: Context, gradient: Tensor) -> None:
        """Unless the next gradient took its memory."""
        earlier = waiting.array
        if not np.may_share_memory(earlier, viewed(gradient)):
            self._path.keep(waiting.name, earlier)

    def _send_together(self, names: Iterable[str]) -> None:
        """Send those of these tensors that wait."""
        contexts = [self._waiting[name] for name in names if name in self._waiting]
        gradients = {context.name: context.array for context in contexts}
        try:
            for context in contexts:
                if context.place.changed:
                    raise changed(context.name)
                self._path.admit(context.name, gradients[context.name])
        except BaseException:
            self._abandon(contexts)
            for context in contexts:
                self._keep_what_is_right(context)
            raise
        try:
            flights = self._path.send(gradients)
        except BaseException:
            self._abandon(contexts)
            raise
        for context, flight in zip(contexts, flights, strict=True):
            context.flight = flight
            del self._waiting[context.name]

    def _abandon(self, contexts: list[Context]) -> None:
        """Their step ends here."""
        for context in contexts:
            del self._waiting[context.name]
            self._carrier.abandon(context.name)
            self._forget(context)

    def _keep_what_is_right(self, context: Context) -> None:
        """What is not refused goes with the next step."""
        if not context.place.changed:
            with suppress(TypeError, ValueError):
                self._path.keep(context.name, context.array)

    def _send_alone(self, context: Context) -> None:
        try:
            [context.flight] = self._path.send({context.name: context.array})
        except BaseException:
            self._forget(context)
            raise

    def _send_dense(self, context: Context) -> Tensor:
        """The gradient as Horovod can reduce it, with what may still wait of it.

        Horovod reduces in place. Where that is not too much a copy, so that a gradient
        may be read and share its memory.
        """
        gradient = context.place.memory
        waiting = self._path.residuals.take(context.name)
        if waiting is not None:  # it went sparse while there were fewer ranks
            rest = torch.as_tensor(waiting).view_as(gradient)
            gradient = gradient + rest.to(gradient)
        if gradient.dtype not in _REDUCIBLE:
            return gradient.float().contiguous()
        reduced = gradient.contiguous()
        if reduced is not context.place.memory:
            return reduced
        small = reduced.numel() * reduced.element_size() <= _COPIED
        if small or not self._places.may_give_way(context.place):
            return reduced.clone()
        context.place.reduced = context.name
        return reduced

    # ------------------------------------------------------------------- and back

    def _receive(self, reduced: Tensor, ctx: Context) -> None:
        arrived = [ctx]
        try:
            self._send_together(sorted(self._waiting))  # their batches lack a member
            flight = ctx.sent
            if ctx.place.changed:
                raise changed(ctx.name)
            self._path.plan.op = self._found(
                self._carrier.reduced(flight.handle, reduced)
            )
            if batch := self._receive_batch(flight):
                arrived = batch
            else:
                self._receive_alone(ctx, flight)
        except BaseException as error:
            if ctx.flight is not None:
                self._path.recall([ctx.flight])
            if self._watchdog.gave_up and not self._shutdown.recovers:
                raise ExchangeError(self._watchdog.gave_up) from error
            raise  # elastic training recovers from Horovod's own error alone
        finally:
            for context in arrived:
                self._forget(context)
        sent, received = self._carrier.bytes_beside(reduced, len(arrived))
        self.traffic.overhead_sent_bytes += sent
        self.traffic.overhead_received_bytes += received
        self.traffic.steps = max(self.traffic.steps, flight.tensor.header.step)

    def _forget(self, context: Context) -> None:
        """It is not under way any more; what is there holds the gradient alive."""
        self._under_way.pop(context.name, None)
        self._places.leave(context.place)
        self._watchdog.received(context.name)

    def _receive_batch(self, flight: Flight) -> list[Context]:
        """Receive all that it arrived with, where that can be; returns what it was."""
        if (
            not isinstance(self._carrier, GatheredExchange)
            or self._path.scaling.is_used
        ):
            return []
        arrival = self._carrier.arrive(flight.handle)
        contexts = [c for n in arrival.names if (c := self._under_way.get(n))]
        if len(contexts) != len(arrival.names):  # some were received alone
            return []
        if any(context.place.changed for context in contexts):
            return []
        results = [self._places.result(context.place) for context in contexts]
        if not all(result.is_contiguous() for result in results):
            return []
        flights = [context.sent for context in contexts]
        self._path.hand_back(flights, [viewed(result) for result in results])
        self._path.settle(flights)
        for context, result in zip(contexts, results, strict=True):
            context.result = result
        self._carrier.drop(arrival)
        return contexts

    def _receive_alone(self, ctx: Context, flight: Flight) -> None:
        result = self._places.result(ctx.place)
        if result.is_contiguous():
            self._path.receive([flight], [viewed(result)])
        else:
            flat = torch.empty_like(result, memory_format=torch.contiguous_format)
            self._path.receive([flight], [viewed(flat)])
            result.copy_(flat)
        ctx.result = result

    def _receive_nothing(self, reduced: Tensor, ctx: Idle) -> Tensor:
        if reduced.any():
            raise ExchangeError(
                f"{ctx.name}: is frozen on this rank (requires_grad is False), but "
                "another sent its gradient"
            )
        wire_bytes = reduced.numel() * reduced.element_size()
        self.traffic.overhead_sent_bytes += wire_bytes
        self.traffic.overhead_received_bytes += wire_bytes
        if ctx.frozen is not None:  # Horovod's zeros would move it, by momentum
            ctx.frozen.grad = None
        return ctx.gradient

    def _receive_dense(self, reduced: Tensor, ctx: Context) -> None:
        result = self._places.result(ctx.place)
        self._forget(ctx)
        known = self._path.plan.tensors.get(ctx.name)
        if known is None:
            raise forgotten(ctx.name)
        if ctx.place.changed:
            raise changed(ctx.name)
        ctx.result = reduced if reduced is result else result.copy_(reduced)
        self._look_for_overflow(ctx.result)
        known.at_step(known.header.step + 1)
        wire_bytes = reduced.numel() * reduced.element_size()
        self.traffic.count(known, reduced.numel(), wire_bytes, wire_bytes)
        self.traffic.steps = max(self.traffic.steps, known.header.step)

    def _look_for_overflow(self, result: Tensor) -> None:
        """Of what Horovod reduced: the optimizer's step will be skipped."""
        if self._path.scaling.is_used:
            values = result.coalesce().values() if result.is_sparse else result
            self._path.scaling.look_at(values)

    def _found(self, op: Op) -> Op:
        if self.op is not None and op != self.op and self._carrier.size > 1:
            raise ValueError(
                f"op must be that of the optimizer, {op.name}, got {Op(self.op).name}"
            )
        return op

    # ---------------------------------------------------------------------- facts

    def _group(self) -> Any:
        if self._process_set is None:
            return horovod().global_process_set
        return self._process_set

    def meet(self, optimizer: Any) -> None:
        """Its step follows: it may have parameters of which no gradient has come."""
        with self._lock:
            self._check_optimizer(optimizer, before_closure=False)

    def _check_optimizer(self, optimizer: Any, *, before_closure: bool) -> None:
        """Once per optimizer: there must be one, with this process set."""
        known = None if self._optimizer is None else self._optimizer()
        if known is optimizer:
            return
        if known is not None:
            raise ValueError(
                "one SparseCompressor serves one optimizer, got a second: give each "
                "its own, with another prefix"
            )
        theirs = getattr(optimizer, "process_set", None)
        if theirs is not None and theirs is not self._group():
            raise ValueError(
                "process_set must be that of the optimizer, "
                f"{theirs}, got {self._process_set}"
            )
        self._optimizer = weakref.ref(optimizer)
        self._before_closure = before_closure
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        self._adviser.step(optimizer, self._carrier.rank, stacklevel=3)

    def _before_step(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        with self._lock:
            self._stepping = True
            self._unused.forget()
            late = [] if optimizer._should_synchronize else with_gradients(optimizer)
            enlist(optimizer, self._names)
            if late:
                raise unsent(self._names.of(optimizer)[late[0]])
            if optimizer._synchronized and not optimizer._should_synchronize:
                self._contended.recall()
        return exchanging(optimizer, args, kwargs)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        del optimizer, args, kwargs
        self._stepping = False
        self._contended.stepped()

    @property
    def traffic(self) -> Traffic:
        """Bytes sent and received so far."""
        return self._path.traffic

    def discard(self) -> None:
        """Throw away what the optimizer has synchronized, in place of a step.

        Residuals are what they were before, bitwise. Collective: every rank calls it
        between `optimizer.synchronize()` and its next backward pass. In the next step,
        ranks that differ get an ExchangeError that names tensor, rank and step, but
        with Embedded(), whose ranks may be apart. Gradients are still the results: zero
        them.

        Raises:
            RuntimeError: undo=True was not given, nothing was exchanged since the last
                time, or it is not complete.
        """
        with self._lock:
            if self._under_way:
                raise RuntimeError(
                    f"{min(self._under_way)}: its exchange is under way: call "
                    "optimizer.synchronize() before discard()"
                )
            self._path.residuals.discard()
            self._unused.forget()

    # ---------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """What this rank has not sent yet, as copies: save it beside the model.

        Returns:
            format, rank, size, configuration, step, and under "tensors", per name,
            shape, dtype, step and residual (a tensor; None where it goes dense).
            Between the backward pass and the optimizer's step a residual has the
            gradient in it that is under way, which is then sent in a later step: so
            nothing that goes sparse is lost, as if that step had been given up.
        """
        with self._lock:
            state = self._path.residuals.state_dict()
            for context in self._waiting.values():
                if not context.place.changed:
                    _add_waiting(state["tensors"][context.name], context)
            return as_tensors(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue, bitwise, where state_dict was called; each rank its own.

        Raises:
            ValueError: the state is of another rank, size, configuration or model, or
                gradients are under way: load it before the backward pass or after the
                optimizer's step.
        """
        with self._lock:
            self._check_between_steps()
            self._forget_flights()
            self._path.residuals.load_state_dict(on_host(state))

    def _check_between_steps(self) -> None:
        """Or what is under way would be handed back, or lost, in the new state."""
        if self._optimizer is not None:
            optimizer = self._optimizer()
            if optimizer is None or not optimizer._handles:
                return  # nobody will ask for it: the step was given up
        if self._under_way:
            raise ValueError(
                f"{min(self._under_way)}: its gradient is under way, so that no state "
                "can be loaded: call optimizer.synchronize() or optimizer.step() before"
            )

    def adopt(self, state: dict[str, Any]) -> None:
        """Continue from a state of this process in a group of another size.

        What elastic training does after ranks came or went; steps must be the same on
        every rank, residuals stay with their process. What is under way is forgotten.
        """
        with self._lock:
            self._forget_flights()
            self._path.residuals.adopt(on_host(state))

    def _forget_flights(self) -> None:
        for context in self._under_way.values():
            context.flight = None
        self._under_way.clear()
        self._waiting.clear()
        self._places.clear()
        self._carrier.forget()
        self._planned = False  # routes depend on the number of ranks
        self._watchdog.forget()
        self._shutdown.wait()
        self._watchdog.gave_up = ""


@cache
def _watch_steps() -> None:
    """Horovod calls no compressor where all was frozen when it took the optimizer."""
    register_optimizer_step_pre_hook(_before_any_step)


def _before_any_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Of whatever optimizer; what `meet` registers is called after this."""
    del args, kwargs
    compression = getattr(optimizer, "_compression", None)
    if not isinstance(compression, SparseCompressor):
        return
    if is_exchanged(optimizer) and newcomers(optimizer):
        compression.meet(optimizer)
