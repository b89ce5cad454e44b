"""Frames in and frames out, as tests want to say it; everything is held against the reference too."""

import random
import typing

from lbproxy.core import model, node_rows, tables
from tests import installing
from tests.packets import checking, harness, packets, reference
from tests.packets.packets import NODE, NODE6, NODE6_TO_PODS, NODE_TO_PODS, POD_CIDR, POD_CIDR6

OUTSIDE, XDP, INSIDE, LEAVING = reference.PLACES
DROP, NEXT, REDIRECT = harness.DROP, harness.NEXT, harness.REDIRECT

PORTS: typing.Final = node_rows.Ports(61000, 1000)
RULES: typing.Final = node_rows.PacketRules(pod_cidrs=(POD_CIDR, POD_CIDR6), ports=PORTS)


class Bench:
    """A node with its programs. Rows are read by the reference before the first frame, and after `look`."""

    def __init__(self, made: harness.Harness) -> None:
        self.made = made
        made.begin()
        self._checker: checking.Checker | None = None
        self.used_ports: list[tuple[int, bytes]] = []
        self.node()

    def node(self, pod_device: bool = False, **rules: typing.Any) -> None:
        self.made.node(
            RULES._replace(**rules), NODE, NODE6, NODE_TO_PODS, NODE6_TO_PODS, pod_device=pod_device
        )
        self.look()

    def service(self, *endpoints: str | model.Endpoint, **fields: typing.Any) -> None:
        """A Service on everything that a node listens to; those of 10.244.2.0/24 are another node's."""
        both = (packets.V4, packets.V6)
        values: dict[str, typing.Any] = {
            "node_port": 30080,
            "external": [side.external_ip for side in both],
            "load_balancer": [side.balancer_ip for side in both],
        }
        self.made.installer.service(
            "test/web",
            [side.cluster_ip for side in both],
            [endpoint(one) if isinstance(one, str) else one for one in endpoints],
            **{**values, **fields},
        )
        self.look()

    def look(self) -> None:
        """Have the reference read all rows anew."""
        self._checker = None

    @property
    def checker(self) -> checking.Checker:
        if self._checker is None:
            self._checker = checking.Checker(self.made, random.Random(1), self.used_ports)
        return self._checker

    def run(self, place: reference.Place, frame: bytes, device: str) -> harness.Result:
        """Run a frame through programs and reference; what comes out must have right checksums."""
        checker = self.checker
        outcome = self.made.inside(lambda: checker.check(place, frame, device))
        assert outcome is not None, "the kernel refuses this frame"
        self.made.inside(checker.check_rows)
        return harness.Result(outcome.verdict, checker.last)

    def outside(self, frame: bytes, device: str = "up0") -> harness.Result:
        """Comes in at the uplink."""
        return self.run(OUTSIDE, frame, device)

    def inside(self, frame: bytes, device: str = "pod0") -> harness.Result:
        """Comes in from a pod."""
        return self.run(INSIDE, frame, device)

    def leaves(self, frame: bytes, device: str = "up0") -> harness.Result:
        return self.run(LEAVING, frame, device)

    def flows(self) -> dict[tables.FlowKey, tables.Flow]:
        return self.made.flows()

    def age(self, ticks: int) -> None:
        """Have all flows been idle for so long."""
        for table in ("flows", "flows_new"):
            for key, row in self.made.flows(table).items():
                # Ticks wrap around, as they do here on a machine that was started less than that ago.
                seen = (harness.tick() - ticks) % 2**32
                self.made.put_flow(key, row._replace(seen=seen), table)
        self.look()


def endpoint(ip: str, **fields: typing.Any) -> model.Endpoint:
    """A ready endpoint, on another node if its address is that node's."""
    far = ip in (packets.POD_B, packets.POD_B6)
    return installing.endpoint(ip, "node-2" if far else installing.NODE, **fields)


def ports(result: harness.Result) -> tuple[int, int]:
    """The ports of a packet without options."""
    at = 34 if result.frame[12] == 8 else 54
    return int.from_bytes(result.frame[at : at + 2], "big"), int.from_bytes(
        result.frame[at + 2 : at + 4], "big"
    )
