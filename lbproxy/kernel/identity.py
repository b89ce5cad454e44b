"""What is pinned, in the words of whoever pinned it: sources, sizes, layouts.

Kept in a one-row map beside the other pins, so that the next version can tell
whether it may adopt the datapath, and translate rows whose layout has changed.
"""

import contextlib
import os
import typing

import msgspec

import lbproxy
from lbproxy import abi
from lbproxy.kernel import one_row

PIN: typing.Final = "identity"
_SIZE: typing.Final = 1 << 16


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
    row = one_row.read(f"{root}/{PIN}")
    if row is None:
        return None
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.decode(row.rstrip(b"\0"), type=Identity)
    return None


def write(root: str | os.PathLike[str], identity: Identity) -> None:
    """Pin an identity, in place of an earlier one: whoever is killed here leaves one of the two."""
    one_row.write(f"{root}/{PIN}", "lb_identity", _SIZE, msgspec.json.encode(identity))
