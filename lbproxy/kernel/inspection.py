"""What is attached and who looks after it, found without changing anything."""

import fcntl
import os
import pathlib
import socket
import typing

from lbproxy import abi, errors
from lbproxy.core import devices
from lbproxy.kernel import device_links, generation, identity, libbpf, maps, node, programs, source

# A device that was named as one of pods runs what all inside devices run, and is shown as one.
_ROLES: typing.Final = {name: role for role, name in device_links.INGRESS.items()}
_ASTRAY: typing.Final = "it uses other maps than the pinned ones, which nobody keeps up to date"


class Hook(typing.NamedTuple):
    """A program's place; `problem` is empty where the program runs there, on the pinned maps."""

    name: str
    problem: str
    attached: bool = False


class Device(typing.NamedTuple):
    """A device that the packet path is attached to; `xdp` is the mode it has beside tc, empty for none."""

    ifindex: int
    name: str
    role: devices.Role
    xdp: str
    problem: str


class Agent(typing.NamedTuple):
    """Whether an agent holds the folder of pins; `pid` is None where it can not be seen from here."""

    running: bool
    pid: int | None


def pinned(root: pathlib.Path) -> identity.Identity:
    """What is pinned in a folder. Raises AgentError where nothing is, or where one may not look."""
    try:
        found = identity.read(root)
    except OSError as error:
        hint = ": lbproxy must be root" if isinstance(error, PermissionError) else ""
        raise errors.AgentError(f"cannot read the pins in {root}: {error.strerror}{hint}") from error
    if found is None:
        raise errors.AgentError(f"no lbproxy datapath in {root}: start `lbproxy run`, or name its --bpffs")
    if found.abi_version != abi.constant("ABI_VERSION"):
        raise errors.AgentError(
            f"{root} was set up by lbproxy {found.version}, whose tables this version cannot read: "
            "use that version's command, or let this version's agent take over"
        )
    return found


def open_maps(root: pathlib.Path) -> maps.BpfMaps:
    """The maps in a folder, to be read only. Raises AgentError where there are none."""
    pinned(root)
    return maps.BpfMaps(str(root / "maps"))


def is_of_this_version(found: identity.Identity) -> bool:
    """Whether this version's agent would take the datapath over as it is."""
    return source.fingerprint(programs.SOURCE, found.sizes) == found.fingerprint


def hooks(root: pathlib.Path, found: identity.Identity) -> list[Hook]:
    """Every program and whether it is attached, by name."""
    cgroup = _cgroup_id(found.cgroup)
    astray = generation.Generation(root).strangers()
    found_hooks = []
    for name in sorted(program.name for program in programs.SOCKET):
        problem = _problem(root, name, cgroup)
        attached = not problem
        if attached and name in astray:
            problem = _ASTRAY
        found_hooks.append(Hook(name, problem, attached))
    return found_hooks


def attached_devices(root: pathlib.Path, host_netns: int = 0) -> list[Device]:
    """Every device that a program is attached to, uplinks first.

    `host_netns` is the cookie of the network namespace that they are in, 0 where unknown:
    seen from another one, devices have numbers for names.
    """
    elsewhere = host_netns not in (0, node.netns_cookie())
    shown = generation.Generation(root)
    running, astray = shown.programs(), set(shown.strangers())
    of_device: dict[int, dict[str, device_links.Held]] = {}
    for held in device_links.DeviceLinks(root / "links").held():
        if held.alive:
            of_device.setdefault(held.attachment.ifindex, {})[held.attachment.program] = held
    roles = list(device_links.INGRESS)
    return sorted(
        (
            _device(ifindex, links, running, astray, "" if elsewhere else _name(ifindex))
            for ifindex, links in of_device.items()
        ),
        key=lambda device: (roles.index(device.role), device.ifindex),
    )


def _device(
    ifindex: int,
    links: typing.Mapping[str, device_links.Held],
    running: typing.Mapping[str, libbpf.ProgInfo],
    astray: set[str],
    name: str,
) -> Device:
    role = next((role for name, role in _ROLES.items() if name in links), None)
    wrong = [
        name
        for name, held in sorted(links.items())
        if name not in running or running[name].id != held.info.prog_id
    ]
    problem = ""
    if role is None or (device_links.EGRESS not in links and role is not devices.Role.PORT):
        problem = "only one of its directions is attached"
    elif wrong:
        problem = f"another program is in the place of {', '.join(wrong)}"
    elif astray & links.keys():
        problem = _ASTRAY
    xdp = links[device_links.XDP].attachment.mode if device_links.XDP in links else ""
    return Device(ifindex, name or str(ifindex), role or devices.Role.INSIDE, xdp, problem)


def _name(ifindex: int) -> str:
    """A device's name; a number where this network namespace does not have it."""
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return str(ifindex)


def agent(root: pathlib.Path) -> Agent:
    """Whether an agent runs on a folder of pins."""
    try:
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return Agent(False, None)
    try:
        pid = _lock_owner(fd)
        if pid is not None:
            return Agent(True, pid)
        # An owner in another pid namespace is not listed; that one shows by keeping us out.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return Agent(True, None)
    finally:
        os.close(fd)
    return Agent(False, None)


def _lock_owner(fd: int) -> int | None:
    """The process that has an exclusive flock on a file, as /proc/locks tells."""
    status = os.fstat(fd)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with open("/proc/locks", encoding="ascii") as lines:
        for line in lines:
            # 1: FLOCK  ADVISORY  WRITE 1234 00:1f:42 0 EOF
            fields = line.split()
            if fields[1:2] == ["FLOCK"] and fields[3] == "WRITE" and fields[5] == place:
                return int(fields[4])
    return None


def _cgroup_id(path: str) -> int | None:
    """The kernel's id of a cgroup; None where this mount namespace does not show it."""
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


def _problem(root: pathlib.Path, name: str, cgroup: int | None) -> str:
    link, program = root / "links" / name, root / "programs" / name
    if not link.exists():
        return "its link is gone"
    if not program.exists():
        return "its program is gone"
    with generation.opened(link) as link_fd, generation.opened(program) as program_fd:
        info, wanted = libbpf.link_info(link_fd), libbpf.prog_id(program_fd)
    if info.cgroup_id == 0:
        return "its cgroup is gone"
    if cgroup is not None and info.cgroup_id != cgroup:
        return "it is attached to another cgroup"
    if info.prog_id != wanted:
        return "another program is in its place"
    return ""
