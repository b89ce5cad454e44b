"""What is known of a node before lbproxy is installed; None stands for "could not be found out"."""

import dataclasses
import typing

from lbproxy.core import devices, ipvs


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the configuration asks for, as far as it matters here."""

    node_name: str = "node-1"
    packet_path: bool = True
    xdp: bool = False
    hard_fail: bool = False  # a port that is taken ends the agent
    cgroup_named: bool = False
    manifests: str = ""  # instead of an API server
    detect_local: str = "ClusterCIDR"
    cluster_cidrs: tuple[str, ...] = ()
    bridge: str = ""
    prefix: str = ""
    masquerade_ports: int = 20_000
    notes: tuple[str, ...] = ()  # what was wrong in flags or files and could be passed over


class Feature(typing.NamedTuple):
    """Something the kernel must have, since which version, and whether it has."""

    what: str
    since: str
    found: bool | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """The kernel; `tcx` is what the packet path needs of it."""

    release: str = "6.18.0"
    machine: str = "x86_64"
    features: tuple[Feature, ...] = ()
    tcx: bool | None = True
    jit: bool | None = True
    btf: bool = True


class Refusal(typing.NamedTuple):
    """A program that the kernel does not take; `packet`: the packet path's, which sockets can do without."""

    program: str
    why: str
    packet: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """Where the programs would come from, and what the verifier says of them.

    `adopted`: this version's datapath is pinned already. `kept`: compiled copies are there.
    `lacks`: what a compilation would need and does not find.
    """

    adopted: bool = False
    kept: bool = True
    loaded: int = 19  # that the kernel took, when it was asked; 0: it was not
    refused: tuple[Refusal, ...] = ()
    lacks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What we are and may do; it is to be what the agent will."""

    capabilities: frozenset[str] = frozenset({"CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON", "CAP_SYS_ADMIN"})
    own_users: bool = False  # in a user namespace, where capabilities are not the kernel's own
    host_processes: bool = True  # /proc is the node's
    host_network: bool | None = True
    container: bool = False
    open_files: int = 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cgroup:
    """The cgroup to attach to; `problem` says why that can not be."""

    path: str = "/sys/fs/cgroup"
    problem: str = ""
    is_root: bool = True
    hybrid: bool = False  # cgroup v1 is mounted too


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bpffs:
    """The folder for pins; `problem` says why it can not be used, `version` whose datapath is there."""

    path: str = "/sys/fs/bpf/lbproxy"
    mounted: bool = True
    problem: str = ""
    version: str = ""
    agent_running: bool = False
    agent_pid: int | None = None


class Program(typing.NamedTuple):
    """A program of somebody at a hook: `hook` as people call it, `owner` empty where that is unknown."""

    hook: str
    name: str
    id: int
    owner: str
    place: str = ""  # the device or cgroup
    alone: bool = False  # it lets no other program in at this hook
    yields: bool = False  # it would not run any more beside another


class Device(typing.NamedTuple):
    """A device that the packet path would be attached to."""

    name: str
    role: devices.Role


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Devices of this network namespace, what is on them, and settings.

    `programs`: others' on the devices to be used. `strict`: devices whose reverse path filter is strict.
    `names`: all devices there are, `bridges` those that are bridges.
    """

    devices: tuple[Device, ...] = (Device("eth0", devices.Role.UPLINK),)
    missing: tuple[str, ...] = ()  # devices that were named and are not there
    programs: tuple[Program, ...] = ()
    problem: str = ""
    names: tuple[str, ...] = ("lo", "eth0")
    bridges: tuple[str, ...] = ()
    strict: tuple[str, ...] = ()
    ip_forward: bool | None = True
    ipv6_forwarding: bool | None = True
    has_ipv4: bool = True  # an address beyond the link
    has_ipv6: bool = False
    route_localnet: bool = False


class Listener(typing.NamedTuple):
    """An address that the agent would serve on, and who has it; `command` is empty where nobody does."""

    what: str
    flag: str
    address: str
    taken: bool = False
    pid: int | None = None
    command: str = ""


class Running(typing.NamedTuple):
    """A process of the node."""

    command: str
    pid: int


class OtherDatapath(typing.NamedTuple):
    """Another lbproxy's pins; `same_cgroup` says that it serves the sockets that this one would."""

    path: str
    running: bool
    pid: int | None
    cgroup: str
    same_cgroup: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Others:
    """Who else balances, or may."""

    processes: tuple[Running, ...] = ()
    leftovers: tuple[str, ...] = ()  # what of kube-proxy's rules is in force
    without_tool: tuple[str, ...] = ()  # those that nothing here can remove, by flavours of iptables
    unseen: tuple[str, ...] = ()  # where its rules could not be looked for
    ipvs_mode: ipvs.Found | None = None
    hooks: tuple[Program, ...] = ()  # programs at the cgroup's hooks
    hooks_problem: str = ""
    datapaths: tuple[OtherDatapath, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What there is and what is needed, in bytes; `limit` is the room in this process's cgroup."""

    available: int | None = 4 << 30
    limit: int | None = None
    maps: int = 40 << 20
    agent: int = 90 << 20
    compiler: int = 0


class NodeObject(typing.NamedTuple):
    """The Node; families are 4 and 6."""

    address_families: frozenset[int]
    pod_cidrs: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What the API server said; `problem` is why it said nothing.

    `by_service`: it was asked by way of a Service's address; None where that is not known.
    `servers`: where it really is. `forbidden`: what may not be read. `similar`: a Node that may be meant.
    """

    url: str = "https://192.0.2.1:6443"
    problem: str = ""
    in_pod: bool = False  # the address is the pod's environment's
    by_service: bool | None = False
    servers: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    node: NodeObject | None = None
    similar: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All of it. The defaults are a node that lacks nothing but its Node object."""

    wanted: Wanted = Wanted(cluster_cidrs=("10.244.0.0/16",))
    kernel: Kernel = Kernel()
    programs: Programs = Programs()
    process: Process = Process()
    cgroup: Cgroup = Cgroup()
    bpffs: Bpffs = Bpffs()
    network: Network = Network()
    listeners: tuple[Listener, ...] = ()
    others: Others = Others()
    memory: Memory = Memory()
    cluster: Cluster = Cluster()
