"""The packet path again, in plain Python, to hold the programs in bpf/ against.

Written from the design (docs/ and the contract), and simple rather than fast: it is
given the rows of the same tables, and says what must become of a frame and of them.
Where the programs are free, in which backend and which port they draw, it is told what
they drew and checks that they might.
"""

import collections
import dataclasses
import typing

from lbproxy import abi
from lbproxy.core import outcomes, tables
from tests.packets import harness, packets, parsing, rewriting
from tests.packets.parsing import Packet
from tests.packets.rewriting import Bytes, Ends

State = tables.FlowState
Flag = tables.FrontendFlag
Setting = tables.Setting
INGRESS, EGRESS = 0, 1
_BOTH_FIN: typing.Final = State.FIN | State.PEER_FIN
_FIRST_OF_MAPPED: typing.Final = bytes(10) + b"\xff\xff"
_SERVING: typing.Final = (
    tables.BackendState.ACTIVE,
    tables.BackendState.TERMINATING,
    tables.BackendState.SERVING,
)
_HELD_EARLIER: typing.Final = abi.constant("HELD_EARLIER")
_REDIRECT: typing.Final = 5
_SETTLED: typing.Final = State.REPLIED | State.ASSURED
_MTU: typing.Final = 1500
_TICK_SHIFT: typing.Final = 30
_SEGMENTS: typing.Final = 128  # of a datagram
_WORD: typing.Final = (1 << 64) - 1
_NS_PER_S: typing.Final = 10**9

Row = tables.Flow | tuple[int, int] | bytes | None
# From, to: the device, 0 for none, and the next hop on it, empty for one that is not known.
Route = collections.abc.Callable[[bytes, bytes], tuple[int, bytes]]


class Place(typing.NamedTuple):
    """Where a program sees frames: at an uplink (`outside`), at a device of pods, or as they leave."""

    program: str
    egress: bool = False
    outside: bool = False
    xdp: bool = False


PLACES: typing.Final = (
    Place("tc_from_outside", outside=True),
    Place("xdp_from_outside", outside=True, xdp=True),
    Place("tc_from_inside"),
    Place("tc_to_any", egress=True),
)


class Device(typing.NamedTuple):
    """A device of the node."""

    ifindex: int
    mac: bytes


class UnexplainedError(AssertionError):
    """The programs did something that the design does not allow."""


@dataclasses.dataclass
class Outcome:
    """What becomes of a frame, and of the rows."""

    verdict: int
    bytes: Bytes
    writes: list[tuple[str, typing.Any, Row]] = dataclasses.field(default_factory=list)
    counters: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    connections: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # of (service, backend)
    refusals: list[int] = dataclasses.field(default_factory=list)
    unassured: int = 0


class Drawn(typing.Protocol):
    """What the programs drew for a frame, as far as it can be seen."""

    def backend(self) -> int:
        """The backend that a connection was counted for; 0 for none."""
        ...

    def flow(self, key: tables.FlowKey) -> tables.Flow | None:
        """The row that they left there."""
        ...

    def failed(self, reason: str) -> bool:
        """Whether they counted that."""
        ...

    def client_port(self, packet: Packet, key: tables.FlowKey, row: tables.Flow) -> bytes | None:
        """The port that the client got instead of its own, under which that row is kept; None for none."""
        ...


class Reference:
    """The tables, and what frames do with them."""

    def __init__(
        self,
        settings: tables.Settings,
        most_flows: int,
        route: Route,
        used_ports: collections.abc.Collection[tuple[int, bytes]],
    ) -> None:
        self.settings = settings
        self.most_flows = most_flows
        self.route = route
        self.used_ports = used_ports  # by sockets of this node: protocol and port
        self.frontends: dict[bytes, tables.Frontend] = {}
        self.slots: dict[int, list[int]] = {}  # of a frontend's block
        self.backends: dict[int, tables.Backend] = {}
        self.node_addresses: dict[bytes, bool] = {}  # whether NodePorts are served there
        self.devices: dict[int, tables.Device] = {}
        self.tunnel_ends: dict[tables.TunnelEndKey, int] = {}  # which backend it is
        self.source_ranges: dict[int, list[tuple[int, bytes]]] = {}  # of a service: bits and address
        self.flows: dict[tables.FlowKey, tables.Flow] = {}
        self.flows_new: dict[tables.FlowKey, tables.Flow] = {}
        self.fragments: dict[bytes, bytes] = {}
        self.affinity: dict[tuple[bytes, int], tuple[int, int]] = {}
        self.unassured = 0

    def serve(self, place: Place, device: Device, frame: bytes, now_ns: int, drawn: Drawn) -> Outcome:
        """Say what becomes of a frame, without making it so."""
        return _Serving(self, place, device, frame, now_ns, drawn).outcome()

    def commit(self, outcome: Outcome) -> None:
        """Make it so."""
        for table, key, row in outcome.writes:
            rows = getattr(self, table)
            if row is None:
                rows.pop(key, None)
            else:
                rows[key] = row
        self.unassured += outcome.unassured

    def timeout(self, proto: int, state: int) -> int:
        """How long a flow may be idle, in ticks."""
        known = self.settings
        if proto == parsing.UDP:
            ticks = known.udp_stream_ticks if state & State.ASSURED else known.udp_new_ticks
            return ticks - _HELD_EARLIER if is_held(state) and ticks > _HELD_EARLIER else ticks
        if proto == parsing.SCTP:
            return known.sctp_established_ticks if state & State.ASSURED else known.sctp_new_ticks
        if is_closed(state):
            return known.tcp_closed_ticks
        if state & _BOTH_FIN:
            return known.tcp_half_closed_ticks
        return known.tcp_established_ticks if state & State.ASSURED else known.tcp_new_ticks


