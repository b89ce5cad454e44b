"""Nothing is lost, however long and whatever happens: in short here, at full length with `make marathon`.

Figures are printed (`pytest -s`).
"""

import collections.abc
import contextlib
import datetime
import os
import pathlib
import re
import subprocess
import sys
import time
import typing

import pytest

from lbproxy import cgroup2
from lbproxy.kernel import namespaces
from lbproxy.lab import cluster
from tests import polling
from tests.lab import agents, checking, manifests, test_life

LONG = bool(os.environ.get("LBPROXY_MARATHON"))
# Of each kind: ended by SIGKILL, and by an upgrade.
LIVES = int(os.environ.get("LBPROXY_LIVES", "100" if LONG else "2"))
OUTAGE_S = 600.0 if LONG else 1.0
SERVICES, ENDPOINTS = (30_000, 10) if LONG else (150, 10)
CHANGES_PER_S, CHURN_S = (1000, 60.0) if LONG else (200, 2.0)
WEB, NODE_PORT = 1, 30080
PODS = ("n1/p2", "n2/p1")
# Enough for all, so that starts differ in nothing but what they are to.
LONG_START_S = 300.0
ALTERNATING = ("affinity=1024", "affinity=2048")
OBJECTS_AT_ONCE = 500


@pytest.fixture(scope="module", autouse=True)
def servers(lab: cluster.Lab) -> None:
    for pod in PODS:
        lab.serve(pod)


def web(lab: cluster.Lab, *pods: str) -> list[manifests.Object]:
    ports = [manifests.HTTP.on_node_port(NODE_PORT), manifests.DNS]
    return [
        manifests.service("web", WEB, ports=ports),
        *manifests.slices("web", [lab[pod] for pod in pods or PODS]),
    ]


def node(lab: cluster.Lab) -> manifests.Object:
    return manifests.node("n1", *lab["n1"].addresses)


@contextlib.contextmanager
def storms(lab: cluster.Lab) -> collections.abc.Iterator[None]:
    """New connections of every kind, through ClusterIPs and a NodePort, and some that last; none may fail."""
    places = [("outside", lab["n1"].address(family), NODE_PORT) for family in (4, 6)]
    places.append(("n1/p1", manifests.cluster_ip(WEB), 80))
    lasting = [
        lab.client(where, "established", address, port, connections=25, interval_s=0.02, timeout_s=5)
        for where, address, port in places
    ]
    fresh = [
        lab.client(where, "short", address, port, pause_s=0.002, timeout_s=5)
        for where, address, port in places
    ]
    with agents.storm(lab, WEB):
        yield
        results = [client.stop() for client in (*lasting, *fresh)]
    assert [result.failures for result in results] == [{}] * len(results)
    assert [result.open for result in results[: len(lasting)]] == [25] * len(lasting)
    print(f"connections made={sum(result.count for result in results[len(lasting) :])} failed=0")


def wait_ready(agent: agents.Agent, timeout_s: float = LONG_START_S) -> None:
    polling.eventually(lambda: " ready: " in agent.log or not agent.running, timeout_s, "readiness")
    assert " ready: " in agent.log, agent.log


# --- one life after another ---


def test_lives_that_end_at_once_and_upgrades_are_not_noticed(lab: cluster.Lab) -> None:
    with (
        agents.Api(lab.netns("n1"), node(lab), *web(lab)) as api,
        agents.Agent(lab, api.source, *agents.SMALL_MAPS, "--map-rows", ALTERNATING[0]) as agent,
    ):
        base = agent.flags
        agent.has_backends("web", set(PODS))
        with storms(lab):
            for number in range(LIVES):
                agent.kill()
                agent.start(wait=False)
                wait_ready(agent)
                assert "datapath adopted" in agent.log
                # Killed before it has ended starting, every other time.
                agent.kill()
                agent.flags = [*base, "--map-rows", ALTERNATING[(number + 1) % 2]]
                if number % 2:
                    agent.start(wait=False)
                    polling.eventually(lambda: "API server" in agent.log)
                    agent.kill()
                agent.start(wait=False)
                wait_ready(agent)
                agent.serves_on("web")
        agent.reopen()
        assert checking.differences(agent, node(lab), *web(lab)) == []
        assert agent.counter("bad_slot") == 0
        assert len(list((agent.root / "generations").iterdir())) == 1


