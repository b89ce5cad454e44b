"""Compiled programs, apart from the maps that they use; kept in a folder from one start to the next.

BPF bytecode is the same for every kernel and machine. All that ties it to this node
are the descriptors of its maps and an offset in a struct of the kernel, which are put in when
it is loaded. What makes a copy
the right one is its name: a hash of the source text, the flags, the compiler, the
headers that it reads and the sizes, which are part of the text.

An installed package may carry compiled programs of its own sources (`shipped`, made by
`shipping`), so that a node needs no compiler. Which headers and compiler made them is
not in their names.

The kernel is to run them: nobody else may have written them, nor may anybody lead us
elsewhere. So the folder must be ours alone to write, and is opened once.
"""

import base64
import contextlib
import hashlib
import json
import os
import pathlib
import platform
import re
import secrets
import stat
import struct
import sys
import time
import typing

from lbproxy import abi

_INSTRUCTION: typing.Final = struct.Struct("=BBhi")
_LOAD_64: typing.Final = 0x18
_LOAD_32: typing.Final = 0x61  # of 32 bits, from where a register points
_MOVE_32: typing.Final = 0xB4  # a number into a register
_MOVE_64: typing.Final = 0xB7
_SK_ERR: typing.Final = abi.constant("SK_ERR")
_MAP_FD: typing.Final = 1  # BPF_PSEUDO_MAP_FD, the source register of such a load
_PIN: typing.Final = re.compile(r'^#define LB_PIN_(\w+) "(.*)"$', re.MULTILINE)
_MAP: typing.Final = re.compile(r'^LB_MAP\("[^;]*;', re.MULTILINE)
_ROWS: typing.Final = re.compile(r"^#define (LB_ROWS_\w+) \d+\n", re.MULTILINE)
_SHIPPED: typing.Final = "compiled"
_PREFIX: typing.Final = "bytecode-"
_DRAFT: typing.Final = f".{_PREFIX}"
_KEPT: typing.Final = 16
_STALE_S: typing.Final = 3600.0  # of a draft: whoever wrote it has been killed
_LIBRARIES: typing.Final = ("libbcc.so*", "libLLVM*.so*", "libclang-cpp.so*")
# What the compiler reads of the system's headers: the package's own list of what is in its files, where
# there is one, else what comes with every version of them.
_SYSTEM_HEADERS: typing.Final = ("/usr/include/linux/bpf.h", "/usr/include/linux/version.h")
_HEADER_LISTS: typing.Final = "/var/lib/dpkg/info"


class Program(typing.NamedTuple):
    """Bytecode whose loads of maps are blank; `uses` names the map of each, by instruction."""

    code: bytes
    uses: dict[int, str]


Programs = dict[str, Program]


def encode(programs: Programs) -> str:
    """Programs as a line of text."""
    return json.dumps(
        {name: (base64.b64encode(one.code).decode(), one.uses) for name, one in programs.items()}
    )


def decode(text: str | bytes) -> Programs:
    """Programs out of such a line. Raises ValueError, and others, where it is none."""
    return {
        name: Program(base64.b64decode(code, validate=True), {int(at): use for at, use in uses.items()})
        for name, (code, uses) in json.loads(text).items()
    }


