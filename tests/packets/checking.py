"""Frames through the programs and through the reference: whether both say the same.

Before each frame the programs' scratch rows are filled with noise: nothing may depend
on what another run, or another version of the programs, has left there.
"""

import collections.abc
import os
import random
import struct
import time
import typing

from lbproxy import abi
from lbproxy.core import addresses, model, tables
from lbproxy.kernel import map_rows
from tests.packets import harness, packets, parsing
from tests.packets.reference import Device, Outcome, Place, Reference, UnexplainedError

COUNTERS: typing.Final = {
    name.removeprefix("LB_COUNTER_"): number
    for name, number in abi.CONSTANTS.items()
    if name.startswith("LB_COUNTER_")
}
_AFFINITY_KEY: typing.Final = abi.LAYOUTS["affinity_key"]
_AFFINITY: typing.Final = abi.LAYOUTS["affinity"]
_FLOW: typing.Final = abi.LAYOUTS["flow"]
_SERVICE_WORDS: typing.Final = abi.LAYOUTS["service_stats"].size // 8
_SCRATCH_BYTES: typing.Final = abi.LAYOUTS["scratch"].size * (os.cpu_count() or 1)
_IDS: typing.Final = struct.Struct(f"={tables.SLOTS_PER_BLOCK}I")
_LOOPBACK: typing.Final = bytes(15) + b"\x01"
_CLOCK_MONOTONIC_COARSE: typing.Final = 6
_WATCHED: typing.Final = ("counters", "backend_stats", "service_stats", "unassured")

UsedPorts = collections.abc.Collection[tuple[int, bytes]]


class MismatchError(AssertionError):
    """The programs and the reference disagree; the message tells on what, and shows the frame."""


class _Seen:
    """What the programs did with a frame, and drew for it."""

    def __init__(self, checker: "Checker", result: harness.Result, before: dict[str, bytes]) -> None:
        self.checker = checker
        self.result = result
        moved = {name: _moved(before[name], checker.column(name)) for name in _WATCHED}
        self.counters, self.backends = moved["counters"], moved["backend_stats"]
        self.services, self.unassured = moved["service_stats"], moved["unassured"].get(0, 0)

    def backend(self) -> int:
        return next(iter(self.backends), 0)

    def failed(self, reason: str) -> bool:
        return COUNTERS[reason] in self.counters

    def flow(self, key: tables.FlowKey) -> tables.Flow | None:
        return self.checker.flow("flows", key) or self.checker.flow("flows_new", key)

    def client_port(self, packet: parsing.Packet, key: tables.FlowKey, row: tables.Flow) -> bytes | None:
        if self.result.verdict == harness.NEXT and packet.fragment != parsing.LATER:
            return self.result.frame[packet.l4 : packet.l4 + 2]
        known = self.checker.reference
        again = None
        for table, before in (("flows", known.flows), ("flows_new", known.flows_new)):
            for found, has in self.checker.harness.flows(table).items():
                if found._replace(dport=key.dport) == key and has == row:
                    if before.get(found) != has:
                        return found.dport
                    again = found.dport
        return again


def _moved(was: bytes, now: bytes) -> dict[int, int]:
    """How much each 64-bit word has grown, of those that have."""
    if now == was:
        return {}
    count = len(now) // 8
    pairs = zip(struct.unpack(f"{count}q", now), struct.unpack(f"{count}q", was), strict=True)
    return {number: a - b for number, (a, b) in enumerate(pairs) if a != b}


