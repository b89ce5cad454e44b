"""Values as JSON, YAML or a table: drawn with `rich` on a terminal, plain aligned columns elsewhere."""

import enum
import sys
import typing
from collections.abc import Iterable, Sequence

import msgspec
import yaml

from lbproxy.commands import output


class Color(enum.StrEnum):
    """How a cell stands out on a terminal."""

    GOOD = "green"
    WARNING = "yellow"
    BAD = "red"


class Cell(typing.NamedTuple):
    """Text, and how it stands out; `full` is what a terminal has room for, one item a line."""

    text: str
    color: Color | None = None
    full: str = ""


Row = Sequence[str | int | Cell]


class Table(typing.NamedTuple):
    """Columns and rows of cells; a column of numbers is aligned to the right, and so are those of `right`.

    Name in `right` what may be all empty, or has units: it stays in its place whatever the rows have.

    Only `prose`, in the last column, is folded on a narrow terminal: an address in two pieces helps nobody.
    """

    columns: Sequence[str]
    rows: Sequence[Row]
    prose: bool = False
    right: typing.Collection[str] = ()


def show(value: object, form: str, present: typing.Callable[[], Iterable[Table | str]]) -> None:
    """Print a value as `form` says: json, yaml, or what `present` makes of it."""
    if form == "json":
        text = to_json(value)
    elif form == "yaml":
        text = to_yaml(value)
    elif sys.stdout.isatty():
        _draw(present())
        return
    else:
        text = "\n".join(plain(part) for part in present())
    output.write(text)


def to_json(value: object) -> str:
    """Indented JSON; fields in the order of their declaration."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def to_yaml(value: object) -> str:
    """YAML of the same content."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text: str = yaml.dump(msgspec.to_builtins(value), Dumper=dumper, sort_keys=False, allow_unicode=True)
    return text.rstrip("\n")


def plain(part: Table | str) -> str:
    """A table as aligned columns without any drawing, for other programs to read."""
    if isinstance(part, str):
        return part
    rows = [list(part.columns), *([_text(cell) for cell in row] for row in part.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(part.columns))]
    right = _numeric(part)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    )


def _text(cell: str | int | Cell) -> str:
    # An empty cell would shift the columns of whoever splits a line at blanks.
    return (cell.text if isinstance(cell, Cell) else str(cell)) or "-"


def _numeric(table: Table) -> list[bool]:
    return [
        name in table.right or _all_numbers([row[column] for row in table.rows])
        for column, name in enumerate(table.columns)
    ]


def _all_numbers(cells: Row) -> bool:
    given = [cell for cell in cells if cell != ""]
    return bool(given) and all(isinstance(cell, int) for cell in given)


def _draw(parts: Iterable[Table | str]) -> None:
    # Imported only now: nothing else needs it.
    import rich.console  # noqa: PLC0415
    import rich.table  # noqa: PLC0415

    console = rich.console.Console()
    for part in parts:
        if isinstance(part, str):
            console.print(part, markup=False, highlight=False)
            continue
        drawn = rich.table.Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
        for name, number in zip(part.columns, _numeric(part), strict=True):
            drawn.add_column(name, justify="right" if number else "left", no_wrap=True, overflow="crop")
        if part.prose:
            drawn.columns[-1].no_wrap, drawn.columns[-1].overflow = False, "fold"
        for row in part.rows:
            drawn.add_row(*(_styled(cell) for cell in row))
        rich.console.Console(width=max(console.width, _least_width(part))).print(drawn)


_GAP: typing.Final = 2
_PROSE_WIDTH: typing.Final = 20


def _least_width(table: Table) -> int:
    """How wide a table is with its prose folded as far as it is readable."""
    cells = [table.columns, *table.rows]
    widths = [
        max(len(line) for row in cells for line in (_full(row[column]).splitlines() or [""]))
        for column in range(len(table.columns))
    ]
    if table.prose:
        widths[-1] = min(widths[-1], _PROSE_WIDTH)
    return sum(widths) + _GAP * (len(widths) - 1)


def _full(cell: str | int | Cell) -> str:
    return (cell.full or cell.text) if isinstance(cell, Cell) else str(cell)


def _styled(cell: str | int | Cell) -> typing.Any:
    import rich.text  # noqa: PLC0415

    color = cell.color if isinstance(cell, Cell) else None
    return rich.text.Text(_full(cell), style=color or "")
