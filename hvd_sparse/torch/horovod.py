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
two numbers for Horovod to reduce (with `Embedded()` the payload, of a gradient that
goes dense itself), and `decompress` receives it. From what became of them it learns the
op, which Horovod does not tell. Most gradients wait until the
last one of their batch is there, and are then sent together.

Until `synchronize()` or `step()` a gradient stays what the backward pass made it, and
may be read. Then the result takes its place: to write there in between is an error.
A write through `p.grad.data` or `p.grad.numpy()` is not noticed.
"""

import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch

from hvd_sparse.carriers import Carrier, Gathered
from hvd_sparse.core.contracts import (
    Average,
    ExchangeError,
    Format,
    Op,
    RaisedError,
    Sparsifier,
)
from hvd_sparse.core.indices import Indices
from hvd_sparse.core.interrupts import Uninterrupted
from hvd_sparse.core.loss_scale import scale_of
from hvd_sparse.core.path import GradientPath
from hvd_sparse.core.routing import Dense, WhenCheaper
from hvd_sparse.core.traffic import Traffic
from hvd_sparse.core.values import Values
from hvd_sparse.kernels import host
from hvd_sparse.torch import elastic
from hvd_sparse.torch.exchanges import (
    exchange_for,
    horovod,
    waits_for_peers,
)
from hvd_sparse.torch.grad_scaler import refuse_before_exchange
from hvd_sparse.torch.horovod_receiver import Receiver
from hvd_sparse.torch.horovod_sender import Sender
from hvd_sparse.torch.names import Caller, ParameterNames, find_caller
from hvd_sparse.torch.served import Served, watch_steps
from hvd_sparse.torch.states import as_tensors, on_host
from hvd_sparse.torch.step import Context, Idle, Step
from hvd_sparse.watchdog import Watchdog

Tensor = torch.Tensor


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
        values: Values | Format | None = None,
        indices: Indices | None = None,
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
            values: how values travel: Float32(), Float16(), BFloat16(), Int8(), Int4(),
                Int2(), Sign(), or a Format of your own; unless given as the sparsifier
                is made for.
            indices: how indices travel: EliasFano(), some 2 + log2(n / k) bits each, or
                RawIndices(), 32 bits.
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
        self.op = op
        self._process_set = process_set
        self._exchange = exchange_for(exchange, sparsifier, self._group, prefix)
        expected = Average if op is None else op
        self._path = GradientPath(
            sparsifier,
            self._exchange,
            op=expected,
            dense=dense,
            values=values,
            indices=indices,
            loss_scale=scale_of(scaler),
            undo=undo,
        )
        if op is None:
            self._path.plan.op_name = "the optimizer's"
        self._elastic = elastic.is_elastic()
        self._shutdown = elastic.Shutdown()
        self._lock = threading.RLock()  # hooks run in several autograd threads
        self._served = Served(
            ParameterNames(named_parameters),
            self._path,
            self._exchange,
            self._group,
            self._lock,
        )
        self._watchdog = Watchdog(
            timeout_s,
            rank=lambda: horovod().rank(),
            shutdown=self._shutdown,
            waiting=waits_for_peers,
        )
        weakref.finalize(self, self._watchdog.stop)
        self._step = Step(self._path, self._watchdog)
        parts = (self._step, self._path, self._exchange)
        self._sender = Sender(*parts, self._watchdog)
        self._receiver = Receiver(
            *parts, self._sender, self._found, self._served.release
        )
        horovod()
        elastic.register(SparseCompressor)
        watch_steps(_served)

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

        If that fails, peers are told so in place of what was to be sent, and it is
        raised where results are asked for, on every rank.

        Raises:
            ValueError: op is Adasum, the parameter is unknown, the optimizer is another
                than before, or the state of elastic training does not have this
                compressor.
        """
        with self._lock:
            caller = find_caller(depth=1)
            self._check_gradient(tensor, caller)
            if caller is not None:
                self._served.meet(caller.optimizer, caller)
            if self._elastic and not self._shutdown.recovers:
                self._shutdown.recovers = elastic.covers(self)
            name, parameter = self._served.names.find(tensor, caller)
            sent: tuple[Tensor, Context | Idle] | None = None
            try:
                with Uninterrupted():
                    sent = self._send(name, tensor, parameter, caller)
            except BaseException as error:
                self._step.fail(error)
                if sent is None:  # else it was Ctrl-C, after all
                    sent = self._sender.excuse(name, tensor, parameter)
            return sent

    def _send(
        self, name: str, gradient: Tensor, parameter: Tensor, caller: Caller | None
    ) -> tuple[Tensor, Context | Idle]:
        step = self._step
        if step.arriving and caller is not None:  # something else has failed
            self._receiver.end()
        elif name in step and (caller is not None or self._path.scaling.is_used):
            self._exchange.withdraw()
            step.roll_back()
        if step.is_empty:
            self._watchdog.forget()  # what an interrupted hand-back left
            self._served.begin(caller)
        if caller is not None and self._served.is_idle(caller, parameter):
            self._watchdog.sent(name, self._path.traffic.steps)
            frozen = None if parameter.requires_grad else parameter
            idle = step.idle[name] = Idle(name, gradient, frozen)
            return self._exchange.nothing(), idle
        sent, context = self._sender.send(name, gradient, parameter)
        context.alone = caller is None
        return sent, context

    def _check_gradient(self, tensor: Tensor, caller: Caller | None) -> None:
        """Adasum gives weights: the parameter itself."""
        given = None if caller is None else caller.parameter
        if tensor is given or (given is None and tensor in self._served.names):
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
            Exception: what this rank raised while it sent its gradients.
            ExchangeError: a peer disagrees, raised, or did not arrive before Horovod
                was shut down. What was sent in this step is back in the residuals, and
                the optimizer is ready for the next one.
            ValueError: the gradient was changed after it was sent.
            KeyboardInterrupt: Ctrl-C, once all results are there.
        """
        with self._lock:
            if ctx is None:  # a sparse gradient: Horovod gathers its rows itself
                self._receiver.look_for_overflow(tensor)
                return tensor
            if isinstance(ctx, Idle):
                gradient = self._receive_nothing(tensor, ctx)
            else:
                if ctx.result is None:  # some are there with the first of their batch
                    self._receive(tensor, ctx)
                gradient = self._served.hand_back(ctx)
            # not before: of a batch that is there Horovod still reduces the numbers
            self._watchdog.received(ctx.name)
            return gradient

    def _receive(self, reduced: Tensor, ctx: Context) -> None:
        if not self._step.arriving:  # peers may have none of it: nothing is awaited
            refuse_before_exchange(depth=2)
        try:
            with Uninterrupted():
                self._receiver.receive(reduced, ctx)
        except BaseException as error:
            if ctx.result is None:
                failed = self._failed(error)
                raise failed from failed.__cause__
            self._step.fail(error)  # Ctrl-C: raised when the others are there too
        self._finish()

    def _receive_nothing(self, reduced: Tensor, ctx: Idle) -> Tensor:
        try:
            gradient = self._receiver.receive_nothing(reduced, ctx)
        except BaseException as error:
            failed = self._failed(error)
            raise failed from failed.__cause__
        self._finish()
        return gradient

    def _finish(self) -> None:
        """Once the last result is there, the step counts."""
        error = self._step.settle()
        if error is not None:
            try:
                self._served.release()
            finally:
                self._served.end()
                self._watchdog.forget()
            raise error

    def _failed(self, error: BaseException) -> BaseException:
        """What to raise once the whole step is taken back."""
        gave_up, recovers = self._watchdog.gave_up, self._shutdown.recovers
        self._receiver.fail(error)
        self._served.end()
        if gave_up and not recovers:
            failed = ExchangeError(gave_up)
            failed.__cause__ = error
            return failed
        if recovers and isinstance(error, RaisedError):  # whose rank may not come back
            return elastic.internal_error(str(error))
        return error  # elastic training recovers from Horovod's own error alone

    def _found(self, op: Op) -> Op:
        if self.op is not None and op != self.op and self._exchange.size > 1:
            raise ValueError(
                f"op must be that of the optimizer, {op.name}, got {Op(self.op).name}"
            )
        return op

    def _group(self) -> Any:
        if self._process_set is None:
            return horovod().global_process_set
        return self._process_set

    @property
    def traffic(self) -> Traffic:
        """Bytes sent and received so far."""
        return self._path.traffic

    def discard(self) -> None:
        """Throw this step's gradients away, in place of a step of the optimizer.

        Residuals are what they were before, bitwise. Collective: every rank calls it
        between its backward pass and the next one, after `optimizer.synchronize()` or
        without: then this does so first, since peers may wait. A rank that makes no
        backward pass calls `optimizer.synchronize()`, which takes part with zeros, and
        then this; not with `groups=`, nor where gradients are sparse. In the next step,
        ranks that differ get an ExchangeError that names tensor, rank and step, but
        with Embedded(), whose ranks may be apart. Gradients are the results: zero them
        afterwards.

        Raises:
            RuntimeError: undo=True was not given, nothing was sent since the last time,
                or the optimizer's step has applied the results.
            ExchangeError: as in `decompress`.
        """
        waits = self._step.under_way and self._served.may_ask
        if waits and self._path.residuals.can_discard:
            self._served.synchronize()
        with self._lock:
            if under_way := self._step.under_way:
                raise RuntimeError(
                    f"{min(under_way)}: its exchange is under way: call "
                    "optimizer.synchronize() before discard()"
                )
            self._path.residuals.discard()
            self._served.end()

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
            for context in self._step.waiting():
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
        if not self._served.may_ask:
            return
        if under_way := self._step.under_way:
            raise ValueError(
                f"{min(under_way)}: its gradient is under way, so that no state "
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
        self._step.forget()
        self._exchange.forget()
        self._served.forget_plan()
        self._shutdown.wait()
        self._watchdog.gave_up = ""


def _served(optimizer: Any) -> Served | None:
    """Nothing of an optimizer whose compressor is none of ours."""
    compression = getattr(optimizer, "_compression", None)
    return compression._served if isinstance(compression, SparseCompressor) else None
