"""What `lbproxy support-bundle` collects: one function for each file, which returns text or JSON's values.

Each only looks. Names, addresses, counts and settings are collected; never what is in kubeconfigs,
ServiceAccounts, environments or objects' annotations.
"""

import contextlib
import dataclasses
import fcntl
import functools
import ipaddress
import os
import pathlib
import platform
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import typing
import urllib.request
from collections.abc import Callable, Iterator

import msgspec

import lbproxy
from lbproxy import abi, cgroup2, errors, flow_table, kernel_clock, noting
from lbproxy.commands import preflight, status
from lbproxy.config import config, loading
from lbproxy.config import flags as config_flags
from lbproxy.core import addresses, inventory, listing, notes
from lbproxy.core.preflight import verdict
from lbproxy.kernel import attached, device_links, generation, identity, inspection, libbpf, links, maps
from lbproxy.migrate import command as migrate
from lbproxy.web import zpages

_HTTP_S: typing.Final = 3.0
MOST_BYTES: typing.Final = 4 << 20  # of a file, and of an answer, a log or a command's output
_LOG_LINES: typing.Final = 2000
_KERNEL_LINES: typing.Final = 300
_CONTAINER_LOGS: typing.Final = pathlib.Path("/var/log/containers")
_CONTAINER: typing.Final = re.compile(r"[0-9a-f]{64}")
_ABOUT_BPF: typing.Final = re.compile(
    r"bpf|lbproxy|tcx|\bxdp\b|verifier|nf_conntrack|neighbour|oom|out of memory|cgroup|martian|veth|stall",
    re.IGNORECASE,
)
_SIOCGIFMTU: typing.Final = 0x8921
_KMSG_BYTES: typing.Final = 8192
_SYSCTLS: typing.Final = (
    *("ipv4/ip_forward", "ipv4/ip_local_port_range", "ipv4/ip_local_reserved_ports"),
    *("ipv4/conf/all/rp_filter", "ipv4/conf/all/route_localnet", "ipv4/tcp_syn_retries"),
    *("ipv4/tcp_timestamps", "ipv4/tcp_tw_reuse", "ipv6/conf/all/forwarding", "core/bpf_jit_enable"),
    *("core/somaxconn", "netfilter/nf_conntrack_count", "netfilter/nf_conntrack_max"),
)
_ROUTES: typing.Final = ("/proc/thread-self/net/route", "/proc/thread-self/net/ipv6_route")
_RTF_REJECT, _RTF_LOCAL = 0x0200, 0x80000000
_PROC: typing.Final = ("net/snmp", "net/snmp6", "net/netstat", "net/softnet_stat")


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """Where to look; `settings` are the running agent's as far as its command line tells them."""

    root: pathlib.Path
    trace_s: float
    agent: inspection.Agent
    arguments: tuple[str, ...]  # of the agent, without what comes before `run`
    settings: config.Config

    @contextlib.contextmanager
    def maps(self) -> Iterator[maps.BpfMaps]:
        """The pinned maps. Raises AgentError where there are none."""
        with contextlib.closing(inspection.open_maps(self.root)) as opened:
            yield opened


class Item(typing.NamedTuple):
    """A file of the bundle, what is in it, and who collects it within so many seconds."""

    file: str
    what: str
    collect: Callable[[Node], object]
    seconds: float = 10.0


def look(root: pathlib.Path, trace_s: float) -> Node:
    """Find the agent, and what it was told."""
    agent = inspection.Agent(False, None)
    with contextlib.suppress(OSError):
        agent = inspection.agent(root)
    arguments = tuple(_arguments(agent.pid)) if agent.pid else ()
    return Node(root, trace_s, agent, arguments, _settings(arguments, root))


def _arguments(pid: int) -> list[str]:
    try:
        words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        return words[words.index("run") + 1 :]
    except (OSError, ValueError):
        return []


def _settings(arguments: tuple[str, ...], root: pathlib.Path) -> config.Config:
    """As the agent has them; the defaults where they can not be told."""
    for given in (arguments, ()):
        with contextlib.suppress(errors.LbproxyError, OSError):
            parser = config_flags.Parser(prog="lbproxy")
            config_flags.add_to(parser)
            parsed, _ = parser.parse_known_args(config_flags.normalise([*given, "--bpffs", str(root)]))
            return loading.load(config_flags.texts(parsed), loading.this_host()).config
    return config.Config(node_name=platform.node().lower() or "unknown", bpffs=root)


# --- lbproxy ---


