"""Where all but single packets is measured: nodes of the lab, one for each contestant and one with none.

    bare                       nothing is ever programmed here: the limit
    lbproxy, iptables, …       a node for each contestant, otherwise the same
    far                        pods of another node, for all of them; nothing is programmed
    peer                       a second node of lbproxy, for DSR (`contestants.Lbproxy.peer`)
    outside                    clients of NodePorts

Every node but `far` and `peer` is a site: p1 has clients, p2 and p3 servers, each of
those with the four addresses that a service's endpoints have.

Leaving the `with` block ends and removes all of it; what a killed run left, the
next one removes.
"""

import collections.abc
import contextlib
import dataclasses
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import types
import typing

import msgspec

from benchmarks import cluster, process
from lbproxy import errors
from lbproxy.kernel import bpffs
from lbproxy.lab import cluster as lab_cluster
from lbproxy.lab import topology, traffic

BARE, FAR, PEER, OUTSIDE = "bare", "far", "peer", "outside"
PODS = "10.244.0.0/16"  # how everybody tells them from clients outside
PORT = 8080
# Not one that services lead to: a client's port may be the same there at the same time.
DIRECT_PORT = PORT + 1
PORTS = (PORT, DIRECT_PORT)
_PREFIX = "lbproxy-bench-"
_OWN_NAME = re.compile(rf"{_PREFIX}(\d+)-([0-9a-f]+)-")
_POLLER = pathlib.Path(__file__).with_name("poller.py")


class BenchError(errors.LbproxyError):
    """The run can not go on; the text says why, with the agent's last lines."""


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """A node with a client's pod and two servers' pods."""

    node: str
    number: int  # of the node in the lab, from 1

    @property
    def client(self) -> str:
        """The pod that asks."""
        return f"{self.node}/p1"

    @property
    def servers(self) -> tuple[str, str]:
        """The pods that answer."""
        return f"{self.node}/p2", f"{self.node}/p3"

    def place_of(self, server: str) -> cluster.Place:
        """Return where a service's endpoints are when they are in this pod: four of its addresses."""
        first = 100 + 10 * self.servers.index(server)
        subnet = topology.pod_subnet(4, self.number)
        addresses = tuple(subnet.host(first + index) for index in range(cluster.ENDPOINTS))
        return cluster.Place(addresses, (self.node,) * cluster.ENDPOINTS)


class Arena:
    """The lab with a site for each of these contestants' names, and one that is bare."""

    def __init__(self, names: collections.abc.Sequence[str], cpu: int) -> None:
        self.cpu = cpu
        self.sites = {node: Site(node, number) for number, node in enumerate((BARE, *names), 1)}
        self.far, self.peer = f"{FAR}/p1", f"{PEER}/p1"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> typing.Self:
        sweep()
        nodes = [topology.NodeSpec(node, ("p1", "p2", "p3")) for node in self.sites]
        nodes += [topology.NodeSpec(node, ("p1",)) for node in (FAR, PEER)]
        with contextlib.ExitStack() as stack:
            self.lab = stack.enter_context(lab_cluster.Lab(nodes, families=(4,)))
            for number, node in enumerate(nodes, 1):
                route = [topology.pod_subnet(4, number).cidr, "via", self.lab[node.name].ipv4]
                self.lab.check_output(OUTSIDE, ["ip", "route", "add", *route])
            for site in self.sites.values():
                for server in site.servers:
                    for address in site.place_of(server).addresses:
                        argv = ["ip", "address", "add", f"{address}/24", "dev", "eth0"]
                        self.lab.check_output(server, argv)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: types.TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, value, at)

    def far_place(self) -> cluster.Place:
        """Return where endpoints of another node are."""
        return cluster.Place((self.lab[self.far].ipv4,), (FAR,))

    def peer_place(self) -> cluster.Place:
        """Return where endpoints of another node of lbproxy are."""
        return cluster.Place((self.lab[self.peer].ipv4,), (PEER,))

    @contextlib.contextmanager
    def serving(self, site: Site) -> collections.abc.Iterator[list[traffic.Server]]:
        """Keep both servers of a site running, on the measuring CPU."""
        servers = [self.lab.serve(server, [PORT], cpu=self.cpu) for server in site.servers]
        try:
            yield servers
        finally:
            for server in servers:
                server.stop()

    def poll(self, site: Site, timeout_ms: int, pause_ms: int = 0) -> "Poller":
        """Start connecting to the site's measured service, on the measuring CPU, pausing after each time."""
        argv = [
            "taskset", "--cpu-list", str(self.cpu), sys.executable, str(_POLLER),
            cluster.MEASURED_IP, str(cluster.MEASURED_PORT), str(timeout_ms), str(pause_ms),
        ]  # fmt: skip
        return Poller(self.lab.popen(site.client, argv, stdout=subprocess.PIPE))


class Poller:
    """A process in a client's pod that connects to the measured service over and over (`poller.py`).

    It ends with the `with` block, or by `stop`.
    """

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self._process = popen
        self._outcomes: queue.Queue[dict[str, typing.Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()  # which has closed the pipe

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._outcomes.put(msgspec.json.decode(line))
        self._outcomes.put(None)

    def until_answer(self, name: str, timeout_s: float) -> int | None:
        """Wait for the outcome to change to an answer of this server: when (CLOCK_MONOTONIC, ns), or None."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                outcome = self._outcomes.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if outcome is None:
                raise BenchError("the poller ended by itself")
            if outcome.get("ok") and outcome["answer"] == name:
                return int(outcome["t_ns"])

    def stop(self) -> tuple[int, dict[str, int]]:
        """End it and return how many connections were answered, and the failures of all others."""
        self._process.terminate()
        while True:
            try:
                outcome = self._outcomes.get(timeout=10)
            except queue.Empty:
                outcome = None
            if outcome is None:
                raise BenchError("the poller gave no result")
            if "answers" in outcome:
                return sum(outcome["answers"].values()), outcome["failures"]


def sweep() -> None:
    """Remove what killed runs left: labs with their processes, then pins and memory cgroups."""
    lab_cluster.sweep()
    for path in _leftovers(pathlib.Path(tempfile.gettempdir())):
        bpffs.remove(path)
        shutil.rmtree(path, ignore_errors=True)
    for root, _ in process.MEMORY_CONTROLLERS:
        for path in _leftovers(root):
            process.end_and_remove(path)


def _leftovers(root: pathlib.Path) -> collections.abc.Iterator[pathlib.Path]:
    for path in root.glob(f"{_PREFIX}*"):
        match = _OWN_NAME.match(path.name)
        if match and lab_cluster.start_time(int(match[1])) != match[2]:
            yield path


def own_prefix() -> str:
    """Return how the names of files and memory cgroups of this process begin; `sweep` knows them."""
    return f"{_PREFIX}{os.getpid()}-{lab_cluster.start_time(os.getpid())}-"


def end(popen: subprocess.Popen[str]) -> None:
    """End a process and wait for it."""
    popen.terminate()
    popen.wait()
