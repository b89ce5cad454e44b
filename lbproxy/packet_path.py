"""Keeps the packet path attached to the devices that it belongs on, as they come and go.

Apart from the passes: it needs to know the node's addresses, and nothing of
services. The programs are harmless where there is nothing for them to do, so a
device gets its own as soon as it is there.
"""

import asyncio
import contextlib
import errno
import logging
import os
import typing

from lbproxy import gate
from lbproxy.config import config
from lbproxy.core import devices, tables
from lbproxy.kernel import datapath, device_links, features, links, maps, programs

_log = logging.getLogger(__name__)

_CHECK_S: typing.Final = 30.0  # something else may have taken a program away
_RETRY_S: typing.Final = 5.0
_NO_TCX: typing.Final = (
    "the packet path is off: this kernel lacks TCX, which exists since Linux 6.6; "
    "sockets of this node are served, packets from elsewhere are not"
)
_REFUSED: typing.Final = (
    "the packet path is off: this kernel refuses its programs ({}); "
    "sockets of this node are served, packets from elsewhere are not"
)
_MANY: typing.Final = (devices.Role.INSIDE, devices.Role.PORT)
_ORDER: typing.Final = {program.name: number for number, program in enumerate(programs.PACKET)}

Report = typing.Callable[[typing.Sequence[str], typing.Sequence[str]], None]


def refusal(why: str) -> str:
    """What is said where the kernel has refused the programs."""
    return _REFUSED.format(why)


def choice(settings: config.Config) -> devices.Choice:
    """What the configuration says of devices."""
    mode = settings.detect_local_mode
    by_bridge = mode is config.DetectLocalMode.BRIDGE_INTERFACE
    by_prefix = mode is config.DetectLocalMode.INTERFACE_NAME_PREFIX
    return devices.Choice(
        settings.devices,
        settings.pod_devices,
        settings.bridge_interface if by_bridge else "",
        settings.interface_name_prefix if by_prefix else "",
    )


