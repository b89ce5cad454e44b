"""One generation of the datapath: its maps, the programs that use them, and what both are.

    maps/NAME   programs/NAME   identity

A generation is made once and then serves or is removed; nothing is exchanged
inside it. A map that still fits is pinned in the next generation as well. What
uses what is asked of the kernel: a file that is there proves nothing.
"""

import contextlib
import os
import pathlib
import shutil
import typing

from lbproxy import abi
from lbproxy.kernel import identity, libbpf, programs

TAILS: typing.Final = abi.MapSpec(abi.TAILS, "prog", "__u32", "__u32", 4, 4, "", 0)
CARRIED: typing.Final = "carried"  # which socket records an interrupted upgrade had copied


class Generation:
    """The pins in one folder; the folder of all pins shows those of the current generation."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.maps_dir = folder / "maps"
        self.programs_dir = folder / "programs"

    def make(self, identity_: identity.Identity) -> None:
        """Create an empty one that says what it is going to be."""
        for folder in (self.folder, self.maps_dir, self.programs_dir):
            folder.mkdir()
        identity.write(self.folder, identity_)

    def identity(self) -> identity.Identity | None:
        """What it is, in the words of whoever made it; None where that can not be understood."""
        return identity.read(self.folder)

    def map_ids(self) -> dict[str, int]:
        """The kernel's ids of the pinned maps, by name."""
        ids = {}
        for path in _pins(self.maps_dir):
            with opened(path) as fd:
                ids[path.name] = libbpf.map_info(fd).id
        return ids

    def programs(self) -> dict[str, libbpf.ProgInfo]:
        """What the kernel says of the pinned programs, by name."""
        found = {}
        for path in _pins(self.programs_dir):
            with opened(path) as fd:
                found[path.name] = libbpf.prog_info(fd)
        return found

    def remove_misplaced(self) -> list[str]:
        """Remove what is pinned as a map or program and is none; returns the names.

        What the kernel says of them would be taken for what it says of the others.
        """
        removed = []
        for folder, kind in ((self.maps_dir, "bpf-map"), (self.programs_dir, "bpf-prog")):
            for path in _pins(folder):
                with opened(path) as fd:
                    misplaced = libbpf.kind(fd) != kind
                if misplaced:
                    path.unlink()
                    removed.append(path.name)
        return removed

    def strangers(self) -> list[str]:
        """The programs that use maps other than the pinned ones."""
        pinned = set(self.map_ids().values())
        return sorted(name for name, info in self.programs().items() if not pinned.issuperset(info.map_ids))

    def is_whole(self) -> bool:
        """Whether all maps and programs of this version are here, and the programs use these maps.

        But for programs that the kernel has refused: with equal sources it would refuse them again.
        """
        known = self.identity()
        wanted = programs.SOCKET if known is not None and known.refused else programs.of_this_kernel()
        return (
            abi.MAPS.keys() | {abi.TAILS} <= self.map_ids().keys()
            and {program.name for program in wanted} <= self.programs().keys()
            and not self.strangers()
        )


def create(folder: pathlib.Path, spec: abi.MapSpec, rows: int) -> None:
    """Create a map and pin it under its name."""
    fd = libbpf.map_create(spec.type, spec.name, spec.key_size, spec.value_size, rows, spec.flags)
    try:
        libbpf.obj_pin(fd, str(folder / spec.name))
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened(path: pathlib.Path) -> typing.Iterator[int]:
    """A descriptor of a pinned object. Raises OSError."""
    fd = libbpf.obj_get(str(path))
    try:
        yield fd
    finally:
        os.close(fd)


def remove(path: pathlib.Path) -> None:
    """Remove a pin, a symbolic link or a folder of pins, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _pins(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
