"""Which residual is a variable's? It has a name, wherever its gradient comes from.

A place among gradients is none: variables are frozen, left out, or taken in turns. So a
variable is known by what it is, its resource, and called by what its user sees, its
name. Three rules make names alike on every rank, without a word between them:

1. Keras numbers layers by how many a process has made, and ranks may have made others
   before. So numbers at the ends of a name's parts count from the first seen of its
   kind: dense_4/kernel and dense_5/kernel are called dense/kernel and dense+1/kernel.
2. Names need not be unique: equal ones are numbered in the order in which they are
   seen.
3. A name is never given twice. When a variable goes, which garbage collectors notice
   at different times, its residual goes too, and its name stays taken.

TensorFlow traces a function once for all variables of a shape that are its arguments,
so that what Python saw while tracing is not what runs: graphs carry a text that
describes the resources, and the names are found when they run.
"""

import re
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from hvd_sparse.tensorflow.matching import Seen, Shape, match_names, split_name

Tensor = Any  # TensorFlow has no types

_RESOURCE = re.compile(r"<ResourceHandle\(.*\)>", re.DOTALL)
_DESCRIBED = re.compile(
    r'ResourceHandle\(name="(.*?)(?:/\d+)?", device=.*Shape: \[([^\]]*)\]', re.DOTALL
)
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")
_TENSOR = "tensor "
_HOLE = "\1"  # in the text of a graph, where a resource goes


class Loaded(NamedTuple):
    """A state whose tensors are called as they are here.

    Attributes:
        state: for the path.
        here: names of the variables that are known.
        waiting: what is not here yet, by name.
        by_place: names that are places, as states of version 0.1.0 have them.
    """

    state: dict[str, Any]
    here: list[str]
    waiting: dict[str, tuple[str, Shape]]
    by_place: dict[int, str]


