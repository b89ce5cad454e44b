"""The packet programs run on single frames, by BPF_PROG_TEST_RUN, in a network namespace of their own.

The namespace has an uplink and a pod's device, with the addresses and routes that the
programs ask the kernel for. Nothing is attached: a frame goes in, a verdict and a frame
come out, and the maps can be looked at in between.
"""

import array
import collections.abc
import concurrent.futures
import contextlib
import ctypes
import itertools
import mmap
import os
import pathlib
import socket
import subprocess
import tempfile
import time
import typing

from lbproxy import abi, absent_flows
from lbproxy.core import absence, node_rows, tables
from lbproxy.kernel import bpffs, generation, libbpf, loader, map_rows, maps, namespaces, programs, source
from lbproxy.lab import netns, prog_test_run
from tests import installing
from tests.packets import packets

NEXT = 0xFFFFFFFF  # TCX_NEXT
DROP = 2
REDIRECT = 7
XDP_PASS = 2
XDP_TX = 3

_LIB = ctypes.CDLL("libbpf.so.1", use_errno=True)
_CLOCK_MONOTONIC_COARSE = 6
_TICK_SHIFT = abi.constant("TICK_SHIFT")
_XDP_DRV_MODE = 4
_ROOM = 1024  # bytes that a program may add to a frame
_numbers = itertools.count(1)

T = typing.TypeVar("T")

SIZES: typing.Final = {
    **installing.SIZES,
    "flows": 256,
    "slots": 4096,
    # LRU maps of the kernel forget before they are full; not as long as little is in them.
    "flows_new": 8192,
    "fragments": 8192,
    "affinity": 8192,
}


class Result(typing.NamedTuple):
    """What a program made of a frame."""

    verdict: int
    frame: bytes


def flow_of(key: tables.FlowKey, row: bytes) -> tables.Flow:
    """A row, without the time of the SYN that rows of answers have: nobody can foretell it."""
    found = tables.flow(row)
    return found._replace(backend=0) if key.stage and not found.state & tables.FlowState.ORIGINAL else found


