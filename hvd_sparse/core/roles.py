"""Which of the protocols in `hvd_sparse.core.contracts` a part of a user's has."""

from functools import cache
from typing import TypeGuard, TypeVar

Role = TypeVar("Role")


def offers(part: object, role: type[Role]) -> TypeGuard[Role]:
    """Whether it has all that a protocol declares.

    Also where it hands that on from something inside it, by `__getattr__`, which
    isinstance does not see from Python 3.12 on.
    """
    declared = _declared(role)  # type: ignore[arg-type]  # classes are hashable
    return all(hasattr(part, name) for name in declared)


@cache
def _declared(role: type) -> tuple[str, ...]:
    names = {*vars(role), *role.__annotations__}
    return tuple(sorted(name for name in names if not name.startswith("_")))
