"""What netlink says of the devices of a namespace, and when it says something."""

import asyncio
import collections.abc
import contextlib
import errno
import socket
import struct

import pytest

from lbproxy.core import addresses
from lbproxy.kernel import links, netns_addresses, node
from tests import polling
from tests.kernel.test_device_links import Namespace, namespace

RTM_NEWADDR, NLMSG_DONE, NLM_F_DUMP_INTR, IFA_LOCAL = 20, 3, 0x10, 2


@pytest.fixture
def ns() -> collections.abc.Iterator[Namespace]:
    with namespace() as made:
        for name in ("up0", "far0", "pod0", "far1"):
            made.ip("link", "set", name, "up")
        yield made


def found(ns: Namespace) -> dict[str, dict[str, bool]]:
    """The addresses of each device, and whether they are usable; those of the link itself left out."""
    return {
        link.name: {
            text: address.usable
            for address in link.addresses
            if not (text := addresses.text(address.packed)).startswith("fe80:")
        }
        for link in ns(links.look).links
    }


def test_addresses_and_which_of_them_new_connections_may_come_from(ns: Namespace) -> None:
    for address in ("192.0.2.1/24", "192.0.2.2/24", "198.51.100.1/32 peer 198.51.100.2"):
        ns.ip("addr", "add", *address.split(), "dev", "up0")
    ns.ip("addr", "add", "169.254.7.7/32", "dev", "up0", "scope", "link")
    ns.ip("addr", "add", "2001:db8::1/64", "dev", "up0", "nodad")
    ns.ip("addr", "add", "2001:db8::2/64", "dev", "up0", "preferred_lft", "0", "nodad")
    assert found(ns)["up0"] == {
        "192.0.2.1": True,
        "192.0.2.2": False,
        "198.51.100.1": True,
        "169.254.7.7": False,
        "2001:db8::1": True,
        "2001:db8::2": False,
    }
    everything = [address for link in ns(links.look).links for address in link.addresses]
    assert not any(one.usable for one in everything if addresses.text(one.packed).startswith("fe80:"))


def test_kinds_and_masters(ns: Namespace) -> None:
    ns.ip("link", "add", "br0", "type", "bridge")
    ns.ip("link", "set", "up0", "master", "br0")
    by_name = {link.name: link for link in ns(links.look).links}
    assert (by_name["br0"].kind, by_name["up0"].kind, by_name["lo"].kind) == ("bridge", "veth", "")
    assert by_name["up0"].master == by_name["br0"].ifindex == ns.ifindex("br0")
    assert [link.name for link in by_name.values() if link.loopback] == ["lo"]


def test_default_routes_of_both_families_several_hops_and_any_table(ns: Namespace) -> None:
    def default() -> set[str]:
        look = ns(links.look)
        return {link.name for link in look.links if link.ifindex in look.default_routes}

    ns.ip("addr", "add", "192.0.2.1/24", "dev", "up0")
    ns.ip("addr", "add", "198.51.100.1/24", "dev", "pod0")
    ns.ip("route", "add", "203.0.113.0/24", "via", "192.0.2.9")
    ns.ip("route", "add", "blackhole", "default")
    assert default() == set()
    ns.ip("route", "del", "blackhole", "default")
    ns.ip("route", "add", "default", "nexthop", "via", "192.0.2.9", "nexthop", "via", "198.51.100.9")
    assert default() == {"up0", "pod0"}
    ns.ip("route", "del", "default")
    ns.ip("route", "add", "default", "dev", "pod0", "table", "77")
    assert default() == {"pod0"}
    ns.ip("route", "flush", "table", "77")
    ns.ip("-6", "route", "add", "default", "dev", "far0")
    assert default() == {"far0"}