class VariableNames:
    """Names of the variables of one store of residuals."""

    def __init__(self) -> None:
        """None is known yet."""
        self._named: dict[str, tuple[str, Seen]] = {}  # by key, in the order of sight
        self._keys: dict[int, str] = {}  # by id of a variable that lives
        self._taken: set[str] = set()
        self._first: dict[str, list[int]] = {}  # numbers, by name without them
        self._waiting: dict[str, tuple[str, Shape]] = {}
        self._by_place: dict[int, str] = {}
        self._gone: deque[str] = deque()
        self._static = 0
        self._lock = threading.RLock()  # graphs run while others are traced

    # ------------------------------------------------------------- while Python sees

    def see(
        self,
        sources: Sequence[Any],
        scope: str = "",
        places: Sequence[int] | None = None,
    ) -> list[str]:
        """Their names; tensors are called by their place among the tensors.

        Args:
            sources: variables of TensorFlow or Keras, and tensors.
            scope: "", or a number such as "@1", of an optimizer that has residuals of
                its own.
            places: what version 0.1.0 called them by; their order unless given.

        Raises:
            ValueError: a state was loaded, and does not say which of its residuals is
                that of a variable.
        """
        with self._lock:
            seen = _each_once(self._seen(sources, scope, places))
            names = self._names_of(seen)
            for name, variable in zip(names, seen, strict=True):
                self._named[variable.key] = (name, variable)
            return names

    def see_tensor(self, name: str, shape: Shape) -> str:
        """The name of a tensor for which the user chose one."""
        with self._lock:
            return self._names_of([Seen(_TENSOR + name, name, shape, -1)])[0]

    def describe(self, sources: Sequence[Any], scope: str = "") -> Tensor:
        """A scalar string that tells `named` which variables these are, when it runs.

        In a graph it says so of the variables it runs with, be it traced with others.
        """
        with self._lock:
            keys = [seen.key for seen in self._seen(sources, scope, None)]
        handles, parts = [], []
        for source, key in zip(sources, keys, strict=True):
            handle: Any = getattr(_bare(source), "handle", None)
            # text is made on the host, where a resource of a GPU can not be brought
            if _RESOURCE.search(key) and "CPU" in str(handle.device):
                handles.append(handle)
                key = _RESOURCE.sub(_HOLE, key, count=1)
            parts.append(key)
        text = "\n".join(parts)
        if not handles or tf.executing_eagerly():
            return tf.constant("\n".join(keys))
        return tf.raw_ops.StringFormat(
            inputs=handles,
            template=text,
            placeholder=_HOLE,
            summarize=1,
            name="names_for_PyFunc",  # XLA, which can do neither, may name this one
        )

    # ----------------------------------------------------------------- while it runs

    def named(self, description: Any) -> list[str]:
        """The names of the variables that a graph runs with.

        Args:
            description: what the tensor of `describe` was, as TensorFlow gives it.

        Raises:
            ValueError: a variable was deleted, and it can not be told which it was.
        """
        text = bytes(np.asarray(description).item()).decode()
        with self._lock:
            keys = _each_once(
                [Seen(key, "", (), -1) for key in text.split("\n") if key]
            )
            known = [self._named.get(key) for key, *_ in keys]
            return self._names_of(
                [
                    _described(variable.key) if named is None else named[1]
                    for variable, named in zip(keys, known, strict=True)
                ]
            )

    def gone(self) -> Iterable[str]:
        """Names of variables, or of scopes, that live no more, each once."""
        while self._gone:
            gone = self._gone.popleft()
            with self._lock:
                for key in [k for k in self._named if gone in k.split("\t")[:2]]:
                    yield self._named.pop(key)[0]

    def end(self, scope: str) -> None:
        """The optimizer of this scope lives no more. Garbage collectors may call it."""
        self._gone.append(scope)

    # ------------------------------------------------------------------------- states

    def saved(self) -> dict[str, tuple[str, Shape]]:
        """Per name, what a restart knows the variable by: `variables` of a state."""
        with self._lock:
            known = {name: (s.raw, s.shape) for name, s in self._named.values()}
            return {**known, **self._waiting}

    def loaded(self, state: Mapping[str, Any]) -> Loaded:
        """The state with names of the variables that are known; nothing changes yet.

        Raises:
            ValueError: which variable is which can not be told.
        """
        tensors = dict(state["tensors"])
        with self._lock:
            known = dict(self._named.values())
            if "variables" not in state:
                return self._loaded_by_place(state, tensors, known)
            saved = {
                name: (raw, tuple(shape))
                for name, (raw, shape) in state["variables"].items()
            }
            found = {n: n for n, s in known.items() if saved.get(n) == (s.raw, s.shape)}
            rest = {n: s for n, s in saved.items() if n not in found}
            others = [seen for name, seen in known.items() if name not in found]
            called = {seen: name for name, seen in known.items()}
            matched = match_names(others, rest, strict=False)
            renamed = {old: called[seen] for seen, old in matched.items()}
            names = {**found, **renamed}
            for name in rest:
                if name not in names:  # not here yet; its name may be another's here
                    names[name] = self._free(name, set(known) | set(names.values()))
            waiting = {names[n]: s for n, s in rest.items() if n not in renamed}
        held = {names.get(name, name): saved for name, saved in tensors.items()}
        return Loaded({**state, "tensors": held}, list(known), waiting, {})

    def adopt(self, loaded: Loaded) -> None:
        """The path has taken it."""
        with self._lock:
            self._waiting = dict(loaded.waiting)
            self._by_place = dict(loaded.by_place)

    def _loaded_by_place(
        self, state: Mapping[str, Any], tensors: dict[str, Any], known: dict[str, Seen]
    ) -> Loaded:
        """Of version 0.1.0, which called a gradient by its place."""
        by_place = {
            int(name[8:]): name
            for name in tensors
            if name.startswith("gradient") and name[8:].isdigit()
        }
        renamed: dict[str, str] = {}
        for place, old in dict(by_place).items():
            there = [name for name, seen in known.items() if seen.place == place]
            if len(there) > 1:
                raise ValueError(
                    f"{old}: state has no name for it, and at its place are "
                    f"{' and '.join(there)}: load it before the first step"
                )
            if there:
                renamed[old] = there[0]
                del by_place[place]
        held = {renamed.get(name, name): saved for name, saved in tensors.items()}
        waiting = {
            name: (name, tuple(tensors[name]["shape"])) for name in by_place.values()
        }
        return Loaded({**state, "tensors": held}, list(known), waiting, by_place)

    # ------------------------------------------------------------------- how it is done

    def _names_of(self, seen: Sequence[Seen]) -> list[str]:
        """In the order in which they are given, which is that on every rank."""
        unknown = [s for s in seen if s.key not in self._named]
        for variable, name in self._claimed(unknown).items():
            self._waiting.pop(name)
            self._name(variable, name)
        for variable in unknown:
            if variable.key not in self._named:
                self._name(variable, self._fresh(variable.raw))
        return [self._named[variable.key][0] for variable in seen]

    def _claimed(self, unknown: Sequence[Seen]) -> dict[Seen, str]:
        """Which of them a loaded state has."""
        if not self._waiting or not unknown:
            return {}
        claimed = {}
        for variable in unknown:
            name = self._by_place.pop(variable.place, None)
            if name is not None:
                claimed[variable] = name
        taken = set(claimed.values()) | set(self._by_place.values())
        waiting = {n: s for n, s in self._waiting.items() if n not in taken}
        rest = [variable for variable in unknown if variable not in claimed]
        return {**claimed, **match_names(rest, waiting, strict=True)}

    def _name(self, variable: Seen, name: str) -> None:
        self._named[variable.key] = (name, variable)
        self._taken.add(collective(name))

    def _fresh(self, raw: str) -> str:
        template, numbers, scope = split_name(raw)
        first = self._first.setdefault(template, numbers)
        parts = [
            part if number == start else f"{part}{number - start:+d}"
            for part, number, start in zip(
                template.split("/"), numbers, first, strict=True
            )
        ]
        return self._free("/".join(parts) + scope, set())

    def _free(self, name: str, also: set[str]) -> str:
        taken = self._taken | {collective(n) for n in {*self._waiting, *also}}
        candidate, number = name, 0
        while collective(candidate) in taken:
            number += 1
            candidate = f"{name}#{number}"
        return candidate

    def _seen(
        self, sources: Sequence[Any], scope: str, places: Sequence[int] | None
    ) -> list[Seen]:
        seen, tensors = [], 0
        order = range(len(sources)) if places is None else places
        for place, source in zip(order, sources, strict=True):
            shape = _shape(source)
            if _is_variable(source):
                key, raw = self._key(_bare(source)), raw_name(source) + _suffix(scope)
                seen.append(Seen(_scoped(key, scope), raw, shape, place))
            else:
                name = f"source{tensors}{_suffix(scope)}"
                seen.append(Seen(f"{_TENSOR}{name}", name, shape, place))
                tensors += 1
        return seen

    def _key(self, variable: Any) -> str:
        """Its resource as text; where there is none yet, a number for the object."""
        key = self._keys.get(id(variable))
        if key is None:
            found = _RESOURCE.search(repr(getattr(variable, "handle", None)))
            self._static += not found
            key = found[0] if found else f"static {self._static}"
            self._keys[id(variable)] = key
            ours = weakref.ref(self)
            goes = weakref.finalize(variable, _forget, ours, id(variable), key)
            goes.atexit = False
        return key


