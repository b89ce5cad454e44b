"""A flow that the packet path knows: its row where it comes in, found as programs find it, and in words."""

import typing

from lbproxy import abi
from lbproxy.core import addresses, flows, inventory, listing, tables

_INGRESS: typing.Final = 0
_TICK_SHIFT: typing.Final = abi.constant("TICK_SHIFT")


class Ends(typing.NamedTuple):
    """Who sends, to whom; addresses of 16 bytes."""

    source: bytes
    source_port: int
    destination: bytes
    port: int
    protocol: int


def find(rows: inventory.Rows, ends: Ends, settings: tables.Settings, now_s: float) -> tables.Flow | None:
    """The row of the direction that began the flow, while it is not idle for too long; else None.

    `now_s` is the monotonic clock.
    """
    ports = (ends.source_port.to_bytes(2, "big"), ends.port.to_bytes(2, "big"))
    key = tables.FlowKey(ends.source, ends.destination, *ports, ends.protocol, _INGRESS)
    for table in (tables.Table.FLOWS, tables.Table.FLOWS_NEW):
        packed = rows.row(table, key.pack())
        if packed is None:
            continue
        row = tables.flow(packed)
        limit = flows.timeout_ticks(settings, ends.protocol, row.state)
        idle = (int(now_s * 1e9) >> _TICK_SHIFT) - row.seen
        if row.state & tables.FlowState.ORIGINAL and (idle <= limit or not limit):
            return row
    return None


def is_held(row: tables.Flow) -> bool:
    """Whether another proxy has begun it, and goes on with it."""
    return row.state & tables.FlowState.HELD == tables.FlowState.HELD


def place(row: tables.Flow) -> str:
    """Where it leads."""
    return listing.place(addresses.text(row.addr), int.from_bytes(row.dport, "big"))


def in_words(row: tables.Flow, protocol: int, settings: tables.Settings) -> str:
    """What its row says."""
    limit = flows.timeout_ticks(settings, protocol, row.state)
    kept = f"forgotten when it is idle for {limit} s or so"
    if is_held(row):
        return f"held: another proxy has begun it and goes on with it; {kept}"
    state = tables.FlowState(row.state)
    said = [f"to {place(row)}"]
    if state & tables.FlowState.TUNNEL:
        said.append("inside another packet")
    if state & tables.FlowState.MASQUERADED:
        said.append("masqueraded")
    if state & tables.FlowState.RESET:
        said.append("reset")
    elif state & (tables.FlowState.FIN | tables.FlowState.PEER_FIN):
        both = state & tables.FlowState.FIN and state & tables.FlowState.PEER_FIN
        said.append("closed" if both else "closed by one side")
    elif state & tables.FlowState.ASSURED:
        said.append("open")
    else:
        said.append("answered" if state & tables.FlowState.REPLIED else "not answered yet")
    return f"{', '.join(said)}; {kept}"
