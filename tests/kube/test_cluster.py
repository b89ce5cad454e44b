"""`lbproxy migrate cluster` against the API server stand-in: what it refuses, waits for, and says."""

import asyncio
import collections.abc
import contextlib
import io
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import typing

import msgspec
import pytest
import yaml

from lbproxy import cli as command
from lbproxy import errors
from lbproxy.core import migration, migration_plan
from lbproxy.kube import cluster, cluster_objects
from lbproxy.lab import apiserver
from lbproxy.migrate import cluster as migrate_cluster
from lbproxy.migrate import daemon_sets
from lbproxy.migrate import nodes as migrate_nodes
from tests.kube.conftest import eventually

KUBE_SYSTEM = "kube-system"
HEEDS = {"matchExpressions": [{"key": migration.LABEL, "operator": "In", "values": ["both", "lbproxy"]}]}
Object = dict[str, typing.Any]


def daemon_set(name: str, *terms: Object, **pod_spec: typing.Any) -> Object:
    if terms:
        pod_spec |= migration_plan.affinity_patch(terms)["spec"]["template"]["spec"]
    return {
        "kind": "DaemonSet",
        "metadata": {"name": name, "namespace": KUBE_SYSTEM},
        "spec": {"template": {"spec": pod_spec}},
        "status": {"observedGeneration": 9},
    }


OURS = daemon_set("lbproxy", HEEDS)
THEIRS = daemon_set("kube-proxy", nodeSelector={"kubernetes.io/os": "linux"})
STATIC = {"kind": "Pod", "metadata": {"name": "kube-proxy-n1", "namespace": KUBE_SYSTEM}}
PATCHED = daemon_set("kube-proxy", {"matchExpressions": [migration_plan.STAYS_AWAY]})


class Nodes:
    """The nodes of a stand-in, with pods and agents that do as they are told."""

    def __init__(self, server: apiserver.ApiServer, *names: str) -> None:
        self.server = server
        self.names = names
        self.become_ready = {"kube-proxy", "lbproxy"}
        self.agent: Object = {"obeys": True, "serving": True}  # what agents say of themselves
        self.pods: dict[str, Object] = {}  # what is to be seen of a DaemonSet's pods besides
        self.returning: set[str] = set()
        self.told: list[tuple[str, str, str]] = []  # a node, its label then, and the order
        for name in names:
            labels = {"kubernetes.io/os": "linux"}
            server.store.put({"kind": "Node", "metadata": {"name": name, "labels": labels}})
            self.pod("kube-proxy", name)

    def pod(self, of: str, node: str, *, there: bool = True) -> None:
        key = (KUBE_SYSTEM, f"{of}-{node}")
        if there and key not in self.server.store.objects["pods"]:
            pod = {
                "kind": "Pod",
                "metadata": {
                    "name": key[1],
                    "namespace": key[0],
                    "ownerReferences": [{"kind": "DaemonSet", "name": of}],
                },
                "spec": {"nodeName": node},
                "status": {"conditions": [{"type": "Ready", "status": str(of in self.become_ready)}]},
            }
            self.server.store.put(pod | self.pods.get(of, {}))
        elif not there and key in self.server.store.objects["pods"]:
            self.server.store.delete("pods", key)

    def node(self, name: str) -> tuple[str, str]:
        """A node's label, and what its agent is told."""
        metadata = self.server.store.get("nodes", ("", name))["metadata"]
        labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
        return labels.get(migration.LABEL, ""), annotations.get(migration.ANNOTATION, "")

    def answer(self, node: str, report: migration.Report) -> None:
        self.server.store.put(
            {
                "kind": "Event",
                "metadata": {
                    "name": f"{node}.{self.server.store.version}",
                    "namespace": "default",
                    "annotations": {migration.REPORT: msgspec.json.encode(report).decode()},
                },
                "reason": migration.REASON,
                "eventTime": f"2026-01-01T00:00:00.{self.server.store.version:06}Z",
                "regarding": {"kind": "Node", "name": node},
            }
        )

    async def obey(self) -> typing.NoReturn:
        """Start and end pods as labels say, and answer orders."""
        answered = set()
        while True:
            for name in self.names:
                if ("", name) not in self.server.store.objects["nodes"]:
                    continue
                label, order = self.node(name)
                self.pod("kube-proxy", name, there=label != "lbproxy")
                self.pod("lbproxy", name, there=label in ("both", "lbproxy"))
                if order and order not in answered:
                    answered.add(order)
                    self.told.append((name, label, order.partition("/")[0]))
                    match migration.step(order):
                        case migration.Step.RETURN:
                            self.returning.add(name)
                        case migration.Step.RESUME | migration.Step.TAKE_OVER:
                            self.returning.discard(name)
                    self.answer(name, migration.Report(order, returning=name in self.returning, **self.agent))
            await asyncio.sleep(0.01)


class Run(typing.NamedTuple):
    """What a run of the command came to."""

    status: int
    out: str
    err: str


