"""Shapes: the tensors of a model, without their memory.

No framework is imported: a model is known by what it offers.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Protocol

from hvd_sparse.core.plan import ITEMSIZES
from hvd_sparse.core.roles import offers

_AROUND = re.compile(r"torch\.|<dtype: '|'>")  # the name, as frameworks write a dtype


class Dtype(str):
    """The name of a dtype, which knows what an array's own does."""

    __slots__ = ()

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZES[self]


_FLOAT32 = Dtype("float32")


@dataclass(frozen=True)
class Shaped:
    """What a plan asks of a gradient.

    Attributes:
        shape: no dimension is negative.
        dtype: any; whether gradients may have it is for the plan to say.
    """

    shape: tuple[int, ...]
    dtype: Dtype = _FLOAT32


class Module(Protocol):
    """A model of PyTorch."""

    def named_parameters(self) -> Iterable[tuple[str, Any]]:
        """Each once, though layers may share it."""
        ...


class Trained(Protocol):
    """A model of Keras.

    Attributes:
        trainable_variables: there once it is built.
    """

    trainable_variables: Sequence[Any]


class InLayers(Protocol):
    """A variable of Keras 3, whose name alone is that of many.

    Attributes:
        path: its name, after those of the layers that it is in.
    """

    path: str


class Arraylike(Protocol):
    """An array, or a tensor, of any framework."""

    shape: Any
    dtype: Any


def shapes_of(model: Any) -> list[tuple[str, Shaped]]:
    """Names and shapes of what is trained, in the model's order.

    Args:
        model: shapes or arrays by name, or in a row; a torch.nn.Module; a Keras model
            that is built. Where only a shape is given it is one of float32.

    Raises:
        TypeError: it is none of these, or something in it no shape.
        ValueError: there is nothing to train in it, or a shape is negative.
    """
    shaped = [(name, _shaped(name, part)) for name, part in _named(model)]
    if not shaped:
        raise ValueError(
            f"model_or_shapes must have trainable tensors, got {type(model).__name__} "
            "with none"
        )
    return shaped


def _named(model: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(model, Mapping):
        return model.items()
    if not isinstance(model, str | bytes | type):
        if offers(model, Module):
            return [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if offers(model, Trained):
            return [
                (_name(variable), variable) for variable in model.trainable_variables
            ]
        if isinstance(model, Sequence):
            return [(f"tensor {place}", part) for place, part in enumerate(model)]
    raise TypeError(
        "model_or_shapes must be shapes or arrays by name, a sequence of them, a "
        f"torch.nn.Module or a Keras model, got {model!r}"
    )


def _name(variable: Any) -> str:
    name = variable.path if offers(variable, InLayers) else variable.name
    return str(name).removesuffix(":0")


def _shaped(name: Any, part: Any) -> Shaped:
    if not isinstance(name, str):
        raise TypeError(f"names must be str, got {name!r}")
    if isinstance(part, tuple | list):
        return Shaped(_shape(name, part))
    if isinstance(part, type) or not offers(part, Arraylike):
        raise TypeError(f"{name}: must be a shape or an array, got {part!r}")
    return Shaped(_shape(name, part.shape), dtype_named(part.dtype))


def dtype_named(dtype: Any) -> Dtype:
    """That of an array of any framework.

    Example:
        >>> dtype_named("torch.bfloat16").itemsize
        2
    """
    return Dtype(_AROUND.sub("", str(dtype)))


def _shape(name: str, shape: Iterable[Any]) -> tuple[int, ...]:
    try:
        found = tuple(index(size) for size in shape)
    except TypeError:
        raise TypeError(f"{name}: shape must be integers, got {shape}") from None
    if min(found, default=0) < 0:
        raise ValueError(f"{name}: shape must not be negative, got {found}")
    return found
