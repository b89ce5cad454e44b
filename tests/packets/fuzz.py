"""Frames by the million through the programs and the reference: `make fuzz`.

Scenes of services are drawn by lot; in each, frames are drawn that open flows, follow
or answer those that are there, or quote them in ICMP errors; many are then cut, bent or
made of nothing but noise. Now and then a flow grows old or a backend goes.
"""

import argparse
import concurrent.futures
import itertools
import multiprocessing
import random
import sys
import time
import typing

from lbproxy.core import model, node_rows, tables
from lbproxy.kernel import map_rows
from tests import installing
from tests.packets import checking, harness, packets, reference
from tests.packets.packets import (
    BALANCER_IP,
    BALANCER_IP6,
    CLIENT,
    CLIENT6,
    CLUSTER_IP,
    CLUSTER_IP6,
    EXTERNAL_IP,
    EXTERNAL_IP6,
    NODE,
    NODE6,
    NODE6_TO_PODS,
    NODE_TO_PODS,
    OTHER_CLIENT,
    OTHER_CLIENT6,
    POD_A,
    POD_A6,
    POD_B,
    POD_B6,
    ROUTER,
    ROUTER6,
)

FRAMES_OF_A_SCENE: typing.Final = 4000
_ROWS_EVERY: typing.Final = 500
_STOP: typing.Final = -1  # instead of a seed
_MOST_NEW: typing.Final = 600  # rows of LRU maps, which forget early
_PROTOCOLS: typing.Final = (model.Protocol.TCP, model.Protocol.UDP, model.Protocol.SCTP)
_FLAGS: typing.Final = (
    packets.SYN,
    packets.SYN | packets.ACK,
    packets.ACK,
    packets.ACK | packets.PSH,
    packets.FIN | packets.ACK,
    packets.RST,
    packets.RST | packets.ACK,
)
_CLIENT_PORTS: typing.Final = (40000, 40001, 40002, 61000, 8080)
_IPV4: typing.Final = (CLIENT, OTHER_CLIENT, POD_A, POD_B, NODE, NODE_TO_PODS, ROUTER)
_IPV6: typing.Final = (CLIENT6, OTHER_CLIENT6, POD_A6, POD_B6, NODE6, NODE6_TO_PODS, ROUTER6)
_SERVED_4: typing.Final = (CLUSTER_IP, EXTERNAL_IP, BALANCER_IP, NODE, NODE_TO_PODS)
_SERVED_6: typing.Final = (CLUSTER_IP6, EXTERNAL_IP6, BALANCER_IP6, NODE6, NODE6_TO_PODS)
_SERVICE_PORTS: typing.Final = (80, 81, 82, 30080, 30081, 30082)


