"""`lbproxy migrate cluster` takes a cluster of two nodes over and gives it back, and nobody notices.

The command is the real one, over HTTP, and so are the agents, which nobody on the nodes tells
anything. The rules are those that kube-proxy would have written: of its nftables mode on n1, of
iptables-nft on n2; with LBPROXY_KUBE_PROXY the program that this names writes them. A DaemonSet controller of
the lab starts and ends both.
"""

import collections.abc
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import typing

import pytest
import yaml

from benchmarks.kubeproxy import load, program
from lbproxy.core import migration, migration_plan
from lbproxy.lab import cluster
from lbproxy.migrate import cluster as migrate_cluster
from tests import polling
from tests.lab import agents, daemon_sets, manifests, talking, test_migration
from tests.lab.conftest import LabFactory

MODES = {"n1": load.Backend.NATIVE, "n2": load.Backend.NF_TABLES}
FAMILIES, NODE_PORT = test_migration.FAMILIES, test_migration.NODE_PORT
CLUSTER_IP, CLUSTER_IP6 = test_migration.CLUSTER_IP.values()
CLEANUP = migration_plan.CLEANUP
HEEDS = {"key": migration.LABEL, "operator": "In", "values": ["lbproxy", "both"]}
# As kube-proxy has them, and has the one that comes second wait.
_PORTS = """
import socket, time
taken = []
for port in (10256, 10249):
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        one.bind(("", port))
        one.listen()
    except OSError:
        continue
    taken.append(one)
time.sleep(600)
"""


class KubeProxies:
    """kube-proxy on each node: its rules, which stay when it ends, and its ports, which do not."""

    def __init__(self, lab: cluster.Lab) -> None:
        self._lab = lab
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def start(self, node: str) -> None:
        self._processes[node] = self._lab.popen(node, [sys.executable, "-I", "-S", "-c", _PORTS])
        for family in FAMILIES:
            ports = test_migration.service_ports(self._lab, family, node)
            test_migration.rules(self._lab, MODES[node], family, node).start(ports)

    def ready(self, node: str) -> bool:
        return node in self._processes

    def stop(self, node: str) -> None:
        process = self._processes.pop(node)
        process.kill()
        process.wait()


class RealKubeProxies(KubeProxies):
    """kube-proxy itself; like many a DaemonSet's, its pods are ready as soon as they run."""

    def start(self, node: str) -> None:
        mode, path = MODES[node], pathlib.Path(str(test_migration.KUBE_PROXY))
        url = f"http://{self._lab['n1'].ipv4}:{agents.API_PORT}"
        argv = program.command(path, program.version(path), mode, url, node, test_migration.CLUSTER_CIDRS)
        own = [f"{one}/{128 if ':' in one else 32}" for one in self._lab[node].addresses]
        argv += ["--nodeport-addresses", ",".join(own)]
        tools = program.tools(self._lab.workdir / f"tools-{node}", mode)
        self._processes[node] = self._lab.popen(
            node, argv, cgroup=False, env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


class Agents:
    """lbproxy's agent on each node."""

    def __init__(self, by_node: dict[str, agents.Agent]) -> None:
        self._by_node = by_node

    def start(self, node: str) -> None:
        self._by_node[node].start(wait=False)

    def ready(self, node: str) -> bool:
        assert self._by_node[node].running, self._by_node[node].log
        return " ready: " in self._by_node[node].log

    def stop(self, node: str) -> None:
        self._by_node[node].stop()


class Bed(typing.NamedTuple):
    """A cluster with kube-proxy on both nodes, and the administrator's machine."""

    lab: cluster.Lab
    api: agents.Api
    kubeconfig: pathlib.Path

    def migrate(self, *arguments: str, status: int = 0) -> list[dict[str, typing.Any]]:
        """Run the command from outside, which ends with a status, and return what it says of each node."""
        argv = [*agents.LBPROXY, "migrate", "cluster", "--kubeconfig", str(self.kubeconfig), "-o", "json"]
        done = subprocess.run(
            self.lab.command("outside", [*argv, "--timeout", "60", *arguments], cgroup=False),
            text=True, capture_output=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        found: list[dict[str, typing.Any]] = json.loads(done.stdout)
        return found

    def rules(self, node: str) -> str:
        """What of kube-proxy is in force on a node."""
        # Not all that there is: nft has a warning for each rule that is of iptables.
        listed = self.lab.check_output(node, ["nft", "list", "chains"], cgroup=False)
        return "\n".join(
            line for line in listed.splitlines() if "chain KUBE-S" in line or "chain service-" in line
        )


@pytest.fixture
def bed(build_lab: LabFactory, tmp_path: pathlib.Path) -> collections.abc.Iterator[Bed]:
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(build_lab(families=FAMILIES))
        for pod in test_migration.PODS:
            lab.serve(pod)
        lab.check_output("outside", ["ip", "route", "add", CLUSTER_IP, "via", lab["n1"].ipv4])
        affinity = migration_plan.affinity_patch([{"matchExpressions": [HEEDS]}])
        ours = daemon_sets.daemon_set("lbproxy", **affinity["spec"]["template"]["spec"])
        objects = [
            *test_migration.objects(lab),
            manifests.node("n2", *lab["n2"].addresses),
            daemon_sets.daemon_set("kube-proxy"),
            ours,
        ]
        api = stack.enter_context(agents.Api(lab.netns("n1"), *objects, host=lab["n1"].ipv4))
        by_node = {
            node: agents.Agent(
                lab, api.source, *agents.SMALL_MAPS, *test_migration.FLAGS, "--take-over=when-told", node=node
            )
            for node in MODES
        }
        for agent in by_node.values():
            stack.push(agent.__exit__)
        runners: dict[str, daemon_sets.Runner] = {"kube-proxy": kube_proxies(lab), "lbproxy": Agents(by_node)}
        stack.enter_context(daemon_sets.DaemonSets(api, runners))
        yield Bed(lab, api, kubeconfig(tmp_path, api.source[1]))


def kubeconfig(folder: pathlib.Path, url: str) -> pathlib.Path:
    path = folder / "kubeconfig"
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "lab",
                "clusters": [{"name": "lab", "cluster": {"server": url}}],
                "users": [{"name": "nobody", "user": {}}],
                "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "nobody"}}],
            }
        )
    )
    return path


