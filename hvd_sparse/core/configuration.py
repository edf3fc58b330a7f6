"""What the user chose, as text: equal on every rank, or an error.

Ranks that train with different parts diverge without a sound. So each part is described
whole, not by the name of its class: a dataclass as its repr does, anything else by its
state. What has no text of its own (a lock, an open file) can not be agreed on, and is
refused.
"""

import pickle
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cached_property
from hashlib import blake2b
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    WrapperDescriptorType,
)
from typing import Any, Generic, Protocol

import numpy as np

_PLAIN = (type(None), type(...), bool, int, float, complex, str, bytes)
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE, which a class statement always makes
# what compiled types have, and of a class statement only these two
_COMPILED = (
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    WrapperDescriptorType,
)
_OF_EVERY_CLASS = ("__dict__", "__weakref__")
_PICKLING = ("__reduce__", "__reduce_ex__")
_MOST_LEVELS = 20  # of parts within parts; deeper ones hold each other


def describe(part: object, role: str = "it") -> str:
    """One line that is the same wherever the part is the same.

    Args:
        part: a sparsifier, a rule; also what it is made of.
        role: what the part is, for the error.

    Raises:
        TypeError: something in it can not be told from another of its kind.

    Example:
        >>> class Every:
        ...     def __init__(self, step):
        ...         self.step = step
        >>> describe(Every(2))
        'Every(step=2)'
    """
    try:
        return _text(part, _MOST_LEVELS)
    except _UndescribedError as error:
        raise TypeError(
            f"{role} must be such that ranks can agree on it, such as a frozen "
            f"dataclass of numbers; {type(part).__name__} holds {error}"
        ) from None


class _UndescribedError(Exception):
    """Says what has none."""


def _text(value: Any, levels: int) -> str:
    if not levels:
        raise _UndescribedError("parts that hold each other")
    inner = levels - 1
    if isinstance(value, Enum) or type(value) in _PLAIN:
        return repr(value)
    if isinstance(value, type | BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, np.generic):  # a number, as it is without numpy
        return _text(value.item(), inner)
    if type(value) in (list, tuple):
        inside = ", ".join(_text(v, inner) for v in value)
        if type(value) is list:
            return f"[{inside}]"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(_text(v, inner) for v in value))}}}"
    if isinstance(value, Mapping):
        pairs = (f"{_text(k, inner)}: {_text(v, inner)}" for k, v in value.items())
        return f"{{{', '.join(sorted(pairs))}}}"
    if isinstance(value, FunctionType | MethodType):
        return _function(value, inner)
    return _object(value, inner)


def _object(value: Any, levels: int) -> str:
    """By its fields, its attributes, or else by what pickle writes of it."""
    state = _state(value)
    if state is None:
        return f"{type(value).__qualname__}({_pickled(value)})"
    parts = (f"{name}={_text(v, levels)}" for name, v in state.items())
    return f"{type(value).__qualname__}({', '.join(parts)})"


def _state(value: Any) -> dict[str, Any] | None:
    """Fields as in the repr, then other attributes; None where Python sees not all."""
    kind = type(value)
    if not is_dataclass(value) and _is_opaque(kind):
        return None
    declared = fields(value) if is_dataclass(value) else ()
    state = {f.name: getattr(value, f.name) for f in declared if f.repr}
    others = {
        name: attribute
        for name, attribute in getattr(value, "__dict__", {}).items()
        if name not in {f.name for f in declared}
        and not isinstance(getattr(kind, name, None), cached_property)
    }
    return state | dict(sorted(others.items()))


def _is_opaque(kind: type) -> bool:
    """Whether its state is not, or not only, in its attributes: arrays, slots ..."""
    own_pickle = any(getattr(kind, n) is not getattr(object, n) for n in _PICKLING)
    bases = [base for base in kind.__mro__ if base not in (object, Generic, Protocol)]
    return own_pickle or any(map(_is_compiled, bases))


def _is_compiled(kind: type) -> bool:
    """Whether it has state outside of attributes: made in C, or with slots.

    The newer Python is, the more of its C types are heap types.
    """
    if not kind.__flags__ & _HEAP_TYPE or "__slots__" in vars(kind):
        return True
    return any(
        isinstance(value, _COMPILED)
        and value.__objclass__ is kind
        and name not in _OF_EVERY_CLASS
        for name, value in vars(kind).items()
    )


def _function(value: Any, levels: int) -> str:
    """What it does: its code, and what it took with it."""
    if isinstance(value, MethodType):
        return f"{_text(value.__self__, levels)}.{_function(value.__func__, levels)}"
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    held = (_code(value.__code__, levels), value.__defaults__, value.__kwdefaults__)
    return f"{value.__qualname__}[{_short(_text((*held, cells), levels).encode())}]"


def _code(code: CodeType, levels: int) -> tuple[Any, ...]:
    constants = (
        _code(c, levels) if isinstance(c, CodeType) else c for c in code.co_consts
    )
    return code.co_code, code.co_names, tuple(constants)


def _pickled(value: Any) -> str:
    try:
        return _short(pickle.dumps(value, protocol=4))
    except Exception:
        raise _UndescribedError(f"a {type(value).__qualname__}") from None


def _short(data: bytes) -> str:
    return blake2b(data, digest_size=8).hexdigest()
