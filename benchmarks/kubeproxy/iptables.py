"""What kube-proxy 1.36 hands to `iptables-restore --noflush --counters` in iptables mode. Pure.

The same goes to `ip6tables-restore` for IPv6, except where NodePorts at the loopback address are concerned.

    hooks    the jumps from built-in chains, and canaries; it makes them one by one, at its start
    full     all else, at its start and every hour, except the deletion of what was there before
    update   a change of some services: KUBE-SERVICES as a whole, of other chains only theirs

A packet of a new connection walks KUBE-SERVICES, where every port of a service has a
rule, to its service's rule or to the end; KUBE-SVC-… then picks an endpoint and
KUBE-SEP-… translates. Nothing here is the real thing's overhead: before an update it
reads all chains back, though with more than `LARGE` endpoints only every 30 s.
"""

import base64
import collections.abc
import dataclasses
import functools
import hashlib

from benchmarks.kubeproxy import model

Ports = collections.abc.Sequence[model.ServicePort]
Order = collections.abc.Sequence[int] | None

LARGE = 1000  # with more endpoints, chains of services and endpoints go without comments
SYSCTLS = {"net.ipv4.conf.all.route_localnet": "1"}  # for NodePorts at 127.0.0.1; not for IPv6

_NEW = "-m conntrack --ctstate NEW "
# Each goes to the head of its chain, so that the last of them is the first to be walked.
_JUMPS = {
    "filter": (
        ("INPUT", "KUBE-EXTERNAL-SERVICES", _NEW, "kubernetes externally-visible service portals"),
        ("FORWARD", "KUBE-EXTERNAL-SERVICES", _NEW, "kubernetes externally-visible service portals"),
        ("INPUT", "KUBE-NODEPORTS", "", "kubernetes health check service ports"),
        ("FORWARD", "KUBE-SERVICES", _NEW, "kubernetes service portals"),
        ("OUTPUT", "KUBE-SERVICES", _NEW, "kubernetes service portals"),
        ("FORWARD", "KUBE-FORWARD", "", "kubernetes forwarding rules"),
        ("INPUT", "KUBE-PROXY-FIREWALL", _NEW, "kubernetes load balancer firewall"),
        ("OUTPUT", "KUBE-PROXY-FIREWALL", _NEW, "kubernetes load balancer firewall"),
        ("FORWARD", "KUBE-PROXY-FIREWALL", _NEW, "kubernetes load balancer firewall"),
        ("INPUT", "KUBE-FIREWALL", "", ""),
        ("OUTPUT", "KUBE-FIREWALL", "", ""),
    ),
    "nat": (
        ("OUTPUT", "KUBE-SERVICES", "", "kubernetes service portals"),
        ("PREROUTING", "KUBE-SERVICES", "", "kubernetes service portals"),
        ("POSTROUTING", "KUBE-POSTROUTING", "", "kubernetes postrouting rules"),
    ),
    "mangle": (),
}
_CANARY = "KUBE-PROXY-CANARY"
_FILTER_CHAINS = (
    "KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-FORWARD", "KUBE-NODEPORTS", "KUBE-PROXY-FIREWALL",
    "KUBE-FIREWALL",
)  # fmt: skip
_NAT_CHAINS = ("KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ")


def chain(prefix: str, port: model.ServicePort, endpoint: str = "") -> str:
    """Return a chain's name: the prefix (`SVC`, `SVL`, `EXT`, `SEP`) and a hash of whose it is."""
    return f"KUBE-{prefix}-{_hash(f'{port.text}{port.protocol}{endpoint}')}"


@functools.cache
def _hash(text: str) -> str:
    return base64.b32encode(hashlib.sha256(text.encode()).digest())[:16].decode()


def hooks() -> str:
    """Return the jumps from built-in chains, for tables that do not have them yet."""
    lines = []
    for table, jumps in _JUMPS.items():
        lines.append(f"*{table}")
        lines += [_declared(name) for name in dict.fromkeys([*(jump[1] for jump in jumps), _CANARY])]
        for source, target, condition, comment in jumps:
            said = f'-m comment --comment "{comment}" ' if comment else ""
            lines.append(f"-I {source} {condition}{said}-j {target}")
        lines.append("COMMIT")
    return _joined(lines)


