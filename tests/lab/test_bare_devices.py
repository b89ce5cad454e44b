"""Backends behind a device without Ethernet headers, as a CNI's IPIP or WireGuard tunnel is."""

import collections.abc
import fcntl
import os
import select
import socket
import struct
import threading
import typing

import pytest

from lbproxy.kernel import namespaces
from lbproxy.lab import cluster, netns
from tests import polling
from tests.lab import agents, manifests

TUNSETIFF = 0x400454CA
TUN_WITHOUT_INFO = 0x1001
NODE_PORT = 30090
BACKEND = {4: "10.244.9.9", 6: "fd00:244:9::9"}
DEVICE = {4: ("10.77.0.1/24", "10.244.9.0/24"), 6: ("fd00:77::1/64", "fd00:244:9::/64")}
SYN, ACK, RST = 0x02, 0x10, 0x04
PODS = ("n2/p1",)
families = pytest.mark.parametrize("family", [4, 6])


class Tun:
    """The far end of a tunnel: reads packets as they leave the node, and answers connections."""

    def __init__(self, lab: cluster.Lab) -> None:
        self.fd = namespaces.inside(netns.path(lab.netns("n1").name), self._open)
        self.seen: list[tuple[str, int]] = []  # whom SYNs came from
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="tun")
        lines = ["link set tun9 up"]
        for address, route in DEVICE.values():
            lines += [f"address add {address} dev tun9", f"route add {route} dev tun9"]
        for line in lines:
            lab.check_output("n1", ["ip", *(["-6"] if "::" in line else []), *line.split()])
        self._thread.start()

    def _open(self) -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH", b"tun9", TUN_WITHOUT_INFO))
        return fd

    def _serve(self) -> None:
        while not self._stopped.is_set():
            if select.select([self.fd], [], [], 0.1)[0]:
                answer = self._answer(os.read(self.fd, 2000))
                if answer:
                    os.write(self.fd, answer)

    def _answer(self, packet: bytes) -> bytes:
        """Refuse every connection, as a host without a server does."""
        ipv4 = packet[0] >> 4 == 4
        header = 20 if ipv4 else 40
        size, at = (4, 12) if ipv4 else (16, 8)
        if packet[9 if ipv4 else 6] != socket.IPPROTO_TCP or not packet[header + 13] & SYN:
            return b""
        src, dst = packet[at : at + size], packet[at + size : at + 2 * size]
        sport, dport, sequence = struct.unpack_from("!HHI", packet, header)
        self.seen.append((socket.inet_ntop(socket.AF_INET if ipv4 else socket.AF_INET6, src), sport))
        rst = struct.pack("!HHIIBBHHH", dport, sport, 0, sequence + 1, 0x50, RST | ACK, 0, 0, 0)
        pseudo = dst + src + struct.pack("!II", len(rst), socket.IPPROTO_TCP)
        rst = rst[:16] + _checksum(pseudo + rst) + rst[18:]
        if not ipv4:
            return bytes(struct.pack("!IHBB", 6 << 28, len(rst), socket.IPPROTO_TCP, 64) + dst + src + rst)
        head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 0, 0, 64, socket.IPPROTO_TCP, 0, dst, src)
        return bytes(head[:10] + _checksum(head) + head[12:] + rst)

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        os.close(self.fd)


def _checksum(data: bytes) -> bytes:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF).to_bytes(2, "big")


@pytest.fixture(scope="module")
def tun(lab: cluster.Lab) -> collections.abc.Iterator[Tun]:
    made = Tun(lab)
    yield made
    made.close()


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    slices: list[dict[str, typing.Any]] = manifests.slices("far", [lab["n2/p1"]])
    for one in slices:
        one["endpoints"][0]["addresses"] = [BACKEND[6 if one["addressType"] == "IPv6" else 4]]
    service = manifests.service("far", 90, ports=[manifests.HTTP.on_node_port(NODE_PORT)], type="NodePort")
    node = manifests.node("n1", *lab["n1"].addresses)
    with agents.Api(lab.netns("n1"), node, service, *slices) as running:
        yield running


@families
def test_a_flow_through_a_tunnels_device_is_translated_both_ways(
    lab: cluster.Lab, tun: Tun, agent: agents.Agent, family: int
) -> None:
    agent.has_backends("far", {BACKEND[family]}, [("http", family)])
    polling.eventually(lambda: "tun9" in agent.lbproxy("status"), what="the device is attached")
    tun.seen.clear()
    answer = agent.at("outside").tcp(lab["n1"].address(family), NODE_PORT)
    # The refusal is the backend's, and the client takes it for the service's.
    assert answer.error == "ECONNREFUSED"
    assert {address for address, _ in tun.seen} == {DEVICE[family][0].partition("/")[0]}
    assert agent.counter("refused") == 0
