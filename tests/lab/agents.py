"""The real agent on a node of a lab, and the API server stand-in that it follows.

    with agents.Api(lab.netns("n1")) as api, agents.Agent(lab, api.source) as agent:
        api.put(manifests.service("web", 1), *manifests.slices("web", [lab["n1/p2"]]))
        agent.has_backends("web", {"n1/p2"})
        agent.at("n1/p1").tcp("10.96.0.1", 80)

Leaving an agent's `with` ends the process, by its id, and removes its pins.
"""

import asyncio
import collections.abc
import contextlib
import functools
import ipaddress
import itertools
import json
import operator
import os
import pathlib
import signal
import subprocess
import sys
import threading
import types
import typing

from lbproxy.core import inventory, model, tables
from lbproxy.kernel import bpffs, identity, libbpf, maps, programs
from lbproxy.lab import apiserver, apistore, cluster, netns, shell, traffic
from tests import polling
from tests.lab import manifests

LBPROXY = (sys.executable, "-m", "lbproxy")
API_PORT = 6443
# Reading a table back takes as long as it has rows.
SMALL_MAPS = ("--map-rows", "slots=4096", "--map-rows", "backends=4096", "--map-rows", "services=4096")
STORM: tuple[tuple[str, traffic.Mode, int, int], ...] = (
    ("n1/p1", "short", 4, manifests.TCP_PORT),
    ("n1", "short", 6, manifests.TCP_PORT),
    ("n1/p1", "udp-new", 6, manifests.UDP_PORT),
    ("n1", "udp-new", 4, manifests.UDP_PORT),
)
# Leaves the agents a share of two CPUs.
STORM_PAUSE_S = 0.0003
T = typing.TypeVar("T")
_SERIAL = itertools.count(1)
_USABLE = (tables.BackendState.ACTIVE, tables.BackendState.TERMINATING)


class Api:
    """An API server stand-in in a namespace of the lab, with its own thread and event loop."""

    def __init__(self, namespace: pathlib.Path, *objects: manifests.Object, **options: typing.Any) -> None:
        self._namespace = namespace
        self._objects = objects
        self._options = {"port": API_PORT, **options}
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, name="api")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped: asyncio.Event | None = None
        self.server: apiserver.ApiServer | None = None

    @property
    def source(self) -> tuple[str, ...]:
        """The agent's flags for this server."""
        assert self.server is not None
        return "--master", self.server.url

    def do(self, function: collections.abc.Callable[[apiserver.ApiServer], T]) -> T:
        """Call a function on the server in its own thread and return what it does."""

        async def call() -> T:
            assert self.server is not None
            return function(self.server)

        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(polling.TIMEOUT_S)

    def put(self, *objects: manifests.Object) -> None:
        """Create or replace objects."""
        for obj in objects:
            self.do(lambda server, obj=obj: server.store.put(obj))  # type: ignore[misc]

    def delete(self, *objects: manifests.Object) -> None:
        """Remove objects."""
        for obj in objects:
            plural, metadata = apistore.PLURALS[obj["kind"]], obj["metadata"]
            key = (metadata.get("namespace", ""), metadata["name"])
            self.do(lambda server, plural=plural, key=key: server.store.delete(plural, key))  # type: ignore[misc]

    def __enter__(self) -> "Api":
        self._thread.start()
        assert self._listening.wait(polling.TIMEOUT_S)
        assert self.server is not None
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is not None and self._stopped is not None:
            self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(30)

    def _run(self) -> None:
        netns.inside(self._namespace, lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        server = apiserver.ApiServer(**self._options)
        for obj in self._objects:
            server.store.put(obj)
        try:
            async with server:
                self.server = server
                self._listening.set()
                await self._stopped.wait()
        finally:
            self._listening.set()


class Folder:
    """A folder of manifests; files are replaced whole."""

    def __init__(self, path: pathlib.Path) -> None:
        path.mkdir()
        self.path = path

    @property
    def source(self) -> tuple[str, ...]:
        """The agent's flags for this folder."""
        return "--manifests", str(self.path)

    def write(self, name: str, content: str | bytes | collections.abc.Iterable[manifests.Object]) -> None:
        """Replace a file by raw text, or by a List of objects."""
        if not isinstance(content, (str, bytes)):
            content = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(content)})
        draft = self.path / f".{name}"
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        draft.replace(self.path / name)


