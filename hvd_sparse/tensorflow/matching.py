"""Which variable of a saved state is which here, told by names and shapes."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Shape = tuple[int, ...]

_NUMBER = re.compile(r"(.*?)(?:_(\d+))?")
_SCOPE = re.compile(r"(.*?)(@\d+)?")


class Seen(NamedTuple):
    """A variable that was seen.

    Attributes:
        key: of its resource.
        raw: its name as its user sees it.
        shape: -1 where it is not known.
        place: among the sources, when it was seen last.
    """

    key: str
    raw: str
    shape: Shape
    place: int


def match_names(
    variables: Sequence[Seen], waiting: Mapping[str, tuple[str, Shape]], *, strict: bool
) -> dict[Seen, str]:
    """Which name a state has for each variable, as far as it has one.

    By name, if that tells; else, of as many of a kind and shape as there are, by order.

    Raises:
        ValueError: strict, and names do not tell which of several it is; or a
            variable has another shape there.
    """
    matched: dict[Seen, str] = {}
    kinds: dict[tuple[str, Shape], list[Seen]] = {}
    for variable in variables:
        kind = (split_name(variable.raw)[0], variable.shape)
        kinds.setdefault(kind, []).append(variable)
    for (template, shape), these in kinds.items():
        there = {
            name: raw
            for name, (raw, size) in waiting.items()
            if (split_name(raw)[0], size) == (template, shape)
        }
        raws = list(there.values())
        names = [variable.raw for variable in these]
        if len(set(names)) == len(names) and all(raws.count(n) == 1 for n in names):
            by_raw = {raw: name for name, raw in there.items()}
            matched.update({v: by_raw[v.raw] for v in these})
        elif len(there) == len(these):
            matched.update(zip(these, there, strict=True))
        elif there and strict:
            raise ValueError(
                f"{names[0]}: state has {len(there)} residuals of shape {shape} that "
                f"could be of it ({', '.join(raws)}), and names do not tell which: "
                "give variables names of their own, or show all of them at once, as "
                "optimizer.build(variables) does"
            )
        elif strict:
            _check_shapes(these, waiting)
    return matched


def _check_shapes(
    variables: Sequence[Seen], waiting: Mapping[str, tuple[str, Shape]]
) -> None:
    """A variable of this name but another shape: the state is of another model."""
    for variable in variables:
        shapes = [shape for raw, shape in waiting.values() if raw == variable.raw]
        if len(shapes) == 1 and shapes[0] != variable.shape:
            raise ValueError(
                f"{variable.raw}: state has shape {shapes[0]}, expected "
                f"{variable.shape}"
            )


def split_name(raw: str) -> tuple[str, list[int], str]:
    """A name without the numbers at the ends of its parts, these, and its scope."""
    scoped = _SCOPE.fullmatch(raw)
    assert scoped  # it matches everything
    matches = [_NUMBER.fullmatch(part) for part in scoped[1].split("/")]
    template = "/".join(match[1] for match in matches if match)
    numbers = [int(match[2] or 0) for match in matches if match]
    return template, numbers, scoped[2] or ""