def unlinked(code: bytes, maps: typing.Mapping[int, str]) -> Program:
    """Blank the descriptors of maps in bytecode; `maps` says whose they are."""
    blank = bytearray(code)
    uses = {}
    for at in range(0, len(code), _INSTRUCTION.size):
        op, registers, _, fd = _INSTRUCTION.unpack_from(code, at)
        if op == _LOAD_64 and _source(registers) == _MAP_FD:
            uses[at // _INSTRUCTION.size] = maps[fd]
            blank[at + 4 : at + 8] = bytes(4)
    return Program(bytes(blank), uses)


def linked(program: Program, fds: typing.Mapping[str, int]) -> bytes:
    """Bytecode with the descriptors of these maps."""
    code = bytearray(program.code)
    for number, name in program.uses.items():
        at = number * _INSTRUCTION.size
        code[at + 4 : at + 8] = fds[name].to_bytes(4, sys.byteorder)
    return bytes(code)


def with_sk_err(code: bytes, offset: int | None) -> bytes:
    """Bytecode that reads sk_err of struct sock where this kernel has it; None: it reads 0 instead."""
    made = bytearray(code)
    for at in range(0, len(code), _INSTRUCTION.size):
        op, registers, place, _ = _INSTRUCTION.unpack_from(code, at)
        if op != _LOAD_32 or place != _SK_ERR:
            continue
        if offset is None:
            _INSTRUCTION.pack_into(made, at, _MOVE_32, _target(registers), 0, 0)
        else:
            _INSTRUCTION.pack_into(made, at, op, registers, offset, 0)
    return bytes(made)


def with_numbers(code: bytes, numbers: typing.Mapping[int, int]) -> bytes:
    """Bytecode with these numbers, of 31 bits, in the places of those that stand for them."""
    made = bytearray(code)
    for at in range(0, len(code), _INSTRUCTION.size):
        op, registers, place, number = _INSTRUCTION.unpack_from(code, at)
        if op == _MOVE_64 and number in numbers:
            _INSTRUCTION.pack_into(made, at, op, registers, place, numbers[number])
    return bytes(made)


def _target(registers: int) -> int:
    return registers & 0xF if sys.byteorder == "little" else registers & 0xF0


def _source(registers: int) -> int:
    return registers >> 4 if sys.byteorder == "little" else registers & 0xF


def pinned_maps(source: str) -> dict[str, str]:
    """Where the maps are pinned that a source text uses, by name."""
    return dict(_PIN.findall(source))


def key(source: str, functions: typing.Iterable[str], flags: typing.Iterable[str]) -> str:
    """What names a compiled source, wherever its maps are pinned and however large they are."""
    parts = (_sizeless(_PIN.sub("", source)), *sorted(functions), *flags, *_compiler(), platform.machine())
    return _digest((*(part.encode() for part in parts), *_headers()))


def shipped_key(source: str, flags: typing.Iterable[str]) -> str:
    """What names a source that was compiled elsewhere: sizes that only maps have do not matter."""
    body = _sizeless(_MAP.sub("", _PIN.sub("", source)))
    return _digest(part.encode() for part in (body, *flags, platform.machine()))


def _sizeless(source: str) -> str:
    """A source without the sizes that only its maps have: a program does not know of those."""
    body = _MAP.sub("", source)

    def needed(rows: re.Match[str]) -> str:
        return rows[0] if len(re.findall(rf"\b{rows[1]}\b", body)) > 1 else ""

    return _ROWS.sub(needed, source)


def _digest(parts: typing.Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def shipped_dir() -> pathlib.Path:
    """Where a package has its compiled programs: beside their sources, and trusted like them."""
    return abi.source_dir() / _SHIPPED


def shipped(name: str) -> Programs | None:
    """What came with this package under a key; None where nothing did."""
    try:
        return decode((shipped_dir() / f"{name}.json").read_bytes())
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _compiler() -> typing.Iterator[str]:
    """The libraries that compile. An update may leave their names as they are, but not all of the rest."""
    found = {
        os.path.realpath(path)
        for pattern in _LIBRARIES
        for path in pathlib.Path("/usr/lib").glob(f"*/{pattern}")
    }
    for path in sorted(found):
        with contextlib.suppress(OSError):
            status = os.stat(path)
            yield f"{path} {status.st_size} {status.st_mtime_ns}"


def _headers() -> typing.Iterator[bytes]:
    """What is in the headers beside the source."""
    shims = abi.source_dir() / "headers"
    system = (
        *map(pathlib.Path, _SYSTEM_HEADERS),
        *pathlib.Path(_HEADER_LISTS).glob("linux-libc-dev*.md5sums"),
    )
    for path in (*sorted(shims.rglob("*.h")), *sorted(system)):
        name = path.relative_to(shims) if path.is_relative_to(shims) else path
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            yield str(name).encode()
            yield content


def folder() -> pathlib.Path | None:
    """Where compiled programs are kept; None where this user has no place for such things."""
    with contextlib.suppress(RuntimeError):
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        return pathlib.Path(base) / "lbproxy"
    return None


def read(name: str) -> Programs | None:
    """What was kept under a key; None where there is nothing that can be trusted."""
    try:
        with _opened() as where, open(_open(f"{_PREFIX}{name}.json", os.O_RDONLY, where), "rb") as file:
            if not _is_ours_alone(os.fstat(file.fileno())):
                return None
            programs = decode(file.read())
            with contextlib.suppress(OSError):
                os.utime(file.fileno())  # used now: others go first
            return programs
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def write(name: str, programs: Programs) -> None:
    """Keep programs for the next start, where that is possible; those not used for longest go."""
    with contextlib.suppress(OSError), _opened(create=True) as where:
        draft = f"{_DRAFT}{name}.{secrets.token_hex(8)}"
        try:
            descriptor = _open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, where)
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(encode(programs))
            os.replace(draft, f"{_PREFIX}{name}.json", src_dir_fd=where, dst_dir_fd=where)
        except OSError:
            _remove(draft, where)
            raise
        for old in sorted(_names(where, _PREFIX), key=lambda one: _written(one, where))[:-_KEPT]:
            _remove(old, where)
        for old in _names(where, _DRAFT):
            if _written(old, where) < time.time() - _STALE_S:
                _remove(old, where)


def forget() -> int:
    """Remove all that was kept; returns how many copies there were."""
    with contextlib.suppress(OSError), _opened() as where:
        found = _names(where, _PREFIX)
        for name in (*found, *_names(where, _DRAFT)):
            _remove(name, where)
        return len(found)
    return 0


@contextlib.contextmanager
def _opened(*, create: bool = False) -> typing.Iterator[int]:
    """A descriptor of the folder. Raises OSError where there is none, or where others may write to it."""
    path = folder()
    if path is None:
        raise FileNotFoundError
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    where = _open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not _is_ours_alone(os.fstat(where)):
            raise PermissionError
        yield where
    finally:
        os.close(where)


def _open(path: str | pathlib.Path, flags: int, where: int | None = None) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=where)


def _is_ours_alone(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _names(where: int, prefix: str) -> list[str]:
    return [name for name in os.listdir(where) if name.startswith(prefix)]


def _written(name: str, where: int) -> float:
    try:
        return os.stat(name, dir_fd=where, follow_symlinks=False).st_mtime
    except FileNotFoundError:
        return 0


def _remove(name: str, where: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=where)