class Checker:
    """A harness, and a reference with the same rows. Calls are to be made inside the harness's namespace."""

    def __init__(self, made: harness.Harness, lot: random.Random, used_ports: UsedPorts = ()) -> None:
        self.harness = made
        self._lot = lot
        self.devices = {
            "up0": Device(made.ifindex["up0"], packets.mac(packets.MAC_UP)),
            "pod0": Device(made.ifindex["pod0"], packets.mac(packets.MAC_POD_DEVICE)),
        }
        self.reference = self._loaded(used_ports)
        self.last = b""  # what the programs made of the last frame

    # --- rows ---

    def column(self, name: str) -> bytes:
        return bytes(self.harness.columns[name].words)

    def flow(self, table: str, key: tables.FlowKey) -> tables.Flow | None:
        row = map_rows.lookup(self.harness.fds[table], key.pack(), _FLOW.size)
        return None if row is None else harness.flow_of(key, row)

    def _loaded(self, used_ports: UsedPorts) -> Reference:
        rows = self.harness.maps.rows
        settings = self.harness.maps.row("settings", tables.row_key(0))
        assert settings is not None
        made = Reference(tables.settings(settings), self.harness.sizes["flows"], self.route, used_ports)
        made.frontends = {key: tables.frontend(row) for key, row in rows("frontends")}
        for one in made.frontends.values():
            made.slots[one.block] = self._slots(one)
        self.load_backends(made)
        made.node_addresses = {key: bool(row[0] & 1) for key, row in rows("node_addresses")}
        made.devices = {_number(key): tables.device(row) for key, row in rows("devices")}
        made.tunnel_ends = {tables.tunnel_end_key(key): _number(row) for key, row in rows("tunnel_ends")}
        for key, _ in rows("source_ranges"):
            bits, service = _number(key[:4]) - 32, int.from_bytes(key[4:8], "big")
            made.source_ranges.setdefault(service, []).append((bits, key[8:]))
        made.flows, made.flows_new = self.harness.flows("flows"), self.harness.flows("flows_new")
        made.fragments, made.affinity = dict(rows("fragments")), self._affinity()
        made.unassured = self.harness.unassured[0]
        return made

    def load_backends(self, into: Reference) -> None:
        found = self.harness.maps.rows("backends")
        into.backends = {_number(key): tables.backend(row) for key, row in found}

    def _slots(self, frontend: tables.Frontend) -> list[int]:
        ids: list[int] = []
        for block in range(
            frontend.block, frontend.block + -(-frontend.slot_count // tables.SLOTS_PER_BLOCK)
        ):
            ids += _IDS.unpack(self.harness.maps.row("slots", tables.row_key(block)) or b"")
        return ids

    def _affinity(self) -> dict[tuple[bytes, int], tuple[int, int]]:
        found = {}
        for key, row in self.harness.maps.rows("affinity"):
            client, service, _ = _AFFINITY_KEY.unpack(key)
            found[client, service] = _AFFINITY.unpack(row)
        return found

    def route(self, source: bytes, address: bytes) -> tuple[int, bytes]:
        """Where the namespace's routes lead: all but two networks are behind a gateway."""
        if address in _OWN or address in _ANYCAST or not _is_global(source) or not _is_global(address):
            return 0, b""
        if any(address in one for one in _ON_PODS):
            return self.devices["pod0"].ifindex, b""
        near = address not in _GATEWAYS and any(address in one for one in _ON_UPLINK)
        return self.devices["up0"].ifindex, b"" if near else packets.mac(packets.MAC_GATEWAY)

    # --- frames ---

    def check(self, place: Place, frame: bytes, device: str = "up0") -> Outcome | None:
        """Run a frame through both. None where the kernel itself refuses it; raises MismatchError."""
        made, at = self.harness, self.devices[device]
        made.columns["scratch"].words[: _SCRATCH_BYTES // 8] = memoryview(
            self._lot.randbytes(_SCRATCH_BYTES)
        ).cast("Q")
        before = {name: self.column(name) for name in _WATCHED}
        began_ns = time.clock_gettime_ns(_CLOCK_MONOTONIC_COARSE)
        try:
            result = made.run_here(place.program, frame, at.ifindex)
        except OSError:
            return None
        self.last = result.frame
        ended_ns = time.clock_gettime_ns(_CLOCK_MONOTONIC_COARSE)
        seen = _Seen(self, result, before)
        # Where the clock has moved on meanwhile, the later time changes more rows: it would be noticed.
        outcome, wrong = self._compared(place, at, frame, ended_ns, seen)
        if wrong and began_ns != ended_ns:
            outcome, wrong = self._compared(place, at, frame, began_ns, seen)
        if wrong or outcome is None:
            raise MismatchError(self._told(place, device, frame, result, outcome, wrong))
        self.reference.commit(outcome)
        return outcome

    def check_rows(self) -> None:
        """Compare all rows of the tables that programs write. Raises MismatchError."""
        known = self.reference
        compared: tuple[tuple[str, dict[typing.Any, typing.Any], dict[typing.Any, typing.Any]], ...] = (
            ("flows", known.flows, self.harness.flows("flows")),
            ("flows_new", known.flows_new, self.harness.flows("flows_new")),
            ("fragments", known.fragments, dict(self.harness.maps.rows("fragments"))),
            ("affinity", known.affinity, self._affinity()),
        )
        for name, want, have in compared:
            if want != have:
                lines = [f"{name}: rows that differ"]
                for key in set(want) | set(have):
                    if want.get(key) != have.get(key):
                        lines.append(f"{key}\n  programs:  {have.get(key)}\n  reference: {want.get(key)}")
                raise MismatchError("\n".join(lines))

    def _compared(
        self, place: Place, device: Device, frame: bytes, now_ns: int, seen: _Seen
    ) -> tuple[Outcome | None, list[str]]:
        try:
            outcome = self.reference.serve(place, device, frame, now_ns, seen)
        except UnexplainedError as error:
            return None, [f"{error}; counters: {seen.counters}, unassured: {seen.unassured}"]
        wrong = []
        if outcome.verdict != seen.result.verdict:
            wrong.append("the verdict")
        # What is dropped is nobody's any more.
        if (place.xdp or outcome.verdict != harness.DROP) and not outcome.bytes.agrees(seen.result.frame):
            wrong.append("the frame")
        if seen.counters != {COUNTERS[name]: count for name, count in outcome.counters.items()}:
            wrong.append(f"counters: {seen.counters}")
        services: dict[int, int] = {}
        for service, _ in outcome.connections:
            services[service * _SERVICE_WORDS] = 1
        for service in outcome.refusals:
            services[service * _SERVICE_WORDS + 1] = 1
        if seen.services != services or seen.backends != {number: 1 for _, number in outcome.connections}:
            wrong.append(f"statistics: services {seen.services} backends {seen.backends}")
        if seen.unassured != outcome.unassured:
            wrong.append(f"unassured: {seen.unassured}")
        return outcome, wrong + self._rows_wrong(outcome)

    def _rows_wrong(self, outcome: Outcome) -> list[str]:
        wrong = []
        for (table, key), row in {(table, key): row for table, key, row in outcome.writes}.items():
            have: typing.Any
            if table in ("flows", "flows_new"):
                have = self.flow(table, key)
            elif table == "fragments":
                have = map_rows.lookup(self.harness.fds[table], key, 4)
            else:
                packed = map_rows.lookup(self.harness.fds[table], _AFFINITY_KEY.pack(*key, 0), _AFFINITY.size)
                have = packed and _AFFINITY.unpack(packed)
            if have != row:
                wrong.append(f"{table} {key!r}\n    programs:  {have!r}\n    reference: {row!r}")
        return wrong

    def _told(
        self,
        place: Place,
        device: str,
        frame: bytes,
        result: harness.Result,
        outcome: Outcome | None,
        wrong: list[str],
    ) -> str:
        lines = [f"{place.program} at {device}: {frame.hex()}"]
        lines += [f"  differs: {one}" for one in wrong]
        lines.append(f"  programs:  verdict {result.verdict:#x}, frame {_shown(result.frame, frame)}")
        if outcome is not None:
            lines.append(
                f"  reference: verdict {outcome.verdict:#x}, frame {_shown(outcome.bytes.frame, frame)}, "
                f"counters {dict(outcome.counters)}, unassured {outcome.unassured}"
            )
            lines += [f"  reference writes {one}" for one in outcome.writes]
        return "\n".join(lines)


def _is_global(address: bytes) -> bool:
    """Whether the kernel forwards what has this address; IPv4's are not looked at."""
    return not (
        address[0] == 0xFF or (address[0] == 0xFE and address[1] & 0xC0 == 0x80) or address == _LOOPBACK
    )


def _shown(frame: bytes, sent: bytes) -> str:
    return "as it came" if frame == sent else frame.hex()


def _number(key: bytes) -> int:
    return int.from_bytes(key, tables.BYTE_ORDER)


def _network(cidr: str) -> addresses.Network:
    found = addresses.parse_cidr(cidr)
    assert found is not None
    return found


_OWN: typing.Final = frozenset(
    addresses.parse(one) for one in (packets.NODE, packets.NODE6, packets.NODE_TO_PODS, packets.NODE6_TO_PODS)
)
_GATEWAYS: typing.Final = (addresses.parse(packets.GATEWAY), addresses.parse(packets.GATEWAY6))
_ON_PODS: typing.Final = tuple(map(_network, (f"{packets.NODE_TO_PODS}/24", f"{packets.NODE6_TO_PODS}/64")))
_ON_UPLINK: typing.Final = tuple(map(_network, (f"{packets.NODE}/24", f"{packets.NODE6}/64")))
# The address of any router on a network is this one's too (RFC 4291, 2.6.1).
_ANYCAST: typing.Final = frozenset(
    one.base for one in (*_ON_PODS, *_ON_UPLINK) if one.family == model.Family.IPV6
)
