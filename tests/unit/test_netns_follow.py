"""How soon the address of a new namespace is known: told of it, beside changes of source ranges and failures.

The clock jumps and the namespaces are made up, so what comes first is the same each time.
"""

import asyncio
import collections.abc
import contextlib
import socket

import pytest

from lbproxy import errors, netns_addresses
from lbproxy.core import addresses, netns_rows, tables
from lbproxy.kernel import fake, namespaces, node
from lbproxy.kernel import netns_addresses as kernel_netns
from tests import serving, virtual_time

RANGE = tables.Put(tables.Table.SOURCE_RANGES, bytes(24), bytes(4))
HOST = 1
SOON_S = 2.0  # of virtual time; what is not told of is found within 30 s


class World:
    """Network namespaces that are said to be there, named or not, and what a follower tells the programs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel = fake.FakeMaps(serving.sizes())
        self._spaces: dict[int, list[netns_rows.Address]] = {HOST: []}
        self._named = {HOST}
        self._followed: netns_addresses.NetnsAddresses | None = None
        self._open = contextlib.ExitStack()
        self._told: socket.socket | None = None
        monkeypatch.setattr(kernel_netns, "notices", self._notices)
        monkeypatch.setattr(namespaces, "named", lambda: self._found(self._named))
        monkeypatch.setattr(namespaces, "every", lambda: self._found(self._spaces))
        monkeypatch.setattr(namespaces, "visit", self._visit)
        monkeypatch.setattr(node, "netns_cookie", lambda: HOST)

    def starts(self, cookie: int, *, named: bool = True) -> None:
        """A namespace that is there, without an address."""
        self._spaces[cookie] = []
        if named:
            self._named.add(cookie)

    def gets(self, cookie: int, text: str) -> None:
        """An address, of which the kernel tells whoever listens."""
        address = addresses.parse(text)
        assert address is not None
        self._spaces[cookie].append(netns_rows.Address(address, device=2, scope=0, flags=0))
        self.notice()

    def notice(self) -> None:
        """Something happened somewhere."""
        if self._told is not None:
            with contextlib.suppress(OSError):  # nobody listens any more
                self._told.send(b"word of a device or an address")

    def ranges_change(self) -> None:
        self.kernel.apply([RANGE])
        assert self._followed is not None
        self._followed.wrote([RANGE])

    def addresses_of(self, cookie: int) -> list[str]:
        key = cookie.to_bytes(8, tables.BYTE_ORDER)
        return [addresses.text(row) for at, row in self.kernel.rows("netns_addresses") if at.startswith(key)]

    def run(
        self, story: collections.abc.Callable[[], collections.abc.Coroutine[object, object, None]]
    ) -> None:
        """Follow while the story is told, and for a little longer."""

        async def tell() -> None:
            loop = asyncio.get_running_loop()
            self._followed = netns_addresses.NetnsAddresses(self.kernel, loop.time)
            ready = asyncio.Event()
            ready.set()
            following = asyncio.create_task(self._followed.run(ready))
            self.ranges_change()
            await asyncio.sleep(SOON_S)
            await story()
            await asyncio.sleep(SOON_S)
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following

        with self._open:
            virtual_time.run(tell)

    def _notices(self) -> socket.socket:
        heard, told = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._told = self._open.enter_context(told)
        heard.setblocking(False)
        return heard

    def _found(self, cookies: collections.abc.Iterable[int]) -> namespaces.Found:
        return {(4, cookie): [f"/made/up/{cookie}"] for cookie in cookies}

    def _visit(
        self, spaces: namespaces.Found, _here: object
    ) -> tuple[dict[namespaces.Identity, netns_rows.Namespace], dict[namespaces.Identity, OSError]]:
        return {
            (device, cookie): netns_rows.Namespace(cookie, tuple(self._spaces[cookie]))
            for device, cookie in spaces
        }, {}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_a_pods_address_is_known_soon_after_the_kernel_tells_of_it(world: World) -> None:
    async def story() -> None:
        world.starts(77)
        await asyncio.sleep(SOON_S)  # its name was looked at
        world.gets(77, "10.244.0.5")

    world.run(story)
    assert world.addresses_of(77) == ["10.244.0.5"]


def test_also_when_source_ranges_change_in_the_same_moment(world: World) -> None:
    async def story() -> None:
        world.starts(77)
        await asyncio.sleep(SOON_S)
        world.gets(77, "10.244.0.5")
        world.ranges_change()

    world.run(story)
    assert world.addresses_of(77) == ["10.244.0.5"]


@pytest.mark.parametrize("turns", range(12))
def test_or_at_any_time_while_it_looks_at_what_the_ranges_are_now(world: World, turns: int) -> None:
    async def story() -> None:
        world.starts(77)
        await asyncio.sleep(SOON_S)
        world.ranges_change()
        await asyncio.sleep(netns_addresses._SETTLE_S)
        for _ in range(turns):  # of the event loop
            await asyncio.sleep(0)
        world.gets(77, "10.244.0.5")

    world.run(story)
    assert world.addresses_of(77) == ["10.244.0.5"]


def test_or_while_the_tables_take_no_writes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = world.kernel.apply

    def refuse(writes: object) -> None:
        raise errors.AgentError("no")

    async def story() -> None:
        world.starts(77)
        await asyncio.sleep(SOON_S)
        monkeypatch.setattr(world.kernel, "apply", refuse)
        world.gets(77, "10.244.0.5")
        await asyncio.sleep(SOON_S)
        monkeypatch.setattr(world.kernel, "apply", apply)

    world.run(story)
    assert world.addresses_of(77) == ["10.244.0.5"]


def test_a_namespace_without_a_name_is_found_by_its_notice(world: World) -> None:
    async def story() -> None:
        await asyncio.sleep(netns_addresses._PROCESSES_S)
        world.starts(77, named=False)
        world.gets(77, "10.244.0.5")

    world.run(story)
    assert world.addresses_of(77) == ["10.244.0.5"]


def test_or_once_processes_may_be_asked_again(world: World) -> None:
    async def story() -> None:
        await asyncio.sleep(netns_addresses._PROCESSES_S)
        world.notice()  # of something else: processes are asked
        await asyncio.sleep(1.0)
        world.starts(77, named=False)
        world.gets(77, "10.244.0.5")
        await asyncio.sleep(netns_addresses._PROCESSES_S)

    world.run(story)
    assert world.addresses_of(77) == ["10.244.0.5"]
