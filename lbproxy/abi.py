"""What C and Python share, read from bpf/abi.h and bpf/maps.h at import.

The headers own every layout, constant and map; nothing here repeats them. A
struct becomes a `Layout`: its fields in order, and pack and unpack between a
dict-free tuple and bytes. `assertions()` gives the C compiler what this module
derived, so that a wrong reading of the header fails the build of the programs.

Integers are in the machine's byte order; `__be16` stays bytes in network order
(2 of them) and arrays of `__be32` or `__u8` are bytes.
"""

import collections.abc
import functools
import pathlib
import re
import struct
import typing

_SIZES = {"__u8": "B", "__u16": "H", "__u32": "I", "__u64": "Q", "__be16": "2s", "__be32": "4s"}
_SCALAR_BYTES = {"__u8": 1, "__u16": 2, "__u32": 4, "__u64": 8, "__be16": 2, "__be32": 4}
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_DEFINE = re.compile(r"^#define (LB_\w+) (0x[0-9a-fA-F]+|\d+)\s*$", re.MULTILINE)
_STRUCT = re.compile(r"^struct (\w+) \{\n(.*?)^\};", re.DOTALL | re.MULTILINE)
_FIELD = re.compile(r"^\t(\w+) (\w+)(?:\[(\d+)\])?;\s*$")
_MAP = re.compile(r'LB_MAP\("(\w+)",\s*(?:struct )?(\w+),\s*(?:struct )?(\w+),\s*(\w+),\s*(\w+),\s*(\w+)\)')


TAILS: typing.Final = "tails"  # the array of tail calls: programs, not rows, and each generation's own
FLOWS_BEFORE: typing.Final = "flows_before"  # another generation's `flows`, while flows are moved out of it


def source_dir() -> pathlib.Path:
    """The folder of the BPF sources: inside an installed package, else beside it in a checkout."""
    here = pathlib.Path(__file__).resolve().parent
    inside = here / "bpf"
    return inside if inside.is_dir() else here.parent / "bpf"


class Field(typing.NamedTuple):
    """One member of a struct: offset and size in bytes, `code` as struct.Struct wants it."""

    name: str
    offset: int
    size: int
    code: str


class Layout:
    """A C struct: its size in bytes and its fields, with padding fields left out of the tuples.

    `pack` makes the bytes of a row out of the values of `names`, in order; `unpack` goes
    the other way. A start packs and unpacks a hundred thousand rows: both are struct's own.
    """

    pack: collections.abc.Callable[..., bytes]
    unpack: collections.abc.Callable[[bytes | memoryview], tuple[typing.Any, ...]]

    def __init__(self, name: str, fields: tuple[Field, ...]) -> None:
        self.name = name
        self.fields = fields
        self.size = fields[-1].offset + fields[-1].size
        codes = struct.Struct("=" + "".join(f.code for f in fields))
        self.pack, self.unpack = codes.pack, codes.unpack
        self.names = tuple(f.name for f in fields if not f.name.startswith("pad"))
        self._index = {name: position for position, name in enumerate(self.names)}

    def offset(self, field: str) -> int:
        """The offset of a field in bytes."""
        return next(f.offset for f in self.fields if f.name == field)


class MapSpec(typing.NamedTuple):
    """A map as bpf/maps.h declares it; `rows` is the constant that sizes it, or a number."""

    name: str
    type: str
    key: str
    value: str
    key_size: int
    value_size: int
    rows: str
    flags: int


def _parse_struct(name: str, body: str) -> Layout:
    fields: list[Field] = []
    offset = 0
    for line in body.splitlines():
        if not line.strip():
            continue
        match = _FIELD.match(line)
        if match is None:
            raise ValueError(f"bpf/abi.h: struct {name}: cannot read {line.strip()!r}")
        kind, field, count = match.group(1), match.group(2), match.group(3)
        size = _SCALAR_BYTES[kind] * int(count or 1)
        if field.startswith("pad"):
            code = f"{size}x"
        elif count is None:
            code = _SIZES[kind]
        elif kind in ("__u8", "__be32"):
            code = f"{size}s"
        else:
            code = f"{count}{_SIZES[kind]}"
        fields.append(Field(field, offset, size, code))
        offset += size
    return Layout(name, tuple(fields))


