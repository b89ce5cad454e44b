"""Probes of real backends by the real agent: each kind, what becomes of traffic, and what survives."""

import collections.abc
import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys
import typing

import pytest

from lbproxy import noting
from lbproxy.lab import cluster, traffic
from tests import polling
from tests.kube import certificates
from tests.lab import agents, manifests, probed, test_life
from tests.unit import test_grpc_health

PODS = ("n1/p2", "n1/p3", "n2/p1")
OFTEN = "interval=1s,timeout=10s,rise=1,fall=2,jitter=10%"
# Of those that say nothing when they are down: as long as one that is up may take on a busy machine, twice.
SILENT = ("https", "udp")
SILENT_S = 2
PROBES = {
    "tcp": ("tcp", probed.TCP),
    "http": ("http:/healthz", probed.HTTP),
    "https": ("https:/healthz", probed.HTTPS),
    "grpc": ("grpc:good", probed.GRPC),
    "udp": ("udp:ping", probed.UDP),
}
NUMBERS = {name: number for number, name in enumerate(PROBES, 1)}
MORTAL, OWN = 20, 21
METRICS_PORT = 10249


def often(name: str) -> str:
    return OFTEN.replace("10s", f"{SILENT_S}s") if name in SILENT else OFTEN


def annotated(name: str, text: str | None = None, settings: str = "") -> manifests.Object:
    asked, port = PROBES[name]
    annotations = {
        "lbproxy.io/probe": asked if text is None else text,
        "lbproxy.io/probe-settings": settings or f"{often(name)},port={port}",
    }
    return manifests.service(name, NUMBERS[name], annotations=annotations if text != "" else {})


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    objects: list[manifests.Object] = []
    for name in PROBES:
        objects += [annotated(name), *manifests.slices(name, [lab[pod] for pod in PODS])]
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


class Health:
    """What the pods' servers of health say."""

    def __init__(self, lab: cluster.Lab, folder: pathlib.Path) -> None:
        self._files = {pod: folder / pod.replace("/", "-") for pod in PODS}
        pair = certificates.Authority(folder).pair("server")
        answers = (test_grpc_health.SERVING, test_grpc_health.NOT_SERVING)
        for pod in PODS:
            self.says("up", pod)
            argv = [
                sys.executable, "-I", "-S", probed.__file__,
                str(self._files[pod]), str(pair.certificate), str(pair.key), *answers,
            ]  # fmt: skip
            process = lab.popen(pod, argv, stdout=subprocess.PIPE)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"

    def says(self, what: str, *pods: str) -> None:
        for pod in pods or PODS:
            draft = self._files[pod].with_suffix(".new")
            draft.write_text(what)
            draft.replace(self._files[pod])


@pytest.fixture(scope="module")
def health(lab: cluster.Lab, tmp_path_factory: pytest.TempPathFactory) -> Health:
    return Health(lab, tmp_path_factory.mktemp("health"))


@pytest.fixture(scope="module")
def agent(lab: cluster.Lab, api: agents.Api, health: Health) -> collections.abc.Iterator[agents.Agent]:
    assert health
    for pod in PODS:
        lab.serve(pod)
    flags = ("--metrics-bind-address", f"127.0.0.1:{METRICS_PORT}")
    with agents.Agent(lab, api.source, *agents.SMALL_MAPS, *flags) as running:
        yield running


def everyone_has(agent: agents.Agent, *pods: str) -> None:
    for name in PROBES:
        agent.has_backends(name, set(pods))


def clients(lab: cluster.Lab, **options: typing.Any) -> dict[str, traffic.Client]:
    """A client of each Service: half of them by TCP over IPv4, half by UDP over IPv6."""
    return {
        name: lab.client(
            "n1/p1",
            "udp-new" if number % 2 else "short",
            manifests.cluster_ip(number, 6 if number % 2 else 4),
            manifests.UDP_PORT if number % 2 else manifests.TCP_PORT,
            **options,
        )
        for name, number in NUMBERS.items()
    }


def all_serve(lab: cluster.Lab, *pods: str) -> None:
    """Every connection succeeds, at these pods and nowhere else."""
    for name, client in clients(lab, count=100).items():
        result = client.result()
        assert result.failures == {}, name
        assert set(result.servers) == set(pods), name


def all_unhealthy(agent: agents.Agent, name: str) -> bool:
    return all(backend.health for port in agent.ports(name).values() for backend in port.backends)


def scraped(lab: cluster.Lab) -> list[str]:
    return test_life.get(lab, "n1", f"http://127.0.0.1:{METRICS_PORT}/metrics")[1].splitlines()


def values(lines: list[str], name: str, *labels: str) -> list[float]:
    """The values of a metric whose series have these labels."""
    found = [line for line in lines if line.startswith(name) and all(label in line for label in labels)]
    return [float(line.rpartition(" ")[2]) for line in found]


