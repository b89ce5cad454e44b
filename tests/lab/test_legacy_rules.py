"""kube-proxy's rules are in iptables-legacy, and nothing can remove them, as in the image: who says so.

The kernel's tables are real, and so are the agent and the commands; all of them find every program but
iptables and ipset.
"""

import collections.abc
import json
import os
import pathlib
import shutil
import subprocess

import msgspec
import pytest

from benchmarks.kubeproxy import load
from benchmarks.kubeproxy import model as kubeproxy
from lbproxy.core import leftovers, migration
from lbproxy.lab import apiserver, cluster, topology
from tests import polling
from tests.lab import agents, manifests, test_leftovers
from tests.lab.conftest import LabFactory

pytestmark = pytest.mark.skipif(not shutil.which("iptables-legacy"), reason="needs iptables-legacy")

TOOL = shutil.which("iptables-legacy") or ""
WHY = (
    "kube-proxy's rules of iptables-legacy stay, and a Service that is deleted stays reachable through them, "
    "since iptables-legacy-restore can not be found here"
)
LINE = f"{WHY}: {leftovers.BY_HAND}"
KEPT = "iptables-legacy, table nat: KUBE-MARK-MASQ, KUBE-POSTROUTING, since rules in PREROUTING use that"


@pytest.fixture
def lab(build_lab: LabFactory) -> collections.abc.Iterator[cluster.Lab]:
    with build_lab(nodes=1, pods=1) as built:
        restore(built)
        # Somebody else's.
        iptables(built, "-t", "nat", "-A", "PREROUTING", "-p", "udp", "-j", "KUBE-MARK-MASQ")
        yield built


