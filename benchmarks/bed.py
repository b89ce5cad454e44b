"""Where packet programs are measured: two devices, the datapath in its default sizes, services.

    up0     the uplink: clients, and pods of other nodes, by way of a gateway
    pod0    where this node's pods are

The programs come from the loader and the tables from the ledger, as in the agent.
Nothing else is in their namespace, and nothing is attached but the XDP program at
`up0`, without which the kernel takes no test run from that device.
"""

import collections.abc
import concurrent.futures
import contextlib
import dataclasses
import mmap
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import typing

import msgspec

from benchmarks import arena, cluster, frames, test_runs
from lbproxy import abi, cgroup2
from lbproxy.config import config
from lbproxy.core import absence, addresses, decode, ledger, model, node_rows, plan, state, tables
from lbproxy.kernel import bpffs, datapath, device_links, libbpf, map_rows, maps, namespaces, programs
from lbproxy.lab import cluster as lab_cluster
from lbproxy.lab import netns

T = typing.TypeVar("T")

UPLINK_MAC, PODS_MAC, OTHER_MAC = (bytes([2, 0, 0, 0, 0, last]) for last in (1, 2, 9))
PORTS: typing.Final = node_rows.masquerade_ports((32768, 60999))
NODE_NAME = "node-000"
_SERIAL = 1_000_000  # beyond those of labs
_SETTINGS = {
    "net.ipv4.ip_forward": "1",
    "net.ipv6.conf.all.forwarding": "1",
    "net.ipv6.conf.default.accept_dad": "0",
    "net.ipv6.conf.all.accept_dad": "0",
}


def _packed(text: str) -> bytes:
    found = addresses.parse(text)
    assert found is not None
    return found


class Side(typing.NamedTuple):
    """The addresses of one family, as 16 bytes."""

    node: bytes
    node_to_pods: bytes
    client: bytes  # the first of many
    pod: bytes
    remote: bytes  # the first of four pods of another node
    stranger: bytes  # a pod that no service has


