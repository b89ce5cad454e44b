"""`lbproxy explain` of packets from elsewhere, held against what the kernel does with them."""

import collections.abc
import json
import typing

import pytest

from lbproxy.lab import cluster
from tests.lab import agents, manifests

PODS = ("n1/p1", "n2/p1")
NODE_PORT, LOCAL_NODE_PORT = 30080, 30081
FLAGS = ("--cluster-cidr=10.244.0.0/16,fd00:244::/32",)
RANGED, LOCAL_IP = "203.0.113.1", "203.0.113.2"
HTTP = manifests.HTTP


def ingress(*addresses: str) -> list[manifests.Object]:
    return [{"ip": address} for address in addresses]


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    here, there = (lab[pod] for pod in PODS)
    local: manifests.Object = {"type": "LoadBalancer", "externalTrafficPolicy": "Local"}
    ranged: manifests.Object = {
        "type": "LoadBalancer",
        "loadBalancerSourceRanges": ["172.18.0.2/32", "fd00::/16"],
    }
    objects = [
        manifests.node("n1", str(lab["n1"].ipv4), str(lab["n1"].ipv6)),
        manifests.service("web", 1, ports=[HTTP.on_node_port(NODE_PORT)], externalIPs=["203.0.113.9"]),
        *manifests.slices("web", [here, there], ports=[HTTP]),
        manifests.service("ranged", 2, ports=[HTTP], load_balancer=ingress(RANGED), **ranged),
        *manifests.slices("ranged", [here, there], ports=[HTTP]),
        manifests.service(
            "local",
            3,
            ports=[HTTP.on_node_port(LOCAL_NODE_PORT)],
            load_balancer=ingress(LOCAL_IP),
            **local,
        ),
        *manifests.slices("local", [here, there], ports=[HTTP]),
        manifests.service("elsewhere", 4, ports=[HTTP], load_balancer=ingress("203.0.113.3"), **local),
        *manifests.slices("elsewhere", [there], ports=[HTTP]),
        manifests.service("empty", 5, ports=[HTTP], load_balancer=ingress("203.0.113.4"), **local),
    ]
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


@pytest.fixture(scope="module")
def agent(lab: cluster.Lab, api: agents.Api) -> collections.abc.Iterator[agents.Agent]:
    for pod in PODS:
        lab.serve(pod)
    for place in ("outside", "n2"):
        for network in ("10.96.0.0/16", "203.0.113.0/24"):
            lab.check_output(place, ["ip", "route", "add", network, "via", str(lab["n1"].ipv4)], cgroup=False)
    with agents.Agent(lab, api.source, *agents.SMALL_MAPS, *FLAGS) as running:
        yield running


def explained(agent: agents.Agent, source: str, to: str) -> dict[str, typing.Any]:
    told: dict[str, typing.Any] = json.loads(
        agent.lbproxy("explain", "--from", source, "--to", to, "-o", "json")
    )
    return told


def masqueraded(told: dict[str, typing.Any], ip: str) -> bool:
    for step in told["steps"]:
        if step["step"] == "masquerade":
            places, colon, verdict = step["result"].removeprefix("to ").rpartition(": ")
            if not colon or f"{ip}:8080" in places:
                return bool(verdict.startswith("yes"))
    raise AssertionError(f"nothing is said of {ip}: {told['steps']}")


@pytest.mark.parametrize("client", ["outside", "n2", "n2/p1"])
@pytest.mark.parametrize(
    ("address", "port"),
    [
        ("10.96.0.1", 80),
        ("10.96.0.1", 81),
        ("172.18.0.1", NODE_PORT),
        ("172.18.0.1", LOCAL_NODE_PORT),
        ("203.0.113.9", 80),
        (RANGED, 80),
        (LOCAL_IP, 80),
        ("203.0.113.3", 80),
        ("203.0.113.4", 80),
        ("10.96.0.5", 80),
    ],
)
def test_what_is_explained_is_what_happens(
    lab: cluster.Lab, agent: agents.Agent, client: str, address: str, port: int
) -> None:
    source = str(lab[client].ipv4)
    told = explained(agent, source, f"{address}:{port}")
    names = {str(lab[pod].ipv4): pod for pod in PODS}
    for _ in range(4 if told["verdict"] == "balanced" else 1):
        # Beside all nodes: no socket hook is to take the packet path's work away.
        with lab.shell(client, cgroup=False) as at:
            # For an answer that never comes, not long.
            answer = at.tcp(
                address, port, timeout_s=5.0 if told["verdict"] in ("balanced", "refused") else 0.7
            )
        if told["verdict"] != "balanced":
            error = {"refused": {"ECONNREFUSED"}, "dropped": {"ETIMEDOUT", "TimeoutError"}}.get(
                told["verdict"]
            )
            assert answer.error, told
            assert error is None or answer.error in error, (answer, told)
            continue
        assert answer.server in {names[one["ip"]] for one in told["backends"]}, (answer, told)
        (ip,) = (ip for ip, name in names.items() if name == answer.server)
        assert answer.seen is not None
        assert (answer.seen[0] != source) == masqueraded(told, ip), (answer, told)


@pytest.mark.parametrize("address", ["172.18.0.1", "203.0.113.9"])
def test_an_open_connection_is_explained_by_its_flow(
    lab: cluster.Lab, agent: agents.Agent, address: str
) -> None:
    port = NODE_PORT if address == "172.18.0.1" else 80
    with lab.shell("outside", cgroup=False) as at, at.open(address, port) as held:
        answer = held.ask()
        assert answer.local is not None
        told = explained(agent, ":".join(map(str, answer.local)), f"{address}:{port}")
        assert [one["ip"] for one in told["backends"]] == [str(lab[answer.server].ipv4)]
        flow = next(step["result"] for step in told["steps"] if step["step"] == "flow")
        assert ("masqueraded" in flow) == (answer.seen != answer.local)
    gone = explained(agent, f"{lab['outside'].ipv4}:9", f"{address}:{port}")
    assert len(gone["backends"]) == 2
