"""What one run of the benchmarks found: every sample, and where it was taken. Read and written as JSON."""

import os
import pathlib
import sys
import tempfile
import typing

import msgspec

SCHEMA: typing.Final = 2
MEANS_NOTHING: typing.Final = "smoke"  # the profile that shows that everything works, and no more
DIRECTORY = pathlib.Path(__file__).with_name("results")


class Contestant(msgspec.Struct, frozen=True):
    """Who balances: lbproxy, a kube-proxy, or rules as a kube-proxy writes them."""

    name: str  # as in variants: "lbproxy", "iptables", "nftables"
    label: str  # as people should read it, with what is real of it
    real: bool  # an agent runs; else rules were generated and loaded, and there is none to measure
    facts: dict[str, str] = {}  # versions, the backend of iptables


class Run(msgspec.Struct, frozen=True):
    """One client's run."""

    rate_per_s: float  # connections or questions answered; MB for throughput
    p50_us: float
    p99_us: float
    cpu_us: float  # CPU time of client and server for each request; for all of `bulk`
    own_share: float  # of that time, what they spent in their own code and not in the kernel
    count: int
    failed: int
    failures: dict[str, int]  # by errno name


class Round(msgspec.Struct, frozen=True):
    """One run of each variant, in the order they were made.

    Variants are "bare", "bare/again" (the same once more: the control), and for each
    contestant "NAME/service" (through a service's address) and "NAME/direct" (to a pod's
    address beside it); from outside "bare", "bare/again", "bare/elsewhere" (pods of this
    and of another node, dialled directly) and "NAME/local", "NAME/masqueraded",
    "NAME/remote", "NAME/dsr" (NodePorts).
    """

    runs: dict[str, Run]


class Traffic(msgspec.Struct, frozen=True):
    """Interleaved rounds of one kind of traffic at one number of services."""

    services: int
    path: str  # "pod", "remote", "node", "outside": who asks, and where the backend is (see `rounds`)
    mode: str  # "short", "established", "udp-new", "udp-established", "bulk"
    seconds: float  # of each run
    rounds: list[Round]


class Programming(msgspec.Struct, frozen=True):
    """From a slice's patch to the first connection that reached a new endpoint.

    Of a contestant that is not real: from the moment the changed rules begin to be
    loaded, without whoever would have to compute them.
    """

    contestant: str
    services: int
    churn_per_s: float  # other slices changed meanwhile, as achieved
    latency_ms: list[float]
    lost: int  # changes that did not show within the time allowed
    failed: int  # connections


class StandIn(msgspec.Struct, frozen=True):
    """From a slice's patch to its event at a watcher that does nothing but read the clock."""

    services: int
    event_ms: list[float]


class Start(msgspec.Struct, frozen=True):
    """One start of an agent, beside an API server that is already there; of generated rules, a loading."""

    contestant: str
    services: int
    # "fresh": nothing there; "compiled": nothing but compiled programs; "adopted": over what the agent
    # before left; "upgraded": replacing it
    how: str
    synced_s: float  # from the command to the first connection to where the last service now is
    cpu_s: float  # until it is quiet, children included
    failed: int  # connections: "fresh" and "compiled" after the first that succeeded, others all the time
    connections: int
    agent_log: list[str]


class Memory(msgspec.Struct, frozen=True):
    """What an agent and its objects in the kernel occupy once it is quiet, in bytes; rss 0 without one."""

    contestant: str
    services: int
    rss: int
    rss_anonymous: int
    rss_of_maps: int  # part of `rss`: pages of BPF maps, counted in `maps` as well
    rss_peak: int
    cgroup_peak: int | None  # with the compiler, page cache and kernel memory; None: no memory cgroup here
    maps: dict[str, int]  # BPF maps as the kernel charges them
    programs: int
    rules: int | None = None  # of a kube-proxy: what the kernel's memory grew by as they were loaded


class Cpu(msgspec.Struct, frozen=True):
    """What an agent computes while so many slices change."""

    contestant: str
    services: int
    changes_per_s: float  # as achieved
    seconds: float
    cpu_s: float


class Packets(msgspec.Struct, frozen=True):
    """A program of the packet path on packets of one kind, by test runs."""

    program: str  # of the floor: "tc" or "xdp"
    what: str
    family: int
    protocol: str
    flows: int  # so many in turn; 0: each packet begins one
    ns: list[float]  # a round each


class Filled(msgspec.Struct, frozen=True):
    """New flows while some ports are taken."""

    ns: float
    refused: float  # the share of them


