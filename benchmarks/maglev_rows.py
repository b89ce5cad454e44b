"""The figures of Maglev tables, also beside those of the paper. Pure."""

import collections.abc
import statistics

from benchmarks import maglev, results, stats, tables

# Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016.
PAPER_BACKENDS, PAPER_SLOTS = 1_000, 65_537  # section 5.3, the smaller of its two tables
PAPER_BUILD_MS = 1.8  # 5.3
PAPER_KARGER, PAPER_RENDEZVOUS = 0.297, 0.495  # 5.3: what these have to be overprovisioned by
PAPER_SLOTS_PER_BACKEND, PAPER_DIFFERENCE = 100, 0.01  # 3.4: so many keep backends that close

_KEY = """\
Tables as the agent builds them (`lbproxy/core/maglev.py`), each repeat of another set of backends; the
size that lbproxy chooses is bold. *Build* is CPU time, the median with quartiles. *Most* and
*least*: slots of the most and the least loaded backend ÷ the mean, in the worst of the tables; *by
weight*, with weights of {weights} in turn, ÷ what the weight is due. The rest: so many leave at
once, and of the slots whose backend stays this share changes hands nevertheless, the median with
the worst in parentheses."""
_RESIZED = """\
lbproxy chooses a table's size by the number of backends, and tables of two sizes have little in
common. So there are four numbers of backends at which one more or less changes half of what stays,
or nearly all; flows are compared here by their hash. That is where new flows go: of open ones,
those with rows keep their backend, and those of DSR without rows follow the table before, for one
change."""
_PAPER = f"""\
Beside the paper (Eisenbud et al., NSDI 2016, section 5.3), which measured tables of
{PAPER_SLOTS:,} slots for {PAPER_BACKENDS:,} backends on a machine of its own. Tables are built in Python
here; the paper's time is no yardstick for this machine."""


def parts(found: results.Results) -> list[str | tables.Table]:
    """Return everything about Maglev tables: prose and tables by turns."""
    weights = f"{', '.join(map(str, maglev.WEIGHTS[:-1]))} and {maglev.WEIGHTS[-1]}"
    listed: list[str | tables.Table] = [_KEY.format(weights=weights), table(found.maglev)]
    if found.maglev_resized:
        listed += [_RESIZED, resized(found.maglev_resized)]
    return [*listed, _PAPER, beside_paper(found.maglev)]


def section(found: results.Results) -> str:
    """Render them as Markdown."""
    return "\n\n".join(each if isinstance(each, str) else tables.markdown(each) for each in parts(found))


def table(listed: collections.abc.Iterable[results.Maglev]) -> tables.Table:
    """Return a line for each size and number of backends."""
    leaving = (f"{percent}% leave" for percent in maglev.PERCENTS)
    head = ("backends", "slots", "build, ms", "most", "least", "by weight: most", "least", "one leaves")
    rows = []
    for each in listed:
        look = tables.Look.FIGURE if each.chosen else tables.Look.PLAIN
        build = stats.summary(each.build_ms)
        loads = (each.most, each.least, each.weighted_most, each.weighted_least)
        rows.append(
            (
                tables.count(each.backends),
                tables.Cell(f"{each.slots:,}", look),
                tables.Cell(f"{build.median:.2f}", more=f"{build.low:.2f} – {build.high:.2f}"),
                *tables.plain(*(f"{load:.3f}" for load in loads)),
                _moved(each, 1),
                *(
                    tables.Cell("") if count in (None, 1) else _moved(each, count)
                    for count in _counts(each.backends)
                ),
            )
        )
    return tables.Table((*head, *leaving), rows)


def resized(listed: collections.abc.Iterable[results.Resized]) -> tables.Table:
    """Return a line for each number of backends at which a table gets another size."""
    rows = []
    for each in listed:
        moved, worst = _percent(stats.summary(each.moved).median), _percent(max(each.moved))
        sizes = (
            f"{each.backends:,} → {each.backends - 1:,}",
            f"{each.slots:,} → {each.slots_after:,}",
        )
        rows.append((*tables.plain(*sizes), tables.Cell(moved, tables.Look.FIGURE, worst)))
    return tables.Table(("backends", "slots", "of the others' flows, changing hands"), rows)


def beside_paper(listed: collections.abc.Sequence[results.Maglev]) -> tables.Table:
    """Return the paper's figures beside what the same tables gave here."""
    rows = []
    roomy = [each for each in listed if each.slots > PAPER_SLOTS_PER_BACKEND * each.backends]
    if roomy:
        greatest = max(each.most - each.least for each in roomy)
        rows.append(
            tables.plain(
                "most − least loaded backend, ÷ the mean, with more than "
                f"{PAPER_SLOTS_PER_BACKEND} slots to a backend",
                f"at most {PAPER_DIFFERENCE:.0%} (section 3.4)",
                f"at most {_percent(greatest)}",
            )
        )
    for each in listed:
        if (each.backends, each.slots) == (PAPER_BACKENDS, PAPER_SLOTS):
            rows += _beside(each)
    return tables.Table(("what", "the paper", "here"), rows)


def _beside(each: results.Maglev) -> list[tuple[tables.Cell, ...]]:
    leaving = [count for count in _counts(each.backends) if count is not None]
    leave = ", ".join(f"{count / each.backends:.0%}" for count in leaving)
    changed = ", ".join(_percent(_changed(each, count)) for count in leaving)
    return [
        tables.plain(
            "most loaded backend above the mean",
            f'"almost perfect", no number; Karger\'s hashing {PAPER_KARGER:.1%}, '
            f"Rendezvous {PAPER_RENDEZVOUS:.1%}",
            f"{each.most - 1:.1%}",
        ),
        tables.plain("build", f"{PAPER_BUILD_MS} ms", f"{stats.summary(each.build_ms).median:.1f} ms"),
        tables.plain(
            f"slots that change when {leave} of the backends leave, "
            "those of the leaving included, on average",
            "a curve without numbers (figure 12)",
            changed,
        ),
    ]


def _changed(each: results.Maglev, count: int) -> float:
    """Return about what share of all slots changes, as the paper counts: the leaving backends' as well."""
    gone = count / each.backends
    return gone + (1 - gone) * statistics.fmean(each.moved[count])


def _counts(backends: int) -> list[int | None]:
    """Return how many of so many backends each percentage is; None where that is no whole number."""
    return [None if backends * percent % 100 else backends * percent // 100 for percent in maglev.PERCENTS]


def _moved(each: results.Maglev, count: int | None) -> tables.Cell:
    seen = each.moved.get(count or 0)
    if not seen:
        return tables.Cell("")
    return tables.Cell(_percent(stats.summary(seen).median), more=_percent(max(seen)))


def _percent(share: float) -> str:
    return f"{share:.2%}" if share < 0.1 else f"{share:.1%}"
