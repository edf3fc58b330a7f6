"""Arrays of one rank to all, over MPI: to start alike.

Ranks agree first: on names, shapes, dtypes, and on who sends. Then every array travels
from and into the memory where it is, in the order of its name, and nothing is copied on
the way. Nothing blocks: requests are polled against a deadline (see `failure`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hvd_sparse.transport.mpi.exchange import MpiExchange

Bytes = npt.NDArray[np.uint8]

_PIECE_BYTES = 1 << 26  # MPI counts in C ints; and what is waited for comes in time
_MOST_UNDER_WAY = 64


class Described(NamedTuple):
    """What ranks must agree on of an array.

    Attributes:
        name: unique.
        shape: of its elements.
        dtype: of its elements, and whatever else must be alike, in words.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


class Broadcast:
    """Overwrites arrays with those of one rank, once all have described the same."""

    def __init__(self, root: int, comm: Any, timeout_s: float) -> None:
        """Collective over comm, as is every method but `reported`.

        Args:
            root: the rank whose arrays all take.
            comm: as of MpiExchange.
            timeout_s: seconds to wait for peers without anything that arrives.

        Raises:
            ValueError: root is no rank of comm.
        """
        self._exchange = MpiExchange(comm, timeout_s)
        self._root = root
        self._posted: list[Bytes] = []
        with self.reported():
            if not 0 <= root < self._exchange.size:
                raise ValueError(
                    f"root must be in [0, {self._exchange.size}), got {root}"
                )

    @property
    def is_root(self) -> bool:
        """Whether this rank's arrays are sent."""
        return self._exchange.rank == self._root

    @contextmanager
    def reported(self) -> Iterator[None]:
        """An error inside, before anything is sent, reaches the peers in `agree`."""
        try:
            yield
        except BaseException as error:  # Ctrl-C, too
            self._exchange.report(error)
            raise

    def agree(
        self, arrays: Sequence[Described], described: str = "", layout: str = ""
    ) -> bool:
        """Go on if all ranks have described the same arrays in the same order.

        Args:
            arrays: what will be sent.
            described: whatever else must be the same.
            layout: what may differ.

        Returns:
            Whether layout was the same on every rank.

        Raises:
            ExchangeError: a peer described something else, raised, or did not arrive in
                time; names array, rank, expected and found.
        """
        rows = [(a.name, a.shape, a.dtype, 0, "broadcast", 0) for a in arrays]
        also = f" and {described}" if described else ""
        own = np.frombuffer(blake2b(layout.encode(), digest_size=16).digest(), np.uint8)
        handle = self._exchange.start_bytes(own)
        self._exchange.open(rows, f"root {self._root}{also}")
        self._exchange.close_step()
        layouts = {digest.tobytes() for digest in self._exchange.finish_bytes(handle)}
        self._exchange.clear()
        return len(layouts) == 1

    def send(self, name: str, array: Bytes) -> None:
        """Begin to overwrite an array, but on the root; `wait` must follow.

        Args:
            name: for messages.
            array: (n,) uint8, contiguous; n is the same on every rank. Where it is used
                in between, what is in it is undefined.

        Raises:
            ExchangeError: a peer did not arrive in time.
        """
        for start in range(0, array.size, _PIECE_BYTES):
            self._posted.append(array[start : start + _PIECE_BYTES])
            if len(self._posted) >= _MOST_UNDER_WAY:
                self.wait(name)

    def wait(self, name: str = "the last of all") -> None:
        """Return when all that was sent is there.

        Raises:
            ExchangeError: a peer did not arrive in time.
        """
        posted, self._posted = self._posted, []
        self._exchange.begin_broadcast(posted, self._root, f"broadcast: {name}")
        self._exchange.close_step()
        self._exchange.clear()

    def bytes(self, data: bytes) -> bytes:
        """The root's data, however long it is; other ranks' data do not count."""
        own = np.frombuffer(data, np.uint8)
        size = np.array([own.size], np.int64)
        self.send("a size", size.view(np.uint8))
        self.wait("a size")
        array = own if self.is_root else np.empty(size[0], np.uint8)
        self.send("options", array)
        self.wait("options")
        return array.tobytes()

    def __enter__(self) -> "Broadcast":
        """Close at the end of a with block, unless it ends by an exception."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Freeing is collective: a rank that failed must not wait for its peers."""
        if error is None:
            self._exchange.free()
        else:
            self._exchange.interrupt(f"{type(error).__name__} in a broadcast")
