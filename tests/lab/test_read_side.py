"""The read-side commands on the real maps, against what real sockets on loopback then meet."""

import collections.abc
import contextlib
import ctypes
import errno
import json
import os
import pathlib
import socket
import subprocess
import sys
import typing

import pytest

from lbproxy import abi, cgroup2, noting
from lbproxy import cli as command
from lbproxy.core import model, notes
from lbproxy.kernel import bpffs, datapath, inspection, maps, node, one_row, programs
from lbproxy.lab import cgroups
from tests import installing, polling
from tests import ports as free_ports

pytestmark = pytest.mark.usefixtures("needs_bpf")

# Joins a cgroup, connects, says what came of it, and holds the connections until told to end.
CLIENT: typing.Final = """
import errno, json, os, socket, sys
cgroup, *places = sys.argv[1:]
open(cgroup + "/cgroup.procs", "w").write(str(os.getpid()))
outcomes, held = [], []
for place in places:
    kind, host, port = place.split(",")
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, getattr(socket, kind))
    held.append(made)
    try:
        made.connect((host, int(port)))
        outcomes.append(made.getpeername()[:2])
    except OSError as error:
        outcomes.append(errno.errorcode[error.errno])
print(json.dumps(outcomes), flush=True)
sys.stdin.read()
"""
UNREADY: dict[str, typing.Any] = {"ready": False, "serving": False}


class Node:
    """A datapath of its own on a child cgroup, with the services of this module."""

    def __init__(self, root: pathlib.Path, cgroup: pathlib.Path) -> None:
        self.root = root
        self.cgroup = cgroup
        self.datapath = datapath.Datapath(root)
        self.datapath.ensure(cgroup, installing.SIZES)
        self.maps = maps.BpfMaps(str(self.datapath.maps_dir))
        self.installer = installing.Installer(self.maps, self.maps.capacity())

    def run(self, *arguments: str) -> int:
        return command.main([arguments[0], "--bpffs", str(self.root), *arguments[1:]])

    @contextlib.contextmanager
    def connected(self, *places: str) -> collections.abc.Iterator[list[typing.Any]]:
        """What connects from the cgroup came to; those that succeeded stay open meanwhile."""
        argv = [sys.executable, "-I", "-S", "-c", CLIENT, str(self.cgroup), *places]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            yield json.loads(client.stdout.readline())
        assert client.returncode == 0

    def connect(self, *places: str) -> list[typing.Any]:
        with self.connected(*places) as outcomes:
            return outcomes


def listen(stack: contextlib.ExitStack, *hosts: str) -> int:
    """Listen for TCP and UDP on one free port of these addresses."""
    port = free_ports.unused()
    for host in hosts:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            made = stack.enter_context(socket.socket(family, kind))
            made.bind((host, port))
            port = made.getsockname()[1]
            if kind == socket.SOCK_STREAM:
                made.listen(100)
    return port


@pytest.fixture(scope="module")
def node_(tmp_path_factory: pytest.TempPathFactory) -> collections.abc.Iterator[Node]:
    mount = cgroup2.mount_point()
    assert mount is not None
    with contextlib.ExitStack() as stack:
        cgroup = mount / f"lbproxy-read-side-{os.getpid()}"
        cgroup.mkdir()
        stack.callback(cgroups.remove, cgroup)
        root = tmp_path_factory.mktemp("read-side") / "bpf"
        bpffs.ensure(root)
        stack.callback(bpffs.remove, root)
        made = Node(root, cgroup)
        stack.callback(made.maps.close)
        target_port = listen(stack, "127.244.0.1", "127.244.0.2", "::1")
        install(made.installer, target_port)
        yield made


def install(installer: installing.Installer, target_port: int) -> None:
    two = [installing.endpoint(f"127.244.0.{n}", f"node-{n}") for n in (1, 2)]
    installer.node("127.0.0.1", host_netns=node.netns_cookie())
    service = installer.service
    service("default/web", ["127.96.0.1"], two, target_port=target_port, node_port=30080)
    service("default/six", ["::1"], [installing.endpoint("::1")], target_port=target_port)
    service("default/sticky", ["127.96.0.2"], two, target_port=target_port, affinity_s=600)
    service("default/empty", ["127.96.0.3"], [installing.endpoint("127.244.0.1", **UNREADY)])
    service("default/local", ["127.96.0.4"], two[1:], target_port=target_port, internal_local=True)
    udp = model.Protocol.UDP
    service("default/dns", ["127.96.0.5"], two, target_port=target_port, protocol=udp, port=53)


