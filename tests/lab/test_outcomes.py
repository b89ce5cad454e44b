"""What the kernel notes of connections to backends: of each way to fail, and of none that is not theirs."""

import collections.abc
import contextlib
import os
import subprocess
import sys

import pytest

from lbproxy import abi
from lbproxy.core import inventory, outcomes, tables
from lbproxy.lab import cluster, topology
from tests import counting, polling
from tests.lab import agents, manifests
from tests.lab.wire import wires
from tests.lab.wire.conftest import CLUSTER_IPS

GOOD, CLOSED, RESETTING, NOWHERE, QUIET = 1, 2, 3, 4, 5
HOME = "n1/p2"
CLIENT, OUTSIDE = "n1/p1", topology.OUTSIDE
RESETS_AT, SILENT_AT, CLOSED_AT = 9101, 9102, 9103
NOBODY = {4: "10.244.1.250", 6: "fd00:244:1::fa"}
TIMES = 3

families = pytest.mark.parametrize("family", [4, 6])

# Resets whoever says something; or takes connections and says nothing.
SERVER = f"""
import socket, struct, threading
def resets(one):
    one.recv(1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()
held = []
def serve(port, what):
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    def run():
        while True:
            what(listener.accept()[0])
    threading.Thread(target=run).start()
serve({RESETS_AT}, resets)
serve({SILENT_AT}, held.append)
print("ready", flush=True)
"""

# Connects, does one thing as often as it is told, and says which errors there were.
CLIENT_SCRIPT = """
import ctypes, errno, json, socket, struct, subprocess, sys
address, what, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
said = []
for _ in range(times):
    one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        one.connect((address, 80))
        if what not in ("nothing", "loses"):
            one.send(b"?\\n")
            if what != "destroyed":
                one.recv(100, socket.MSG_PEEK)
        if what == "reads":
            one.recv(100)
        if what == "lingers":
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if what == "dissolves":
            ctypes.CDLL(None).connect(one.fileno(), bytes(16), 16)
        if what == "shuts":
            one.shutdown(socket.SHUT_WR)
            while one.recv(100):
                pass
        if what == "loses":
            one.setsockopt(socket.IPPROTO_TCP, 18, 300)  # TCP_USER_TIMEOUT
            where = ["blackhole", sys.argv[4]]
            subprocess.run(["ip", "route", "add", *where], check=True)
            try:
                one.send(b"?\\n")
                one.recv(100)
            finally:
                subprocess.run(["ip", "route", "delete", *where], check=True)
        if what == "destroyed":
            port = str(one.getsockname()[1])
            subprocess.run(["ss", "-K", "-t", "sport", "=", port], check=True, capture_output=True)
            one.recv(100)
    except OSError as error:
        said.append(errno.errorcode[error.errno])
    one.close()
print(json.dumps(said))
"""


def port_at(target: int) -> list[manifests.Port]:
    return [manifests.HTTP._replace(target=target)]


def slices_of_nobody() -> list[manifests.Object]:
    found = manifests.slices("nowhere", [])
    for slice_ in found:
        family = 4 if slice_["addressType"] == "IPv4" else 6
        slice_["endpoints"] = [{"addresses": [NOBODY[family]], "conditions": {"ready": True}}]
    return found


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    home = [lab[HOME]]
    objects = [
        manifests.service("good", GOOD),
        *manifests.slices("good", home),
        manifests.service("nowhere", NOWHERE),
        *slices_of_nobody(),
    ]
    for name, number, target in (
        ("closed", CLOSED, CLOSED_AT),
        ("resetting", RESETTING, RESETS_AT),
        ("quiet", QUIET, SILENT_AT),
    ):
        objects.append(manifests.service(name, number, ports=port_at(target)))
        objects += manifests.slices(name, home, ports=port_at(target))
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


class Blind(agents.Agent):
    """On a kernel that does not describe itself."""

    def command(self, *flags: str) -> list[str]:
        script = (
            "import pathlib, sys; from lbproxy import cli; from lbproxy.kernel import source; "
            "source._BTF = pathlib.Path('/nowhere'); sys.exit(cli.main())"
        )
        return [sys.executable, "-c", script, *super().command(*flags)[len(agents.LBPROXY) :]]


@pytest.fixture(scope="module")
def servers(lab: cluster.Lab) -> collections.abc.Iterator[None]:
    server = lab.serve(HOME, [manifests.TARGET_PORT])
    argv = [sys.executable, "-I", "-S", "-c", SERVER]
    others = lab.popen(HOME, argv, stdout=subprocess.PIPE)
    assert others.stdout is not None
    assert others.stdout.readline() == "ready\n"
    yield
    others.kill()
    others.wait()
    server.stop()


@pytest.fixture(scope="module")
def agent(lab: cluster.Lab, api: agents.Api, servers: None) -> collections.abc.Iterator[agents.Agent]:
    for family, network in CLUSTER_IPS.items():
        wires.ip(lab, OUTSIDE, f"-{family} route replace {network} via {lab['n1'].address(family)}")
    with agents.Agent(lab, api.source, *agents.SMALL_MAPS) as running:
        running.says(": uplink by")
        yield running


