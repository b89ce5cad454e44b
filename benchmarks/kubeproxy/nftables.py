"""What kube-proxy 1.36 hands to `nft -f -` in nftables mode. Pure.

    full     a table `ip kube-proxy` or `ip6 kube-proxy`, at its start
    update   a change of some services: their chains, and what differs in sets and maps
    sweep    the chains that an update has emptied, a second or more later

A packet of a new connection is looked up in a map by address, protocol and port, and
goes to its service's chain, one rule of which draws an endpoint and translates.
Nothing here is the real thing's overhead: before an update it lists the whole table,
which takes longer than all else (`load.Rules.read_back`).
"""

import base64
import collections.abc
import hashlib

from benchmarks.kubeproxy import model

Ports = collections.abc.Sequence[model.ServicePort]
Order = collections.abc.Sequence[int] | None


_BASE_CHAINS = (
    ("filter-prerouting-pre-dnat", "filter", "prerouting", -110),
    ("filter-output-pre-dnat", "filter", "output", -110),
    ("filter-input", "filter", "input", 0),
    ("filter-forward", "filter", "forward", 0),
    ("filter-output", "filter", "output", 0),
    ("nat-prerouting", "nat", "prerouting", -100),
    ("nat-output", "nat", "output", -100),
    ("nat-postrouting", "nat", "postrouting", 100),
)
_NEW = "ct state new "
_JUMPS = (
    ("filter-input", _NEW, "nodeport-endpoints-check"),
    ("filter-input", _NEW, "service-endpoints-check"),
    ("filter-forward", _NEW, "service-endpoints-check"),
    ("filter-output", _NEW, "service-endpoints-check"),
    ("filter-prerouting-pre-dnat", _NEW, "firewall-check"),
    ("filter-output-pre-dnat", _NEW, "firewall-check"),
    ("nat-output", "", "services"),
    ("nat-prerouting", "", "services"),
    ("nat-postrouting", "", "masquerading"),
    ("filter-forward", _NEW, "cluster-ips-check"),
    ("filter-output", _NEW, "cluster-ips-check"),
)
# ADDR becomes the type of the family's addresses.
_AT_SERVICE = "ADDR . inet_proto . inet_service"
_SETS = (
    ("hairpin-connections", f"ADDR . {_AT_SERVICE}", "service hairpin connections"),
    ("cluster-ips", "ADDR", "Active ClusterIPs"),
    ("nodeport-ips", "ADDR", "IPs that accept NodePort traffic"),
)
_MAPS = (
    ("no-endpoint-services", _AT_SERVICE, "vmap to drop or reject packets to services with no endpoints"),
    (
        "no-endpoint-nodeports",
        "inet_proto . inet_service",
        "vmap to drop or reject packets to service nodeports with no endpoints",
    ),
    ("firewall-ips", _AT_SERVICE, "destinations that are subject to LoadBalancerSourceRanges"),
    ("service-ips", _AT_SERVICE, "ClusterIP, ExternalIP and LoadBalancer IP traffic"),
    ("service-nodeports", "inet_proto . inet_service", "NodePort traffic"),
)
_NAME_LIMIT = 240

# (set or map, key) → (value, or "" in a set, and comment)
_Elements = dict[tuple[str, str], tuple[str, str]]
# What stands before the name of the table, and what after it.
_Command = tuple[str, str]


def table(settings: model.Settings) -> str:
    """Return the family and the name of the table."""
    return f"{_ip(settings)} kube-proxy"


def _ip(settings: model.Settings) -> str:
    """The family's name, also in what is asked of a packet."""
    return "ip" if settings.family == 4 else "ip6"


def chain(prefix: str, port: model.ServicePort) -> str:
    """Return a chain's name: the prefix (`service`, `local`, `external`), a hash and whose it is."""
    name = f"{port.namespace}/{port.name}/{port.protocol}/{port.port_name}"
    digest = base64.b32encode(hashlib.sha256(name.encode()).digest())[:8].decode()
    full_name = f"{digest}-{name}"
    if len(full_name) > _NAME_LIMIT:
        raise ValueError(f"{name} makes too long a name for a chain")
    return f"{prefix}-{full_name}"


def full(ports: Ports, settings: model.Settings, order: Order = None) -> str:
    """Return the whole table for these ports, where there is none yet."""
    ports = model.ordered(ports, order)
    lines = [*_fixed(settings)]
    for port in ports:
        lines += _own(port, settings)
    lines += [_added(where, key, *what) for (where, key), what in _elements(ports).items()]
    return _joined(lines, settings)


