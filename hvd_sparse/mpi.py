"""The door for numpy arrays over plain MPI."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hvd_sparse import arrays
from hvd_sparse.core.contracts import Average, Format, Sparsifier
from hvd_sparse.core.flight import Flight
from hvd_sparse.core.indices import Indices
from hvd_sparse.core.interrupts import Uninterrupted
from hvd_sparse.core.loss_scale import scale_of
from hvd_sparse.core.path import GradientPath
from hvd_sparse.core.routing import Dense, WhenCheaper
from hvd_sparse.core.traffic import Traffic
from hvd_sparse.core.values import Values
from hvd_sparse.transport.mpi.agreement import row_of
from hvd_sparse.transport.mpi.exchange import MpiExchange
from hvd_sparse.transport.mpi.measurement import measure

__all__ = ["Blob", "SparseAllreduce", "measure"]

Array = npt.NDArray[Any]


class Blob(NamedTuple):
    """Bytes to gather from all ranks as they are.

    Attributes:
        data: uint8, a multiple of 8 bytes; lengths may differ between ranks.
        shape: what ranks must agree on beside the name.
        dtype: the same.
        dense_bytes: of the gradient it stands for; 0 if it stands for none.
        elements: values of the gradient in data.
    """

    data: Array
    shape: tuple[int, ...] = ()
    dtype: str = "bytes"
    dense_bytes: int = 0
    elements: int = 0

    @property
    def route(self) -> str:
        """Rows of a gradient, or bytes that are none."""
        return "rows" if self.dense_bytes else "bytes"


class SparseAllreduce:
    """Mean or sum over MPI ranks of numpy arrays, sending only what is worth it.

    One thread at a time: a second one gets a RuntimeError at once. Give each a
    SparseAllreduce of its own, made in the same order on every rank.

    Example:
        >>> import numpy as np, hvd_sparse, hvd_sparse.mpi
        >>> reduce = hvd_sparse.mpi.SparseAllreduce(hvd_sparse.TopK(density=0.5))
        >>> gradient = np.array([3.0, 1.0, -4.0, 0.5], dtype=np.float32)
        >>> with reduce:
        ...     mean = reduce.allreduce("weight", gradient)
    """

    def __init__(
        self,
        sparsifier: Sparsifier,
        *,
        comm: Any = None,
        op: int = Average,
        dense: Dense = WhenCheaper(),  # noqa: B008  # frozen: one instance serves all
        values: Values | Format | None = None,
        indices: Indices | None = None,
        timeout_s: float = 600,
        scaler: Any = None,
        undo: bool = False,
    ) -> None:
        """Duplicate the communicator; every rank of comm must call this.

        Args:
            sparsifier: TopK, RandomK, Threshold or your own; the same on every rank.
            comm: an mpi4py communicator, a process group of torch.distributed, which
                needs no MPI, or one of hvd_sparse.loopback. Unless given all ranks: of
                torch.distributed where that is initialized, else MPI.COMM_WORLD.
            op: hvd_sparse.Average over the ranks of comm, or hvd_sparse.Sum.
            dense: which tensors go dense: WhenCheaper() or Never().
            values: how values travel: Float32(), Float16(), BFloat16(), Int8(), Int4(),
                Int2(), Sign(), or a Format of your own; unless given as the sparsifier
                is made for.
            indices: how indices travel: EliasFano(), some 2 + log2(n / k) bits each, or
                RawIndices(), 32 bits.
            timeout_s: seconds to wait for peers in a step; a warning comes at 60.
            scaler: what has get_scale(), the number that gradients are multiplied with,
                the same on every rank. A step with a result that is not finite must not
                be applied by anybody; what it sent is put back.
            undo: keep a copy of every residual, so that `discard` can bring it back:
                memory of the gradients' size, and one pass more over it.

        Raises:
            TypeError: comm is no communicator, sparsifier can not select, or scaler can
                not be asked.
            ValueError: op or timeout_s is out of range; this rank is not in comm; or
                it is one of several of torchrun, and torch.distributed is not
                initialized.
        """
        self._exchange = MpiExchange(comm, timeout_s)
        try:
            self._path = GradientPath(
                sparsifier,
                self._exchange,
                op=op,
                dense=dense,
                values=values,
                indices=indices,
                loss_scale=scale_of(scaler),
                undo=undo,
            )
        except (TypeError, ValueError) as error:
            self._exchange.report(error)  # peers may have better arguments
            raise
        self._flights: list[Flight] = []
        self._outs: Mapping[str, Array] = {}
        self._in_place: set[str] = set()
        self._blobs: dict[str, Blob] = {}
        self._handles: dict[str, int] = {}
        self._under_way = False
        self._used = threading.RLock()  # held by the thread that uses it
        self.gathered: dict[str, list[Array]] = {}

    @property
    def rank(self) -> int:
        """This process in comm."""
        return self._exchange.rank

    @property
    def size(self) -> int:
        """Ranks of comm."""
        return self._exchange.size

    @property
    def sparsifier(self) -> Sparsifier:
        """What decides which elements are sent."""
        return self._path.plan.sparsifier

    @property
    def is_scaled(self) -> bool:
        """Whether it was given a scaler."""
        return self._path.scaling.is_used

    @property
    def overflowed(self) -> bool:
        """Whether, with a scaler, a result of the last step was not finite."""
        return self._path.scaling.overflowed

    @property
    def can_discard(self) -> bool:
        """Whether it was made with undo=True."""
        return self._path.residuals.can_discard

    @property
    def traffic(self) -> Traffic:
        """Bytes sent and received so far."""
        return self._path.traffic

    def allreduce(self, name: str, gradient: Array, out: Array | None = None) -> Array:
        """A group of one: see grouped_allreduce."""
        outs = None if out is None else {name: out}
        return self.grouped_allreduce({name: gradient}, outs)[name]

    def grouped_allreduce(
        self, gradients: Mapping[str, Array], out: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """Mean or sum over ranks of several arrays in one exchange.

        Args:
            gradients: per name, any shape, floating; the same names, shapes and dtypes
                on every rank and in every step. Read only.
            out: per name of gradients, where to write the result; new arrays unless
                given. Memory that exists is faster: a fresh 100 MB array costs more in
                page faults than the exchange. May be the gradients themselves, which
                saves a pass over them; after an error they are 0 then: all is in the
                residual. May share memory with any gradient, but not with another out.

        Returns:
            Per name an array of the gradient's shape and dtype, the same bits on every
            rank; NaN throughout where any rank's gradient was not finite.

        Raises:
            TypeError, ValueError: a gradient or out has the wrong kind, dtype or shape
                here, a name is no str, or outs share memory.
            RuntimeError: another thread uses this object.
            ExchangeError: a peer disagrees, raised, or did not arrive in time. What was
                sent is back in the residual.
            KeyboardInterrupt: Ctrl-C, once the results are in out: see Uninterrupted.
        """
        with self._alone():
            self.start(gradients, out)
            return self.finish()

    # the two halves, for callers that have something to do in between

    def start(
        self,
        gradients: Mapping[str, Array],
        out: Mapping[str, Array] | None = None,
        blobs: Mapping[str, Blob] | None = None,
        *,
        continues: bool = False,
    ) -> None:
        """Select, encode, and begin the exchange; `finish` must follow.

        Args:
            gradients: as in grouped_allreduce.
            out: as in grouped_allreduce.
            blobs: per name, bytes to gather; `gathered` has them, until the next step.
            continues: these gradients are of the same step as those before.
        """
        with self._alone():
            if self._under_way:
                raise RuntimeError("finish() must come before the next start()")
            try:
                if not continues:
                    self._path.begin()
                self._send(gradients, out)
                self._send_blobs(blobs or {})
            except BaseException as error:  # Ctrl-C, too
                self._recall()
                self._exchange.report(error)
                raise
            self._open()

    def _open(self) -> None:
        self._under_way = True
        rows = [row_of(flight) for flight in self._flights]
        rows += [(n, b.shape, b.dtype, 0, b.route, 0) for n, b in self._blobs.items()]
        with self._nothing_lost():
            self._exchange.open(rows, self._path.plan.agreed)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two threads would mix up their steps, or tear down MPI; Ctrl-C waits."""
        if not self._used.acquire(blocking=False):
            raise RuntimeError(
                "this SparseAllreduce is in use by another thread: give each thread "
                "one of its own"
            )
        try:
            with Uninterrupted():
                yield
        finally:
            self._used.release()

    def _send(
        self, gradients: Mapping[str, Array], out: Mapping[str, Array] | None
    ) -> None:
        gradients = {n: arrays.checked(n, g) for n, g in gradients.items()}
        arrays.check_outs(gradients, out or {})
        if out is None:
            arrays.check_on_host(gradients)
        bucket = {name: gradients[name] for name in sorted(gradients)}
        in_place = arrays.in_place(bucket, out or {})
        self._flights = self._path.send(bucket, in_place)
        self._in_place = in_place
        # made last: an array that can not be sent needs no room for its result
        self._outs = out or {
            n: np.empty(g.shape, g.dtype) for n, g in gradients.items()
        }

    def _send_blobs(self, blobs: Mapping[str, Blob]) -> None:
        self._blobs = {n: blobs[n] for n in sorted(blobs)}
        self._handles = {
            n: self._exchange.start_bytes(b.data) for n, b in self._blobs.items()
        }

    def overflow(self) -> None:
        """Some other result of this step is not finite: nobody applies it.

        With `scaler=`, what this step sent is put back, as if one of ours were that.
        """
        self._path.scaling.overflow()

    def report(self, error: BaseException) -> None:
        """Tell the peers that this rank raised and takes no part in this step.

        Returns when they have heard; each of them gets an ExchangeError.

        Raises:
            ExchangeError: they did not come to hear it in time.
        """
        with self._alone():
            self._exchange.report(error)

    def progress(self) -> bool:
        """Advance the exchange without waiting; returns whether it is complete."""
        with self._alone(), self._nothing_lost():
            return self._exchange.advance()

    def finish(
        self, unless: Callable[[Mapping[str, Array]], bool] = lambda outs: False
    ) -> dict[str, Array]:
        """Wait, aggregate, and hand back.

        Args:
            unless: given the results, the same on every rank, whether nobody will use
                them: then what was sent is put back.
        """
        with self._alone():
            if not self._under_way:
                raise RuntimeError("start() must come before finish()")
            with self._nothing_lost():
                self._exchange.close_step()
            return self._hand_back(unless)

    def _hand_back(
        self, unless: Callable[[Mapping[str, Array]], bool]
    ) -> dict[str, Array]:
        outs = dict(self._outs)
        with self._nothing_lost():
            given = [outs[flight.tensor.name] for flight in self._flights]
            flat = [arrays.contiguous(out) for out in given]
            self._path.hand_back(self._flights, flat)
            for out, result in zip(given, flat, strict=True):
                if result is not out:
                    out[...] = result
            self.gathered = {
                n: list(self._exchange.finish_bytes(h))
                for n, h in self._handles.items()
            }
            if unless(outs):
                self._path.roll_back(self._flights)
        self._path.commit(self._flights)  # all have arrived
        self._count()
        self._exchange.clear()
        self._flights, self._under_way = [], False
        return outs

    def _count(self) -> None:
        traffic, exchange = self.traffic, self._exchange
        traffic.steps += 1
        traffic.overhead_sent_bytes += exchange.overhead_bytes
        traffic.overhead_received_bytes += exchange.overhead_bytes * (self.size - 1)
        for name, parts in self.gathered.items():
            sizes = [part.nbytes for part in parts]
            sent, received = sizes[self.rank], sum(sizes) - sizes[self.rank]
            blob = self._blobs[name]
            dense_bytes = blob.dense_bytes
            if dense_bytes:
                tensor = traffic.tensor(name, "rows")
                tensor.sent_elements += blob.elements
                tensor.sent_bytes += sent
                tensor.received_bytes += received
                tensor.dense_bytes += dense_bytes
            else:
                traffic.overhead_sent_bytes += sent
                traffic.overhead_received_bytes += received

    @contextmanager
    def _nothing_lost(self) -> Iterator[None]:
        """After an exchange that fails all that was to be sent is in the residuals."""
        try:
            yield
        except BaseException as error:
            self._exchange.interrupt(f"{type(error).__name__} in the middle of a step")
            self._recall()
            raise

    def _recall(self) -> None:
        self._path.roll_back(self._flights)
        for flight in self._flights:
            name = flight.tensor.name
            if name in self._in_place and not flight.tensor.dense:
                self._outs[name][...] = 0  # it is in the residual
        self._flights, self._under_way = [], False
        self._exchange.clear()

    # ------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Residuals and steps of this rank, as copies: see load_state_dict.

        Between start and finish what is on its way is part of the residuals: loading
        such a state is as if that exchange had failed. Nothing is lost.

        Returns:
            format, rank, size, configuration, step, and under "tensors", per name,
            shape, dtype, step and residual (None for a tensor that goes dense).
        """
        with self._alone():
            return self._path.residuals.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue, bitwise, where state_dict was called. Each rank loads its own.

        Raises:
            ValueError: the state is of another rank, size, configuration or model.
            RuntimeError: a step is under way, or another thread uses this object.
        """
        with self._alone():
            if self._under_way:
                raise RuntimeError("finish() must come before load_state_dict()")
            self._path.residuals.load_state_dict(state)
            self._exchange.step = state["step"]

    def applied(self) -> None:
        """Say that the results were used: `discard` refuses to throw them away then."""
        self._path.residuals.applied()

    def discard(self) -> None:
        """Throw the last exchange away: residuals, steps are what they were, bitwise.

        Collective: every rank calls it after the same `start` and before the next, and
        uses the results in no way. Where `finish` has not been called, this does so:
        peers may wait. In the next exchange, ranks that differ get an ExchangeError
        that names rank and step.

        Raises:
            RuntimeError: undo=True was not given, there is no exchange since the last
                one that was thrown away, it is known to be `applied`, or another thread
                uses this object.
            ExchangeError: as in grouped_allreduce.
        """
        with self._alone():
            if self._under_way and self.can_discard:
                self.finish()
            self._path.residuals.discard()

    def forget(self, name: str) -> None:
        """Drop what is kept of a tensor that is gone; between two steps."""
        self._path.residuals.forget(name)

    # ---------------------------------------------------------------------- closing

    def close(self) -> None:
        """Free the private communicator; collective. Further use raises."""
        with self._alone():
            self._exchange.free()

    def __enter__(self) -> "SparseAllreduce":
        """Close at the end of a with block, unless it ends by an exception."""
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Freeing is collective: a rank that failed must not wait for its peers."""
        if error is None:
            self.close()
