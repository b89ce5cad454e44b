"""`lbproxy migrate cluster` against the API server stand-in: what it refuses, waits for, and says."""

import asyncio
import collections.abc
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import typing

import msgspec
import pytest
import yaml

from lbproxy import __main__ as command
from lbproxy import errors, migrate_cluster
from lbproxy.core import migration, migration_plan
from lbproxy.kube import cluster
from lbproxy.lab import apiserver
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
        for name in names:
            labels = {"kubernetes.io/os": "linux"}
            server.store.put({"kind": "Node", "metadata": {"name": name, "labels": labels}})
            self.pod("kube-proxy", name)

    def pod(self, of: str, node: str, *, there: bool = True) -> None:
        key = (KUBE_SYSTEM, f"{of}-{node}")
        if there and key not in self.server.store.objects["pods"]:
            self.server.store.put(
                {
                    "kind": "Pod",
                    "metadata": {
                        "name": key[1],
                        "namespace": key[0],
                        "ownerReferences": [{"uid": f"uid-daemonsets-{KUBE_SYSTEM}-{of}"}],
                    },
                    "spec": {"nodeName": node},
                    "status": {"conditions": [{"type": "Ready", "status": "True"}]},
                }
            )
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
                label, order = self.node(name)
                self.pod("kube-proxy", name, there=label != "lbproxy")
                self.pod("lbproxy", name, there=label in ("both", "lbproxy"))
                if order and order not in answered:
                    answered.add(order)
                    self.answer(name, migration.Report(order, serving=True))
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
    kubeconfig: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> collections.abc.Callable[..., collections.abc.Awaitable[Run]]:
    async def run(*arguments: str) -> Run:
        argv = ["migrate", "cluster", "--kubeconfig", str(kubeconfig), *arguments]
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
    return [one for one in server.requests if one.method != "GET"]


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
    assert "lbproxy migrate cluster --to kube-proxy --node n1" in stopped.err
    assert json.loads(stopped.out)[0]["outcome"].startswith("stopped: not within 1 s")
    assert (nodes.node("n1"), nodes.node("n2")) == (("both", ""), ("", ""))
    async with alive(nodes):
        assert (await run("--to", "lbproxy", "--all-nodes")).status == 0
    assert (nodes.node("n1"), nodes.node("n2")) == (("lbproxy", ""), ("lbproxy", ""))


async def test_an_agent_that_is_not_to_obey_is_told_of(server: apiserver.ApiServer, run: Runner) -> None:
    nodes = Nodes(server, "n1")
    server.store.put(OURS)
    server.store.put(PATCHED)
    server.store.patch("nodes", ("", "n1"), {"metadata": {"labels": {migration.LABEL: "lbproxy"}}})
    nodes.pod("kube-proxy", "n1", there=False)
    nodes.pod("lbproxy", "n1")
    running = asyncio.ensure_future(run("--to", "lbproxy", "--all-nodes", "--timeout", "1"))
    await eventually(lambda: nodes.node("n1")[1])
    nodes.answer("n1", migration.Report(nodes.node("n1")[1], "not done, since takeOver: never"))
    done = await running
    assert "kube-proxy's rules are removed: not done, since takeOver: never" in done.err
    assert (done.status, nodes.node("n1")[1]) == (1, "")


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


async def test_kube_proxys_daemon_set_is_changed_only_if_one_says_yes(
    server: apiserver.ApiServer, kubeconfig: pathlib.Path, run: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    Nodes(server, "n1")
    server.store.put(OURS)
    server.store.put(THEIRS)
    args = command._parsers()[0].parse_args(
        [
            "migrate",
            "cluster",
            "--kubeconfig",
            str(kubeconfig),
            "--to",
            "lbproxy",
            "--all-nodes",
            "--timeout",
            "1",
        ]
    )
    api = await asyncio.to_thread(cluster.connect, str(kubeconfig), "")
    for answer in ("", "n", "no"):
        asked: list[str] = []

        def say(question: str, answer: str = answer, asked: list[str] = asked) -> str:
            asked.append(question)
            return answer

        with pytest.raises(errors.AgentError, match="nothing was changed"):
            await asyncio.to_thread(migrate_cluster.Migration(args, api, ask=say).run)
        assert asked
    assert not changes(server)
    assert "+     operator: NotIn" in capsys.readouterr().err
    await run("--to", "lbproxy", "--all-nodes", "--timeout", "1", "--yes")
    spec = server.store.get("daemonsets", (KUBE_SYSTEM, "kube-proxy"))["spec"]["template"]["spec"]
    assert spec["nodeSelector"] == {"kubernetes.io/os": "linux"}
    assert migration_plan.terms(spec) == [{"matchExpressions": [migration_plan.STAYS_AWAY]}]


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
    shown = await run()
    assert shown.status == 0
    assert "going on with kube-proxy: 5 TCP" in shown.out
    assert not changes(server)


async def test_the_rights_in_the_docs_are_those_that_are_used(
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
        match = re.fullmatch(r"/(?:api|apis/([^/]+))/v1/(?:namespaces/[^/]+/)?(\w+)(/[^/]+)?", request.path)
        assert match is not None, request.path
        verb = "patch" if request.method == "PATCH" else "get" if match[3] else "list"
        used.add((match[1] or "", match[2], verb))
    page = (pathlib.Path(__file__).parents[2] / "docs/migration.md").read_text()
    (role,) = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    allowed = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert allowed == used


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "lbproxy"), "say which nodes"),
        (("--all-nodes",), "which way"),
        (("--to", "lbproxy", "--all-nodes", "--node", "n1"), "one of them"),
        (("--to", "elsewhere", "--all-nodes"), "invalid choice"),
        (("--to", "lbproxy", "--node", "n9"), "there is no such node"),
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
    assert "pip install 'lbproxy[migrate]'" in done.err


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
