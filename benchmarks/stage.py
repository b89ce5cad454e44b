"""Where all but single packets is measured: a node of the lab, an API server stand-in, the agent.

    n1        the stand-in, on loopback and outside the hooks; the agent
    n1/p1     clients
    n1/p2, p3 servers, each with the four addresses that a service's endpoints have
    outside   clients of NodePorts
    n2/p1     a server of another node, whose agent serves these NodePorts alone (`other_agent`)

Leaving the `with` block ends and removes all of it; what a killed run left, the
next one removes.
"""

import collections.abc
import contextlib
import http.client
import json
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import types
import typing
import urllib.parse

import msgspec

from benchmarks import cluster, process, results
from lbproxy import errors
from lbproxy.kernel import bpffs
from lbproxy.lab import cluster as lab_cluster
from lbproxy.lab import netns, topology, traffic

NODE, CLIENT = "n1", "n1/p1"
SERVERS = ("n1/p2", "n1/p3")
OUTSIDE, OTHER_NODE, ELSEWHERE = "outside", "n2", "n2/p1"
PORT = 8080
START_TIMEOUT_S = 120.0
_QUIET_S = 1.0  # without more work than this share of a CPU:
_QUIET_SHARE = 0.02
_PREFIX = "lbproxy-bench-"
_POLLER = pathlib.Path(__file__).with_name("poller.py")


class BenchError(errors.LbproxyError):
    """The run can not go on; the text says why, with the agent's last lines."""


def place_of(server: str) -> cluster.Place:
    """Return where the measured service's endpoints are when they are in this pod: four of its addresses."""
    first = 100 + 10 * SERVERS.index(server)
    return cluster.Place(
        tuple(f"10.244.1.{first + index}" for index in range(cluster.ENDPOINTS)), (NODE,) * cluster.ENDPOINTS
    )


class Poller:
    """A process in the client's pod that connects to the measured service over and over (`poller.py`)."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self._process = popen
        self._outcomes: queue.Queue[dict[str, typing.Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._outcomes.put(json.loads(line))
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
            outcome = self._outcomes.get(timeout=10)
            if outcome is None:
                raise BenchError("the poller ended without a result")
            if "answers" in outcome:
                self._process.wait()
                return sum(outcome["answers"].values()), outcome["failures"]


class Agent:
    """A running agent."""

    def __init__(self, popen: subprocess.Popen[str], log: pathlib.Path, memory: process.MemoryCgroup) -> None:
        self.process = popen
        self.started_ns = 0
        self._log = log
        self._memory = memory

    def log(self) -> list[str]:
        """Return what it said."""
        return self._log.read_text().splitlines()

    def cpu_s(self) -> float:
        """Return its CPU time, with that of children that have ended."""
        self.check()
        return process.cpu_s(self.process.pid) + process.children_cpu_s(self.process.pid)

    def check(self) -> None:
        """Raise BenchError if it has ended."""
        status = self.process.poll()
        if status is not None:
            raise BenchError("\n".join([f"the agent ended with status {status}:", *self.log()[-15:]]))

    def settle(self, timeout_s: float = 60.0) -> float:
        """Wait until it has been quiet for a second, and return its CPU time until it became so."""
        deadline = time.monotonic() + timeout_s
        before_s = self.cpu_s()
        while time.monotonic() < deadline:
            time.sleep(_QUIET_S)
            now_s = self.cpu_s()
            if now_s - before_s < _QUIET_SHARE * _QUIET_S:
                return before_s
            before_s = now_s
        raise BenchError(f"the agent is not quiet after {timeout_s:.0f} s")

    def memory(self, services: int, pins: pathlib.Path) -> results.Memory:
        """Return what it and the objects it pinned occupy now."""
        self.check()
        status = process.status_bytes(self.process.pid)
        return results.Memory(
            services=services,
            rss=status["VmRSS"],
            rss_anonymous=status["RssAnon"],
            rss_of_maps=process.resident_maps_bytes(self.process.pid),
            rss_peak=status["VmHWM"],
            cgroup_peak=self._memory.peak_bytes(),
            maps=process.pinned_bytes(pins / "maps"),
            programs=sum(process.pinned_bytes(pins / "programs").values()),
        )

    def stop(self) -> None:
        """End it with SIGTERM and wait."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._memory.remove()


