"""The figures of algorithms with one slow backend. Pure."""

import collections.abc

from benchmarks import results, stats, tables

HEADING = "One slow backend"
_KEY = """\
{clients} clients in a closed loop through a ClusterIP: connect, ask, be answered, close, pause for
{pause_ms:g} ms. One of {backends} backends answers only after {slow_ms:g} ms, the others at once.
*Random* and *maglev* send it as much as any other; *weights* is random for somebody who knows which one it is
and has given it a tenth; *least-connections* knows nothing and counts. Clients and servers on one
CPU, interleaved rounds, medians with quartiles; *to the slow one* is its share of all answers."""
_WIDTH = 40


def said(found: results.Results) -> str:
    """Say what the figures are."""
    one = found.balancing[0]
    return _KEY.format(clients=one.clients, pause_ms=one.pause_ms, backends=one.backends, slow_ms=one.slow_ms)


def table(listed: collections.abc.Sequence[results.Balancing]) -> tables.Table:
    """Return a line for each algorithm."""
    head = ("algorithm", "to the slow one", "p50, ms", "p95, ms", "p99, ms", "answers a second", "failed")
    return tables.Table(head, [_row(each) for each in listed])


def _row(each: results.Balancing) -> tuple[tables.Cell, ...]:
    share = stats.summary(each.slow_share)
    rate = stats.summary(each.rate_per_s)
    times = (each.p50_us, each.p95_us, each.p99_us)
    return (
        tables.Cell(each.algorithm),
        tables.Cell(f"{share.median:.1%}", tables.Look.FIGURE, f"{share.low:.1%} – {share.high:.1%}"),
        *(_time(samples) for samples in times),
        tables.Cell(f"{rate.median:,.0f}", more=f"{rate.low:,.0f} – {rate.high:,.0f}"),
        tables.Cell(str(each.failed)),
    )


def _time(samples_us: list[float]) -> tables.Cell:
    ms = stats.summary([each / 1e3 for each in samples_us])
    return tables.Cell(f"{ms.median:.2f}", tables.Look.FIGURE, f"{ms.low:.2f} – {ms.high:.2f}")


def bars(listed: collections.abc.Sequence[results.Balancing]) -> str:
    """Draw the p95 of each algorithm in letters, which Markdown and HTML show alike."""
    medians = [stats.summary(each.p95_us).median / 1e3 for each in listed]
    longest = max(medians)
    wide = max(len(each.algorithm) for each in listed)
    lines = [
        f"{each.algorithm:{wide}}  {'█' * max(1, round(_WIDTH * ms / longest))} {ms:.1f} ms"
        for each, ms in zip(listed, medians, strict=True)
    ]
    return "\n".join(["p95 of a connection:", *lines])