class _Column:
    """An array map of 64-bit rows, read in place."""

    def __init__(self, fd: int) -> None:
        info = libbpf.map_info(fd)
        size = info.value_size * info.max_entries
        self._memory = mmap.mmap(fd, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        self.words = memoryview(self._memory)[:size].cast("Q")

    def close(self) -> None:
        self.words.release()
        self._memory.close()


def tick() -> int:
    """The time as the programs see it."""
    return time.clock_gettime_ns(_CLOCK_MONOTONIC_COARSE) >> _TICK_SHIFT


def second() -> int:
    """Likewise, in whole seconds."""
    return time.clock_gettime_ns(_CLOCK_MONOTONIC_COARSE) // 10**9


class Harness:
    """Programs and maps of one's own. Everything that runs them has to go through `inside`."""

    def __init__(self, folder: pathlib.Path, space: str, sizes: typing.Mapping[str, int]) -> None:
        self.sizes = sizes
        self.space = space
        self.folder = folder
        self._thread = concurrent.futures.ThreadPoolExecutor(1, initializer=_enter, initargs=(space,))
        (folder / "maps").mkdir()
        for spec in abi.MAPS.values():
            generation.create(folder / "maps", spec, abi.map_rows(spec, sizes))
        generation.create(folder / "maps", generation.TAILS, len(programs.TAILS))
        loader.compile_and_pin(
            source.compose(programs.SOURCE, sizes, {name: str(folder / "maps" / name) for name in abi.MAPS}),
            {program.name: str(folder / program.name) for program in (*programs.TAILS, *programs.PACKET)},
        )
        self.programs = {
            program.name: libbpf.obj_get(str(folder / program.name)) for program in programs.PACKET
        }
        self.maps = maps.BpfMaps(str(folder / "maps"))
        self.fds = {name: libbpf.obj_get(str(folder / "maps" / name)) for name in abi.MAPS}
        columns = ("counters", "unassured", "backend_stats", "service_stats", "scratch", "handover")
        self.columns = {name: _Column(self.fds[name]) for name in columns}
        self.counters = self.columns["counters"].words
        self.unassured = self.columns["unassured"].words
        self.handover = self.columns["handover"].words
        self.installer = installing.Installer(self.maps, maps.capacity(sizes))
        self.ifindex = self.inside(lambda: {name: number for number, name in socket.if_nameindex()})
        self._out = ctypes.create_string_buffer(packets.LONGEST + _ROOM)
        self._skb, self._xdp = prog_test_run.Skb(), prog_test_run.XdpMd()
        self._options = prog_test_run.Options(
            sz=ctypes.sizeof(prog_test_run.Options), data_out=ctypes.addressof(self._out), repeat=1
        )
        self._xdp_link = self.inside(self._have_xdp_queues)

    def close(self) -> None:
        self._thread.shutdown()
        for column in self.columns.values():
            column.close()
        self.maps.close()
        for fd in (*self.programs.values(), *self.fds.values(), self._xdp_link):
            os.close(fd)

    def inside(self, function: collections.abc.Callable[[], T]) -> T:
        """Call a function in the namespace."""
        return self._thread.submit(function).result()

    def run(self, program: str, frame: bytes, device: str = "up0") -> Result:
        """Give a frame to a program, as one that comes in, or goes out, at a device."""
        return self.inside(lambda: self.run_here(program, frame, self.ifindex[device]))

    def run_here(self, program: str, frame: bytes, ifindex: int) -> Result:
        """The same, for those who are inside already. Raises OSError where the kernel refuses the frame."""
        options = self._options
        options.data_in = frame
        options.data_size_in = len(frame)
        options.data_size_out = len(frame) + _ROOM
        if program.startswith("xdp"):
            self._xdp.data_end = len(frame)
            self._xdp.ingress_ifindex = ifindex
            options.ctx_in, options.ctx_size_in = (
                ctypes.addressof(self._xdp),
                ctypes.sizeof(prog_test_run.XdpMd),
            )
        else:
            self._skb.ifindex = ifindex
            options.ctx_in, options.ctx_size_in = (
                ctypes.addressof(self._skb),
                ctypes.sizeof(prog_test_run.Skb),
            )
        if _LIB.bpf_prog_test_run_opts(self.programs[program], ctypes.byref(options)) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"test run: {os.strerror(number)}")
        return Result(options.retval, self._out.raw[: options.data_size_out])

    def _have_xdp_queues(self) -> int:
        """Attach the XDP program: a veth device has no queues for one, that tests could name, before that."""
        program = self.programs["xdp_from_outside"]
        return libbpf.link_create(program, self.ifindex["up0"], libbpf.XDP, _XDP_DRV_MODE)

    @contextlib.contextmanager
    def successor(self, name: str, **others: int) -> collections.abc.Iterator[dict[str, int]]:
        """The same programs by name, for `programs`, on these maps but for `others`, given by descriptors."""
        folder = self.folder / name
        (folder / "maps").mkdir(parents=True)
        for one, fd in (self.fds | others).items():
            libbpf.obj_pin(fd, str(folder / "maps" / one))
        generation.create(folder / "maps", generation.TAILS, len(programs.TAILS))
        pins = {one: str(folder / "maps" / one) for one in self.fds | others}
        loader.compile_and_pin(
            source.compose(programs.SOURCE, self.sizes, pins),
            {one.name: str(folder / one.name) for one in (*programs.TAILS, *programs.PACKET)},
        )
        found = {one.name: libbpf.obj_get(str(folder / one.name)) for one in programs.PACKET}
        try:
            yield found
        finally:
            for fd in found.values():
                os.close(fd)
            generation.remove(folder)

    # --- rows ---

    def begin(self, said: bool = True) -> None:
        """Take away all rows, counts and services: the next test's are its own.

        `said` is whether the programs are told what is not there, as by an agent that has looked.
        """
        self.say_no_flows(b"\xff" if said else b"\0")
        self.maps.set_column("no_flows", "begun", bytes(8 * absence.PAIR_ROWS))
        for table in ("flows", "flows_new", "fragments", "affinity", "frontends", "services", "localities"):
            self.empty(table)
        for table in ("source_ranges", "tunnel_ends", "node_addresses", "devices", "backend_health"):
            self.empty(table)
        for column in self.columns.values():
            column.words[:] = memoryview(bytes(8 * len(column.words))).cast("Q")
        self.installer = installing.Installer(self.maps, maps.capacity(self.sizes))
        if said:
            self.maps.set_column("no_frontends", "none", self.installer.ledger.absence.begin())
        else:
            self.maps.set_column("no_frontends", "none", bytes(8 * self.maps.rows_of("no_frontends")))

    def say_no_flows(self, byte: bytes) -> None:
        self.maps.set_column("no_flows", "none", byte * 8 * absence.PAIR_ROWS)

    def find_absent(self) -> None:
        """Say anew between which addresses no flow has a row, as the agent does now and then."""
        self.say_no_flows(b"\0")
        known = absent_flows.AbsentFlows(self.maps)
        found = known.look()
        assert found is not None
        for table in (tables.Table.FLOWS, tables.Table.FLOWS_NEW):
            for keys, _ in self.maps.batches(table, 4096):
                found.add(keys)
        known.looked(found)

    def empty(self, table: str) -> None:
        for key, _ in list(self.maps.rows(table)):
            map_rows.delete(self.fds[table], key)

    def node(self, rules: node_rows.PacketRules, *local: str, pod_device: bool = False) -> None:
        """Write what the agent would of this node: settings, its addresses and its devices."""
        own = tuple(map(installing.address, local))
        facts = node_rows.NodeFacts(own, own, 0)
        rows = node_rows.node_rows(facts, [], False, len(local), rules)
        self.maps.apply(node_rows.node_writes(rows, dict(self.maps.rows("node_addresses"))))
        for name, address4, address6, flags in (
            ("up0", packets.NODE, packets.NODE6, 0),
            (
                "pod0",
                packets.NODE_TO_PODS,
                packets.NODE6_TO_PODS,
                tables.DeviceFlag.PODS if pod_device else 0,
            ),
        ):
            row = tables.Device(installing.address(address4), installing.address(address6), flags)
            key = tables.row_key(self.ifindex[name])
            self.maps.apply([tables.Put(tables.Table.DEVICES, key, row.pack())])

    def flows(self, table: str = "flows") -> dict[tables.FlowKey, tables.Flow]:
        found = ((tables.flow_key(key), row) for key, row in self.maps.rows(table))
        return {key: flow_of(key, row) for key, row in found}

    def put_flow(self, key: tables.FlowKey, row: tables.Flow, table: str = "flows") -> None:
        map_rows.update(self.fds[table], key.pack(), row.pack())
        [place] = absence.pair_places(key.pack())
        begun = array.array("Q", self.maps.column("no_flows", "begun"))
        begun[place >> 6] |= 1 << (place & 63)
        self.maps.set_column("no_flows", "begun", begun.tobytes())

    def count(self, reason: str) -> int:
        """A counter, by its name in bpf/abi.h."""
        return self.counters[abi.constant(f"COUNTER_{reason}")]

    def counted(self) -> dict[str, int]:
        """All counters that have moved."""
        names = {value: name for name, value in abi.CONSTANTS.items() if name.startswith("LB_COUNTER_")}
        return {
            names[number].removeprefix("LB_COUNTER_"): count
            for number, count in enumerate(self.counters)
            if count
        }


