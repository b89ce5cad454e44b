"""docs/contract.md: complete, and true as far as the names of its tests go.

The contract itself is not in the repository; its numbers are.
"""

import ast
import collections
import functools
import pathlib
import re
import typing

TESTS = pathlib.Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "contract.md"
ITEMS = {
    "AFF": 9, "API": 5, "CFG": 3, "CIP": 8, "CLI": 10, "CO": 8, "CT": 16, "DET": 4, "DS": 4, "E2E": 5,
    "EP": 11, "ES": 15, "ETP": 11, "EV": 5, "EXT": 5, "HC": 12, "HZ": 11, "ITP": 5, "LB": 8, "MASQ": 9,
    "MET": 4, "MS": 5, "NODE": 8, "NP": 16, "NPL": 4, "REJ": 9, "SEL": 13, "SR": 10, "SYNC": 9, "TOP": 11,
}  # fmt: skip
STATUSES = ("kept", "differs", "does not apply", "not yet")


class Row(typing.NamedTuple):
    """One line of the page."""

    item: str
    what: str
    status: str
    tests: str

    @property
    def named(self) -> list[str]:
        return re.findall(r"`([^`]+)`", self.tests)


def rows() -> list[Row]:
    lines = (line for line in PAGE.read_text().splitlines() if re.match(r"\| [A-Z0-9]+-\d+ \|", line))
    return [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines]


@functools.cache
def functions_of(module: str) -> set[str]:
    tree = ast.parse((TESTS / module).read_text())
    return {one.name for one in tree.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_item_is_there_once_and_in_order() -> None:
    found = [row.item for row in rows()]
    assert [item for item, count in collections.Counter(found).items() if count > 1] == []
    wanted = {f"{prefix}-{number}" for prefix, count in ITEMS.items() for number in range(1, count + 1)}
    assert wanted ^ {*found} == set()
    for prefix, count in ITEMS.items():
        numbers = [int(item.rpartition("-")[2]) for item in found if item.startswith(f"{prefix}-")]
        assert numbers == list(range(1, count + 1)), prefix


def test_every_status_is_one_and_says_why_where_it_has_to() -> None:
    for row in rows():
        word, _, why = row.status.partition(": ")
        assert word in STATUSES, row.item
        assert why or word != "differs", row.item
        assert row.what, row.item


def test_every_test_that_is_named_exists() -> None:
    missing = []
    for row in rows():
        assert row.named or row.tests == "—", row.item
        for name in row.named:
            path, _, function = name.partition("::")
            if not (TESTS / path).is_file() or function not in functions_of(path):
                missing.append((row.item, name))
    assert missing == []