class Agent:
    """`lbproxy run` on a node of a lab: starts with the `with` block, and leaves nothing after it."""

    def __init__(
        self,
        lab: cluster.Lab,
        source: collections.abc.Sequence[str],
        *flags: str,
        node: str = "n1",
        cgroup: pathlib.Path | None = None,
    ) -> None:
        self.lab = lab
        self.node = node
        self.flags = [*source, *flags]
        self.cgroup = cgroup or lab.cgroup(node)
        serial = next(_SERIAL)
        self.root = lab.workdir / f"bpf-{serial}"
        self.log_file = lab.workdir / f"agent-{serial}.log"
        self.process: subprocess.Popen[str] | None = None
        self._log_start = 0
        self._maps: maps.BpfMaps | None = None
        self._shells: dict[str, shell.Shell] = {}

    # --- the process ---

    def command(self, *flags: str) -> list[str]:
        """Return the agent's command line."""
        return [
            *LBPROXY, "run", "--node-name", self.node, "--cgroup", str(self.cgroup),
            "--bpffs", str(self.root), *self.flags, *flags,
        ]  # fmt: skip

    def start(self, *, wait: bool = True) -> None:
        """Start it, and wait until the first full state is in the kernel."""
        assert self.process is None
        self.reopen()
        self.log_file.touch()
        self._log_start = self.log_file.stat().st_size
        with self.log_file.open("ab") as log:
            self.process = self.lab.popen(
                self.node, self.command(), cgroup=False, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Wait for the line that says so; AssertionError with the log if the agent ends instead."""
        process = self.process
        assert process is not None

        def ready() -> bool:
            ended = process.poll()
            assert ended is None, f"the agent ended with status {ended}:\n{self.log}"
            return " ready: " in self.log

        try:
            polling.eventually(ready, 90, "readiness")
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.log}") from None

    def stop(self) -> int:
        """End it as the kubelet does, and return its exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it without a chance to do anything."""
        self._end(signal.SIGKILL)

    def wait(self) -> int:
        """Wait until it ends by itself, and return its exit status."""
        assert self.process is not None
        status = self.process.wait(polling.TIMEOUT_S)
        self.process = None
        return status

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self.process is not None and self.process.poll() is None

    @property
    def log(self) -> str:
        """What it has said since it was last started."""
        with self.log_file.open("rb") as lines:
            lines.seek(self._log_start)
            return lines.read().decode()

    def says(self, text: str) -> str:
        """Wait for a log line with this text and return it."""
        lines: list[str] = []

        def found() -> bool:
            lines[:] = [line for line in self.log.splitlines() if text in line]
            return bool(lines)

        try:
            polling.eventually(found)
        except AssertionError:
            raise AssertionError(f"no line with {text!r} in:\n{self.log}") from None
        return lines[0]

    def lbproxy(self, command: str, *arguments: str) -> str:
        """Run another lbproxy command on this agent's pins and return its output."""
        argv = [*LBPROXY, command, "--bpffs", str(self.root), *arguments]
        return self.lab.check_output(self.node, argv, cgroup=False)

    # --- the kernel ---

    @property
    def maps(self) -> maps.BpfMaps:
        """The pinned maps, for reading."""
        if self._maps is None:
            self._maps = maps.BpfMaps(str(self.root / "maps"))
        return self._maps

    def reopen(self) -> None:
        """Open the maps anew: those of a replaced datapath are others."""
        if self._maps is not None:
            self._maps.close()
            self._maps = None

    def services(self) -> set[str]:
        """Return the names of the Services that the kernel balances."""
        return {port.key.service.name for port in inventory.read(self.maps).ports}

    def ports(self, name: str) -> dict[tuple[str, int], inventory.ServicePort]:
        """Return what the kernel balances for a Service, by port name and family."""
        return {
            (port.key.port_name, port.key.family.value): port
            for port in inventory.read(self.maps).ports
            if port.key.service == model.ServiceName("default", name)
        }

    def port(self, name: str, port_name: str = "http", family: int = 4) -> inventory.ServicePort:
        """Return one service port, once the kernel has it."""
        found = polling.eventually(lambda: self.ports(name).get((port_name, family)), what=name)
        assert found is not None
        return found

    def backends(self, name: str, port_name: str = "http", family: int = 4) -> set[str]:
        """Return the places, or addresses, that new connections to a Service's port may go to."""
        port = self.ports(name).get((port_name, family))
        drawn_from = functools.reduce(operator.or_, (one.set for one in port.frontends), 0) if port else 0
        found = set()
        for backend in port.backends if port else ():
            if backend.state in _USABLE and backend.sets & drawn_from:
                found.add(self.place(backend.address))
        return found

    def place(self, packed: bytes) -> str:
        """Return the name of the place that has an address as the maps hold it, else the address."""
        address = ipaddress.IPv6Address(packed).ipv4_mapped or ipaddress.IPv6Address(packed)
        names = (place.name for place in self.lab.places.values() if str(address) in place.addresses)
        return next(names, str(address))

    def has_backends(
        self, name: str, places: set[str], keys: collections.abc.Iterable[tuple[str, int]] = ()
    ) -> None:
        """Wait until a Service's ports have exactly these backends (`keys`: port names and families)."""
        wanted = tuple(keys) or tuple((port, family) for port in ("http", "dns") for family in (4, 6))
        # The slots are what connections follow, and they are written after the backends.
        polling.eventually(
            lambda: all(
                self.backends(name, *key) == places
                and (port := self.ports(name).get(key)) is not None
                and all(bool(frontend.slot_count) == bool(places) for frontend in port.frontends)
                for key in wanted
            ),
            what=f"{name} with {places}",
        )

    def counter(self, name: str) -> int:
        """Return a counter of the kernel programs."""
        return inventory.counters(self.maps)[name]

    def live_sockets(self) -> int:
        """Return how many rows of the sockets table belong to a socket."""
        return sum(any(row[:8]) for _, row in self.maps.rows("sockets"))

    def program_ids(self) -> dict[str, int]:
        """Return the kernel's ids of the programs that are linked."""
        found = {}
        for program in programs.SOCKET:
            fd = libbpf.obj_get(str(self.root / "links" / program.name))
            found[program.name] = libbpf.link_info(fd).prog_id
            os.close(fd)
        return found

    def identity(self) -> identity.Identity:
        """Return what is pinned."""
        found = identity.read(self.root)
        assert found is not None
        return found

    # --- traffic ---

    def serves_on(self, *names: str, more: int = 20) -> None:
        """Wait until each of these Services has had more new connections."""
        before = {name: self._connections(name) for name in names}
        polling.eventually(
            lambda: all(self._connections(name) >= count + more for name, count in before.items()),
            what=f"connections to {names}",
        )

    def has_seen_off(self, name: str) -> None:
        """Wait until whatever a storm had begun with a Service has ended: each client has one at a time."""
        before = {key: port.connections for key, port in self.ports(name).items()}
        polling.eventually(
            lambda: all(port.connections >= before[key] + 2 for key, port in self.ports(name).items()),
            what=f"more connections to each port of {name}",
        )

    def _connections(self, name: str) -> int:
        return sum(port.connections for port in self.ports(name).values())

    def at(self, where: str) -> shell.Shell:
        """Return a shell in a place of the lab, the same one each time."""
        if where not in self._shells:
            self._shells[where] = self.lab.shell(where)
        return self._shells[where]

    def __enter__(self) -> "Agent":
        try:
            self.start()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: types.TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(bpffs.remove, self.root)
            stack.callback(self.reopen)
            for opened in self._shells.values():
                stack.callback(opened.close)
            if self.process is not None:
                self.kill()

    def _end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.wait()


@contextlib.contextmanager
def storm(lab: cluster.Lab, number: int) -> collections.abc.Iterator[None]:
    """Make thousands of connections a second to a service, every way; AssertionError if any fails."""
    clients = [
        lab.client(
            where, mode, manifests.cluster_ip(number, family), port, timeout_s=5, pause_s=STORM_PAUSE_S
        )
        for where, mode, family, port in STORM
    ]
    try:
        yield
    finally:
        results = [client.stop() for client in clients]
    failures = {one: result.failures for one, result in zip(STORM, results, strict=True) if result.failures}
    assert failures == {}, failures
    assert all(result.count > 0 for result in results)


def mapped(address: str) -> bytes:
    """Return an address as the maps hold it."""
    parsed = ipaddress.ip_address(address)
    return parsed.packed if parsed.version == 6 else bytes(10) + b"\xff\xff" + parsed.packed


def run_script(lab: cluster.Lab, where: str, script: str, *arguments: object) -> typing.Any:
    """Run a Python script in a place and return the JSON that it prints."""
    argv = [sys.executable, "-I", "-S", "-c", script, *map(str, arguments)]
    return json.loads(lab.check_output(where, argv))