def full(ports: Ports, settings: model.Settings, order: Order = None) -> str:
    """Return everything but `hooks` for these ports."""
    return _text(model.ordered(ports, order), settings, None, ())


def update(
    before: Ports, after: Ports, settings: model.Settings, order: Order = None, *, sweep: bool | None = None
) -> str:
    """Return what takes a table that has `before` to `after`; `order` is that of `after`.

    `sweep` deletes the chains that are no longer used; None decides as kube-proxy does on
    a busy node: not among more than `LARGE` endpoints, where it does so every 30 s.
    """
    changed = model.changed(before, after)
    if sweep is None:
        sweep = not is_large(after)
    gone: collections.abc.Iterable[str] = ()
    if sweep:
        left = dict.fromkeys(name for port in before if port.owner in changed for name in chains(port))
        kept = {name for port in after if port.owner in changed for name in chains(port)}
        gone = [name for name in left if name not in kept]
    return _text(model.ordered(after, order), settings, changed, gone)


def is_large(ports: Ports) -> bool:
    """Tell whether kube-proxy takes this for a large cluster."""
    return sum(len(port.endpoints) for port in ports) > LARGE


def chains(port: model.ServicePort) -> list[str]:
    """Return the names of the chains in the nat table that are this port's own."""
    found = [chain("EXT", port)] if port.has_external and port.endpoints else []
    found += [chain("SVC", port)] if port.uses_cluster else []
    found += [chain("SVL", port)] if port.uses_local else []
    return found + [chain("SEP", port, str(endpoint)) for endpoint in port.reachable]


@dataclasses.dataclass(slots=True)
class _Tables:
    """Lines in the making, as kube-proxy gathers them."""

    filter_rules: list[str]
    nat_chains: list[str]
    nat_rules: list[str]


def _text(
    ports: Ports,
    settings: model.Settings,
    changed: collections.abc.Container[tuple[str, str]] | None,
    gone: collections.abc.Iterable[str],
) -> str:
    made = _Tables([], [_declared(name) for name in _NAT_CHAINS], [])
    _write_fixed(made, settings)
    comments = not is_large(ports)
    for port in ports:
        _write_entry(made, port)
        if changed is None or port.owner in changed:
            _write_own(made, port, settings, comments=comments)
    for name in gone:
        made.nat_chains.append(_declared(name))
        made.nat_rules.append(f"-X {name}")
    loopback = "! -d ::1/128 " if settings.family == 6 else ""
    made.nat_rules.append(
        '-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last '
        f'rule in this chain" -m addrtype --dst-type LOCAL {loopback}-j KUBE-NODEPORTS'
    )
    _write_forward(made, settings)
    return _joined(
        [
            "*filter", *map(_declared, _FILTER_CHAINS), *made.filter_rules, "COMMIT",
            "*nat", *made.nat_chains, *made.nat_rules, "COMMIT",
        ]
    )  # fmt: skip


def _write_fixed(made: _Tables, settings: model.Settings) -> None:
    made.nat_rules += [
        f"-A KUBE-POSTROUTING -m mark ! --mark {settings.mark}/{settings.mark} -j RETURN",
        f"-A KUBE-POSTROUTING -j MARK --xor-mark {settings.mark}",
        '-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" '
        "-j MASQUERADE --random-fully",
        f"-A KUBE-MARK-MASQ -j MARK --or-mark {settings.mark}",
    ]
    if settings.family == 4:
        made.filter_rules.append(
            '-A KUBE-FIREWALL -m comment --comment "block incoming localnet connections" -d 127.0.0.0/8 '
            "! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"
        )


