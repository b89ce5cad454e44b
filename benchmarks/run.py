"""Measure lbproxy beside kube-proxy and no proxy at all: connections, latency, start, memory, CPU, packets.

Builds nodes of network namespaces, one with nothing in it and one for each
contestant, with a stand-in for the API server; runs the real agent, sends real
traffic in interleaved rounds, and takes everything down again, also when
interrupted. Nothing outside those namespaces and cgroups of its own is touched.
Needs root, and a machine that does nothing else meanwhile: whether two runs of the
same thing agree is measured too, and reported.

kube-proxy is the program that --kube-proxy names. Without it, a generator writes
the rules that kube-proxy would, and they are loaded: that shows what they cost
packets, and everything made of it says that no kube-proxy ran.

Writes one JSON document with every sample; `python -m benchmarks.report` makes the
tables in README.md and docs/benchmarks.md from it. Until the last step what there is
is in FILE.partial, written after every step. Where a step fails the others go on, without the contestant
whose it was until the next number of services. Exits with 1 where a step failed, or
connections that should not have, and when interrupted.
"""

import argparse
import collections.abc
import contextlib
import dataclasses
import datetime
import fcntl
import os
import pathlib
import signal
import sys
import tempfile
import time
import types
import typing

from benchmarks import (
    arena,
    balancing,
    cluster,
    contestants,
    fields,
    kube_proxies,
    machine,
    maglev,
    process,
    profiles,
    progress,
    report,
    results,
    rows,
    steps,
)

_BUSY_LOAD = 0.5
_PARTS = ("packets", "maglev", "balancing", "cluster")
CONTESTANTS = (contestants.Lbproxy.name, *kube_proxies.MODES)


def main() -> int:
    """Run, and return the exit status."""
    chosen = flags()
    try:
        with _alone():
            return _run(chosen)
    except BlockingIOError:
        print(
            "benchmarks: another run is under way on this machine: they would disturb each other",
            file=sys.stderr,
        )
        return 1


@contextlib.contextmanager
def _alone() -> collections.abc.Iterator[None]:
    """Keep others from running meanwhile; BlockingIOError where one does."""
    with open(pathlib.Path(tempfile.gettempdir()) / "lbproxy-bench.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _run(chosen: argparse.Namespace) -> int:
    profile = profiles.PROFILES[chosen.profile]
    if chosen.services:
        profile = dataclasses.replace(profile, services=chosen.services)
    parts = (chosen.only,) if chosen.only else _PARTS
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, _interrupt)
    load_before = os.getloadavg()[0]
    if load_before > _BUSY_LOAD:
        print(
            f"warning: this machine is busy (load {load_before:.1f}): figures will scatter", file=sys.stderr
        )
    cpu = max(os.sched_getaffinity(0))
    found = results.Results(
        profile=profile.name,
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=machine.machine(),
        software=machine.software(),
        settings={
            "arguments": " ".join(sys.argv[1:]),
            "cpu_of_clients_and_servers": cpu,
            "endpoints_per_service": cluster.ENDPOINTS,
            "packet_services": profile.packet_services,
        },
    )
    steal_s, total_s = process.steal_and_total_s()
    began_s = time.monotonic()
    path: pathlib.Path = chosen.out
    partial = results.partial(path)

    def keep() -> None:
        found.took_s = round(time.monotonic() - began_s, 1)
        after = process.steal_and_total_s()
        found.noise = results.Noise(load_before, (after[0] - steal_s) / max(1e-9, after[1] - total_s))
        results.write(found, path if found.complete else partial)

    def after_each(step: progress.Step, error: Exception | None) -> None:
        if error is not None:
            found.failed.append(results.Failed(step.label, str(error)))
        keep()  # nothing that comes can take it away

    try:
        with contextlib.ExitStack() as stack:
            of_packets = stack.enter_context(contextlib.ExitStack())
            listed = steps.of_packets(profile, cpu, found, of_packets) if "packets" in parts else []
            listed += _by_themselves(profile, parts, cpu, found)
            if "cluster" in parts:
                field = _field(stack, chosen, cpu, found)
                listed += steps.of_cluster(profile, field)
            progress.run(listed, after_each)
        found.complete = True
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    except progress.FAILURES as error:
        print(f"benchmarks: {error}", file=sys.stderr)
    if found.complete:
        keep()
        partial.unlink(missing_ok=True)
    print(report.page(found))
    if found.complete:
        print(f"written to {path}", file=sys.stderr)
    elif partial.exists():
        print(f"what there is of this run is in {partial}", file=sys.stderr)
    return 0 if found.complete and not found.failed and not rows.failures(found) else 1


