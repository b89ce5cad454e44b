"""IPVS's virtual servers, as a kernel tells them that need not be here: pyroute2 writes its answers."""

import collections.abc
import contextlib
import dataclasses
import errno
import socket
import typing

import pytest
from pyroute2.netlink import generic
from pyroute2.netlink.generic import ipvs as theirs

from lbproxy import cli, errors, leftovers
from lbproxy.core import inventory, tables
from lbproxy.core import ipvs as core
from lbproxy.kernel import anchor, fake, inspection, ipvs, netlink
from lbproxy.migrate import command as migrate
from lbproxy.migrate import handover, taking_over
from tests import installing
from tests.unit import test_handover

IPVS_FAMILY = 37
SERVICE, DESTINATION = ("IPVS_CMD_ATTR_SERVICE", "IPVS_CMD_ATTR_DEST")
Answer = dict[str, typing.Any]


@dataclasses.dataclass(frozen=True)
class Server:
    """A virtual server with its destinations' active and inactive connections."""

    proto: int
    address: str
    connections: tuple[tuple[int, int], ...] = ()
    mark: int = 0
    port: int = 80

    def key(self) -> list[tuple[str, typing.Any]]:
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        name = "IPVS_SVC_ATTR_"
        if self.mark:
            return [(f"{name}AF", family), (f"{name}FWMARK", self.mark)]
        address = (f"{name}ADDR", self.address)
        return [(f"{name}AF", family), (f"{name}PROTOCOL", self.proto), address, (f"{name}PORT", self.port)]

    def named(self) -> dict[int, bytes]:
        """What names it to the kernel."""
        made = packed(theirs.ipvsmsg(), cmd=8, version=1, attrs=[(SERVICE, {"attrs": self.key()})])
        return netlink.attributes(netlink.attributes(made[4:])[1])


def packed(message: typing.Any, **fields: typing.Any) -> bytes:
    for name, value in fields.items():
        message[name] = value
    message.encode()
    return bytes(message.data[16:])


class Kernel:
    """Answers as the kernel would."""

    def __init__(self, *servers: Server, ipvs: bool = True, forgets: bool = False) -> None:
        self.servers, self.ipvs, self.forgets = servers, ipvs, forgets

    def dump(self, kind: int, request: bytes, /) -> collections.abc.Iterator[bytes]:
        if kind == generic.GENL_ID_CTRL:
            assert request[0] == generic.CTRL_CMD_GETFAMILY
            names = {16: "nlctrl", 21: "ethtool"} | ({IPVS_FAMILY: "IPVS"} if self.ipvs else {})
            for number, name in names.items():
                attributes = [("CTRL_ATTR_FAMILY_NAME", name), ("CTRL_ATTR_FAMILY_ID", number)]
                yield packed(generic.ctrlmsg(), cmd=1, version=1, attrs=attributes)
            return
        assert kind == IPVS_FAMILY
        if request[0] == theirs.IPVS_CMD_GET_SERVICE:
            for server in self.servers:
                attributes = [*server.key(), ("IPVS_SVC_ATTR_SCHED_NAME", "rr"), ("IPVS_SVC_ATTR_TIMEOUT", 0)]
                yield packed(theirs.ipvsmsg(), cmd=1, version=1, attrs=[(SERVICE, {"attrs": attributes})])
            return
        assert request[0] == theirs.IPVS_CMD_GET_DEST
        asked = netlink.attributes(netlink.attributes(request[4:])[1])
        (server,) = [one for one in self.servers if one.named() == asked]
        for active, inactive in server.connections:
            name = "IPVS_DEST_ATTR_"
            attributes = [
                (f"{name}PORT", 8080), (f"{name}WEIGHT", 1),
                (f"{name}ACTIVE_CONNS", active), (f"{name}INACT_CONNS", inactive),
            ]  # fmt: skip
            yield packed(theirs.ipvsmsg(), cmd=5, version=1, attrs=[(DESTINATION, {"attrs": attributes})])

    def request(self, kind: int, request: bytes, /) -> None:
        assert (kind, request[0]) == (IPVS_FAMILY, theirs.IPVS_CMD_DEL_SERVICE)
        asked = netlink.attributes(netlink.attributes(request[4:])[1])
        left = [one for one in self.servers if one.named() != asked]
        if len(left) == len(self.servers) or self.forgets:
            raise ProcessLookupError(errno.ESRCH, "No such process")
        self.servers = tuple(left)


