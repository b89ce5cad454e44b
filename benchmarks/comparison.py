"""The figures of docs/comparison.md: what somebody asks who chooses between lbproxy and kube-proxy. Pure."""

import collections.abc
import typing

from benchmarks import figures, packet_rows, packets, results, rows, tables
from benchmarks.figure import LBPROXY, Figure, Group

_MANY = 10_000


class _Row(typing.NamedTuple):
    """What a line shows, and which figures are that; where several are, from the least to the greatest."""

    said: str
    group: Group
    what: str
    services: int
    of_topic: str = ""


_SERVICE, _DIRECT = figures.WAYS["service"], figures.WAYS["direct"]
_ROWS = (
    _Row("short connections through a ClusterIP ÷ no proxy, 1 service", Group.SHORT, _SERVICE, 1),
    _Row("the same at 10,000 services", Group.SHORT, _SERVICE, _MANY),
    _Row("to a pod of another node, 10,000", Group.PATHS, _SERVICE, _MANY, figures.PATHS["remote"]),
    _Row("from the node itself, 10,000", Group.PATHS, _SERVICE, _MANY, figures.PATHS["node"]),
    _Row("traffic that is *no* service's ÷ no proxy, 10,000 services", Group.SHORT, _DIRECT, _MANY),
    _Row("NodePort from outside, 1 service, rate of lbproxy ÷ theirs", Group.VERSUS, "", 1),
    _Row("the same at 10,000 services", Group.VERSUS, "", _MANY),
    _Row("a changed slice takes effect, 10,000 services, p50", Group.PROGRAMMING, "quiet, p50", _MANY),
    _Row("first start, 1 service", Group.START, figures.SERVING, 1, figures.STARTS["fresh"]),
    _Row("agent's memory, 10,000 services", Group.MEMORY, figures.RESIDENT, _MANY),
    _Row("maps or rules in the kernel, 10,000 services", Group.MEMORY, figures.KERNEL_MEMORY, _MANY),
)


def table(found: results.Results) -> tables.Table:
    """Return those figures side by side, a column for each contestant."""
    called = rows.headings(found)
    listed = figures.figures(found)
    lines = []
    for row in _ROWS:
        chosen = [one for one in listed if _is_of(row, one)]
        if chosen:
            cells = (_cell([one for one in chosen if one.column == name], name) for name in called)
            lines.append((tables.Cell(row.said), *cells))
    return tables.Table(("", *called.values()), lines)


def _is_of(row: _Row, one: Figure) -> bool:
    of_line = (row.group, row.services, row.what or one.what) == (one.group, one.services, one.what)
    return of_line and one.topic.endswith(row.of_topic)


def _cell(chosen: collections.abc.Sequence[Figure], name: str) -> tables.Cell:
    if not chosen:
        return tables.Cell("–")
    least, greatest = (bound(chosen, key=lambda one: one.value).text for bound in (min, max))
    look = tables.Look.FIGURE if name == LBPROXY else tables.Look.PLAIN
    return tables.Cell(least if least == greatest else f"{least} to {greatest}", look)


def of_packets(found: results.Results) -> str:
    """Say what single packets take in tc, IPv4 TCP; nothing where none were measured."""
    wanted = {
        "of a known flow": (packets.HERE, 1),
        "of 64k known flows in turn": (packets.HERE, packets.FLOWS),
        "that begins a flow to another node": (packets.NEW_ELSEWHERE, 0),
    }
    seen = {
        (line.what, line.flows): line.found[4, "TCP"].median
        for line in packet_rows.lines(found)
        if line.program == "tc_from_outside" and (4, "TCP") in line.found
    }
    parts = [f"{said} {seen[key]:,.0f}" for said, key in wanted.items() if key in seen]
    return f"A packet in tc, ns in the kernel (IPv4 TCP), {', '.join(parts)}." if parts else ""
