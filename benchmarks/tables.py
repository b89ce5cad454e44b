"""Tables that do not know whether they become Markdown or HTML. Pure."""

import collections.abc
import dataclasses
import enum
import typing


class Look(enum.Enum):
    """What a cell is."""

    PLAIN = enum.auto()
    FIGURE = enum.auto()  # what the table is for
    CODE = enum.auto()
    MET = enum.auto()
    MISSED = enum.auto()


class Cell(typing.NamedTuple):
    """Text, and what comes after it in smaller letters."""

    text: str
    look: Look = Look.PLAIN
    more: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under a head."""

    head: tuple[str, ...]
    rows: list[tuple[Cell, ...]]


def plain(*texts: object) -> tuple[Cell, ...]:
    """Return cells of nothing but text."""
    return tuple(Cell(str(text)) for text in texts)


def count(number: int) -> Cell:
    """Return a number with its thousands apart."""
    return Cell(f"{number:,}")


def markdown(table: Table) -> str:
    """Render a table as Markdown."""
    lines = [_line(map(_escaped, table.head)), f"|{'---|' * len(table.head)}"]
    lines += [_line(map(_marked, row)) for row in table.rows]
    return "\n".join(lines)


def _line(texts: collections.abc.Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _marked(cell: Cell) -> str:
    text = _escaped(cell.text)
    if text and cell.look is Look.FIGURE:
        text = f"**{text}**"
    elif text and cell.look is Look.CODE:
        text = f"`{text}`"
    return f"{text} ({_escaped(cell.more)})" if cell.more else text


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