class PacketPath:
    """What is attached, and what is not as it should be."""

    def __init__(
        self,
        settings: config.Config,
        found: datapath.Datapath,
        kernel: maps.Maps,
        report: Report = lambda _reasons, _unserved: None,
        refused: str = "",
        writing: gate.Gate | None = None,
        new_uplink: typing.Callable[[], None] = lambda: None,
        put_back: typing.Callable[[int], None] = lambda _count: None,
    ) -> None:
        """`report` is told of whatever is not as it should be, one line each, whenever that changes.

        And which of these lines mean that packets are not served, which would be with all in order.

        `refused` is why there are no programs, where there are none. `new_uplink` is called before
        an uplink gets its programs that has come after all others. `put_back` is told how many
        programs were taken away by somebody else, and are there again; in another thread.
        """
        self._put_back = put_back
        self._new_uplink = new_uplink
        self._refused = refused
        self._wanted_at_all = settings.packet_path
        self._choice = choice(settings)
        self._xdp = "" if settings.xdp is config.Xdp.OFF else settings.xdp.value
        self._datapath = found
        self._kernel = kernel
        self._report = report
        self._writing = writing or gate.Gate()
        self._node_addresses: tuple[bytes, ...] | None = None
        self._wake = asyncio.Event()
        self._attached: frozenset[device_links.Attachment] = frozenset()
        self._no_xdp: dict[int, str] = {}  # devices whose driver would not, and what it said
        self._told: dict[int, str] = {}
        self._absent: list[str] = []  # of `reasons`: devices of other nodes, where this one has an uplink
        self._unserved: list[str] = []
        self.reasons: list[str] = []
        self.settled = asyncio.Event()  # everything that could be attached at first is

    def node_known(self, addresses: tuple[bytes, ...]) -> None:
        """Take the node's addresses, once they are known or not waited for any longer.

        Nothing is attached before: until then a device that an earlier agent took
        for an uplink would be taken for another.
        """
        if addresses != self._node_addresses:
            self._node_addresses = addresses
            self._wake.set()

    async def run(self) -> None:
        """Attach, and follow what changes; returns at once where that is not wanted, or not possible."""
        if not self._wanted_at_all:
            self._datapath.attach(())
            _log.info("the packet path is off: --packet-path=false")
            self.settled.set()
            return
        if not features.has_tcx():
            self._settle([_NO_TCX])
            return
        if self._refused:
            self._settle([refusal(self._refused)])
            return
        with contextlib.closing(links.Notices()) as notices:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._listen(notices))
                await self._follow()

    async def _listen(self, notices: links.Notices) -> typing.NoReturn:
        while True:
            await notices.changed()
            self._wake.set()

    async def _follow(self) -> typing.NoReturn:
        pause_s: float | None = None
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
            self._wake.clear()
            if self._node_addresses is None:
                continue
            # In a thread: a driver may take its time to take an XDP program.
            async with self._writing.shared():
                reasons = await asyncio.to_thread(self.look, self._node_addresses)
            self._settle(reasons)
            pause_s = _RETRY_S if reasons else _CHECK_S

    def _settle(self, reasons: list[str]) -> None:
        for reason in reasons:
            if reason not in self.reasons:
                _log.warning("%s", reason)
        unserved = [reason for reason in reasons if reason not in self._absent]
        if (reasons, unserved) != (self.reasons, self._unserved):
            self.reasons, self._unserved = reasons, unserved
            self._report(reasons, unserved)
        self.settled.set()

    def look(self, node_addresses: tuple[bytes, ...]) -> list[str]:
        """Attach to what is there now; returns what is not as it should be."""
        try:
            found = links.look()
            # For good: it may be that nothing is tracked for a moment.
            if not self._choice.ports and links.ports_are_tracked():
                self._choice = self._choice._replace(ports=True)
            planned = devices.plan(found.links, found.default_routes, node_addresses, self._choice)
            reasons = self._missing(found, node_addresses)
            has_uplink = any(device.role is devices.Role.UPLINK for device in planned)
            self._absent = list(reasons) if has_uplink else []
            if not has_uplink and not reasons:
                reasons.append("no uplink: no device has a default route or an address of this node")
            # Before the programs: they ask for the row of the device that they run at.
            reasons += self._write_rows(planned)
            reasons += self._attach(planned)
        except OSError as error:
            return [f"cannot attach to devices: {error}"]
        return reasons

    def _missing(self, found: links.Found, node_addresses: tuple[bytes, ...]) -> list[str]:
        missing = devices.missing(found.links, self._choice)
        if not missing:
            return []
        # Not every device there is: pods come and go, and this line would with them.
        unnamed = self._choice._replace(uplinks=())
        others = devices.plan(found.links, found.default_routes, node_addresses, unnamed)
        likely = ", ".join(one.name for one in others if one.role is devices.Role.UPLINK)
        hint = f"; a default route or an address of this node is on {likely}" if likely else ""
        return [
            f"--device {name}: no such device{hint}; devices that are not named serve only what begins a "
            "flow, as for pods"
            for name in missing
        ]

    def _write_rows(self, planned: list[devices.Device]) -> list[str]:
        room = self._kernel.rows_of(tables.Table.DEVICES)
        writes = devices.writes(planned[:room], dict(self._kernel.rows(tables.Table.DEVICES)))
        try:
            self._kernel.apply(writes)
        except maps.MapWriteError as error:
            return [f"cannot write this node's devices: {error}"]
        if len(planned) > room:
            return [
                f"devices: {len(planned) - room} of {len(planned)} have no row: enlarge it with --map-rows"
            ]
        return []

    def _attach(self, planned: list[devices.Device]) -> list[str]:
        present = {device.ifindex: device for device in planned}
        self._no_xdp = {index: why for index, why in self._no_xdp.items() if index in present}
        self._told = {index: text for index, text in self._told.items() if index in present}
        wanted = [one for device in planned for one in self._wanted(device)]
        wanted.sort(key=lambda one: _ORDER[one.program])
        uplinks = {one for one in wanted if one.program == device_links.INGRESS[devices.Role.UPLINK]}
        if self.settled.is_set() and uplinks - self._attached:
            self._new_uplink()
        applied = self._datapath.attach(wanted)

        lost = [one for one in applied.added if one in self._attached]
        if lost:
            places = ", ".join(f"{one.program} at {present[one.ifindex].name}" for one in lost)
            _log.error("put back programs that were taken away: %s", places)
            self._put_back(len(lost))
        self._attached = frozenset(wanted) - applied.refused.keys()
        reasons = []
        for one, error in applied.refused.items():
            if one.program == device_links.XDP:
                self._no_xdp[one.ifindex] = _why(error)
            elif error.errno != errno.ENODEV:  # it has gone this moment
                reasons.append(f"cannot attach {one.program} to {present[one.ifindex].name}: {_why(error)}")
        for device in planned:
            self._tell(device)
        return reasons

    def _wanted(self, device: devices.Device) -> typing.Iterator[device_links.Attachment]:
        if device.role is not devices.Role.PORT:
            yield device_links.Attachment(device.ifindex, device_links.EGRESS)
        yield device_links.Attachment(device.ifindex, device_links.INGRESS[device.role])
        if device.role is devices.Role.UPLINK and self._xdp and device.ifindex not in self._no_xdp:
            yield device_links.Attachment(device.ifindex, device_links.XDP, self._xdp)

    def _tell(self, device: devices.Device) -> None:
        """Say once how a device is attached, and why so."""
        how = "tc"
        if device.role is devices.Role.UPLINK:
            why = self._no_xdp.get(device.ifindex)
            if why is not None:
                how = f"tc, as its driver takes no program in {self._xdp} XDP: {why}"
            else:
                how = f"tc and {self._xdp} XDP" if self._xdp else "tc, as --xdp is off"
        text = f"device {device.name}: {device.role} by {how}"
        if self._told.get(device.ifindex) != text:
            self._told[device.ifindex] = text
            _log.log(logging.DEBUG if device.role in _MANY else logging.INFO, "%s", text)


def _why(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
