"""A running agent, whoever's it is: its log, its CPU time, its memory."""

import collections.abc
import pathlib
import subprocess
import time
import typing

from benchmarks import arena, process
from lbproxy.lab import cluster as lab_cluster

_START_TIMEOUT_S, _START_S_PER_SERVICE = 120.0, 0.05  # a kube-proxy may take six minutes for 10,000
_QUIET_S = 1.0  # without more work than this share of a CPU:
_QUIET_SHARE = 0.02
_serials = iter(range(1, 1 << 30))


def start_timeout_s(services: int) -> float:
    """Return how long whoever starts with so many services is waited for."""
    return _START_TIMEOUT_S + _START_S_PER_SERVICE * services


class Started(typing.Protocol):
    """What has been started: an agent that runs, or rules that were loaded."""

    started_ns: int  # CLOCK_MONOTONIC

    def check(self) -> None:
        """Raise BenchError if it has ended."""

    def settle(self) -> float:
        """Wait until it is quiet, and return the CPU time it had until it became so."""

    def log(self) -> list[str]:
        """Return what it said."""


class Agent:
    """A running agent, in a memory cgroup of its own."""

    def __init__(
        self,
        lab: lab_cluster.Lab,
        node: str,
        argv: list[str],
        environment: collections.abc.Mapping[str, str] | None = None,
    ) -> None:
        """Start it, and return at once; `environment` replaces this process's."""
        serial = next(_serials)
        self._log = lab.workdir / f"agent-{serial}.log"
        self._memory = process.MemoryCgroup(f"{arena.own_prefix()}{serial}")
        with self._log.open("w") as stderr:
            self.started_ns = time.monotonic_ns()
            self.process = lab.popen(node, self._memory.command(argv), stderr=stderr, env=environment)

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
            raise arena.BenchError("\n".join([f"the agent ended with status {status}:", *self.log()[-15:]]))

    def settle(self, timeout_s: float = 600.0) -> float:
        """Wait until it has been quiet for a second, and return its CPU time until it became so."""
        deadline = time.monotonic() + timeout_s
        before_s = self.cpu_s()
        while time.monotonic() < deadline:
            time.sleep(_QUIET_S)
            now_s = self.cpu_s()
            if now_s - before_s < _QUIET_SHARE * _QUIET_S:
                return before_s
            before_s = now_s
        raise arena.BenchError(f"the agent is not quiet after {timeout_s:.0f} s")

    def memory(self) -> dict[str, int]:
        """Return the memory lines of its status (`VmRSS`, `RssAnon`, `VmHWM`), in bytes."""
        self.check()
        return process.status_bytes(self.process.pid)

    def resident_maps(self) -> int:
        """Return how many bytes of BPF maps it has mapped and resident."""
        return process.resident_maps_bytes(self.process.pid)

    def cgroup_peak(self) -> int | None:
        """Return the peak of its cgroup, with page cache and kernel memory; None without the controller."""
        return self._memory.peak_bytes()

    def kernel_bytes(self) -> int | None:
        """Return what the kernel holds on behalf of its cgroup; None without the controller."""
        return self._memory.kernel_bytes()

    def stop(self) -> None:
        """End it with SIGTERM and wait."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._memory.remove()


def pinned(pins: pathlib.Path) -> tuple[dict[str, int], int]:
    """Return what the kernel charges for each pinned map, and for all pinned programs."""
    return process.pinned_bytes(pins / "maps"), sum(process.pinned_bytes(pins / "programs").values())