def is_closed(state: int) -> bool:
    """Whether a TCP connection is over."""
    return bool(state & State.RESET) or state & _BOTH_FIN == _BOTH_FIN


def is_held(state: int) -> bool:
    """Whether a flow is somebody else's."""
    return state & State.HELD == State.HELD


def partner(key: tables.FlowKey, row: tables.Flow) -> tables.FlowKey:
    """The key of the row for the other direction."""
    to = _ends(key, row)
    return tables.FlowKey(to.dst, to.src, to.dport, to.sport, key.proto, 1 - key.stage)


def _is_of_tunnel(packet: Packet, row: tables.Flow, port: bytes) -> bool:
    """Whether a row is of a flow whose packet came in a tunnel that names this port, or one counted up."""
    segment = (int.from_bytes(port, "big") - int.from_bytes(row.dport, "big")) % 65536
    if packet.proto != parsing.TCP:
        return segment < (_SEGMENTS if packet.ipv4 else 1)
    if packet.begins():
        return segment == 0 and not is_closed(row.state)
    return packet.ipv4 or segment == 0


def _ends(key: tables.FlowKey, row: tables.Flow) -> Ends:
    """What a packet becomes: another one's destination where it comes in, its source where it leaves."""
    src, dst = (key.src, row.addr) if key.stage == INGRESS else (row.addr, key.dst)
    return Ends(src, dst, row.sport, row.dport)


