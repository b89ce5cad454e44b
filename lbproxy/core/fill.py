"""How full each map is, what it holds, and which are worth a warning.

Rows are counted as their writers see them. An array has no row count of its own,
and one that is given back is not cleared everywhere: slots are in use while a
frontend leads to them, a socket's row while it holds a cookie.
"""

import typing

from lbproxy import abi
from lbproxy.core import inventory, tables

HOLDS: typing.Final = {
    "frontends": "addresses and ports that clients dial",
    "slots": "tables that a backend is drawn from, in blocks of 16 slots",
    "backends": "addresses and ports that answer",
    "backend_stats": "connections of each backend",
    "backend_load": "connections opened and closed, of backends of services with least-connections",
    "load_corrections": "what those counts differ by from what was found open",
    "backend_health": "how this node's connections to each backend fare",
    "service_stats": "connections and refusals of each service port",
    "services": "names and policies of service ports",
    "localities": "nodes and zones that backends are in",
    "node_addresses": "this node's addresses, and whether they serve NodePorts",
    "settings": "what the programs must know of this node",
    "counters": "what went wrong, by reason",
    "sockets": "what each open socket was translated to",
    "socket_spill": "further translations of sockets; the oldest gives way when full",
    "affinity": "clients and the backend they stay with; the oldest gives way when full",
    "flows": "flows that the packet path translates, a row for each direction and end",
    "flows_new": "new flows while flows is full of unanswered ones; the oldest gives way when full",
    "fragments": "ports of fragmented datagrams; the oldest gives way when full",
    "devices": "this node's devices, and whom flows leaving there are masqueraded as",
    "source_ranges": "who may use load balancer IPs that are restricted",
    "netns_addresses": "source addresses of pods, for the restriction of load balancer IPs",
    "tunnel_ends": "backends of this node that DSR may reach from other nodes",
    "earlier_slots": "slot tables that DSR frontends drew from before their last change",
    "scratch": "what a packet program works with while it runs",
    "unassured": "how many rows of flows are of flows whose client has not answered yet",
    "handover": "who begins flows while another proxy's are taken over, or given back",
    "no_flows": "between which addresses no flow has a row, so that none is looked up",
    "no_frontends": "which addresses and NodePorts are no frontend's, so that none is looked up",
    "ticks": "the time, as the packet programs have read it last",
}
"""What a map holds, in a few words."""

WARN_AT: typing.Final = 0.8
# Whatever does not fit into one of these is not served, but for what _LOST has.
MUST_NOT_FILL: typing.Final = (
    "frontends",
    "slots",
    "backends",
    "services",
    "localities",
    "node_addresses",
    "flows",
    "devices",
    "source_ranges",
    "tunnel_ends",
    "netns_addresses",
    "backend_health",
)
_ONE_A_ROW_OF: typing.Final = {
    "backend_stats": "backends",
    "backend_load": "backends",
    "load_corrections": "backends",
    "service_stats": "services",
}
_LOST: typing.Final = {
    "flows": "what does not fit goes to flows_new, where the oldest is forgotten",
    "backend_health": "of further backends nobody knows how their connections fare",
}
# Ids and blocks are handed out from 1 on: 0 stands for none.
_WITHOUT_ROW_0: typing.Final = frozenset({"slots", "backends", "services", "localities", *_ONE_A_ROW_OF})
_FIXED: typing.Final = frozenset(
    {"settings", "counters", "unassured", "ticks", "scratch", "handover", "no_flows", "no_frontends"}
)
_COOKIE: typing.Final = slice(0, 8)
_NO_COOKIE: typing.Final = bytes(8)


def used(rows: inventory.Rows, table: str) -> int:
    """How many rows of a map are in use."""
    if table == "slots":
        return _blocks(rows)
    if table == "sockets":
        return sum(1 for _, row in rows.rows(table) if row[_COOKIE] != _NO_COOKIE)
    if table == "counters":
        return len(inventory.COUNTERS)
    if table == "scratch":
        return 0  # whatever it holds is nobody's
    # A row of counts belongs to a backend or service port, whether anything was counted or not.
    return sum(1 for _ in rows.rows(_ONE_A_ROW_OF.get(table, table)))


def all_used(rows: inventory.Rows) -> dict[str, int]:
    """How many rows of every map are in use."""
    return {name: used(rows, name) for name in abi.MAPS}


def usable_rows(table: str, rows: int) -> int:
    """How many of a map's rows can be in use."""
    return rows - 1 if table in _WITHOUT_ROW_0 else rows


def may_fill(table: str) -> bool:
    """Whether a map fills up as services come; the others have one size for good."""
    return table not in _FIXED


def warnings(used_rows: typing.Mapping[str, int], rows_of: typing.Callable[[str], int]) -> list[str]:
    """A line for each map that is nearly full and must not be; `rows_of` tells all rows of a map."""
    lines = []
    for name in MUST_NOT_FILL:
        count, capacity = used_rows[name], usable_rows(name, rows_of(name))
        if count >= WARN_AT * capacity:
            percent = 100 * count / capacity if capacity else 100
            what = _LOST.get(name, "what does not fit is not served")
            lost = f", and {what}" if count >= capacity else ""
            lines.append(
                f"the {name} table is {percent:.0f} % full ({count} of {capacity} rows){lost}: "
                f"raise it with --map-rows {name}=N"
            )
    return lines


def _blocks(rows: inventory.Rows) -> int:
    """The blocks that frontends lead to, or did before; frontends of one set share theirs."""
    extents = {
        (value.block, value.slot_count)
        for value in (tables.frontend(row) for _, row in rows.rows(tables.Table.FRONTENDS))
        if value.slot_count
    }
    extents |= {tables.earlier(row) for _, row in rows.rows(tables.Table.EARLIER_SLOTS)}
    return sum(-(-slot_count // tables.SLOTS_PER_BLOCK) for _, slot_count in extents)
