"""What /proc and the mounts say of the process that is to be the agent, and of its neighbours."""

import contextlib
import os
import pathlib
import re
import resource
import socket
import struct
import typing

from lbproxy import cgroup2, errors
from lbproxy.core.preflight import facts
from lbproxy.kernel import bpffs, features, generation, identity, inspection, libbpf, programs

_CAPABILITIES: typing.Final = {12: "CAP_NET_ADMIN", 21: "CAP_SYS_ADMIN", 38: "CAP_PERFMON", 39: "CAP_BPF"}
_EVERYBODY: typing.Final = ["0", "0", "4294967295"]
_HOST_PIDS: typing.Final = "pid:[4026531836]"  # PROC_PID_INIT_INO
_LISTENS: typing.Final = "0A"
_WORTH_NAMING: typing.Final = frozenset({"kube-proxy", "cilium-agent", "calico-node"})
_STANDARD: typing.Final = pathlib.Path("/sys/fs/bpf")
_SYSCTLS: typing.Final = pathlib.Path("/proc/sys/net")
_DEPTH: typing.Final = 2  # of folders on a bpffs that are looked into for other datapaths


def process() -> facts.Process:
    """What this process may do, and which namespaces it is in."""
    bits = features.effective_capabilities()
    host_processes = _link("/proc/self/ns/pid") == _HOST_PIDS
    # Of another process's namespaces the kernel tells only those with enough rights.
    own, first = _link("/proc/self/ns/net"), _link("/proc/1/ns/net")
    return facts.Process(
        capabilities=frozenset(name for bit, name in _CAPABILITIES.items() if bits >> bit & 1),
        own_users=pathlib.Path("/proc/self/uid_map").read_text().split() != _EVERYBODY,
        host_processes=host_processes,
        host_network=own == first if host_processes and own and first else None,
        container=_in_container(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _in_container() -> bool:
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST")) or any(
        os.path.exists(path) for path in ("/.dockerenv", "/run/.containerenv")
    )


def cgroup(path: pathlib.Path | None) -> facts.Cgroup:
    """The cgroup that an agent would be attached to, or why it would not."""
    try:
        found = bpffs.cgroup(path)
    except errors.AgentError as error:
        return facts.Cgroup(path=str(path or ""), problem=str(error))
    except OSError as error:
        return facts.Cgroup(path=str(path or ""), problem=f"{path}: {error.strerror}")
    return facts.Cgroup(
        path=str(found),
        # The root of the hierarchy alone has no type; a container takes its own part for the root.
        is_root=not (found / "cgroup.type").exists(),
        hybrid=" - cgroup " in _mounts(),
    )


def _mounts() -> str:
    with contextlib.suppress(OSError):
        return pathlib.Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    return ""


def pins(root: pathlib.Path) -> facts.Bpffs:
    """The folder that an agent would pin in, and what is there."""
    try:
        mounted = _on_bpffs(root)
        if root.exists() and not root.is_dir():
            return facts.Bpffs(path=str(root), problem="no folder")
        place = next((one for one in (root, *root.parents) if one.exists()), root)
        # Mounting one at the usual place writes nothing to what is below.
        written_to = mounted or not root.is_relative_to(_STANDARD)
        if written_to and os.statvfs(place).f_flag & os.ST_RDONLY:
            return facts.Bpffs(path=str(root), mounted=mounted, problem=f"{place} is mounted read-only")
        known = identity.read(root) if mounted else None
        agent = inspection.agent(root)
    except OSError as error:
        return facts.Bpffs(path=str(root), problem=f"may not be looked at: {error.strerror}")
    return facts.Bpffs(
        path=str(root),
        mounted=mounted,
        version=known.version if known else "",
        agent_running=agent.running,
        agent_pid=agent.pid,
    )


def _on_bpffs(root: pathlib.Path) -> bool:
    """Whether `bpffs.ensure` would find one."""
    places = (root, root.parent, *((_STANDARD,) if root.is_relative_to(_STANDARD) else ()))
    return any(bpffs.is_bpffs(one) for one in places)


def is_adopted(root: pathlib.Path) -> bool:
    """Whether this version's agent would take what is pinned over as it is."""
    try:
        known = identity.read(root)
    except OSError:
        return False
    return known is not None and inspection.is_of_this_version(known)


def other_datapaths(root: pathlib.Path, served: pathlib.Path) -> list[facts.OtherDatapath]:
    """Other folders of lbproxy's pins, on every bpffs that is mounted here; `served` is our cgroup."""
    found: dict[tuple[int, int], facts.OtherDatapath] = {}
    own = _place(root)
    for line in _mounts().splitlines():
        mount, _, source = line.partition(" - ")
        if not source.startswith("bpf "):
            continue
        escaped = mount.split(" ")[4]
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), escaped)
        for folder in _folders(pathlib.Path(point), _DEPTH):
            place = _place(folder)
            if place is None or place == own or place in found:
                continue
            with contextlib.suppress(OSError):
                known = identity.read(folder)
                if known is not None:
                    agent = inspection.agent(folder)
                    same = _number(served) in _cgroups(folder / "links")
                    found[place] = facts.OtherDatapath(
                        str(folder), agent.running, agent.pid, known.cgroup, same
                    )
    return list(found.values())


