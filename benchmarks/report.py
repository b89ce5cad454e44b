"""Pages from one run's JSON, and from nothing else but what is known of a real kube-proxy (`elsewhere`).

They are docs/benchmarks.html and .png, and what is between markers in README.md, docs/benchmarks.md,
docs/comparison.md and docs/balancing.md.

Run: python -m benchmarks.report [FILE]; without a file, the run that was started last of those that
came to their end.
"""

import argparse
import collections.abc
import pathlib
import sys

from benchmarks import (
    balancing_rows,
    comparison,
    elsewhere,
    figures,
    machine,
    maglev_rows,
    packet_rows,
    plot,
    remarks,
    results,
    rows,
    sections,
    tables,
    verdicts,
)
from benchmarks.figure import Group

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
README = machine.ROOT / "README.md"
PAGE = machine.ROOT / "docs/benchmarks.md"
BESIDE = machine.ROOT / "docs/comparison.md"
BALANCING = machine.ROOT / "docs/balancing.md"
PLOT = machine.ROOT / "docs/benchmarks.png"
HTML = machine.ROOT / "docs/benchmarks.html"
_HEADING = "## Measured"
_PICTURE = "![Rates, latencies, programming latency and memory](docs/benchmarks.png)"


def summary_section(found: results.Results) -> str:
    """Return the part of README.md that is between the markers."""
    called = rows.headings(found)
    said = remarks.remarks(found)
    parts = [_PICTURE] if plot.panels(found) else []
    parts += [_bullets_of(each for each in said if each.warning), contestants(found), elsewhere.remark(found)]
    parts += _targets(found, f"**{verdicts.HEADING}.** ")
    for group, listed in sections.headlines(found).items():
        parts += [f"**{group}.** {sections.headline_caption(group, found)}".rstrip()]
        parts.append(tables.markdown(rows.table(listed, called, spreads=False)))
    parts.append(sections.KEY)
    parts.append(f"Not shown: {'; '.join(sections.not_shown(found))}.")
    parts.append(_bullets_of(each for each in said if not each.warning))
    parts.append(
        "How, and every figure, also of other numbers of services and of single packets: "
        "[docs/benchmarks.md](docs/benchmarks.md), and as one page to read in a browser "
        "[docs/benchmarks.html](docs/benchmarks.html)."
    )
    return "\n\n".join(part for part in parts if part)


def _targets(found: results.Results, heading: str) -> list[str]:
    if not verdicts.judged(found):
        return []
    return [f"{heading}{verdicts.SAID}", tables.markdown(verdicts.table(found))]


def contestants(found: results.Results) -> str:
    """Say who was compared, and what is real of them."""
    return _bullets(f"{rows.heading(each)}: {rows.described(each)}." for each in found.contestants)


def page(found: results.Results) -> str:
    """Return the generated part of docs/benchmarks.md."""
    called = rows.headings(found)
    listed = figures.figures(found)
    parts = [_bullets_of(remarks.remarks(found))]
    if found.contestants:
        parts += ["### Contestants", contestants(found)]
    parts += _targets(found, f"### {verdicts.HEADING}\n\n")
    for group in Group:
        of_group = [figure for figure in listed if figure.group is group]
        if of_group:
            parts += [f"### {group}", sections.caption(group, found)]
            parts.append(tables.markdown(rows.table(of_group, called)))
    if found.packets:
        parts += [f"### {Group.PACKETS}, ns", sections.of_packets(found)]
        parts.append(tables.markdown(packet_rows.table(packet_rows.lines(found))))
    for ports in found.ports:
        said, table = packet_rows.ports(ports)
        parts += ["### Ports to masquerade with", said, tables.markdown(table)]
    if found.maglev:
        parts += ["### Maglev", maglev_rows.section(found)]
    if found.balancing:
        parts += [f"### {balancing_rows.HEADING}", balancing_rows.said(found)]
        parts.append(tables.markdown(balancing_rows.table(found.balancing)))
        parts.append(f"```text\n{balancing_rows.bars(found.balancing)}\n```")
    if any(not each.real for each in found.contestants):
        if alike := elsewhere.alike(found):
            parts += [f"### {elsewhere.HEADING_ALIKE}", alike.said, tables.markdown(alike.table)]
        parts += [f"### {elsewhere.HEADING}", elsewhere.SAID, tables.markdown(elsewhere.table())]
    parts += [f"### {Group.RATES}", tables.markdown(sections.rates(found))]
    if (maps := sections.maps(found)).rows:
        parts += ["### BPF maps", tables.markdown(maps)]
    parts += ["### Versions", _bullets(f"{name}: {value}" for name, value in found.software.items())]
    return "\n\n".join(part for part in parts if part)


def beside(found: results.Results) -> str:
    """Return the generated part of docs/comparison.md."""
    warnings = _bullets_of(each for each in remarks.remarks(found) if each.warning)
    parts = [tables.markdown(comparison.table(found)), comparison.of_packets(found), warnings]
    parts += [elsewhere.remark(found), f"{remarks.origin(found)}."]
    return "\n\n".join(part for part in parts if part)


def slow_backend(found: results.Results) -> str:
    """Return the generated part of docs/balancing.md; without such figures that of a run before stays."""
    parts = [balancing_rows.said(found), tables.markdown(balancing_rows.table(found.balancing))]
    return "\n\n".join([*parts, f"{remarks.origin(found)}."])


def _bullets_of(listed: collections.abc.Iterable[remarks.Remark]) -> str:
    return _bullets(f"**{each.text}**" if each.warning else each.text for each in listed)


def _bullets(lines: collections.abc.Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def insert(text: str, section: str) -> str:
    """Return a document with what is between the markers replaced, or added under a heading at its end.

    ValueError where only one of the markers is there.
    """
    if (BEGIN in text) != (END in text):
        raise ValueError(f"{BEGIN} and {END} must both be there, or neither")
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{_HEADING}\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def main() -> int:
    """Write all of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", type=pathlib.Path, metavar="FILE", help="what a run has written")
    flags = parser.parse_args()
    try:
        path = flags.file or results.newest()
        found = results.read(path)

        # A page of its own name, and one that a run does not need.
        from benchmarks import page as html  # noqa: PLC0415

        plot.draw(found, PLOT)
        HTML.write_text(html.render(found))
        README.write_text(insert(README.read_text(), summary_section(found)))
        PAGE.write_text(insert(PAGE.read_text(), page(found)))
        BESIDE.write_text(insert(BESIDE.read_text(), beside(found)))
        if found.balancing:
            BALANCING.write_text(insert(BALANCING.read_text(), slow_backend(found)))
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    drawn = f", docs/{PLOT.name}" if PLOT.exists() else "; there is nothing to draw"
    pages = ", ".join(f"docs/{each.name}" for each in (PAGE, HTML, BESIDE, BALANCING))
    print(f"{path} → {README.name}, {pages}{drawn}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