class Api:
    """A connection to the stand-in from this process."""

    def __init__(self, lab: lab_cluster.Lab, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        # A socket stays in the namespace it was made in.
        netns.inside(lab.netns(NODE), self._connection.connect)

    def move(self, namespace: str, name: str, place: cluster.Place, generation: int) -> None:
        """Patch a service's slice so that its endpoints are there."""
        path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices/{cluster.slice_name(name)}"
        body = msgspec.json.encode(cluster.move_patch(place, generation))
        self._connection.request("PATCH", path, body, {"Content-Type": "application/merge-patch+json"})
        response = self._connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise BenchError(f"PATCH {path}: {response.status} {answer[:200]!r}")

    def watch(self) -> http.client.HTTPResponse:
        """Open a watch of all slices on this connection: a line an event, from now on."""
        self._connection.request("GET", "/apis/discovery.k8s.io/v1/endpointslices?limit=1")
        version = json.loads(self._connection.getresponse().read())["metadata"]["resourceVersion"]
        self._connection.request(
            "GET", f"/apis/discovery.k8s.io/v1/endpointslices?watch=1&resourceVersion={version}"
        )
        return self._connection.getresponse()

    def close(self) -> None:
        """Close it."""
        self._connection.close()


class Stage:
    """The lab, and in it a cluster of so many services (`fill`) and an agent (`start_agent`)."""

    def __init__(self, cpu: int) -> None:
        self.cpu = cpu
        self.services = 0
        self.measured_at = SERVERS[0]  # where the measured service's endpoints are
        self.generation = 0
        self._stack = contextlib.ExitStack()
        self._of_cluster = contextlib.ExitStack()
        self._serial = 0

    def __enter__(self) -> "Stage":
        sweep()
        with contextlib.ExitStack() as stack:
            nodes = [
                topology.NodeSpec(NODE, [name.partition("/")[2] for name in (CLIENT, *SERVERS)]),
                topology.NodeSpec(OTHER_NODE, [ELSEWHERE.partition("/")[2]]),
            ]
            self.lab = stack.enter_context(lab_cluster.Lab(nodes, families=(4,)))
            for number, node in enumerate((NODE, OTHER_NODE), 1):
                route = [f"10.244.{number}.0/24", "via", self.lab[node].ipv4]
                self.lab.check_output(OUTSIDE, ["ip", "route", "add", *route])
            self.pins = pathlib.Path(tempfile.gettempdir()) / f"{own_prefix()}pins"
            stack.callback(bpffs.remove, self.pins)
            stack.enter_context(self._of_cluster)
            for server in SERVERS:
                for address in place_of(server).addresses:
                    name = self.lab.netns(server).name
                    subprocess.run(
                        ["ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0"], check=True
                    )
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: types.TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, value, at)

    def fill(self, services: int) -> None:
        """Replace the cluster by one of so many services, with nothing in the kernel yet."""
        self._of_cluster.close()
        self.services = services
        self.measured_at, self.generation = SERVERS[0], 0
        more = self._node_port_objects()
        items = cluster.objects(services, NODE, self.lab[NODE].ipv4, place_of(self.measured_at), PORT, more)
        file = self.lab.workdir / "objects.json"
        file.write_bytes(b'{"items":[' + b",".join(map(msgspec.json.encode, items)) + b"]}")
        popen = self.lab.popen(
            NODE,
            [sys.executable, "-m", "lbproxy.lab.apiserver", "--load", str(file)],
            cgroup=False, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._of_cluster.callback(_end, popen)
        assert popen.stdout is not None
        self.url = popen.stdout.readline().strip()
        if not self.url:
            raise BenchError("the API server stand-in did not start")
        self.api = Api(self.lab, self.url)
        self._of_cluster.callback(self.api.close)
        self.agent: Agent | None = None
        self._of_cluster.callback(self.stop_agent)

    def _node_port_objects(self) -> collections.abc.Iterator[cluster.Object]:
        return cluster.node_port_objects(
            cluster.Place((self.lab[SERVERS[0]].ipv4,), (NODE,)),
            cluster.Place((self.lab[ELSEWHERE].ipv4,), (OTHER_NODE,)),
            PORT,
        )

    @contextlib.contextmanager
    def other_agent(self) -> collections.abc.Iterator[None]:
        """Keep an agent running on the other node, which takes DSR packets out of their tunnels."""
        file, pins = self.lab.workdir / "other.json", pathlib.Path(f"{self.pins}-other")
        listed = {"apiVersion": "v1", "kind": "List", "items": list(self._node_port_objects())}
        file.write_bytes(msgspec.json.encode(listed))
        argv = [
            sys.executable, "-m", "lbproxy", "run", "--manifests", str(file), "--node-name", OTHER_NODE,
            "--node-ip", self.lab[OTHER_NODE].ipv4,
            "--cgroup", str(self.lab.cgroup(OTHER_NODE)), "--bpffs", str(pins),
        ]  # fmt: skip
        with (self.lab.workdir / "other.log").open("w") as stderr:
            popen = self.lab.popen(OTHER_NODE, argv, stderr=stderr)
        try:
            yield
        finally:
            _end(popen)
            bpffs.remove(pins)

    def forget_datapath(self) -> None:
        """Remove every pin: the next start is a first one."""
        bpffs.remove(self.pins)

    def start_agent(self, extra: collections.abc.Sequence[str] = ()) -> Agent:
        """Start the agent, and return it at once."""
        self._serial += 1
        log = self.lab.workdir / f"agent-{self._serial}.log"
        memory = process.MemoryCgroup(f"{own_prefix()}{self._serial}")
        argv = [
            sys.executable, "-m", "lbproxy", "run",
            "--master", self.url, "--node-name", NODE,
            "--cgroup", str(self.lab.cgroup(NODE)), "--bpffs", str(self.pins),
            *extra,
        ]  # fmt: skip
        with log.open("w") as stderr:
            started_ns = time.monotonic_ns()
            popen = self.lab.popen(NODE, memory.command(argv), stderr=stderr)
        self.agent = Agent(popen, log, memory)
        self.agent.started_ns = started_ns
        return self.agent

    def stop_agent(self) -> None:
        """End the agent, if there is one; the datapath stays."""
        if self.agent is not None:
            self.agent.stop()
            self.agent = None

    def move(self, api: Api | None = None) -> str:
        """Move the measured service's endpoints to the other pod, and return which."""
        self.generation += 1
        self.measured_at = SERVERS[self.generation % 2]
        (api or self.api).move(*cluster.MEASURED, place_of(self.measured_at), self.generation)
        return self.measured_at

    @contextlib.contextmanager
    def serving(self) -> collections.abc.Iterator[list[traffic.Server]]:
        """Keep both servers of the measured service running, on the measuring CPU."""
        servers = [self.lab.serve(server, [PORT], cpu=self.cpu) for server in SERVERS]
        try:
            yield servers
        finally:
            for server in servers:
                server.stop()

    def poll(self, timeout_ms: int, pause_ms: int = 0) -> Poller:
        """Start connecting to the measured service, on the measuring CPU, with a pause after each time."""
        argv = [
            "taskset", "--cpu-list", str(self.cpu), sys.executable, str(_POLLER),
            cluster.MEASURED_IP, str(cluster.MEASURED_PORT), str(timeout_ms), str(pause_ms),
        ]  # fmt: skip
        return Poller(self.lab.popen(CLIENT, argv, stdout=subprocess.PIPE))


class Churn:
    """Changes slices of services that no traffic goes to, so many a second, while the `with` block lasts."""

    def __init__(self, stage: Stage, per_s: float) -> None:
        self.changes = 0
        self.per_s = per_s
        self._fillers = stage.services - 1
        self._api = Api(stage.lab, stage.url)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error: Exception | None = None

    def _run(self) -> None:
        due_s = time.monotonic() + 1 / self.per_s
        try:
            while not self._stopped.wait(max(0.0, due_s - time.monotonic())):
                # A prime step visits all of them before any a second time.
                number = self.changes * 7919 % self._fillers
                generation = self.changes // self._fillers + 1
                namespace, name = cluster.filler_name(number)
                self._api.move(namespace, name, cluster.filler_place(number, generation), generation)
                self.changes += 1
                due_s += 1 / self.per_s
        except Exception as error:  # handed to whoever leaves the block
            self._error = error

    def __enter__(self) -> "Churn":
        if self.per_s and self._fillers:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: types.TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._api.close()
        if self._error is not None and value is None:
            raise self._error


def sweep() -> None:
    """Remove what killed runs left: labs with their processes, then pins and memory cgroups."""
    lab_cluster.sweep()
    for path in _leftovers(pathlib.Path(tempfile.gettempdir())):
        bpffs.remove(path)
        shutil.rmtree(path, ignore_errors=True)
    for root, _ in process.MEMORY_CONTROLLERS:
        for path in _leftovers(root):
            process.remove_when_empty(path)


def _leftovers(root: pathlib.Path) -> collections.abc.Iterator[pathlib.Path]:
    for path in root.glob(f"{_PREFIX}*"):
        pid, started, _ = path.name.removeprefix(_PREFIX).split("-", 2)
        if lab_cluster.start_time(int(pid)) != started:
            yield path


def own_prefix() -> str:
    """Return how the names of files and memory cgroups of this process begin; `sweep` knows them."""
    return f"{_PREFIX}{os.getpid()}-{lab_cluster.start_time(os.getpid())}-"


def _end(popen: subprocess.Popen[str]) -> None:
    popen.terminate()
    popen.wait()
