"""What has to be known of a run before its figures are believed. Pure."""

import textwrap
import typing

from benchmarks import figures, ratios, results, rows, stats
from benchmarks.figure import LBPROXY

_NOISY = 0.05
TOO_BUSY = 0.1  # others' share of the CPUs, beyond which times of single packets mean little
_OWN_CPU = 0.8  # of the time of a run, below which others computed on the CPU of client and server as well
_OWN_CODE = (
    0.25  # share of the CPU time in client and server themselves, beyond which they slow what they measure
)


class Remark(typing.NamedTuple):
    """A sentence; a warning makes the figures worth less."""

    text: str
    warning: bool = False


def origin(found: results.Results) -> str:
    """Say when a run was made, and of what."""
    versions = found.software
    dirty = {"true": ", with uncommitted changes", "false": ""}.get(versions.get("dirty", ""), "")
    commit = f"commit {versions.get('commit', 'unknown')[:10]}{dirty}"
    return f"{found.started[:16].replace('T', ' ')} UTC, {commit}, profile {found.profile}"


def remarks(found: results.Results) -> list[Remark]:
    """Say where and when a run was made, and everything that makes its figures worth less."""
    about, versions = found.machine, found.software
    listed = [
        Remark(f"{origin(found)}, {found.took_s:.0f} s."),
        Remark(
            f"{about.get('cpu', '?')}, {about.get('cpus', '?')} CPUs, {about.get('memory', '?')}, "
            f"virtual: {about.get('virtual', '?')}; Linux {about.get('kernel', '?')}, "
            f"Python {versions.get('python', '?')}."
        ),
    ]
    if not found.complete:
        listed.append(Remark("This run did not finish: figures are missing.", True))
    listed += [
        Remark(f"Failed, so that figures are missing: {each.step}: {textwrap.shorten(each.text, 200)}", True)
        for each in found.failed
    ]
    if found.profile == results.MEANS_NOTHING:
        listed.append(Remark("A smoke run: the figures mean nothing.", True))
    generated = [each.name for each in found.contestants if not each.real]
    if generated:
        listed.append(
            Remark(
                f"No kube-proxy ran: its {' and '.join(generated)} rules were generated and loaded. What "
                "kube-proxy itself would compute is missing from their latencies, starts and CPU time; a "
                "real one can take less time for a change as well as more.",
                True,
            )
        )
    return [*listed, *_noise(found), *_generator(found), *_failures(found)]


def _noise(found: results.Results) -> list[Remark]:
    listed = []
    if found.noise is not None:
        listed.append(
            Remark(
                f"Load before {found.noise.load_before:.2f}; the hypervisor took "
                f"{found.noise.steal_share:.1%} of the CPU time."
            )
        )
    spread = worst_control(found)
    if spread is not None:
        said = f"between quartiles, the ratio of two runs of the same thing differs by up to {spread:.2f}"
        if spread > _NOISY:
            listed.append(Remark(f"A noisy machine: {said}.", True))
        else:
            listed.append(Remark(f"A quiet machine: {said}."))
    had = cpu_share(found)
    if had is not None:
        said = (
            f"client and server had at least {had:.0%} of their CPU (median of bare runs in a node, by kind "
            "of traffic)"
        )
        if had < _OWN_CPU:
            listed.append(Remark(f"Others computed meanwhile: {said}.", True))
        else:
            listed.append(Remark(f"{said[0].upper()}{said[1:]}."))
    busy = max(found.others_during_packets, default=0.0)
    if busy > TOO_BUSY:
        said = f"other processes had up to {busy:.0%} of the CPUs while those were timed"
        listed.append(Remark(f"Too busy for single packets: {said}.", True))
    return listed


def worst_control(found: results.Results) -> float | None:
    """Return the greatest distance between the quartiles of bare ÷ bare; None without traffic."""
    listed = (ratios.ratios(each.rounds, "bare/again") for each in found.traffic)
    return max((stats.summary(each).spread for each in listed if each), default=None)


def cpu_share(found: results.Results) -> float | None:
    """Return the share of a CPU that client and server had between them, the least of bare in a node."""
    listed = (
        [run.rate_per_s * run.cpu_us / 1e6 for run in _answered(of)]
        for of in found.traffic
        # Of a stream the rate is of bytes, and the CPU time that of all of it.
        if of.path == "pod" and of.mode != "bulk"
    )
    return min((stats.summary(each).median for each in listed if each), default=None)


def own_share(found: results.Results) -> float | None:
    """Return the share of CPU time that client and server spent in their own code, the greatest of bare."""
    listed = ([run.own_share for run in _answered(each)] for each in found.traffic)
    return max((stats.summary(each).median for each in listed if each), default=None)


def _answered(traffic: results.Traffic) -> list[results.Run]:
    return [run for run in figures.runs(traffic, "bare") if run.count]


def _generator(found: results.Results) -> list[Remark]:
    share = own_share(found)
    if share is None:
        return []
    said = (
        "client and server spend their CPU time in the kernel, which is what is measured: in their own code "
        f"at most {share:.0%} of it (median of bare runs, by kind of traffic)"
    )
    if share > _OWN_CODE:
        return [Remark(f"The load generator slows what it measures: {said}.", True)]
    return [Remark(f"The load generator is not the bottleneck: {said}.")]


def _failures(found: results.Results) -> list[Remark]:
    by = rows.failed_by(found)
    called = rows.headings(found)
    ours = rows.failures(found)
    listed = [Remark(f"{ours} failures.", True) if ours else Remark(_nothing_failed(found))]
    others = {name: number for name, number in by.items() if name not in (LBPROXY, "bare")}
    if others:
        said = ", ".join(f"{number} of {called.get(name, name)}" for name, number in others.items())
        listed.append(Remark(f"Failed of others (connections, and changes never seen): {said}."))
    return listed


def _nothing_failed(found: results.Results) -> str:
    """Say that nothing failed: of what was really measured, and what was not."""
    there = {name: rows.measured(found, name) for name in (LBPROXY, "bare")}
    seen = any(each.contestant == LBPROXY and each.latency_ms for each in found.programming)
    if all(there.values()) and seen:
        return "Of lbproxy and of bare, no connection failed and no change went unseen."
    said = [f"Of {name}, no connection failed." for name, measured in there.items() if measured]
    if seen:
        said.append("No change went unseen.")
    missing = [f"connections of {name}" for name, measured in there.items() if not measured]
    if not seen:
        missing.append("changes of lbproxy's services")
    return " ".join([*said, f"Not measured, so that none could fail: {', '.join(missing)}."])
