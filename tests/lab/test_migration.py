"""A node is taken over from kube-proxy and given back to it, and nobody notices.

The rules are those that kube-proxy would have written (`benchmarks/kubeproxy`), in each of its
three ways. Connections are of every kind: from a pod, from the node and from outside; TCP, connected
and unconnected UDP; to a ClusterIP, a NodePort and a load balancer IP. LBPROXY_MIGRATION is how many
TCP connections there are (`make migration`: 1,000).
"""

import collections.abc
import contextlib
import json
import os
import typing

import pytest

from benchmarks.kubeproxy import load, model
from lbproxy.lab import cluster, traffic
from tests import polling
from tests.lab import agents, manifests, talking
from tests.lab.conftest import LabFactory

TCP_CONNECTIONS = int(os.environ.get("LBPROXY_MIGRATION", "60"))
UDP_FLOWS = max(2, TCP_CONNECTIONS // 50)
WEB = 1
CLUSTER_IP, BALANCER = manifests.cluster_ip(WEB), "192.0.2.6"
NODE_PORT, UDP_NODE_PORT = 30080, 30053
PODS = ("n1/p2", "n1/p3", "n2/p1", "n2/p2")
PORTS = (manifests.HTTP.on_node_port(NODE_PORT), manifests.DNS.on_node_port(UDP_NODE_PORT))
FLAGS = ("--cluster-cidr", "10.244.0.0/16")
MODES = (load.Backend.NATIVE, load.Backend.NF_TABLES, load.Backend.LEGACY)


@pytest.fixture
def lab(build_lab: LabFactory) -> collections.abc.Iterator[cluster.Lab]:
    with build_lab(families=(4,)) as built:
        for pod in PODS:
            built.serve(pod)
        for address in (CLUSTER_IP, BALANCER):
            built.check_output("outside", ["ip", "route", "add", address, "via", built["n1"].ipv4])
        built.check_output("n2", ["ip", "route", "add", BALANCER, "via", built["n1"].ipv4])
        yield built


def objects(lab: cluster.Lab) -> list[manifests.Object]:
    return [
        manifests.service("web", WEB, ports=PORTS, load_balancer=[{"ip": BALANCER}]),
        *manifests.slices("web", [lab[pod] for pod in PODS]),
        manifests.node("n1", lab["n1"].ipv4),
    ]


def rules(lab: cluster.Lab, mode: load.Backend) -> tuple[load.Rules, tuple[model.ServicePort, ...]]:
    """kube-proxy's rules for the same; a load balancer IP is to the model another ClusterIP."""
    endpoints = tuple(
        sorted((model.Endpoint(lab[pod].ipv4, 8080, pod.startswith("n1")) for pod in PODS), key=str)
    )
    ports = tuple(
        model.ServicePort(
            "default", name, port.name, port.protocol.lower(), address, port.port, node_port, endpoints
        )
        for name, address in (("web", CLUSTER_IP), ("web-lb", BALANCER))
        for port in PORTS
        for node_port in (port.node_port if name == "web" else 0,)
    )
    settings = model.Settings(
        cluster_cidr="10.244.0.0/16", node_ip=lab["n1"].ipv4, service_cidrs=("10.96.0.0/12", "192.0.2.0/24")
    )
    return load.Rules(lambda argv: lab.command("n1", argv), mode, settings), ports


def talkers(lab: cluster.Lab, stack: contextlib.ExitStack, tcp: int, udp: int) -> list[talking.Talker]:
    """Connections of every kind, all of them open and answered."""
    node, each = lab["n1"].ipv4, max(1, tcp // 6)
    dns = manifests.UDP_PORT
    inside: list[talking.Target] = [
        ("tcp", CLUSTER_IP, 80, each), ("tcp", node, NODE_PORT, each),
        ("udp", CLUSTER_IP, dns, udp), ("sendto", CLUSTER_IP, dns, udp), ("sendto", node, UDP_NODE_PORT, udp),
    ]  # fmt: skip
    of_node: list[talking.Target] = [("tcp", CLUSTER_IP, 80, each), ("sendto", CLUSTER_IP, dns, udp)]
    outside: list[talking.Target] = [
        ("tcp", node, NODE_PORT, each), ("tcp", BALANCER, 80, each), ("tcp", CLUSTER_IP, 80, each),
        ("udp", node, UDP_NODE_PORT, udp), ("sendto", BALANCER, dns, udp), ("udp", CLUSTER_IP, dns, udp),
    ]  # fmt: skip
    made = [
        stack.enter_context(talking.Talker(lab, where, to))
        for where, to in (("n1/p1", inside), ("n1", of_node), ("outside", outside))
    ]
    for one in made:
        first = one.ready()
        assert (first.broken, first.open) == ({}, one.count)
    return made


def all_whole(made: collections.abc.Iterable[talking.Talker]) -> None:
    reports = [one.report() for one in made]
    assert [one.broken for one in reports] == [{}] * len(reports)


def newcomers(lab: cluster.Lab) -> list[traffic.Client]:
    """New connections all the time, from inside and outside."""
    node = lab["n1"].ipv4
    return [
        lab.client("n1/p1", "short", CLUSTER_IP, 80, timeout_s=20, pause_s=0.004),
        lab.client("outside", "short", node, NODE_PORT, timeout_s=20, pause_s=0.004),
        # Not from where the others come: a flow that gets an earlier one's port is that one, to everybody.
        lab.client("n2", "udp-new", BALANCER, 53, timeout_s=20, pause_s=0.004),
    ]


@pytest.mark.usefixtures("spare_cache")
@pytest.mark.parametrize("mode", MODES)
def test_there_and_back(lab: cluster.Lab, mode: load.Backend) -> None:
    loaded, ports = rules(lab, mode)
    loaded.start(ports)
    with contextlib.ExitStack() as stack:
        old = talkers(lab, stack, TCP_CONNECTIONS, UDP_FLOWS)
        storm = newcomers(lab)
        api = stack.enter_context(agents.Api(lab.netns("n1"), *objects(lab)))
        agent = stack.enter_context(agents.Agent(lab, api.source, *agents.SMALL_MAPS, *FLAGS))
        assert "of another proxy stay with it" in agent.says("took over")
        all_whole(old)
        new = talkers(lab, stack, TCP_CONNECTIONS, UDP_FLOWS)
        assert not removed(agent, "--dry-run")
        assert status(agent)["kube_proxy_rules"]
        assert removed(agent)
        assert not status(agent)["kube_proxy_rules"]
        all_whole([*old, *new])

        agent.stop()
        agent.flags += ["--map-rows", "affinity=4096"]
        agent.start()
        assert "datapath replaced" in agent.log
        all_whole([*old, *new])
        seen = status(agent)
        assert seen["flows_of_kube_proxy"]["TCP"] == sum(one.tcp for one in old)
        assert seen["kept_alive"]

        loaded.start(ports)
        assert "reserved" in agent.lbproxy("migrate", "return")
        last = talkers(lab, stack, TCP_CONNECTIONS, UDP_FLOWS)
        assert status(agent)["returning"]
        assert "new connections are left to kube-proxy" in agent.lbproxy("status")
        polling.eventually(lambda: "new connections are left to kube-proxy" in agent.log, 10)
        agent.stop()
        agent.start()
        all_whole([*old, *new, *last])
        assert status(agent)["flows_of_kube_proxy"]["TCP"] >= sum(one.tcp for one in (*old, *last))

        for one in new:
            one.close()
        agent.stop()
        agent.reopen()
        agent.lbproxy("cleanup")
        all_whole([*old, *last])
        results = [client.stop() for client in storm]
        assert [one.failures for one in results] == [{}] * len(results)
        assert all(one.count > 0 for one in results)


def status(agent: agents.Agent) -> dict[str, typing.Any]:
    found: dict[str, typing.Any] = json.loads(agent.lbproxy("migrate", "status", "-o", "json"))
    return found


def removed(agent: agents.Agent, *flags: str) -> list[str]:
    """What was taken from kube-proxy."""
    said = agent.lbproxy("migrate", "take-over", *flags)
    return [line for line in said.splitlines() if line.startswith("removed: ")]
