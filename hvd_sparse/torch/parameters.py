"""The parameters of an optimizer by name, also those that it is given later."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch

Tensor = torch.Tensor
NamedParameters = Iterable[tuple[str, Tensor]]


class Parameters:
    """Every tensor keeps the name that it had first, wherever it is held later."""

    def __init__(
        self, optimizer: Any, named_parameters: NamedParameters | None
    ) -> None:
        """Name what the optimizer holds.

        Args:
            optimizer: has param_groups.
            named_parameters: of the whole model; may have more than the optimizer
                holds. Without it a parameter is named by its place.

        Raises:
            TypeError: named_parameters are no pairs of a name and a tensor.
            ValueError: names are not unique, or missing.
        """
        self._optimizer = weakref.ref(optimizer)  # whose hooks must not keep it alive
        self._given = None if named_parameters is None else _checked(named_parameters)
        self._names: dict[Tensor, str] = {}
        self.held()

    def held(self) -> dict[str, Tensor]:
        """All parameters of the optimizer now, by name.

        Raises:
            ValueError: one was added that has no name.
        """
        held = {}
        for g, group in enumerate(self._groups()):
            for i, parameter in enumerate(group["params"]):
                name = self._names.get(parameter)
                if name is None:
                    place = f"group{g}.parameter{i}"
                    name = self._name(parameter, place, _named_by_torch(group, i))
                    self._names[parameter] = name
                held[name] = parameter
        return held

    def __iter__(self) -> Iterator[Tensor]:
        """All that the optimizer holds now, named or not; none when it is gone."""
        return (p for group in self._groups() for p in group["params"])

    def _groups(self) -> list[dict[str, Any]]:
        optimizer = self._optimizer()
        return [] if optimizer is None else optimizer.param_groups

    def _name(self, parameter: Tensor, place: str, by_torch: str | None) -> str:
        taken = {*self._names.values(), *(self._given or {}).values()}
        if self._given is None:
            while place in taken:  # by one whose group was removed
                place += "+"
            return place
        name = self._given.get(parameter)
        if name is None and by_torch not in taken:
            name = by_torch
        if name is None:
            raise ValueError(
                f"named_parameters must cover the optimizer's parameters, {place} of "
                f"shape {tuple(parameter.shape)} has no name; give those of the whole "
                "model"
            )
        return name


def _checked(named_parameters: NamedParameters) -> dict[Tensor, str]:
    """Per parameter its name; a tied one has the first of its names."""
    names: dict[Tensor, str] = {}
    seen: set[str] = set()
    for pair in named_parameters:
        if not (
            isinstance(pair, tuple | list)
            and len(pair) == 2
            and isinstance(pair[0], str)
            and isinstance(pair[1], Tensor)
        ):
            raise TypeError(
                "named_parameters must be pairs of a name and a tensor, such as "
                f"model.named_parameters(), got {type(pair).__name__}"
            )
        name, parameter = pair
        if name in seen:
            raise ValueError(f"named_parameters must be unique, {name!r} comes twice")
        seen.add(name)
        names.setdefault(parameter, name)
    return names


def _named_by_torch(group: dict[str, Any], place: int) -> str | None:
    """Its name where the optimizer itself was given named parameters."""
    names = group.get("param_names")
    return names[place] if names else None
