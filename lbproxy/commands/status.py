"""How the datapath does on this node, and how full its maps are: behind `lbproxy status` and `maps`."""

import pathlib
from collections.abc import Iterator, Sequence

import msgspec

from lbproxy import abi, beside, noting
from lbproxy.commands import render
from lbproxy.core import events, fill, inventory, listing, notes, tables, wording
from lbproxy.kernel import inspection, maps
from lbproxy.migrate import handover

# --- maps ---


class MapStatus(msgspec.Struct, frozen=True):
    """One map; `capacity` is the rows it can use, `bytes` the kernel memory that it is charged with."""

    name: str
    type: str
    used: int
    capacity: int
    percent: float
    bytes: int
    holds: str


def read_maps(opened: maps.BpfMaps) -> list[MapStatus]:
    """Every map, in the order of bpf/maps.h."""
    found = []
    for name, used in fill.all_used(opened).items():
        capacity = fill.usable_rows(name, opened.rows_of(name))
        percent = round(100 * used / capacity, 2) if capacity else 100.0
        kind = abi.MAPS[name].type
        found.append(MapStatus(name, kind, used, capacity, percent, opened.bytes_of(name), fill.HOLDS[name]))
    return found


def show_maps(opened: maps.BpfMaps, output: str) -> int:
    """Print how full each map is; returns the exit status."""
    found = read_maps(opened)
    render.show(found, output, lambda: _maps_table(found))
    return 0


def _maps_table(found: Sequence[MapStatus]) -> Iterator[render.Table]:
    rows: list[render.Row] = [
        (one.name, one.type, one.used, one.capacity, _percent(one), one.bytes, one.holds) for one in found
    ]
    rows.append(("total", "", "", "", "", sum(one.bytes for one in found), ""))
    yield render.Table(("MAP", "TYPE", "USED", "CAPACITY", "FULL", "BYTES", "HOLDS"), rows, prose=True)


def _percent(of: MapStatus) -> str:
    # 100 % of a table that is never anything else would look like an alarm.
    return f"{of.percent:.2f}%" if fill.may_fill(of.name) else ""


# --- status ---


class HookStatus(msgspec.Struct, frozen=True):
    """A program and whether the kernel runs it; `problem` says why it does not serve, attached or not."""

    name: str
    attached: bool
    problem: str


class DeviceStatus(msgspec.Struct, frozen=True):
    """A device that the packet path is attached to, always by tc; `xdp` is native, generic or empty."""

    ifindex: int
    name: str
    role: str
    tc: bool
    xdp: str
    problem: str


class AgentStatus(msgspec.Struct, frozen=True):
    """Whether an agent keeps the datapath up to date; `pid` is null where it can not be seen from here."""

    running: bool
    pid: int | None


class Status(msgspec.Struct, frozen=True):
    """How lbproxy does on this node. `of_this_version`: this version's agent would adopt the datapath."""

    serving: bool
    version: str
    fingerprint: str
    of_this_version: bool
    cgroup: str
    agent: AgentStatus
    programs: tuple[HookStatus, ...]
    devices: tuple[DeviceStatus, ...]
    services: int
    service_ports: int
    frontends: int
    backends: dict[str, int]
    connections: int
    counters: dict[str, int]
    bpf_bytes: int
    warnings: tuple[str, ...]


_FEW = 6  # devices, or objects, that are named
# Counters that stay 0 unless something is wrong, and what is.
_ALARMS = {
    "bad_slot": "connections found a slot without a live backend",
    "spill_failed": "translations of sockets could not be kept: such sockets see the backend as their peer",
    "affinity_failed": "clients could not be remembered for session affinity",
    "unsteady": "frontends changed under the eyes of a connection four times in a row",
}


def show(root: pathlib.Path, opened: maps.BpfMaps, output: str) -> int:
    """Print the status; returns 0 if every program is attached and uses the pinned maps, else 1."""
    found = read(root, opened)
    render.show(found, output, lambda: _present_status(found))
    return 0 if found.serving else 1


def read(root: pathlib.Path, opened: maps.BpfMaps) -> Status:
    """Collect the status of the datapath in `root`."""
    identity = inspection.pinned(root)
    hooks = inspection.hooks(root, identity)
    found = inventory.read(opened)
    counters = inventory.counters(opened)
    agent = inspection.agent(root)
    devices = inspection.attached_devices(root, inventory.node_ports(opened).host_netns)
    return Status(
        serving=not any(hook.problem for hook in hooks),
        version=identity.version,
        fingerprint=identity.fingerprint,
        of_this_version=inspection.is_of_this_version(identity),
        cgroup=identity.cgroup,
        agent=AgentStatus(agent.running, agent.pid),
        programs=tuple(HookStatus(hook.name, hook.attached, hook.problem) for hook in hooks),
        devices=tuple(
            DeviceStatus(one.ifindex, one.name, one.role.value, not one.problem, one.xdp, one.problem)
            for one in devices
        ),
        services=len({port.key.service for port in found.ports}),
        service_ports=len(found.ports),
        frontends=sum(len(port.frontends) for port in found.ports),
        backends=listing.backends_by_state(found),
        connections=sum(port.connections for port in found.ports),
        counters=counters,
        bpf_bytes=sum(opened.bytes_of(name) for name in abi.MAPS),
        warnings=(
            *_off(identity.refused),
            *_given_back(opened),
            *_another(root, identity.cgroup),
            *_rejected(noting.read(root), agent.running),
            *_warnings(hooks, devices, counters, opened),
            *listing.warnings(found),
        ),
    )


