"""Scenarios drawn by lot, always the same ones: everything that can be told about a Service at once."""

import random
import typing

from tests.lab.contract import book
from tests.lab.contract.book import (
    DNS,
    HTTP,
    LOCAL,
    LOCAL_TOO,
    REMOTE,
    REMOTE_TOO,
    Endpoint,
    Object,
    Port,
    Slice,
)
from tests.lab.contract.patterns import AFFINITY, DRAINING, ETP, GONE, ITP, UNREADY

COUNT = 120
PLACES = (LOCAL, LOCAL_TOO, REMOTE, REMOTE_TOO, "n1/p1", "n1/p4", "n1", "n3")
CONDITIONS: tuple[Object, ...] = ({}, {}, {}, {"ready": None}, {"terminating": True}, DRAINING, GONE, UNREADY)
ZONES = ((), ("a",), ("b",), ("a", "b"))
NODES = ((), ("n1",), ("n3",), ("n1", "n3"))
RANGES = (
    ["172.18.0.0/24", "fd00:172:18::/64"], ["10.244.0.0/16"], ["fd00:244::/32", "fd00:172:18::64/128"],
    ["192.0.2.0/24", "172.18.0.100/32"], ["0.0.0.0/0", "::/0"],
)  # fmt: skip
FAMILIES = ((4, 6), (4, 6), (4, 6), (6, 4), (4,), (6,))
PORTS: tuple[tuple[Port, ...], ...] = (
    (HTTP,), (HTTP, DNS), (HTTP, DNS), (DNS._replace(port=80), HTTP), (HTTP._replace(name=""),),
    (HTTP, DNS._replace(node_port=0), HTTP._replace(name="more", port=443, target=9090, node_port=0)),
)  # fmt: skip


def draw(pages: book.Book) -> None:
    """Add them."""
    chance = random.Random("kube-proxy")
    for number in range(COUNT):
        variant = chance.choice(("maglev", "bridge", "nodecidr", "masquerade-all", "xdp"))
        one(pages, chance, f"lot-{number}", variants=variant, thin=chance.random() < 0.7)


def one(pages: book.Book, chance: random.Random, name: str, **options: typing.Any) -> book.Scenario:
    """Add one."""
    own, ports = pages.addresses(), chance.choice(PORTS)
    kind = chance.choice(("ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"))
    spec: Object = {"type": kind} | chance.choice(list(ETP.values())) | chance.choice(list(ITP.values()))
    if chance.random() < 0.3:
        spec["loadBalancerSourceRanges"] = chance.choice(RANGES)
    if chance.random() < 0.15:
        spec |= AFFINITY
    if chance.random() < 0.3:
        spec["externalIPs"] = [own.external(chance.choice((4, 6)))] if chance.random() < 0.5 else []
    if kind == "ClusterIP":
        ports = tuple(port._replace(node_port=0) for port in ports)
    return pages.add(
        name,
        "",
        ports=ports,
        spec=spec,
        families=chance.choice(FAMILIES),
        ingress=_ingress(chance, own) if kind == "LoadBalancer" else [],
        slices=_slices(chance, ports),
        **options,
    )


def _ingress(chance: random.Random, own: book.Addresses) -> list[Object]:
    modes: tuple[Object, ...] = ({}, {"ipMode": "VIP"}, {"ipMode": "Proxy"})
    found = [{"ip": address} | chance.choice(modes) for address in own.both("balancer")]
    return [*found, {"hostname": "balancer.example"}] if chance.random() < 0.2 else found


def _slices(chance: random.Random, ports: tuple[Port, ...]) -> list[Slice]:
    hinted = chance.random() < 0.4
    places = chance.sample(PLACES, chance.choice((0, 1, 2, 3, 4)))
    found = []
    while places:
        size = chance.randint(1, len(places))
        here, places = places[:size], places[size:]
        endpoints = [_endpoint(chance, place, hinted) for place in here]
        listed = ports if chance.random() < 0.8 else chance.sample(ports, 1)
        if chance.random() < 0.2:
            listed = [port._replace(target=book.OTHER_TARGET) for port in listed]
        found.append(Slice(endpoints, listed, chance.choice(((4, 6), (4, 6), (4, 6), (4,), (6,)))))
    if found and chance.random() < 0.2:
        found.append(found[0])
    return found


def _endpoint(chance: random.Random, place: str, hinted: bool) -> Endpoint:
    hints = {"zones": chance.choice(ZONES[hinted:]), "nodes": chance.choice(NODES)} if hinted else {}
    endpoint = Endpoint(place, **{**chance.choice(CONDITIONS), **hints})
    return endpoint if chance.random() < 0.95 else endpoint._replace(node_name="")
