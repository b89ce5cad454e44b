"""The few calls of libbpf.so.1 that the agent needs, through ctypes.

A process that imports bcc keeps 75 to 125 MB resident; one that opens pins
through libbpf keeps two. Every call raises OSError with the errno of the kernel.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import sys
import typing

SONAME: typing.Final = "libbpf.so.1"
_LIB = ctypes.CDLL(SONAME, use_errno=True)
_LIB.ring_buffer__new.restype = ctypes.c_void_p

MAP_TYPES: typing.Final = {
    "hash": 1, "array": 2, "prog": 3, "percpu_array": 6, "lru_hash": 9, "lpm_trie": 11,
    "array_of_maps": 12, "ringbuf": 27
}  # fmt: skip
PROG_TYPE_SCHED_CLS: typing.Final = 3
PROG_TYPE_XDP: typing.Final = 6
PROG_TYPE_CGROUP_SOCK: typing.Final = 9
PROG_TYPE_SOCK_OPS: typing.Final = 13
PROG_TYPE_CGROUP_SOCK_ADDR: typing.Final = 18

# enum bpf_attach_type, of those that go to devices.
XDP: typing.Final = 37
TCX_INGRESS: typing.Final = 46
TCX_EGRESS: typing.Final = 47

ANY: typing.Final = 0
NOEXIST: typing.Final = 1
NAME_LENGTH: typing.Final = 15  # of programs and maps, without the terminating zero
_BATCH_ROWS = 8192
_INSTRUCTION_BYTES = 8
_CONNECT4 = 10
_LOG_BYTES = 16 * 1024 * 1024
_MAPS_OF_A_PROGRAM = 64  # at most, says the kernel
_PROGRAMS_OF_A_HOOK = 64  # at most, says the kernel
_NO_DEVICE = 0x7FFFFFFF


class _MapInfo(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
        ("rest", ctypes.c_uint8 * 192),
    ]


class _ProgInfo(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("tag", ctypes.c_uint8 * 8),
        ("jited_prog_len", ctypes.c_uint32),
        ("xlated_prog_len", ctypes.c_uint32),
        ("jited_prog_insns", ctypes.c_uint64),
        ("xlated_prog_insns", ctypes.c_uint64),
        ("load_time", ctypes.c_uint64),
        ("created_by_uid", ctypes.c_uint32),
        ("nr_map_ids", ctypes.c_uint32),
        ("map_ids", ctypes.c_uint64),  # an address
        ("name", ctypes.c_char * 16),
        ("rest", ctypes.c_uint8 * 176),
    ]


class _CgroupLink(ctypes.Structure):
    _fields_ = [("cgroup_id", ctypes.c_uint64), ("attach_type", ctypes.c_uint32)]


class _Target(ctypes.Union):
    # TCX and XDP links both begin with the device.
    _fields_ = [("cgroup", _CgroupLink), ("ifindex", ctypes.c_uint32)]


class _LinkInfo(ctypes.Structure):
    # The kernel's union follows at offset 16: it has 64-bit members.
    _fields_ = [
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("prog_id", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("target", _Target),
        ("rest", ctypes.c_uint8 * 96),
    ]


class _LinkCreateOpts(ctypes.Structure):
    _fields_ = [
        ("sz", ctypes.c_size_t),
        ("flags", ctypes.c_uint32),
        ("iter_info", ctypes.c_void_p),
        ("iter_info_len", ctypes.c_uint32),
        ("target_btf_id", ctypes.c_uint32),
        ("rest", ctypes.c_uint64),
    ]


class _MapCreateOpts(ctypes.Structure):
    _fields_ = [
        ("sz", ctypes.c_size_t),
        ("btf_fd", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("map_extra", ctypes.c_uint64),
        ("numa_node", ctypes.c_uint32),
        ("map_ifindex", ctypes.c_uint32),
    ]


class MapInfo(typing.NamedTuple):
    """What the kernel says of a map; sizes in bytes."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


class ProgInfo(typing.NamedTuple):
    """What the kernel says of a program: its id, those of the maps that it uses, and its name."""

    id: int
    map_ids: frozenset[int]
    name: str = ""


