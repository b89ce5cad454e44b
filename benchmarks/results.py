"""What one run of the benchmarks found: every sample, and where it was taken. Read and written as JSON."""

import pathlib
import typing

import msgspec

SCHEMA: typing.Final = 1
DIRECTORY = pathlib.Path(__file__).with_name("results")


class Run(msgspec.Struct, frozen=True):
    """One client's run."""

    rate_per_s: float
    p50_us: float
    p99_us: float
    cpu_us: float  # CPU time of client and server for each request
    count: int
    failed: int
    failures: dict[str, int]  # by errno name


class Round(msgspec.Struct, frozen=True):
    """One run of each variant, in the order they were made."""

    runs: dict[str, Run]


class Traffic(msgspec.Struct, frozen=True):
    """Interleaved rounds of one kind of traffic at one number of services."""

    services: int
    mode: str
    seconds: float  # of each run
    rounds: list[Round]


class Programming(msgspec.Struct, frozen=True):
    """From a slice's patch to the first connection that reached a new endpoint."""

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
    """One start of the agent, beside an API server that is already there."""

    services: int
    how: str  # "fresh": nothing pinned; "adopted": the datapath of the agent before
    synced_s: float  # from the command to the first connection to where the last service now is
    cpu_s: float  # until it is quiet, children included
    failed: int  # connections: "fresh" after the first that succeeded, "adopted" all the time
    connections: int
    agent_log: list[str]


class Memory(msgspec.Struct, frozen=True):
    """What the agent and its maps occupy once it is quiet, in bytes."""

    services: int
    rss: int
    rss_anonymous: int
    rss_of_maps: int  # part of `rss`: pages of BPF maps, counted in `maps` as well
    rss_peak: int
    cgroup_peak: int | None  # with the compiler, page cache and kernel memory; None: no memory cgroup here
    maps: dict[str, int]  # as the kernel charges them
    programs: int


class Cpu(msgspec.Struct, frozen=True):
    """What the agent computes while so many slices change."""

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
    complete: bool = False
    noise: Noise | None = None
    traffic: list[Traffic] = []
    programming: list[Programming] = []
    stand_in: list[StandIn] = []
    starts: list[Start] = []
    memory: list[Memory] = []
    cpu: list[Cpu] = []
    outside: list[Traffic] = []  # to NodePorts
    packets: list[Packets] = []
    others_during_packets: list[float] = []  # the share of the CPUs that other processes had
    ports: list[Ports] = []
    maglev: list[Maglev] = []
    maglev_resized: list[Resized] = []


def write(results: Results, path: pathlib.Path) -> None:
    """Write a run, replacing an earlier one of that name in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    fresh.replace(path)


def read(path: pathlib.Path) -> Results:
    """Read a run; ValueError where the file is of another schema or not one at all."""
    try:
        results = msgspec.json.decode(path.read_bytes(), type=Results)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    if results.schema != SCHEMA:
        raise ValueError(f"{path} is of schema {results.schema}, this report reads {SCHEMA}")
    return results


def newest(directory: pathlib.Path = DIRECTORY) -> pathlib.Path:
    """Find the run that was started last; ValueError where there is none."""
    found = sorted(directory.glob("*.json"), key=lambda path: read(path).started)
    if not found:
        raise ValueError(f"no results in {directory}: run `make bench` first")
    return found[-1]