class Ports(msgspec.Struct, frozen=True):
    """Masqueraded flows to one address of a backend."""

    family: int
    ports: int
    reached: int  # flows that there were when one was refused first
    filled: dict[str, list[Filled]]  # by the share of ports taken


class Maglev(msgspec.Struct, frozen=True):
    """Maglev tables of one size for so many backends: a sample each of another set of backends."""

    slots: int
    backends: int
    chosen: bool  # lbproxy gives so many backends this many slots
    build_ms: list[float]  # of CPU time
    most: float  # slots of the most loaded backend ÷ the mean, in the worst of the tables
    least: float
    weighted_most: float  # with unequal weights: slots ÷ what the weight is due
    weighted_least: float
    moved: dict[int, list[float]]  # by how many leave: the share of the others' slots that change hands


class Resized(msgspec.Struct, frozen=True):
    """One backend leaves, and the table gets the next smaller size."""

    backends: int  # before
    slots: int
    slots_after: int
    moved: list[float]  # the share of the other backends' flows that change hands


class Balancing(msgspec.Struct, frozen=True):
    """Clients in a closed loop while one backend is slow: a sample each round."""

    algorithm: str
    clients: int
    pause_ms: float  # of each client after each answer
    slow_ms: float  # what the slow backend waits before it answers
    backends: int
    rate_per_s: list[float]
    slow_share: list[float]  # of the answers, from the slow backend
    p50_us: list[float]
    p95_us: list[float]
    p99_us: list[float]
    failed: int  # connections, of all rounds


class Failed(msgspec.Struct, frozen=True):
    """A step of the run that failed: what it would have found is missing."""

    step: str
    text: str


class Noise(msgspec.Struct, frozen=True):
    """What else the machine did."""

    load_before: float  # load average over the minute before
    steal_share: float  # of all CPU time during the run, taken by the hypervisor


class Results(msgspec.Struct):
    """A whole run."""

    profile: str
    started: str  # ISO 8601, UTC
    machine: dict[str, str]
    software: dict[str, str]
    settings: dict[str, typing.Any]
    schema: int = SCHEMA
    took_s: float = 0.0
    complete: bool = False  # it came to its end, though steps may have failed
    noise: Noise | None = None
    failed: list[Failed] = []
    contestants: list[Contestant] = []
    traffic: list[Traffic] = []
    programming: list[Programming] = []
    stand_in: list[StandIn] = []
    starts: list[Start] = []
    memory: list[Memory] = []
    cpu: list[Cpu] = []
    packets: list[Packets] = []
    others_during_packets: list[float] = []  # the share of the CPUs that other processes had
    ports: list[Ports] = []
    maglev: list[Maglev] = []
    maglev_resized: list[Resized] = []
    balancing: list[Balancing] = []


def write(results: Results, path: pathlib.Path) -> None:
    """Write a run, replacing an earlier one of that name in one step."""
    text = msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n"
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as fresh:
        try:
            fresh.write(text)
            fresh.flush()
            os.fchmod(fresh.fileno(), 0o644)
            os.replace(fresh.name, path)
        except BaseException:
            os.unlink(fresh.name)
            raise


def partial(path: pathlib.Path) -> pathlib.Path:
    """Return where a run is kept that did not come to its end: it replaces none that did."""
    return path.with_name(f"{path.name}.partial")


def check_writable(path: pathlib.Path) -> None:
    """Raise OSError where a run could not be written in the end, and ValueError where it should not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} is there already, and no ordinary file")
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
        pass


def read(path: pathlib.Path) -> Results:
    """Read a run; ValueError where the file is of another schema or not one at all."""
    text = path.read_bytes()
    try:
        # By itself: what a run of another schema lacks is no news.
        schema = msgspec.json.decode(text, type=_OfSchema).schema
        if schema != SCHEMA:
            raise ValueError(f"{path} is of schema {schema}, this report reads {SCHEMA}")
        return msgspec.json.decode(text, type=Results)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is no run: {error}") from error


class _OfSchema(msgspec.Struct):
    schema: int


def newest(directory: pathlib.Path = DIRECTORY) -> pathlib.Path:
    """Find the run that was started last, of those that came to their end and mean something.

    ValueError where there is none. Files that are no runs are left out, with a line on stderr.
    """
    found = []
    for path in sorted(directory.glob("*.json")):
        try:
            run = read(path)
        except (ValueError, OSError) as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        if run.complete and run.profile != MEANS_NOTHING:
            found.append((run.started, path))
    if not found:
        raise ValueError(f"no complete results in {directory}: run `make bench` first")
    return max(found)[1]