class Drawing:
    """Frames by lot."""

    def __init__(self, lot: random.Random, checker: checking.Checker) -> None:
        self.lot = lot
        self.checker = checker

    def frame(self) -> tuple[reference.Place, str, bytes]:
        """A frame, and where it is to be seen."""
        lot = self.lot
        place = lot.choice(reference.PLACES)
        device = "up0" if place.xdp else lot.choice(("up0", "pod0"))
        kind = lot.random()
        if kind < 0.35:
            packet = self.of_a_flow(place)
        elif kind < 0.7:
            packet = self.to_a_service()
        elif kind < 0.85:
            packet = self.error(place)
        elif kind < 0.9:
            return place, device, self.noise(device)
        elif kind < 0.96:
            packet = self.in_a_tunnel()
        else:
            packet = self.any_packet()
        frame = packets.frame(
            packet,
            to=packets.MAC_UP if device == "up0" else packets.MAC_POD_DEVICE,
            padding=lot.randrange(1, 40) if lot.random() < 0.1 else 0,
        )
        return place, device, self.bent(frame) if lot.random() < 0.4 else frame

    def noise(self, device: str) -> bytes:
        lot = self.lot
        to = packets.mac(packets.MAC_UP if device == "up0" else packets.MAC_POD_DEVICE)
        kind = lot.choice((packets.IPV4, packets.IPV6, packets.VLAN, packets.ARP, lot.randrange(1 << 16)))
        body = lot.choice((b"\xff", b"\0", b"")) * lot.randrange(200) or lot.randbytes(lot.randrange(200))
        return to + packets.mac(packets.MAC_FAR) + kind.to_bytes(2, "big") + body

    def of_a_flow(self, place: reference.Place) -> bytes:
        """What a row is waiting for."""
        stage = reference.EGRESS if place.egress else reference.INGRESS
        key = self._row(stage)
        if key is None:
            return self.to_a_service()
        return self._packet(_text(key.src), _text(key.dst), _l4(self, key.proto, key.sport, key.dport))

    def to_a_service(self) -> bytes:
        lot = self.lot
        src, dst = lot.choice(((_IPV4, _SERVED_4), (_IPV6, _SERVED_6)))
        proto = lot.choice(_PROTOCOLS)
        flags = packets.SYN if lot.random() < 0.7 else lot.choice(_FLAGS)
        ports = lot.choice(_CLIENT_PORTS), lot.choice(_SERVICE_PORTS)
        return self._packet(lot.choice(src), lot.choice(dst), self.l4(proto, *ports, flags))

    def any_packet(self) -> bytes:
        """Between anybody."""
        lot = self.lot
        those = lot.choice(((*_IPV4, *_SERVED_4), (*_IPV6, *_SERVED_6)))
        ports = lot.choice((8080, 53, lot.randrange(1 << 16))), lot.choice((8080, 80, lot.randrange(1 << 16)))
        return self._packet(
            lot.choice(those), lot.choice(those), self.l4(lot.choice(_PROTOCOLS), *ports, lot.choice(_FLAGS))
        )

    def in_a_tunnel(self) -> bytes:
        """As another node sends it to a backend's."""
        lot = self.lot
        inner = self.to_a_service() if lot.random() < 0.8 else self.error(reference.PLACES[0])
        those = (ROUTER, POD_A, NODE, POD_B) if inner[0] >> 4 == 4 else (ROUTER6, POD_A6, NODE6, POD_B6)
        return packets.tunnel(those[0], lot.choice(those[1:]), lot.choice((8080, 8080, 8081, 80)), inner)

    def error(self, place: reference.Place) -> bytes:
        """An ICMP error about what somebody has sent, of a flow or not."""
        lot = self.lot
        stage = reference.EGRESS if place.egress else reference.INGRESS
        key = self._row(stage)
        if key is None or lot.random() < 0.2:
            quoted = self.any_packet()
        else:
            # The packet that the row's would answer.
            quoted = self._packet(
                _text(key.dst), _text(key.src), _l4(self, key.proto, key.dport, key.sport), plain=0.9
            )
        if quoted[0] >> 4 == 4:
            ends, others = (quoted[16:20], quoted[12:16]), _IPV4
            kind = lot.choice((3, 3, 3, 4, 5, 11, 12, 0, 8, lot.randrange(256)))
            build = packets.icmp
        else:
            ends, others = (quoted[24:40], quoted[8:24]), _IPV6
            kind = lot.choice((1, 1, 2, 3, 4, 128, 135, lot.randrange(256)))
            build = packets.icmp6
        src, dst = (packets.unpacked(one) for one in ends)
        if lot.random() < 0.4:
            src = lot.choice(others)
        if lot.random() < 0.1:
            dst = lot.choice(others)
        if lot.random() < 0.7:
            quoted = quoted[: lot.choice((28, 36, 48, 56, 64, lot.randrange(len(quoted) + 1)))]
        return self._packet(
            src, dst, build(kind, lot.randrange(6), quoted, lot.randrange(1 << 32)), plain=0.8
        )

    def l4(self, proto: int, sport: int, dport: int, flags: int) -> packets.L4:
        lot = self.lot
        payload = lot.randbytes(1460 if lot.random() < 0.01 else lot.choice((0, 0, 1, 4, 7, 8, 40)))
        if proto == packets.TCP:
            options = b"\x01" * lot.choice((0, 0, 4, 20))
            return packets.tcp(
                sport,
                dport,
                flags,
                payload,
                seq=lot.randrange(1 << 32),
                ack=lot.randrange(1 << 32),
                options=options,
            )
        if proto == packets.UDP:
            return packets.udp(sport, dport, payload, checksum=lot.random() < 0.8)
        return packets.sctp(sport, dport, payload)

    def _packet(self, src: str, dst: str, l4: packets.L4, plain: float = 0.6) -> bytes:
        """With or without options, extension headers, and cut into fragments."""
        lot = self.lot
        if lot.random() < plain:
            return packets.ip(src, dst, l4)
        ident = lot.randrange(3)
        if ":" not in dst:
            options = b"\x01" * lot.choice((0, 0, 4, 12, 40))
            place = lot.choice((0x4000, 0x4000, 0x2000, 0x2000, 0x2001, 3, 0x1FFF, lot.randrange(1 << 16)))
            return packets.ip(
                src, dst, l4, options=options, fragment=place, ident=ident, ttl=lot.choice((0, 1, 64))
            )
        extensions = []
        for _ in range(lot.choice((0, 1, 1, 1, 2, 5, 6, 7))):
            extensions.append(
                lot.choice(
                    (
                        packets.options6(packets.HOP_BY_HOP),
                        packets.options6(packets.DESTINATION, lot.choice((1, 2, 12))),
                        packets.routing6(lot.choice((0, 0, 1))),
                        packets.fragment6(0, lot.random() < 0.5, ident),
                        packets.fragment6(lot.choice((8, 16, 0xFFF8)), lot.random() < 0.5, ident),
                    )
                )
            )
        return packets.ip(src, dst, l4, extensions=extensions, ttl=lot.choice((0, 1, 64)))

    def _row(self, stage: int) -> tables.FlowKey | None:
        """The key of a row at a stage."""
        known = self.checker.reference
        rows = known.flows_new if known.flows_new and self.lot.random() < 0.3 else known.flows
        if not rows:
            return None
        # Rows of the same flow were written one after the other.
        first = self.lot.randrange(len(rows))
        return next((key for key in itertools.islice(rows, first, first + 6) if key.stage == stage), None)

    def bent(self, frame: bytes) -> bytes:
        """The frame with something wrong."""
        lot = self.lot
        bent = bytearray(frame)
        how = lot.randrange(7)
        if how == 0:  # cut off
            del bent[lot.randrange(14, len(bent)) :]
        elif how == 1:  # bits turned, in the headers most of all
            for _ in range(lot.choice((1, 1, 1, 3, 20))):
                bent[lot.randrange(12, min(len(bent), 90))] ^= 1 << lot.randrange(8)
        elif how == 2:  # a field that is extreme
            at = lot.randrange(14, min(len(bent), 90))
            bent[at : at + 2] = lot.choice((b"\0\0", b"\xff\xff", lot.randbytes(2)))
        elif how == 3:  # another length
            at = 16 if bent[12:14] == b"\x08\x00" else 18
            was = int.from_bytes(bent[at : at + 2], "big")
            length = lot.choice((0, was - 1, was - 8, was // 2, was + 1, 20, 28, 65535)) % (1 << 16)
            bent[at : at + 2] = length.to_bytes(2, "big")
        elif how == 4:  # longer
            bent += lot.choice((b"\0", b"\xff")) * lot.randrange(1, 300)
        elif how == 5 and bent[12:14] == b"\x86\xdd":  # as if it were IPv4's
            mapped = bytes(10) + b"\xff\xff"
            source, target = lot.choice(_IPV4), lot.choice(_SERVED_4)
            bent[22:54] = mapped + packets.packed(source) + mapped + packets.packed(target)
        else:  # to somebody else
            bent[: lot.choice((1, 6))] = lot.choice((b"\xff", b"\x01", b"\x02")) * lot.choice((1, 6))
        return bytes(bent)


def _l4(drawing: Drawing, proto: int, sport: bytes, dport: bytes) -> packets.L4:
    ports = int.from_bytes(sport, "big"), int.from_bytes(dport, "big")
    return drawing.l4(proto, *ports, drawing.lot.choice(_FLAGS))


def _text(address: bytes) -> str:
    return packets.unpacked(address[12:] if address.startswith(bytes(10) + b"\xff\xff") else address)


def scene(made: harness.Harness, lot: random.Random) -> checking.Checker:
    """Services, settings and a node by lot."""
    made.begin(said=lot.random() < 0.8)
    detector = lot.choice(("none", "cidr", "cidr", "ipv4", "device"))
    cidrs = {"cidr": (packets.POD_CIDR, packets.POD_CIDR6), "ipv4": (packets.POD_CIDR,)}.get(detector, ())
    timeouts = node_rows.Timeouts(*(lot.choice((5.0, 60.0)) for _ in node_rows.Timeouts._fields))
    rules = node_rows.PacketRules(
        masquerade_all=lot.random() < 0.2,
        keep_client=lot.random() < 0.2,
        pod_cidrs=cidrs,
        pods_by_device=detector == "device",
        ports=node_rows.Ports(61000, lot.choice((1, 2, 16, 1000, 1000, 1000))),
        timeouts=timeouts,
    )
    made.node(rules, NODE, NODE6, NODE_TO_PODS, NODE6_TO_PODS, pod_device=detector == "device")
    for number, protocol in enumerate(_PROTOCOLS * 2):
        _service(made, lot, number, protocol)
    return checking.Checker(made, lot)


def _service(made: harness.Harness, lot: random.Random, number: int, protocol: model.Protocol) -> None:
    second = number >= len(_PROTOCOLS)
    pods = [POD_A, POD_A6, POD_B, POD_B6, NODE, NODE6]
    backends = lot.sample(pods, lot.choice((0, 1, 2, 4, 6, 6)))
    node_of = {POD_B: "node-2", POD_B6: "node-2"}
    states: tuple[dict[str, typing.Any], ...] = (
        {},
        {},
        {},
        {"ready": False, "terminating": True},
        {"ready": False},
    )
    made.installer.service(
        f"test/s{number}",
        [CLUSTER_IP, CLUSTER_IP6],
        [installing.endpoint(ip, node_of.get(ip, installing.NODE), **lot.choice(states)) for ip in backends],
        port=81 if second else 80,
        target_port=lot.choice((8080, 80)),
        node_port=30081 if second else 30080,
        protocol=protocol,
        external=[EXTERNAL_IP, EXTERNAL_IP6],
        load_balancer=[BALANCER_IP, BALANCER_IP6],
        affinity_s=lot.choice((0, 0, 1, 10800)),
        internal_local=lot.random() < 0.2,
        external_local=lot.random() < 0.4,
        algorithm=lot.choice((model.Algorithm.RANDOM, model.Algorithm.RANDOM, model.Algorithm.MAGLEV)),
        mode=lot.choice((model.PacketMode.SNAT, model.PacketMode.SNAT, model.PacketMode.DSR)),
        source_ranges=lot.choice(((), (), ("198.51.100.0/24",), ("2001:db8:51::/48", "203.0.113.9/32"))),
    )


def disturb(checker: checking.Checker, lot: random.Random) -> None:
    """Something happens that is no packet."""
    known, made = checker.reference, checker.harness
    what = lot.randrange(8)
    if what == 0 and known.backends:  # a backend goes, or comes back
        number = lot.choice(list(known.backends))
        backend = known.backends[number]._replace(state=lot.choice(list(tables.BackendState)[1:]))
        known.backends[number] = backend
        made.maps.apply([tables.Put(tables.Table.BACKENDS, tables.row_key(number), backend.pack())])
    elif what in (1, 2, 3):  # rows grow old
        for _ in range(8):
            table = "flows_new" if known.flows_new and lot.random() < 0.3 else "flows"
            rows = getattr(known, table)
            if rows:
                key = lot.choice(list(rows))
                limit = known.timeout(key.proto, rows[key].state)
                rows[key] = rows[key]._replace(seen=harness.tick() - limit + lot.choice((-3, -2, 1, 2)))
                made.put_flow(key, rows[key], table)
    elif what == 4:  # the agent takes away rows and counts the others
        now = harness.tick()
        for key, row in list(known.flows.items()):
            if now - row.seen > known.timeout(key.proto, row.state) or lot.random() < 0.2:
                del known.flows[key]
                map_rows.delete(made.fds["flows"], key.pack())
        known.unassured = sum(1 for row in known.flows.values() if not row.state & tables.FlowState.ASSURED)
        made.unassured[0] = known.unassured
    elif what == 5:  # a flood comes or goes, says the agent's count
        known.unassured = lot.choice((0, known.most_flows // 2))
        made.unassured[0] = known.unassured
    elif what == 6:  # the agent finds out anew between which addresses there is no row
        made.find_absent()
    elif lot.random() < 0.2:  # time passes
        time.sleep(0.3)
    if max(len(known.flows_new), len(known.fragments), len(known.affinity)) > _MOST_NEW:
        for table in ("flows_new", "fragments", "affinity"):
            made.empty(table)
            getattr(known, table).clear()


class Tally(typing.NamedTuple):
    """What a run came to."""

    frames: int
    refused: int  # by the kernel, which takes none whose IP header is cut off
    translated: int
    answered: int
    dropped: int


def run(
    made: harness.Harness,
    seed: int,
    frames: int,
    said: typing.Callable[[int], None] = lambda _: None,
    scene_frames: int = FRAMES_OF_A_SCENE,
) -> Tally:
    """Run frames through both. Raises MismatchError with the scene's seed. Call it inside the namespace."""
    counts = dict.fromkeys(Tally._fields, 0)
    for number in itertools.count():
        left = frames - counts["frames"]
        if left <= 0:
            return Tally(**counts)
        lot = random.Random(f"{seed}/{number}")
        checker = scene(made, lot)
        drawing = Drawing(lot, checker)
        try:
            for step in range(min(left, scene_frames)):
                _step(checker, drawing, counts)
                if lot.random() < 0.004:
                    disturb(checker, lot)
                if step % _ROWS_EVERY == _ROWS_EVERY - 1:
                    checker.check_rows()
            checker.check_rows()
        except checking.MismatchError as error:
            raise checking.MismatchError(f"seed {seed}, scene {number}, frame {step}: {error}") from None
        said(counts["frames"])
    raise AssertionError("unreachable")


def _step(checker: checking.Checker, drawing: Drawing, counts: dict[str, int]) -> None:
    place, device, frame = drawing.frame()
    outcome = checker.check(place, frame, device)
    counts["frames"] += 1
    if outcome is None:
        counts["refused"] += 1
    elif outcome.verdict == harness.DROP and not place.xdp:
        counts["dropped"] += 1
    elif outcome.verdict == harness.REDIRECT:
        counts["answered"] += 1
    elif outcome.bytes.frame != frame:
        counts["translated"] += 1


def _work(seed: int, frames: int, done: typing.Any) -> Tally:
    with harness.started() as made:

        def said(count: int) -> None:
            done[seed] = count
            if _STOP in done:
                raise InterruptedError("another job has found a difference")

        return made.inside(lambda: run(made, seed, frames, said))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.packets.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args(arguments)
    print(f"fuzz: {chosen.frames} frames, --seed {chosen.seed}", flush=True)
    began = time.monotonic()
    with (
        multiprocessing.Manager() as manager,
        concurrent.futures.ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("spawn")) as pool,
    ):
        done = manager.dict()
        share = -(-chosen.frames // chosen.jobs)
        works = [pool.submit(_work, chosen.seed + job, share, done) for job in range(chosen.jobs)]
        pending = set(works)
        while pending:
            finished, pending = concurrent.futures.wait(
                pending, timeout=10, return_when=concurrent.futures.FIRST_EXCEPTION
            )
            for work in finished:
                if error := work.exception():
                    print(f"fuzz: {error}", flush=True)
                    # The others end by themselves, with their namespaces.
                    done[_STOP] = 0
                    return 1
            count, took_s = sum(done.values()), time.monotonic() - began
            if pending and count:
                left_s = (chosen.frames - count) * took_s / count
                print(f"fuzz: {count} frames, about {left_s:.0f} s left", flush=True)
        tallies = [work.result() for work in works]
    total = Tally(*(sum(column) for column in zip(*tallies, strict=True)))
    parts = ", ".join(f"{name} {count}" for name, count in total._asdict().items())
    print(f"fuzz: no difference: {parts}; {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