def test_a_surge_waits_for_the_one_before_it(lab: cluster.Lab) -> None:
    """A rolling update may start the new agent before the old one is told to end."""
    with (
        agents.Api(lab.netns("n1"), node(lab), *web(lab)) as api,
        agents.Agent(lab, api.source, *agents.SMALL_MAPS, "--map-rows", ALTERNATING[0]) as agent,
        storms(lab),
    ):
        old, agent.flags = (
            agent.process,
            [*agent.flags, "--map-rows", ALTERNATING[1], "--healthz-bind-address="],
        )
        assert old is not None
        for _ in range(2):
            # It ends, and is started again by whoever started it, as often as need be.
            refused = subprocess.run(
                lab.command("n1", agent.command(), cgroup=False),
                capture_output=True, text=True, check=False, timeout=60,
            )  # fmt: skip
            assert (refused.returncode, "another lbproxy agent" in refused.stderr) == (1, True)
            agent.serves_on("web")
        agent.stop()
        agent.start()
        assert "datapath replaced" in agent.log
        agent.serves_on("web")


# --- the API server ---


def test_an_api_server_comes_back_with_everything_changed(lab: cluster.Lab) -> None:
    """From a backup: an earlier version, other objects, and some of those that were there are gone."""
    gone = [manifests.service("gone", 2), *manifests.slices("gone", [lab[PODS[0]]])]
    port = 7445
    with contextlib.ExitStack() as stack:
        with agents.Api(lab.netns("n1"), node(lab), *web(lab), *gone, port=port) as api:
            api.do(lambda server: setattr(server.store, "version", 1_000_000))
            agent = stack.enter_context(agents.Agent(lab, api.source, *agents.SMALL_MAPS))
            api.put(*web(lab))
            agent.has_backends("gone", {PODS[0]})
        agent.says("next attempt")
        with storms(lab):
            until_s = time.monotonic() + OUTAGE_S
            while (left_s := until_s - time.monotonic()) > 0:
                agent.serves_on("web")
                assert is_healthy(lab)
                time.sleep(min(left_s, 5.0))
            now = [node(lab), *web(lab, PODS[1]), manifests.service("new", 3)]
            now += manifests.slices("new", [lab[PODS[1]]])
            options = {"port": port, "bookmark_interval_s": 0.5}
            with agents.Api(lab.netns("n1"), *now, **options):
                polling.eventually(lambda: agent.services() == {"web", "new"}, 120, "what is there now")
                polling.eventually(lambda: checking.differences(agent, *now) == [], 120, "all of it")
                agent.serves_on("web")


def is_healthy(lab: cluster.Lab) -> bool:
    script = "import urllib.request as ask; print(ask.urlopen(ask.sys.argv[1], timeout=30).status)"
    argv = [sys.executable, "-I", "-S", "-c", script, "http://127.0.0.1:10256/healthz"]
    return lab.check_output("n1", argv, timeout_s=LONG_START_S) == "200\n"


# --- a machine that has no room ---


@contextlib.contextmanager
def full_disk(path: pathlib.Path) -> collections.abc.Iterator[pathlib.Path]:
    """A file system without a byte left, for as long as the block lasts."""
    path.mkdir()
    namespaces.call("mount", b"none", bytes(path), b"tmpfs", 0, b"size=64k")
    try:
        with contextlib.suppress(OSError), (path / "all").open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        yield path
    finally:
        namespaces.call("umount2", bytes(path), 2)
        path.rmdir()


