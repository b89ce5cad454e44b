"""A test's own sockets in the places of a lab, and what goes over its wires.

A socket belongs to the namespace in which it was made, wherever it is used: so a
test makes its own in any place, in none of the nodes' cgroups.
"""

import array
import collections
import collections.abc
import contextlib
import ctypes
import fcntl
import json
import pathlib
import random
import select
import socket
import struct
import threading
import types
import typing

from lbproxy.lab import cluster, netns
from tests import polling
from tests.packets import packets

PATIENCE_S = 15.0
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
LONGEST_SKB = 1 << 17
OUTGOING = 4  # PACKET_OUTGOING

_ALL = 0x0003  # ETH_P_ALL
_SO_RCVBUFFORCE = 33
_IP_MTU_DISCOVER, _IP_RECVERR, _IP_MTU = 10, 11, 14
_IPV6_MTU_DISCOVER, _IPV6_MTU, _IPV6_RECVERR = 23, 24, 25
_PMTUDISC_DO = 2
_SIOCETHTOOL = 0x8946
_SET_OFFLOAD: typing.Final = {"rx": 0x15, "tx": 0x17, "sg": 0x19, "tso": 0x1F, "gso": 0x24, "gro": 0x2C}


def open_socket(lab: cluster.Lab, where: str, family: int, kind: int, proto: int = 0) -> socket.socket:
    """Make a socket in a place; `family` is 4, 6 or an address family."""

    def make() -> socket.socket:
        made = socket.socket(FAMILIES.get(family, family), kind, proto)
        made.settimeout(PATIENCE_S)
        return made

    return netns.inside(lab.netns(where), make)


def connect(
    lab: cluster.Lab, where: str, address: str, port: int, kind: int = socket.SOCK_STREAM
) -> socket.socket:
    """Connect from a place."""
    opened = open_socket(lab, where, 6 if ":" in address else 4, kind)
    try:
        opened.connect((address, port))
    except OSError:
        opened.close()
        raise
    return opened


def ip(lab: cluster.Lab, where: str, *lines: str) -> None:
    """Run `ip` in a place, once for each line."""
    for line in lines:
        lab.check_output(where, ["ip", *line.split()], cgroup=False)


def offload(lab: cluster.Lab, where: str, device: str, *names: str, on: bool) -> None:
    """Have a device do these things, or the kernel; as `ethtool -K`."""
    with open_socket(lab, where, 4, socket.SOCK_DGRAM) as control:
        for name in names or _SET_OFFLOAD:
            value = array.array("B", struct.pack("=II", _SET_OFFLOAD[name], on))
            command = struct.pack("16sP16x", device.encode(), value.buffer_info()[0])
            fcntl.ioctl(control, _SIOCETHTOOL, command)


class Offloads:
    """Has devices leave checksums and segments to the kernel, until the `with` block ends."""

    def __init__(self, lab: cluster.Lab) -> None:
        self._lab = lab
        self._off: list[tuple[str, str]] = []

    def off(self, *devices: tuple[str, str]) -> None:
        """Turn them off at these places' devices."""
        for where, device in devices:
            offload(self._lab, where, device, on=False)
            self._off.append((where, device))

    def __enter__(self) -> "Offloads":
        return self

    def __exit__(self, *_: object) -> None:
        for where, device in self._off:
            offload(self._lab, where, device, "rx", "tx", "sg", "tso", "gso", on=True)


def path_mtu(opened: socket.socket) -> int:
    """What a connected socket knows of its path."""
    if opened.family == socket.AF_INET:
        return opened.getsockopt(socket.IPPROTO_IP, _IP_MTU)
    return opened.getsockopt(socket.IPPROTO_IPV6, _IPV6_MTU)


def never_fragment(opened: socket.socket) -> None:
    """Have what is too big for the path refused, and told by an error."""
    if opened.family == socket.AF_INET:
        opened.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_DO)
        opened.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
    else:
        opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_DO)
        opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)


def receive_any(opened: list[socket.socket]) -> tuple[socket.socket, typing.Any]:
    """Wait for a datagram at one of several sockets; which, and from whom."""
    ready = select.select(opened, [], [], PATIENCE_S)[0]
    assert ready
    return ready[0], ready[0].recvfrom(65536)[1]


def disconnect(opened: socket.socket) -> None:
    """Undo connect on a datagram socket."""
    call = ctypes.CDLL(None, use_errno=True).connect
    assert call(opened.fileno(), struct.pack("H14x", socket.AF_UNSPEC), 16) == 0


def mac(lab: cluster.Lab, where: str, device: str = "eth0") -> str:
    """Return the hardware address of a device."""
    found: str = json.loads(lab.check_output(where, ["ip", "-j", "link", "show", device], cgroup=False))[0][
        "address"
    ]
    return found


def raw(lab: cluster.Lab, where: str, family: int, proto: int = packets.SCTP) -> socket.socket:
    """Make a socket for a protocol that the kernel does not know."""
    return open_socket(lab, where, family, socket.SOCK_RAW, proto)


def receive_l4(opened: socket.socket) -> tuple[bytes, typing.Any]:
    """Receive from a raw socket; without the IP header, whatever the family."""
    data, peer = opened.recvfrom(65536)
    return (data[(data[0] & 15) * 4 :] if opened.family == socket.AF_INET else data), peer