def counts(of: Node, capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    """Connections and refusals of all services, and the kernel's own counters."""
    capsys.readouterr()
    assert of.run("services", "-o", "json") == 0
    ports = json.loads(capsys.readouterr().out)
    assert of.run("status", "-o", "json") == 0
    status = json.loads(capsys.readouterr().out)
    total = {name: sum(port[name] for port in ports) for name in ("connections", "refused")}
    assert total["connections"] == sum(b["connections"] for port in ports for b in port["backends"])
    assert total["refused"] == status["counters"]["refused"]
    return {**total, "dropped": status["counters"]["dropped"], "bad_slot": status["counters"]["bad_slot"]}


@pytest.mark.parametrize(
    ("place", "to", "verdict"),
    [
        ("SOCK_STREAM,127.96.0.1,80", "127.96.0.1:80", "balanced"),
        ("SOCK_STREAM,127.0.0.1,30080", "127.0.0.1:30080", "balanced"),
        ("SOCK_STREAM,127.99.99.99,30080", "127.99.99.99:30080", "balanced"),
        ("SOCK_STREAM,::1,80", "[::1]:80", "balanced"),
        ("SOCK_STREAM,::ffff:127.96.0.1,80", "[::ffff:127.96.0.1]:80", "balanced"),
        ("SOCK_STREAM,127.96.0.2,80", "127.96.0.2:80", "balanced"),
        ("SOCK_DGRAM,127.96.0.5,53", "127.96.0.5:53/UDP", "balanced"),
        ("SOCK_STREAM,127.96.0.3,80", "127.96.0.3:80", "refused"),
        ("SOCK_STREAM,127.96.0.4,80", "127.96.0.4:80", "dropped"),
        ("SOCK_STREAM,127.96.0.5,53", "127.96.0.5:53", "untouched"),
        ("SOCK_STREAM,::1,30080", "[::1]:30080", "untouched"),
        ("SOCK_STREAM,127.0.0.1,1", "127.0.0.1:1", "untouched"),
    ],
)
def test_explain_foretells_what_the_kernel_does(
    node_: Node, capsys: pytest.CaptureFixture[str], place: str, to: str, verdict: str
) -> None:
    assert node_.run("explain", "--from", "node", "--to", to, "-o", "json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == verdict
    before = counts(node_, capsys)
    (outcome,) = node_.connect(place)
    change = {name: count - before[name] for name, count in counts(node_, capsys).items()}
    nothing = dict.fromkeys(before, 0)
    if verdict == "balanced":
        _, host, port = place.split(",")
        assert outcome == [host, int(port)]
        assert change == {**nothing, "connections": 1}
    else:
        # On loopback nobody listens at a service address: the stack refuses what is left alone.
        assert outcome == "ECONNREFUSED"
        expected = {"refused": {"refused": 1}, "dropped": {"dropped": 1}, "untouched": {}}[verdict]
        assert change == {**nothing, **expected}


def test_a_remembered_client_is_explained_as_the_kernel_remembers_it(
    node_: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    def sticky() -> dict[str, int]:
        capsys.readouterr()
        assert node_.run("services", "sticky", "-o", "json") == 0
        (port,) = json.loads(capsys.readouterr().out)
        return {backend["ip"]: backend["connections"] for backend in port["backends"]}

    before = sticky()
    node_.connect(*["SOCK_STREAM,127.96.0.2,80"] * 10)
    (grown,) = (ip for ip, count in sticky().items() if count > before[ip])
    assert node_.run("explain", "--from", "127.0.0.1", "--to", "127.96.0.2:80", "-o", "json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [(choice["ip"], choice["percent"]) for choice in told["backends"]] == [(grown, 100.0)]


def test_backends_count_what_they_were_given(node_: Node, capsys: pytest.CaptureFixture[str]) -> None:
    def given() -> dict[str, int]:
        capsys.readouterr()
        assert node_.run("backends", "web", "-o", "json") == 0
        return {one["ip"]: one["connections"] for one in json.loads(capsys.readouterr().out)}

    before = given()
    node_.connect(*["SOCK_STREAM,127.96.0.1,80"] * 20)
    after = given()
    assert after.keys() == {"127.244.0.1", "127.244.0.2"}
    assert sum(after.values()) - sum(before.values()) == 20


def test_usable_is_what_the_kernel_connects_to(node_: Node, capsys: pytest.CaptureFixture[str]) -> None:
    def usable(name: str) -> set[bool]:
        capsys.readouterr()
        assert node_.run("services", name, "-o", "json") == 0
        return {one["usable"] for port in json.loads(capsys.readouterr().out) for one in port["backends"]}

    reached, refused = ("web", "127.96.0.1"), ("local", "127.96.0.4")
    outcomes = node_.connect(*(f"SOCK_STREAM,{ip},80" for _, ip in (reached, refused)))
    assert outcomes == [["127.96.0.1", 80], "ECONNREFUSED"]
    assert (usable(reached[0]), usable(refused[0])) == ({True}, {False})


def test_maps_show_open_sockets_and_memory(node_: Node, capsys: pytest.CaptureFixture[str]) -> None:
    def used(name: str) -> int:
        capsys.readouterr()
        assert node_.run("maps", "-o", "json") == 0
        rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
        # A trie without rows occupies nothing.
        assert all((row["bytes"] > 0 or not row["used"]) and row["holds"] for row in rows.values())
        assert rows["frontends"]["capacity"] == installing.SIZES["frontends"]
        return int(rows[name]["used"])

    polling.eventually(lambda: used("sockets") == 0, what="rows given back")
    with node_.connected(*["SOCK_STREAM,127.96.0.1,80"] * 5):
        assert used("sockets") + used("socket_spill") == 5
    polling.eventually(lambda: used("sockets") == 0, what="rows given back")
    assert used("frontends") == 7
    assert used("services") == 6


def test_status_of_a_node_that_serves(node_: Node, capsys: pytest.CaptureFixture[str]) -> None:
    assert node_.run("status", "-o", "json") == 0
    status = json.loads(capsys.readouterr().out)
    assert status["serving"] is status["of_this_version"] is True
    assert status["cgroup"] == str(node_.cgroup)
    assert status["agent"] == {"running": False, "pid": None}
    assert {program["name"] for program in status["programs"] if program["attached"]} >= {
        "connect4",
        "connect6",
    }
    assert (status["services"], status["service_ports"], status["frontends"]) == (6, 6, 7)
    states = {"active": 9 - 1, "terminating": 0, "unready": 1, "draining": 0, "serving": 0, "unhealthy": 0}
    assert status["backends"] == states
    assert status["warnings"] == []
    assert node_.run("status") == 0
    assert "10 of 10 attached" in capsys.readouterr().out


def test_status_names_the_agent_and_leaves_its_lock_alone(
    node_: Node, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = bpffs.lock(node_.root)
    try:
        assert inspection.agent(node_.root) == inspection.Agent(True, os.getpid())
        # As from another pid namespace, where /proc/locks does not list the agent.
        monkeypatch.setattr(inspection, "_lock_owner", lambda _fd: None)
        assert inspection.agent(node_.root) == inspection.Agent(True, None)
        assert node_.run("status") == 0
        assert "running" in capsys.readouterr().out
        assert node_.run("cleanup") == 1
        assert "stop it first" in capsys.readouterr().err
        assert node_.datapath.maps_dir.exists()
    finally:
        os.close(lock)
    assert inspection.agent(node_.root) == inspection.Agent(False, None)
    os.close(bpffs.lock(node_.root))


def test_a_missing_hook_is_told(node_: Node, capsys: pytest.CaptureFixture[str]) -> None:
    (node_.datapath.links_dir / "connect4").unlink()
    try:
        assert node_.run("status", "-o", "json") == 1
        status = json.loads(capsys.readouterr().out)
        assert status["serving"] is False
        assert status["warnings"] == ["connect4 is not attached: its link is gone"]
        assert node_.run("explain", "--from", "node", "--to", "127.96.0.1:80", "-o", "json") == 0
        assert json.loads(capsys.readouterr().out)["verdict"] == "untouched"
    finally:
        node_.datapath.verify(node_.cgroup)
    assert node_.run("status") == 0


@pytest.mark.usefixtures("spare_cache")
def test_a_cgroup_that_is_gone_is_told(
    node_: Node, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cgroup = node_.cgroup / "short-lived"
    cgroup.mkdir()
    root = tmp_path / "bpf"
    bpffs.ensure(root)
    try:
        made = Node(root, cgroup)
        made.maps.close()
        assert made.run("status") == 0
        cgroup.rmdir()

        def told() -> bool:
            capsys.readouterr()
            return made.run("status") == 1 and "its cgroup is gone" in capsys.readouterr().out

        polling.eventually(told, what="links without a cgroup")
        assert made.run("cleanup") == 0
    finally:
        bpffs.remove(root)


def test_readers_say_in_one_line_that_nothing_is_there(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["services"], ["backends"], ["status"], ["maps"], ["explain", "--to", "127.0.0.1:1"]):
        assert command.main([*words, "--bpffs", str(tmp_path / "none")]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert f"no lbproxy datapath in {tmp_path}/none" in err


@pytest.mark.usefixtures("spare_cache")
def test_cleanup_leaves_nothing_and_can_be_repeated(
    node_: Node, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "bpf"
    bpffs.ensure(root)
    cgroup = node_.cgroup / "cleaned"
    cgroup.mkdir()
    try:
        made = Node(root, cgroup)
        made.installer.service("default/web", ["127.97.0.1"], [])
        # As an agent does a second after its start.
        one_row.write(f"{root}/{noting.PIN}", "lb_notes", notes.MOST_BYTES, b"")
        assert made.connect("SOCK_STREAM,127.97.0.1,80") == ["ECONNREFUSED"]
        assert counts(made, capsys)["refused"] == 1
        service_stats = made.maps.row("service_stats", (1).to_bytes(4, sys.byteorder))
        assert made.run("cleanup") == 0
        pinned = f"{len(programs.SOCKET)} links, {len(programs.PROGRAMS)} programs, {len(abi.MAPS) + 1} maps"
        assert pinned in capsys.readouterr().out
        assert not root.exists()
        assert not os.path.ismount(root)
        # Nothing runs any more: the same connect leaves no mark in the maps that are still open here.
        polling.eventually(lambda: cgroup_programs(cgroup) == 0, what="an empty cgroup")
        made.connect("SOCK_STREAM,127.97.0.1,80")
        assert made.maps.row("service_stats", (1).to_bytes(4, sys.byteorder)) == service_stats
        made.maps.close()
        assert made.run("cleanup") == 0
        assert "nothing to remove" in capsys.readouterr().out
    finally:
        cgroups.remove(cgroup)
        bpffs.remove(root)


def cgroup_programs(cgroup: pathlib.Path) -> int:
    """How many connect4 programs are attached to a cgroup, by BPF_PROG_QUERY."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    fd = os.open(cgroup, os.O_RDONLY)
    try:
        ids, count = (ctypes.c_uint32 * 8)(), ctypes.c_uint32(8)
        found = libbpf.bpf_prog_query(fd, 10, 0, None, ids, ctypes.byref(count))
        assert found == 0, errno.errorcode[ctypes.get_errno()]
        return count.value
    finally:
        os.close(fd)


def test_cleanup_leaves_alone_what_is_not_lbproxys(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "bpf"
    bpffs.ensure(root)
    try:
        (root / "somebody-elses").mkdir()
        assert command.main(["cleanup", "--bpffs", str(root)]) == 1
        assert "somebody-elses" in capsys.readouterr().err
        assert (root / "somebody-elses").exists()
    finally:
        bpffs.remove(root)


def test_cleanup_of_what_does_not_exist(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["cleanup", "--bpffs", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out == f"nothing to remove: there is nothing at {tmp_path}/none\n"
    assert command.main(["cleanup", "--bpffs", str(tmp_path)]) == 0
    assert "holds no lbproxy datapath" in capsys.readouterr().out


@pytest.mark.parametrize("below", ["", "bpf"])
def test_cleanup_says_that_it_may_not_look(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], below: str
) -> None:
    root = tmp_path / "closed" / below
    root.mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    # Modules are loaded on first use, which only root may do here.
    assert command.main(["cleanup", "--bpffs", str(tmp_path / "none")]) == 0
    capsys.readouterr()
    os.seteuid(65534)
    try:
        status = command.main(["cleanup", "--bpffs", str(root)])
    finally:
        os.seteuid(0)
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert err.startswith(f"lbproxy: error: may not look at what is in {root}: Permission denied")
    assert err.count("\n") == 1