@pytest.fixture
def image(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be run has no iptables."""
    for folder in os.get_exec_path():
        for program in pathlib.Path(folder).glob("*"):
            if not ("tables" in program.name or program.name == "ipset"):
                (tmp_path / program.name).unlink(missing_ok=True)
                (tmp_path / program.name).symlink_to(program)
    monkeypatch.setenv("PATH", str(tmp_path))


def iptables(lab: cluster.Lab, *arguments: str) -> None:
    lab.check_output("n1", [TOOL, *arguments], cgroup=False)


def restore(lab: cluster.Lab) -> None:
    subprocess.run(
        lab.command("n1", [f"{TOOL}-restore"], cgroup=False),
        input=test_leftovers.KUBE_PROXY, text=True, check=True, timeout=120,
    )  # fmt: skip


def run(agent: agents.Agent, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [*agents.LBPROXY, *argv, "--bpffs", str(agent.root)]
    return subprocess.run(
        agent.lab.command("n1", command, cgroup=False),
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.usefixtures("image")
def test_what_stays_of_old_rules_and_what_to_do_is_one_line_wherever_one_looks(lab: cluster.Lab) -> None:
    node = manifests.node("n1", *lab["n1"].addresses)
    with agents.Api(lab.netns("n1"), node, host="0.0.0.0") as api:
        agent = agents.Agent(lab, api.source, *agents.SMALL_MAPS, "--take-over=when-told")
        looked = run(agent, "preflight", "-o", "json", "--node-name", "n1", *api.source)
        (found,) = [one for one in json.loads(looked.stdout)["findings"] if one["check"] == "kube-proxy"]
        assert found["todo"] == f"once lbproxy serves: lbproxy migrate take-over. Then {LINE}"
        with agent:
            assert agent.says("still in force beside ours").endswith("iptables-legacy chains")
            assert agent.says(" stay, ").endswith(LINE)
            status = json.loads(run(agent, "migrate", "status", "-o", "json").stdout)
            assert status["not_removable"] == [LINE]

            dry = run(agent, "migrate", "take-over", "--dry-run")
            assert dry.returncode == 0, dry.stderr
            assert f"\n{LINE}\n" in dry.stdout
            assert "would remove: " not in dry.stdout
            assert f"would leave alone: {KEPT}\n" in dry.stdout
            done = run(agent, "migrate", "take-over")
            assert (done.returncode, said(done.stderr)) == (1, [f"lbproxy: error: {LINE}"])
            assert f"left alone: {KEPT}\n" in done.stdout
            value = json.loads(run(agent, "migrate", "take-over", "-o", "json").stdout)
            assert (value["removed"], value["kept"], value["problems"][0]) == ([], [KEPT], LINE)

            told(api, "take-over/1")
            line = agent.says("take-over/1: done")
            assert f"; {LINE}; left alone: {KEPT}" in line
            polling.eventually(lambda: "take-over/1" in answers(api), what="an answer")
            report = answers(api)["take-over/1"]
            assert (report.unable, report.kept) == ((LINE,), (KEPT,))

            cleaned = run(agent, "cleanup", "--kube-proxy")
            assert (cleaned.returncode, said(cleaned.stderr)) == (1, [f"lbproxy: error: {LINE}"])
            assert f"left alone: {KEPT}\n" in cleaned.stdout


def test_new_flows_are_left_to_rules_of_old_only_where_they_are_of_what_is_served(
    build_lab: LabFactory,
) -> None:
    with build_lab(nodes=1, pods=3) as lab:
        first, later = ([*web(lab, "n1/p2"), *others(lab)], [*web(lab, "n1/p3"), *others(lab)])
        ports = [kubeproxy.ports(objects, "n1") for objects in (first, later)]
        rules = load.Rules(
            lambda argv: lab.command("n1", argv, cgroup=False), load.Backend.LEGACY, kubeproxy.Settings()
        )
        rules.start(ports[0])
        node = manifests.node("n1", *lab["n1"].addresses)
        with (
            agents.Api(lab.netns("n1"), node, *first) as api,
            agents.Agent(lab, api.source, *agents.SMALL_MAPS) as agent,
        ):
            agent.has_backends("web", {"n1/p2"}, [("http", 4)])
            back = run(agent, "migrate", "return", "--dry-run")
            assert (back.returncode, back.stderr) == (0, "")
            # Whoever wrote these rules has gone, and the pod is another one.
            api.put(*later)
            agent.has_backends("web", {"n1/p3"}, [("http", 4)])
            back = run(agent, "migrate", "return", "--dry-run")
            assert back.returncode == 1
            assert "iptables-legacy alone, and an earlier one's: for default/web" in back.stderr
            assert "more" not in back.stderr.partition("they lead")[0]
            assert run(agent, "migrate", "return", "--dry-run", "--force").returncode == 0
            rules.change(ports[0], ports[1])
            back = run(agent, "migrate", "return", "--dry-run")
            assert (back.returncode, back.stderr) == (0, "")


def web(lab: cluster.Lab, pod: str) -> list[manifests.Object]:
    return of_ipv4("web", 1, lab[pod])


def others(lab: cluster.Lab) -> list[manifests.Object]:
    return [*of_ipv4("other", 2, lab["n1/p1"], lab["n1/p2"]), *of_ipv4("vacant", 3)]


def of_ipv4(name: str, number: int, *places: topology.Place) -> list[manifests.Object]:
    ports = [manifests.HTTP]
    address = manifests.cluster_ip(number)
    service = manifests.service(name, number, ports=ports, clusterIPs=[address], ipFamilies=["IPv4"])
    return [service, *manifests.slices(name, places, ports=ports)[:1]]


def said(text: str) -> list[str]:
    return [line for line in text.splitlines() if "legacy" in line]


def told(api: agents.Api, order: str) -> None:
    change = {"labels": {migration.LABEL: "lbproxy"}, "annotations": {migration.ANNOTATION: order}}
    api.do(lambda server: server.store.patch("nodes", ("", "n1"), {"metadata": change}))


def answers(api: agents.Api) -> dict[str, migration.Report]:
    """What the agent has said in Events, by the order."""

    def texts(server: apiserver.ApiServer) -> list[str]:
        events = [server.store.get("events", key) for key in server.store.objects["events"]]
        said = [one["metadata"].get("annotations", {}) for one in events]
        return [one[migration.REPORT] for one in said if migration.REPORT in one]

    reports = [msgspec.json.decode(text, type=migration.Report) for text in api.do(texts)]
    return {one.order: one for one in reports}
