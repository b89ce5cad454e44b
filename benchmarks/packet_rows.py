"""The figures of single packets as tables: a line a program and kind of packet, a column a protocol. Pure."""

import collections.abc
import dataclasses

from benchmarks import packets, results, stats, tables, targets

_COLUMNS = tuple((family, protocol) for protocol in ("TCP", "UDP") for family in (4, 6))


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One line: what one program does with one kind of packet."""

    program: str
    what: str
    flows: int
    found: dict[tuple[int, str], stats.Summary]  # by family and protocol

    @property
    def target(self) -> targets.Target | None:
        """What design.md asks of it."""
        if self.what.startswith("established") and self.what != packets.STALE and "left" not in self.what:
            return targets.PACKET if self.flows == 1 else targets.PACKET_OF_MANY
        return targets.PACKET_NEW if packets.NO_STATE in self.what else None

    @property
    def worst(self) -> float:
        """The greatest of the medians."""
        return max(each.median for each in self.found.values())


def lines(found: results.Results) -> list[Line]:
    """Return every line of a run; the floors come first."""
    samples: dict[tuple[str, str, int], dict[tuple[int, str], list[float]]] = {}
    for each in found.packets:
        place = samples.setdefault((each.program, each.what, each.flows), {})
        if each.ns:
            place.setdefault((each.family, each.protocol), []).extend(each.ns)
    listed = [
        Line(*key, {column: stats.summary(ns) for column, ns in of.items()})
        for key, of in samples.items()
        if of
    ]
    return sorted(listed, key=lambda line: not _is_floor(line))


def table(listed: collections.abc.Iterable[Line]) -> tables.Table:
    """Return lines as a table: medians in ns, quartiles behind them."""
    columns = (f"IPv{family} {protocol}" for family, protocol in _COLUMNS)
    rows = []
    for line in listed:
        floor = _FLOORS.get(line.program)
        program = tables.Cell(floor) if floor else tables.Cell(line.program, tables.Look.CODE)
        cells = (_cell(line.found.get(column)) for column in _COLUMNS)
        about = tables.plain(line.what, flows(line), line.target or "")
        rows.append((program, *about, *cells, _verdict(line)))
    return tables.Table(("program", "packet", "flows", "target", *columns, "verdict"), rows)


_FLOORS = {"tc": "tc", "xdp": "XDP"}


def _is_floor(line: Line) -> bool:
    return line.what in (packets.NOTHING, packets.NOTHING_SINGLY)


def flows(line: Line) -> str:
    """Say how many flows there are, or that each packet begins one; nothing of a floor."""
    if _is_floor(line):
        return ""
    return {0: "each new", 1: "1", packets.FLOWS: "64k"}.get(line.flows, str(line.flows))


def _cell(seen: stats.Summary | None) -> tables.Cell:
    if seen is None:
        return tables.Cell("")
    return tables.Cell(f"{seen.median:.0f}", tables.Look.FIGURE, f"{seen.low:.0f} – {seen.high:.0f}")


def _verdict(line: Line) -> tables.Cell:
    if line.target is None:
        return tables.Cell("")
    missed = line.target.missed_by(line.worst)
    if missed:
        return tables.Cell(f"missed by {missed:.0f} ns", tables.Look.MISSED)
    return tables.Cell("met", tables.Look.MET)


def ports(each: results.Ports) -> tuple[str, tables.Table]:
    """Say how new flows fare as ports run out."""
    said = (
        f"IPv{each.family}, {each.ports:,} ports of one address towards one address of a backend: the "
        f"first new flow was refused when {each.reached:,} were open."
    )
    rows: list[tuple[tables.Cell, ...]] = []
    for share, rounds in each.filled.items():
        if not rounds:
            continue
        ns = stats.summary([one.ns for one in rounds])
        refused = stats.summary([one.refused for one in rounds]).median
        figure = tables.Cell(f"{ns.median:,.0f}", tables.Look.FIGURE, f"{ns.low:,.0f} – {ns.high:,.0f}")
        rows.append((tables.Cell(f"{float(share):.0%}"), figure, tables.Cell(f"{refused:.1%}")))
    return said, tables.Table(("ports taken", "ns for a new flow", "refused"), rows)
