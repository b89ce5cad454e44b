"""Tables for README.md and docs/benchmarks.md from one run's JSON, and from nothing else.

Run: python -m benchmarks.report [FILE]; without a file, the run that was started last.
"""

import argparse
import collections.abc
import pathlib
import sys

from benchmarks import machine, maglev_rows, packet_rows, ratios, results, rows, stats

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
README = machine.ROOT / "README.md"
PAGE = machine.ROOT / "docs/benchmarks.md"
PLOT = machine.ROOT / "docs/benchmarks.png"
_HEADING = "## Measured"
_NOISY = 0.05
TOO_BUSY = 0.1  # others' share of the CPUs, beyond which times of single packets mean little


def table(listed: collections.abc.Iterable[rows.Row]) -> str:
    """Render rows as Markdown."""
    lines = ["| what | services | target | measured | spread | |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row.what} | {row.services:,} | {row.target or ''} | **{row.measured}** "
        f"| {row.spread} | {row.verdict} |"
        for row in listed
    ]
    return "\n".join(lines)


def rates(found: results.Results) -> str:
    """Render the rates and latencies behind the ratios as Markdown."""
    lines = [
        "| traffic | services | variant | a second, median | quartiles | p50 µs | p99 µs | CPU µs | failed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for traffic in found.traffic:
        for variant in traffic.rounds[0].runs if traffic.rounds else ():
            runs = [each.runs[variant] for each in traffic.rounds]
            seen = stats.summary([run.rate_per_s for run in runs])
            p50 = stats.summary([run.p50_us for run in runs]).median
            p99 = stats.summary([run.p99_us for run in runs]).median
            cpu = stats.summary([run.cpu_us for run in runs]).median
            failed = sum(run.failed for run in runs)
            lines.append(
                f"| {traffic.mode} | {traffic.services:,} | {variant} | {seen.median:,.0f} | "
                f"{seen.low:,.0f} – {seen.high:,.0f} | {p50:.1f} | {p99:.1f} | {cpu:.1f} | {failed} |"
            )
    return "\n".join(lines)


def remarks(found: results.Results) -> list[str]:
    """Say where and when, and everything that makes the figures worth less."""
    about, versions = found.machine, found.software
    dirty = {"true": ", with uncommitted changes", "false": ""}.get(versions["dirty"], "")
    lines = [
        f"{found.started[:16].replace('T', ' ')} UTC, commit {versions['commit'][:10]}{dirty}, "
        f"profile `{found.profile}`, {found.took_s:.0f} s.",
        f"{about['cpu']}, {about['cpus']} CPUs, {about['memory']}, virtual: {about['virtual']}; "
        f"Linux {about['kernel']}, Python {versions['python']}.",
    ]
    if not found.complete:
        lines.append("**This run did not finish: rows are missing.**")
    if found.profile == "smoke":
        lines.append("**A smoke run: the figures mean nothing.**")
    if found.noise is not None:
        lines.append(
            f"Load before {found.noise.load_before:.2f}; the hypervisor took {found.noise.steal_share:.1%} "
            "of the CPU time."
        )
    spreads = [
        stats.summary(ratios.ratios(each.rounds, "bare/again")).spread
        for each in found.traffic
        if each.rounds
    ]
    if spreads and max(spreads) > _NOISY:
        lines.append(
            "**A noisy machine: the ratio of two runs of the same thing differs by up to "
            f"{max(spreads):.2f} between quartiles.**"
        )
    if found.others_during_packets and max(found.others_during_packets) > TOO_BUSY:
        lines.append(
            "**Too busy for single packets: other processes had up to "
            f"{max(found.others_during_packets):.0%} of the CPUs while those were timed.**"
        )
    failed = rows.failures(found)
    lines.append(f"**{failed} failures.**" if failed else "No connection failed, no change went unseen.")
    return lines


_KEY = """\
Every round runs each variant once, in rotating order, client and server on one CPU. *Bare* is the
same client and server outside all hooks; ratios are of rates within a round, medians of rounds,
spread is from quartile to quartile; *give or take* is the median's 95 % margin, where the target
is within it. *By CPU time* is the same ratio of what client and server
compute for a request, which other work on the machine disturbs less. 4 endpoints per service."""
_PACKETS = """\
Of single packets, ns in the kernel by BPF_PROG_TEST_RUN, medians with quartiles. Each run restores
its packet first, and that is in every figure: *returns at once* is the floor. Tables have the
default sizes, 10,000 services and, but for new flows, 64k flows in them; *64k* sends a packet of
each in turn."""
_NOT_SHOWN = """\
Not shown: more than one machine, a NIC, other CNIs than plain routes and a bridge, a real API server
(a stand-in serves the objects over HTTP), kube-proxy beside it in the same run."""


def summary_section(found: results.Results) -> str:
    """Return the part of README.md that is between the markers."""
    listed = [row for row in rows.rows(found) if row.target is not None or _is_shown_without(row)]
    plot = ["![Rates ÷ bare against the number of services](docs/benchmarks.png)"] if PLOT.exists() else []
    more = "How, and every figure: [docs/benchmarks.md](docs/benchmarks.md)."
    of_packets = [_PACKETS, packet_rows.table(packet_rows.headlines(found))] if found.packets else []
    parts = [*plot, table(listed), _KEY, *of_packets, _NOT_SHOWN, _bullets(remarks(found)), more]
    return "\n\n".join(parts)


def _is_shown_without(row: rows.Row) -> bool:
    """Tell whether a figure without a target is shown: what others are to be compared with."""
    return row.what.startswith("short") and (row.what.endswith(rows.CONTROL) or "outside" in row.what)


def page(found: results.Results) -> str:
    """Return the generated part of docs/benchmarks.md."""
    bytes_of = [f"| {name} | {size / 1e6:.2f} |" for name, size in _maps(found)]
    return "\n\n".join(
        [
            _bullets(remarks(found)),
            table(rows.rows(found)),
            *(_of_packets(found) if found.packets else []),
            *(["### Maglev", maglev_rows.section(found)] if found.maglev else []),
            "### Rates",
            rates(found),
            "### BPF maps, MB",
            "\n".join(["| map | MB |", "|---|---|", *bytes_of]),
            "### Versions",
            _bullets(f"{name}: {version}" for name, version in found.software.items()),
        ]
    )


def _of_packets(found: results.Results) -> list[str]:
    return [
        "### Single packets, ns",
        _PACKETS,
        packet_rows.table(packet_rows.lines(found)),
        "### Ports to masquerade with",
        packet_rows.ports(found.ports),
    ]


def _maps(found: results.Results) -> list[tuple[str, int]]:
    greatest = max(found.memory, key=lambda each: each.services, default=None)
    return sorted(greatest.maps.items(), key=lambda item: -item[1]) if greatest else []


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
    """Write the tables into both documents."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("file", nargs="?", type=pathlib.Path, metavar="FILE")
    flags = parser.parse_args()
    try:
        path = flags.file or results.newest()
        found = results.read(path)
        from benchmarks import plot  # noqa: PLC0415 - matplotlib is loaded only where something is drawn

        plot.draw(found, PLOT)
        README.write_text(insert(README.read_text(), summary_section(found)))
        PAGE.write_text(insert(PAGE.read_text(), page(found)))
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(f"{path} → {README.name}, docs/{PAGE.name}, docs/{PLOT.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
