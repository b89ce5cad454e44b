"""The packet path on devices that come, change and go, in a namespace of one's own."""

import asyncio
import collections.abc
import contextlib
import logging
import pathlib
import shutil

import pytest

from lbproxy import packet_path
from lbproxy.config import config
from lbproxy.core import addresses, tables
from lbproxy.kernel import datapath, device_links, features, generation, inspection, libbpf, links, maps, node
from tests import polling, serving
from tests.kernel import small_programs
from tests.kernel.test_device_links import Namespace, attached, namespace

NODE_IP = "192.0.2.1"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small_programs.stand_in(monkeypatch)
    monkeypatch.setattr(packet_path, "_CHECK_S", 0.5)
    monkeypatch.setattr(packet_path, "_RETRY_S", 0.2)


@pytest.fixture
def ns() -> collections.abc.Iterator[Namespace]:
    with namespace() as made:
        made.ip("addr", "add", f"{NODE_IP}/24", "dev", "up0")
        made.ip("link", "set", "up0", "up")
        made.ip("link", "set", "far0", "up")
        yield made


@pytest.fixture
def found(root: pathlib.Path, cgroup: pathlib.Path) -> collections.abc.Iterator[datapath.Datapath]:
    made = datapath.Datapath(root)
    made.ensure(cgroup, serving.SIZES)
    yield made
    shutil.rmtree(made.links_dir, ignore_errors=True)


def packed(text: str) -> bytes:
    address = addresses.parse(text)
    assert address is not None
    return address


def shown(ns: Namespace, found: datapath.Datapath) -> dict[str, str]:
    """What runs where: names of devices and of programs."""
    names = {link.ifindex: link.name for link in ns(links.look).links}
    at: dict[str, list[str]] = {}
    for held in found.device_links.held():
        if held.alive:
            one = held.attachment
            at.setdefault(names.get(one.ifindex, "?"), []).append(
                one.program + (f":{one.mode}" if one.mode else "")
            )
    return {name: " ".join(sorted(programs)) for name, programs in at.items()}


INSIDE = "tc_from_inside tc_to_any"
OUTSIDE = "tc_from_outside tc_to_any"
POD = "tc_from_inside tc_to_any"


class Running:
    """A packet path in a namespace, and what it said."""

    def __init__(self, ns: Namespace, found: datapath.Datapath, settings: config.Config) -> None:
        self.ns = ns
        self.found = found
        self.settings = settings
        self.reported: list[list[str]] = []
        self.unserved: list[list[str]] = []
        self.put_back: list[int] = []

    def _report(
        self, reasons: collections.abc.Sequence[str], unserved: collections.abc.Sequence[str]
    ) -> None:
        self.reported.append(list(reasons))
        self.unserved.append(list(unserved))

    def __call__(
        self, script: collections.abc.Callable[["Running"], collections.abc.Awaitable[None]]
    ) -> None:
        async def main() -> None:
            with contextlib.closing(maps.BpfMaps(str(self.found.maps_dir))) as self.kernel:
                self.path = packet_path.PacketPath(
                    self.settings,
                    self.found,
                    self.kernel,
                    self._report,
                    put_back=self.put_back.append,
                )
                task = asyncio.create_task(self.path.run())
                try:
                    await script(self)
                finally:
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task

        self.ns(lambda: asyncio.run(main()))

    async def becomes(self, **wanted: str) -> None:
        await polling.eventually_async(lambda: shown(self.ns, self.found) == wanted)

    def row(self, name: str) -> tables.Device | None:
        row = self.kernel.row(tables.Table.DEVICES, tables.row_key(self.ns.ifindex(name)))
        return None if row is None else tables.device(row)


REST = {"pod0": INSIDE, "far0": INSIDE, "far1": INSIDE}


def settings(**changed: object) -> config.Config:
    return config.Config(node_name="n1", **changed)  # type: ignore[arg-type]