def _off(refused: str) -> Iterator[str]:
    if refused:
        yield f"the packet path is off: this kernel refuses its programs: {refused}"


def _given_back(opened: maps.BpfMaps) -> Iterator[str]:
    if inventory.is_set(opened, tables.Handover.RETURN):
        yield handover.RETURNING


def _another(root: pathlib.Path, cgroup: str) -> Iterator[str]:
    if said := beside.another(root, pathlib.Path(cgroup)):
        yield said


def _rejected(noted: notes.Notes, agent_runs: bool) -> Iterator[str]:
    # The notes outlive whoever wrote them; the objects may have been mended since.
    when = "" if agent_runs else "when the agent ended: "
    lines = (events.rejection(one.kind, one.name, one.reason) for one in noted.rejected)
    rest = "objects are rejected: see the agent's log"
    for line in wording.first(lines, len(noted.rejected), _FEW, rest):
        yield when + line


def _warnings(
    hooks: Sequence[inspection.Hook],
    devices: Sequence[inspection.Device],
    counters: dict[str, int],
    opened: maps.BpfMaps,
) -> Iterator[str]:
    for hook in hooks:
        if hook.problem:
            yield f"{hook.name} {'does not serve' if hook.attached else 'is not attached'}: {hook.problem}"
    for device in devices:
        if device.problem:
            yield f"device {device.name}: {device.problem}"
    for name, what in _ALARMS.items():
        if counters[name]:
            yield f"{name}: {counters[name]} {what}"
    yield from fill.warnings(fill.all_used(opened), opened.rows_of)


def _present_status(found: Status) -> Iterator[render.Table | str]:
    missing = sum(1 for hook in found.programs if not hook.attached)
    attached = len(found.programs) - missing
    pid = f" (pid {found.agent.pid})" if found.agent.pid else ""
    other = "" if found.of_this_version else "; an agent of this version would replace it"
    states = ", ".join(f"{count} {state}" for state, count in found.backends.items() if count)
    total = sum(found.backends.values())
    counters = ", ".join(f"{name} {count}" for name, count in found.counters.items() if count)
    rows: list[render.Row] = [
        ("serving", _yes_no(found.serving)),
        ("programs", f"{attached} of {len(found.programs)} attached"),
        ("agent", f"running{pid}" if found.agent.running else "not running: the kernel serves what it has"),
        ("version", f"{found.version}, datapath {found.fingerprint}{other}"),
        ("cgroup", found.cgroup),
        ("services", f"{found.services} ({found.service_ports} ports, {found.frontends} frontends)"),
        ("backends", f"{total} ({states})" if total else "0"),
        ("connections", str(found.connections)),
        ("counters", counters or "none"),
        ("memory", f"{found.bpf_bytes / 2**20:.1f} MiB of maps"),
    ]
    rows[2:2] = [("devices", line) for line in _devices(found.devices)]
    rows += [("warning", render.Cell(line, render.Color.WARNING)) for line in found.warnings]
    yield render.Table(("STATUS", ""), rows, prose=True)


def _devices(devices: Sequence[DeviceStatus]) -> Iterator[str]:
    """A line for each uplink, and one for all others of a kind: a node may have hundreds."""
    others: dict[str, list[str]] = {}
    for device in devices:
        if device.problem:
            # A warning says which; of what is missing its role may be told.
            yield f"{device.name}: not as it should be"
        elif device.role == "uplink":
            yield f"{device.name} uplink, tc{f' and {device.xdp} XDP' if device.xdp else ''}"
        else:
            others.setdefault(device.role, []).append(device.name)
    for role, names in others.items():
        yield f"{wording.few(names, _FEW)}: {role}, tc"
    if devices and all(device.name == str(device.ifindex) for device in devices):
        yield "(seen from another network namespace: device numbers)"
    if not devices:
        yield "none: only sockets are served"


def _yes_no(fact: bool) -> render.Cell:
    return render.Cell("yes", render.Color.GOOD) if fact else render.Cell("no", render.Color.BAD)