def _by_themselves(
    profile: profiles.Profile, parts: collections.abc.Container[str], cpu: int, found: results.Results
) -> list[progress.Step]:
    listed = maglev.steps(profile.maglev_repeats, found) if "maglev" in parts else []
    if "balancing" in parts:
        listed += balancing.steps(profile.balancing_rounds, cpu, found)
    return listed


def _field(
    stack: contextlib.ExitStack, chosen: argparse.Namespace, cpu: int, found: results.Results
) -> fields.Field:
    names: list[str] = chosen.contestants
    at = stack.enter_context(arena.Arena(names, cpu))
    who: list[contestants.Contestant] = []
    for name in names:
        if name == contestants.Lbproxy.name:
            who.append(contestants.Lbproxy(at))
        else:
            who.append(kube_proxies.make(at, name, chosen.kube_proxy, chosen.iptables))
        stack.enter_context(who[-1])
    found.contestants = [each.about() for each in who]
    return fields.Field(at, who, found)


def flags() -> argparse.Namespace:
    """Read the command line; ends with status 2 where it can not be followed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "profile",
        nargs="?",
        default="quick",
        choices=profiles.PROFILES,
        help=f"quick: 1, 1,000 and 10,000 services, {profiles.QUICK.takes} (the default); full: also 100, "
        f"5,000 and 30,000, more rounds, all traffic at all sizes, {profiles.FULL.takes}; smoke: shows that "
        f"all of it works, {profiles.SMOKE.takes}",
    )
    parser.add_argument(
        "--only",
        choices=_PARTS,
        help="packets: single ones, through the programs; maglev: lookup tables; "
        "balancing: algorithms with one slow backend; cluster: all the rest",
    )
    parser.add_argument(
        "--services",
        type=_sizes,
        metavar="NUMBERS",
        help="how many services there are, one size after the other, e.g. 1,30000 (default: the profile's)",
    )
    parser.add_argument(
        "--contestants",
        type=_contestants,
        default=list(CONTESTANTS),
        metavar="NAMES",
        help=f"who is measured, of {', '.join(CONTESTANTS)}; bare always is (default: all)",
    )
    parser.add_argument(
        "--kube-proxy",
        type=pathlib.Path,
        metavar="PATH",
        help="a real kube-proxy; else its rules are generated",
    )
    parser.add_argument(
        "--iptables",
        choices=("legacy", "nft"),
        default="legacy",
        help="the backend of iptables (default: legacy, which loads 10,000 services in seconds)",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="FILE", help="default: benchmarks/results/PROFILE.json"
    )
    chosen = parser.parse_args()
    chosen.out = chosen.out or results.DIRECTORY / f"{chosen.profile}.json"
    try:
        results.check_writable(chosen.out)
    except (OSError, ValueError) as error:
        parser.error(f"--out: {error}")
    return chosen


def _sizes(text: str) -> tuple[int, ...]:
    try:
        chosen = tuple(sorted({int(number) for number in text.split(",")}))
    except ValueError:
        chosen = (0,)
    if not 1 <= chosen[0] <= chosen[-1] <= cluster.MAX_FILLERS:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers from 1 to {cluster.MAX_FILLERS:,} are wanted")
    return chosen


def _contestants(text: str) -> list[str]:
    chosen = text.split(",")
    unknown = [name for name in chosen if name not in CONTESTANTS]
    if unknown or len(set(chosen)) != len(chosen):
        raise argparse.ArgumentTypeError(f"{text!r}: a list of {', '.join(CONTESTANTS)} is wanted")
    return chosen


def _interrupt(_number: int, _frame: types.FrameType | None) -> typing.NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
