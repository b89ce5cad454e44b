"""What got better or worse between two runs.

A figure differs when the margins of its two medians do not overlap (as notches in a
box plot): less is noise. Traffic is compared by its ratio to bare within each run.
Rates, latencies and times are those of a machine: they are compared only where both
runs are of the same one.

What failed of lbproxy and of bare, connections and changes never seen, are figures
like any other: one more is worse.

Exit status 0: nothing of lbproxy is worse. 1: something is, or it cannot be known: the
second run did not finish, or lacks figures of lbproxy that the first has. 2: the files
are no runs, or not of one kind.

Examples:
  lbproxy bench compare before.json after.json
  lbproxy bench compare before.json after.json --all        also what has not changed
  lbproxy bench compare before.json after.json -o json

"""

import argparse
import collections.abc
import enum
import math
import pathlib
import sys

import msgspec

from benchmarks import figures, results, rows
from benchmarks.figure import CONTROL, LBPROXY, Figure, Group, with_unit
from lbproxy import errors
from lbproxy.commands import output, render

# Differences that never count, as shares of the greater value: what one more run of the same thing shows.
_FLOORS = {"": 0.01, "MB": 0.03, "ms": 0.05, "µs": 0.05, "ns": 0.05, "/s": 0.05, "MB/s": 0.05, "s": 0.05}
_UNKNOWN = 0.15  # of times and rates with too few samples to know their margin
_FEW = 3
_LEAST = {"%": 0.3, "ms": 0.2, "s": 0.05, "ns": 3.0, "MB": 0.5}  # and in the figure's own unit
_SAME = ("cpu", "cpus", "memory", "virtual", "kernel", "architecture")
_DRIFTED = 0.1
_NAMED = 3  # of missing figures

_Key = tuple[str, str, str, int, str]
_Figures = dict[_Key, Figure]


class Verdict(enum.StrEnum):
    """What has become of a figure."""

    WORSE = "worse"
    BETTER = "better"
    SAME = "same"
    GONE = "gone"
    NEW = "new"


class Change(msgspec.Struct, frozen=True):
    """One figure in both runs; what is not in one of them is None there."""

    verdict: Verdict
    about: str
    what: str
    services: int
    contestant: str
    decides: bool  # of lbproxy, or a failure of bare, and so of the exit status
    unit: str
    before: float | None
    after: float | None
    margin_before: float
    margin_after: float
    target: str = ""


class Comparison(msgspec.Struct, frozen=True):
    """All changes, and what makes them worth less."""

    warnings: list[str]
    changes: list[Change]
    objections: list[str]  # why the second run cannot be said to be as good

    @property
    def worse(self) -> list[Change]:
        """What decides: figures of lbproxy that are worse beyond the noise."""
        return [each for each in self.changes if each.decides and each.verdict is Verdict.WORSE]

    @property
    def passes(self) -> bool:
        """Whether nothing got worse, as far as everything was measured again."""
        return not self.worse and not self.objections


def compare(before: results.Results, after: results.Results) -> Comparison:
    """Compare two runs, figure by figure."""
    same_machine = not _differing(before, after)
    one, other = (_by_key(found, same_machine) for found in (before, after))
    drifts, others = _drifts(one, other), _changed(before, after)
    changes = [
        _change(one.get(key), other.get(key), drifts.get(key, 0.0), others)
        for key in dict.fromkeys((*one, *other))
    ]
    order = list(Verdict)
    said = warnings(before, after)
    drift = max((share for key, share in drifts.items() if key[2].endswith(", rate")), default=0.0)
    if drift > _DRIFTED:
        said.append(f"bare alone differs by up to {drift:.0%}: the machine was not as fast in both runs")
    changes.sort(key=lambda each: (not each.decides, order.index(each.verdict)))
    return Comparison(said, changes, _objections(after, changes))


def _objections(after: results.Results, changes: collections.abc.Iterable[Change]) -> list[str]:
    """Say why it cannot be known that nothing got worse."""
    said = [] if after.complete else ["the second run did not finish"]
    # Somebody who was not measured again is not missed, nor what was divided by theirs.
    there = {f"lbproxy ÷ {name}" for name in rows.headings(after)} | {LBPROXY}
    missing = [
        each for each in changes if each.decides and each.verdict is Verdict.GONE and each.contestant in there
    ]
    if missing:
        named = "; ".join(
            f"{each.what}{f', services: {each.services:,}' if each.services else ''}"
            for each in missing[:_NAMED]
        )
        more = f"; and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        said.append(f"{len(missing)} figures of lbproxy are only in the first run: {named}{more}")
    return said


