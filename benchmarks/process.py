"""What the kernel says of a process, and of pinned BPF objects."""

import contextlib
import os
import pathlib
import re
import resource
import signal
import time

from lbproxy.kernel import libbpf
from lbproxy.lab import cgroups

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_CPUCLOCK_SCHED = 2
MEMORY_CONTROLLERS = (
    # Version 2 where it is in charge of memory, else version 1: files for the peak, and where a child goes.
    (pathlib.Path("/sys/fs/cgroup"), "memory.peak"),
    (pathlib.Path("/sys/fs/cgroup/memory"), "memory.max_usage_in_bytes"),
)


def cpu_s(pid: int) -> float:
    """Return the CPU time a process has had, its threads included, to the nanosecond."""
    # Beyond clock_getcpuclockid(3), which Python does not have: how it makes a clock of a process id.
    return time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)


def children_cpu_s(pid: int) -> float:
    """Return the CPU time of the children that a process has waited for, in steps of a clock tick."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / _TICKS_PER_S


def ended_children_cpu_s() -> float:
    """Return the CPU time of all children of this process that it has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def status_bytes(pid: int) -> dict[str, int]:
    """Return the memory lines of /proc/PID/status (`VmRSS`, `RssAnon`, …)."""
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def resident_maps_bytes(pid: int) -> int:
    """Return how many bytes of BPF maps a process has mapped and resident."""
    return sum_of_resident_maps(pathlib.Path(f"/proc/{pid}/smaps").read_text())


def sum_of_resident_maps(smaps: str) -> int:
    """Add up the Rss lines of the mappings of BPF maps."""
    total = 0
    of_a_map = False
    for line in smaps.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            of_a_map = "bpf-map" in line or "bpf_map" in line
        elif of_a_map and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def pinned_bytes(folder: pathlib.Path) -> dict[str, int]:
    """Return what the kernel charges for each BPF object pinned below a folder, by its path there."""
    return {
        str(path.relative_to(folder)): _charged_bytes(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _charged_bytes(path: pathlib.Path) -> int:
    fd = libbpf.obj_get(str(path))
    try:
        text = pathlib.Path(f"/proc/self/fdinfo/{fd}").read_text()
    finally:
        os.close(fd)
    found = re.search(r"^memlock:\s+(\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0


def steal_and_total_s() -> tuple[float, float]:
    """Return the CPU time that the hypervisor took, and all CPU time, since the machine started."""
    with open("/proc/stat", encoding="ascii") as lines:
        ticks = [int(field) for field in lines.readline().split()[1:9]]
    return ticks[7] / _TICKS_PER_S, sum(ticks) / _TICKS_PER_S


def _busy_and_total_s() -> tuple[float, float]:
    """Return the time that the CPUs were not idle, and all of it, since the machine started."""
    with open("/proc/stat", encoding="ascii") as lines:
        ticks = [int(field) for field in lines.readline().split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / _TICKS_PER_S, sum(ticks) / _TICKS_PER_S


class Others:
    """What processes other than this one, and those that it has waited for, have of the CPUs from now on."""

    def __init__(self) -> None:
        self._busy_s, self._total_s = _busy_and_total_s()
        self._own_s = time.process_time() + ended_children_cpu_s()

    def share(self) -> float:
        """Return their share until now."""
        busy_s, total_s = _busy_and_total_s()
        own_s = time.process_time() + ended_children_cpu_s() - self._own_s
        return max(0.0, busy_s - self._busy_s - own_s) / max(1e-9, total_s - self._total_s)


class MemoryCgroup:
    """A cgroup of a process's own, that knows the peak of its memory, where there is such a controller."""

    def __init__(self, name: str) -> None:
        self._folder: pathlib.Path | None = None
        for root, peak in MEMORY_CONTROLLERS:
            if not _controls_memory(root):
                continue
            folder = root / name
            folder.mkdir()
            if (folder / peak).exists():
                self._folder, self._peak = folder, folder / peak
                return
            folder.rmdir()

    def command(self, argv: list[str]) -> list[str]:
        """Return a command line that runs `argv` in it."""
        if self._folder is None:
            return argv
        return [
            "/bin/sh",
            "-c",
            'echo $$ >"$1" && shift && exec "$@"',
            "memory",
            str(self._folder / "cgroup.procs"),
            *argv,
        ]

    def peak_bytes(self) -> int | None:
        """Return the most that was ever in it, None without a controller."""
        return None if self._folder is None else int(self._peak.read_text())

    def kernel_bytes(self) -> int | None:
        """Return what the kernel holds on behalf of its processes, those that have ended too.

        Rules of netfilter are among it, and stay when the command that wrote them has ended; but
        not the counters that iptables-legacy keeps for each rule and CPU. None without a controller.
        """
        if self._folder is None:
            return None
        statistics = (self._folder / "memory.stat").read_text()
        found = re.search(r"^kernel (\d+)$", statistics, re.MULTILINE)  # of version 2
        return int(found[1] if found else (self._folder / "memory.kmem.usage_in_bytes").read_text())

    def remove(self) -> None:
        """End what is still in it, and remove it; OSError if that does not end."""
        if self._folder is not None:
            end_and_remove(self._folder)


def end_and_remove(cgroup: pathlib.Path, timeout_s: float = 5.0) -> None:
    """End the processes in a cgroup, and remove it when the last has ended; OSError if one does not."""
    deadline = time.monotonic() + timeout_s
    while True:
        # An agent's children outlive it: a kube-proxy's go on writing rules, for minutes.
        for pid in cgroups.processes(cgroup):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            cgroup.rmdir()
        except FileNotFoundError:
            return  # by somebody else
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _controls_memory(root: pathlib.Path) -> bool:
    controllers = root / "cgroup.subtree_control"
    if controllers.exists():
        return "memory" in controllers.read_text().split()
    return (root / "memory.usage_in_bytes").exists()
