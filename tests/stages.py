"""A rank raises once, at each stage of a step in turn: what raises, and what is told.

All take a MonkeyPatch, and the name of the tensor that it happens to, in whatever path
of this process it comes by.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest

from hvd_sparse import Selection, SignTopK, TopK
from hvd_sparse.core import outbound
from hvd_sparse.core.fused import Fused
from hvd_sparse.core.memory import ErrorFeedback
from hvd_sparse.core.payload import Payload
from hvd_sparse.core.plan import Plan
from hvd_sparse.kernels import kernels_for


@dataclass(frozen=True)
class Users:
    """The first ones, by a user who has never heard of a rollback."""

    density: float = 0.05

    def select(self, residual: Any, gradient: Any, k: int, step: int) -> Selection:
        indices = np.arange(k, dtype=np.int32)
        return Selection(*kernels_for(residual).select_at(residual, gradient, indices))


Prepare = Callable[[pytest.MonkeyPatch, str], None]


def refused(patch: pytest.MonkeyPatch, name: str) -> None:
    """As if it had had another shape in earlier steps."""
    find = Plan.find

    def find_another(self: Plan, found: str, gradient: Any) -> Any:
        return find(self, found, gradient[None] if found == name else gradient)

    patch.setattr(Plan, "find", find_another)


def selected_badly(patch: pytest.MonkeyPatch, name: str) -> None:
    def select(self: Users, residual: Any, *others: Any) -> Selection:
        patch.undo()
        residual[:] = 7.0
        raise ZeroDivisionError("in select")

    patch.setattr(Users, "select", select)


def chosen_badly(patch: pytest.MonkeyPatch, name: str) -> None:
    def select(self: Users, residual: Any, gradient: Any, k: int, _: int) -> Selection:
        patch.undo()
        return Selection(np.full(k, 1 << 20, np.int32), gradient[:k].copy(), 0)

    patch.setattr(Users, "select", select)


def without_memory(patch: pytest.MonkeyPatch, name: str) -> None:
    """To encode, one alone or many at once, whatever comes first."""

    def encode(*arguments: Any) -> None:
        patch.undo()
        raise MemoryError("no room to encode")

    patch.setattr(outbound, "encode", encode)
    patch.setattr(Fused, "select", encode)


def memory_raises(method: str, error: BaseException) -> Prepare:
    """At the first call for that tensor."""

    def prepare(patch: pytest.MonkeyPatch, name: str) -> None:
        original = getattr(ErrorFeedback, method)

        def raising(self: ErrorFeedback, called: str, *others: Any) -> Any:
            if called != name:
                return original(self, called, *others)
            patch.undo()
            raise error

        patch.setattr(ErrorFeedback, method, raising)

    return prepare


class Signs(SignTopK):
    """A user's own: selected alone, since tests prove nothing of it."""


class Stage(NamedTuple):
    """One row.

    Attributes:
        prepare: makes the next step fail.
        sparsifier: that takes this way.
        raised: on the rank where it happens.
        told: to the others, as a regular expression.
    """

    prepare: Prepare
    sparsifier: Any
    raised: type[BaseException]
    told: str


def of_memory(method: str, sparsifier: Any, kind: type[BaseException]) -> Stage:
    prepare = memory_raises(method, kind(f"in {method}"))
    return Stage(prepare, sparsifier, kind, f"{kind.__name__}: in {method}")


TOPK, ZERO = TopK(0.05), ZeroDivisionError
NO_ROOM = "MemoryError: no room to encode"
STAGES = {
    "admit": Stage(refused, TOPK, ValueError, r"ValueError: \S+: gradient has shape"),
    "select": Stage(selected_badly, Users(), ZERO, "ZeroDivisionError: in select"),
    "check": Stage(chosen_badly, Users(), ValueError, "ValueError: .* indices"),
    "memory": of_memory("residual", TOPK, ZERO),
    "user's memory": of_memory("residual", Users(), ZERO),
    "keep": of_memory("keep", Signs(0.05), ZERO),  # kernels keep what ours round
    "encode": Stage(without_memory, TOPK, MemoryError, NO_ROOM),
    "user's encode": Stage(without_memory, Users(), MemoryError, NO_ROOM),
    "interrupt": of_memory("residual", TOPK, KeyboardInterrupt),
}


def damage(
    patch: pytest.MonkeyPatch, kind: Any, name: str, spoil: Callable[[Any], Any]
) -> None:
    """On the wire: what this rank sends of one tensor, by this kind of exchange."""
    start = kind.start

    def start_damaged(self: Any, started: str, payload: Any) -> Any:
        return start(self, started, spoil(payload) if started == name else payload)

    patch.setattr(kind, "start", start_damaged)


def of_another(payload: Payload) -> Payload:
    """What the header says of the tensor is not what its peers know."""
    header = payload.header
    return payload._replace(header=header._replace(digest=header.digest ^ 255))


def without_indices(payload: Payload) -> Payload:
    """Where they should be is nothing."""
    entries = payload.entries.copy()
    entries[4 * payload.k :] = 0  # behind float32 values
    return payload._replace(entries=entries)


# where, what does it, what is said on every rank
DAMAGES = {
    "decode": (of_another, "digest"),
    "aggregate": (without_indices, "indices must ascend"),
}
