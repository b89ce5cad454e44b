"""The links that hold the programs of the packet path at devices.

Pinned beside those of the socket path, as links/device_IFINDEX_PROGRAM, an XDP
program's with the mode it is attached in. The name says what is meant to run there,
so that whoever starts next, or makes an upgrade, need not know of the plan that led
to it: each link is given the program of that name in one step. A link outlives its
device, but does nothing any more.
"""

import contextlib
import errno
import os
import pathlib
import re
import typing

from lbproxy.core import devices
from lbproxy.kernel import generation, libbpf, programs

# Which program is for what.
INGRESS: typing.Final = {
    devices.Role.UPLINK: "tc_from_outside",
    devices.Role.POD: "tc_from_inside",
    devices.Role.INSIDE: "tc_from_inside",
    devices.Role.PORT: "tc_from_port",
}
EGRESS: typing.Final = "tc_to_any"
XDP: typing.Final = "xdp_from_outside"

NATIVE: typing.Final = "native"
GENERIC: typing.Final = "generic"
_XDP_FLAGS: typing.Final = {"": 0, GENERIC: 1 << 1, NATIVE: 1 << 2}
_PACKET: typing.Final = {program.name: program for program in programs.PACKET}
_NAME = re.compile(rf"device_(\d+)_({'|'.join(_PACKET)})(?:_({NATIVE}|{GENERIC}))?")


class Attachment(typing.NamedTuple):
    """A program at a device; `mode` is NATIVE or GENERIC for XDP, else empty."""

    ifindex: int
    program: str
    mode: str = ""

    @property
    def pin(self) -> str:
        """The name of its link."""
        return f"device_{self.ifindex}_{self.program}" + (f"_{self.mode}" if self.mode else "")

    @property
    def place(self) -> tuple[int, int, str]:
        """The device, the attach type and the mode: one link can hold one program or another there."""
        return self.ifindex, _PACKET[self.program].attach_type, self.mode


class Held(typing.NamedTuple):
    """A pinned link, and what it holds."""

    attachment: Attachment
    info: libbpf.DeviceLinkInfo

    @property
    def alive(self) -> bool:
        """Whether its device is still there."""
        return self.info.ifindex == self.attachment.ifindex


class Applied(typing.NamedTuple):
    """What was attached and detached, and what a device would not take."""

    added: list[Attachment]
    removed: list[Attachment]
    refused: dict[Attachment, OSError]


def named(pin: str) -> Attachment | None:
    """What a pin's name says; None where it is not a device's."""
    match = _NAME.fullmatch(pin)
    return Attachment(int(match[1]), match[2], match[3] or "") if match else None


class DeviceLinks:
    """The links to devices in one folder."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder

    def held(self) -> list[Held]:
        """Every link to a device, dead ones included. Raises OSError."""
        found = []
        for path in sorted(self._folder.iterdir()):
            if attachment := named(path.name):
                # A reader looks while an agent removes.
                with contextlib.suppress(FileNotFoundError), generation.opened(path) as fd:
                    found.append(Held(attachment, libbpf.device_link_info(fd)))
        return found

    def switch(self, wanted: generation.Generation) -> None:
        """Give every link its program of a generation, in the place of an earlier one's.

        Where that has none at all for devices, they get none: an earlier one's would go on by
        tables that nobody keeps up to date.
        """
        if not any((wanted.programs_dir / name).exists() for name in _PACKET):
            for held in self.held():
                self._remove(held)
        for held in self.held():
            path = wanted.programs_dir / held.attachment.program
            # A dead link takes no program, and one of another version may be unknown to this one.
            if held.alive and path.exists():
                with generation.opened(path) as prog_fd:
                    self._give(held, prog_fd)

    def apply(self, wanted: typing.Iterable[Attachment], serving: generation.Generation) -> Applied:
        """Have these programs of a generation at these devices, and none elsewhere.

        A device that refuses its program is told of, and keeps nobody else from theirs.
        Raises OSError where the pins themselves are the matter.
        """
        at_hook = {one.place: one for one in wanted}
        kept, removed = {}, []
        for held in self.held():
            if held.alive and held.attachment.place in at_hook:
                kept[held.attachment.place] = held
                continue
            self._remove(held)
            if held.alive:
                removed.append(held.attachment)
        added, refused = [], {}
        with contextlib.ExitStack() as stack:
            names = {one.program for one in at_hook.values()}
            fds = {
                name: stack.enter_context(generation.opened(serving.programs_dir / name)) for name in names
            }
            for place, one in at_hook.items():
                try:
                    if place in kept:
                        self._adopt(kept[place], one, fds[one.program])
                    else:
                        self._attach(one, fds[one.program])
                        added.append(one)
                except OSError as error:
                    refused[one] = error
        return Applied(added, removed, refused)

    def _adopt(self, held: Held, wanted: Attachment, prog_fd: int) -> None:
        # The name first: it says what to switch to where this process ends in between.
        if held.attachment != wanted:
            (self._folder / held.attachment.pin).rename(self._folder / wanted.pin)
        self._give(Held(wanted, held.info), prog_fd)

    def _attach(self, wanted: Attachment, prog_fd: int) -> None:
        attach_type = _PACKET[wanted.program].attach_type
        link_fd = libbpf.link_create(prog_fd, wanted.ifindex, attach_type, _XDP_FLAGS[wanted.mode])
        try:
            libbpf.obj_pin(link_fd, str(self._folder / wanted.pin))
        finally:
            os.close(link_fd)

    def _give(self, held: Held, prog_fd: int) -> None:
        if held.info.prog_id == libbpf.prog_id(prog_fd):
            return
        with generation.opened(self._folder / held.attachment.pin) as link_fd:
            try:
                libbpf.link_update(link_fd, prog_fd)
            except OSError as error:
                # The device has gone this moment.
                if error.errno != errno.ENOLINK:
                    raise

    def _remove(self, held: Held) -> None:
        path = self._folder / held.attachment.pin
        if held.alive:
            with generation.opened(path) as link_fd:
                libbpf.link_detach(link_fd)
        path.unlink()