class _Serving:
    """One frame."""

    def __init__(
        self, rows: Reference, place: Place, device: Device, frame: bytes, now_ns: int, drawn: Drawn
    ) -> None:
        self.rows = rows
        self.place = place
        self.device = device
        self.frame = frame
        self.now = now_ns >> _TICK_SHIFT
        self.now_s = now_ns // _NS_PER_S
        self.drawn = drawn
        self.out = Outcome(harness.NEXT, Bytes(frame))
        self.from_tunnel = False
        self.flows = collections.ChainMap[tables.FlowKey, typing.Any]({}, rows.flows)
        self.flows_new = collections.ChainMap[tables.FlowKey, typing.Any]({}, rows.flows_new)

    def outcome(self) -> Outcome:
        packet = parsing.parse(self.frame)
        if self.place.xdp:
            return self.sent_on(packet)
        to = self.frame[:6]
        if packet is None or (self.place.outside and to != self.device.mac):
            return self.out
        if packet.error:
            return self.error(packet)
        if packet.tunnel:
            return self.out if self.place.egress else self.untunnelled(packet)
        if packet.fragment:
            ports = self.fragment_ports(packet)
            if ports is None:
                return self.counted("FRAGMENT_LOST")
            packet = packet._replace(sport=ports[:2], dport=ports[2:])
        stage = EGRESS if self.place.egress else INGRESS
        key = _key(packet, stage)
        row = self.find(key)
        if row and stage == INGRESS and row.state & State.ORIGINAL and not self.still_holds(packet, row):
            row = None
        syn = packet.proto == parsing.TCP and packet.flags & packets.SYN
        if row and stage == EGRESS and syn and is_closed(row.state):
            self.forget(key)
            row = None
        if row:
            self.track(key, row, packet.flags, asks=not key.stage)
            if is_held(row.state):
                return self.out
            if row.state & State.TUNNEL:
                return self.tunnelled(packet, row.addr, row.dport)
            return self.translated(packet, _ends(key, row))
        if self.place.egress:
            return self.dropped() if self.must_not_leave(packet) else self.out
        if not self.place.outside and not packet.begins():
            return self.out
        return self.opened(packet, key)

    def sent_on(self, packet: Packet | None) -> Outcome:
        """In XDP: what only passes this node is translated for both ends; all else is left to tc."""
        self.out.verdict = harness.XDP_PASS
        if packet is None or packet.fragment or packet.proto not in (parsing.TCP, parsing.UDP):
            return self.out
        key = _key(packet, INGRESS)
        first = self.find(key)
        if (
            first is None
            or first.state & State.TUNNEL
            or first.state & (State.ORIGINAL | State.MASQUERADED) == State.ORIGINAL
            or (first.state & State.ORIGINAL and not self.still_holds(packet, first))
        ):
            return self.out
        second_key = tables.FlowKey(*_ends(key, first), packet.proto, EGRESS)
        second = self.find(second_key)
        if second is None or not self.may_go_back(packet):
            return self.out
        to = _ends(second_key, second)
        device, next_hop = self.rows.route(packet.src, to.dst)
        if device != self.device.ifindex or not next_hop:
            return self.out
        if rewriting.is_partial(self.frame, packet):
            return self.out
        self.out.bytes = rewriting.forward(self.frame, packet, to, self.device.mac, next_hop)
        self.track(key, first, packet.flags, asks=True)
        self.track(second_key, second, packet.flags)
        self.out.verdict = harness.XDP_TX
        return self.out

    def may_go_back(self, packet: Packet) -> bool:
        """Whether a packet was sent to this node and may leave it in one piece."""
        hops = self.frame[packet.l3 + (8 if packet.ipv4 else 7)]
        return self.frame[:6] == self.device.mac and hops > 1 and packet.end - packet.l3 <= _MTU

    # --- verdicts ---

    def counted(self, reason: str) -> Outcome:
        self.out.counters[reason] += 1
        return self.out

    def dropped(self, reason: str = "") -> Outcome:
        self.out.verdict = harness.DROP
        return self.counted(reason) if reason else self.out

    def translated(self, packet: Packet, to: Ends) -> Outcome:
        self.out.bytes = rewriting.rewrite(self.frame, packet, to)
        return self.out

    def rejected(self, packet: Packet) -> Outcome:
        # Nobody answers a fragment in which there is no header to answer to (RFC 1122, 3.2.2).
        if packet.fragment == parsing.LATER:
            return self.dropped()
        if packet.proto == parsing.TCP:
            self.out.bytes = rewriting.reset(self.frame, packet)
        else:
            sender = self.node_address(self.device.ifindex, packet.ipv4)
            if sender is None:
                return self.dropped()
            self.out.bytes = rewriting.unreachable(self.frame, packet, sender)
        self.out.verdict = harness.REDIRECT
        return self.out

    # --- rows of flows ---

    def row(
        self,
        frontend: tables.Frontend,
        addr: bytes,
        sport: bytes,
        dport: bytes,
        backend: int = 0,
        state: int = 0,
    ) -> tables.Flow:
        """A new row of a flow to a frontend's service."""
        service = frontend.service.to_bytes(3, "little")
        return tables.Flow(addr, sport, dport, backend, self.now, service, int(state))

    def stored(self, key: tables.FlowKey) -> tables.Flow | None:
        """The row of a key, dead or alive."""
        return self.flows.get(key) or self.flows_new.get(key)

    def find(self, key: tables.FlowKey) -> tables.Flow | None:
        row = self.stored(key)
        if row is None or (self.now - row.seen) % 2**32 > self.rows.timeout(key.proto, row.state):
            return None
        return row

    def write(self, table: str, key: tables.FlowKey, row: tables.Flow | None) -> None:
        self.out.writes.append((table, key, row))
        (self.flows if table == "flows" else self.flows_new)[key] = row

    def put(self, key: tables.FlowKey, row: tables.Flow) -> None:
        """Keep a row of a flow that is not assured."""
        has = self.flows.get(key)
        flooded = self.rows.unassured + self.out.unassured >= self.rows.most_flows // 2
        rows = sum(1 for one in self.flows.values() if one)
        if has or (not flooded and rows < self.rows.most_flows):
            if not has or has.state & State.ASSURED:
                self.out.unassured += 1
            self.write("flows", key, row)
            if self.flows_new.get(key):
                self.write("flows_new", key, None)
        else:
            self.out.counters["FLOWS_FULL"] += 1
            self.write("flows_new", key, row)

    def forget(self, key: tables.FlowKey) -> None:
        """Take a row away, if there is one."""
        has = self.flows.get(key)
        if has:
            if not has.state & State.ASSURED:
                self.out.unassured -= 1
            self.write("flows", key, None)
        if self.flows_new.get(key):
            self.write("flows_new", key, None)

    def may_claim(self, key: tables.FlowKey, to: Ends) -> bool:
        """Whether a key is nobody else's."""
        has = self.find(key)
        return has is None or is_closed(has.state) or _ends(key, has) == to

    def track(self, key: tables.FlowKey, row: tables.Flow, flags: int, *, asks: bool = False) -> None:
        """Take note of a packet of a flow; `asks`: a SYN that comes in keeps its rows alive at least."""
        state, is_tcp = row.state, key.proto == parsing.TCP
        assured = False
        if not state & State.ORIGINAL:
            state |= State.REPLIED
        elif state & _SETTLED == State.REPLIED and (
            flags & (packets.SYN | packets.ACK) == packets.ACK if is_tcp else not is_held(state)
        ):
            state |= State.ASSURED
            assured = True
        if is_tcp and flags & packets.FIN:
            state |= State.FIN
        if is_tcp and flags & packets.RST:
            state |= State.RESET
        again = asks and is_tcp and flags & packets.SYN and state == row.state
        if state == row.state and row.seen == self.now and not again:
            return
        if again:
            self.freshen(key)
        else:
            self.settle(key, row._replace(state=int(state), seen=self.now), assured)
        other_key = partner(key, row)
        other = self.stored(other_key)
        if other is None or partner(other_key, other) != key:
            return
        if again:
            self.freshen(other_key)
            return
        mirrored = other.state & (State.ORIGINAL | State.HELD) | state & (_SETTLED | State.RESET)
        if state & State.FIN:
            mirrored |= State.PEER_FIN
        if state & State.PEER_FIN:
            mirrored |= State.FIN
        self.settle(other_key, other._replace(state=int(mirrored), seen=self.now), assured)

    def freshen(self, key: tables.FlowKey) -> None:
        """Keep a row alive, where it is."""
        rows, table = (self.flows, "flows") if self.flows.get(key) else (self.flows_new, "flows_new")
        self.write(table, key, rows[key]._replace(seen=self.now))

    def settle(self, key: tables.FlowKey, row: tables.Flow, assured: bool) -> None:
        """Write a row where it is; one whose client has answered moves to `flows`, if there is room."""
        room = sum(1 for one in self.flows.values() if one) < self.rows.most_flows
        if self.flows.get(key):
            if assured:
                self.out.unassured -= 1
            self.write("flows", key, row)
        elif row.state & State.ASSURED and room:
            self.write("flows", key, row)
            self.write("flows_new", key, None)
        else:
            self.write("flows_new", key, row)

    # --- fragments and errors ---

    def fragment_ports(self, packet: Packet) -> bytes | None:
        key = packet.src + packet.dst + packet.ident + bytes([packet.proto, 0, 0, 0])
        if packet.fragment == parsing.FIRST:
            ports = packet.sport + packet.dport
            self.out.writes.append(("fragments", key, ports))
            return ports
        return self.rows.fragments.get(key)

    def error(self, packet: Packet) -> Outcome:
        """An ICMP error quotes what its receiver has sent; so its row is that of the answer."""
        quoted = parsing.parse_quoted(self.frame, packet)
        if quoted is None:
            return self.out
        # It is for whoever has sent what it quotes.
        if packet.dst != quoted.src:
            return self.out
        stage = EGRESS if self.place.egress else INGRESS
        answer = tables.FlowKey(quoted.dst, quoted.src, quoted.dport, quoted.sport, quoted.proto, stage)
        row = self.find(answer)
        if row is None:
            return self.error_of_nobody(packet, quoted, answer)
        if is_held(row.state):
            return self.out
        if packet.ipv4 and self.frame[packet.l4] == _REDIRECT:
            return self.dropped()
        if row.state & State.TUNNEL:
            return self.tunnelled(packet, row.addr, row.dport)
        to = _ends(answer, row)
        src, dst = packet.src, packet.dst
        if stage == INGRESS:
            dst = to.dst
        elif src == answer.src:
            src = to.src
        inner = Ends(to.dst, to.src, to.dport, to.sport)
        self.out.bytes = rewriting.rewrite_error(self.frame, packet, quoted, src, dst, inner)
        return self.out

    def error_of_nobody(self, packet: Packet, quoted: Packet, answer: tables.FlowKey) -> Outcome:
        """Where a service's backends answer clients themselves, their nodes have the rows."""
        asked = quoted._replace(src=answer.src, dst=answer.dst, sport=answer.sport, dport=answer.dport)
        frontend = self.frontend(asked)
        if answer.stage == EGRESS or self.from_tunnel or frontend is None:
            return self.out
        if not frontend.flags & Flag.DSR or not frontend.slot_count:
            return self.out
        to = self.rows.backends[self.by_hash(asked, frontend)]
        return self.out if self.is_here(to) else self.tunnelled(packet, to.addr, to.port)

    # --- tunnels ---

    def is_here(self, backend: tables.Backend) -> bool:
        """Whether a backend is of this node."""
        return bool(backend.sets & tables.BackendSet.LOCAL) or backend.addr in self.rows.node_addresses

    def by_hash(self, packet: Packet, frontend: tables.Frontend) -> int:
        """The backend that every node finds for this packet."""
        slots = self.rows.slots[frontend.block][: frontend.slot_count]
        return slots[flow_hash(packet) * frontend.slot_count >> 32]

    def tunnelled(self, packet: Packet, dst: bytes, port: bytes) -> Outcome:
        """Send a packet on as it is, inside another one."""
        device, _ = self.rows.route(packet.src, dst)
        outer = 20 if packet.ipv4 else 40
        if device and packet.end - packet.l3 + outer > _MTU:
            self.counted("TOO_BIG")
            sender = self.node_address(self.device.ifindex, packet.ipv4)
            if packet.error or packet.fragment == parsing.LATER or sender is None:
                return self.dropped()
            self.out.bytes = rewriting.too_big(self.frame, packet, sender, _MTU - outer)
        else:
            own = self.node_address(device, packet.ipv4) if device else None
            if own is None:
                return self.dropped("NO_ROUTE")
            self.out.bytes = rewriting.encapsulate(self.frame, packet, own, dst, port)
        self.out.verdict = harness.REDIRECT
        return self.out

    def untunnelled(self, outer: Packet) -> Outcome:
        """Take out what another node has sent for a backend of this one."""
        inner = parsing.parse_inner(self.frame, outer)
        l3 = outer.l3
        port = self.frame[l3 + 4 : l3 + 6] if outer.ipv4 else self.frame[l3 + 2 : l3 + 4]
        device, _ = self.rows.route(outer.src, outer.dst)
        ends_here = device != self.device.ifindex if device else outer.dst in self.rows.node_addresses
        if inner is None or not ends_here:
            return self.out
        if inner.error:
            quoted = parsing.parse_quoted(self.frame, inner)
            if quoted is None:
                return self.out
            asked = quoted._replace(src=quoted.dst, dst=quoted.src, sport=quoted.dport, dport=quoted.sport)
        else:
            asked = inner
            if inner.fragment:
                ports = self.fragment_ports(inner)
                if ports is None:
                    return self.counted("FRAGMENT_LOST")
                asked = inner._replace(sport=ports[:2], dport=ports[2:])
        frontend = self.frontend_anywhere(asked)
        if frontend is None or not frontend.flags & Flag.DSR:
            return self.out
        denied = frontend.flags & Flag.SOURCE_RANGES and not self.is_allowed(frontend.service, asked.src)
        if denied or not _may_send(asked.src):
            return self.dropped("SOURCE_DENIED")
        self.frame = self.frame[: packets.ETHERNET] + self.frame[inner.l3 :]
        self.out.bytes = Bytes(self.frame)
        self.from_tunnel = True
        packet = parsing.parse(self.frame)
        if packet is None:
            return self.dropped()
        if packet.error:
            return self.error(packet)
        packet = packet._replace(sport=asked.sport, dport=asked.dport)
        return self.taken_out(packet, frontend, outer.dst, port)

    def taken_out(self, packet: Packet, frontend: tables.Frontend, dst: bytes, port: bytes) -> Outcome:
        """A packet for a backend that another node has chosen."""
        key = _key(packet, INGRESS)
        row = self.find(key)
        if row and row.addr == dst and _is_of_tunnel(packet, row, port):
            self.track(key, row, packet.flags, asks=True)
            return self.translated(packet, _ends(key, row))
        number = self.rows.tunnel_ends.get(tables.TunnelEndKey(frontend.service, dst, port, packet.proto))
        if number is None:
            return self.dropped("BAD_TUNNEL")
        to = tables.Backend(dst, port, packet.proto, 0, 0, 0, 0, 0)
        sport = self.reply_row(packet, frontend, to)
        if sport is None:
            return self.dropped("FLOW_FAILED")
        counted = number | outcomes.ELSEWHERE if packet.proto == parsing.TCP else 0
        row = self.row(frontend, dst, sport, port, counted, State.ORIGINAL)
        self.put(key, row)
        return self.translated(packet, _ends(key, row))

    def frontend_anywhere(self, packet: Packet) -> tables.Frontend | None:
        """The frontend that was dialled, maybe as a NodePort of another node."""
        key = tables.FrontendKey(packet.dst, packet.dport, packet.proto, tables.SCOPE_ADDRESS)
        zero = _FIRST_OF_MAPPED + bytes(4) if packet.ipv4 else bytes(16)
        any_node = key._replace(addr=zero, scope=tables.SCOPE_NODE_PORT)
        return self.rows.frontends.get(key.pack()) or self.rows.frontends.get(any_node.pack())

    def dsr(self, packet: Packet, frontend: tables.Frontend, key: tables.FlowKey) -> Outcome | None:
        """A flow whose backend is another node's; None where it is this one's."""
        number = self.by_hash(packet, frontend)
        to = self.rows.backends[number]
        if self.is_here(to):
            return None
        if packet.proto == parsing.TCP and packet.begins():
            self.out.connections.append((frontend.service, number))
        # What pods send is looked at once a connection.
        if not self.place.outside:
            self.put(key, self.dsr_row(packet, frontend, number))
        return self.tunnelled(packet, to.addr, to.port)

    def dsr_row(self, packet: Packet, frontend: tables.Frontend, number: int) -> tables.Flow:
        to = self.rows.backends[number]
        state = State.ORIGINAL | State.REPLIED | State.TUNNEL
        return self.row(frontend, to.addr, packet.sport, to.port, number, state)

    # --- services ---

    def frontend(self, packet: Packet, scope: int = 0) -> tables.Frontend | None:
        """The frontend that a packet is addressed to."""
        key = tables.FrontendKey(packet.dst, packet.dport, packet.proto, tables.SCOPE_ADDRESS | scope)
        # An address's own row wins over a NodePort.
        plain = self.rows.frontends.get(key._replace(scope=tables.SCOPE_ADDRESS).pack())
        if plain is not None:
            return self.rows.frontends.get(key.pack())
        if not self.rows.node_addresses.get(packet.dst):
            return None
        zero = _FIRST_OF_MAPPED + bytes(4) if packet.ipv4 else bytes(16)
        return self.rows.frontends.get(key._replace(addr=zero, scope=tables.SCOPE_NODE_PORT | scope).pack())

    def is_pod(self, packet: Packet) -> bool:
        known = self.rows.settings
        if known.flags & Setting.PODS_BY_DEVICE:
            device = self.rows.devices.get(self.device.ifindex)
            return bool(device and device.flags & tables.DeviceFlag.PODS)
        if packet.ipv4:
            bit, addr, mask = Setting.PODS_BY_IPV4, known.pods4_addr, known.pods4_mask
        else:
            bit, addr, mask = Setting.PODS_BY_IPV6, known.pods6_addr, known.pods6_mask
        return bool(known.flags & bit) and _and(packet.src, mask) == addr

    def is_allowed(self, service: int, src: bytes) -> bool:
        return any(
            int.from_bytes(src, "big") >> 128 - bits == int.from_bytes(base, "big") >> 128 - bits
            for bits, base in self.rows.source_ranges.get(service, ())
        )

    def serving(self, row: tables.Flow) -> bool:
        """Whether the backend of a row is still its service's."""
        backend = self.rows.backends.get(row.backend)
        return (
            backend is not None
            and backend.service == int.from_bytes(row.service, "little")
            and backend.state in _SERVING
            and (backend.addr, backend.port) == (row.addr, row.dport)
        )

    def still_holds(self, packet: Packet, row: tables.Flow) -> bool:
        if packet.proto == parsing.TCP:
            if not packet.begins():
                return True
            return not is_closed(row.state) and (
                bool(row.state & State.TUNNEL) or self.is_answered(packet, row)
            )
        if packet.proto != parsing.UDP or not row.backend or self.serving(row):
            return True
        frontend = self.frontend(packet)
        return frontend is None or not frontend.slot_count

    def is_answered(self, packet: Packet, row: tables.Flow) -> bool:
        """Whether the answers to what follows this row are understood."""
        key = _key(packet, INGRESS)
        other_key = partner(key, row)
        other = self.stored(other_key)
        return other is not None and partner(other_key, other) == key

    def must_not_leave(self, packet: Packet) -> bool:
        key = tables.FrontendKey(packet.dst, packet.dport, packet.proto, tables.SCOPE_ADDRESS)
        frontend = self.rows.frontends.get(key.pack())
        if frontend is None or not packet.begins():
            return False
        if not frontend.slot_count and frontend.flags & Flag.DROP:
            return True
        denied = not self.is_allowed(frontend.service, packet.src)
        return bool(frontend.flags & Flag.SOURCE_RANGES) and denied

    # --- new flows ---

    def opened(self, packet: Packet, key: tables.FlowKey) -> Outcome:
        frontend = self.frontend(packet)
        if frontend is None or packet.flags & packets.RST:
            return self.out
        if packet.src in self.rows.node_addresses or not _may_send(packet.src):
            return self.out
        pod = self.is_pod(packet)
        outside = not pod and bool(frontend.flags & Flag.EXTERNAL_LOCAL)
        if outside:
            frontend = self.frontend(packet, tables.SCOPE_OUTSIDE)
            if frontend is None:
                return self.dropped("DROPPED")
        if not frontend.slot_count and not frontend.flags & Flag.DROP:
            self.out.refusals.append(frontend.service)
            self.out.counters["REFUSED"] += 1
            return self.rejected(packet)
        if frontend.flags & Flag.SOURCE_RANGES and not self.is_allowed(frontend.service, packet.src):
            return self.dropped("SOURCE_DENIED")
        if not frontend.slot_count:
            return self.dropped("DROPPED")
        if not packet.begins() and not frontend.flags & Flag.DSR:
            return self.rejected(packet)
        if frontend.flags & Flag.DSR and not frontend.affinity_s:
            gone = self.dsr(packet, frontend, key)
            if gone is not None:
                return gone
            if not packet.begins():
                return self.rejected(packet)
        number = self.chosen(packet, frontend)
        to = self.rows.backends[number]
        if frontend.flags & Flag.DSR and not self.is_here(to):
            self.put(key, self.dsr_row(packet, frontend, number))
            return self.tunnelled(packet, to.addr, to.port)

        sport = self.reply_row(packet, frontend, to)
        if sport is None:
            return self.dropped("FLOW_FAILED")
        masquerade = self.wants_masquerade(packet, frontend, to, pod, outside)
        if masquerade or not self.place.outside:
            device, _ = self.rows.route(packet.src, to.addr)
            # On a device that both share, the backend would answer the client past us.
            if masquerade or device == self.device.ifindex:
                failure = self.masqueraded(packet, frontend, to, sport, device)
                if failure:
                    return self.dropped(failure)
                masquerade = True
        if not masquerade:
            # What an earlier flow of this client's port has left would masquerade this one.
            self.forget(tables.FlowKey(packet.src, to.addr, sport, to.port, packet.proto, EGRESS))
        state = State.ORIGINAL | (State.MASQUERADED if masquerade else 0)
        row = self.row(frontend, to.addr, sport, to.port, number, state)
        self.put(key, row)
        return self.translated(packet, _ends(key, row))

    def chosen(self, packet: Packet, frontend: tables.Frontend) -> int:
        """The backend that was drawn, which has to be one of those that might be."""
        remembered = None
        client = packet.src, frontend.service
        if frontend.affinity_s:
            has = self.rows.affinity.get(client)
            if has and self.now_s - has[1] < frontend.affinity_s:
                backend = self.rows.backends.get(has[0])
                if backend and backend.service == frontend.service and backend.sets & frontend.sets:
                    remembered = has[0]
        number = self.drawn.backend()
        if remembered is not None:
            allowed = [remembered]
        elif frontend.flags & Flag.MAGLEV:
            allowed = [self.by_hash(packet, frontend)]
        else:
            allowed = self.rows.slots[frontend.block][: frontend.slot_count]
        if number not in allowed:
            raise UnexplainedError(f"backend {number} was drawn, allowed are {sorted(set(allowed))}")
        if frontend.affinity_s:
            self.out.writes.append(("affinity", client, (number, self.now_s)))
        self.out.connections.append((frontend.service, number))
        return number

    def is_port(self, port: bytes) -> bool:
        first, count = self.rows.settings.ports_first, self.rows.settings.ports_count
        return first <= int.from_bytes(port, "big") < first + max(count, 1)

    def reply_row(self, packet: Packet, frontend: tables.Frontend, to: tables.Backend) -> bytes | None:
        """Keep the row for answers; return the port that the backend sees. None where none is free."""
        ends = Ends(packet.dst, packet.src, packet.dport, packet.sport)
        key = tables.FlowKey(to.addr, packet.src, to.port, packet.sport, packet.proto, EGRESS)
        row = self.row(frontend, packet.dst, packet.dport, packet.sport)
        # From itself to itself, both directions would look the same.
        same = packet.src == to.addr and packet.sport == to.port
        if same or not self.may_claim(key, ends):
            port = None if self.drawn.failed("FLOW_FAILED") else self.drawn.client_port(packet, key, row)
            if port is None:
                return None
            key = key._replace(dport=port)
            if not self.is_port(port) or not self.may_claim(key, ends):
                raise UnexplainedError(f"the client's port became {int.from_bytes(port, 'big')}")
        self.put(key, row)
        return key.dport

    def wants_masquerade(
        self, packet: Packet, frontend: tables.Frontend, to: tables.Backend, pod: bool, outside: bool
    ) -> bool:
        flags = self.rows.settings.flags
        if packet.src == to.addr:  # the answer would not come back here
            return True
        if to.addr in self.rows.node_addresses:
            return False
        if flags & Setting.KEEP_CLIENT and to.sets & tables.BackendSet.LOCAL:
            return False
        if frontend.flags & Flag.DSR:
            return False
        if frontend.kind == tables.FrontendKind.CLUSTER_IP:
            by_address = Setting.PODS_BY_IPV4 if packet.ipv4 else Setting.PODS_BY_IPV6
            told = flags & (Setting.PODS_BY_DEVICE | by_address)
            return bool(flags & Setting.MASQUERADE_ALL) or (bool(told) and not pod)
        return not outside and not (pod and frontend.flags & Flag.EXTERNAL_LOCAL)

    def node_address(self, ifindex: int, ipv4: bool) -> bytes | None:
        """The address of this node that those behind a device know."""
        device = self.rows.devices.get(ifindex)
        known = self.rows.settings
        found = (device.addr4 if ipv4 else device.addr6) if device else tables.NO_ADDRESS
        if found == tables.NO_ADDRESS:
            found = known.node4_addr if ipv4 else known.node6_addr
        return None if found == tables.NO_ADDRESS else found

    def masqueraded(
        self, packet: Packet, frontend: tables.Frontend, to: tables.Backend, sport: bytes, device: int
    ) -> str:
        """Keep the rows between this node and the backend; why that can not be, if so."""
        own = self.node_address(device, packet.ipv4) if device else None
        if own is None:
            return "NO_ROUTE"
        there = tables.FlowKey(packet.src, to.addr, sport, to.port, packet.proto, EGRESS)
        ends = Ends(to.addr, packet.src, to.port, sport)
        back = tables.FlowKey(to.addr, own, to.port, bytes(2), packet.proto, INGRESS)
        made = self.drawn.flow(there)
        if made is None or self.drawn.failed("PORTS_EXHAUSTED"):
            if all(self.may_use(back, port, ends) for port in self.ports()):
                raise UnexplainedError("no port was found to masquerade with, though all are free")
            return "PORTS_EXHAUSTED"
        back = back._replace(dport=made.sport)
        if not self.is_port(made.sport) or not self.may_use(back, made.sport, ends):
            raise UnexplainedError(f"masqueraded with port {int.from_bytes(made.sport, 'big')}")
        if self.stored(back) and self.a_round_tries_all_ports():
            rows = [self.stored(back._replace(dport=port)) for port in self.ports()]
            if not all(rows):
                raise UnexplainedError("masqueraded as a flow that is over, though a port has no row")
        self.put(back, self.row(frontend, packet.src, to.port, sport))
        self.put(there, self.row(frontend, own, made.sport, to.port, state=State.ORIGINAL))
        return ""

    def ports(self) -> typing.Iterator[bytes]:
        first, count = self.rows.settings.ports_first, self.rows.settings.ports_count
        return (port.to_bytes(2, "big") for port in range(first, first + max(count, 1)))

    def a_round_tries_all_ports(self) -> bool:
        """Whether that is sure: its steps are odd, and only a socket's port ends it early."""
        return self.rows.settings.ports_count in (0, 1, 2, 4, 8, 16) and not self.rows.used_ports

    def may_use(self, back: tables.FlowKey, port: bytes, ends: Ends) -> bool:
        """Whether a port to masquerade with is neither another flow's nor a socket's."""
        used = (back.proto, port) in self.rows.used_ports
        return not used and self.may_claim(back._replace(dport=port), ends)