class LinkInfo(typing.NamedTuple):
    """What the kernel says of a cgroup link."""

    id: int
    prog_id: int
    cgroup_id: int
    attach_type: int


class DeviceLinkInfo(typing.NamedTuple):
    """What the kernel says of a link to a device; `ifindex` is 0 once that is gone."""

    prog_id: int
    ifindex: int


def _check(result: int, step: str) -> int:
    if result < 0:
        number = ctypes.get_errno() or -result
        raise OSError(number, f"{step}: {os.strerror(number)}")
    return result


def obj_get(path: str) -> int:
    """Open a pinned object; returns its file descriptor."""
    return _check(_LIB.bpf_obj_get(path.encode()), f"open {path}")


def obj_pin(fd: int, path: str) -> None:
    """Pin an object at a path of a bpffs."""
    _check(_LIB.bpf_obj_pin(fd, path.encode()), f"pin {path}")


def map_create(
    kind: str, name: str, key_size: int, value_size: int, rows: int, flags: int, inner_fd: int = 0
) -> int:
    """Create a map; `kind` is a name of MAP_TYPES, `inner_fd` a map like those that it is to hold.

    Returns its file descriptor.
    """
    opts = _MapCreateOpts(sz=ctypes.sizeof(_MapCreateOpts), map_flags=flags, inner_map_fd=inner_fd)
    result = _LIB.bpf_map_create(
        MAP_TYPES[kind], name[:NAME_LENGTH].encode(), key_size, value_size, rows, ctypes.byref(opts)
    )
    return _check(result, f"create map {name} with {rows} rows")


def _info(fd: int, into: ctypes.Structure, what: str) -> None:
    size = ctypes.c_uint32(ctypes.sizeof(into))
    _check(_LIB.bpf_obj_get_info_by_fd(fd, ctypes.byref(into), ctypes.byref(size)), what)


def kind(fd: int) -> str:
    """What a descriptor is of: bpf-map, bpf-prog, bpf_link, or something else."""
    return os.readlink(f"/proc/self/fd/{fd}").removeprefix("anon_inode:")


def map_info(fd: int) -> MapInfo:
    """Ask the kernel what a map is."""
    info = _MapInfo()
    _info(fd, info, "read map info")
    return MapInfo(
        info.type,
        info.id,
        info.key_size,
        info.value_size,
        info.max_entries,
        info.map_flags,
        info.name.decode(),
    )


def prog_id(fd: int) -> int:
    """The kernel's id of a program."""
    return prog_info(fd).id


def prog_info(fd: int) -> ProgInfo:
    """Ask the kernel what a program is."""
    ids = (ctypes.c_uint32 * _MAPS_OF_A_PROGRAM)()
    info = _ProgInfo(nr_map_ids=_MAPS_OF_A_PROGRAM, map_ids=ctypes.addressof(ids))
    _info(fd, info, "read program info")
    return ProgInfo(int(info.id), frozenset(ids[: info.nr_map_ids]), info.name.decode(errors="replace"))


def prog_by_id(number: int) -> int:
    """Open a program that anybody has loaded; returns its file descriptor."""
    return _check(_LIB.bpf_prog_get_fd_by_id(number), f"open program {number}")


def map_by_id(number: int) -> int:
    """Open a map that anybody has made; returns its file descriptor."""
    return _check(_LIB.bpf_map_get_fd_by_id(number), f"open map {number}")


def attached(target: int, attach_type: int) -> tuple[int, list[int]]:
    """What is attached at one hook: the flags that it was attached with, and the programs' ids.

    `target` is a descriptor of a cgroup, whose ancestors' programs are not among them,
    or for TCX the index of a device.
    """
    count, flags = ctypes.c_uint32(_PROGRAMS_OF_A_HOOK), ctypes.c_uint32(0)
    ids = (ctypes.c_uint32 * _PROGRAMS_OF_A_HOOK)()
    result = _LIB.bpf_prog_query(target, attach_type, 0, ctypes.byref(flags), ids, ctypes.byref(count))
    _check(result, "ask what is attached")
    return flags.value, list(ids[: count.value])


