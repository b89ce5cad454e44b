"""`lbproxy support-bundle`: everything that a report needs, with and without an agent, and no secret."""

import argparse
import collections.abc
import dataclasses
import io
import json
import os
import pathlib
import stat
import subprocess
import tarfile
import threading
import typing

import pytest
import yaml

from lbproxy import errors
from lbproxy.bundle import command as bundle
from lbproxy.bundle import items as bundle_items
from lbproxy.config import config
from lbproxy.lab import cluster, netns
from tests.lab import agents, manifests

PODS = ("n1/p2", "n2/p1")
PLANTED = "pLaNtEdSeCrEt0123456789"
MISSING_HERE = {"agent/log.txt"}  # where a node keeps logs, and this machine may not


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    unfit = manifests.service("backroom", 9)
    unfit["spec"]["ports"][0]["port"] = 70000
    objects = [
        unfit,
        manifests.node("n1", str(lab["n1"].ipv4), zone="zone-of-n1"),
        manifests.service(
            "shopfront",
            1,
            annotations={
                "example.org/token": PLANTED,
                "password": PLANTED,
                "lbproxy.io/probe": f"http:/healthz?token={PLANTED}",
            },
        ),
        *manifests.slices("shopfront", [lab[pod] for pod in PODS]),
    ]
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