def _folders(at: pathlib.Path, depth: int) -> typing.Iterator[pathlib.Path]:
    """Folders that hold a datapath, at this one or below."""
    with contextlib.suppress(OSError):
        if (at / "current").is_symlink():
            yield at
        elif depth:
            for child in sorted(at.iterdir()):
                if child.is_dir() and not child.is_symlink():
                    yield from _folders(child, depth - 1)


def _cgroups(folder: pathlib.Path) -> set[int]:
    """The kernel's ids of the cgroups that the links in a folder serve: paths may be another container's."""
    found = set()
    for program in programs.SOCKET:
        with contextlib.suppress(OSError), generation.opened(folder / program.name) as fd:
            found.add(libbpf.link_info(fd).cgroup_id)
    return found


def _number(path: pathlib.Path) -> int | None:
    place = _place(path)
    return place[1] if place else None


def _place(path: pathlib.Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def neighbours() -> list[facts.Running]:
    """The processes in this network namespace that may be balancing too."""
    found = []
    own = _link("/proc/self/ns/net")
    for pid in _pids():
        command = _command(pid)
        if command in _WORTH_NAMING and _link(f"/proc/{pid}/ns/net") == own:
            found.append(facts.Running(command, pid))
    return found


def _pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    return ""


def listener(what: str, flag: str, host: str, port: int) -> facts.Listener:
    """Whether somebody of this network namespace listens where the agent would, and who."""
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    for at, inode in _listening(port):
        wildcard = not any(at) or host in ("0.0.0.0", "::")
        if wildcard or at == _packed(host):
            pid = _owner(inode)
            return facts.Listener(what, flag, address, True, pid, _command(pid) if pid else "")
    return facts.Listener(what, flag, address)


def _listening(port: int) -> typing.Iterator[tuple[bytes, str]]:
    """The address, all zero for any, and the inode of each TCP socket that listens on a port."""
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in pathlib.Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                at, _, number = fields[1].partition(":")
                if fields[3] == _LISTENS and int(number, 16) == port:
                    # Each four bytes are a number in the machine's own order.
                    words = [int(at[start : start + 8], 16) for start in range(0, len(at), 8)]
                    yield struct.pack(f"={len(words)}I", *words), fields[9]


def _packed(host: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)


def _owner(inode: str) -> int | None:
    """The process that has a socket open, where it can be seen from here."""
    wanted = f"socket:[{inode}]"
    for pid in _pids():
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if os.readlink(entry.path) == wanted:
                        return pid
    return None


def memory(maps: int, agent: int, compiler: int) -> facts.Memory:
    """What the node has to give, and what this process's cgroups allow of it."""
    available = None
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    return facts.Memory(available=available, limit=_limit(), maps=maps, agent=agent, compiler=compiler)


def _limit() -> int | None:
    """The room that the tightest memory limit of cgroup v2 leaves to this process."""
    mount = cgroup2.mount_point()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/self/cgroup").read_text().splitlines()
        own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
        if mount is None or own is None:
            return None
        place = mount / own
        rooms = [
            room
            for one in (place, *place.parents)
            if one.is_relative_to(mount) and (room := _room(one)) is not None
        ]
        return min(rooms, default=None)
    return None


def _room(folder: pathlib.Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        most = int((folder / "memory.max").read_text())  # "max" where there is no limit
        return max(0, most - int((folder / "memory.current").read_text()))
    return None


def sysctl(name: str) -> str | None:
    """A setting below net, such as ipv4/ip_forward; None where this kernel has none or does not tell."""
    try:
        return (_SYSCTLS / name).read_text().strip()
    except OSError:
        return None
