"""What this kernel can do, found out by trying."""

import ctypes
import errno
import os

from lbproxy.kernel import libbpf

_NO_DEVICE = 0x7FFFFFFF
_CONNECT4 = 10


def prog_type(kind: int) -> bool | None:
    """Whether the kernel has a program type; None where that could not be found out."""
    return _probed(libbpf.LIB.libbpf_probe_bpf_prog_type(kind, None))


def helper(kind: int, number: int) -> bool | None:
    """Whether programs of a type may call a helper; None where that could not be found out."""
    return _probed(libbpf.LIB.libbpf_probe_bpf_helper(kind, number, None))


def device_hook(attach_type: int) -> bool:
    """Whether devices have a TCX hook: the kernel then says that this device does not exist."""
    count = ctypes.c_uint32(0)
    result = libbpf.LIB.bpf_prog_query(_NO_DEVICE, attach_type, 0, None, None, ctypes.byref(count))
    return result < 0 and ctypes.get_errno() == errno.ENODEV


def map_kind(kind: str, key_size: int, value_size: int, flags: int) -> bool | None:
    """Whether the kernel makes such a map; None where it does not let us try."""
    try:
        os.close(libbpf.map_create(kind, "lb_probe", key_size, value_size, 1, flags))
    except OSError as error:
        return None if error.errno in (errno.EPERM, errno.ENOMEM) else False
    return True


def batches() -> bool | None:
    """Whether maps are read many rows at a time: an empty one then says that there are no more."""
    try:
        fd = libbpf.map_create("hash", "lb_probe", 4, 4, 1, 0)
    except OSError:
        return None
    try:
        count, buffer = ctypes.c_uint32(1), ctypes.create_string_buffer(8)
        result = libbpf.LIB.bpf_map_lookup_batch(fd, None, buffer, buffer, buffer, ctypes.byref(count), None)
        return result == 0 or ctypes.get_errno() == errno.ENOENT
    finally:
        os.close(fd)


def links() -> bool:
    """Whether programs are attached through links: the kernel then says that there is no such program."""
    opts = libbpf.LinkCreateOpts(sz=ctypes.sizeof(libbpf.LinkCreateOpts))
    result = libbpf.LIB.bpf_link_create(-1, -1, _CONNECT4, ctypes.byref(opts))
    return result < 0 and ctypes.get_errno() == errno.EBADF


def _probed(result: int) -> bool | None:
    return None if result < 0 else result == 1