def talkers(bed: Bed, stack: contextlib.ExitStack) -> list[talking.Talker]:
    """Connections from pods of both nodes, from a node, and from outside to both nodes."""
    n1, n2, dns = bed.lab["n1"].ipv4, bed.lab["n2"].ipv4, manifests.UDP_PORT
    targets: dict[str, list[talking.Target]] = {
        "n1/p1": [("tcp", CLUSTER_IP, 80, 4), ("tcp", CLUSTER_IP6, 80, 2), ("udp", CLUSTER_IP, dns, 2)],
        "n2/p3": [("tcp", CLUSTER_IP, 80, 4), ("udp", CLUSTER_IP6, dns, 2), ("sendto", CLUSTER_IP, dns, 2)],
        "n2": [("tcp", CLUSTER_IP, 80, 2)],
        "outside": [("tcp", n1, NODE_PORT, 4), ("tcp", n2, NODE_PORT, 4), ("tcp", CLUSTER_IP, 80, 2)],
    }
    made = [stack.enter_context(talking.Talker(bed.lab, where, to)) for where, to in targets.items()]
    for one in made:
        first = one.ready()
        assert (first.broken, first.open) == ({}, one.count)
    return made


def test_a_cluster_goes_there_and_back(bed: Bed) -> None:
    with contextlib.ExitStack() as stack:
        kube_proxys_rules_are_there(bed)
        old = talkers(bed, stack)
        storm = [
            bed.lab.client("n1/p1", "short", CLUSTER_IP, 80, timeout_s=20, pause_s=0.01),
            bed.lab.client("outside", "short", bed.lab["n2"].ipv4, NODE_PORT, timeout_s=20, pause_s=0.01),
        ]
        there = bed.migrate("--to", "lbproxy", "--all-nodes", "--yes", "--at-once", "2")
        assert [(one["label"], one["kube_proxy"], one["lbproxy"]) for one in there] == 2 * [
            ("lbproxy", "", "ready")
        ]
        assert all("lbproxy serves; going on with kube-proxy: " in one["outcome"] for one in there)
        assert all(one["report"]["removed"] for one in there)
        assert not bed.rules("n1") + bed.rules("n2")
        test_migration.all_whole(old)
        new = talkers(bed, stack)

        back = bed.migrate("--to", "kube-proxy", "--all-nodes", status=migrate_cluster.MORE_TO_DO)
        assert all("going on with lbproxy" in one["outcome"] for one in back)
        assert [(one["label"], one["kube_proxy"], one["lbproxy"]) for one in back] == 2 * [
            ("both", "ready", "ready")
        ]
        assert bed.rules("n1")
        assert bed.rules("n2")
        last = talkers(bed, stack)
        # Whoever changes his mind: what kube-proxy leaves behind is not to serve new flows.
        again = bed.migrate("--to", "lbproxy", "--node", "n1")
        assert [(one["label"], one["kube_proxy"], one["state"]) for one in again] == [
            ("lbproxy", "", "finished")
        ]
        assert not again[0]["report"].get("returning")
        assert not bed.rules("n1")
        test_migration.all_whole([*old, *new, *last])
        bed.migrate("--to", "kube-proxy", "--node", "n1", status=migrate_cluster.MORE_TO_DO)
        gone = bed.migrate("--to", "kube-proxy", "--all-nodes", "--leave-flows")
        assert [(one["label"], one["lbproxy"], one["outcome"]) for one in gone] == 2 * [
            ("", "", f"kube-proxy serves; what lbproxy may have left in the kernel goes with {CLEANUP}")
        ]
        # The agents are gone; what they had begun the kernel goes on with.
        test_migration.all_whole([*old, *new, *last])
        results = [client.stop() for client in storm]
        assert [one.failures for one in results] == [{}] * len(results)
        assert all(one.count > 0 for one in results)
        orders = bed.api.do(
            lambda server: [
                server.store.get("nodes", ("", node))["metadata"].get("annotations") for node in MODES
            ]
        )
        assert not any(orders)


def kube_proxies(lab: cluster.Lab) -> KubeProxies:
    return RealKubeProxies(lab) if test_migration.KUBE_PROXY else KubeProxies(lab)


def kube_proxys_rules_are_there(bed: Bed) -> None:
    found = ("chain KUBE-SVC-", "chain service-")
    polling.eventually(lambda: all(any(one in bed.rules(node) for one in found) for node in MODES))
