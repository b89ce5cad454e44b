"""kube-proxy as a contestant: the real program where there is one, else the rules it would have written."""

import collections.abc
import dataclasses
import os
import pathlib
import random
import shutil
import time
import typing

from pyroute2.netlink.nfnetlink import nfctsocket

from benchmarks import agents, arena, cluster, contestants, process, results
from benchmarks.kubeproxy import load, model, program
from lbproxy.lab import netns

Mode = typing.Literal["iptables", "nftables"]
MODES: tuple[Mode, ...] = ("iptables", "nftables")
Backend = typing.Literal["legacy", "nft"]
BACKENDS = {"legacy": load.Backend.LEGACY, "nft": load.Backend.NF_TABLES}
_TABLES = ("nat", "filter", "mangle")


class _WithRules(contestants.Contestant):
    """Rules in a node's namespace, whoever writes them, and the connection tracker that they need."""

    def __init__(self, at: arena.Arena, mode: Mode, backend: Backend) -> None:
        self.name = mode
        super().__init__(at)
        self.backend = load.Backend.NATIVE if mode == "nftables" else BACKENDS[backend]

    def forget_connections(self) -> None:
        """Empty the node's connection tracker."""

        def flush() -> None:
            with nfctsocket.NFCTSocket() as tracker:
                tracker.flush()

        netns.inside(self.at.lab.netns(self.site.node), flush)

    def remove_rules(self) -> None:
        """Remove all rules from the node: nobody else has any there."""
        if self.backend is load.Backend.NATIVE:
            commands = [[self.backend, "flush", "ruleset"]]
        else:
            commands = [[self.backend, "-w", "-t", table, flag] for table in _TABLES for flag in ("-F", "-X")]
        if shutil.which(commands[0][0]) is None:
            return  # nor has anybody put rules there without it
        for argv in commands:
            self.at.lab.check_output(self.site.node, argv, cgroup=False, timeout_s=load.TIMEOUT_S)


class KubeProxy(_WithRules):
    """A real kube-proxy, against the API server stand-in."""

    # It waits for a second between writing rules twice: changes that come sooner would measure that.
    pause_s = (1.2, 1.6)

    def __init__(self, at: arena.Arena, mode: Mode, path: pathlib.Path, backend: Backend) -> None:
        super().__init__(at, mode, backend)
        self._path = path
        self._version = program.version(path)

    def about(self) -> results.Contestant:
        """Say which version, and of which tool."""
        tool = program.tool_version(self.backend)
        label = f"kube-proxy {self._version}, {self.name} mode"
        if self.name == "iptables":
            label += f" ({tool})"  # its backends differ
        return results.Contestant(self.name, label, True, {"version": self._version, "tool": tool})

    def forget(self) -> None:
        """End it, and remove its rules."""
        self.stop()
        self.remove_rules()

    def start(self) -> agents.Agent:
        """Start it, and return it at once."""
        lab, node = self.at.lab, self.site.node
        argv = program.command(self._path, self._version, self.backend, self._url, node, arena.PODS)
        tools = program.tools(lab.workdir / f"tools-{self.name}", self.backend)
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
        self.agent = agents.Agent(lab, node, argv, environment)
        return self.agent

    def memory(self) -> results.Memory:
        """Return what there is of it now."""
        assert self.agent is not None
        of_agent = self.agent.memory()
        return results.Memory(
            contestant=self.name,
            services=self.services,
            rss=of_agent["VmRSS"],
            rss_anonymous=of_agent["RssAnon"],
            rss_of_maps=0,
            rss_peak=of_agent["VmHWM"],
            cgroup_peak=self.agent.cgroup_peak(),
            maps={},
            programs=0,
            rules=self.agent.kernel_bytes(),
        )