def _by_key(found: results.Results, same_machine: bool) -> _Figures:
    listed = figures.figures(found) + figures.failures(found)
    if same_machine:
        listed += figures.absolutes(found)
    return {one.key: one for one in listed if same_machine or one.travels}


def _drifts(before: _Figures, after: _Figures) -> dict[_Key, float]:
    """Return by what share bare alone differs, for each rate and latency: so far the machine drifted."""
    found = {}
    for key in before.keys() & after.keys():
        group, topic, what, services, _ = key
        bare = (group, topic, figures.measure("", what.rpartition(", ")[2]), services, "bare")
        if group == Group.RATES and bare in before and bare in after:
            one, other = before[bare].value, after[bare].value
            greatest = max(one, other)
            # Where bare answered nothing, no speed of the machine can be told from it.
            found[key] = abs(one - other) / greatest if 0 < greatest < math.inf else 0.0
    return found


def _change(
    before: Figure | None, after: Figure | None, drift: float, others: collections.abc.Container[str]
) -> Change:
    known = after or before
    assert known is not None
    if before is None or after is None:
        verdict = Verdict.NEW if before is None else Verdict.GONE
    else:
        verdict = judge(before, after, drift)
    name = known.column
    if known.group is Group.VERSUS:
        ours = name not in others and name != CONTROL
    elif known.group is Group.FAILURES:
        # Bare fails where machine or harness do: then nothing can be believed.
        ours = name in (LBPROXY, "bare")
    else:
        # Before anything is programmed, there is nothing of lbproxy in it.
        ours = name == LBPROXY and known.group is not Group.ALIKE
    return Change(
        verdict=verdict,
        about=str(known.group),
        what=f"{known.topic}, {known.what}",
        services=known.services,
        contestant=f"lbproxy ÷ {name}" if known.group is Group.VERSUS and name != CONTROL else name,
        decides=ours,
        unit=known.unit,
        before=before.value if before else None,
        after=after.value if after else None,
        margin_before=before.margin if before else 0.0,
        margin_after=after.margin if after else 0.0,
        target=str(known.target or ""),
    )


def judge(before: Figure, after: Figure, drift: float = 0.0) -> Verdict:
    """Say whether a figure has become better or worse, or whether that may be noise.

    `drift` is the share by which the machine itself was faster or slower.
    """
    if before.value == after.value:
        return Verdict.SAME
    if math.inf not in (before.value, after.value) and (
        math.isinf(before.margin) != math.isinf(after.margin)
    ):
        # Some of its samples never came in one of the runs alone: that is no noise.
        return Verdict.WORSE if math.isinf(after.margin) else Verdict.BETTER
    if abs(after.value - before.value) <= noise(before, after, drift):
        return Verdict.SAME
    rose = after.value > before.value
    return Verdict.BETTER if rose == after.more_is_better else Verdict.WORSE


def noise(before: Figure, after: Figure, drift: float = 0.0) -> float:
    """Return the difference between two runs up to which a figure is the same; 0 for failures."""
    if after.unit == "failed":
        return 0.0
    greater = max(abs(before.value), abs(after.value))
    if greater == math.inf:
        # It came in one of the runs and never in the other.
        return 0.0
    share = _FLOORS.get(after.unit, _FLOORS[""])
    if min(before.count, after.count) < _FEW and after.unit not in ("MB", ""):
        share = max(share, _UNKNOWN)
    least = _LEAST.get(after.unit, 0.0)
    return max(before.margin + after.margin, share * greater, least) + drift * greater


def warnings(before: results.Results, after: results.Results) -> list[str]:
    """Say what makes a comparison worth less."""
    said = []
    differing = _differing(before, after)
    if differing:
        changed = (
            f"{name} {before.machine.get(name, '?')} → {after.machine.get(name, '?')}" for name in differing
        )
        said.append(
            f"NOT THE SAME MACHINE: {', '.join(changed)}. Only ratios, memory and failures are compared."
        )
    if before.profile != after.profile:
        said.append(f"profile {before.profile} → {after.profile}: they have not measured the same")
    for name, found in (("before", before), ("after", after)):
        if not found.complete:
            said.append(f"{name}: the run did not finish, figures are missing")
        if found.failed:
            said.append(f"{name}: {len(found.failed)} steps failed, figures are missing")
        if found.profile == results.MEANS_NOTHING:
            said.append(f"{name}: a smoke run, its figures mean nothing")
        if found.software.get("dirty") == "true":
            said.append(f"{name}: measured with uncommitted changes")
    said += [f"{name} is not the same: {change}" for name, change in _changed(before, after).items()]
    return said


