"""The lab: a small cluster of network namespaces on this machine, with real processes and sockets in it.

    with Lab(topology.uniform(nodes=2, pods=3)) as lab:
        lab.serve("n2/p1", ports=[8080])                  # a TCP and UDP server named "n2/p1"
        with lab.shell("n1/p1") as shell:                 # sockets in that pod
            answer = shell.tcp(lab["n2/p1"].ipv4, 8080)   # answer.server == "n2/p1"
            answer = shell.udp(lab["n2/p1"].ipv6, 8080, connected=False)
            with shell.open(lab["n2/p1"].ipv4, 8080) as held:
                held.ask(); held.getpeername()
        client = lab.client("n1/p1", "short", lab["n2/p1"].ipv4, 8080, seconds=1)
        print(client.result().servers)
        agent = lab.popen("n1", ["lbproxy", "run", "--cgroup", str(lab.cgroup("n1")), …])

Places are named `n1` (a node), `n1/p1` (a pod), `outside` and `fabric`.

| place | addresses | default route |
|---|---|---|
| node number N | 172.18.0.N, fd00:172:18::N; on its pod bridge 10.244.N.1, fd00:244:N::1 | the fabric |
| pod number P of node N | 10.244.N.(P+1), fd00:244:N::(P+1) | its node |
| outside | 172.18.0.100, fd00:172:18::64 | the fabric |

The fabric forwards nothing: what no node takes ends there. Nothing of the lab is
in the namespace it is built from; there is no way out of it.

Processes of node N run in the cgroup `lab.cgroup("N")`/node, those of its pods in
`lab.cgroup("N")`/pod, so hooks on `lab.cgroup("N")` see both. `cgroup=False` puts
a process beside all nodes, where no node's hooks see it.

Leaving the `with` block ends every process in the lab's cgroups, and removes
cgroups, namespaces, files, and what is mounted among these. SIGTERM and SIGHUP leave
it, too, where they would end the process: as a KeyboardInterrupt. A lab whose process
was killed is removed by the next one to start (`sweep`). Needs root;
`missing_capabilities` says what is not there.
"""

import collections.abc
import contextlib
import errno
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import types
import typing

from lbproxy import cgroup2, errors, interrupts, mounts
from lbproxy.kernel import namespaces
from lbproxy.lab import cgroups, netns, shell, topology, traffic

PREFIX = "lbp"
_RUN_NAME = re.compile(rf"{PREFIX}-(\d+)-([0-9a-f]+)-\d+")
STOP_TIMEOUT_S = 3.0
_MNT_DETACH: typing.Final = 2

# Enters the cgroup before anything else, so that every socket the program makes belongs to it.
_TRAMPOLINE = 'echo $$ >"$1" && ns="$2" && shift 2 && exec nsenter --net="$ns" -- "$@"'

_EVERYWHERE = {
    "net.ipv6.conf.all.accept_dad": "0",
    "net.ipv6.conf.default.accept_dad": "0",
    "net.ipv6.conf.default.router_solicitations": "0",
    "net.core.somaxconn": "65535",
    "net.ipv4.tcp_max_syn_backlog": "65535",
    # One client makes more connections to one address than there are ports: reuse those just closed.
    "net.ipv4.tcp_timestamps": "2",
    "net.ipv4.tcp_tw_reuse": "1",
    "net.ipv4.tcp_tw_reuse_delay": "1",
    "net.ipv4.tcp_max_tw_buckets": "262144",
    "net.ipv4.ping_group_range": "0 2147483647",
}
_POD = {**_EVERYWHERE, "net.ipv4.ip_local_port_range": "10000 65535"}
_NODE = {
    **_EVERYWHERE,
    # Above the NodePorts, as on any node.
    "net.ipv4.ip_local_port_range": "32768 65535",
    "net.ipv4.ip_forward": "1",
    "net.ipv6.conf.all.forwarding": "1",
    "net.ipv4.conf.all.rp_filter": "0",
    "net.ipv4.conf.default.rp_filter": "0",
}


class LabError(errors.LbproxyError):
    """The lab could not be built; the text is one line."""


def missing_capabilities() -> list[str]:
    """Say what this machine or process lacks for a lab; empty when it can be built."""
    found = [f"the command {tool}" for tool in ("ip", "nsenter", "gcc") if not shutil.which(tool)]
    if os.geteuid() != 0:
        return [*found, "root"]
    mount = cgroup2.mount_point()
    if mount is None:
        found.append("a mounted cgroup v2")
    elif not os.access(mount, os.W_OK):
        found.append(f"a writable {mount}")
    return found