def _write_forward(made: _Tables, settings: model.Settings) -> None:
    if settings.drop_invalid:
        made.filter_rules.append("-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP")
    made.filter_rules += [
        '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" '
        f"-m mark --mark {settings.mark}/{settings.mark} -j ACCEPT",
        '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" '
        "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    ]


def _write_entry(made: _Tables, port: model.ServicePort) -> None:
    """Write the rules by which packets find a port, or are refused: in chains that all services share."""
    protocol = f"-m {port.protocol} -p {port.protocol}"
    address = f"{protocol} -d {port.cluster_ip} --dport {port.port}"
    if port.answers_inside:
        target = chain("SVL" if port.internal_local else "SVC", port)
        made.nat_rules.append(
            f'-A KUBE-SERVICES -m comment --comment "{port.text} cluster IP" {address} -j {target}'
        )
    else:
        made.filter_rules.append(f"-A KUBE-SERVICES {_refusal(port, address)}")
    if not port.node_port:
        return
    if port.endpoints:
        made.nat_rules.append(
            f"-A KUBE-NODEPORTS -m comment --comment {port.text} {protocol} --dport {port.node_port} "
            f"-j {chain('EXT', port)}"
        )
    if not port.answers_outside:
        at_node = f"-m addrtype --dst-type LOCAL {protocol} --dport {port.node_port}"
        made.filter_rules.append(f"-A KUBE-EXTERNAL-SERVICES {_refusal(port, at_node)}")


def _refusal(port: model.ServicePort, condition: str) -> str:
    what, target = ("no local endpoints", "DROP") if port.endpoints else ("no endpoints", "REJECT")
    return f'-m comment --comment "{port.text} has {what}" {condition} -j {target}'


def _write_own(made: _Tables, port: model.ServicePort, settings: model.Settings, *, comments: bool) -> None:
    """Write the chains that are a port's own."""
    made.nat_chains += [_declared(name) for name in chains(port)]
    if port.answers_inside and settings.cluster_cidr:
        target = chain("SVL" if port.internal_local else "SVC", port)
        address = f"-m {port.protocol} -p {port.protocol} -d {port.cluster_ip} --dport {port.port}"
        made.nat_rules.append(
            f'-A {target} -m comment --comment "{port.text} cluster IP" {address} '
            f"! -s {settings.cluster_cidr} -j KUBE-MARK-MASQ"
        )
    if port.has_external and port.endpoints:
        made.nat_rules += _external(port, settings)
    if port.uses_cluster:
        made.nat_rules += _picks("SVC", port, port.endpoints, comments=comments)
    if port.uses_local:
        made.nat_rules += _picks("SVL", port, port.local_endpoints, comments=comments)
    said = f"-m comment --comment {port.text} " if comments else ""
    for endpoint in port.reachable:
        name = chain("SEP", port, str(endpoint))
        made.nat_rules += [
            f"-A {name} {said}-s {endpoint.ip} -j KUBE-MARK-MASQ",
            f"-A {name} {said}-m {port.protocol} -p {port.protocol} -j DNAT --to-destination {endpoint}",
        ]


def _external(port: model.ServicePort, settings: model.Settings) -> collections.abc.Iterator[str]:
    name, cluster = chain("EXT", port), chain("SVC", port)

    def rule(what: str, condition: str, target: str) -> str:
        said = f'-m comment --comment "{what} for {port.text} external destinations"'
        return f"-A {name} {said} {condition}-j {target}"

    if not port.external_local:
        yield rule("masquerade traffic", "", "KUBE-MARK-MASQ")
    else:
        if settings.cluster_cidr:
            yield rule("pod traffic", f"-s {settings.cluster_cidr} ", cluster)
        yield rule("masquerade LOCAL traffic", "-m addrtype --src-type LOCAL ", "KUBE-MARK-MASQ")
        yield rule("route LOCAL traffic", "-m addrtype --src-type LOCAL ", cluster)
    if port.answers_outside:
        yield f"-A {name} -j {chain('SVL', port) if port.external_local else cluster}"


def _picks(
    prefix: str, port: model.ServicePort, endpoints: tuple[model.Endpoint, ...], *, comments: bool
) -> collections.abc.Iterator[str]:
    for index, endpoint in enumerate(endpoints):
        said = f'-m comment --comment "{port.text} -> {endpoint}" ' if comments else ""
        left = len(endpoints) - index
        chance = f"-m statistic --mode random --probability {1 / left:.10f} " if left > 1 else ""
        yield f"-A {chain(prefix, port)} {said}{chance}-j {chain('SEP', port, str(endpoint))}"


def _declared(name: str) -> str:
    return f":{name} - [0:0]"


def _joined(lines: collections.abc.Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