SIDES: typing.Final = {
    4: Side(
        *map(_packed, ("192.0.2.1", "10.244.1.1", "100.64.0.0", "10.244.1.10", "10.244.2.10", "10.244.1.77"))
    ),
    6: Side(
        *map(
            _packed,
            ("2001:db8::1", "fd00:244:1::1", "2001:db8:c::1:0", "fd00:244:1::10", "fd00:244:2::10",
             "fd00:244:1::77"),
        )
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Service:
    """A service with a NodePort, for TCP and UDP and both families."""

    name: str
    node_port: int
    endpoints: int
    remote: bool = False
    local_policy: bool = False
    mode: model.PacketMode | None = None
    algorithm: model.Algorithm = model.Algorithm.RANDOM


LOCAL = Service("local", 30080, 1, local_policy=True)
NEAR = Service("near", 30081, 1)  # masqueraded to this node's pod
FAR = Service("far", 30082, 4, remote=True)
ONE = Service("one", 30083, 1, remote=True)  # one address: so many flows as there are ports
NONE = Service("none", 30084, 0)
DSR = Service("dsr", 30085, 4, remote=True, mode=model.PacketMode.DSR)
LEAST = Service("least", 30086, 4, remote=True, algorithm=model.Algorithm.LEAST_CONNECTIONS)
SERVICES: typing.Final = (LOCAL, NEAR, FAR, ONE, NONE, DSR, LEAST)


def later(address: bytes, number: int) -> bytes:
    """Return the address so many after this one."""
    return address[:12] + (int.from_bytes(address[12:], "big") + number).to_bytes(4, "big")


class Bed:
    """See the module's text; leaving the `with` block removes all of it."""

    def __init__(self, fillers: int, cpu: int) -> None:
        """Describe it: `fillers` services without traffic share the tables; programs are run on `cpu`."""
        self._fillers = fillers
        self._cpu = cpu
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Bed":
        with contextlib.ExitStack() as stack:
            arena.sweep()
            # Named as what a lab makes: the next run's sweep knows those of dead processes.
            self._run = f"{lab_cluster.run_prefix()}{_SERIAL}"
            space = f"{self._run}-bed"
            netns.create(space, _SETTINGS)
            stack.callback(netns.remove, space)
            _build(space)
            # A thread that stays in the namespace; this one is where it was.
            self._thread = concurrent.futures.ThreadPoolExecutor(
                1, initializer=_enter, initargs=(netns.path(space), self._cpu)
            )
            stack.callback(self._thread.shutdown)
            pins = pathlib.Path(tempfile.gettempdir()) / f"{arena.own_prefix()}bed"
            stack.callback(shutil.rmtree, pins, ignore_errors=True)
            stack.callback(bpffs.remove, pins)
            bpffs.ensure(pins)
            self.inside(lambda: self._load(stack, pins))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def inside(self, function: collections.abc.Callable[[], T]) -> T:
        """Call a function in the namespace."""
        return self._thread.submit(function).result()

    def _load(self, stack: contextlib.ExitStack, root: pathlib.Path) -> None:
        group = (cgroup2.mount_point() or pathlib.Path()) / self._run
        group.mkdir()
        stack.callback(group.rmdir)
        made = datapath.Datapath(root)
        made.ensure(group, dataclasses.asdict(config.MapRows()))
        self.ifindex = {name: number for number, name in socket.if_nameindex()}
        up0 = self.ifindex["up0"]
        applied = made.attach([device_links.Attachment(up0, device_links.XDP, device_links.NATIVE)])
        if applied.refused:
            raise next(iter(applied.refused.values()))
        pins = {program.name: made.programs_dir / program.name for program in programs.PACKET}
        wrappers = root / "bench"
        wrappers.mkdir()
        self.runner = test_runs.Runner(wrappers, pins)
        stack.callback(self.runner.close)
        self.maps = maps.BpfMaps(str(made.maps_dir))
        stack.callback(self.maps.close)
        self._fds = {name: libbpf.obj_get(str(made.maps_dir / name)) for name in ("flows", "flows_new")}
        for fd in self._fds.values():
            stack.callback(os.close, fd)
        self._columns: dict[str, memoryview] = {}
        for name in ("counters", "unassured"):
            self._columns[name] = stack.enter_context(_column(made.maps_dir / name))
        self._write_rows()

    def _write_rows(self) -> None:
        own = tuple(address for side in SIDES.values() for address in (side.node, side.node_to_pods))
        facts = node_rows.NodeFacts(own, own, 0)
        rules = node_rows.PacketRules(pod_cidrs=("10.244.0.0/16", "fd00:244::/32"), ports=PORTS)
        rows = node_rows.node_rows(facts, [], False, len(own), rules)
        writes = node_rows.node_writes(rows, {})
        for name, at in (("up0", "node"), ("pod0", "node_to_pods")):
            row = tables.Device(getattr(SIDES[4], at), getattr(SIDES[6], at), 0)
            writes.append(tables.Put(tables.Table.DEVICES, tables.row_key(self.ifindex[name]), row.pack()))
        known = state.ClusterState(NODE_NAME)
        place = cluster.filler_place(0)
        objects = cluster.objects(self._fillers + 1, NODE_NAME, "192.0.2.1", place, 8080)
        decoders = {"Service": decode.service, "EndpointSlice": decode.endpoint_slice, "Node": decode.node}
        for each in (*objects, *_objects()):
            known.apply(decoders[each["kind"]](msgspec.json.encode(each)))
        defaults = plan.Defaults(model.Algorithm.RANDOM)
        plans = {one.name: plan.plan(known, one.name, defaults) for one in known.services()}
        kept = ledger.Ledger(self.maps.capacity())
        self.maps.set_column(tables.Table.NO_FRONTENDS, "none", kept.absence.begin())
        self.maps.apply([*writes, *kept.change(plans, 0.0).writes])
        self._say_no_flows(b"")
        self.backends = {
            (row.addr, int.from_bytes(row.port, "big"), row.proto, row.service): int.from_bytes(key, "little")
            for key, row in ((key, tables.backend(row)) for key, row in self.maps.rows(tables.Table.BACKENDS))
        }

    # --- what the programs did ---

    def counters(self) -> dict[str, int]:
        """Return all counters of the packet path, by their names in bpf/abi.h."""
        return {
            name.removeprefix("LB_COUNTER_"): self._columns["counters"][number]
            for name, number in abi.CONSTANTS.items()
            if name.startswith("LB_COUNTER_")
        }

    def flows(self) -> dict[tables.FlowKey, tables.Flow]:
        """Return the rows of all flows."""
        return {tables.flow_key(key): tables.flow(row) for key, row in self.maps.rows(tables.Table.FLOWS)}

    def forget_flows(self) -> None:
        """Remove all flows."""
        # Nothing runs meanwhile that could begin one.
        self.maps.set_column(tables.Table.NO_FLOWS, "begun", bytes(8 * absence.PAIR_ROWS))
        self._say_no_flows(b"")
        for fd in self._fds.values():
            test_runs.empty(fd)
        self._columns["unassured"][0] = 0
        # As long as this is 0, nobody looks into flows_new.
        self._columns["counters"][abi.constant("COUNTER_FLOWS_FULL")] = 0

    def put_flows(self, keys: bytes, rows: bytes, count: int) -> None:
        """Write rows of flows that are assured."""
        self._say_no_flows(keys)
        map_rows.update_batch(self._fds["flows"], keys, rows, count)

    def _say_no_flows(self, but: bytes) -> None:
        """Tell the programs that there are no flows but those they have begun, and those with these keys."""
        found = absence.Pairs(self.maps.column(tables.Table.NO_FLOWS, "none") if but else b"")
        found.add(but)
        self.maps.set_column(tables.Table.NO_FLOWS, "none", found.none())

    # --- packets ---

    def frame(self, device: str, ends: frames.Ends, proto: int, tcp_flags: int) -> bytes:
        """Return a frame as it comes in, or goes out, at a device."""
        mac = UPLINK_MAC if device == "up0" else PODS_MAC
        return frames.build(ends, proto, tcp_flags, mac, OTHER_MAC)

    def once(self, program: str, device: str, frame: bytes) -> test_runs.Outcome:
        """Run a program on one frame."""
        return self.inside(lambda: self.runner.once(program, frame, self.ifindex[device]))

    def repeat(
        self,
        program: str,
        device: str,
        frame: bytes,
        of: test_runs.Flows,
        flows: int,
        times: int,
    ) -> tuple[int, int]:
        """Run a program so many times, on so many flows in turn (0: new ones); returns a verdict and ns."""

        def run() -> tuple[int, int]:
            self.runner.prepare(program, frame, of, flows)
            return self.runner.repeat(program, frame, self.ifindex[device], times)

        return self.inside(run)

    def singly(
        self, program: str, device: str, packets: collections.abc.Sequence[bytes]
    ) -> tuple[set[int], list[int]]:
        """Run a program once on each of these; returns the verdicts and ns of each."""
        return self.inside(lambda: self.runner.singly(program, packets, self.ifindex[device]))


def _objects() -> collections.abc.Iterator[cluster.Object]:
    for number, one in enumerate(SERVICES):
        ips = [f"10.96.200.{number + 1}", f"fd00:96::{number + 1:x}"]
        ports: list[dict[str, typing.Any]] = [
            {"name": proto.lower(), "protocol": proto, "port": 80, "nodePort": one.node_port}
            for proto in ("TCP", "UDP")
        ]
        annotations = {"lbproxy.io/algorithm": one.algorithm.label}
        annotations |= {"lbproxy.io/mode": one.mode.value} if one.mode else {}
        yield {
            "kind": "Service",
            "metadata": {"namespace": "bench", "name": one.name, "annotations": annotations},
            "spec": {
                "type": "NodePort", "clusterIP": ips[0], "clusterIPs": ips, "ports": ports,
                "ipFamilies": ["IPv4", "IPv6"],
                "externalTrafficPolicy": "Local" if one.local_policy else "Cluster",
            },
        }  # fmt: skip
        for family, side in SIDES.items():
            first = side.remote if one.remote else side.pod
            yield {
                "kind": "EndpointSlice",
                "metadata": {
                    "namespace": "bench", "name": f"{one.name}-{family}",
                    "labels": {"kubernetes.io/service-name": one.name},
                },
                "addressType": f"IPv{family}",
                "endpoints": [
                    {
                        "addresses": [addresses.text(later(first, index))],
                        "nodeName": "node-001" if one.remote else NODE_NAME,
                    }
                    for index in range(one.endpoints)
                ],
                "ports": [
                    {"name": proto.lower(), "protocol": proto, "port": 8080} for proto in ("TCP", "UDP")
                ],
            }  # fmt: skip


def _build(space: str) -> None:
    def mac(address: bytes) -> str:
        return address.hex(":")

    node4, pods4, node6, pods6 = (
        addresses.text(address) for side in (SIDES[4], SIDES[6]) for address in (side.node, side.node_to_pods)
    )
    lines = [
        "link set lo up",
        f"link add up0 address {mac(UPLINK_MAC)} type veth peer name far0",
        f"link add pod0 address {mac(PODS_MAC)} type veth peer name far1",
        *(f"link set {name} up" for name in ("up0", "far0", "pod0", "far1")),
        f"addr add {node4}/24 dev up0",
        f"addr add {node6}/64 dev up0 nodad",
        f"addr add {pods4}/24 dev pod0",
        f"addr add {pods6}/64 dev pod0 nodad",
        *(
            f"neigh add {gateway} lladdr {mac(OTHER_MAC)} dev up0 nud permanent"
            for gateway in ("192.0.2.254", "2001:db8::fe")
        ),
        "route add default via 192.0.2.254 dev up0",
        "route add default via inet6 2001:db8::fe dev up0",
    ]
    subprocess.run(["ip", "-n", space, "-batch", "-"], input="\n".join(lines) + "\n", text=True, check=True)


def _enter(path: pathlib.Path, cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})  # of this thread
    fd = os.open(path, os.O_RDONLY)
    try:
        namespaces.call("setns", fd, 0x40000000)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _column(path: pathlib.Path) -> collections.abc.Iterator[memoryview]:
    """An array map of 64-bit numbers, in place."""
    fd = libbpf.obj_get(str(path))
    rows = libbpf.map_info(fd).max_entries
    memory = mmap.mmap(fd, -(-rows * 8 // mmap.PAGESIZE) * mmap.PAGESIZE)
    os.close(fd)
    words = memoryview(memory).cast("Q")
    try:
        yield words
    finally:
        words.release()
        memory.close()
