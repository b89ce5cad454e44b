"""The few calls of libbpf.so.1 that the agent needs, through ctypes: those about maps, programs and links.

A process that imports bcc keeps 75 to 125 MB resident; one that opens pins
through libbpf keeps two. Every call raises OSError with the errno of the kernel.
"""

import ctypes
import errno
import os
import typing

SONAME: typing.Final = "libbpf.so.1"
LIB = ctypes.CDLL(SONAME, use_errno=True)

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

NAME_LENGTH: typing.Final = 15  # of programs and maps, without the terminating zero
_INSTRUCTION_BYTES = 8
_LOG_BYTES = 16 * 1024 * 1024
_MAPS_OF_A_PROGRAM = 64  # at most, says the kernel
_PROGRAMS_OF_A_HOOK = 64  # at most, says the kernel


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


class LinkCreateOpts(ctypes.Structure):
    """struct bpf_link_create_opts, as far as it is used."""

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


def check(result: int, step: str) -> int:
    """The result of a call that did not fail. Raises OSError, which says at which step."""
    if result < 0:
        number = ctypes.get_errno() or -result
        raise OSError(number, f"{step}: {os.strerror(number)}")
    return result


def obj_get(path: str) -> int:
    """Open a pinned object; returns its file descriptor."""
    return check(LIB.bpf_obj_get(path.encode()), f"open {path}")


def obj_pin(fd: int, path: str) -> None:
    """Pin an object at a path of a bpffs."""
    check(LIB.bpf_obj_pin(fd, path.encode()), f"pin {path}")


def map_create(
    kind: str, name: str, key_size: int, value_size: int, rows: int, flags: int, inner_fd: int = 0
) -> int:
    """Create a map; `kind` is a name of MAP_TYPES, `inner_fd` a map like those that it is to hold.

    Returns its file descriptor.
    """
    opts = _MapCreateOpts(sz=ctypes.sizeof(_MapCreateOpts), map_flags=flags, inner_map_fd=inner_fd)
    result = LIB.bpf_map_create(
        MAP_TYPES[kind], name[:NAME_LENGTH].encode(), key_size, value_size, rows, ctypes.byref(opts)
    )
    return check(result, f"create map {name} with {rows} rows")


def _info(fd: int, into: ctypes.Structure, what: str) -> None:
    size = ctypes.c_uint32(ctypes.sizeof(into))
    check(LIB.bpf_obj_get_info_by_fd(fd, ctypes.byref(into), ctypes.byref(size)), what)


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
    return check(LIB.bpf_prog_get_fd_by_id(number), f"open program {number}")


def map_by_id(number: int) -> int:
    """Open a map that anybody has made; returns its file descriptor."""
    return check(LIB.bpf_map_get_fd_by_id(number), f"open map {number}")


def attached(target: int, attach_type: int) -> tuple[int, list[int]]:
    """What is attached at one hook: the flags that it was attached with, and the programs' ids.

    `target` is a descriptor of a cgroup, whose ancestors' programs are not among them,
    or for TCX the index of a device.
    """
    count, flags = ctypes.c_uint32(_PROGRAMS_OF_A_HOOK), ctypes.c_uint32(0)
    ids = (ctypes.c_uint32 * _PROGRAMS_OF_A_HOOK)()
    result = LIB.bpf_prog_query(target, attach_type, 0, ctypes.byref(flags), ids, ctypes.byref(count))
    check(result, "ask what is attached")
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
    result = int(LIB.bpf_prog_load(kind, short, b"GPL", code, count, ctypes.byref(opts)))
    if result >= 0:
        return result
    # Again, only to be told why: a log of all that the verifier does takes time.
    number = ctypes.get_errno()
    log = ctypes.create_string_buffer(_LOG_BYTES)
    opts.log_level, opts.log_size = 1, _LOG_BYTES
    opts.log_buf = ctypes.addressof(log)
    result = int(LIB.bpf_prog_load(kind, short, b"GPL", code, count, ctypes.byref(opts)))
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
    opts = LinkCreateOpts(sz=ctypes.sizeof(LinkCreateOpts), flags=flags)
    result = LIB.bpf_link_create(prog_fd, target, attach_type, ctypes.byref(opts))
    return check(result, "attach program")


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
    return check(
        LIBC.syscall(number, _LINK_CREATE, ctypes.byref(attr), ctypes.sizeof(attr)), "attach program"
    )


_BPF_SYSCALL: typing.Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
LIBC = ctypes.CDLL(None, use_errno=True)


def link_detach(link_fd: int) -> None:
    """Take a link's program from its hook at once; unpinned it would go in a while."""
    check(LIB.bpf_link_detach(link_fd), "detach program")


def link_update(link_fd: int, prog_fd: int) -> None:
    """Replace a link's program, atomically for whoever runs it."""
    check(LIB.bpf_link_update(link_fd, prog_fd, None), "replace program")


def _silence(_level: int, _format: bytes, _arguments: ctypes.c_void_p) -> int:
    return 0


# libbpf prints its own diagnostics to stderr; ours name the step and say what to do.
_PRINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_silence)
LIB.libbpf_set_print(_PRINT)