def _forget(ours: "weakref.ref[VariableNames]", identity: int, key: str) -> None:
    """Called by the garbage collector, wherever the program is: no more than this."""
    names = ours()
    if names is not None:
        names._keys.pop(identity, None)
        names._gone.append(key)


def collective(name: str) -> str:
    """The name as TensorFlow and Horovod allow it for an operation."""
    return _UNSAFE.sub(lambda found: "." if found[0] == "/" else "-", name)


def raw_name(variable: Any) -> str:
    """As its user sees it: dense/kernel.

    In Keras 2 and TensorFlow that is its name, in Keras 3 the end of its path: how that
    begins depends on whether the model was built or loaded.
    """
    path = getattr(variable, "path", None)
    if path:
        return "/".join(str(path).split("/")[-2:])
    return str(variable.name).removesuffix(":0")


def _bare(source: Any) -> Any:
    """The variable of TensorFlow in one of Keras."""
    for inner in ("_variable", "_value"):  # of mixed precision; of Keras 3
        held = getattr(source, inner, None)
        if isinstance(held, tf.Variable):
            return held
    return source


def _is_variable(source: Any) -> bool:
    return isinstance(_bare(source), tf.Variable)


def _shape(source: Any) -> Shape:
    shape = getattr(source, "shape", None)
    if shape is None or getattr(shape, "rank", 0) is None:
        return (-1,)
    return tuple(-1 if n is None else int(n) for n in shape)


def _scoped(key: str, scope: str) -> str:
    return f"{key}\t{scope}"


def _described(key: str) -> Seen:
    """A variable that Python never saw: what TensorFlow says of it."""
    text, scope = key.split("\t")[:2]
    found = _DESCRIBED.search(text)
    if found is None:
        raise ValueError(f"{text}: a graph runs with a variable that was deleted")
    sizes = [size for size in found[2].split(",") if size]
    shape = tuple(int(size) if size.isdigit() else -1 for size in sizes)
    return Seen(key, found[1] + _suffix(scope), shape, -1)


def _suffix(scope: str) -> str:
    return "" if scope == "@0" else scope


def _each_once(seen: Sequence[Seen]) -> list[Seen]:
    """The same variable twice among the sources has two gradients, two residuals."""
    times: dict[str, int] = {}
    distinct = []
    for variable in seen:
        again = times[variable.key] = times.get(variable.key, 0) + 1
        key = variable.key if again == 1 else f"{variable.key}\t{again}"
        distinct.append(variable._replace(key=key))
    return distinct