def snmp(lab: cluster.Lab, where: str) -> dict[str, int]:
    """Return the counters of IP and what is above it, by protocol and name."""

    def read() -> dict[str, int]:
        found: dict[str, int] = {}
        lines = pathlib.Path("/proc/thread-self/net/snmp").read_text().splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            proto, *keys = names.split()
            found |= {
                f"{proto[:-1]}{key}": int(value) for key, value in zip(keys, values.split()[1:], strict=True)
            }
        for line in pathlib.Path("/proc/thread-self/net/snmp6").read_text().splitlines():
            key, value = line.split()
            found[key] = int(value)
        return found

    return netns.inside(lab.netns(where), read)


class Tap:
    """Sees the frames at a device of a place, both ways, from `with` on; ingress before tc, behind XDP."""

    def __init__(self, lab: cluster.Lab, where: str, device: str = "eth0") -> None:
        self._socket = open_socket(lab, where, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 28)
        self._socket.bind((device, _ALL))
        self._socket.setblocking(False)
        self._seen: list[Seen] = []

    def seen(self) -> "list[Seen]":
        """Everything until now that is IP."""
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, address = self._socket.recvfrom(LONGEST_SKB)
                found = dissect(frame, outgoing=address[2] == OUTGOING)
                if found:
                    self._seen.append(found)
        return self._seen

    def send(self, frame: bytes) -> None:
        """Put a frame on the wire."""
        self._socket.send(frame)

    def until(self, wanted: "collections.abc.Callable[[Seen], bool]", what: str = "a packet") -> "Seen":
        """Wait for such a packet and return the first."""
        return polling.eventually(lambda: next((one for one in self.seen() if wanted(one)), None), what=what)  # type: ignore[return-value]

    def __enter__(self) -> "Tap":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


class Seen(typing.NamedTuple):
    """An IP packet on a wire. Ports are those of the first 4 bytes, whatever the protocol."""

    frame: bytes
    outgoing: bool
    src: str
    dst: str
    proto: int
    body: bytes  # what is in it: its TCP segment, ICMP message, …
    fragment: bool

    @property
    def sport(self) -> int:
        return int.from_bytes(self.body[:2], "big")

    @property
    def dport(self) -> int:
        return int.from_bytes(self.body[2:4], "big")

    @property
    def length(self) -> int:
        """Of the IP packet."""
        return len(self.frame) - packets.ETHERNET

    def icmp(self) -> tuple[int, int, int] | None:
        """Protocol, type and code of an ICMP error."""
        if self.proto == packets.ICMP or (self.proto == packets.ICMP6 and self.body[0] < 128):
            return self.proto, self.body[0], self.body[1]
        return None

    def quoted(self) -> "Seen":
        """The packet that an ICMP message quotes."""
        found = dissect(self.frame[: packets.ETHERNET] + self.body[8:], outgoing=self.outgoing)
        assert found is not None
        return found


def dissect(frame: bytes, *, outgoing: bool = False) -> Seen | None:
    """Read an IP packet without extensions other than a fragment header; None for another frame."""
    kind, packet = int.from_bytes(frame[12:14], "big"), frame[packets.ETHERNET :]
    if kind == packets.IPV4:
        ends, proto, at = (packet[12:16], packet[16:20]), packet[9], (packet[0] & 15) * 4
        fragment = bool(int.from_bytes(packet[6:8], "big") & 0x3FFF)
    elif kind == packets.IPV6:
        ends, proto, at = (packet[8:24], packet[24:40]), packet[6], 40
        fragment = proto == packets.FRAGMENT
        if fragment:
            proto, at = packet[40], 48
    else:
        return None
    src, dst = map(packets.unpacked, ends)
    return Seen(frame, outgoing, src, dst, proto, packet[at:], fragment)


class Echo:
    """A server in a place, on TCP and UDP: gives back what it gets, a stream once that has ended."""

    def __init__(self, lab: cluster.Lab, where: str, port: int) -> None:
        self.peers: collections.Counter[str] = collections.Counter()
        self._listener, self._datagrams = (
            open_socket(lab, where, 6, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
        )
        for one in (self._listener, self._datagrams):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            one.bind(("::", port))
            one.settimeout(None)
        self._listener.listen()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._accept, self._answer)]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, peer = self._listener.accept()
                self.peers[peer[0].removeprefix("::ffff:")] += 1
                threading.Thread(target=self._give_back, args=(connection,), daemon=True).start()

    def _give_back(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.sendall(read_all(connection))

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, peer = self._datagrams.recvfrom(65536)
                if not peer:  # shut down
                    return
                self.peers[peer[0].removeprefix("::ffff:")] += 1
                self._datagrams.sendto(data, peer)

    def __enter__(self) -> "Echo":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: types.TracebackType | None
    ) -> None:
        for one in (self._listener, self._datagrams):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def read_all(stream: socket.socket) -> bytes:
    """Read a stream to its end."""
    parts = []
    while part := stream.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


def exchange(lab: cluster.Lab, where: str, address: str, port: int, size: int) -> None:
    """Send so many bytes to an `Echo` and get them back; AssertionError if others come back."""
    sent = random.Random(size).randbytes(size)
    with connect(lab, where, address, port) as stream:
        stream.sendall(sent)
        stream.shutdown(socket.SHUT_WR)
        # Not compared by assert: nobody wants to read the difference.
        if read_all(stream) != sent:
            raise AssertionError(f"{size} bytes to {address}:{port} came back as others")


def ask(
    lab: cluster.Lab, where: str, address: str, port: int, size: int, *, patience_s: float = PATIENCE_S
) -> None:
    """The same with one datagram."""
    sent = random.Random(size).randbytes(size)
    with connect(lab, where, address, port, socket.SOCK_DGRAM) as opened:
        opened.settimeout(patience_s)
        opened.send(sent)
        if opened.recv(65536) != sent:
            raise AssertionError(f"a datagram of {size} bytes to {address}:{port} came back as another")