def test_of_routes_only_default_ones_are_worth_a_look(ns: Namespace) -> None:
    ns.ip("addr", "add", "192.0.2.1/24", "dev", "up0")

    async def run(*arguments: str) -> None:
        process = await asyncio.create_subprocess_exec("ip", "route", "add", *arguments)
        assert await process.wait() == 0

    async def main() -> None:
        with contextlib.closing(links.Notices()) as notices:
            changed = asyncio.ensure_future(notices.changed())
            await run("203.0.113.0/24", "via", "192.0.2.9")
            await asyncio.sleep(0.2)
            assert not changed.done()
            await run("default", "via", "192.0.2.9")
            await asyncio.wait_for(changed, 60)

    ns(lambda: asyncio.run(main()))


class Kernel:
    """Answers what is asked over netlink, as often as it is asked, by the dumps it is given."""

    def __init__(self, *dumps: tuple[list[str], int]) -> None:
        self.dumps = list(dumps)

    def __call__(self, *_: object) -> "Kernel":
        return self

    def __enter__(self) -> "Kernel":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def bind(self, _address: tuple[int, int]) -> None:
        pass

    def settimeout(self, _timeout_s: float) -> None:
        pass

    def getsockopt(self, *_: int) -> bytes:
        return bytes(8)

    def close(self) -> None:
        pass

    def send(self, _request: bytes) -> None:
        pass

    def recv(self, _size: int) -> bytes:
        texts, flags = self.dumps.pop(0)
        told = b"".join(
            struct.pack("=IHHIIBBBBIHH4s", 32, RTM_NEWADDR, flags, 0, 0, 2, 32, 0, 0, 1, 8, IFA_LOCAL, packed)
            for packed in map(socket.inet_aton, texts)
        )
        return told + struct.pack("=IHHIIi", 20, NLMSG_DONE, flags, 0, 0, 0)


def of_this_namespace() -> collections.abc.Iterator[bytes]:
    return (one.address for one in netns_addresses.here().addresses)


LOOKS = pytest.mark.parametrize("look", [links.every_address, of_this_namespace])
Look = collections.abc.Callable[[], collections.abc.Iterable[bytes]]


@LOOKS
def test_addresses_that_changed_while_they_were_told_are_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, look: Look
) -> None:
    # 192.0.2.2 was there all the time: the kernel counts places, and one before it has gone.
    kernel = Kernel((["192.0.2.1", "192.0.2.3"], NLM_F_DUMP_INTR), (["192.0.2.2", "192.0.2.3"], 0))
    monkeypatch.setattr(socket, "socket", kernel)
    assert [addresses.text(one) for one in look()] == ["192.0.2.2", "192.0.2.3"]
    assert not kernel.dumps


@LOOKS
def test_of_addresses_that_never_cease_to_change_none_is_missing(
    monkeypatch: pytest.MonkeyPatch, look: Look
) -> None:
    dumps = [(["192.0.2.1", "192.0.2.3"], NLM_F_DUMP_INTR), (["192.0.2.2", "192.0.2.3"], NLM_F_DUMP_INTR)] * 2
    monkeypatch.setattr(socket, "socket", Kernel(*dumps))
    assert sorted(addresses.text(one) for one in look()) == ["192.0.2.1", "192.0.2.2", "192.0.2.3"]


def test_every_address_is_told_once(ns: Namespace) -> None:
    for address, device in (("192.0.2.1/24", "up0"), ("192.0.2.1/24", "pod0"), ("2001:db8::1/64", "up0")):
        ns.ip("addr", "add", address, "dev", device, *(["nodad"] if ":" in address else []))
    told = [text for one in ns(links.every_address) if not (text := addresses.text(one)).startswith("fe80:")]
    assert sorted(told) == ["192.0.2.1", "2001:db8::1"]


async def test_a_look_that_fails_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    address, looks = bytes(15) + b"\1", 0

    def look() -> tuple[bytes, ...]:
        nonlocal looks
        looks += 1
        if looks <= 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return (address,)

    monkeypatch.setattr(links, "every_address", look)
    monkeypatch.setattr(node, "_RETRY_S", 0.001)
    told: list[tuple[bytes, ...]] = []
    watching = asyncio.ensure_future(node.watch_addresses(told.append))
    await polling.eventually_async(lambda: told)
    watching.cancel()
    assert told == [(address,)]
    assert [one.levelname for one in caplog.records if "Too many open files" in one.message] == ["ERROR"]