def update(before: Ports, after: Ports, settings: model.Settings, order: Order = None) -> str:
    """Return what takes a table that has `before` to `after`; `order` is that of `after`."""
    changed = model.changed(before, after)
    written = [port for port in model.ordered(after, order) if port.owner in changed]
    lines = [line for port in written for line in _own(port, settings)]
    others = _hairpins(port for port in after if port.owner not in changed)
    had = others | _elements(port for port in before if port.owner in changed)
    have = others | _elements(written)
    for (where, key), what in have.items():
        old = had.get((where, key))
        # A comment alone is no change to kube-proxy.
        if old is None or old[0] != what[0]:
            if old is not None:
                lines.append(("delete element", f"{where} {{ {key} }}"))
            lines.append(_added(where, key, *what))
    lines += [("flush chain", name) for name in _stale(before, after, changed)]
    lines += [("delete element", f"{where} {{ {key} }}") for where, key in had if (where, key) not in have]
    return _joined(lines, settings)


def sweep(before: Ports, after: Ports, settings: model.Settings) -> str:
    """Return what deletes the chains that this update has left empty, "" where there are none."""
    stale = _stale(before, after, model.changed(before, after))
    return _joined((("delete chain", name) for name in stale), settings)


def chains(port: model.ServicePort) -> list[str]:
    """Return the names of the chains that are this port's own."""
    found = [chain("service", port)] if port.uses_cluster else []
    found += [chain("local", port)] if port.uses_local else []
    return found + ([chain("external", port)] if port.has_external and port.endpoints else [])


def _stale(before: Ports, after: Ports, changed: collections.abc.Container[tuple[str, str]]) -> list[str]:
    used = {name for port in after if port.owner in changed for name in chains(port)}
    return [name for port in before if port.owner in changed for name in chains(port) if name not in used]


def _fixed(settings: model.Settings) -> collections.abc.Iterator[_Command]:
    if not settings.node_ip:
        raise ValueError("in nftables mode, NodePorts need the address of the node")

    def typed(key: str) -> str:
        return key.replace("ADDR", f"ipv{settings.family}_addr")

    yield "add table", '{ comment "rules for kube-proxy" ; }'
    for name, *_ in _BASE_CHAINS:  # whatever they were before
        yield "add chain", name
        yield "delete chain", name
    for name, kind, hook, priority in _BASE_CHAINS:
        yield "add chain", f"{name} {{ type {kind} hook {hook} priority {priority} ; }}"
        yield "flush chain", name
    for name in dict.fromkeys(target for _, _, target in _JUMPS):
        yield from _emptied(name)
    for source, condition, target in _JUMPS:
        yield _rule(source, f"{condition}jump {target}")
    for name, key, comment in _SETS:
        yield "add set", f'{name} {{ type {typed(key)} ; comment "{comment}" ; }}'
    for name, key, comment in _MAPS:
        yield "add map", f'{name} {{ type {typed(key)} : verdict ; comment "{comment}" ; }}'
    yield "flush set", "nodeport-ips"
    yield _added("nodeport-ips", settings.node_ip, "", "")
    helper = "helper for @no-endpoint-services / @no-endpoint-nodeports"
    yield "add chain", f'reject-chain {{ comment "{helper}" ; }}'
    yield "flush chain", "reject-chain"
    yield _rule("reject-chain", "reject")
    yield from _masquerading(settings)
    yield from _checks(settings)
    yield from _dispatch(settings)


def _masquerading(settings: model.Settings) -> collections.abc.Iterator[_Command]:
    mark, ip = settings.mark, _ip(settings)
    yield _rule("masquerading", f"mark and {mark} != 0 mark set mark xor {mark} masquerade fully-random")
    yield _rule(
        "masquerading",
        f"ct status dnat {ip} saddr . {ip} daddr . meta l4proto . th dport @hairpin-connections "
        "masquerade fully-random",
    )


def _checks(settings: model.Settings) -> collections.abc.Iterator[_Command]:
    ip = _ip(settings)
    yield _rule(
        "cluster-ips-check",
        f"{ip} daddr @cluster-ips reject",
        "Reject traffic to invalid ports of ClusterIPs",
    )
    if settings.service_cidrs:
        yield _rule(
            "cluster-ips-check",
            f"{ip} daddr {{ {','.join(settings.service_cidrs)} }} drop",
            "Drop traffic to unallocated ClusterIPs",
        )
    service = f"{ip} daddr . meta l4proto . th dport vmap"
    yield _rule("service-endpoints-check", f"{service} @no-endpoint-services")
    yield _rule(
        "nodeport-endpoints-check",
        f"{ip} daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports",
    )
    yield _rule("firewall-check", f"{service} @firewall-ips")


