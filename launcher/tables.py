"""Plain-text tables for the terminal: aligned columns, nothing that a log or a pipe could not hold."""

from collections.abc import Sequence


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Column names, a rule, and the rows; numbers to the right, the rest to the left."""
    widths = [max(len(line[index]) for line in [columns, *rows]) for index in range(len(columns))]
    right = [bool(rows) and all(is_number(row[index]) for row in rows) for index in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(columns), "  ".join("-" * width for width in widths), *map(line, rows)])


def is_number(text: str) -> bool:
    """Whether a cell is a number, perhaps with a unit right behind it."""
    return text[:1].isdigit() and text.rstrip("%MGKiB ").replace(".", "").replace("-", "").isdigit()
