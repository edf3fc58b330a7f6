"""Which gradients of a graph leave together, and of which variables they are."""

import operator
import weakref
from collections.abc import Sequence
from typing import Any

from hvd_sparse.tensorflow.step import Step

Tensor = Any  # tf.Tensor: TensorFlow has no types


class Sources:
    """The variables whose gradients leave together, in one graph, which keeps this.

    Attributes:
        of: references to the compressor's Tracing, the optimizer's scope, and the
            variables, as the graph was traced with them. Horovod's graphs live for
            ever; models need not.
        gradients: of the graph; None in place of those that do not exist.
        numbers: (n,) int64, of the graph: which they are when it runs.
        dense: places of those that go dense.
        step: what runs, where all leave together.
        payloads: by place: what this rank sends, where all leave together.
        results: by place: what arrives, once all of it is there; None where each
            leaves by itself.
    """

    def __init__(self, of: Sequence[Any], gradients: Sequence[Tensor]) -> None:
        """Nothing goes dense yet."""
        self.of = tuple(map(_reference, of))
        self.gradients = list(gradients)
        self.numbers: Tensor = None
        self.dense: list[int] = []
        self.step: Step | None = None
        self.payloads: dict[int, Tensor] = {}
        self.results: dict[int, Tensor] | None = None
        self._given: set[int] = set()

    def place(self, gradient: Tensor) -> int:
        """Where it is; of variables that share it the one that was not told yet."""
        same = [p for p, other in enumerate(self.gradients) if other is gradient]
        if self._given.issuperset(same):
            self._given.difference_update(same)
        place = next(p for p in same if p not in self._given)
        self._given.add(place)
        return place

    def are(self, of: Sequence[Any], gradients: Sequence[Tensor]) -> bool:
        """Whether it is of these very objects: a graph may make several steps."""
        held = [reference() for reference in self.of]
        return _same(held, of) and _same(self.gradients, gradients)


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _reference(held: Any) -> Any:
    return (lambda: held) if isinstance(held, str) else weakref.ref(held)
