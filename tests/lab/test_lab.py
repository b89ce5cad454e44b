"""The lab itself: who reaches whom, where processes run, and that nothing stays behind."""

import concurrent.futures
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from lbproxy import mounts
from lbproxy.lab import cgroups, cluster, netns, shell, topology
from tests import polling
from tests.lab import conftest

FAMILIES = (4, 6)
PORT = 8080

# Whoever looks after it has to take down what is mounted in it, of whatever kind.
KILLED_LAB = """
import subprocess, sys
from lbproxy.kernel import bpffs
from lbproxy.lab import cluster, topology
with cluster.Lab(topology.uniform(1, 1)) as lab:
    bpffs.ensure(lab.workdir / "bpf-1")
    (lab.workdir / "bpf-1" / "folder").mkdir()
    (lab.workdir / "a folder").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", lab.workdir / "a folder"], check=True)
    server = lab.serve("n1/p1")
    print(lab.run, server.process.pid, flush=True)
    sys.stdin.read()
"""

# Interrupted at one of its steps, by itself; says what is left when it has left the block.
INTERRUPTED_LAB = """
import os, sys
from lbproxy.kernel import bpffs
from lbproxy.lab import cgroups, cluster, topology
from tests.lab import conftest
number, step = int(sys.argv[1]), sys.argv[2]

def struck(name, owner, attribute):
    real = getattr(owner, attribute)
    def strike(*arguments):
        if name == step and lab.run:  # before that, it sweeps after others
            os.kill(os.getpid(), number)
        return real(*arguments)
    setattr(owner, attribute, strike)

struck("building", topology.Topology, "commands")
struck("at work", bpffs, "ensure")
struck("ending", cgroups, "remove")
lab, how = cluster.Lab(topology.uniform(1, 1)), "by itself"
try:
    with lab:
        bpffs.ensure(lab.workdir / "bpf-1")
        lab.popen("n1", ["sleep", "600"])
except KeyboardInterrupt:
    how = "interrupted"
print(how, lab.workdir.exists(), conftest.leftovers(), open("/proc/self/mountinfo").read().count(lab.run))
"""


def links() -> str:
    return subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout


def netns_of(pid: int) -> int:
    return os.stat(f"/proc/{pid}/ns/net").st_ino


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("client", "server"),
    [
        ("n1/p1", "n1/p2"),
        ("n1/p1", "n2/p1"),
        ("n1/p1", "n1/p1"),
        ("n1", "n1/p1"),
        ("n1", "n2/p1"),
        ("n1/p1", "n2"),
        ("n1", "n2"),
        ("outside", "n1"),
    ],
)
def test_who_reaches_whom_at_which_address(lab: cluster.Lab, client: str, server: str, family: int) -> None:
    address = lab[server].address(family)
    running = lab.serve(server, [PORT])
    with lab.shell(client) as sockets:
        answers = [sockets.tcp(address, PORT), sockets.udp(address, PORT)]
        unconnected = sockets.udp(address, PORT, connected=False)
    running.stop()
    for answer in (*answers, unconnected):
        assert (answer.error, answer.server, answer.peer) == ("", server, (address, PORT))
    assert all(answer.local == answer.seen for answer in answers)
    if lab[client].is_pod or client == "outside":
        assert all(answer.seen and answer.seen[0] == lab[client].address(family) for answer in answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_node_answers_datagrams_from_the_address_they_were_sent_to(lab: cluster.Lab, family: int) -> None:
    bridge = topology.pod_subnet(family, 2).host(1)
    running = lab.serve("n2", [PORT])
    with lab.shell("n1") as sockets:
        answer = sockets.udp(bridge, PORT, connected=False)
    running.stop()
    assert answer.peer == (bridge, PORT)


def test_pods_are_not_reached_from_outside(lab: cluster.Lab) -> None:
    running = lab.serve("n1/p1", [PORT])
    with lab.shell("outside") as sockets:
        errors = {sockets.tcp(address, PORT, timeout_s=0.2).error for address in lab["n1/p1"].addresses}
    running.stop()
    assert errors == {"ETIMEDOUT"}


@pytest.mark.parametrize("where", ["n1", "n1/p1", "outside"])
@pytest.mark.parametrize("address", ["10.96.0.1", "fd00:96::1"])
@pytest.mark.parametrize("nonblocking", [False, True])
def test_a_service_address_has_a_route_but_no_one_there(
    lab: cluster.Lab, where: str, address: str, nonblocking: bool
) -> None:
    with lab.shell(where) as sockets:
        assert sockets.tcp(address, 80, timeout_s=0.2, nonblocking=nonblocking).error == "ETIMEDOUT"


def test_a_closed_port_refuses_and_the_error_is_the_one_python_knows(lab: cluster.Lab) -> None:
    address = lab["n1/p2"].ipv4
    with lab.shell("n1/p1") as sockets:
        assert sockets.tcp(address, 1).error == "ECONNREFUSED"
        assert sockets.tcp(address, 1, nonblocking=True).error == "ECONNREFUSED"
        assert sockets.udp(address, 1).error == "ECONNREFUSED"
        with pytest.raises(ConnectionRefusedError):
            sockets.open(address, 1)


def test_a_mapped_socket_speaks_ipv4(lab: cluster.Lab) -> None:
    address = lab["n2/p1"].ipv4
    running = lab.serve("n2/p1", [PORT])
    with lab.shell("n1/p1") as sockets:
        answers = [
            sockets.tcp(address, PORT, mapped=True),
            sockets.udp(address, PORT, mapped=True),
            sockets.udp(address, PORT, mapped=True, connected=False),
        ]
    running.stop()
    assert [answer.peer for answer in answers] == [(shell.as_mapped(address), PORT)] * 3
    assert {answer.seen and answer.seen[0] for answer in answers} == {lab["n1/p1"].ipv4}


def test_held_connections_stay_open_side_by_side(lab: cluster.Lab) -> None:
    running = lab.serve("n2/p1", [PORT])
    with lab.shell("n1/p1") as sockets:
        held = [sockets.open(lab["n2/p1"].ipv4, PORT) for _ in range(20)]
        seen = {connection.ask().seen for connection in held for _ in range(2)}
        running.kill()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            held[0].ask()
    assert len(seen) == 20


@pytest.mark.parametrize(
    ("where", "in_cgroup", "group"),
    [
        ("n1", True, "n1/node"),
        ("n1/p1", True, "n1/pod"),
        ("outside", True, "outside"),
        ("n1/p1", False, "fabric"),
    ],
)
def test_a_process_runs_in_the_namespace_and_cgroup_of_its_place(
    lab: cluster.Lab, where: str, in_cgroup: bool, group: str
) -> None:
    with lab.shell(where, cgroup=in_cgroup) as sockets:
        namespace, cgroup = sockets.where()
        assert sockets.process.pid in cgroups.processes(lab.cgroup())
        assert (sockets.process.pid in cgroups.processes(lab.cgroup("n1"))) == group.startswith("n1/")
    assert namespace == f"net:[{lab.netns(where).stat().st_ino}]"
    assert cgroup == f"/{lab.run}/{group}"


def test_code_runs_inside_a_namespace_and_the_caller_stays_out(lab: cluster.Lab) -> None:
    before = netns_of(os.getpid())
    inside = netns.inside(lab.netns("n1"), lambda: os.stat("/proc/thread-self/ns/net").st_ino)
    assert inside == lab.netns("n1").stat().st_ino != before
    assert netns_of(os.getpid()) == before
    with pytest.raises(ZeroDivisionError):
        netns.inside(lab.netns("n1"), lambda: 1 // 0)


def test_output_and_failure_of_a_command_come_back(lab: cluster.Lab) -> None:
    assert "172.18.0.1/24" in lab.check_output("n1", ["ip", "-4", "address", "show", "dev", "eth0"])
    with pytest.raises(subprocess.CalledProcessError):
        lab.check_output("n1", ["false"])


def test_nothing_is_left_and_the_namespace_it_was_built_from_is_untouched(
    build_lab: conftest.LabFactory,
) -> None:
    before = links()
    with build_lab(nodes=2, pods=1) as lab:
        lab.serve("n1/p1", [PORT])
        # One that its starter does not know of, and that ignores a polite request.
        lab.check_output("n1", ["sh", "-c", 'trap "" TERM; sleep 600 >/dev/null & echo'])
        pids = {pid: cluster.start_time(pid) for pid in cgroups.processes(lab.cgroup())}
        names = [lab.netns(where).name for where in lab.places]
        group, workdir = lab.cgroup(), lab.workdir
        assert links() == before
        assert set(names) <= set(netns.names())
        assert len(pids) == 2
    assert not group.exists()
    assert not workdir.exists()
    assert not set(names) & set(netns.names())
    polling.eventually(
        lambda: not [pid for pid, started in pids.items() if cluster.start_time(pid) == started],
        what="the end of every process",
    )
    assert links() == before


def test_a_lab_that_can_not_be_finished_leaves_nothing(
    build_lab: conftest.LabFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = build_lab(nodes=1, pods=1)
    monkeypatch.setattr(topology.Topology, "commands", lambda *_: [("n1", ["link set no-such-link up"])])
    with pytest.raises(cluster.LabError, match="ip in n1"), lab:
        pass
    assert not [name for name in conftest.leftovers() if name.startswith(lab.run)]


def test_a_process_that_has_ended_is_not_taken_for_a_living_one() -> None:
    ended = subprocess.Popen(["true"])
    polling.eventually(lambda: cluster.start_time(ended.pid) == "", what="a zombie seen as ended")
    ended.wait()
    assert cluster.start_time(ended.pid) == ""
    assert cluster.start_time(os.getpid()) == cluster.start_time(os.getpid()) != cluster.start_time(1)


def test_the_leftovers_of_a_killed_lab_are_swept_and_those_of_living_ones_are_not(lab: cluster.Lab) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", KILLED_LAB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        run, server = owner.stdout.readline().split()
        started = cluster.start_time(int(server))
        assert started
        assert run not in cluster.sweep()
        assert left_by(lab, run)
        owner.send_signal(signal.SIGKILL)
    # Or somebody else's next lab does, whose tests run beside these.
    cluster.sweep()
    polling.eventually(lambda: not left_by(lab, run), what="nothing left")
    polling.eventually(lambda: cluster.start_time(int(server)) != started, what="the server's end")
    assert lab.netns("n1").exists()


def left_by(lab: cluster.Lab, run: str) -> list[str]:
    """What is left of another lab."""
    found = [name for name in netns.names() if name.startswith(run)]
    mounted = [one.point for one in mounts.read() if one.point.is_relative_to(lab.workdir.parent / run)]
    paths = (lab.cgroup().parent / run, lab.workdir.parent / run)
    return [*found, *map(str, mounted), *(str(path) for path in paths if path.exists())]


def test_several_may_remove_the_same_cgroup_at_once(lab: cluster.Lab) -> None:
    """As labs do that begin at the same time, with what a dead one has left."""
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for _ in range(20):
            group = lab.cgroup() / "shared"
            for number in range(20):
                (group / f"{number}" / "below").mkdir(parents=True)
            done = [threads.submit(cgroups.remove, group) for _ in range(4)]
            assert [one.result() for one in done] == [None] * 4
            assert not group.exists()


@pytest.mark.parametrize("step", ["building", "at work", "ending"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_lab_that_is_told_to_end_leaves_nothing(needs_lab: None, number: signal.Signals, step: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_LAB, str(int(number)), step],
        cwd=pathlib.Path(__file__).parents[2],
        text=True,
        stdout=subprocess.PIPE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "interrupted False [] 0\n")


def test_a_namespace_that_is_mounted_twice_goes_at_once() -> None:
    """`ip netns add` binds the directory to itself the first time: what was there is mounted twice then."""
    name = f"lbp-twice-{os.getpid()}"
    netns.create(name, {})
    subprocess.run(["mount", "--bind", netns.path(name), netns.path(name)], check=True)
    netns.remove(name)
    assert name not in netns.names()