def _changed(before: results.Results, after: results.Results) -> dict[str, str]:
    """Return the contestants that go by the same name and are not the same: lbproxy may have changed."""
    found = {}
    for name in sorted({each.name for each in (*before.contestants, *after.contestants)}):
        one, other = (_about(run, name) for run in (before, after))
        if one and other and one != other:
            found[name] = f"{one} → {other}"
    return found


def _about(found: results.Results, name: str) -> str:
    # A new version of lbproxy is what is compared.
    if name == LBPROXY:
        return ""
    return next((each.label for each in found.contestants if each.name == name), "")


def _differing(before: results.Results, after: results.Results) -> list[str]:
    return [name for name in _SAME if before.machine.get(name) != after.machine.get(name)]


_COUNTED = {
    Verdict.WORSE: "worse",
    Verdict.BETTER: "better",
    Verdict.SAME: "the same",
    Verdict.GONE: "only in the first",
    Verdict.NEW: "only in the second",
}
_COLOURS = {Verdict.WORSE: render.Color.BAD, Verdict.BETTER: render.Color.GOOD}


def shown(compared: Comparison, everything: bool) -> collections.abc.Iterator[render.Table | str]:
    """Return what to print: without `everything` only what of lbproxy is better or worse."""
    for warning in compared.warnings:
        yield f"warning: {warning}"
    decisive = [each for each in compared.changes if each.decides]
    differing = [each for each in decisive if each.verdict in (Verdict.WORSE, Verdict.BETTER)]
    listed = compared.changes if everything else differing
    if listed:
        yield render.Table(
            ("", "WHAT", "SERVICES", "WHO", "BEFORE", "AFTER", "CHANGE"),
            [_row(each) for each in listed],
        )
    counts = {verdict: sum(each.verdict is verdict for each in decisive) for verdict in Verdict}
    said = ", ".join(f"{number} {_COUNTED[verdict]}" for verdict, number in counts.items() if number)
    yield f"{len(decisive)} figures of lbproxy, and of what failed of bare: {said or 'none'}."
    for objection in compared.objections:
        yield f"it cannot be known that nothing is worse: {objection}."
    others = [
        each
        for each in compared.changes
        if not each.decides and each.verdict in (Verdict.WORSE, Verdict.BETTER)
    ]
    if others and not everything:
        yield f"{len(others)} figures of others or of bare differ too, which decides nothing: see --all."


def _row(each: Change) -> render.Row:
    return (
        render.Cell(each.verdict, _COLOURS.get(each.verdict)),
        each.what,
        f"{each.services:,}" if each.services else "",
        "control" if each.contestant == CONTROL else each.contestant,
        _value(each.before, each.margin_before, each.unit),
        _value(each.after, each.margin_after, each.unit),
        _difference(each),
    )


def _value(value: float | None, margin: float, unit: str) -> str:
    if value is None:
        return "–"
    said = with_unit(value, unit)
    return f"{said} ± {with_unit(margin, unit)}" if 0 < margin < math.inf else said


def _difference(each: Change) -> str:
    if each.before is None or each.after is None or not each.before:
        return ""
    if math.inf in (each.before, each.after):
        return ""
    change = each.after / each.before - 1
    return f"{change:+.1%}"


def main(arguments: collections.abc.Sequence[str] | None = None) -> int:
    """Compare two files, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="lbproxy bench compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=pathlib.Path, metavar="A.json", help="the earlier run")
    parser.add_argument("after", type=pathlib.Path, metavar="B.json", help="the later run")
    parser.add_argument(
        "--all", action="store_true", help="also what is the same or in one run only, and figures of others"
    )
    parser.add_argument(
        "-o", "--output", choices=("table", "json", "yaml"), default="table", help="how to show it"
    )
    flags = parser.parse_args(arguments)
    try:
        compared = compare(results.read(flags.before), results.read(flags.after))
    except OSError as error:
        print(f"lbproxy: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"lbproxy: error: {error}", file=sys.stderr)
        return 2
    try:
        render.show(compared, flags.output, lambda: shown(compared, flags.all))
        output.flush()
    except BrokenPipeError:
        # Whoever reads has had enough; what was found stays what it is.
        output.discard()
    except errors.LbproxyError as error:
        print(f"lbproxy: error: {error}", file=sys.stderr)
        return 2
    return 0 if compared.passes else 1


if __name__ == "__main__":
    sys.exit(main())