class Generated(_WithRules):
    """The rules that a kube-proxy would have written, and nobody who writes them."""

    real = False

    def __init__(self, at: arena.Arena, mode: Mode, backend: Backend) -> None:
        super().__init__(at, mode, backend)
        self._ports: tuple[model.ServicePort, ...] = ()
        self._memory: process.MemoryCgroup | None = None
        self._rules = load.Rules(
            self._command,
            self.backend,
            model.Settings(arena.PODS, at.lab[self.site.node].ipv4),
        )

    def _command(self, argv: collections.abc.Sequence[str]) -> list[str]:
        listed = list(argv) if self._memory is None else self._memory.command(list(argv))
        return self.at.lab.command(self.site.node, listed, cgroup=False)

    def about(self) -> results.Contestant:
        """Say which version, and of which tool."""
        tool = program.tool_version(self.backend)
        label = f"kube-proxy's rules in {self.name} mode, generated ({tool}): no kube-proxy ran"
        return results.Contestant(self.name, label, False, {"tool": tool})

    def forget(self) -> None:
        """Remove the rules."""
        self.remove_rules()
        if self._memory is not None:
            self._memory.remove()
            self._memory = None

    def fill(self, services: int) -> None:
        """Replace the cluster by one of so many services, with nothing in the kernel yet."""
        self.forget()
        self.services = services
        self.measured_at, self.generation = self.site.servers[0], 0
        self._ports = spread(model.ports(self.objects(), self.site.node))

    def start(self) -> agents.Started:
        """Load all rules."""
        self._memory = process.MemoryCgroup(f"{arena.own_prefix()}rules-{self.name}")
        return Loaded(lambda: self._rules.start(self._ports))

    def _prepared(self, place: cluster.Place) -> collections.abc.Callable[[], None]:
        moved = tuple(model.Endpoint(ip, arena.PORT, True) for ip in place.addresses)
        before = self._ports
        self._ports = tuple(
            dataclasses.replace(port, endpoints=moved) if port.owner == cluster.MEASURED else port
            for port in before
        )
        text = self._rules.update(before, self._ports)

        def change() -> None:
            self._rules.read_back(before)
            self._rules.load(text)

        return change

    def memory(self) -> results.Memory:
        """Return what there is of it now."""
        return results.Memory(
            contestant=self.name, services=self.services, rss=0, rss_anonymous=0, rss_of_maps=0, rss_peak=0,
            cgroup_peak=None, maps={}, programs=0,
            rules=None if self._memory is None else self._memory.kernel_bytes(),
        )  # fmt: skip


class Loaded:
    """Rules that have been loaded, by an action that says how long the tools took for it."""

    def __init__(self, action: collections.abc.Callable[[], float]) -> None:
        before = process.ended_children_cpu_s()
        self._seconds = action()
        # Not when their text began to be written, which is none of their cost.
        self.started_ns = time.monotonic_ns() - int(self._seconds * 1e9)
        self._spent_s = process.ended_children_cpu_s() - before

    def check(self) -> None:
        """Do nothing: it can not end."""

    def settle(self) -> float:
        """Return the CPU time that loading took."""
        return self._spent_s

    def log(self) -> list[str]:
        """Say how long loading took by itself."""
        return [f"loaded in {self._seconds:.3f} s"]


def make(at: arena.Arena, name: str, path: pathlib.Path | None, backend: Backend) -> contestants.Contestant:
    """Return the real kube-proxy in this mode if there is a program, else its rules."""
    mode = next(each for each in MODES if each == name)
    return Generated(at, mode, backend) if path is None else KubeProxy(at, mode, path, backend)


def spread(ports: collections.abc.Iterable[model.ServicePort]) -> tuple[model.ServicePort, ...]:
    """Return the ports in a drawn order, but for the measured services': those stand at even distances.

    kube-proxy's own order is drawn anew whenever it writes all of them: where a service stands is luck.
    """
    groups: dict[tuple[str, str], list[model.ServicePort]] = {}
    for port in ports:
        groups.setdefault(port.owner, []).append(port)
    names = [
        name(copy)
        for copy in range(cluster.MEASURED_COPIES)
        for name in (cluster.measured_name, cluster.remote_name)
    ]
    measured = [groups.pop(owner) for owner in names if owner in groups]
    others = list(groups.values())
    random.Random(len(others)).shuffle(others)
    for number, group in reversed(list(enumerate(measured))):
        others.insert(int((number + 0.5) * len(groups) / len(measured)), group)
    return tuple(port for group in others for port in group)
