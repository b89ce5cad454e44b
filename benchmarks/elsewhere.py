"""What a real kube-proxy measured: for runs in which its rules were generated.

On another machine, as it was told of; and on one like that of the run, where the document of such a run is
kept: that shows whether generated rules cost packets what real ones do.
"""

import functools
import typing

from benchmarks import figures, results, tables
from benchmarks.figure import LBPROXY, Figure, Group

HEADING = "A real kube-proxy, measured elsewhere"
SAID = """\
kube-proxy 1.36 with a real API server, measured before this run, on another machine of 2 CPUs
(Linux 6.18, iptables 1.8.9 with the nf_tables backend, 4 endpoints per service): its own computing is
in these times, and about 5 ms of each change are the API server's. Only the order of magnitude
can be held against the figures above. Short connections are ÷ bare, through a ClusterIP; with the legacy
backend, 10,000 services give 0.40, and start in 3 s."""
_HEAD = (
    "services",
    "short connections: iptables",
    "nftables",
    "change, p50 / p99 ms: iptables",
    "nftables",
    "start, s: iptables",
    "nftables",
    "RSS, MB: iptables",
    "nftables",
)
_ROWS = (
    ("1", "0.81", "0.83", "24 / 104", "16 / 22", "0.7", "1.0", "59", "57"),
    ("1,000", "0.68", "0.86", "58 / 156", "136 / 176", "1.4", "0.75", "76", "74"),
    ("5,000", "0.59", "0.85", "326 / 805", "1,171 / 1,267", "63", "4.3", "138", "136"),
    ("10,000", "0.50", "0.86", "915 / 1,997", "4,540 / 4,778", "353", "16", "168", "218"),
)


def table() -> tables.Table:
    """Return those figures."""
    return tables.Table(_HEAD, [tables.plain(*row) for row in _ROWS])


HEADING_ALIKE = "Generated rules beside those of a real kube-proxy"
_ALIKE = """\
Short connections between pods of a node, rate ÷ bare: *generated* is this run, *real* one with {names} on a
machine of the same kind and kernel ({started}, `{file}`)."""
_REAL = results.DIRECTORY / "more" / "kube-proxy-1.30.1.json"
_ROOT = results.DIRECTORY.parents[1]


@functools.cache
def _real() -> results.Results | None:
    return results.read(_REAL) if _REAL.exists() else None


class Alike(typing.NamedTuple):
    """Generated rules beside real ones: the words, the table, and by how much ratios differ at most."""

    said: str
    table: tables.Table
    most: float


def alike(found: results.Results, real: results.Results | None = None) -> Alike | None:
    """Return what each kind of rules leaves of the bare rate; None where the machines are not alike."""
    real = real or _real()
    if real is None or any(found.machine.get(what) != real.machine.get(what) for what in ("cpu", "kernel")):
        return None
    generated = {each.name for each in found.contestants if not each.real}
    names = {each.name: each.label for each in real.contestants if each.name in generated and each.real}
    ours, theirs = _short(found), _short(real)
    both = [key for key in ours if key in theirs and key[0] in names]
    if not both:
        return None
    head = ("services", "what", *(f"{name}, {kind}" for name in names for kind in ("generated", "real")))
    rows = []
    for services, what in dict.fromkeys(key[1:] for key in both):
        pairs = [of.get((name, services, what)) for name in names for of in (ours, theirs)]
        cells = (tables.Cell(one.text, more=one.spread) if one else tables.Cell("–") for one in pairs)
        rows.append((tables.count(services), tables.Cell(what), *cells))
    said = _ALIKE.format(
        names=" and ".join(names.values()), started=real.started[:10], file=_REAL.relative_to(_ROOT)
    )
    return Alike(
        said, tables.Table(head, rows), max(abs(ours[key].value - theirs[key].value) for key in both)
    )


def remark(found: results.Results) -> str:
    """Say in a sentence how far generated rules can stand for real ones; nothing where that is not known."""
    known = alike(found)
    if known is None:
        return ""
    return (
        "Generated rules cost short connections what those of a real kube-proxy do: on a machine of the same "
        f"kind the ratios differ by {known.most:.3f} at most (docs/benchmarks.md)."
    )


def _short(found: results.Results) -> dict[tuple[str, int, str], Figure]:
    return {
        (one.column, one.services, one.what): one
        for one in figures.figures(found)
        if one.group is Group.SHORT and one.column != LBPROXY
    }
