"""Scenarios about which addresses of a Service are served, where, and to whom."""

import itertools

from tests.lab.contract import book
from tests.lab.contract.book import BOTH, DNS, HTTP
from tests.lab.contract.patterns import BOTH_LOCAL, ETP, PATTERNS


def source_ranges(pages: book.Book) -> None:
    here = [f"{book.PLACES['n1/p1'].ipv4}/32", f"{book.PLACES['n1/p1'].ipv6}/128"]
    here += [f"{book.PLACES['n1/p4'].ipv4}/32", f"{book.PLACES['n1/p4'].ipv6}/128"]
    tables = {
        "outside": ["172.18.0.100/32", "fd00:172:18::64/128"],
        "segment": ["172.18.0.0/24", "fd00:172:18::/64"],
        "node": ["172.18.0.1/32", "fd00:172:18::1/128"],
        "pods": ["10.244.0.0/16", "fd00:244::/32"],
        "pods-here": here,
        "nobody": ["192.0.2.0/24", "2001:db8:ffff::/48"],
        "several": [
            "192.0.2.0/24",
            "172.18.0.2/32",
            "10.244.2.0/24",
            "fd00:172:18::2/128",
            "fd00:244:2::/64",
        ],
        "nested": ["172.18.0.0/16", "172.18.0.100/32", "fd00:172::/32", "fd00:172:18::64/128"],
        "odd-bits": ["172.18.0.96/29", "fd00:172:18::60/123"],
        "everyone": ["0.0.0.0/0", "::/0"],
        "everyone-among-others": ["192.0.2.0/24", "0.0.0.0/0", "2001:db8:ffff::/48", "::/0"],
        "ipv4-only": ["192.0.2.0/24"],
        "ipv6-only": ["2001:db8:ffff::/48"],
        "spaces": [" 172.18.0.100/32 ", "fd00:172:18::64/128\t"],
        "host-bits": ["172.18.0.100/24", "fd00:172:18::64/64"],
        "zeros": ["172.018.000.100/32"],
        "empty": [],
    }
    for (name, ranges), etp in itertools.product(tables.items(), ETP):
        pages.add(
            f"ranges-e{etp}-{name}",
            "SR-1 SR-2 SR-3 SR-4 SR-6 SR-7 SR-9",
            PATTERNS["both"],
            spec=ETP[etp] | {"loadBalancerSourceRanges": ranges},
            variants="xdp no-detector" if name in ("outside", "pods") else "",
        )
    blocked = {"loadBalancerSourceRanges": tables["nobody"]}
    pages.add("ranges-vacant", "SR-10", spec=blocked, variants="nftables")
    pages.add("ranges-local-none", "SR-9 REJ-4", PATTERNS["remote"], spec=blocked | BOTH_LOCAL)
    admitted = {"loadBalancerSourceRanges": tables["outside"]} | BOTH_LOCAL
    pages.add("ranges-admitted-local-none", "SR-9 REJ-4", PATTERNS["remote"], spec=admitted)


def addresses(pages: book.Book) -> None:
    """Which addresses of a Service are captured."""
    both = PATTERNS["both"]
    own = pages.addresses()
    pages.add("balancer-mode-unsaid", "LB-1", both, ingress=[{"ip": one} for one in own.both("balancer")])
    for pattern in ("both", "none"):
        own = pages.addresses()
        proxied = [{"ip": one, "ipMode": "Proxy"} for one in own.both("balancer")]
        pages.add(f"balancer-proxy-{pattern}", "LB-2 REJ-9", PATTERNS[pattern], ingress=proxied)
    own = pages.addresses()
    mixed = [{"ip": one, "ipMode": "Proxy"} for one in own.both("balancer")]
    mixed += [{"ip": one, "ipMode": "VIP"} for one in own.both("spare")]
    pages.add("balancer-mixed-modes", "LB-2", both, ingress=mixed, more=spare(own))
    pages.add("balancer-hostname", "LB-3", both, ingress=[{"hostname": "balancer.example"}])
    own = pages.addresses()
    several = [{"ip": one} for one in (*own.both("balancer"), *own.both("spare"))] + [
        {"hostname": "b.example"}
    ]
    pages.add("balancer-several", "LB-1 LB-3", both, ingress=several, more=spare(own))
    own = pages.addresses()
    pages.add("balancer-one-family", "LB-4", both, ingress=[{"ip": own.balancer(4)}])
    pages.add("balancer-none-yet", "LB-1", both, ingress=[])
    ports = [HTTP._replace(node_port=0), DNS._replace(node_port=0)]
    pages.add("balancer-without-node-port", "LB-5", both, ports=ports)
    same = [HTTP, DNS._replace(port=book.TCP_PORT)]
    pages.add("mixed-protocols", "LB-6 SEL-11 NP-12", both, ports=same, thin=False)
    own = pages.addresses()
    node = [{"ip": one} for one in book.PLACES["n2"].addresses]
    at_node = [book.Target("LoadBalancer of n2", one, 7100, "TCP") for one in book.PLACES["n2"].addresses]
    ports = [HTTP._replace(port=7100)]
    pages.add(
        "balancer-is-another-node", "LB-1", both, ports=ports, ingress=node, more=at_node, clients=book.INSIDE
    )
    node = [{"ip": one} for one in book.PLACES["n1"].addresses]
    at_node = [book.Target("LoadBalancer of n1", one, 7101, "TCP") for one in book.PLACES["n1"].addresses]
    ports = [HTTP._replace(port=7101)]
    pages.add("balancer-is-this-node", "LB-8", both, ports=ports, ingress=node, more=at_node)
    at_node = [book.Target("external IP of n1", one, 7102, "TCP") for one in book.PLACES["n1"].addresses]
    ports = [HTTP._replace(port=7102)]
    external = {"externalIPs": list(book.PLACES["n1"].addresses)}
    pages.add("external-is-this-node", "EXT-1", both, ports=ports, spec=external, more=at_node)
    own = pages.addresses()
    odd = ["", " ", "not-an-address", own.external(4), own.external(6)]
    pages.add("external-odd", "EXT-4", both, spec={"externalIPs": odd}, variants="no-external-ips")
    own = pages.addresses()
    octets = own.external(4).split(".")
    zeros = ".".join(part.zfill(3) for part in octets)
    pages.add("external-zeros", "SEL-13", both, spec={"externalIPs": [zeros]})
    own = pages.addresses()
    pages.add("external-one-family", "EXT-4", both, spec={"externalIPs": [own.external(6)]})
    pages.add("external-vacant", "EXT-5 REJ-2 REJ-3", variants="no-external-ips nftables")
    ranges = {"loadBalancerSourceRanges": ["192.0.2.0/24"]}
    pages.add("external-with-ranges", "EXT-3 NP-15", both, spec=ranges)


