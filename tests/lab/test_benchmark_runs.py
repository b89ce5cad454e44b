"""The benchmarks measure everybody in one run, and leave nothing behind, however they end."""

import collections
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

import pytest

from benchmarks import (
    arena,
    balancing,
    contestants,
    fields,
    kube_proxies,
    process,
    profiles,
    progress,
    results,
    rows,
    steps,
)
from lbproxy import cgroup2
from lbproxy.kernel import bpffs
from lbproxy.lab import cluster as lab_cluster
from lbproxy.lab import netns
from tests import polling

GLANCE = profiles.Profile(
    name="glance",
    services=(20,),
    short_rounds=1,
    short_s=0.05,
    other_rounds=1,
    other_s=0.05,
    everywhere=False,
    starts=0,
    changes=2,
    cpu_s=0.5,
    packet_rounds=1,
    packet_services=20,
    maglev_repeats=1,
    balancing_rounds=1,
    outside_rounds=1,
    outside_s=0.05,
)
NAMES = (contestants.Lbproxy.name, *kube_proxies.MODES)


def nothing_failed(step: progress.Step, error: Exception | None) -> None:
    if error is not None:
        raise AssertionError(step.label) from error


def test_everybody_is_measured_in_one_run() -> None:
    found = results.Results("glance", "", {}, {}, {})
    with contextlib.ExitStack() as stack:
        at = stack.enter_context(arena.Arena(NAMES, max(os.sched_getaffinity(0))))
        who: list[contestants.Contestant] = [
            stack.enter_context(contestants.Lbproxy(at)),
            *(
                stack.enter_context(kube_proxies.make(at, mode, None, "legacy"))
                for mode in kube_proxies.MODES
            ),
        ]
        progress.run(steps.of_cluster(GLANCE, fields.Field(at, who, found)), nothing_failed)
    kinds = collections.Counter((each.services, each.path, each.mode) for each in found.traffic)
    modes = ("short", "established", "udp-established", "udp-new", "bulk")
    assert set(kinds) == {
        (0, "pod", "short"),
        *((20, "pod", mode) for mode in modes),
        *((20, path, "short") for path in ("remote", "node", "outside")),
    }
    for traffic in found.traffic:
        for variant, run in traffic.rounds[0].runs.items():
            assert run.failed == 0, (traffic.path, traffic.mode, variant, run.failures)
            assert run.count > 0
            assert run.rate_per_s > 0
            assert 0 <= run.own_share <= 1
    assert {(each.contestant, each.services) for each in found.starts} == {(name, 20) for name in NAMES}
    assert {each.contestant: len(each.latency_ms) for each in found.programming if not each.churn_per_s} == (
        dict.fromkeys(NAMES, GLANCE.changes)
    )
    by_name = {each.contestant: each for each in found.memory}
    assert by_name["lbproxy"].rss > 0
    assert by_name["lbproxy"].maps
    assert all(by_name[mode].rss == 0 for mode in kube_proxies.MODES)
    assert {each.contestant for each in found.cpu} == {"lbproxy"}
    assert rows.failures(found) == 0


def test_algorithms_are_measured_with_one_slow_backend() -> None:
    found = balancing.measure(1, max(os.sched_getaffinity(0)), seconds=1.0)
    assert [each.algorithm for each in found] == list(balancing.ALGORITHMS)
    for each in found:
        assert each.failed == 0
        (p50, p95, p99), (share,) = (each.p50_us + each.p95_us + each.p99_us), each.slow_share
        assert 0 < p50 <= p95 <= p99
        assert 0 <= share < 0.5
    # One in eight against one in seventy-one.
    shares = {each.algorithm: each.slow_share[0] for each in found}
    assert shares["random, weights"] < shares["random"]
    assert left_by(os.getpid()) == []


@pytest.fixture
def running(tmp_path: pathlib.Path) -> collections.abc.Iterator[subprocess.Popen[str]]:
    """A run whose agent has just been started."""
    argv = [sys.executable, "-m", "benchmarks.run", "smoke", "--only", "cluster"]
    argv += ["--out", str(tmp_path / "run.json")]
    log = tmp_path / "log"
    with log.open("w") as stderr:
        popen = subprocess.Popen(argv, text=True, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        polling.eventually(lambda: pins_of(popen.pid) or popen.poll() is not None)
        assert popen.poll() is None, log.read_text()
        yield popen
    finally:
        popen.kill()
        popen.wait()
        arena.sweep()


def pins_of(pid: int) -> list[pathlib.Path]:
    return list(pathlib.Path(tempfile.gettempdir()).glob(f"lbproxy-bench-{pid}-*pins"))


def left_by(pid: int) -> list[str]:
    mount = cgroup2.mount_point()
    assert mount is not None
    roots = [mount, pathlib.Path(tempfile.gettempdir()), pathlib.Path("/sys/fs/cgroup/memory")]
    listed = [name for root in roots if root.is_dir() for name in os.listdir(root)]
    wanted = (f"{lab_cluster.PREFIX}-{pid}-", f"lbproxy-bench-{pid}-")
    return [name for name in (*listed, *netns.names()) if name.startswith(wanted)]


def test_an_interrupted_run_writes_what_it_has_and_leaves_nothing(
    running: subprocess.Popen[str], tmp_path: pathlib.Path
) -> None:
    assert left_by(running.pid)
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 1
    assert left_by(running.pid) == []
    assert "interrupted" in (tmp_path / "log").read_text()
    assert not (tmp_path / "run.json").exists()
    found = results.read(results.partial(tmp_path / "run.json"))
    assert not found.complete
    assert found.traffic


def test_what_is_only_named_alike_stays() -> None:
    path = pathlib.Path(tempfile.gettempdir()) / "lbproxy-bench-notes"
    path.touch()
    try:
        arena.sweep()
        assert path.exists()
    finally:
        path.unlink()


def test_children_that_an_agent_leaves_end_with_its_cgroup() -> None:
    cgroup = process.MemoryCgroup(f"{arena.own_prefix()}children")
    if cgroup.peak_bytes() is None:
        pytest.skip("no memory cgroups here")
    with subprocess.Popen(cgroup.command(["sleep", "60"])) as child:
        polling.eventually(lambda: cgroup_of(child.pid).endswith("children"))
        cgroup.remove()
        assert child.wait(polling.TIMEOUT_S) == -signal.SIGKILL
    assert not any(name.endswith("-children") for name in left_by(os.getpid()))


def cgroup_of(pid: int) -> str:
    lines = pathlib.Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next((line for line in lines if "lbproxy-bench-" in line), "")


def test_what_a_killed_run_leaves_the_next_one_removes(running: subprocess.Popen[str]) -> None:
    running.kill()
    running.wait()
    assert left_by(running.pid)
    mounted = [pins for pins in pins_of(running.pid) if bpffs.is_bpffs(pins)]
    arena.sweep()
    # Tests beside these may have begun to sweep its lab.
    polling.eventually(lambda: left_by(running.pid) == [], what="nothing left")
    assert not any(pins.exists() for pins in mounted)