def _key(packet: Packet, stage: int) -> tables.FlowKey:
    return tables.FlowKey(packet.src, packet.dst, packet.sport, packet.dport, packet.proto, stage)


def flow_hash(packet: Packet) -> int:
    """What all nodes draw from Maglev tables with: 32 bits of addresses, ports and protocol."""
    src, dst = _words(packet.src), _words(packet.dst)
    value = src[0] * 0x9E3779B97F4A7C15 ^ src[1] * 0xC2B2AE3D27D4EB4F ^ (dst[0] ^ dst[1]) * 0x165667B19E3779F9
    ports = int.from_bytes(packet.sport, "little") << 32 | int.from_bytes(packet.dport, "little") << 16
    value = (value ^ ports ^ packet.proto) & _WORD
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value ^= value >> 33
        value = value * factor & _WORD
    return (value ^ value >> 33) & 0xFFFFFFFF


def _words(address: bytes) -> tuple[int, int]:
    a, b, c, d = (int.from_bytes(address[at : at + 4], "little") for at in (0, 4, 8, 12))
    return a << 32 | b, c << 32 | d


def _may_send(address: bytes) -> bool:
    """Whether an address can be that of a single sender."""
    if address.startswith(_FIRST_OF_MAPPED):
        return address[12] not in (0, 127, *range(224, 256))
    return address[0] != 0xFF and address not in (bytes(16), bytes(15) + b"\x01")


def _and(address: bytes, mask: bytes) -> bytes:
    return bytes(a & b for a, b in zip(address, mask, strict=True))
