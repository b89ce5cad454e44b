"""A node is taken over from kube-proxy and given back to it, and nobody notices.

The rules are those that kube-proxy would have written (`benchmarks/kubeproxy`), in each of its
three ways, for both families at once. Connections are of every kind: from a pod, from the node and from
outside; TCP, connected and unconnected UDP; to a ClusterIP, a NodePort and a load balancer IP; IPv4 and IPv6.
LBPROXY_MIGRATION is how many TCP connections there are (`make migration`: 1,000), half of each family.
LBPROXY_KUBE_PROXY is a real kube-proxy's program, to write the rules.
"""

import collections.abc
import contextlib
import json
import math
import os
import pathlib
import subprocess
import typing

import pytest

from benchmarks.kubeproxy import load, model, program
from lbproxy.core import migration
from lbproxy.lab import cluster, traffic
from tests import polling
from tests.lab import agents, manifests, talking
from tests.lab.conftest import LabFactory

FAMILIES = (4, 6)
TCP_CONNECTIONS = int(os.environ.get("LBPROXY_MIGRATION", "60"))
CLIENTS = ("n1/p1", "n1", "outside")
# To each of three addresses of a family; together no fewer than were asked for.
EACH_TCP = math.ceil(TCP_CONNECTIONS / (len(CLIENTS) * 3 * len(FAMILIES)))
EACH_UDP = max(1, EACH_TCP // 10)  # sockets that are connected, and as many that are not
KUBE_PROXY = os.environ.get("LBPROXY_KUBE_PROXY")
WEB = 1
CLUSTER_IP = {family: manifests.cluster_ip(WEB, family) for family in FAMILIES}
BALANCER = {4: "192.0.2.6", 6: "2001:db8::6"}
NODE_PORT, UDP_NODE_PORT = 30080, 30053
PODS = ("n1/p2", "n1/p3", "n2/p1", "n2/p2")
PORTS = (manifests.HTTP.on_node_port(NODE_PORT), manifests.DNS.on_node_port(UDP_NODE_PORT))
CLUSTER_CIDR = {4: "10.244.0.0/16", 6: "fd00:244::/32"}
SERVICE_CIDRS = {4: ("10.96.0.0/12", "192.0.2.0/24"), 6: ("fd00:96::/112", "2001:db8::/64")}
CLUSTER_CIDRS = ",".join(CLUSTER_CIDR.values())
FLAGS = ("--cluster-cidr", CLUSTER_CIDRS)
MODES = (load.Backend.NATIVE, load.Backend.NF_TABLES, load.Backend.LEGACY)
_RULES_S = 60.0


@pytest.fixture
def lab(build_lab: LabFactory) -> collections.abc.Iterator[cluster.Lab]:
    with build_lab(families=FAMILIES) as built:
        for pod in PODS:
            built.serve(pod)
        for family in FAMILIES:
            node, balancer = built["n1"].address(family), BALANCER[family]
            for address in (CLUSTER_IP[family], balancer):
                built.check_output("outside", ["ip", "route", "add", address, "via", node])
            built.check_output("n2", ["ip", "route", "add", balancer, "via", node])
        yield built


def objects(lab: cluster.Lab) -> list[manifests.Object]:
    return [
        manifests.service("web", WEB, ports=PORTS, load_balancer=[{"ip": ip} for ip in BALANCER.values()]),
        *manifests.slices("web", [lab[pod] for pod in PODS]),
        manifests.node("n1", *lab["n1"].addresses),
    ]


class Generated:
    """kube-proxy's rules for the same, and nobody who writes them."""

    def __init__(self, lab: cluster.Lab, mode: load.Backend) -> None:
        self.rules = {family: rules(lab, mode, family) for family in FAMILIES}
        self.ports = {family: service_ports(lab, family) for family in FAMILIES}

    def start(self) -> None:
        for family, rules in self.rules.items():
            rules.start(self.ports[family])

    def stop(self) -> None:
        """End whoever writes them; they stay."""


class Real(Generated):
    """A kube-proxy."""

    def __init__(self, lab: cluster.Lab, mode: load.Backend, url: str, path: pathlib.Path) -> None:
        super().__init__(lab, mode)
        self._lab = lab
        self._argv = program.command(path, program.version(path), mode, url, "n1", CLUSTER_CIDRS)
        if mode is load.Backend.NATIVE:
            addresses = ",".join(
                f"{address}/{32 if '.' in address else 128}" for address in lab["n1"].addresses
            )
            self._argv += ["--nodeport-addresses", addresses]
        self._environment = {
            **os.environ, "PATH": f"{program.tools(lab.workdir / 'tools', mode)}:{os.environ['PATH']}"
        }  # fmt: skip
        self._log = lab.workdir / "kube-proxy.log"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        with self._log.open("a") as log:
            self._process = self._lab.popen(
                "n1", self._argv, cgroup=False, env=self._environment, stdout=log, stderr=log
            )
        for family in FAMILIES:
            polling.eventually(lambda family=family: self._written(family), _RULES_S)  # type: ignore[misc]

    def _written(self, family: int) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        try:
            saved = self.rules[family].saved()
        except RuntimeError:  # no such table yet
            return False
        endpoints = (each.ip for port in self.ports[family] for each in port.endpoints)
        node_ports = (str(port.node_port) for port in PORTS)
        return all(each in saved for each in (BALANCER[family], *endpoints, *node_ports))

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
            self._process = None


def rules(lab: cluster.Lab, mode: load.Backend, family: int, node: str = "n1") -> load.Rules:
    """kube-proxy's, of a node."""
    settings = model.Settings(
        cluster_cidr=CLUSTER_CIDR[family],
        node_ip=lab[node].address(family),
        service_cidrs=SERVICE_CIDRS[family],
        family=family,
    )
    return load.Rules(lambda argv: lab.command(node, argv), mode, settings)


def service_ports(lab: cluster.Lab, family: int, node: str = "n1") -> tuple[model.ServicePort, ...]:
    """A load balancer IP is to the model another ClusterIP."""
    pods = ((lab[pod].address(family), pod.startswith(node)) for pod in PODS)
    endpoints = tuple(sorted((model.Endpoint(address, 8080, here) for address, here in pods), key=str))
    return tuple(
        model.ServicePort(
            "default", name, port.name, port.protocol.lower(), address, port.port, node_port, endpoints
        )
        for name, address in (("web", CLUSTER_IP[family]), ("web-lb", BALANCER[family]))
        for port in PORTS
        for node_port in (port.node_port if name == "web" else 0,)
    )


@contextlib.contextmanager
def incumbent(lab: cluster.Lab, mode: load.Backend, url: str) -> collections.abc.Iterator[Generated]:
    """Whose rules are there first, started."""
    found = Real(lab, mode, url, pathlib.Path(KUBE_PROXY)) if KUBE_PROXY else Generated(lab, mode)
    try:
        found.start()
        yield found
    finally:
        found.stop()


def talkers(lab: cluster.Lab, stack: contextlib.ExitStack) -> list[talking.Talker]:
    """Connections of every kind, all of them open and answered."""
    to: list[talking.Target] = []
    for family in FAMILIES:
        for address, port, udp_port in (
            (CLUSTER_IP[family], manifests.TCP_PORT, manifests.UDP_PORT),
            (lab["n1"].address(family), NODE_PORT, UDP_NODE_PORT),
            (BALANCER[family], manifests.TCP_PORT, manifests.UDP_PORT),
        ):
            to.append(("tcp", address, port, EACH_TCP))
            to += [(kind, address, udp_port, EACH_UDP) for kind in ("udp", "sendto")]
    made = [stack.enter_context(talking.Talker(lab, where, to)) for where in CLIENTS]
    for one in made:
        first = one.ready()
        assert (first.broken, first.open) == ({}, one.count)
    return made


def all_whole(made: collections.abc.Iterable[talking.Talker]) -> None:
    reports = [one.report() for one in made]
    assert [one.broken for one in reports] == [{}] * len(reports)


def newcomers(lab: cluster.Lab) -> list[traffic.Client]:
    """New connections all the time, from inside and outside.

    Of UDP fewer: nobody asks again for what is lost. kube-proxy draws the ports that it masquerades with from
    all, and one that lbproxy begins to use just when kube-proxy may begin flows again, too, costs one of both
    its answer: that grows as the square of how many begin.
    """
    made = []
    for family in FAMILIES:
        to: tuple[tuple[str, traffic.Mode, str, int], ...] = (
            ("n1/p1", "short", CLUSTER_IP[family], manifests.TCP_PORT),
            ("outside", "short", lab["n1"].address(family), NODE_PORT),
            # Not from where the others come: a flow that gets an earlier one's port is that one.
            ("n2", "udp-new", BALANCER[family], manifests.UDP_PORT),
        )
        for where, mode, address, port in to:
            pause_s = 0.04 if mode == "udp-new" else 0.008
            made.append(lab.client(where, mode, address, port, timeout_s=20, pause_s=pause_s))
    return made


@pytest.mark.usefixtures("spare_cache")
@pytest.mark.parametrize("mode", MODES)
def test_there_and_back(lab: cluster.Lab, mode: load.Backend) -> None:
    with contextlib.ExitStack() as stack:
        api = stack.enter_context(agents.Api(lab.netns("n1"), *objects(lab)))
        kube_proxy = stack.enter_context(incumbent(lab, mode, api.source[1]))
        old = talkers(lab, stack)
        storm = newcomers(lab)
        agent = stack.enter_context(agents.Agent(lab, api.source, *agents.SMALL_MAPS, *FLAGS))
        assert "of another proxy stay with it" in agent.says("took over")
        all_whole(old)
        new = talkers(lab, stack)
        kube_proxy.stop()
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

        kube_proxy.start()
        assert "reserved" in agent.lbproxy("migrate", "return")
        last = talkers(lab, stack)
        assert status(agent)["returning"]
        assert "new connections are left to kube-proxy" in agent.lbproxy("status")
        polling.eventually(lambda: "new connections are left to kube-proxy" in agent.log)
        agent.stop()
        agent.start()
        all_whole([*old, *new, *last])
        assert status(agent)["flows_of_kube_proxy"]["TCP"] >= sum(one.tcp for one in (*old, *last))

        ended = [one.report() for one in new]
        for one in new:
            one.close()
        agent.stop()
        agent.reopen()
        agent.lbproxy("cleanup")
        all_whole([*old, *last])
        results = [client.stop() for client in storm]
        assert [one.failures for one in results] == [{}] * len(results)
        assert all(one.count > 0 for one in results)
        reports = [*ended, *(one.report() for one in (*old, *last))]
        tcp = sum(one.tcp for one in (*old, *new, *last))
        print(
            f"\n{mode}: {tcp} TCP connections, {sum(one.open for one in reports) - tcp} UDP flows, "
            f"{sum(one.asked for one in reports)} questions, {sum(one.lost for one in reports)} datagrams "
            f"asked for again; {sum(one.count for one in results)} new connections meanwhile, none failed"
        )


@pytest.mark.usefixtures("spare_cache")
def test_what_begins_while_the_node_is_given_back_lives_on_when_it_is_taken_again(lab: cluster.Lab) -> None:
    """By the command, and by orders: the agent has held nothing before, so nothing is looked after."""
    with contextlib.ExitStack() as stack:
        api = stack.enter_context(agents.Api(lab.netns("n1"), *objects(lab)))
        kube_proxy = stack.enter_context(incumbent(lab, load.Backend.NATIVE, api.source[1]))
        agent = stack.enter_context(
            agents.Agent(lab, api.source, *agents.SMALL_MAPS, *FLAGS, "--take-over=when-told")
        )
        agent.says("no flow of another proxy to be left alone")

        def told(label: str, order: str) -> None:
            change = {"labels": {migration.LABEL: label}, "annotations": {migration.ANNOTATION: order}}
            api.do(lambda server: server.store.patch("nodes", ("", "n1"), {"metadata": change}))
            agent.says(f"{order}: done")

        agent.lbproxy("migrate", "return")
        first = talkers(lab, stack)
        kube_proxy.stop()
        assert removed(agent)
        all_whole(first)
        seen = status(agent)
        assert seen["flows_of_kube_proxy"]["TCP"] == sum(one.tcp for one in first)
        assert (seen["kept_alive"], seen["returning"], seen["unserved"]) == (True, False, [])

        kube_proxy.start()
        told("both", "return/1")
        second = talkers(lab, stack)
        told("both", "resume/2")
        seen = status(agent)
        assert (bool(seen["kube_proxy_rules"]), seen["returning"]) == (True, False)
        third = talkers(lab, stack)
        assert status(agent)["flows_of_lbproxy"]["TCP"]
        kube_proxy.stop()
        told("lbproxy", "take-over/3")
        assert not status(agent)["kube_proxy_rules"]
        all_whole([*first, *second, *third])


def status(agent: agents.Agent) -> dict[str, typing.Any]:
    found: dict[str, typing.Any] = json.loads(agent.lbproxy("migrate", "status", "-o", "json"))
    return found


def removed(agent: agents.Agent, *flags: str) -> list[str]:
    """What was taken from kube-proxy."""
    said = agent.lbproxy("migrate", "take-over", *flags)
    return [line for line in said.splitlines() if line.startswith("removed: ")]
