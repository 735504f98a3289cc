"""Markdown tables."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a table."""
    lines = [row(head), "|" + "---|" * len(head)]
    return lines + [row(cells) for cells in rows]


def row(cells: Sequence[object]) -> str:
    """Return one line of a table."""
    return f"| {' | '.join(map(str, cells))} |"