def _dispatch(settings: model.Settings) -> collections.abc.Iterator[_Command]:
    ip = _ip(settings)
    if settings.cluster_cidr:
        yield _rule(
            "services",
            f"{ip} daddr @cluster-ips {ip} saddr != {settings.cluster_cidr} {_masquerade(settings)}",
            "masquerade clusterIP traffic from outside cluster",
        )
    yield _rule("services", f"{ip} daddr . meta l4proto . th dport vmap @service-ips")
    yield _rule("services", f"{ip} daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports")


def _own(port: model.ServicePort, settings: model.Settings) -> collections.abc.Iterator[_Command]:
    """Write the chains that are a port's own."""
    for name in chains(port):
        yield from _emptied(name)
    if port.has_external and port.endpoints:
        yield from _external(port, settings)
    for prefix, endpoints, used in (
        ("service", port.endpoints, port.uses_cluster),
        ("local", port.local_endpoints, port.uses_local),
    ):
        if used:
            drawn = " , ".join(f"{index} : {each.ip} . {each.port}" for index, each in enumerate(endpoints))
            yield _rule(
                chain(prefix, port),
                f"meta l4proto {port.protocol} dnat {_ip(settings)} addr . port to "
                f"numgen random mod {len(endpoints)} map {{ {drawn} }}",
            )


def _external(port: model.ServicePort, settings: model.Settings) -> collections.abc.Iterator[_Command]:
    name, cluster = chain("external", port), chain("service", port)
    if not port.external_local:
        yield _rule(name, _masquerade(settings), "masquerade")
    else:
        if settings.cluster_cidr:
            yield _rule(
                name,
                f"{_ip(settings)} saddr {settings.cluster_cidr} goto {cluster}",
                "short-circuit pod traffic",
            )
        yield _rule(name, f"fib saddr type local {_masquerade(settings)}", "masquerade local traffic")
        yield _rule(name, f"fib saddr type local goto {cluster}", "short-circuit local traffic")
    if port.answers_outside:
        yield _rule(name, f"goto {chain('local', port) if port.external_local else cluster}")


def _hairpins(ports: collections.abc.Iterable[model.ServicePort]) -> _Elements:
    """Return the elements that ports of several services can have in common."""
    return {
        ("hairpin-connections", f"{each.ip} . {each.ip} . {port.protocol} . {each.port}"): ("", "")
        for port in ports
        for each in port.reachable
        if each.is_local
    }


def _elements(ports: collections.abc.Iterable[model.ServicePort]) -> _Elements:
    """Return what sets and maps hold for these ports."""
    ports = list(ports)
    found = _hairpins(ports)
    for port in ports:
        at = f"{port.cluster_ip} . {port.protocol} . {port.port}"
        at_node = f"{port.protocol} . {port.node_port}"
        refusal = ("drop" if port.endpoints else "goto reject-chain", port.text)
        found["cluster-ips", port.cluster_ip] = ("", "")
        if port.answers_inside:
            target = chain("local" if port.internal_local else "service", port)
            found["service-ips", at] = (f"goto {target}", "")
        else:
            found["no-endpoint-services", at] = refusal
        if port.node_port and port.endpoints:
            found["service-nodeports", at_node] = (f"goto {chain('external', port)}", "")
        if port.node_port and not port.answers_outside:
            found["no-endpoint-nodeports", at_node] = refusal
    return found


def _masquerade(settings: model.Settings) -> str:
    return f"mark set mark or {settings.mark}"


def _emptied(name: str) -> tuple[_Command, _Command]:
    return ("add chain", name), ("flush chain", name)


def _rule(name: str, text: str, comment: str = "") -> _Command:
    said = f' comment "{comment}"' if comment else ""
    return "add rule", f"{name} {text}{said}"


def _added(where: str, key: str, value: str, comment: str) -> _Command:
    said = f' comment "{comment}"' if comment else ""
    verdict = f" : {value}" if value else ""
    return "add element", f"{where} {{ {key}{said}{verdict} }}"


def _joined(commands: collections.abc.Iterable[_Command], settings: model.Settings) -> str:
    return "".join(f"{what} {table(settings)} {rest}\n" for what, rest in commands)
