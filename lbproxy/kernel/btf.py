"""Where this kernel has the fields of its structs, as it describes them itself (BTF)."""

import ctypes
import functools
import typing

from lbproxy.kernel import libbpf

_STRUCT: typing.Final = 4  # BTF_KIND_STRUCT
_OFFSET_BITS: typing.Final = 0xFFFFFF  # of a member, where the rest is the width of a bit field
_BTF_BITS: typing.Final = 0x80000000


class _Type(ctypes.Structure):
    _fields_ = [("name", ctypes.c_uint32), ("info", ctypes.c_uint32), ("size", ctypes.c_uint32)]


class _Member(ctypes.Structure):
    _fields_ = [("name", ctypes.c_uint32), ("type", ctypes.c_uint32), ("offset", ctypes.c_uint32)]


@functools.cache
def offset(struct: str, field: str) -> int | None:
    """The offset of a struct's own field in bytes; None where this kernel does not say it.

    Takes some 20 ms: the description of the whole kernel is read for it.
    """
    lib = ctypes.CDLL(libbpf.SONAME)
    for name in ("btf__load_vmlinux_btf", "btf__type_by_id", "btf__name_by_offset"):
        getattr(lib, name).restype = ctypes.c_void_p
    described = lib.btf__load_vmlinux_btf()
    # An error may be a small negative number in place of a pointer.
    if not described or described > ctypes.c_size_t(-4096).value:
        return None
    try:
        return _find(lib, ctypes.c_void_p(described), struct, field)
    finally:
        lib.btf__free(ctypes.c_void_p(described))


def _find(lib: ctypes.CDLL, described: ctypes.c_void_p, struct: str, field: str) -> int | None:
    number = int(lib.btf__find_by_name_kind(described, struct.encode(), _STRUCT))
    if number <= 0:
        return None
    at = int(lib.btf__type_by_id(described, ctypes.c_uint32(number)))
    found = _Type.from_address(at)
    members = (_Member * (found.info & 0xFFFF)).from_address(at + ctypes.sizeof(_Type))
    for member in members:
        name = lib.btf__name_by_offset(described, ctypes.c_uint32(member.name))
        if ctypes.string_at(name) == field.encode():
            bits = member.offset & _OFFSET_BITS if found.info & _BTF_BITS else member.offset
            return int(bits) // 8
    return None
