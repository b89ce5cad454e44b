"""Whose a BPF program is, told by its name and by the maps that it uses: nobody signs them."""

import typing
from collections.abc import Iterable

CILIUM: typing.Final = "Cilium"
CALICO: typing.Final = "Calico eBPF"
LBPROXY: typing.Final = "lbproxy"
SYSTEMD: typing.Final = "systemd"

_BY_NAME: typing.Final = (("cil_", CILIUM), ("cali", CALICO), ("sd_", SYSTEMD))
_BY_MAP: typing.Final = (("cilium_", CILIUM), ("cali_", CALICO))
# Of lbproxy's maps those with names that nobody else may be expected to have two of.
_OURS: typing.Final = frozenset(
    {"backend_stats", "flows", "flows_new", "frontends", "service_stats", "slots", "socket_spill", "sockets"}
    | {"ticks", "tunnel_ends", "unassured"}
)


def owner(name: str, maps: Iterable[str]) -> str:
    """Name the owner of a program; empty where it is nobody's that is known."""
    used = frozenset(maps)
    if len(used & _OURS) > 1:
        return LBPROXY
    for prefix, whose in _BY_NAME:
        if name.startswith(prefix):
            return whose
    return next((whose for prefix, whose in _BY_MAP if any(one.startswith(prefix) for one in used)), "")