def _enter(space: str) -> None:
    fd = os.open(netns.path(space), os.O_RDONLY)
    namespaces.call("setns", fd, 0x40000000)
    os.close(fd)


def _ip(space: str, *lines: str) -> None:
    subprocess.run(
        ["ip", "-n", space, "-batch", "-"], input="\n".join(lines) + "\n", text=True, check=True, timeout=30
    )


@contextlib.contextmanager
def started(sizes: typing.Mapping[str, int] = SIZES) -> collections.abc.Iterator[Harness]:
    """A harness with its namespace and its bpffs, all of which go in the end."""
    space = f"lbp-packets-{os.getpid()}-{next(_numbers)}"
    settings = {
        "net.ipv4.ip_forward": "1",
        "net.ipv6.conf.all.forwarding": "1",
        "net.ipv6.conf.default.accept_dad": "0",
        "net.ipv6.conf.all.accept_dad": "0",
    }
    with contextlib.ExitStack() as stack:
        netns.create(space, settings)
        stack.callback(netns.remove, space)
        _ip(
            space,
            "link set lo up",
            f"link add up0 address {packets.MAC_UP} type veth peer name far0",
            f"link add pod0 address {packets.MAC_POD_DEVICE} type veth peer name far1",
            *(f"link set {name} up" for name in ("up0", "far0", "pod0", "far1")),
            f"addr add {packets.NODE}/24 dev up0",
            f"addr add {packets.NODE6}/64 dev up0 nodad",
            f"addr add {packets.NODE_TO_PODS}/24 dev pod0",
            f"addr add {packets.NODE6_TO_PODS}/64 dev pod0 nodad",
            f"route add default via {packets.GATEWAY} dev up0",
            f"route add default via inet6 {packets.GATEWAY6} dev up0",
            f"neigh add {packets.GATEWAY} lladdr {packets.MAC_GATEWAY} dev up0 nud permanent",
            f"neigh add {packets.GATEWAY6} lladdr {packets.MAC_GATEWAY} dev up0 nud permanent",
        )
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lbp-packets-")))
        root = folder / "bpf"
        bpffs.ensure(root)
        stack.callback(bpffs.remove, root)
        harness = Harness(root, space, sizes)
        stack.callback(harness.close)
        yield harness