def _read(name: str) -> str:
    return _COMMENT.sub("", (source_dir() / name).read_text(encoding="ascii"))


def constants(*headers: str) -> dict[str, int]:
    """What headers of this grammar define, by name."""
    text = "\n".join(re.sub(r"[ \t]+$", "", _read(name), flags=re.MULTILINE) for name in headers)
    return {name: int(value, 0) for name, value in _DEFINE.findall(text)}


def layouts(header: str) -> dict[str, Layout]:
    """The structs of a header of this grammar, by name."""
    text = re.sub(r"[ \t]+$", "", _read(header), flags=re.MULTILINE)
    return {name: _parse_struct(name, body) for name, body in _STRUCT.findall(text)}


CONSTANTS: typing.Final[dict[str, int]] = constants("abi.h", "maps.h")
LAYOUTS: typing.Final[dict[str, Layout]] = layouts("abi.h")


def _size_of(c_type: str) -> int:
    return LAYOUTS[c_type].size if c_type in LAYOUTS else _SCALAR_BYTES[c_type]


def _parse_map(declared: tuple[str, ...]) -> MapSpec:
    kind, key, value, name, rows, flags = declared
    flag_bits = CONSTANTS[flags] if flags in CONSTANTS else int(flags, 0)
    return MapSpec(name, kind, key, value, _size_of(key), _size_of(value), rows, flag_bits)


MAPS: typing.Final[dict[str, MapSpec]] = {
    spec.name: spec
    for spec in (_parse_map(found) for found in _MAP.findall(re.sub(r"\s*\n\s*", " ", _read("maps.h"))))
}


def constant(name: str) -> int:
    """The value of `#define LB_<name>`.

    Raises KeyError at import of whoever uses it where the header has no such name.
    """
    return CONSTANTS[f"LB_{name}"]


def map_rows(spec: MapSpec, sizes: typing.Mapping[str, int]) -> int:
    """How many rows a map gets: `sizes` maps names such as 'frontends' to rows.

    The kernel gives each CPU as many rows of a map that has a list for each: it may be a few more.
    """
    if spec.rows.startswith("LB_ROWS_"):
        rows = sizes[spec.rows.removeprefix("LB_ROWS_").lower()]
    else:
        rows = CONSTANTS[spec.rows] if spec.rows in CONSTANTS else int(spec.rows)
    return -(-rows // possible_cpus()) * possible_cpus() if spec.flags & constant("NO_COMMON_LRU") else rows


@functools.cache
def possible_cpus() -> int:
    """How many CPUs this machine may ever have, as the kernel counts them: `0-3,8` are five."""
    ranges = pathlib.Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")
    ends = [[int(end) for end in each.split("-")] for each in ranges]
    return sum(end[-1] - end[0] + 1 for end in ends)


def row_names() -> tuple[str, ...]:
    """The names of the sizes that configuration has to give, such as 'frontends'."""
    rows = dict.fromkeys(spec.rows for spec in MAPS.values() if spec.rows.startswith("LB_ROWS_"))
    return tuple(name.removeprefix("LB_ROWS_").lower() for name in rows)


@functools.cache
def assertions() -> str:
    """C that fails to compile where the compiler lays a struct out otherwise than this module read it."""
    return assertions_of(LAYOUTS.values())


def assertions_of(read: typing.Iterable[Layout]) -> str:
    """The same, of some structs."""
    lines = []
    for layout in read:
        lines.append(f'_Static_assert(sizeof(struct {layout.name}) == {layout.size}, "{layout.name}");')
        for field in layout.fields:
            where = f"__builtin_offsetof(struct {layout.name}, {field.name})"
            lines.append(f'_Static_assert({where} == {field.offset}, "{layout.name}.{field.name}");')
    return "\n".join(lines) + "\n"