def backend_of(agent: agents.Agent, name: str, family: int = 4) -> inventory.Backend:
    draining = tables.BackendState.DRAINING
    (backend,) = (one for one in agent.port(name, family=family).backends if one.state is not draining)
    return backend


def fared(agent: agents.Agent, name: str, family: int) -> outcomes.Outcomes:
    return backend_of(agent, name, family).fared.everyone


def does(
    agent: agents.Agent,
    number: int,
    family: int,
    what: str,
    times: int = TIMES,
    *more: str,
    at: str = CLIENT,
) -> list[str]:
    address = manifests.cluster_ip(number, family)
    said = agents.run_script(agent.lab, at, CLIENT_SCRIPT, address, what, times, *more)
    assert isinstance(said, list)
    return said


@families
@pytest.mark.parametrize(
    ("name", "number", "what", "error", "counted"),
    [
        ("closed", CLOSED, "reads", "ECONNREFUSED", {"refused": TIMES}),
        ("resetting", RESETTING, "reads", "ECONNRESET", {"established": TIMES, "resets": TIMES}),
        ("good", GOOD, "nothing", None, {"established": TIMES}),
        ("good", GOOD, "reads", None, {"established": TIMES}),
        ("good", GOOD, "shuts", None, {"established": TIMES}),
        ("good", GOOD, "leaves unread", None, {"established": TIMES}),
        ("good", GOOD, "lingers", None, {"established": TIMES}),
        ("good", GOOD, "dissolves", None, {"established": TIMES}),
        ("quiet", QUIET, "destroyed", "ECONNABORTED", {"established": TIMES}),
    ],
)
def test_each_way_to_end_counts_as_what_it_is(
    agent: agents.Agent,
    family: int,
    name: str,
    number: int,
    what: str,
    error: str | None,
    counted: dict[str, int],
) -> None:
    before = fared(agent, name, family)
    assert does(agent, number, family, what) == ([error] * TIMES if error else [])
    new = fared(agent, name, family).since(before)
    counts = counting.counts_of(new)
    assert counts == {**dict.fromkeys(counts, 0), **counted}
    if "established" in counted:
        assert 0 < new.handshake_us < 60_000_000 * TIMES
        assert 0 < new.srtt_us < 60_000_000


@families
@pytest.mark.parametrize(
    ("name", "number", "what", "error", "counted"),
    [
        ("closed", CLOSED, "reads", "ECONNREFUSED", {"refused": 1}),
        ("resetting", RESETTING, "reads", "ECONNRESET", {"established": 1, "resets": 1}),
        ("good", GOOD, "reads", None, {"established": 1}),
        ("good", GOOD, "leaves unread", None, {"established": 1}),
        ("good", GOOD, "lingers", None, {"established": 1}),
    ],
)
def test_what_packets_and_what_sockets_tell_is_counted_once(
    agent: agents.Agent,
    family: int,
    name: str,
    number: int,
    what: str,
    error: str | None,
    counted: dict[str, int],
) -> None:
    """Packets of the one client are translated here; those of the other pass the same devices as they are."""
    before = backend_of(agent, name, family).fared
    for at, count in {OUTSIDE: 2, CLIENT: 5}.items():
        assert does(agent, number, family, what, count, at=at) == ([error] * count if error else [])
    after = backend_of(agent, name, family).fared
    for new, count in ((after.elsewhere.since(before.elsewhere), 2), (after.node.since(before.node), 5)):
        counts = counting.counts_of(new)
        assert counts == {field: count * counted.get(field, 0) for field in counts}
        if new.established:
            assert 0 < new.handshake_us < 60_000_000 * count


@pytest.mark.parametrize(("at", "family"), [(CLIENT, 4), (CLIENT, 6), (OUTSIDE, 4)])
def test_a_backend_that_does_not_answer_counts_once_a_connection(
    agent: agents.Agent, at: str, family: int
) -> None:
    """The kernel asks again after a second, and gives up when nobody on the link has the address."""
    before = fared(agent, "nowhere", family)
    assert does(agent, NOWHERE, family, "reads", 1, at=at) == ["EHOSTUNREACH"]
    assert fared(agent, "nowhere", family).since(before) == outcomes.Outcomes(unanswered=1)


def test_a_connection_that_the_application_gives_up_has_counted_already(agent: agents.Agent) -> None:
    before = fared(agent, "nowhere", 4)
    with agent.at(CLIENT).socket(nonblocking=True) as opened:
        with contextlib.suppress(OSError):
            opened.connect(manifests.cluster_ip(NOWHERE), manifests.TCP_PORT, 0.1)
        polling.eventually(lambda: fared(agent, "nowhere", 4).since(before).unanswered == 1, what="a second")
    # Nor does one count that was given up before.
    with agent.at(CLIENT).socket(nonblocking=True) as opened, contextlib.suppress(OSError):
        opened.connect(manifests.cluster_ip(NOWHERE), manifests.TCP_PORT, 0.1)
    assert fared(agent, "nowhere", 4).since(before) == outcomes.Outcomes(unanswered=1)