def test_devices_are_attached_as_they_come_and_go(
    ns: Namespace, found: datapath.Datapath, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(running: Running) -> None:
        await asyncio.sleep(0.1)
        assert shown(ns, found) == {}  # the node's addresses are not known yet
        running.path.node_known((packed(NODE_IP),))
        await running.becomes(up0=OUTSIDE, **REST)
        assert running.row("up0") == tables.Device(packed(NODE_IP), tables.NO_ADDRESS, 0)
        here, elsewhere = node.netns_cookie(), node.netns_cookie() + 1
        named = inspection.attached_devices(found.root, here)
        assert {one.name for one in named} == {"up0", *REST}
        numbered = inspection.attached_devices(found.root, elsewhere)
        assert [one.name for one in numbered] == [str(one.ifindex) for one in named]

        ns.ip("link", "add", "veth7", "type", "veth", "peer", "name", "far7")
        await running.becomes(up0=OUTSIDE, veth7=POD, far7=INSIDE, **REST)
        ns.ip("link", "del", "veth7")
        await running.becomes(up0=OUTSIDE, **REST)

        ns.ip("link", "set", "far1", "up")
        ns.ip("link", "set", "pod0", "up")
        ns.ip("addr", "add", "198.51.100.1/24", "dev", "pod0")
        await polling.eventually_async(
            lambda: running.row("pod0") == tables.Device(packed("198.51.100.1"), bytes(16), 0)
        )
        ns.ip("route", "add", "default", "via", "198.51.100.2")
        await running.becomes(up0=OUTSIDE, **(REST | {"pod0": OUTSIDE}))
        ns.ip("route", "del", "default")
        await running.becomes(up0=OUTSIDE, **REST)

        ns.ip("link", "add", "br0", "type", "bridge")
        ns.ip("link", "set", "up0", "master", "br0")
        await running.becomes(br0=OUTSIDE, **REST)
        ns.ip("link", "set", "up0", "nomaster")
        await running.becomes(br0=INSIDE, up0=OUTSIDE, **REST)

    with caplog.at_level(logging.INFO):
        Running(ns, found, settings(pod_devices=("veth*",)))(script)
    assert "device up0: uplink by tc, as --xdp is off" in caplog.messages
    assert "device veth7: pod by tc" in caplog.messages
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_an_agent_that_starts_again_finds_its_links(ns: Namespace, found: datapath.Datapath) -> None:
    async def script(running: Running) -> None:
        running.path.node_known((packed(NODE_IP),))
        await running.becomes(up0=OUTSIDE, **REST)

    def ids() -> dict[str, int]:
        numbers = {}
        for held in found.device_links.held():
            with generation.opened(found.links_dir / held.attachment.pin) as fd:
                numbers[held.attachment.pin] = libbpf.link_info(fd).id
        return numbers

    Running(ns, found, settings())(script)
    before = ids()
    Running(ns, found, settings())(script)
    assert ids() == before
    assert len(before) == 8

    async def off(_: Running) -> None:
        await polling.eventually_async(lambda: shown(ns, found) == {})

    Running(ns, found, settings(packet_path=False))(off)


def test_what_somebody_takes_away_is_put_back_and_told(
    ns: Namespace, found: datapath.Datapath, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(running: Running) -> None:
        running.path.node_known((packed(NODE_IP),))
        await running.becomes(up0=OUTSIDE, **REST)
        # At once: of a link that is only unpinned the kernel lets go in a while, and until then has no place.
        pin = device_links.Attachment(ns.ifindex("up0"), "tc_from_outside").pin
        with generation.opened(found.links_dir / pin) as link_fd:
            libbpf.link_detach(link_fd)
        await running.becomes(up0=OUTSIDE, **REST)
        await polling.eventually_async(lambda: running.put_back == [1])

    with caplog.at_level(logging.ERROR):
        Running(ns, found, settings())(script)
    assert caplog.messages == ["put back programs that were taken away: tc_from_outside at up0"]
    assert attached(ns, ns.ifindex("up0"), libbpf.TCX_INGRESS) == 1


def test_xdp_where_the_driver_can_and_tc_where_it_can_not(
    ns: Namespace, found: datapath.Datapath, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(running: Running) -> None:
        running.path.node_known((packed(NODE_IP), packed("203.0.113.1")))
        await running.becomes(up0=f"{OUTSIDE} xdp_from_outside:native", br1=OUTSIDE, **REST)

    # Bridges have no native XDP.
    ns.ip("link", "add", "br1", "type", "bridge")
    ns.ip("addr", "add", "203.0.113.1/24", "dev", "br1")
    with caplog.at_level(logging.INFO):
        Running(ns, found, settings(xdp=config.Xdp.NATIVE))(script)
    assert "device up0: uplink by tc and native XDP" in caplog.messages
    [said] = [line for line in caplog.messages if "br1" in line]
    why = "its driver takes no program in native XDP: Operation not supported"
    assert said == f"device br1: uplink by tc, as {why}"


def test_what_is_not_as_it_should_be_is_told_once(
    ns: Namespace, found: datapath.Datapath, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(running: Running) -> None:
        running.path.node_known(())
        await running.becomes(up0=INSIDE, **REST)
        await asyncio.sleep(0.5)
        ns.ip("link", "add", "eth7", "type", "veth", "peer", "name", "far7")
        await running.becomes(up0=INSIDE, eth7=OUTSIDE, far7=INSIDE, **REST)
        await polling.eventually_async(lambda: running.reported[-1] == [])

    running = Running(ns, found, settings(devices=("eth7",)))
    with caplog.at_level(logging.WARNING):
        running(script)
    (told,) = caplog.messages
    assert told.startswith("--device eth7: no such device; ")
    assert told.endswith("; devices that are not named serve only what begins a flow, as for pods")
    assert running.reported == running.unserved == [[told], []]


def test_a_name_that_only_other_nodes_have_leaves_nothing_unserved(
    ns: Namespace, found: datapath.Datapath
) -> None:
    async def script(running: Running) -> None:
        running.path.node_known(())
        await running.becomes(up0=OUTSIDE, **REST)
        await polling.eventually_async(lambda: running.reported)

    running = Running(ns, found, settings(devices=("eth7", "up0")))
    running(script)
    [[told]] = running.reported
    assert told.startswith("--device eth7: no such device")
    assert running.unserved == [[]]


def test_a_kernel_without_tcx_is_told_and_left_alone(
    ns: Namespace, found: datapath.Datapath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "has_tcx", lambda: False)

    async def script(running: Running) -> None:
        await polling.eventually_async(lambda: running.reported)

    running = Running(ns, found, settings())
    running(script)
    [[reason]] = running.reported
    assert reason.startswith("the packet path is off: this kernel lacks TCX")
    assert shown(ns, found) == {}