def test_a_backend_whose_probes_fail_is_out_until_they_pass(
    agent: agents.Agent, lab: cluster.Lab, api: agents.Api, health: Health
) -> None:
    # Of an agent that has said nothing yet: it does not say all that other tests make of it.
    agent.stop()
    agent.start()
    everyone_has(agent, *PODS)
    health.says("down", "n1/p2")
    everyone_has(agent, "n1/p3", "n2/p1")
    all_serve(lab, "n1/p3", "n2/p1")
    reasons = {
        "tcp": "Connection refused",
        "http": "HTTP status 500",
        "https": f"no answer in {SILENT_S} s",
        "grpc": "is NOT_SERVING",
        "udp": f"no answer in {SILENT_S} s",
    }
    metrics = scraped(lab)
    for name, reason in reasons.items():
        line = agent.says(f"backend {lab['n1/p2'].ipv4}:8080 of default/{name}:http/TCP/IPv4 is down")
        assert line.endswith(reason), line
        assert values(metrics, "lbproxy_probe_failed_backends", f'service="{name}"') == [1, 1, 1, 1]
        for result in ("failed", "passed"):
            (count,) = values(metrics, "lbproxy_probes_total", f'type="{name}"', f'result="{result}"')
            assert count >= 4
    (row,) = [one for one in json.loads(agent.lbproxy("backends", "tcp", "-o", "json"))
              if one["ip"] == lab["n1/p2"].ipv4 and one["port_name"] == "http"]  # fmt: skip
    assert (row["state"], row["health"], row["sets"]) == ("unhealthy", ["probe-failed"], [])
    ip = lab["n1/p2"].ipv4
    polling.eventually(
        lambda: any(
            not one.up and (one.name, one.ip) == ("tcp", ip) for one in noting.read(agent.root).troubles
        )
    )
    said = f"{ip}:8080 of default/tcp:http: down, failing since "
    (line,) = [one for one in agent.lbproxy("backends", "tcp").splitlines() if one.startswith(said)]
    assert line.endswith(reasons["tcp"])
    (asked,) = {one["probe"]["asks"] for one in json.loads(agent.lbproxy("services", "http", "-o", "json"))}
    assert asked == f"http:/healthz at port {probed.HTTP} every 1s"
    # One target for each address and port, however many service ports lead there.
    assert values(metrics, "lbproxy_probe_targets") == [len(PROBES) * len(PODS) * 2]
    events = [one for one in test_life.events(api) if one["reason"] == "BackendUnhealthy"]
    # Those of other tests may be among them.
    assert {one["regarding"]["name"] for one in events} >= set(PROBES)
    health.says("up", "n1/p2")
    everyone_has(agent, *PODS)
    all_serve(lab, *PODS)


def test_where_all_are_down_all_are_used(agent: agents.Agent, lab: cluster.Lab, health: Health) -> None:
    everyone_has(agent, *PODS)
    health.says("down")
    polling.eventually(lambda: all(all_unhealthy(agent, name) for name in PROBES), what="all unhealthy")
    agent.says("default/udp:dns/UDP/IPv6: every backend it may use under policy Cluster is unhealthy")
    everyone_has(agent, *PODS)
    all_serve(lab, *PODS)
    health.says("up", "n2/p1")
    everyone_has(agent, "n2/p1")
    all_serve(lab, "n2/p1")
    health.says("up")
    everyone_has(agent, *PODS)


def test_annotations_change_live(
    agent: agents.Agent, lab: cluster.Lab, api: agents.Api, health: Health
) -> None:
    health.says("down", "n1/p2")
    everyone_has(agent, "n1/p3", "n2/p1")
    try:
        # Without a probe nothing speaks against it.
        api.put(annotated("http", ""))
        agent.has_backends("http", set(PODS))
        api.put(annotated("http"))
        agent.has_backends("http", {"n1/p3", "n2/p1"})
        # Asked something else it is up, once that is known.
        api.put(annotated("http", settings=f"{OFTEN},port={probed.HTTP},status=500-599"))
        agent.has_backends("http", {"n1/p2"})
        # Of two ports of a pod one is down, and the other is not asked.
        lines = f"{OFTEN}\nhttp port={probed.HTTP}"
        api.put(annotated("http", "http  http:/healthz\ndns  none\n", lines))
        agent.has_backends("http", {"n1/p3", "n2/p1"}, [("http", 4), ("http", 6)])
        agent.has_backends("http", set(PODS), [("dns", 4), ("dns", 6)])
        # Half understood is no probe.
        api.put(annotated("http", settings="interval=soon"))
        agent.has_backends("http", set(PODS))
        assert "interval='soon': not a time such as 5s" in agent.says("lbproxy.io/probe-settings")
        wrong = (
            "lbproxy.io/probe-settings: 'interval=soon': interval='soon': not a time such as 5s, 500ms or 1m"
        )
        polling.eventually(lambda: f"default/http: {wrong}" in agent.lbproxy("services", "http").splitlines())
        assert {
            row["probe"]["invalid"] for row in json.loads(agent.lbproxy("services", "http", "-o", "json"))
        } == {wrong}
        polling.eventually(
            lambda: any(
                event["reason"] == "InvalidField" and "interval='soon'" in event["note"]
                for event in test_life.events(api)
            ),
            what="an Event",
        )
    finally:
        api.put(annotated("http"))
        health.says("up")
        everyone_has(agent, *PODS)


def test_a_restart_sends_nothing_to_what_was_down(
    agent: agents.Agent, lab: cluster.Lab, api: agents.Api, health: Health
) -> None:
    health.says("down", "n1/p2")
    everyone_has(agent, "n1/p3", "n2/p1")
    running = clients(lab)
    try:
        agent.kill()
        agent.start()
        # Its first results are in.
        polling.eventually(lambda: sum(values(scraped(lab), "lbproxy_probes_total")) > 100, what="probes")
    finally:
        results = [client.stop() for client in running.values()]
    assert [result.failures for result in results] == [{}] * len(results)
    assert {server for result in results for server in result.servers} == {"n1/p3", "n2/p1"}
    # What nobody probes any more while no agent runs is used as soon as one does.
    agent.kill()
    with contextlib.ExitStack() as stack:
        stack.callback(api.put, annotated("tcp"))
        api.put(annotated("tcp", ""))
        agent.start()
        agent.has_backends("tcp", set(PODS))
        agent.has_backends("udp", {"n1/p3", "n2/p1"})
    health.says("up")
    everyone_has(agent, *PODS)


def test_a_backend_that_dies_is_out_before_kubernetes_says_so(
    agent: agents.Agent, lab: cluster.Lab, api: agents.Api
) -> None:
    # At its own port: the one that serves is the one that is asked.
    annotations = {"lbproxy.io/probe": "tcp", "lbproxy.io/probe-settings": OFTEN}
    ports = (manifests.HTTP,)
    pods = ("n1/p1", "n2/p2")
    servers = {pod: lab.serve(pod) for pod in pods}
    objects = [
        manifests.service("mortal", MORTAL, ports=ports, annotations=annotations),
        *manifests.slices("mortal", [lab[pod] for pod in pods], ports=ports),
    ]
    keys = [("http", 4), ("http", 6)]
    with contextlib.ExitStack() as stack:
        for server in servers.values():
            stack.callback(server.kill)
        stack.callback(api.delete, *objects)
        api.put(*objects)
        agent.has_backends("mortal", set(pods), keys)
        servers["n2/p2"].kill()
        agent.has_backends("mortal", {"n1/p1"}, keys)
        for family in (4, 6):
            address = manifests.cluster_ip(MORTAL, family)
            result = lab.client("n1/p3", "short", address, manifests.TCP_PORT, count=300).result()
            assert (result.failures, set(result.servers)) == ({}, {"n1/p1"})
        servers["n2/p2"] = lab.serve("n2/p2")
        stack.callback(servers["n2/p2"].kill)
        agent.has_backends("mortal", set(pods), keys)


def test_the_nodes_own_addresses_are_asked_for_its_own_pods_alone(
    agent: agents.Agent, lab: cluster.Lab, api: agents.Api
) -> None:
    # Nothing listens there, on either node: who is asked is found down.
    annotations = {"lbproxy.io/probe": "tcp", "lbproxy.io/probe-settings": f"{OFTEN},port=9099"}
    service = manifests.service("own", OWN, ports=(manifests.HTTP,), annotations=annotations)

    def slices(node: str) -> list[manifests.Object]:
        places = [dataclasses.replace(lab["n1"], node=node), lab["n2"]]
        return manifests.slices("own", places, ports=(manifests.HTTP,))

    def down() -> set[str]:
        # Not by the log: after other tests it has had its share of lines.
        with contextlib.suppress(subprocess.CalledProcessError):  # before the Service is known
            rows = json.loads(agent.lbproxy("backends", "own", "-o", "json"))
            return {row["ip"] for row in rows if row["health"] == ["probe-failed"]}
        return set()

    def states() -> dict[str, str]:
        rows = json.loads(agent.lbproxy("backends", "own", "-o", "json"))
        return {row["ip"]: row["probe"]["state"] for row in rows}

    def targets() -> float:
        (count,) = values(scraped(lab), "lbproxy_probe_targets")
        return count

    before = targets()
    with contextlib.ExitStack() as stack:
        stack.callback(api.delete, service, *slices("n1"))
        api.put(service, *slices("n2"))
        others, own = set(lab["n2"].addresses), set(lab["n1"].addresses)
        polling.eventually(lambda: down() == others)
        assert targets() == before + 2
        polling.eventually(
            lambda: states() == {**dict.fromkeys(others, "down"), **dict.fromkeys(own, "not-asked")}
        )
        api.put(*slices("n1"))
        polling.eventually(lambda: down() == others | own)
        assert targets() == before + 4
