"""What is pinned, in the words of whoever pinned it: sources, sizes, layouts.

Kept in a one-row map beside the other pins, so that the next version can tell
whether it may adopt the datapath, and translate rows whose layout has changed.
"""

import os
import typing

import msgspec

import lbproxy
from lbproxy import abi
from lbproxy.kernel import libbpf

PIN: typing.Final = "identity"
_SIZE: typing.Final = 1 << 16
_KEY: typing.Final = bytes(4)


class FieldOf(msgspec.Struct, frozen=True, array_like=True):
    """A field of a struct: offset and size in bytes."""

    name: str
    offset: int
    size: int


class Identity(msgspec.Struct, frozen=True, omit_defaults=True):
    """A datapath: equal fingerprints mean equal programs on equal maps."""

    fingerprint: str
    version: str
    abi_version: int
    cgroup: str
    sizes: dict[str, int]
    structs: dict[str, tuple[FieldOf, ...]] = {}
    maps: dict[str, tuple[str, str]] = {}  # name -> key and value type
    refused: str = ""  # why the kernel takes no program of the packet path: then there are none


def of_this_version(fingerprint: str, cgroup: str, sizes: typing.Mapping[str, int]) -> Identity:
    """The identity of a datapath that this version would make."""
    structs = {
        layout.name: tuple(FieldOf(f.name, f.offset, f.size) for f in layout.fields)
        for layout in abi.LAYOUTS.values()
    }
    return Identity(
        fingerprint,
        lbproxy.__version__,
        abi.constant("ABI_VERSION"),
        cgroup,
        dict(sizes),
        structs,
        {spec.name: (spec.key, spec.value) for spec in abi.MAPS.values()},
    )


def read(root: str | os.PathLike[str]) -> Identity | None:
    """The identity pinned in a folder; None where there is none or it can not be understood."""
    try:
        fd = libbpf.obj_get(f"{root}/{PIN}")
    except FileNotFoundError:
        return None
    try:
        row = libbpf.lookup(fd, _KEY, libbpf.map_info(fd).value_size) or b""
        return msgspec.json.decode(row.rstrip(b"\0"), type=Identity)
    except msgspec.DecodeError:
        return None
    finally:
        os.close(fd)


def write(root: str | os.PathLike[str], identity: Identity) -> None:
    """Pin an identity, in place of an earlier one: whoever is killed here leaves one of the two."""
    text = msgspec.json.encode(identity)
    path = f"{root}/{PIN}"
    pinned = os.path.exists(path)
    fd = libbpf.obj_get(path) if pinned else libbpf.map_create("array", "lb_identity", 4, _SIZE, 1, 0)
    try:
        libbpf.update(fd, _KEY, text.ljust(_SIZE, b"\0"))
        if not pinned:
            libbpf.obj_pin(fd, path)
    finally:
        os.close(fd)