def test_a_full_disk_keeps_nobody_from_serving(
    lab: cluster.Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    with agents.Api(lab.netns("n1"), node(lab), *web(lab)) as api, full_disk(tmp_path / "full") as full:
        monkeypatch.setenv("XDG_CACHE_HOME", str(full))
        # Those that compile look for room to work in, too.
        monkeypatch.setenv("TMPDIR", str(full))
        agent = agents.Agent(lab, api.source, *agents.SMALL_MAPS, "-v=4")
        agent.log_file = full / "log"
        with contextlib.ExitStack() as stack:
            stack.callback(agent._leave)
            agent.start(wait=False)
            polling.eventually(lambda: served(agent) == {"web"}, LONG_START_S, "web")
            polling.eventually(lambda: ready(lab), what="readiness")
            assert agent.log == ""
            api.put(manifests.service("more", 2), *manifests.slices("more", [lab[PODS[0]]]))
            agent.has_backends("more", {PODS[0]})
            agent.kill()
            agent.start(wait=False)
            polling.eventually(lambda: ready(lab), LONG_START_S, "readiness")
            assert agent.stop() == 0


def ready(lab: cluster.Lab) -> bool:
    return bool(test_life.get(lab, "n1", "http://127.0.0.1:10256/healthz")[0] == 200)


def served(agent: agents.Agent) -> set[str]:
    """The Services in the kernel; none where there are no maps yet."""
    if not (agent.root / "current").exists():
        return set()
    return agent.services()


class MemoryController(typing.NamedTuple):
    """Where cgroups go that bound memory, and the file that says by how much."""

    root: pathlib.Path
    limit: str


def memory_controller() -> MemoryController | None:
    """Version 2, where it is in charge of memory, else version 1."""
    found = cgroup2.mount_point()
    if found is not None and "memory" in (found / "cgroup.subtree_control").read_text().split():
        return MemoryController(found, "memory.max")
    first = MemoryController(pathlib.Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes")
    return first if (first.root / first.limit).exists() else None


MEMORY = memory_controller()


class Confined(agents.Agent):
    """An agent that may have so much memory, if it is in a group for that."""

    group: pathlib.Path | None = None

    def command(self, *flags: str) -> list[str]:
        """Return its command line, which enters the group first."""
        if self.group is None:
            return super().command(*flags)
        enter = f'echo $$ >"{self.group}/cgroup.procs" && exec "$@"'
        return ["/bin/sh", "-c", enter, "confined", *super().command(*flags)]


@pytest.mark.skipif(MEMORY is None, reason="no memory controller for this machine's cgroups")
def test_an_agent_that_is_killed_for_want_of_memory_is_made_good_by_the_next(lab: cluster.Lab) -> None:
    """At its start, again and again, at another point each time."""
    many = [service for number in range(300) for service in of_many(lab, number, 10)]
    assert MEMORY is not None
    agent: agents.Agent
    with contextlib.ExitStack() as stack:
        api = stack.enter_context(agents.Api(lab.netns("n1"), node(lab), *web(lab)))
        agent = stack.enter_context(Confined(lab, api.source, "--map-rows", "sockets=8192"))
        agent.stop()
        put_all(api, many)
        killed = 0
        with storms(lab):
            for megabytes in range(20, 120, 4) if LONG else (32,):
                Confined.group = MEMORY.root / f"{lab.run}-{megabytes}"
                Confined.group.mkdir()
                stack.callback(Confined.group.rmdir)
                (Confined.group / MEMORY.limit).write_text(str(megabytes << 20))
                agent.start(wait=False)
                polling.eventually(lambda: " ready: " in agent.log or not agent.running)
                agent.serves_on("web")
                status = agent.stop() if agent.running else agent.wait()
                killed += status != 0
                print(f"{megabytes} MB: {status}")
        Confined.group = None
        assert killed > 0
        agent.start()
        assert "datapath adopted" in agent.log
        assert checking.differences(agent, node(lab), *web(lab), *many) == []
        print(f"killed or refused={killed}")


# --- a lot of everything ---


def of_many(lab: cluster.Lab, number: int, endpoints: int) -> list[manifests.Object]:
    """A Service with one port of one family, and its slice."""
    name, high, low = f"many-{number}", (number + 1024) // 256, number % 256
    service = manifests.service(name, 1, ports=[manifests.HTTP], ipFamilies=["IPv4"])
    service["spec"] |= {"clusterIP": f"10.{100 + high // 256}.{high % 256}.{low}"}
    service["spec"]["clusterIPs"] = [service["spec"]["clusterIP"]]
    slice_, _ = manifests.slices(name, [lab[PODS[0]]], ports=[manifests.HTTP])
    slice_["endpoints"] = [
        {
            "addresses": [f"10.{200 + one}.{number // 256}.{low}"],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "nodeName": f"node-{one}",
        }
        for one in range(endpoints)
    ]
    return [service, slice_]


def put_all(api: agents.Api, objects: collections.abc.Sequence[manifests.Object]) -> None:
    """Store objects, many at a time."""
    for first in range(0, len(objects), OBJECTS_AT_ONCE):
        some = objects[first : first + OBJECTS_AT_ONCE]
        api.do(lambda server, some=some: [server.store.put(one) for one in some])  # type: ignore[misc]


def cpu_s(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int, field: str = "VmRSS") -> float:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"{field}:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) / 1024


def changed(lab: cluster.Lab, slice_: manifests.Object, round_: int) -> manifests.Object:
    """The slice with another first endpoint, and when that was."""
    now = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
    first = {**slice_["endpoints"][0], "addresses": [f"10.{220 + round_ % 30}.{round_ // 30 % 256}.1"]}
    annotations = {"endpoints.kubernetes.io/last-change-trigger-time": now}
    return {
        **slice_,
        "metadata": {**slice_["metadata"], "annotations": annotations},
        "endpoints": [first, *slice_["endpoints"][1:]],
    }


def lag(lab: cluster.Lab) -> str:
    """How long changes took, as the agent has measured it."""
    _, text = test_life.get(lab, "n1", "http://127.0.0.1:10249/metrics")
    name = "kubeproxy_network_programming_duration_seconds"
    sums = dict(re.findall(rf'{name}_(sum|count){{ip_family="IPv4"}} (\S+)', text))
    if not sums:
        return "none measured"
    return f"changes={float(sums['count']):.0f} mean={1e3 * float(sums['sum']) / float(sums['count']):.1f} ms"


def test_everything_is_served_and_no_change_is_lost(lab: cluster.Lab) -> None:
    every = {f"many-{number}": of_many(lab, number, ENDPOINTS) for number in range(SERVICES)}
    objects = [one for pair in every.values() for one in pair]
    with agents.Api(lab.netns("n1"), node(lab), *web(lab)) as api:
        put_all(api, objects)
        # With the sizes that an agent has by itself: they grow where they must.
        agent = agents.Agent(lab, api.source)
        with contextlib.ExitStack() as stack:
            stack.callback(agent._leave)
            began_s = time.monotonic()
            agent.start(wait=False)
            wait_ready(agent)
            assert agent.process is not None
            pid = agent.process.pid

            def all_there() -> bool:
                agent.reopen()
                return len(agent.services()) == SERVICES + 1

            polling.eventually(all_there, LONG_START_S, "all services")
            print(
                f"\nservices={SERVICES} endpoints={ENDPOINTS * SERVICES} served after "
                f"{time.monotonic() - began_s:.1f} s, {agent.log.count('tables have grown')} growths, "
                f"{memory_mb(pid):.0f} MB, {memory_mb(pid, 'VmHWM'):.0f} MB at most"
            )
            print("\n".join(line for line in agent.log.splitlines() if "grown" in line or "ready" in line))
            assert checking.differences(agent, node(lab), *web(lab), *objects) == []
            with storms(lab):
                before_s, churned_s = cpu_s(pid), churn(lab, api, every)
                now = [one for pair in every.values() for one in pair]
                polling.eventually(lambda: version_seen(api, agent), what="the last change")
                spent_s = cpu_s(pid) - before_s
            print(
                f"{int(CHANGES_PER_S * CHURN_S)} changes in {churned_s:.1f} s: {lag(lab)}, "
                f"{100 * spent_s / churned_s:.0f} % of a CPU, {memory_mb(pid):.0f} MB"
            )
            polling.eventually(lambda: checking.differences(agent, node(lab), *web(lab), *now) == [])


def churn(lab: cluster.Lab, api: agents.Api, every: dict[str, list[manifests.Object]]) -> float:
    """Change slices at a steady rate, in `every` too; returns how long that took, in seconds."""
    names = sorted(every)
    began_s = time.monotonic()
    steps, each = int(CHURN_S * 50), CHANGES_PER_S // 50
    at = 0
    for step in range(steps):
        some: list[manifests.Object] = []
        for _ in range(each):
            pair = every[names[at % len(names)]]
            pair[1] = changed(lab, pair[1], at)
            some.append(pair[1])
            at += 1
        api.do(lambda server, some=some: [server.store.put(one) for one in some])  # type: ignore[misc]
        time.sleep(max(0.0, began_s + (step + 1) / 50 - time.monotonic()))
    return time.monotonic() - began_s


def version_seen(api: agents.Api, agent: agents.Agent) -> bool:
    """Whether a marker that is put now, after everything else, has come to the kernel."""
    api.put(manifests.service("marker", 9))
    polling.eventually(lambda: "marker" in agent.services(), what="the marker")
    api.delete(manifests.service("marker", 9))
    polling.eventually(lambda: "marker" not in agent.services(), what="no marker")
    return True