def link_info(fd: int) -> LinkInfo:
    """What a cgroup link joins."""
    info = _LinkInfo()
    _info(fd, info, "read link info")
    group = info.target.cgroup
    return LinkInfo(info.id, info.prog_id, group.cgroup_id, group.attach_type)


class _ProgLoadOpts(ctypes.Structure):
    _fields_ = [
        ("sz", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_uint32),
        ("numbers", ctypes.c_uint32 * 7),
        ("fd_array", ctypes.c_void_p),
        ("func_info", ctypes.c_void_p),
        ("func_info_sizes", ctypes.c_uint32 * 2),
        ("line_info", ctypes.c_void_p),
        ("line_info_sizes", ctypes.c_uint32 * 2),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_void_p),
    ]


class RefusedError(OSError):
    """The kernel does not take a program; `log` is what the verifier said."""

    def __init__(self, number: int, name: str, log: str) -> None:
        super().__init__(number, f"load {name}: {os.strerror(number)}")
        self.log = log


def prog_load(kind: int, name: str, code: bytes, attach_type: int) -> int:
    """Load a program; returns its file descriptor. Raises RefusedError."""
    opts = _ProgLoadOpts(sz=ctypes.sizeof(_ProgLoadOpts), expected_attach_type=attach_type)
    short = name[:NAME_LENGTH].encode()
    count = ctypes.c_size_t(len(code) // _INSTRUCTION_BYTES)
    result = int(_LIB.bpf_prog_load(kind, short, b"GPL", code, count, ctypes.byref(opts)))
    if result >= 0:
        return result
    # Again, only to be told why: a log of all that the verifier does takes time.
    number = ctypes.get_errno()
    log = ctypes.create_string_buffer(_LOG_BYTES)
    opts.log_level, opts.log_size = 1, _LOG_BYTES
    opts.log_buf = ctypes.addressof(log)
    result = int(_LIB.bpf_prog_load(kind, short, b"GPL", code, count, ctypes.byref(opts)))
    if result >= 0:
        return result
    said = log.value.decode("ascii", "replace")
    raise RefusedError(number, name, f"{said}\n{name}: {os.strerror(number)}")


def device_link_info(fd: int) -> DeviceLinkInfo:
    """What a TCX or XDP link joins."""
    info = _LinkInfo()
    _info(fd, info, "read link info")
    return DeviceLinkInfo(info.prog_id, info.target.ifindex)


def link_create(prog_fd: int, target: int, attach_type: int, flags: int = 0) -> int:
    """Attach a program through a link; returns the link's file descriptor.

    `target` is a descriptor of a cgroup, or the index of a device.
    """
    opts = _LinkCreateOpts(sz=ctypes.sizeof(_LinkCreateOpts), flags=flags)
    result = _LIB.bpf_link_create(prog_fd, target, attach_type, ctypes.byref(opts))
    return _check(result, "attach program")


BEFORE: typing.Final = 1 << 3
AFTER: typing.Final = 1 << 4
_RELATIVE_TO_LINK = 1 << 13
_LINK_CREATE = 28


class _DeviceLinkAttr(ctypes.Structure):
    # union bpf_attr of BPF_LINK_CREATE, as far as TCX uses it. libbpf knows that from 1.3 on.
    _fields_ = [
        ("prog_fd", ctypes.c_uint32),
        ("ifindex", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("relative_fd", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("expected_revision", ctypes.c_uint64),
    ]


def link_beside(prog_fd: int, ifindex: int, attach_type: int, side: int, link_fd: int) -> int:
    """Attach a program to a device just BEFORE or AFTER that of another link; returns the link."""
    attr = _DeviceLinkAttr(
        prog_fd=prog_fd,
        ifindex=ifindex,
        attach_type=attach_type,
        flags=side | _RELATIVE_TO_LINK,
        relative_fd=link_fd,
    )
    number = _BPF_SYSCALL.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, "attach program: the number of bpf(2) is not known on this machine")
    return _check(
        _LIBC.syscall(number, _LINK_CREATE, ctypes.byref(attr), ctypes.sizeof(attr)), "attach program"
    )


_BPF_SYSCALL: typing.Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
_LIBC = ctypes.CDLL(None, use_errno=True)
_ON_RECORD = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Ring:
    """The reading end of a ring buffer."""

    def __init__(self, fd: int) -> None:
        self._records: list[bytes] = []

        def keep(_context: int | None, data: int, size: int) -> int:
            self._records.append(ctypes.string_at(data, size))
            return 0

        # Held on to: libbpf calls it for as long as the ring lives.
        self._keep = _ON_RECORD(keep)
        self._ring = ctypes.c_void_p(_LIB.ring_buffer__new(fd, self._keep, None, None))
        if not self._ring:
            raise OSError(ctypes.get_errno(), "read ring buffer")

    def poll(self, timeout_s: float) -> list[bytes]:
        """What has come, after at most so long a wait."""
        result = _LIB.ring_buffer__poll(self._ring, int(timeout_s * 1000))
        if -result != errno.EINTR:
            _check(result, "read ring buffer")
        return self._taken()

    def rest(self) -> list[bytes]:
        """What has come already. Unlike `poll` it does not depend on anybody having been woken for it."""
        _check(_LIB.ring_buffer__consume(self._ring), "read ring buffer")
        return self._taken()

    def _taken(self) -> list[bytes]:
        found, self._records[:] = list(self._records), []
        return found

    def close(self) -> None:
        """Read no more."""
        _LIB.ring_buffer__free(self._ring)


def link_detach(link_fd: int) -> None:
    """Take a link's program from its hook at once; unpinned it would go in a while."""
    _check(_LIB.bpf_link_detach(link_fd), "detach program")


def link_update(link_fd: int, prog_fd: int) -> None:
    """Replace a link's program, atomically for whoever runs it."""
    _check(_LIB.bpf_link_update(link_fd, prog_fd, None), "replace program")


def update(fd: int, key: bytes, value: bytes, flags: int = ANY) -> None:
    """Write one row."""
    _check(_LIB.bpf_map_update_elem(fd, key, value, ctypes.c_uint64(flags)), "update map")


def lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """Read one row, or None where there is none."""
    value = ctypes.create_string_buffer(value_size)
    result = _LIB.bpf_map_lookup_elem(fd, key, value)
    if result < 0 and ctypes.get_errno() == errno.ENOENT:
        return None
    _check(result, "look up map")
    return value.raw


def delete(fd: int, key: bytes) -> bool:
    """Delete one row; False where there was none."""
    result = _LIB.bpf_map_delete_elem(fd, key)
    if result < 0 and ctypes.get_errno() == errno.ENOENT:
        return False
    _check(result, "delete from map")
    return True


def take(
    fd: int,
    keys: typing.Iterable[bytes],
    value_size: int,
    unless: typing.Callable[[bytes, bytes], bool],
) -> int:
    """Delete rows of a hash map, but those of which `unless` says of key and value that they stay.

    Returns how many went. One that a program writes between the look at it and its
    removal is put back, unless it has been written once more: then that row stands.
    """
    value = ctypes.create_string_buffer(value_size)
    taken = 0
    for key in keys:
        if not _found(_LIB.bpf_map_lookup_elem(fd, key, value), "look up map"):
            continue
        seen = value.raw
        if unless(key, seen):
            continue
        if not _found(_LIB.bpf_map_lookup_and_delete_elem(fd, key, value), "take from map"):
            continue
        row = value.raw
        if row != seen and unless(key, row):
            with contextlib.suppress(FileExistsError):
                update(fd, key, row, NOEXIST)
        else:
            taken += 1
    return taken


def _found(result: int, step: str) -> bool:
    if result < 0 and ctypes.get_errno() == errno.ENOENT:
        return False
    _check(result, step)
    return True


def update_batch(fd: int, keys: bytes, values: bytes, count: int) -> int:
    """Write `count` rows in order; returns how many were written, which is all of them.

    Raises BatchError at the first row that the kernel refuses; those before it are in the map.
    """
    done = ctypes.c_uint32(count)
    result = _LIB.bpf_map_update_batch(fd, keys, values, ctypes.byref(done), None)
    if result < 0:
        number = ctypes.get_errno() or -result
        raise BatchError(number, done.value if number != errno.EFAULT else 0)
    return done.value


def insert_all(fd: int, keys: bytes, values: bytes, key_size: int) -> list[int]:
    """Write those of these rows whose keys have none; returns which. No batch of the kernel's does that."""
    count = len(keys) // key_size
    if not count:
        return []
    value_size = len(values) // count
    key_at, value_at = (ctypes.cast(ctypes.c_char_p(of), ctypes.c_void_p).value or 0 for of in (keys, values))
    inserted = []
    for row in range(count):
        if _INSERT(fd, key_at + row * key_size, value_at + row * value_size, NOEXIST) == 0:
            inserted.append(row)
        elif ctypes.get_errno() != errno.EEXIST:
            _check(-1, "insert into map")
    return inserted


# Unlike the others, it is given addresses.
_INSERT: typing.Final = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, use_errno=True
)(("bpf_map_update_elem", _LIB))


def wait_for_programs() -> None:
    """Return when every program that runs now, on any CPU, has ended: the kernel's RCU grace period.

    A write to a map of maps returns only then, so that whoever changes such a map knows that nobody uses
    the old one any more (maybe_wait_bpf_programs in kernel/bpf/syscall.c; since Linux 4.20).
    """
    with contextlib.ExitStack() as stack:
        inner = map_create("array", "waiting", 4, 4, 1, 0)
        stack.callback(os.close, inner)
        outer = map_create("array_of_maps", "waiting", 4, 4, 1, 0, inner)
        stack.callback(os.close, outer)
        update(outer, bytes(4), inner.to_bytes(4, sys.byteorder))


class BatchError(OSError):
    """A batch stopped part way; `rows_written` rows before the failing one are in the map."""

    def __init__(self, number: int, rows_written: int) -> None:
        super().__init__(number, f"update map: {os.strerror(number)}")
        self.rows_written = rows_written


def dump(fd: int, info: MapInfo) -> typing.Iterator[tuple[bytes, bytes]]:
    """Every row of a hash map or trie as (key, value); rows that come or go meanwhile may be missed."""
    if info.type == MAP_TYPES["lpm_trie"]:
        yield from _dump_trie(fd, info)
        return
    key_size, value_size = info.key_size, info.value_size
    for keys, values in batches(fd, info):
        for row in range(len(keys) // key_size):
            yield (
                keys[row * key_size : (row + 1) * key_size],
                values[row * value_size : (row + 1) * value_size],
            )


def _dump_trie(fd: int, info: MapInfo) -> typing.Iterator[tuple[bytes, bytes]]:
    """Row by row: not every kernel reads tries in batches."""
    seen: set[bytes] = set()
    key = None
    while (key := _next_key(fd, key, info.key_size)) is not None:
        if key in seen:
            # The row before was removed meanwhile, and the kernel has begun anew.
            return
        seen.add(key)
        # The longest match of a row's own key is that row, or once that is gone a shorter one.
        value = lookup(fd, key, info.value_size)
        if value is not None:
            yield key, value


def _next_key(fd: int, key: bytes | None, key_size: int) -> bytes | None:
    following = ctypes.create_string_buffer(key_size)
    result = _LIB.bpf_map_get_next_key(fd, key, following)
    if result < 0 and ctypes.get_errno() == errno.ENOENT:
        return None
    _check(result, "walk map")
    return following.raw


class Batch(typing.NamedTuple):
    """Some rows of a hash map: keys and values, each joined in the same order, and where the next begin."""

    keys: bytes
    values: bytes
    position: bytes | None  # None: there are no more


def batch(fd: int, info: MapInfo, rows: int = _BATCH_ROWS, position: bytes | None = None) -> Batch:
    """About so many rows of a hash map, from the beginning or from where others ended."""
    rows = min(rows, info.max_entries)
    while True:
        keys = ctypes.create_string_buffer(info.key_size * rows)
        values = ctypes.create_string_buffer(info.value_size * rows)
        # The position is a bucket number, whatever the key's size.
        following = ctypes.create_string_buffer(max(info.key_size, 8))
        count = ctypes.c_uint32(rows)
        result = _LIB.bpf_map_lookup_batch(fd, position, following, keys, values, ctypes.byref(count), None)
        number = ctypes.get_errno() if result < 0 else 0
        if number == errno.ENOSPC and rows < info.max_entries:
            # One bucket holds more rows than the buffers: once more with larger ones.
            rows = min(rows * 4, info.max_entries)
            continue
        if number not in (0, errno.ENOENT):
            raise OSError(number, f"dump map {info.name}: {os.strerror(number)}")
        return Batch(
            ctypes.string_at(keys, count.value * info.key_size),
            ctypes.string_at(values, count.value * info.value_size),
            None if number == errno.ENOENT else following.raw,
        )


def batches(fd: int, info: MapInfo, rows: int = _BATCH_ROWS) -> typing.Iterator[tuple[bytes, bytes]]:
    """The keys and values of a hash map, each joined in the same order, about so many rows at a time."""
    position: bytes | None = None
    while True:
        keys, values, position = batch(fd, info, rows, position)
        yield keys, values
        if position is None:
            return


def dump_array(fd: int, info: MapInfo) -> typing.Iterator[tuple[bytes, bytes]]:
    """Every row of a mmapable array that is not all zero, as (key, value).

    Mapped only for as long as it is read: the kernel counts every page of a mapping
    to the process, but looking the rows up, even in batches, takes seven times as long.
    """
    size = info.value_size
    stride = -(-size // 8) * 8
    length = -(-stride * info.max_entries // mmap.PAGESIZE) * mmap.PAGESIZE
    empty = bytes(size)
    with mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
        for first in range(0, info.max_entries, _BATCH_ROWS):
            last = min(first + _BATCH_ROWS, info.max_entries)
            piece = memory[first * stride : last * stride]
            if piece.count(0) == len(piece):
                continue
            for number in range(first, last):
                start = (number - first) * stride
                row = piece[start : start + size]
                if row != empty:
                    yield number.to_bytes(4, sys.byteorder), row


def probe_prog_type(prog_type: int) -> bool | None:
    """Whether the kernel has a program type; None where that could not be found out."""
    return _probed(_LIB.libbpf_probe_bpf_prog_type(prog_type, None))


def probe_helper(prog_type: int, helper: int) -> bool | None:
    """Whether programs of a type may call a helper; None where that could not be found out."""
    return _probed(_LIB.libbpf_probe_bpf_helper(prog_type, helper, None))


def probe_device_hook(attach_type: int) -> bool:
    """Whether devices have a TCX hook: the kernel then says that this device does not exist."""
    count = ctypes.c_uint32(0)
    result = _LIB.bpf_prog_query(_NO_DEVICE, attach_type, 0, None, None, ctypes.byref(count))
    return result < 0 and ctypes.get_errno() == errno.ENODEV


def probe_map(kind: str, key_size: int, value_size: int, flags: int) -> bool | None:
    """Whether the kernel makes such a map; None where it does not let us try."""
    try:
        os.close(map_create(kind, "lb_probe", key_size, value_size, 1, flags))
    except OSError as error:
        return None if error.errno in (errno.EPERM, errno.ENOMEM) else False
    return True


def probe_batches() -> bool | None:
    """Whether maps are read many rows at a time: an empty one then says that there are no more."""
    try:
        fd = map_create("hash", "lb_probe", 4, 4, 1, 0)
    except OSError:
        return None
    try:
        count, buffer = ctypes.c_uint32(1), ctypes.create_string_buffer(8)
        result = _LIB.bpf_map_lookup_batch(fd, None, buffer, buffer, buffer, ctypes.byref(count), None)
        return result == 0 or ctypes.get_errno() == errno.ENOENT
    finally:
        os.close(fd)


def probe_links() -> bool:
    """Whether programs are attached through links: the kernel then says that there is no such program."""
    opts = _LinkCreateOpts(sz=ctypes.sizeof(_LinkCreateOpts))
    result = _LIB.bpf_link_create(-1, -1, _CONNECT4, ctypes.byref(opts))
    return result < 0 and ctypes.get_errno() == errno.EBADF


def _probed(result: int) -> bool | None:
    return None if result < 0 else result == 1


def _silence(_level: int, _format: bytes, _arguments: ctypes.c_void_p) -> int:
    return 0


# libbpf prints its own diagnostics to stderr; ours name the step and say what to do.
_PRINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_silence)
_LIB.libbpf_set_print(_PRINT)
