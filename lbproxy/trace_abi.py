"""What the observers of `lbproxy trace` and the command share, read from bpf/trace_abi.h at import."""

import typing

from lbproxy import abi

CONSTANTS: typing.Final = abi.constants("trace_abi.h")
LAYOUTS: typing.Final = abi.layouts("trace_abi.h")
EVENT: typing.Final = LAYOUTS["trace_event"]
CPU: typing.Final = LAYOUTS["trace_cpu"]
FILTER: typing.Final = LAYOUTS["trace_filter"]


def constant(name: str) -> int:
    """The value of `#define LB_TRACE_<name>`. Raises KeyError."""
    return CONSTANTS[f"LB_TRACE_{name}"]


class OwnMap(typing.NamedTuple):
    """A map of the observers' own: type, key and value size in bytes, rows."""

    type: str
    key_size: int
    value_size: int
    rows: int


# As bpf/trace.c declares them. They are never pinned, and go with the process.
MAPS: typing.Final = {
    "trace_filter": OwnMap("array", 4, FILTER.size, 1),
    "trace_services": OwnMap("hash", 4, 4, constant("SERVICE_ROWS")),
    "trace_netns": OwnMap("hash", 8, 4, constant("NETNS_ROWS")),
    "trace_flows": OwnMap(
        "lru_hash", LAYOUTS["trace_tuple"].size, LAYOUTS["trace_flow"].size, constant("FLOW_ROWS")
    ),
    "trace_sockets": OwnMap("lru_hash", 8, LAYOUTS["trace_socket"].size, constant("SOCKET_ROWS")),
    "trace_cpus": OwnMap("percpu_array", 4, CPU.size, 1),
    "trace_events": OwnMap("ringbuf", 0, 0, constant("RING_PAGES") * 4096),
}


def assertions() -> str:
    """C that fails to compile where the compiler lays a struct out otherwise."""
    return abi.assertions_of(LAYOUTS.values())