DEVICE = ("10.96.0.1", "10.96.0.9", "fd00:96::1", "fd00:96::2")
NODE = ("127.0.0.1", "192.0.2.1", "2001:db8::1")
PLACES = ipvs.Places(*(frozenset(map(installing.address, one)) for one in (DEVICE, NODE)))
TCP = Server(6, "10.96.0.1", ((3, 5), (1, 0)))
TCP6 = Server(6, "fd00:96::1", ((2, 0),))
UDP = Server(17, "10.96.0.1", ((0, 4),))


@pytest.mark.parametrize(
    ("kernel", "found"),
    [
        (Kernel(ipvs=False), core.Found()),
        (Kernel(), core.Found()),
        (Kernel(Server(6, "10.96.0.1")), core.Found(1)),
        (Kernel(Server(6, "10.96.0.1", ((0, 9),))), core.Found(1)),
        (Kernel(TCP, UDP, TCP6), core.Found(3, {"TCP": 6, "UDP": 4})),
        (Kernel(Server(132, "fd00:96::2", ((1, 1),))), core.Found(1, {"SCTP": 1})),
        (Kernel(Server(50, "10.96.0.1", ((1, 2),))), core.Found(1, {"other": 3})),
        (
            Kernel(TCP, Server(6, "192.0.2.1", ((7, 7),)), Server(0, "10.96.0.1", ((1, 2),), mark=7)),
            core.Found(1, {"TCP": 4}, others=("192.0.2.1:80/TCP", "mark 7")),
        ),
    ],
)
def test_what_goes_on_is_counted_by_protocol(kernel: Kernel, found: core.Found) -> None:
    assert ipvs.found(kernel, PLACES) == found


OWN = (
    TCP,
    TCP6,
    UDP,
    Server(6, "192.0.2.1", port=30000),
    Server(17, "192.0.2.1", port=32767),
    Server(6, "2001:db8::1", port=31000),
)
OTHERS = (
    Server(6, "192.0.2.1"),  # keepalived's, on an address of the node
    Server(6, "192.0.2.1", port=29999),
    Server(6, "2001:db8::1", port=32768),
    Server(6, "198.51.100.7", port=30080),  # kube-proxy was told to leave it alone
    Server(0, "0.0.0.0", mark=7),
)


def test_kube_proxys_virtual_servers_go_and_others_stay() -> None:
    kernel = Kernel(*OWN, *OTHERS)
    left = (
        "192.0.2.1:80/TCP",
        "192.0.2.1:29999/TCP",
        "[2001:db8::1]:32768/TCP",
        "198.51.100.7:30080/TCP",
        "mark 7",
    )
    assert ipvs.removed(kernel, PLACES) == (len(OWN), left)
    assert kernel.servers == OTHERS
    assert ipvs.removed(kernel, PLACES) == (0, left)


def test_a_virtual_server_that_is_gone_already_is_no_failure() -> None:
    assert ipvs.removed(Kernel(*OWN, forgets=True), PLACES)[0] == len(OWN)
    assert ipvs.removed(Kernel(ipvs=False), PLACES) == (0, ())


def test_whose_virtual_servers_stay_is_said() -> None:
    said = core.described(core.Found(2, others=tuple(f"192.0.2.1:{port}/TCP" for port in range(80, 87))))
    assert said.startswith("2 virtual servers; going on through them: none; not kube-proxy's")
    assert said.endswith("192.0.2.1:84/TCP and 2 more")
    assert "left alone: 192.0.2.1:80/TCP" in core.described(core.Found(others=("192.0.2.1:80/TCP",)))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, ""),
        (core.Found(), ""),
        (core.Found(12), ""),
        (core.Found(12, {"TCP": 3, "UDP": 1}), "12 virtual servers; going on through them: 3 TCP, 1 UDP"),
        (core.Found(problem="Operation not permitted"), "asked for: Operation not permitted"),
    ],
)
def test_servers_in_use_are_not_to_be_removed(found: core.Found | None, said: str) -> None:
    obstacle = core.obstacle(found)
    assert bool(obstacle) == bool(said)
    assert said in obstacle
    assert ("mode: iptables" in obstacle) == bool(said)


# --- what a migration makes of it ---


class Cleanup:
    """Removes nothing, and is counted."""

    made: typing.ClassVar[list["Cleanup"]] = []
    removed = failed = unable = kept = ()

    def __init__(self, _kube_proxy_here: collections.abc.Callable[[], str]) -> None:
        """As the real one has it."""

    def all(self) -> None:
        self.made.append(self)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> fake.FakeMaps:
    monkeypatch.setattr(leftovers, "Cleanup", Cleanup)
    monkeypatch.setattr(leftovers, "present", list)
    monkeypatch.setattr(Cleanup, "made", [])
    # This is no lab: no table is to be made.
    monkeypatch.setattr(anchor, "Keeper", test_handover.Keeper)
    return fake.FakeMaps(installing.SIZES)


BUSY = core.Found(2, {"TCP": 1})


@pytest.mark.parametrize(
    ("found", "done"),
    [
        (None, True),
        (core.Found(2), True),
        (BUSY, False),
        (core.Found(problem="Operation not permitted"), False),
    ],
)
def test_nothing_is_removed_that_breaks_a_connection(
    kernel: fake.FakeMaps, monkeypatch: pytest.MonkeyPatch, found: core.Found | None, done: bool
) -> None:
    kernel.apply([tables.handover(tables.Handover.RETURN, tables.Return.YES)])
    monkeypatch.setattr(ipvs, "look", lambda: found)
    hand_over = handover.HandOver(kernel, entries=lambda: iter(()), keeper=test_handover.Keeper())
    refused = contextlib.nullcontext() if done else pytest.raises(errors.AgentError, match="mode: iptables")
    with refused:
        taking_over.take_over(hand_over)
    assert bool(Cleanup.made) == done
    assert inventory.is_set(kernel, tables.Handover.RETURN) == (not done)


@pytest.mark.parametrize("dry_run", [False, True])
def test_the_command_says_so_before_anything_is_done(
    kernel: fake.FakeMaps, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dry_run: bool
) -> None:
    monkeypatch.setattr(ipvs, "look", lambda: BUSY)
    monkeypatch.setattr(taking_over, "kube_proxies", list)
    monkeypatch.setattr(taking_over, "flows", lambda _: taking_over.Flows({}, {}))
    monkeypatch.setattr(inspection, "open_maps", lambda _: kernel)
    monkeypatch.setattr(kernel, "close", lambda: None, raising=False)
    agent = inspection.Agent(running=True, pid=1)
    monkeypatch.setattr(inspection, "agent", lambda _: agent)
    parser = cli._parsers()[0]
    own = ["--bpffs", "/none"]
    args = parser.parse_args(["migrate", "take-over", *own, *(["--dry-run"] if dry_run else [])])
    with pytest.raises(errors.AgentError, match=r"1 TCP; that breaks .* --force removes"):
        migrate.main(args)
    args.force = True
    assert migrate.main(args) == 0
    assert bool(Cleanup.made) == (not dry_run)
    assert migrate.main(parser.parse_args(["migrate", "status", *own])) == 0
    assert "2 virtual servers; going on through them: 1 TCP" in capsys.readouterr().out
