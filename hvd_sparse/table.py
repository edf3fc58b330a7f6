"""Tables as text, for people."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line a row: the first column begins where it begins, the others end together.

    Example:
        >>> aligned([["", "bytes"], ["dense", "1,024"], ["sparse", "16"]])
        ['        bytes', 'dense   1,024', 'sparse     16']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines
