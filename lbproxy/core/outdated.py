"""Whether kube-proxy's rules in iptables are of what is served now, or an earlier kube-proxy has left them.

Rules that are years old are entered like new ones, and their counters move. But the names of its chains
are hashes of whose they are: of a service port, and of an endpoint with that
(`pkg/proxy/iptables/proxier.go`). So the rules of a kube-proxy that follows the cluster lead from the chains
of each port to endpoints that lbproxy knows, too; those of one that has gone do so until something changes.
"""

import base64
import collections
import hashlib
import itertools
import typing
from collections.abc import Iterable

from lbproxy.core import addresses, inventory, leftovers, model, tables

# Where the flows of a port to all endpoints go, and those to this node's.
_SERVICES: typing.Final = ("KUBE-SVC-", "KUBE-SVL-")
_ENDPOINT: typing.Final = "KUBE-SEP-"
_PER_HASH: typing.Final = 16


def ports(rows: inventory.Rows, family: model.Family) -> list[inventory.ServicePort]:
    """The service ports of a family for which some frontend has a backend."""
    found = inventory.read(rows).ports
    served = (port for port in found if port.key.family is family)
    return [port for port in served if any(frontend.slot_count for frontend in port.frontends)]


def outdated(
    rules: Iterable[leftovers.Rule], served: Iterable[inventory.ServicePort]
) -> dict[model.PortKey, frozenset[str]]:
    """Ports whose rules lead nowhere or to somebody unknown, and the endpoints' chains that they lead to."""
    leads = collections.defaultdict[str, set[str]](set)
    for rule in rules:
        if rule.chain.startswith(_SERVICES) and rule.target.startswith(_ENDPOINT):
            leads[rule.chain].add(rule.target)
    found = {}
    for port in served:
        whose = _name(port.key)
        to = frozenset(itertools.chain.from_iterable(leads[prefix + _hash(whose)] for prefix in _SERVICES))
        there = (one for one in port.backends if one.state is not tables.BackendState.DRAINING)
        known = {_ENDPOINT + _hash(whose + _place(one)) for one in there}
        if not to or to - known:
            found[port.key] = to
    return found


def _name(key: model.PortKey) -> str:
    """What the hashes of a port begin with: its name as kube-proxy logs it, and its protocol."""
    port_name = f":{key.port_name}" if key.port_name else ""
    return f"{key.service.namespace}/{key.service.name}{port_name}{key.protocol.name.lower()}"


def _place(backend: inventory.Backend) -> str:
    text = addresses.text(backend.address)
    return f"[{text}]:{backend.port}" if ":" in text else f"{text}:{backend.port}"


def _hash(text: str) -> str:
    return base64.b32encode(hashlib.sha256(text.encode()).digest())[:_PER_HASH].decode()