def _about(node: Node) -> object:
    return {
        "lbproxy": lbproxy.__version__,
        "abi_version": abi.constant("ABI_VERSION"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "kernel_version": platform.version(),
        "machine": platform.machine(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "possible_cpus": abi.possible_cpus(),
        "memory": _fields("/proc/meminfo", ("MemTotal", "MemAvailable")),
        "uptime_s": round(kernel_clock.monotonic_s()),
        "system": _fields("/etc/os-release", ("PRETTY_NAME",), "="),
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "bpffs": str(node.root),
        "agent": {"running": node.agent.running, "pid": node.agent.pid, "arguments": list(node.arguments)},
    }


def _fields(path: str, names: tuple[str, ...], between: str = ":") -> dict[str, str]:
    found = {}
    with contextlib.suppress(OSError):
        for line in pathlib.Path(path).read_text(errors="replace").splitlines():
            name, _, value = line.partition(between)
            if name in names:
                found[name] = value.strip().strip('"')
    return found


def _status(node: Node) -> object:
    with node.maps() as opened:
        return status.read(node.root, opened)


def _maps(node: Node) -> object:
    with node.maps() as opened:
        return status.read_maps(opened)


def _services(node: Node) -> object:
    with node.maps() as opened:
        found, noted = inventory.read(opened), _noted(node)
        return listing.services(found, inventory.node_ports(opened), listing.EVERYTHING, noted)


def _backends(node: Node) -> object:
    with node.maps() as opened:
        return listing.backends(inventory.read(opened), listing.EVERYTHING, _noted(node))


def _noted(node: Node) -> notes.Notes:
    """What the agent has written down, but for what annotations say: a path may be nobody's business."""
    return msgspec.structs.replace(noting.read(node.root), asked=(), mistakes=())


def _flows(node: Node) -> object:
    """How many rows there are of each protocol and state: of nobody's connection in particular."""
    with node.maps() as opened:
        counts, idle = flow_table.count(opened)
        found = [
            {"protocol": kind.proto, "assured": kind.assured, "flows": count}
            for kind, count in sorted(counts.flows.items())
        ]
        return {"rows": counts.rows, "unassured_rows": counts.unassured, "idle_rows": idle, "flows": found}


def _migration(node: Node) -> object:
    with node.maps() as opened:
        return migrate.read(node.root, opened)


def _identity(node: Node) -> object:
    known = identity.read(node.root)
    if known is None:
        raise errors.AgentError(f"nothing is pinned in {node.root}")
    # Its layouts are those of its version, and long.
    return {
        "fingerprint": known.fingerprint,
        "version": known.version,
        "abi_version": known.abi_version,
        "cgroup": known.cgroup,
        "sizes": known.sizes,
        "refused": known.refused,
        "of_this_version": inspection.is_of_this_version(known),
    }


def _links(node: Node) -> object:
    """Every pinned link: to which program, and where."""
    found = []
    for path in sorted((node.root / "links").iterdir()):
        with contextlib.suppress(FileNotFoundError), generation.opened(path) as fd:
            if device_links.named(path.name):
                at_device = libbpf.device_link_info(fd)
                found.append({"pin": path.name, "program": at_device.prog_id, "ifindex": at_device.ifindex})
            else:
                info = libbpf.link_info(fd)
                found.append({"pin": path.name, "program": info.prog_id, "cgroup_id": info.cgroup_id})
    return found


def _programs(node: Node) -> object:
    shown = generation.Generation(node.root)
    maps_by_id = {number: name for name, number in shown.map_ids().items()}
    return [
        {
            "pin": name,
            "id": info.id,
            "name": info.name,
            "maps": sorted(maps_by_id.get(number, f"another's: {number}") for number in info.map_ids),
        }
        for name, info in sorted(shown.programs().items())
    ]


def _attached(node: Node) -> object:
    """Everybody's programs at the hooks that lbproxy uses."""
    known = identity.read(node.root)
    cgroup = pathlib.Path(known.cgroup) if known else node.settings.cgroup
    mount = cgroup2.mount_point()
    at_cgroup = attached.at_cgroup(cgroup, mount or cgroup, frozenset()) if cgroup else []
    names = {link.ifindex: link.name for link in links.look().links}
    own = attached.own_programs(node.root)
    found = [*at_cgroup, *attached.at_devices(names, frozenset())]
    return [{**one._asdict(), "ours": one.id in own} for one in found]


def _preflight(node: Node) -> object:
    return verdict.judge(preflight.gather(node.settings))


def _configuration(node: Node) -> str:
    told = (
        "as the command line of the running agent has it" if node.arguments else "defaults: no agent is seen"
    )
    return f"{told}\n\n{zpages.flagz(node.settings)}"


def _asked(path: str, which: Callable[[config.Config], config.ListenAddress | None]) -> Callable[[Node], str]:
    """What a page of the agent says."""

    def ask(node: Node) -> str:
        address = which(node.settings)
        if address is None:
            raise errors.AgentError("the agent does not serve it")
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
        url = f"http://{address._replace(host=host)}{path}"
        # No proxy: it is this node.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Answers())
        with opener.open(url, timeout=_HTTP_S) as answer:
            body: bytes = answer.read(MOST_BYTES)
        return body.decode(errors="replace")

    return ask


class _Answers(urllib.request.HTTPErrorProcessor):
    """503 is an answer, too."""

    def http_response(self, request: object, response: typing.Any) -> typing.Any:
        return response


_healthz = functools.partial(_asked, which=lambda settings: settings.healthz_bind_address)
_metrics = functools.partial(_asked, which=lambda settings: settings.metrics_bind_address)


def _trace(node: Node) -> str:
    """What happens meanwhile, to any service."""
    if not node.trace_s:
        raise errors.AgentError("not asked for (--trace 0)")
    argv = [sys.executable, "-m", "lbproxy", "trace", "--bpffs", str(node.root), "-o", "json"]
    argv += ["--for", f"{node.trace_s:g}", "--count", "500"]
    return _output(argv, node.trace_s + 15)


def _log(node: Node) -> str:
    """The agent's last lines, where the node keeps them."""
    # By the container that it runs in: pods of other people may have names like ours.
    container = _container(pathlib.Path(f"/proc/{node.agent.pid}/cgroup")) if node.agent.pid else ""
    files = list(_CONTAINER_LOGS.glob(f"*-{container}.log")) if container else []
    if files:
        return _tail(files[0])
    pid = ["_PID=" + str(node.agent.pid)] if node.agent.pid else ["-t", "lbproxy"]
    elsewhere = "it is where the agent's standard error goes; of a pod, `kubectl logs` has it"
    if shutil.which("journalctl") is None:
        raise errors.AgentError(f"no log is kept here: {elsewhere}")
    found = _output(["journalctl", "--no-pager", "-q", "-n", str(_LOG_LINES), *pid], 10)
    if not found.strip():
        raise errors.AgentError(f"the journal has no line of the agent's: {elsewhere}")
    return found


def _container(cgroup: pathlib.Path) -> str:
    """The id of the container that a process is in, by /proc/PID/cgroup; empty where it is in none."""
    try:
        found = _CONTAINER.findall(cgroup.read_text())
    except OSError:
        return ""
    return found[-1] if found else ""


def _tail(path: pathlib.Path) -> str:
    with path.open("rb") as lines:
        lines.seek(max(0, path.stat().st_size - MOST_BYTES))
        return "\n".join(lines.read().decode(errors="replace").splitlines()[-_LOG_LINES:])


# --- the node ---


def _kernel_log(_node: Node) -> str:
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    found = []
    try:
        while True:
            try:
                record = os.read(fd, _KMSG_BYTES).decode(errors="replace")
            except BlockingIOError:
                break
            except BrokenPipeError:
                continue  # overwritten meanwhile: the next one is there
            head, _, message = record.partition(";")
            text = message.splitlines()[0] if message else ""
            if _ABOUT_BPF.search(text):
                found.append(f"[{int(head.split(',')[2]) / 1e6:.6f}] {text}")
    finally:
        os.close(fd)
    return "\n".join(found[-_KERNEL_LINES:])


def _devices(_node: Node) -> object:
    found = links.look()
    return [
        {
            "ifindex": link.ifindex,
            "name": link.name,
            "kind": link.kind,
            "master": link.master,
            "default_route": link.ifindex in found.default_routes,
            "mtu": _mtu(link.name),
            "addresses": [addresses.text(one.packed) for one in link.addresses],
        }
        for link in found.links
    ]


def _mtu(device: str) -> int | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        asked = struct.pack("16sI12x", device.encode(), 0)
        return int(struct.unpack("16sI12x", fcntl.ioctl(probe, _SIOCGIFMTU, asked))[1])
    return None


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text().strip()
    except OSError:
        return ""


def _routes(_node: Node) -> str:
    if shutil.which("ip") is None:  # as in the image
        return f"# the main table, as /proc/net has it\n{kernel_routes(*map(_read, _ROUTES))}"
    return "\n".join(
        _output(["ip", *family, *what], 10)
        for family in (["-4"], ["-6"])
        for what in (["rule", "show"], ["route", "show", "table", "all"])
    )


def kernel_routes(ipv4: str, ipv6: str) -> str:
    """Routes as people write them, of what /proc/net/route and /proc/net/ipv6_route have."""
    found = []
    for line in ipv4.splitlines()[1:]:
        device, target, gateway, flags, _, _, metric, mask, *_ = line.split()
        # Words of the machine's own byte order.
        packed = [int(text, 16).to_bytes(4, sys.byteorder) for text in (target, gateway, mask)]
        length = int.from_bytes(packed[2], "big").bit_count()
        found.append(_route(packed[0], length, packed[1], device, int(metric), int(flags, 16)))
    for line in ipv6.splitlines():
        target, bits, _, _, gateway, metric, _, _, flags, device = line.split()
        one = bytes.fromhex(target), int(bits, 16), bytes.fromhex(gateway)
        found.append(_route(*one, device, int(metric, 16), int(flags, 16)))
    return "\n".join(found)


def _route(target: bytes, length: int, gateway: bytes, device: str, metric: int, flags: int) -> str:
    where = f"{ipaddress.ip_address(target)}/{length}" if length or any(target) else "default"
    kind = "unreachable " if flags & _RTF_REJECT else "local " if flags & _RTF_LOCAL else ""
    via = f" via {ipaddress.ip_address(gateway)}" if any(gateway) else ""
    return f"{kind}{where}{via} dev {device} metric {metric}"


def _system(_node: Node) -> object:
    values = {name: _read(f"/proc/sys/net/{name}") for name in _SYSCTLS}
    mounts = [
        line for line in _read("/proc/self/mounts").splitlines() if line.split()[2] in ("bpf", "cgroup2")
    ]
    return {"sysctls": values, "mounts": mounts}


def _counters(_node: Node) -> str:
    return "\n".join(f"/proc/{name}\n{_read(f'/proc/{name}')}\n" for name in _PROC)


def _output(argv: list[str], seconds: float) -> str:
    """What a command prints. Raises AgentError where there is none such, or it fails or takes too long."""
    try:
        done = subprocess.run(
            argv, capture_output=True, timeout=seconds, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise errors.AgentError(f"there is no command {argv[0]} here") from None
    except subprocess.TimeoutExpired:
        raise errors.AgentError(f"{argv[0]} took longer than {seconds:g} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise errors.AgentError(f"{argv[0]} ended with status {done.returncode}: {' '.join(said)}")
    return done.stdout[:MOST_BYTES].decode(errors="replace")


ITEMS: typing.Final = (
    Item("about.json", "versions, kernel, machine, the agent's process", _about),
    Item("status.json", "`lbproxy status`: hooks, devices, counters, warnings", _status),
    Item("maps.json", "`lbproxy maps`: how full each table is", _maps),
    Item("services.json", "`lbproxy services`: what is balanced", _services, 30),
    Item("backends.json", "`lbproxy backends`: who answers, in which state", _backends, 30),
    Item("flows.json", "how many flows there are, by protocol", _flows, 30),
    Item("migration.json", "`lbproxy migrate status`: what is kube-proxy's", _migration, 30),
    Item("identity.json", "what is pinned: version, sizes", _identity),
    Item("programs.json", "the pinned programs and their maps", _programs),
    Item("links.json", "the pinned links, and what they hold where", _links),
    Item("attached.json", "everybody's programs at the hooks that lbproxy uses", _attached, 20),
    Item(
        "preflight.json",
        "`lbproxy preflight`, with the agent's settings; what kube-proxy has left",
        _preflight,
        60,
    ),
    Item("configuration.txt", "every setting, with the files' content merged in", _configuration),
    Item("agent/healthz.json", "/healthz: what is not as it should be", _healthz("/healthz")),
    Item("agent/statusz.txt", "/statusz: since when it runs", _metrics("/statusz")),
    Item("agent/flagz.txt", "/flagz: every setting in effect", _metrics("/flagz")),
    Item("agent/configz.json", "/configz: the same for kube-proxy's tools", _metrics("/configz")),
    Item("agent/metrics.txt", "/metrics: one scrape", _metrics("/metrics"), 20),
    Item("agent/log.txt", "the agent's last lines, where the node keeps them", _log, 15),
    Item("trace.jsonl", "`lbproxy trace` of any service, for some seconds", _trace, 630),
    Item("node/kernel.txt", "the kernel's last words on BPF, devices and memory", _kernel_log),
    Item("node/devices.json", "devices, their addresses and MTUs", _devices),
    Item("node/routes.txt", "routing rules and routes", _routes, 20),
    Item("node/system.json", "settings of the network, mounts of bpffs and cgroups", _system),
    Item("node/counters.txt", "the kernel's own network counters", _counters),
)


def unasked(node: Node) -> frozenset[str]:
    """The files that nobody wants: that they are missing is nothing to complain of."""
    return frozenset() if node.trace_s else frozenset({"trace.jsonl"})


def json_of(value: object) -> typing.Any:
    """What a collector returned, as JSON has it."""
    return msgspec.to_builtins(value, enc_hook=str, str_keys=True)
