"""What netlink says of the devices of a namespace, and when it says something."""

import asyncio
import collections.abc
import contextlib

import pytest

from lbproxy.core import addresses
from lbproxy.kernel import links
from tests.kernel.test_device_links import Namespace, namespace


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
