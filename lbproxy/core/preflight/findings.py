"""What `lbproxy preflight` prints: field names and their order are a contract."""

import enum
import typing
from collections.abc import Iterable

import msgspec

UNSUPPORTED: typing.Final = 3  # as errors.UnsupportedKernel has it


class Level(enum.StrEnum):
    """What a finding means for an installation."""

    OK = "ok"
    WARNING = "warning"  # it runs, but not all is as it could be
    BLOCKS = "blocks"  # a start would fail, or the node would lose service


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at; `todo` is empty where there is nothing to do.

    `unsupported`: this kernel lacks something that lbproxy can not do without.
    """

    check: str
    level: Level
    found: str
    todo: str = ""
    unsupported: bool = False


class Report(msgspec.Struct, frozen=True):
    """Everything that was found, in the order of looking."""

    fit: bool
    exit_status: int
    warnings: int
    blocks: int
    findings: tuple[Finding, ...]


def ok(check: str, found: str, todo: str = "") -> Finding:
    """A finding that stands in nobody's way."""
    return Finding(check, Level.OK, found, todo)


def warning(check: str, found: str, todo: str) -> Finding:
    """A finding that is worth a look."""
    return Finding(check, Level.WARNING, found, todo)


def blocks(check: str, found: str, todo: str, *, unsupported: bool = False) -> Finding:
    """A finding that has to be done something about first."""
    return Finding(check, Level.BLOCKS, found, todo, unsupported)


def report(found: Iterable[Finding]) -> Report:
    """Sum findings up; a kernel that lacks something outweighs the rest, as nothing here mends it."""
    findings = tuple(found)
    count = {level: sum(1 for one in findings if one.level is level) for level in Level}
    status = 1 if count[Level.BLOCKS] else 0
    if any(one.unsupported for one in findings):
        status = UNSUPPORTED
    return Report(status == 0, status, count[Level.WARNING], count[Level.BLOCKS], findings)
