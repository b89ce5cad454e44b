"""What somebody asks who has to decide, and what a run answers: a question, some sentences, figures. Pure."""

import collections.abc
import dataclasses
import math

from benchmarks import figures, remarks, results, rows
from benchmarks.figure import CONTROL, LBPROXY, Figure, Group


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A question with what the run says to it."""

    question: str
    sentences: list[str]
    pictures: tuple[str, ...]  # names of panels (`plot`)
    groups: tuple[Group, ...]


def answers(found: results.Results) -> list[Answer]:
    """Return the questions of somebody who decides, with their answers."""
    listed = figures.figures(found)
    return [
        Answer(
            "What does a connection cost?",
            _cost(listed, found),
            ("rate", "latency"),
            (Group.SHORT, Group.VERSUS, Group.OTHERS, Group.PATHS, Group.OUTSIDE),
        ),
        Answer("How soon is a change live?", _change(listed, found), ("programming",), (Group.PROGRAMMING,)),
        Answer("What happens while it restarts?", _restart(listed), (), (Group.START, Group.FAILED)),
        Answer(
            "What does it take from my nodes?",
            _take(listed, found),
            ("memory",),
            (Group.MEMORY, Group.CPU),
        ),
    ]


def trust(found: results.Results) -> str:
    """Say in a sentence how far a run can be trusted."""
    warnings = [each for each in remarks.remarks(found) if each.warning]
    if not warnings:
        return "Nothing went wrong that would make its figures worth less; what it does not show is below."
    return f"With {len(warnings)} reservation{'s' if len(warnings) > 1 else ''}, at the top of this page."


def _pick(
    listed: collections.abc.Iterable[Figure], group: Group, what: str, column: str = LBPROXY
) -> list[Figure]:
    return [one for one in listed if (one.group, one.what, one.column) == (group, what, column)]


def _others(found: results.Results) -> dict[str, str]:
    return {name: said for name, said in rows.headings(found).items() if name != LBPROXY}


def _services(number: int) -> str:
    return f"{number:,} service{'' if number == 1 else 's'}"


def _cost(listed: list[Figure], found: results.Results) -> list[str]:
    ours = _pick(listed, Group.SHORT, figures.WAYS["service"])
    if not ours:
        return []
    said = []
    sizes = f"from {_services(ours[0].services)} to {ours[-1].services:,}"
    low, high = min(one.value for one in ours), max(one.value for one in ours)
    said.append(
        f"Through a ClusterIP to a pod of the same node, lbproxy reaches {low:.2f} to {high:.2f} of the rate "
        f"of short connections that there is without any proxy, {sizes}."
    )
    said += _other_ways(listed)
    for name, called in _others(found).items():
        theirs = _pick(listed, Group.SHORT, figures.WAYS["service"], name)
        if theirs:
            first, last = theirs[0], theirs[-1]
            said.append(
                f"{called}: {first.value:.2f} with {_services(first.services)}, "
                f"{last.value:.2f} with {last.services:,}."
            )
    times: dict[int, list[str]] = {}
    for one in listed:
        # The control's is the limit's ratio, and none of lbproxy's.
        if (one.group, one.what) == (Group.VERSUS, figures.WAYS["masqueraded"]) and one.column != CONTROL:
            called = rows.headings(found).get(one.column, one.column)
            times.setdefault(one.services, []).append(f"{one.value:.2f} times those of {called}")
    for services, parts in times.items():
        if services not in (min(times), max(times)):
            continue
        said.append(f"Connections a second to a NodePort, with {_services(services)}: {', '.join(parts)}.")
    return said


def _other_ways(listed: list[Figure]) -> collections.abc.Iterator[str]:
    by_way: dict[str, list[float]] = {}
    for one in _pick(listed, Group.PATHS, figures.WAYS["service"]):
        by_way.setdefault(one.topic.rpartition(", ")[2], []).append(one.value)
    for way, values in by_way.items():
        low, high = (f"{bound(values):.2f}" for bound in (min, max))
        reached = low if low == high else f"{low} to {high}"
        yield f"From a {way.replace(' → ', ' to a ')} it reaches {reached}."


def _change(listed: list[Figure], found: results.Results) -> list[str]:
    said = []
    for name, called in rows.headings(found).items():
        p50 = _pick(listed, Group.PROGRAMMING, "quiet, p50", name)
        p99 = _pick(listed, Group.PROGRAMMING, "quiet, p99", name)
        if p50 and p99:
            said.append(
                f"{called}: with {_services(p50[-1].services)} half of the changes are followed "
                f"{_within(p50[-1])}, 99 of 100 {_within(p99[-1])}"
                f"{f' ({p50[-1].warning})' if p50[-1].warning else ''}."
            )
    return said


def _within(one: Figure) -> str:
    return one.text if math.isinf(one.value) else f"within {one.text}"


def _restart(listed: list[Figure]) -> list[str]:
    said = []
    for how in ("adopted", "upgraded"):
        word = figures.STARTS[how]
        failed = _pick(listed, Group.FAILED, figures.during(how))
        times = [one for one in _pick(listed, Group.START, figures.SERVING) if one.topic == word]
        if failed and times:
            said.append(
                f"{word.capitalize()}: {failed[-1].text} connections failed {failed[-1].note} with "
                f"{_services(failed[-1].services)}; the datapath serves meanwhile, and what has changed "
                f"since is live after {times[-1].text}."
            )
    return said


def _take(listed: list[Figure], found: results.Results) -> list[str]:
    said = []
    agent, kernel = (_pick(listed, Group.MEMORY, what) for what in (figures.RESIDENT, figures.KERNEL_MEMORY))
    if agent and kernel:
        said.append(
            f"With {_services(agent[-1].services)}, lbproxy's agent takes {agent[-1].text} and its maps "
            f"in the kernel {kernel[-1].text}."
        )
    for name, called in _others(found).items():
        theirs = _pick(listed, Group.MEMORY, figures.RESIDENT, name)
        rules = _pick(listed, Group.MEMORY, figures.KERNEL_MEMORY, name)
        parts = [f"agent {theirs[-1].text}"] if theirs else []
        parts += [f"rules in the kernel {rules[-1].text}"] if rules else []
        if parts:
            said.append(f"{called}: {', '.join(parts)}.")
    cpu = [one for one in listed if one.group is Group.CPU and one.column == LBPROXY]
    if cpu:
        said.append(f"CPU of one core: {', '.join(f'{one.text} {one.what}' for one in cpu)}.")
    return said