def test_an_open_connection_that_nobody_acknowledges_is_lost(agent: agents.Agent) -> None:
    before = fared(agent, "good", 4)
    said = does(agent, GOOD, 4, "loses", 1, agent.lab[HOME].address(4))
    assert said == ["ETIMEDOUT"]
    new = fared(agent, "good", 4).since(before)
    assert (new.established, new.lost, new.failed) == (1, 1, 1)


def test_counts_go_with_their_backend(agent: agents.Agent, api: agents.Api) -> None:
    ports = port_at(CLOSED_AT)
    does(agent, CLOSED, 4, "reads")
    backend = backend_of(agent, "closed")
    assert outcomes.of_backend(agent.maps, backend.id).node.refused
    api.put(*manifests.slices("closed", [agent.lab["n1/p3"]], ports=ports))
    polling.eventually(
        lambda: outcomes.of_backend(agent.maps, backend.id) == outcomes.Fared(), what="a cleared row"
    )
    api.put(*manifests.slices("closed", [agent.lab[HOME]], ports=ports))
    agent.has_backends("closed", {HOME}, [("http", 4), ("http", 6)])
    assert fared(agent, "closed", 4) == outcomes.Outcomes()


def test_a_listing_shows_them(agent: agents.Agent) -> None:
    does(agent, RESETTING, 4, "reads")
    row = next(
        line.split() for line in agent.lbproxy("backends", "resetting").splitlines() if "10.244." in line
    )
    known = fared(agent, "resetting", 4)
    assert row[10:13] == [str(known.failed), f"{known.srtt_us / 1000:.2f}ms", "-"]


# A pod's own program. It asks to be told of repeated segments as a connection begins, and says at the
# handshake what it is still told of: in the socket's priority.
OTHER = """
import bcc, os, sys
from lbproxy.kernel import loader
text = r'''
#include <linux/bpf.h>
int other(struct bpf_sock_ops *ctx)
{
	int flags = ctx->bpf_sock_ops_cb_flags;

	if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB)
		bpf_sock_ops_cb_flags_set(ctx, flags | BPF_SOCK_OPS_RETRANS_CB_FLAG);
	else if (ctx->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
		bpf_setsockopt(ctx, 1, 12, &flags, sizeof(flags));
	return 1;
}
'''
module = bcc.BPF(text=text, cflags=loader._cflags(0))
loaded = module.load_func("other", bcc.BPF.SOCK_OPS)
group = os.open(sys.argv[1], os.O_RDONLY)
module.attach_func(loaded, group, 3, 2)  # beside others
print("ready", flush=True)
sys.stdin.read()
module.detach_func(loaded, group, 3)
"""
RTO, RETRANS, STATE = 1, 2, 4
TOLD = """
import json, socket, sys
one = socket.create_connection((sys.argv[1], 80))
print(json.dumps(one.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY)))
"""


@pytest.fixture
def other(lab: cluster.Lab) -> collections.abc.Iterator[None]:
    """That program, at the cgroup of the client's pods."""
    argv = [sys.executable, "-c", OTHER, str(lab.cgroup(CLIENT))]
    environment = {**os.environ, "BCC_KERNEL_SOURCE": str(abi.source_dir() / "headers")}
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
        process.communicate("")


def test_what_others_ask_of_a_socket_stays(agent: agents.Agent, other: None) -> None:
    assert agents.run_script(agent.lab, CLIENT, TOLD, manifests.cluster_ip(GOOD)) == RTO | RETRANS | STATE


def test_without_the_kernels_own_description_goodbyes_are_no_resets(
    agent: agents.Agent, api: agents.Api
) -> None:
    """Then how it ended is told by the state that it ended in."""
    agent.stop()
    try:
        blind = Blind(agent.lab, api.source, *agents.SMALL_MAPS)
        blind.root = agent.root  # it replaces the other's programs
        with blind:
            for family in (4, 6):
                before = fared(blind, "good", family)
                for what in ("nothing", "reads", "shuts", "leaves unread", "lingers"):
                    does(blind, GOOD, family, what)
                new = fared(blind, "good", family).since(before)
                assert (new.established, new.failed) == (5 * TIMES, 0)
                before = fared(blind, "resetting", family)
                does(blind, RESETTING, family, "reads")
                new = fared(blind, "resetting", family).since(before)
                assert (new.established, new.resets, new.failed) == (TIMES, TIMES, TIMES)
                before = fared(blind, "closed", family)
                does(blind, CLOSED, family, "reads")
                assert fared(blind, "closed", family).since(before).refused == TIMES
    finally:
        agent.start()