def start_time(pid: int) -> str:
    """Return when a process began, as an opaque word, or "" where it has ended."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The program's name, in parentheses, may hold anything: count from behind it.
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else f"{int(fields[18]):x}"


def run_prefix() -> str:
    """Return how the names of everything begin that labs of this process make."""
    return f"{PREFIX}-{os.getpid()}-{start_time(os.getpid())}-"


def sweep() -> list[str]:
    """Remove what labs of dead processes left, and return their names; labs of living ones stay."""
    mount = cgroup2.mount_point()
    groups = os.listdir(mount) if mount else []
    leftovers = [*groups, *netns.names(), *os.listdir(tempfile.gettempdir())]
    matches = {match[0]: match for name in leftovers if (match := _RUN_NAME.match(name))}
    dead = sorted(run for run, match in matches.items() if start_time(int(match[1])) != match[2])
    for run in dead:
        _remove(run, mount)
    return dead


def _remove(run: str, mount: pathlib.Path | None) -> None:
    # Processes first: a namespace lives on, without a name, as long as one is in it.
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, _workdir(run), ignore_errors=True)
        stack.callback(_unmount, _workdir(run))
        for name in netns.names():
            if name.startswith(f"{run}-"):
                stack.callback(netns.remove, name)
        if mount:
            stack.callback(cgroups.remove, mount / run)


def _unmount(folder: pathlib.Path) -> None:
    """Take down whatever is mounted below a folder: what is pinned in a bpffs goes with it."""
    for mount in reversed(mounts.read()):
        if mount.point.is_relative_to(folder):
            try:
                namespaces.call("umount2", bytes(mount.point), _MNT_DETACH)
            except OSError as error:
                # Two labs that start at once may do this for the same dead one.
                if error.errno not in (errno.ENOENT, errno.EINVAL):
                    raise


def _workdir(run: str) -> pathlib.Path:
    return pathlib.Path(tempfile.gettempdir()) / run


class Lab:
    """A cluster of namespaces, while the `with` block lasts. See the module's text."""

    def __init__(
        self,
        nodes: collections.abc.Sequence[topology.NodeSpec],
        *,
        families: tuple[int, ...] = (4, 6),
        outside: bool = True,
        program: pathlib.Path | None = None,
    ) -> None:
        """Describe a lab; `program` is a traffic program already built, else it builds its own."""
        self.topology = topology.Topology(tuple(nodes), families, outside)
        self.places = self.topology.places()
        self.run = ""
        self._program = program
        self._processes: list[subprocess.Popen[str]] = []
        self._mount = pathlib.Path()
        self._signals = interrupts.Interrupts()
        self._caught = contextlib.ExitStack()

    def __enter__(self) -> "Lab":
        missing = missing_capabilities()
        if missing:
            raise LabError(f"a lab needs {', '.join(missing)}")
        self._mount = cgroup2.mount_point() or pathlib.Path()
        sweep()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._signals.caught(fatal=True))
            self.run = self._claim()
            stack.callback(self._end)
            self._build()
            self._caught = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: types.TracebackType | None
    ) -> None:
        self._caught.close()

    def __getitem__(self, where: str) -> topology.Place:
        """Return a place with its addresses."""
        return self.places[where]

    @property
    def workdir(self) -> pathlib.Path:
        """A directory for files of this lab, removed with it."""
        return _workdir(self.run)

    def netns(self, where: str) -> pathlib.Path:
        """Return the namespace of a place, as nsenter, setns and `netns.inside` want it."""
        return netns.path(self._netns_name(where))

    def cgroup(self, where: str = "") -> pathlib.Path:
        """Return the cgroup of a node with all its pods, for `n1/p1` that of the node's pods, "" of all."""
        if not where:
            return self._group()
        place = self.places[where]
        if place.is_pod:
            return self._group(place.node, "pod")
        return self._group(place.name)

    def command(self, where: str, argv: collections.abc.Sequence[str], *, cgroup: bool = True) -> list[str]:
        """Return a command line that runs `argv` in the namespace and cgroup of a place."""
        place = self.places[where]
        if not cgroup:
            group = self._group(topology.FABRIC)
        elif place.is_pod:
            group = self._group(place.node, "pod")
        else:
            group = self._group(place.name, "node") if place.node else self._group(place.name)
        return [
            "/bin/sh", "-c", _TRAMPOLINE, "lab", str(group / "cgroup.procs"), str(self.netns(where)), *argv
        ]  # fmt: skip

    def popen(
        self, where: str, argv: collections.abc.Sequence[str], *, cgroup: bool = True, **options: typing.Any
    ) -> subprocess.Popen[str]:
        """Start a process in a place, to end with the lab; `options` go to `subprocess.Popen`."""
        # Its own session: an interrupt at the terminal is for the lab's owner, who then ends it in order.
        process: subprocess.Popen[str] = subprocess.Popen(
            self.command(where, argv, cgroup=cgroup), text=True, start_new_session=True, **options
        )
        self._processes.append(process)
        return process

    def check_output(
        self,
        where: str,
        argv: collections.abc.Sequence[str],
        *,
        cgroup: bool = True,
        timeout_s: float = 120.0,
    ) -> str:
        """Run a command in a place to its end and return its output; CalledProcessError if it fails."""
        return subprocess.run(
            self.command(where, argv, cgroup=cgroup),
            text=True, stdout=subprocess.PIPE, check=True, timeout=timeout_s,
        ).stdout  # fmt: skip

    def shell(self, where: str, *, cgroup: bool = True) -> shell.Shell:
        """Start a process in a place that opens sockets as it is told."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return shell.Shell(self.popen(where, shell.ARGV, cgroup=cgroup, **pipes))

    def serve(
        self,
        where: str,
        ports: collections.abc.Iterable[int] = (8080,),
        *,
        name: str | None = None,
        bind: str = "::",
        cpu: int | None = None,
        cgroup: bool = True,
    ) -> traffic.Server:
        """Start a server, named after its place unless told, and return it once it listens."""
        name = where if name is None else name
        arguments = traffic.serve_arguments(name, ports, bind=bind, cpu=cpu)
        process = self.popen(where, [str(self.program()), *arguments], cgroup=cgroup, stdout=subprocess.PIPE)
        return traffic.Server(name, process)

    def client(
        self, where: str, mode: traffic.Mode, address: str, port: int, *, cgroup: bool = True,
        **options: typing.Any,
    ) -> traffic.Client:  # fmt: skip
        """Start a client; `options` are those of `traffic.client_arguments`."""
        arguments = traffic.client_arguments(mode, address, port, **options)
        process = self.popen(where, [str(self.program()), *arguments], cgroup=cgroup, stdout=subprocess.PIPE)
        return traffic.Client(process)

    def program(self) -> pathlib.Path:
        """Return the traffic program, building it for this lab the first time."""
        if self._program is None:
            self._program = traffic.build(self.workdir)
        return self._program

    def _claim(self) -> str:
        for serial in itertools.count():
            run = f"{run_prefix()}{serial}"
            try:
                _workdir(run).mkdir(mode=0o700)
            except FileExistsError:
                continue
            return run
        raise AssertionError("counting never ends")

    def _build(self) -> None:
        for name, place in self.places.items():
            for leaf in ((name,) if not place.node else (place.node, "node"), (place.node, "pod")):
                if leaf[0]:
                    self._group(*leaf).mkdir(parents=True, exist_ok=True)
            settings = _POD if place.is_pod or not place.node else _NODE
            netns.create(self._netns_name(name), settings)
        names = {name: self._netns_name(name) for name in self.places}
        for name, lines in self.topology.commands(names):
            done = subprocess.run(
                ["ip", "-n", names[name], "-batch", "-"],
                input="\n".join(lines), text=True, capture_output=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise LabError(f"ip in {name}: {'; '.join(done.stderr.splitlines())}")

    def _end(self) -> None:
        """Remove it whole, even if a signal comes now: nobody would go on with that before the next lab."""
        before = self._signals.number
        with self._signals.held():
            try:
                self._end_processes()
            finally:
                _remove(self.run, self._mount)
        if self._signals.number != before:
            raise interrupts.Interrupted

    def _end_processes(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()

    def _netns_name(self, where: str) -> str:
        return f"{self.run}-{self.places[where].name.replace('/', '-')}"

    def _group(self, *names: str) -> pathlib.Path:
        return self._mount.joinpath(self.run, *names)