def spare(own: book.Addresses) -> list[book.Target]:
    return [
        book.Target("second address", own.spare(family), port.port, port.protocol)
        for family in book.FAMILIES
        for port in BOTH
    ]


def node_ports(pages: book.Book) -> None:
    own = pages.addresses()
    number = own.node_port
    places = ["10.244.1.1", "fd00:244:1::1", *book.PLACES["n2"].addresses, *book.PLACES["n3"].addresses]
    more = [
        book.Target("NodePort", address, number, protocol)
        for address, protocol in itertools.product(places, ("TCP", "UDP"))
    ]
    everywhere = "nodeport-addresses nodeport-primary nodeport-other-family nftables"
    pages.add(
        "node-port-addresses", "NP-1 NP-3 NP-5", PATTERNS["both"], more=more, thin=False, variants=everywhere
    )
    own = pages.addresses()
    more = [book.Target("NodePort", address, own.node_port, "TCP") for address in places]
    pages.add(
        "node-port-addresses-local",
        "NP-1 ETP-3",
        PATTERNS["both"],
        spec=ETP["l"],
        more=more,
        variants=everywhere,
    )
    own = pages.addresses()
    more = [book.Target("NodePort", address, own.node_port, "TCP") for address in places[:2]]
    pages.add("node-port-addresses-vacant", "NP-1 REJ-2 REJ-7", more=more, variants=everywhere)
    for name, spec in {"cluster": {}, "local": ETP["l"]}.items():
        own = pages.addresses()
        loopbacks = [
            book.Target("loopback", address, own.node_port, protocol)
            for address in ("127.0.0.1", "127.1.2.3", "::1")
            for protocol in ("TCP", "UDP")
        ]
        for pattern in ("both", "remote", "none"):
            pages.add(
                f"node-port-loopback-{name}-{pattern}",
                "NP-8 NP-9",
                PATTERNS[pattern],
                spec=spec,
                targets=[one._replace(port=pages.addresses().node_port) for one in loopbacks],
                clients=(book.NODE,),
                variants=f"{everywhere} no-localhost",
            )
    own = pages.addresses()
    wrong = []
    for family in book.FAMILIES:
        node, cluster = book.PLACES["n1"].address(family), own.cluster(family)
        wrong += [
            book.Target("service port on the node", node, 7200, "TCP"),
            book.Target("NodePort on the ClusterIP", cluster, own.node_port, "TCP"),
            book.Target("undeclared port", cluster, 81, "TCP"),
            book.Target("undeclared protocol", cluster, 7200, "UDP"),
            book.Target("unallocated", own.spare(family), 7200, "TCP"),
            book.Target("NodePort on the external IP", own.external(family), own.node_port, "TCP"),
            book.Target("NodePort on the balancer IP", own.balancer(family), own.node_port, "TCP"),
            book.Target("target port on the ClusterIP", cluster, 8080, "TCP"),
            book.Target("other protocol of the NodePort", node, own.node_port, "UDP"),
        ]
    ports = [HTTP._replace(port=7200)]
    pages.add(
        "wrong-ports",
        "NP-13 CIP-4 CIP-5 SEL-11",
        PATTERNS["both"],
        ports=ports,
        more=wrong,
        variants="nftables",
    )
    own = pages.addresses()
    ports = [HTTP, book.Port("more", "TCP", 443, 9090, 31990), DNS._replace(node_port=0)]
    more = [book.Target("NodePort", book.PLACES["n1"].ipv4, 31990, "TCP")]
    pages.add("ports-of-one-service", "SEL-8 ES-5", PATTERNS["both"], ports=ports, more=more, thin=False)
