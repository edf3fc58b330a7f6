"""Whose gradient is it: a name while Python sees it, a number in what graphs carry.

Residuals go by names (see `names`). Where several optimizers are made with one
compressor, a name has a scope: it is of a variable and of one of them.
"""

import weakref
from typing import Any

from hvd_sparse.tensorflow.horovod_frames import Call
from hvd_sparse.tensorflow.names import VariableNames
from hvd_sparse.tensorflow.nodes import places_of

Tensor = Any  # tf.Tensor: TensorFlow has no types


class Identities:
    """Of one compressor.

    Attributes:
        names: of variables.
    """

    def __init__(self) -> None:
        """None is known yet."""
        self.names = VariableNames()
        self._numbered: dict[str, int] = {}
        self._called: list[str] = []  # by that number
        self._owners: dict[int, int] = {}  # by id of an optimizer that lives
        self._owned = 0

    def of_variables(self, call: Call) -> list[str]:
        """Names of the variables of a call, one for each of its gradients."""
        places = places_of(call.gradients)
        return self.names.see(call.variables or [], self.scope(call.optimizer), places)

    def of_tensor(self, tensor: Tensor, name: str | None) -> str:
        """The name of a gradient that its user gives one.

        Raises:
            ValueError: there is none.
        """
        if name is None:
            raise ValueError(
                f"a gradient of shape {tensor.shape} belongs to no variable that can "
                "be seen: hvd.allreduce(..., compression=SparseCompressor(...)) "
                "outside of an optimizer or a tape needs name="
            )
        shape = tuple(-1 if n is None else n for n in tensor.shape)
        return self.names.see_tensor(str(name), shape)

    def number(self, name: str) -> int:
        """What a graph carries in place of it."""
        if name not in self._numbered:
            self._numbered[name] = len(self._called)
            self._called.append(name)
        return self._numbered[name]

    def name(self, number: Any) -> str:
        """What has that number."""
        return self._called[int(number)]

    def owner(self, optimizer: Any) -> int:
        """In the order in which they are made, which is that on every rank."""
        if optimizer is None:
            return 0
        owner = self._owners.get(id(optimizer))
        if owner is None:
            owner = self._owners[id(optimizer)] = self._owned
            self._owned += 1
            ours = weakref.ref(self)
            ends = weakref.finalize(optimizer, _end, ours, id(optimizer))
            ends.atexit = False
        return owner

    def scope(self, optimizer: Any) -> str:
        """Of names, see `VariableNames.see`: that of this optimizer, or of tapes."""
        return "" if optimizer is None else f"@{self.owner(optimizer)}"


def _end(ours: "weakref.ref[Identities]", identity: int) -> None:
    """An optimizer is gone. The garbage collector calls this wherever it is."""
    identities = ours()
    if identities is not None:
        identities.names.end(f"@{identities._owners.pop(identity)}")
