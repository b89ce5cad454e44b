"""Figures as lines of tables, a column for each contestant. Pure."""

import collections.abc

from benchmarks import results, tables
from benchmarks.figure import CONTROL, LBPROXY, Figure, Group

_CONTROLS = {
    Group.PROGRAMMING: "the API server stand-in alone",
    Group.VERSUS: "the limit: no proxy at all ÷ iptables rules",
}


def heading(of: results.Contestant) -> str:
    """Say who it is in few words, and never leave out that rules were generated."""
    if of.real:
        return of.label
    tool = of.facts.get("tool", "").removeprefix(f"{of.name} ")
    # iptables names its backend in parentheses; nft the release.
    tool = tool if of.name == "iptables" else tool.partition(" (")[0]
    return f"generated {of.name} rules{f', {tool}' if tool else ''}"


def described(of: results.Contestant) -> str:
    """Say who it is, and everything that is known of it."""
    facts = [f"{name} {value}" for name, value in of.facts.items() if value not in of.label]
    about = [] if of.label == heading(of) else [of.label]
    if not of.real and "generated" not in of.label:
        about.append("the rules were generated: no kube-proxy ran")
    return "; ".join([*about, *facts]) or "the program itself"


def headings(found: results.Results) -> dict[str, str]:
    """Return what to call each contestant, lbproxy first; who is not described goes by the name."""
    known = {each.name: heading(each) for each in found.contestants}
    names = [
        *known,
        *(
            name
            for traffic in found.traffic
            for each in traffic.rounds
            for variant in each.runs
            if (name := variant.partition("/")[0]) != "bare"
        ),
        *(
            each.contestant
            for listed in (found.programming, found.starts, found.memory, found.cpu)
            for each in listed
        ),
    ]
    ordered = sorted(dict.fromkeys(names), key=lambda name: name != LBPROXY)
    return {name: known.get(name, name) for name in ordered}


def table(
    listed: collections.abc.Sequence[Figure],
    called: collections.abc.Mapping[str, str],
    *,
    spreads: bool = True,
) -> tables.Table:
    """Put figures of one group side by side; `called` are the headings of columns."""
    there = {figure.column for figure in listed}
    columns = [name for name in called if name in there]
    judged = any(figure.target is not None for figure in listed)
    controlled = CONTROL in there
    of_lines: dict[tuple[str, str], dict[int, dict[str, Figure]]] = {}
    for figure in listed:
        by_services = of_lines.setdefault((figure.topic, figure.what), {})
        by_services.setdefault(figure.services, {})[figure.column] = figure
    names = _names(of_lines)
    head = ["what", "services", *(_column(name, called, listed) for name in columns)]
    if judged:
        # Beside the figure that it is about.
        head[3:3] = ["target", "verdict"]
    if controlled:
        head.append(_CONTROLS.get(listed[0].group, "bare again ÷ bare"))
    rows = []
    for line, by_services in of_lines.items():
        for services, by_column in by_services.items():
            cells = [_cell(by_column.get(name), spreads) for name in columns]
            if judged:
                cells[1:1] = _judged(by_column)
            if controlled:
                cells.append(_cell(by_column.get(CONTROL), spreads))
            rows.append((tables.Cell(names[line]), tables.count(services), *cells))
    return tables.Table(tuple(head), rows)


def _names(lines: collections.abc.Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Name lines by what tells them apart."""
    listed = list(lines)
    topics, whats = ({line[place] for line in listed} for place in (0, 1))
    ends = {topic.rpartition(", ")[2] for topic in topics}

    def name(topic: str, what: str) -> str:
        if len(topics) == 1:
            return what
        short = topic.rpartition(", ")[0] if len(ends) == 1 else topic
        return short if len(whats) == 1 else f"{short}, {what}"

    return {line: name(*line) for line in listed}


def _column(
    name: str, called: collections.abc.Mapping[str, str], listed: collections.abc.Sequence[Figure]
) -> str:
    return f"÷ {called[name]}" if listed[0].group is Group.VERSUS else called[name]


def _cell(figure: Figure | None, spreads: bool) -> tables.Cell:
    if figure is None:
        return tables.Cell("–")
    # What failed is never left out.
    more = figure.spread if spreads or figure.unit == "failed" else figure.warning
    # Bold is what the product is judged by.
    ours = figure.column == LBPROXY or figure.target is not None
    return tables.Cell(figure.text, tables.Look.FIGURE if ours else tables.Look.PLAIN, more)


def _judged(by_column: collections.abc.Mapping[str, Figure]) -> list[tables.Cell]:
    for figure in by_column.values():
        if figure.target is not None:
            look = tables.Look.MET if figure.met else tables.Look.MISSED
            return [tables.Cell(str(figure.target)), tables.Cell(figure.verdict, look)]
    return [tables.Cell(""), tables.Cell("")]


def failed_by(found: results.Results) -> dict[str, int]:
    """Count what should not have failed, of each contestant and of bare: connections, changes never seen."""
    counts: dict[str, int] = {}

    def add(name: str, number: int) -> None:
        counts[name] = counts.get(name, 0) + number

    for traffic in found.traffic:
        for each in traffic.rounds:
            for variant, run in each.runs.items():
                add(variant.partition("/")[0], run.failed)
    for programming in found.programming:
        add(programming.contestant, programming.failed + programming.lost)
    for start in found.starts:
        add(start.contestant, start.failed)
    return {name: number for name, number in counts.items() if number}


def measured(found: results.Results, name: str) -> bool:
    """Whether connections or datagrams of somebody were really answered."""
    return any(
        run.count > 0
        for traffic in found.traffic
        for each in traffic.rounds
        for variant, run in each.runs.items()
        if variant.partition("/")[0] == name
    )


def failures(found: results.Results) -> int:
    """Count the failures of lbproxy and of bare: those of others are findings, and stand in the tables."""
    return sum(number for name, number in failed_by(found).items() if name in (LBPROXY, "bare"))