@pytest.fixture
def kubeconfig(server: apiserver.ApiServer, tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "kubeconfig"
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": server.url}}],
        "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def run(
    kubeconfig: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> collections.abc.Callable[..., collections.abc.Awaitable[Run]]:
    # The stand-in has nobody to spare.
    monkeypatch.setattr(migrate_nodes, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(migrate_nodes, "LONGEST_PAUSE_S", 0.05)

    async def run(*arguments: str) -> Run:
        argv = ["migrate", "cluster", "--kubeconfig", str(kubeconfig), *arguments]
        if "--to" in arguments and "--timeout" not in arguments:
            argv += ["--timeout", "30"]
        status = await asyncio.to_thread(command.main, argv)
        return Run(status, *capsys.readouterr())

    return run


Runner = collections.abc.Callable[..., collections.abc.Awaitable[Run]]


@contextlib.asynccontextmanager
async def alive(nodes: Nodes) -> collections.abc.AsyncIterator[None]:
    task = asyncio.create_task(nodes.obey())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def changes(server: apiserver.ApiServer) -> list[apiserver.Request]:
    return [one for one in server.requests if one.method not in ("GET", "POST")]


async def test_there_and_again_from_where_it_was(server: apiserver.ApiServer, run: Runner) -> None:
    nodes = Nodes(server, "n1", "n2")
    server.store.put(OURS)
    server.store.put(PATCHED)
    async with alive(nodes):
        first = await run("--to", "lbproxy", "--node", "n1", "-o", "json")
        assert first.status == 0, first.err
        assert [one["node"] for one in json.loads(first.out)] == ["n1"]
        assert (nodes.node("n1"), nodes.node("n2")) == (("lbproxy", ""), ("", ""))
        server.requests.clear()
        second = await run("--to", "lbproxy", "--all-nodes")
        assert second.status == 0, second.err
        assert "[2/2] n2: label lbproxy.io/proxy=both" in second.err
        assert "[1/2] n1: label" not in second.err
        assert (await run("--to", "kube-proxy", "--all-nodes")).status == 0
        assert (nodes.node("n1"), nodes.node("n2")) == (("", ""), ("", ""))


async def test_nodes_that_are_not_for_kube_proxy_are_left_alone(
    server: apiserver.ApiServer, run: Runner
) -> None:
    nodes = Nodes(server, "n1")
    server.store.put({"kind": "Node", "metadata": {"name": "w1", "labels": {"kubernetes.io/os": "windows"}}})
    server.store.put(OURS)
    server.store.put(THEIRS)
    async with alive(nodes):
        done = await run("--to", "lbproxy", "--all-nodes", "--yes", "-o", "json")
    assert done.status == 0, done.err
    assert "does not run on w1: left alone" in done.err
    assert [one["node"] for one in json.loads(done.out)] == ["n1"]
    assert nodes.node("w1") == ("", "")
    alone = await run("--to", "lbproxy", "--node", "w1")
    assert (alone.status, "does not run on w1, whatever its label" in alone.err) == (1, True)


async def test_a_node_that_does_not_get_on_stops_it_and_the_next_run_goes_on(
    server: apiserver.ApiServer, run: Runner
) -> None:
    nodes = Nodes(server, "n1", "n2")
    server.store.put(OURS)
    server.store.put(PATCHED)
    stopped = await run("--to", "lbproxy", "--all-nodes", "--timeout", "1", "-o", "json")
    assert stopped.status == 1
    assert "error: n1: not within 1 s: there is a pod of lbproxy" in stopped.err
    assert "lbproxy migrate cluster --to kube-proxy --node n1 --without-agent" in stopped.err
    assert json.loads(stopped.out)[0]["state"] == "stopped"
    assert json.loads(stopped.out)[0]["outcome"].startswith("stopped: not within 1 s")
    assert (nodes.node("n1"), nodes.node("n2")) == (("both", ""), ("", ""))
    async with alive(nodes):
        assert (await run("--to", "lbproxy", "--all-nodes")).status == 0
    assert (nodes.node("n1"), nodes.node("n2")) == (("lbproxy", ""), ("lbproxy", ""))


async def test_an_agent_that_is_not_to_obey_is_told_of_before_kube_proxy_leaves(
    server: apiserver.ApiServer, run: Runner
) -> None:
    nodes = Nodes(server, "n1")
    nodes.agent["obeys"] = False
    server.store.put(OURS)
    server.store.put(PATCHED)
    async with alive(nodes):
        done = await run("--to", "lbproxy", "--all-nodes")
        assert (done.status, nodes.node("n1")) == (1, ("both", ""))
        assert "kube-proxy stays: this agent is told `takeOver: never`" in done.err
        # Nor does it obey on the way back.
        back = await follow(run, done)
    assert (back.status, nodes.node("n1")) == (migrate_cluster.MORE_TO_DO, ("", ""))


async def follow(run: Runner, stopped: Run) -> Run:
    """Do what a run that has stopped says that one can do."""
    match = re.search(r"or: lbproxy migrate cluster (.*)$", stopped.err, re.MULTILINE)
    assert match is not None, stopped.err
    return await run(*shlex.split(match[1]), "-o", "json")


@pytest.mark.parametrize("to", ["lbproxy", "kube-proxy"])
async def test_where_lbproxys_pod_is_not_ready_the_way_out_that_is_named_leads_out(
    server: apiserver.ApiServer, run: Runner, to: str
) -> None:
    nodes = Nodes(server, "n1")
    nodes.become_ready.remove("lbproxy")
    server.store.put(OURS)
    server.store.put(PATCHED)
    server.store.patch("nodes", ("", "n1"), {"metadata": {"labels": {migration.LABEL: "both"}}})
    async with alive(nodes):
        stopped = await run("--to", to, "--all-nodes", "--timeout", "1")
        assert stopped.status == 1
        gone = await follow(run, stopped)
    assert (gone.status, nodes.node("n1"), nodes.told) == (migrate_cluster.MORE_TO_DO, ("", ""), [])
    assert json.loads(gone.out)[0]["state"] == "cleanup-left"
    assert migration_plan.CLEANUP in gone.err


def not_scheduled(node: str) -> Object:
    """A DaemonSet's pod that no node has room for: only its affinity says which one it is for."""
    field = {"key": "metadata.name", "operator": "In", "values": [node]}
    refused = {"type": "PodScheduled", "status": "False", "message": "1 node(s) didn't have free ports"}
    required = migration_plan.affinity_patch([{"matchFields": [field]}])["spec"]["template"]["spec"]
    return {"spec": required, "status": {"conditions": [refused]}}


def held_up(**container: Object) -> Object:
    """The status of a pod, one of whose containers does not run."""
    fine: Object = {"state": {"running": {}}}
    return {"status": {"initContainerStatuses": [fine], "containerStatuses": [fine, container]}}


@pytest.mark.parametrize(
    ("pod", "said"),
    [
        (
            held_up(state={"waiting": {"reason": "ErrImagePull", "message": "not found"}}),
            "lbproxy's pod lbproxy-n1 is ready (ErrImagePull: not found). Whoever",
        ),
        (
            held_up(
                state={"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}},
                lastState={"terminated": {"exitCode": 3}},
            ),
            "lbproxy's pod lbproxy-n1 is ready (CrashLoopBackOff, last exit status 3). Whoever",
        ),
        (held_up(state={"waiting": {"reason": "ContainerCreating"}}), "pod lbproxy-n1 is ready. Whoever"),
        (
            not_scheduled("n1"),
            "a pod of lbproxy. Its pod lbproxy-n1 is not scheduled: 1 node(s) didn't have free ports",
        ),
        (not_scheduled("n2"), "there is a pod of lbproxy. Whoever"),
    ],
)
async def test_why_a_pod_does_not_start_is_said(
    server: apiserver.ApiServer, run: Runner, pod: Object, said: str
) -> None:
    nodes = Nodes(server, "n1")
    nodes.pods["lbproxy"] = {"spec": {"nodeName": "n1"}} | pod
    server.store.put(OURS)
    server.store.put(PATCHED)
    async with alive(nodes):
        done = await run("--to", "lbproxy", "--all-nodes", "--timeout", "1")
        assert (done.status, said in done.err) == (1, True), done.err
        shown = json.loads((await run("-o", "json")).out)[0]["not_ready"]
        why = said.partition("(")[2].partition(").")[0] if "pod lbproxy-n1 is ready (" in said else ""
        assert shown == ({"lbproxy": why} if why else {})
        assert why in (await run()).out


async def test_whoever_looks_is_told_where_kube_proxy_may_come_back_and_which_orders_stand(
    server: apiserver.ApiServer, run: Runner
) -> None:
    nodes = Nodes(server, "n1", "n2")
    server.store.put(OURS)
    server.store.put(PATCHED)
    async with alive(nodes):
        assert (await run("--to", "lbproxy", "--node", "n1")).status == 0
        assert (await run()).err == ""
        server.store.put(THEIRS)
        change = {"metadata": {"annotations": {migration.ANNOTATION: "status/killed"}}}
        server.store.patch("nodes", ("", "n2"), change)
        looked = await run()
        assert looked.status == 0
        assert "kube-system/kube-proxy does not keep away from n1, which lbproxy serves" in looked.err
        assert "n2: the order status/killed stands" in looked.err
        advice = looked.err.partition("lbproxy migrate cluster ")[2].partition(" puts that right")[0]
        assert (await run(*advice.split(), "--yes")).status == 0
        assert "does not keep away" not in (await run()).err


async def test_a_node_that_was_given_back_begins_flows_again_before_kube_proxy_leaves(
    server: apiserver.ApiServer, run: Runner
) -> None:
    nodes = Nodes(server, "n1")
    nodes.agent["flows_of_lbproxy"] = {"TCP": 1}
    server.store.put(OURS)
    server.store.put(PATCHED)
    server.store.patch("nodes", ("", "n1"), {"metadata": {"labels": {migration.LABEL: "both"}}})
    async with alive(nodes):
        back = await run("--to", "kube-proxy", "--all-nodes", "-o", "json")
        assert back.status == migrate_cluster.MORE_TO_DO
        assert json.loads(back.out)[0]["state"] == "flows-left"
        assert (await run("--to", "lbproxy", "--all-nodes")).status == 0
    assert nodes.told == [
        ("n1", "both", "return"),
        ("n1", "both", "status"),
        ("n1", "both", "resume"),
        ("n1", "lbproxy", "take-over"),
    ]


async def test_rules_that_stay_are_a_state_and_a_status_of_their_own(
    server: apiserver.ApiServer, run: Runner
) -> None:
    nodes = Nodes(server, "n1")
    nodes.agent["unable"] = ("kube-proxy's rules of iptables-legacy stay: reboot the node",)
    nodes.agent["kept"] = ("KUBE-MARK-MASQ, since rules in MINE use that",)
    server.store.put(OURS)
    server.store.put(PATCHED)
    async with alive(nodes):
        done = await run("--to", "lbproxy", "--all-nodes", "-o", "json")
    assert (done.status, json.loads(done.out)[0]["state"]) == (migrate_cluster.MORE_TO_DO, "rules-stay")
    assert "; left alone: KUBE-MARK-MASQ, since rules in MINE use that; kube-proxy's rules of" in done.err
    assert "iptables-legacy stay: reboot the node\n" in done.err


async def test_who_does_not_answer_may_write_no_events(server: apiserver.ApiServer, run: Runner) -> None:
    nodes = Nodes(server, "n1")
    server.store.put(OURS)
    server.store.put(PATCHED)
    server.store.patch("nodes", ("", "n1"), {"metadata": {"labels": {migration.LABEL: "both"}}})
    nodes.pod("lbproxy", "n1")
    done = await run("--to", "lbproxy", "--all-nodes", "--timeout", "1")
    assert (done.status, nodes.node("n1")) == (1, ("both", ""))
    assert ". An agent with `events: false` (--events=false) writes none. " in done.err


async def test_a_node_that_is_deleted_meanwhile_stops_nothing(
    server: apiserver.ApiServer, run: Runner
) -> None:
    nodes = Nodes(server, "n1", "n2")
    server.store.put(OURS)
    server.store.put(PATCHED)
    running = asyncio.ensure_future(run("--to", "lbproxy", "--all-nodes", "-o", "json"))
    await eventually(lambda: nodes.node("n1")[0] == "both")
    server.store.delete("nodes", ("", "n1"))
    async with alive(nodes):
        done = await running
    assert done.status == 0, done.err
    assert [(one["node"], one["state"]) for one in json.loads(done.out)] == [
        ("n1", "gone"),
        ("n2", "finished"),
    ]


async def test_a_node_that_is_not_ready_is_named_and_can_be_left_out(
    server: apiserver.ApiServer, run: Runner
) -> None:
    nodes = Nodes(server, "n1", "n2")
    server.store.put(OURS)
    server.store.put(PATCHED)
    lost = {"conditions": [{"type": "Ready", "status": "Unknown"}]}
    server.store.patch("nodes", ("", "n1"), {"status": lost})
    stopped = await run("--to", "lbproxy", "--all-nodes", "--timeout", "1")
    assert "not Ready: n1; it will stop there. --except n1" in stopped.err
    assert "The node is not Ready; --all-nodes --except n1 leaves it as it is" in stopped.err
    async with alive(nodes):
        done = await run("--to", "lbproxy", "--all-nodes", "--except", "n1")
    assert (done.status, nodes.node("n2")) == (0, ("lbproxy", ""))


async def test_a_list_whose_pages_are_forgotten_is_read_anew(
    server: apiserver.ApiServer, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    Nodes(server, "n1", "n2", "n3")
    monkeypatch.setattr(cluster, "_PAGE", 2)
    server.faults.gone_continues = 1
    shown = await run("-o", "json")
    assert [one["node"] for one in json.loads(shown.out)] == ["n1", "n2", "n3"]
    assert not server.faults.gone_continues
    server.faults.gone_continues = 100
    assert "410" in (await run()).err


async def test_two_commands_at_once_are_noticed(server: apiserver.ApiServer, run: Runner) -> None:
    nodes = Nodes(server, "n1", "n2")
    server.store.put(OURS)
    server.store.put(PATCHED)
    server.store.patch("nodes", ("", "n1"), {"metadata": {"annotations": {migration.ANNOTATION: "status/x"}}})
    async with alive(nodes):
        running = asyncio.ensure_future(run("--to", "lbproxy", "--all-nodes", "-o", "json"))
        await eventually(lambda: nodes.node("n2")[0] == "both")
        server.store.patch("nodes", ("", "n1"), {"metadata": {"labels": {migration.LABEL: "both"}}})
        done = await running
    assert "[1/2] n1: an order that is not of this run is taken back: status/x" in done.err
    assert (done.status, [one["state"] for one in json.loads(done.out)]) == (1, ["contradicted", "finished"])
    assert "n1: lbproxy.io/proxy is both, which is not of this run" in done.err


async def test_kube_proxys_daemon_set_that_is_written_anew_is_noticed_on_the_way(
    server: apiserver.ApiServer, run: Runner
) -> None:
    nodes = Nodes(server, "n1")
    server.store.put(OURS)
    server.store.put(PATCHED)
    running = asyncio.ensure_future(run("--to", "lbproxy", "--all-nodes"))
    await eventually(lambda: nodes.node("n1")[0] == "both")
    server.store.put(THEIRS)
    async with alive(nodes):
        done = await running
    assert (done.status, nodes.node("n1")) == (1, ("both", ""))
    assert "does not keep away from lbproxy's nodes any more" in done.err


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_whatever_interrupts_it_its_orders_are_taken_back(
    server: apiserver.ApiServer, kubeconfig: pathlib.Path, number: signal.Signals, refused: bool
) -> None:
    nodes = Nodes(server, "n1", "n2")
    server.store.put(OURS)
    server.store.put(PATCHED)
    server.store.patch("nodes", ("", "n1"), {"metadata": {"labels": {migration.LABEL: "both"}}})
    nodes.pod("lbproxy", "n1")
    # Whoever runs the tests may ignore some of them.
    argv = ["env", "--default-signal", sys.executable, "-m", "lbproxy", "migrate", "cluster"]
    flags = ["--to", "lbproxy", "--all-nodes", "--kubeconfig", str(kubeconfig)]
    process = await asyncio.create_subprocess_exec(
        *argv, *flags, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    await eventually(lambda: nodes.node("n1")[1])
    order, server.faults.delay_s = nodes.node("n1")[1], 0.3
    before = len(changes(server))
    if refused:
        # Only what takes them back: a look that fails would end it before the signal does.
        server.faults.fail, server.faults.fail_status, server.faults.fail_method = 1000, 403, "PATCH"
    process.send_signal(number)
    # Whoever does not want to wait for that.
    await eventually(lambda: len(changes(server)) > before)
    process.send_signal(number)
    out, said = await process.communicate()
    assert (process.returncode, out) == (128 + number, b"")
    assert nodes.node("n1") == ("both", order if refused else "")
    lines = said.decode().splitlines()
    assert lines[-1] == (
        f"lbproxy: interrupted by {number.name}: n1: lbproxy.io/proxy=both: both may run, and whoever began "
        f"a connection serves it.{'' if refused else ' Its orders are taken back.'} The same command goes on "
        "there"
    )
    stands = "its order stands: kubectl annotate node n1 lbproxy.io/migrate-"
    assert any(line.endswith(stands) for line in lines) == refused


def test_an_interruption_before_anything_is_done_says_so(
    kubeconfig: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: migrate_cluster.Migration) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(migrate_cluster.Migration, "run", interrupted)
    assert command.main(["migrate", "cluster", "--kubeconfig", str(kubeconfig)]) == 130
    assert capsys.readouterr().err == "lbproxy: interrupted by SIGINT: no node was touched\n"


@pytest.mark.parametrize(
    ("objects", "said"),
    [
        ((OURS,), "k3s"),
        (
            (OURS, {"kind": "Pod", "metadata": {"name": "kube-proxy-x", "namespace": KUBE_SYSTEM}}),
            "static pods",
        ),
        ((THEIRS,), "deploy/kustomize/overlays/migrate"),
        ((THEIRS, daemon_set("lbproxy")), "runs on nodes without the label"),
        ((THEIRS, daemon_set("lbproxy", HEEDS, nodeSelector={"no": "where"})), "would not run on n1"),
        ((OURS, daemon_set("kube-proxy", nodeSelector={"no": "where"})), "does not run on n1"),
    ],
)
async def test_what_stands_in_the_way_is_said_before_anything_is_changed(
    server: apiserver.ApiServer, run: Runner, objects: tuple[Object, ...], said: str
) -> None:
    server.store.put({"kind": "Node", "metadata": {"name": "n1", "labels": {"kubernetes.io/os": "linux"}}})
    for found in objects:
        server.store.put(found)
    done = await run("--to", "lbproxy", "--all-nodes", "--yes")
    assert done.status == 1
    assert said in done.err
    assert not changes(server)


Ask = collections.abc.Callable[[str], str]


@pytest.fixture
def asking(kubeconfig: pathlib.Path) -> collections.abc.Callable[..., collections.abc.Awaitable[int]]:
    """Run the command with somebody who answers, and a clock of his."""

    async def run(ask: Ask, waiting: daemon_sets.Waiting | None = None) -> int:
        flags = ["--kubeconfig", str(kubeconfig), "--to", "lbproxy", "--all-nodes", "--timeout", "5"]
        args = command._parsers()[0].parse_args(["migrate", "cluster", *flags])
        api = await asyncio.to_thread(cluster.connect, str(kubeconfig), "")
        migrating = migrate_cluster.Migration(args, api, waiting=waiting, ask=ask)
        return await asyncio.to_thread(migrating.run)

    return run


Asking = collections.abc.Callable[..., collections.abc.Awaitable[int]]


async def test_kube_proxys_daemon_set_is_changed_only_if_one_says_yes(
    server: apiserver.ApiServer, run: Runner, asking: Asking, capsys: pytest.CaptureFixture[str]
) -> None:
    Nodes(server, "n1")
    server.store.put(OURS)
    server.store.put(THEIRS)
    for answer in ("", "n", "no"):
        asked: list[str] = []

        def say(question: str, answer: str = answer, asked: list[str] = asked) -> str:
            asked.append(question)
            return answer

        with pytest.raises(errors.AgentError, match="nothing was changed"):
            await asking(say)
        assert asked
    assert not changes(server)
    assert "+     operator: NotIn" in capsys.readouterr().err
    await run("--to", "lbproxy", "--all-nodes", "--timeout", "1", "--yes")
    spec = server.store.get("daemonsets", (KUBE_SYSTEM, "kube-proxy"))["spec"]["template"]["spec"]
    assert spec["nodeSelector"] == {"kubernetes.io/os": "linux"}
    assert migration_plan.terms(spec) == [{"matchExpressions": [migration_plan.STAYS_AWAY]}]


async def test_the_question_is_not_part_of_the_result(
    server: apiserver.ApiServer, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    Nodes(server, "n1")
    server.store.put(OURS)
    server.store.put(THEIRS)
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    done = await run("--to", "lbproxy", "--all-nodes", "-o", "json")
    assert (done.status, done.out) == (1, "")
    assert "change it? [y/N] " in done.err
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    unanswered = await run("--to", "lbproxy", "--all-nodes")
    assert (unanswered.status, unanswered.out) == (1, "")
    assert "change it? [y/N] \nlbproxy: error: nothing was changed" in unanswered.err
    assert not changes(server)


async def test_what_is_changed_is_what_was_shown(server: apiserver.ApiServer, asking: Asking) -> None:
    nodes = Nodes(server, "n1")
    server.store.put(OURS)
    server.store.put(THEIRS)
    key = (KUBE_SYSTEM, "kube-proxy")

    def meanwhile(change: Object) -> Ask:
        def answer(_: str) -> str:
            server.store.patch("daemonsets", key, change)
            return "y"

        return answer

    other = {"spec": {"template": {"spec": {"nodeSelector": {"a": "b"}}}}}
    with pytest.raises(
        errors.AgentError, match="somebody has changed DaemonSet kube-system/kube-proxy meanwhile"
    ):
        await asking(meanwhile(other))
    assert not changes(server)
    server.store.put(THEIRS)
    # That its controller has written its status is no change of it.
    async with alive(nodes):
        assert await asking(meanwhile({"status": {"observedGeneration": 8}})) == 0


async def test_a_rollout_has_time_for_each_step_of_it(server: apiserver.ApiServer, asking: Asking) -> None:
    Nodes(server, "n1")
    server.store.put(OURS)
    server.store.put(THEIRS)
    key, now_s, steps = (KUBE_SYSTEM, "kube-proxy"), 0.0, 0

    def sleep(pause_s: float) -> None:
        nonlocal now_s, steps
        now_s += pause_s
        if now_s > 4 * (steps + 1) and steps < 5:
            steps += 1
            status = {"desiredNumberScheduled": 9, "updatedNumberScheduled": steps}
            server.store.patch("daemonsets", key, {"status": status})

    server.store.patch("daemonsets", key, {"status": {"desiredNumberScheduled": 9}})
    waiting = daemon_sets.Waiting(lambda: now_s, sleep)
    with pytest.raises(errors.AgentError, match="no progress for 5 s: the change of kube-proxy's DaemonSet"):
        await asking(lambda _: "y", waiting)
    # Five steps in twenty seconds, none of which took five, and then none for so long.
    assert (steps, 25 <= now_s < 32) == (5, True)


async def test_somebody_elses_change_of_a_daemon_set_is_not_undone(
    server: apiserver.ApiServer, kubeconfig: pathlib.Path
) -> None:
    server.store.put(THEIRS)
    api = await asyncio.to_thread(cluster.connect, str(kubeconfig), "")
    seen = await asyncio.to_thread(api.daemon_set, KUBE_SYSTEM, "kube-proxy")
    assert seen is not None
    server.store.put(PATCHED)
    with pytest.raises(cluster.ApiError, match="409") as caught:
        await asyncio.to_thread(
            api.patch_daemon_set, KUBE_SYSTEM, seen, migration_plan.affinity_patch([HEEDS])
        )
    assert caught.value.passes


async def test_looking_and_a_dry_run_change_nothing(server: apiserver.ApiServer, run: Runner) -> None:
    nodes = Nodes(server, "n1", "n2")
    server.store.put(OURS)
    server.store.put(THEIRS)
    nodes.answer("n2", migration.Report("status", serving=True, flows_of_kube_proxy={"TCP": 5}))
    foreseen = await run("--to", "lbproxy", "--all-nodes", "--dry-run")
    assert foreseen.status == 0
    assert "+     operator: NotIn" in foreseen.out
    assert "[2/2] n2: lbproxy.io/proxy=(none): would go to lbproxy" in foreseen.out
    said = json.loads((await run("--to", "lbproxy", "--all-nodes", "--dry-run", "-o", "json")).out)
    assert said["node_selector_terms"] == [{"matchExpressions": [migration_plan.STAYS_AWAY]}]
    assert said["nodes"][1] == {"node": "n2", "label": "", "would": "would go to lbproxy"}
    shown = await run()
    assert shown.status == 0
    assert "going on with kube-proxy: 5 TCP" in shown.out
    assert not changes(server)


async def test_a_name_that_no_daemon_set_has_is_said(server: apiserver.ApiServer, run: Runner) -> None:
    Nodes(server, "n1")
    server.store.put(OURS)
    server.store.put(THEIRS)
    shown = await run("--kube-proxy", "kube-system/proxy", "--lbproxy", "elsewhere/lbproxy")
    assert shown.status == 0
    assert "pods in kube-system are of no DaemonSet proxy" in shown.err
    assert "there is no DaemonSet elsewhere/lbproxy" in shown.err


def documented() -> list[Object]:
    page = (pathlib.Path(__file__).parents[2] / "docs/migration.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    return list(yaml.safe_load_all(block))


async def test_the_rights_in_the_docs_are_those_that_are_used_and_asked_for(
    server: apiserver.ApiServer, run: Runner
) -> None:
    nodes = Nodes(server, "n1")
    server.store.put(OURS)
    server.store.put(THEIRS)
    async with alive(nodes):
        assert (await run("--to", "lbproxy", "--all-nodes", "--yes")).status == 0
        assert (await run("--to", "kube-proxy", "--all-nodes")).status == 0
    used = set()
    for request in server.requests:
        if request.method == "POST":
            continue  # what one may do everybody may ask
        match = re.fullmatch(
            r"/(?:api|apis/([^/]+))/v1/(?:namespaces/([^/]+)/)?(\w+)(?:/([^/]+))?", request.path
        )
        assert match is not None, request.path
        group, namespace, resource, name = (one or "" for one in match.groups())
        verb = "patch" if request.method == "PATCH" else "get" if name else "list"
        used.add(cluster.Right(group, resource, verb, namespace, name if namespace else ""))
    objects = documented()
    allowed = {
        cluster.Right(group, resource, verb, one["metadata"].get("namespace", ""), name)
        for one in objects
        for rule in one.get("rules", ())
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for name in rule.get("resourceNames", [""])
    }
    assert allowed == used
    args = command._parsers()[0].parse_args(["migrate", "cluster"])
    assert allowed == {*migrate_cluster.rights(args), migrate_cluster.patching(args)}
    roles = [(one["kind"], one["metadata"]) for one in objects if "rules" in one]
    bound = [one for one in objects if "roleRef" in one]
    assert [
        (one["roleRef"]["kind"], {**one["metadata"], "name": one["roleRef"]["name"]}) for one in bound
    ] == roles


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
async def test_a_right_that_is_missing_is_named_before_anything_is_changed(
    server: apiserver.ApiServer, run: Runner, dry_run: tuple[str, ...]
) -> None:
    Nodes(server, "n1")
    server.store.put(OURS)
    server.store.put(THEIRS)
    server.denied = {("apps", "daemonsets", "patch")}
    done = await run("--to", "lbproxy", "--all-nodes", "--yes", *dry_run)
    assert (done.status, done.out) == (1, "")
    assert "for want of the right to patch daemonsets.apps kube-proxy in kube-system" in done.err
    server.denied = {("", "nodes", "patch"), ("events.k8s.io", "events", "list")}
    done = await run("--to", "lbproxy", "--all-nodes", "--yes", *dry_run)
    assert "right to patch nodes, to list events.events.k8s.io in default; docs/migration.md" in done.err
    assert not changes(server)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "lbproxy"), "say which nodes"),
        (("--all-nodes",), "which way"),
        (("--to", "lbproxy", "--all-nodes", "--node", "n1"), "one of them"),
        (("--to", "elsewhere", "--all-nodes"), "invalid choice"),
        (("--to", "lbproxy", "--node", "n9"), "there is no such node"),
        (("--to", "lbproxy", "--all-nodes", "--except", "n9"), "--except n9: there is no such node"),
        (("--to", "lbproxy", "--node", "n1", "--except", "n1"), "--except: only with --all-nodes"),
        (("--to", "lbproxy", "--all-nodes", "--leave-flows"), "--leave-flows: only with --to kube-proxy"),
        (("--to", "lbproxy", "--all-nodes", "--without-agent"), "--without-agent: only with --to kube-proxy"),
        (("--to", "lbproxy", "--all-nodes", "--force"), "--force: only for a node"),
        (("--dry-run",), "--dry-run: only with --to"),
        (("--kube-proxy", "x"), "is not NAMESPACE/NAME"),
        (("--at-once", "0"), "is not a number from 1 to 100"),
        (("--kubeconfig", "/none"), "No such file"),
        (("--context", "there"), "there"),
    ],
)
async def test_wrong_flags_are_two(
    server: apiserver.ApiServer, run: Runner, arguments: tuple[str, ...], said: str
) -> None:
    Nodes(server, "n1")
    done = await run(*arguments)
    assert (done.status, said in done.err) == (2, True), done.err
    assert not changes(server)


def test_flags_of_a_cluster_are_not_for_a_node(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["migrate", "take-over", "--to", "lbproxy", "--yes"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2:] for line in said] == [
        ["--to", "only for lbproxy migrate cluster"],
        ["--yes", "only for lbproxy migrate cluster"],
    ]


async def test_without_the_official_client_it_is_said_how_to_get_it(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    done = await run()
    assert done.status == 2
    assert "pip install '.[migrate]' in a checkout of lbproxy" in done.err


def test_help_of_a_cluster_is_of_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for argv in (["cluster", "--help"], ["--help"], ["take-over", "-h"]):
        with pytest.raises(SystemExit) as ended:
            command.main(["migrate", *argv])
        assert ended.value.code == 0
        shown[" ".join(argv)] = capsys.readouterr().out
    assert shown["cluster --help"].startswith("usage: lbproxy migrate cluster ")
    assert "--without-agent" in shown["cluster --help"]
    assert "--force" not in shown["cluster --help"]
    assert shown["--help"] == shown["take-over -h"]
    assert "--kubeconfig" not in shown["--help"]


def test_an_exec_plugin_that_is_not_there_is_one_line(
    kubeconfig: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(kubeconfig.read_text())
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": "no-such-plugin", "args": []}
    content["users"][0]["user"] = {"exec": {**plugin, "interactiveMode": "Never"}}
    kubeconfig.write_text(yaml.safe_dump(content))
    assert command.main(["migrate", "cluster", "--kubeconfig", str(kubeconfig)]) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith(f"lbproxy: error: {kubeconfig}: credentials: ")
    assert "no-such-plugin" in said


async def test_the_default_kubeconfig_is_kubectls(
    server: apiserver.ApiServer, kubeconfig: pathlib.Path
) -> None:
    Nodes(server, "n1")
    argv = [sys.executable, "-m", "lbproxy", "migrate", "cluster", "-o", "json"]
    process = await asyncio.create_subprocess_exec(
        *argv, env={**os.environ, "KUBECONFIG": f"/none{os.pathsep}{kubeconfig}"}, stdout=subprocess.PIPE
    )
    told, _ = await process.communicate()
    assert [one["node"] for one in json.loads(told)] == ["n1"]


def test_a_kubeconfig_that_the_environment_names_wrongly_is_named() -> None:
    argv = [sys.executable, "-m", "lbproxy", "migrate", "cluster"]
    done = subprocess.run(
        argv, env={**os.environ, "KUBECONFIG": "/nope"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (
        2, "lbproxy: error: no kubeconfig: /nope is not there; --kubeconfig or $KUBECONFIG names one\n"
    )  # fmt: skip


def test_pods_are_known_by_their_owners_name_or_where_they_have_none_by_their_labels() -> None:
    def pod(node: str, labels: dict[str, str], *owners: cluster_objects.Owner) -> cluster_objects.Pod:
        metadata = cluster_objects.Meta(f"pod-{node}", labels=labels, owner_references=list(owners) or None)
        return cluster_objects.Pod(metadata, cluster_objects.PodSpec(node))

    ours, labels = cluster_objects.Owner("DaemonSet", "kube-proxy"), {"k8s-app": "kube-proxy"}
    pods = [
        pod("n1", {}, ours),
        pod("n2", {**labels, "more": "1"}),  # its owner was deleted, and made anew
        pod("n3", labels, cluster_objects.Owner("Node", "n3")),
        pod("n4", labels, cluster_objects.Owner("DaemonSet", "other")),
        pod("n5", {"k8s-app": "other"}),
    ]
    spec = {"selector": {"matchLabels": labels}}
    found = msgspec.convert({"metadata": {"name": "kube-proxy"}, "spec": spec}, cluster_objects.DaemonSet)
    assert list(cluster.owned_by("kube-proxy", found, pods)) == ["n1", "n2"]
    assert list(cluster.owned_by("kube-proxy", None, pods)) == ["n1"]


async def test_a_right_that_is_missing_is_named(server: apiserver.ApiServer, run: Runner) -> None:
    Nodes(server, "n1")
    server.faults.fail, server.faults.fail_status, server.faults.fail_message = 1, 403, "no list for you"
    done = await run()
    assert done.status == 1
    assert "cannot list nodes: 403 Forbidden: no list for you; docs/migration.md has the rights" in done.err


async def test_a_server_that_is_away_for_a_moment_is_waited_for(
    server: apiserver.ApiServer, run: Runner
) -> None:
    nodes = Nodes(server, "n1")
    server.store.put(OURS)
    server.store.put(PATCHED)
    running = asyncio.ensure_future(run("--to", "lbproxy", "--all-nodes"))
    await eventually(lambda: nodes.node("n1")[0] == "both")
    server.faults.fail = 3
    await eventually(lambda: not server.faults.fail)
    async with alive(nodes):
        done = await running
    assert done.status == 0, done.err
    assert "injected failure" in done.err
    assert nodes.node("n1") == ("lbproxy", "")