@pytest.fixture(scope="module")
def agent(lab: cluster.Lab, api: agents.Api) -> collections.abc.Iterator[agents.Agent]:
    for pod in PODS:
        lab.serve(pod)
    kubeconfig = lab.workdir / "kubeconfig"
    content = {
        "clusters": [{"name": "c", "cluster": {"server": api.source[1]}}],
        "users": [{"name": "u", "user": {"token": PLANTED}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    kubeconfig.write_text(yaml.safe_dump(content))
    source = ("--kubeconfig", str(kubeconfig))
    with agents.Agent(lab, source, *agents.SMALL_MAPS) as running:
        yield running


def made(agent: agents.Agent, target: pathlib.Path, *arguments: str) -> dict[str, str]:
    """Run the command; returns the files, by their names in the folder."""
    argv = [*agents.LBPROXY, "support-bundle", "--bpffs", str(agent.root), "-o", str(target), *arguments]
    agent.lab.check_output(agent.node, argv, cgroup=False, timeout_s=120)
    return unpacked(target)


def unpacked(target: pathlib.Path) -> dict[str, str]:
    found = {}
    with tarfile.open(target) as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None
            found[member.name.partition("/")[2]] = content.read().decode()
    return found


def problems(files: dict[str, str]) -> dict[str, str]:
    told = json.loads(files["manifest.json"])["files"]
    assert {entry["file"] for entry in told} == {item.file for item in bundle_items.ITEMS}
    assert {entry["file"] for entry in told if entry["bytes"]} <= files.keys()
    return {entry["file"]: entry["problem"] for entry in told if entry["problem"]}


def test_a_bundle_tells_what_a_report_needs_and_no_secret(
    agent: agents.Agent, tmp_path: pathlib.Path
) -> None:
    target = tmp_path / "b.tar.gz"
    assert agent.at("n1/p1").tcp("10.96.0.1", 80).server in PODS
    client = agent.lab.client("n1/p1", "short", "10.96.0.1", 80, pause_s=0.05)
    try:
        files = made(agent, target, "--trace", "1")
    finally:
        assert client.stop().failures == {}
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert problems(files).keys() <= MISSING_HERE
    assert not [name for name, text in files.items() if PLANTED in text]
    assert {one["name"] for one in json.loads(files["services.json"])} == {"shopfront"}
    assert json.loads(files["status.json"])["serving"] is True
    assert json.loads(files["about.json"])["agent"]["running"] is True
    assert json.loads(files["migration.json"])["returning"] is False
    assert {one["pin"] for one in json.loads(files["programs.json"])} >= {"connect4", "tc_to_any"}
    assert any(one["ours"] for one in json.loads(files["attached.json"]))
    assert json.loads(files["preflight.json"])["findings"]
    assert "kubeconfig=" in files["agent/flagz.txt"]
    assert "lbproxy_" in files["agent/metrics.txt"]
    assert "10.244.1.0/24" in files["node/routes.txt"]
    assert {"eth0", "cni0"} <= {one["name"] for one in json.loads(files["node/devices.json"])}
    assert '"event":"chosen"' in files["trace.jsonl"]


def test_what_is_redacted_can_still_be_followed(agent: agents.Agent, tmp_path: pathlib.Path) -> None:
    target = tmp_path / "b.tar.gz"
    files = made(agent, target, "--redact", "--trace", "0")
    known = json.loads((tmp_path / "b.names.json").read_text())
    text = "\n".join(files.values())
    for name in (
        "shopfront",
        "backroom",
        "zone-of-n1",
        "10.96.0.1",
        "172.18.0.1",
        "fd00:96::1",
        str(agent.lab["n2/p1"].ipv4),
    ):
        assert name not in text
    assert any("is rejected" in line for line in json.loads(files["status.json"])["warnings"])
    (port,) = (
        one
        for one in json.loads(files["services.json"])
        if one["family"] == "IPv4" and one["protocol"] == "TCP"
    )
    assert known[port["name"]] == "shopfront"
    assert known[port["frontends"][0]["ip"]] == "10.96.0.1"
    assert {known[one["ip"]] for one in port["backends"]} == {str(agent.lab[pod].ipv4) for pod in PODS}
    assert "not asked for" in problems(files)["trace.jsonl"]


def test_without_a_datapath_there_is_a_bundle_too(lab: cluster.Lab, tmp_path: pathlib.Path) -> None:
    argv = [*agents.LBPROXY, "support-bundle", "--bpffs", str(tmp_path / "none"), "--trace", "0", "-o", "-"]
    done = subprocess.run(lab.command("n2", argv, cgroup=False), capture_output=True, check=True, timeout=120)
    target = tmp_path / "b.tar.gz"
    target.write_bytes(done.stdout)
    files = unpacked(target)
    found = problems(files)
    assert "no lbproxy datapath" in found["services.json"]
    assert "agent/metrics.txt" in found
    assert json.loads(files["about.json"])["agent"]["running"] is False
    assert json.loads(files["node/devices.json"])


@pytest.fixture
def nothing_pinned(tmp_path: pathlib.Path) -> argparse.Namespace:
    return argparse.Namespace(bpffs=tmp_path / "none", trace_s=0.0, redact=False, output=str(tmp_path / "b"))


def test_an_item_that_hangs_fails_or_is_too_much_is_a_note(
    nothing_pinned: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()

    def hang(_: bundle_items.Node) -> str:
        never.wait()
        return ""

    def fail(_: bundle_items.Node) -> typing.NoReturn:
        raise ZeroDivisionError(f"token={PLANTED}")

    monkeypatch.setattr(
        bundle_items,
        "ITEMS",
        (
            bundle_items.Item("hangs", "", hang, 0.05),
            bundle_items.Item("fails", "", fail),
            bundle_items.Item("much", "", lambda _: "x" * (5 << 20)),
            bundle_items.Item("fine", "", lambda _: f"token={PLANTED}"),
        ),
    )
    try:
        assert bundle.main(nothing_pinned) == 0
    finally:
        never.set()
    files = unpacked(pathlib.Path(nothing_pinned.output))
    found = problems(files)
    assert found["hangs"] == "took longer than 0.05 s"
    assert found["fails"] == "ZeroDivisionError: token=(hidden)"
    assert found["much"].startswith("cut off")
    assert len(files["much"]) == 4 << 20
    assert files["fine"] == "token=(hidden)"
    assert files.keys() == {"much", "fine", "manifest.json"}


def test_what_nobody_has_is_said_once_and_without_names_of_classes(
    nothing_pinned: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refused connection of each page of an agent that does not run, and a trace that nobody wants."""
    wanted = {"agent/healthz.json", "agent/statusz.txt", "agent/flagz.txt", "links.json", "trace.jsonl"}
    few = tuple(item for item in bundle_items.ITEMS if item.file in wanted)
    monkeypatch.setattr(bundle_items, "ITEMS", few)
    nowhere = config.ListenAddress("127.0.0.1", 1)
    settings = config.Config(
        node_name="n", healthz_bind_address=nowhere, metrics_bind_address=nowhere, bpffs=nothing_pinned.bpffs
    )
    monkeypatch.setattr(bundle_items, "_settings", lambda _arguments, _root: settings)
    assert bundle.main(nothing_pinned) == 0
    told = capsys.readouterr()
    assert told.err.splitlines() == [
        f"lbproxy: links.json: {nothing_pinned.bpffs}/links: No such file or directory",
        "lbproxy: agent/healthz.json, agent/statusz.txt, agent/flagz.txt: Connection refused",
    ]
    assert "0 of 4 files" in told.out
    assert "not asked for" in problems(unpacked(pathlib.Path(nothing_pinned.output)))["trace.jsonl"]


def test_an_archive_that_finds_no_room_is_one_line(nothing_pinned: argparse.Namespace) -> None:
    argv = [
        *agents.LBPROXY,
        "support-bundle",
        "--bpffs",
        str(nothing_pinned.bpffs),
        "--trace",
        "0",
        "-o",
        "-",
    ]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    errors_ = [line for line in done.stderr.splitlines() if "error: " in line or "Traceback" in line]
    assert errors_ == ["lbproxy: error: cannot write the output: No space left on device"]
    assert done.returncode == 1


def test_a_bundle_that_can_not_be_written_is_an_error(
    nothing_pinned: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(bundle_items, "ITEMS", ())
    nothing_pinned.output = str(tmp_path / "no" / "such" / "folder")
    with pytest.raises(errors.AgentError, match="cannot write"):
        bundle.main(nothing_pinned)


def test_what_no_table_has_is_redacted_too(
    nothing_pinned: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Service that found no room is named in /healthz and the log, and in no table."""
    line = "shop/left-out:web/TCP/IPv4: the backends table is full"
    monkeypatch.setattr(
        bundle_items,
        "ITEMS",
        (
            bundle_items.Item("text", "", lambda _: line),
            bundle_items.Item("json", "", lambda _: {"warnings": [line], "names": ["left-out"]}),
        ),
    )
    nothing_pinned.redact = True
    assert bundle.main(nothing_pinned) == 0
    files = unpacked(pathlib.Path(nothing_pinned.output))
    hidden = "namespace-1/service-1:port-1/TCP/IPv4: the backends table is full"
    assert files["text"] == hidden
    assert json.loads(files["json"]) == {"warnings": [hidden], "names": ["service-1"]}


def test_the_nodes_name_is_hidden_as_it_was_given(
    nothing_pinned: argparse.Namespace,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    arguments = ("--node-name", "Shop-West-7", "--hostname-override=SHOP-WEST-7")
    node = bundle_items.look(nothing_pinned.bpffs, 0.0)
    settings = dataclasses.replace(node.settings, node_name="shop-west-7")
    given = dataclasses.replace(node, arguments=arguments, settings=settings)
    monkeypatch.setattr(bundle_items, "look", lambda *_: given)
    few = tuple(item for item in bundle_items.ITEMS if item.file in ("about.json", "configuration.txt"))
    monkeypatch.setattr(bundle_items, "ITEMS", few)
    nothing_pinned.redact, nothing_pinned.output = True, "-"
    assert bundle.main(nothing_pinned) == 0
    told = capfdbinary.readouterr()
    assert b"who is who is not kept: -o FILE" in told.err
    with tarfile.open(fileobj=io.BytesIO(told.out)) as archive:
        files = [archive.extractfile(member) for member in archive]
        text = b"".join(file.read() for file in files if file is not None)
    assert b"node-name=node-" in text
    assert b"shop-west" not in text.lower()


def test_what_is_no_plain_file_is_not_replaced(
    nothing_pinned: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """A file in the place of /dev/null or /dev/stdout would break whatever runs on the node."""
    monkeypatch.setattr(bundle_items, "ITEMS", ())
    device, link, pipe, folder = (tmp_path / name for name in ("null", "stdout", "pipe", "folder"))
    os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    link.symlink_to("/proc/self/fd/1")
    os.mkfifo(pipe)
    folder.mkdir()
    for path in (device, link, pipe, folder):
        before = path.lstat()
        nothing_pinned.output = str(path)
        with pytest.raises(errors.ConfigError, match="no plain file; -o - is standard output"):
            bundle.main(nothing_pinned)
        assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert len(list(tmp_path.iterdir())) == 4
    nothing_pinned.output = str(tmp_path / "new")
    assert bundle.main(nothing_pinned) == 0
    assert bundle.main(nothing_pinned) == 0


def test_who_is_who_is_not_written_through_a_link_nor_for_others(
    nothing_pinned: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Somebody else may have put something there first, where -o is in /tmp."""
    monkeypatch.setattr(bundle_items, "ITEMS", ())
    nothing_pinned.redact = True
    aim = tmp_path / "aim"
    aim.write_text("untouched")
    names = tmp_path / "b.names.json"
    names.symlink_to(aim)
    assert bundle.main(nothing_pinned) == 0
    assert aim.read_text() == "untouched"
    assert not names.is_symlink()
    assert stat.S_IMODE(names.stat().st_mode) == 0o600


def test_the_log_is_that_of_the_agents_own_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    ours, others = "a" * 64, "b" * 64
    (tmp_path / f"lbproxy-x_kube-system_lbproxy-{ours}.log").write_text("ours\n")
    (tmp_path / f"lbproxy-y_somebody_lbproxy-{others}.log").write_text("theirs\n")
    cgroup = tmp_path / "cgroup"
    cgroup.write_text(f"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ours}.scope\n")
    monkeypatch.setattr(bundle_items, "_CONTAINER_LOGS", tmp_path)
    assert bundle_items._container(cgroup) == ours
    assert bundle_items._container(tmp_path / "none") == ""
    monkeypatch.setattr(bundle_items, "_container", lambda _path: ours)
    node = typing.cast(
        bundle_items.Node, argparse.Namespace(agent=argparse.Namespace(pid=1, running=True), root=tmp_path)
    )
    assert bundle_items._log(node) == "ours"


def test_a_log_that_is_not_there_is_said_to_be_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """An empty file would be taken for a log that says nothing."""
    journal = tmp_path / "journalctl"
    monkeypatch.setattr(bundle_items, "_CONTAINER_LOGS", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    node = typing.cast(
        bundle_items.Node, argparse.Namespace(agent=argparse.Namespace(pid=None, running=False))
    )
    with pytest.raises(errors.AgentError, match=r"no log is kept here: .*kubectl logs"):
        bundle_items._log(node)
    journal.write_text("#!/bin/sh\n")
    journal.chmod(0o755)
    with pytest.raises(errors.AgentError, match="the journal has no line of the agent's"):
        bundle_items._log(node)
    journal.write_text("#!/bin/sh\necho a line\n")
    assert bundle_items._log(node) == "a line\n"


def test_routes_are_told_where_there_is_no_ip_command(agent: agents.Agent) -> None:
    """As in the image. What `ip` says of the same namespace has to be in it."""

    def told() -> str:
        return bundle_items.kernel_routes(*map(bundle_items._read, bundle_items._ROUTES))

    found = netns.inside(agent.lab.netns("n1"), told).splitlines()
    node, pods = agent.lab["n2"], "10.244.2.0/24"
    assert f"{pods} via {node.ipv4} dev eth0 metric 0" in found
    assert "default via 172.18.0.254 dev eth0 metric 0" in found
    assert "10.244.1.0/24 dev cni0 metric 0" in found
    assert f"fd00:244:2::/64 via {node.ipv6} dev eth0 metric 1024" in found
    assert f"local {agent.lab['n1'].ipv6}/128 dev eth0 metric 0" in found
