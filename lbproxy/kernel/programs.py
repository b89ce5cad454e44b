"""The BPF programs: what each is called, which hook it goes to, and which source file holds them."""

import functools
import typing

from lbproxy.kernel import features, libbpf

SOURCE: typing.Final = "lb.c"


class Program(typing.NamedTuple):
    """One program; `attach_type` is the kernel's enum bpf_attach_type."""

    name: str
    type: int
    attach_type: int

    @property
    def function(self) -> str:
        """The C function."""
        return f"lb_{self.name}"


_ADDR = libbpf.PROG_TYPE_CGROUP_SOCK_ADDR
_TC = libbpf.PROG_TYPE_SCHED_CLS

# In order of attaching: the way back exists before connect() can send anyone there.
SOCKET: typing.Final = (
    Program("sock_release", libbpf.PROG_TYPE_CGROUP_SOCK, 34),
    Program("recvmsg4", _ADDR, 19),
    Program("recvmsg6", _ADDR, 20),
    Program("getpeername4", _ADDR, 29),
    Program("getpeername6", _ADDR, 30),
    Program("sendmsg4", _ADDR, 14),
    Program("sendmsg6", _ADDR, 15),
    Program("connect4", _ADDR, 10),
    Program("connect6", _ADDR, 11),
    Program("sock_health", libbpf.PROG_TYPE_SOCK_OPS, 3),
)
# The same: what leaves is translated back before anything that comes in is translated.
PACKET: typing.Final = (
    Program("tc_to_any", _TC, libbpf.TCX_EGRESS),
    Program("tc_from_inside", _TC, libbpf.TCX_INGRESS),
    Program("tc_from_port", _TC, libbpf.TCX_INGRESS),
    Program("tc_from_outside", _TC, libbpf.TCX_INGRESS),
    Program("xdp_from_outside", libbpf.PROG_TYPE_XDP, libbpf.XDP),
)
# What those in tc go on with by a tail call: in the order of the LB_TAIL_ numbers. They are
# loaded for no hook in particular, as their callers are: the kernel wants both to be alike.
TAILS: typing.Final = (
    Program("tc_open", _TC, 0),
    Program("tc_tunnel", _TC, 0),
    Program("tc_answer", _TC, 0),
    Program("tc_icmp_error", _TC, 0),
    Program("tc_untunnel", _TC, 0),
    Program("tc_untunnelled", _TC, 0),
)
PROGRAMS: typing.Final = (*SOCKET, *TAILS, *PACKET)


@functools.cache
def of_this_kernel() -> tuple[Program, ...]:
    """Those that this kernel can attach: the others are not loaded, and need not load."""
    return PROGRAMS if features.has_tcx() else SOCKET
