"""The scenarios: what can be told in a Service, its slices and its node, in combination.

`whole` returns all of them. Ids are items of the contract that a scenario is about;
many more take part in each.
"""

import itertools

from tests.lab.contract import book, frontends, lots
from tests.lab.contract.book import DNS, HTTP, LOCAL, LOCAL_TOO, REMOTE, Endpoint, Object, Slice
from tests.lab.contract.patterns import AFFINITY, BOTH_LOCAL, DRAINING, ETP, HINTS, ITP, PATTERNS, UNREADY


def policies(pages: book.Book) -> None:
    """Every pattern of endpoints under every pair of policies, on every kind of address."""
    variants = {
        "none": "nftables", "local": "nodecidr masquerade-all no-detector prefix",
        "four": "maglev xdp no-pod-devices",
        "remote": "no-detector nftables",
        "both": "no-detector bridge nodecidr masquerade-all nftables prefix xdp v4-detector",
        "client-and-others": "no-detector bridge masquerade-all maglev no-pod-devices",
        "all-draining": "no-detector", "hosts": "no-detector masquerade-all no-pod-devices",
    }  # fmt: skip
    for (pattern, endpoints), etp, itp in itertools.product(PATTERNS.items(), ETP, ITP):
        pages.add(
            f"policy-e{etp}-i{itp}-{pattern}",
            "ETP-1 ETP-2 ETP-3 ETP-4 ETP-5 ETP-7 ETP-8 ETP-9 ITP-1 ITP-2 ITP-3 ITP-4 ITP-5 EP-2 EP-3 EP-4 "
            "EP-9 MASQ-2 MASQ-3 MASQ-5 MASQ-8 REJ-1 REJ-2 REJ-4 CIP-1 NP-2 EXT-1 LB-1",
            endpoints,
            spec=ETP[etp] | ITP[itp],
            thin=pattern not in ("both", "none", "remote"),
            variants=variants.get(pattern, ""),
        )
    for pattern in ("none", "both", "remote"):
        for etp, own_type in itertools.product(ETP, ("NodePort", "ClusterIP")):
            own = pages.addresses()
            pages.add(
                f"policy-{own_type.lower()}-e{etp}-{pattern}",
                "ETP-1 SEL-7",
                PATTERNS[pattern],
                spec=ETP[etp] | {"type": own_type, "externalIPs": own.both("external")},
                ingress=[],
            )
        pages.add(
            f"policy-clusterip-without-external-el-{pattern}",
            "ETP-1 ITP-1",
            PATTERNS[pattern],
            exposed=False,
            spec=BOTH_LOCAL,
        )


def hints(pages: book.Book) -> None:
    for (pattern, endpoints), etp in itertools.product(HINTS.items(), ETP):
        pages.add(
            f"hints-e{etp}-{pattern}",
            "TOP-1 TOP-2 TOP-3 TOP-4 TOP-6 TOP-7 TOP-8 TOP-11",
            endpoints,
            spec=ETP[etp] | (BOTH_LOCAL if etp == "l" else {}),
            variants="no-zone maglev" if etp == "c" else "",
        )
    slices = [
        Slice([Endpoint(LOCAL, zones=("b",))]),
        Slice([Endpoint(REMOTE, zones=("a",))], families=(4,)),
        Slice([Endpoint(REMOTE)], families=(6,)),
    ]
    pages.add("hints-over-slices", "TOP-6 DS-3", slices=slices)
    slices = [
        Slice([Endpoint(LOCAL, zones=("b",)), Endpoint(REMOTE, zones=("a",))], [HTTP]),
        Slice([Endpoint(LOCAL), Endpoint(REMOTE, zones=("a",))], [DNS]),
    ]
    pages.add("hints-per-port", "TOP-6", slices=slices, thin=False)
    for name in ("PreferClose", "PreferSameNode", "PreferSameZone"):
        pages.add(
            f"distribution-{name.lower()}",
            "TOP-9 SEL-6",
            PATTERNS["both"],
            spec={"trafficDistribution": name},
        )


def conditions(pages: book.Book) -> None:
    """Every combination of conditions, said or not, alone and beside a ready one elsewhere."""
    says = {None: "n", True: "t", False: "f"}
    for ready, serving, terminating in itertools.product(says, says, says):
        name = f"{says[ready]}{says[serving]}{says[terminating]}"
        one = Endpoint(LOCAL, ready, serving, terminating)
        other = one._replace(place=REMOTE)
        pages.add(f"conditions-{name}", "EP-1 EP-2 EP-3 EP-5 EP-6 EP-7 EP-8", [one], spec=ETP["l"])
        pages.add(f"conditions-{name}-beside", "EP-1 EP-4 EP-9", [one, Endpoint(REMOTE)], spec=BOTH_LOCAL)
        pages.add(f"conditions-{name}-remote", "EP-1 EP-4 EP-8", [other], spec=BOTH_LOCAL)


def slices(pages: book.Book) -> None:
    ready = PATTERNS["both"]
    other_target = [HTTP._replace(target=book.OTHER_TARGET), DNS._replace(target=book.OTHER_TARGET)]
    pages.add("slices-two", "ES-7 E2E-5", slices=[Slice([Endpoint(LOCAL)]), Slice([Endpoint(REMOTE)])])
    pages.add(
        "slices-targets",
        "ES-5",
        slices=[Slice([Endpoint(LOCAL)]), Slice([Endpoint(LOCAL), Endpoint(REMOTE)], other_target)],
        variants="maglev",
    )
    pages.add("slices-twice", "ES-7", slices=[Slice(ready), Slice(ready)])
    pages.add("slices-twice-in-one", "ES-7", [*ready, *ready])
    draining = Slice([Endpoint(LOCAL, **DRAINING)])
    for order in ([draining, Slice(ready)], [Slice(ready), draining]):
        name = "first" if order[0] is draining else "last"
        pages.add(f"slices-draining-{name}", "ES-8", slices=order)
        pages.add(f"slices-draining-{name}-local", "ES-8", slices=order, spec=BOTH_LOCAL)
    unready = [Endpoint(LOCAL, **UNREADY)]
    pages.add("slices-draining-beaten-by-unready", "ES-8", slices=[draining, Slice(unready)])
    pages.add("slices-one-port", "ES-9 REJ-6", slices=[Slice(ready, [HTTP])], thin=False)
    pages.add(
        "slices-a-port-each",
        "ES-9",
        slices=[Slice([Endpoint(LOCAL)], [HTTP]), Slice([Endpoint(REMOTE)], [DNS])],
        thin=False,
    )
    numbers: dict[str, Object] = {
        "other-name": {"name": "web", "protocol": "TCP", "port": 8080},
        "other-protocol": {"name": "http", "protocol": "UDP", "port": 8080},
        "no-name": {"protocol": "TCP", "port": 8080},
        "empty-name": {"name": "", "protocol": "TCP", "port": 8080},
        "no-number": {"name": "http", "protocol": "TCP"},
        "zero": {"name": "http", "protocol": "TCP", "port": 0},
        "no-protocol": {"name": "http", "port": 8080},
    }
    for name, port in numbers.items():
        pages.add(f"slices-port-{name}", "ES-3 ES-4", slices=[Slice(ready, [port])], thin=False)
    unnamed = HTTP._replace(name="")
    pages.add("slices-unnamed", "ES-3", ready, ports=[unnamed])
    pages.add(
        "slices-unnamed-null", "ES-4", slices=[Slice(ready, [{"name": None, "port": 8080}])], ports=[unnamed]
    )
    pages.add("slices-wrong-namespace", "ES-1", slices=[Slice(ready, namespace="elsewhere")])
    pages.add("slices-no-label", "ES-1", slices=[Slice(ready, labels={})])
    pages.add("slices-empty-label", "ES-1", slices=[Slice(ready, labels={"kubernetes.io/service-name": ""})])
    pages.add("slices-fqdn", "ES-2", slices=[Slice(ready, address_type="FQDN"), Slice([Endpoint(LOCAL)])])
    pages.add(
        "slices-no-addresses", "ES-6", slices=[Slice([Endpoint(LOCAL), {"addresses": [], "nodeName": "n1"}])]
    )
    second = {
        "addresses": [book.PLACES[LOCAL].ipv4, book.PLACES[LOCAL_TOO].ipv4],
        "conditions": {"ready": True},
        "nodeName": "n1",
    }
    pages.add("slices-first-address", "ES-6", slices=[Slice([second], families=(4,))])
    pages.add(
        "slices-no-conditions",
        "EP-1",
        slices=[Slice([{**Endpoint(LOCAL).at(4), "conditions": {}}], families=(4,))],
    )
    labelled = {"kubernetes.io/service-name": "slices-headless", "service.kubernetes.io/headless": ""}
    pages.add("slices-headless", "SEL-5", slices=[Slice(ready, labels=labelled)])
    labelled = labelled | {"kubernetes.io/service-name": "slices-headless-too"}
    pages.add(
        "slices-headless-too",
        "SEL-5",
        slices=[Slice([Endpoint(LOCAL)], labels=labelled), Slice([Endpoint(REMOTE)])],
    )
    pages.add("slices-null-endpoints", "ES-4", slices=[Slice([], ports=[])])


def nodes(pages: book.Book) -> None:
    for name, text in {"none": "", "other-case": "N1", "other": "n9"}.items():
        endpoints = [Endpoint(LOCAL, node_name=text), Endpoint(REMOTE)]
        pages.add(f"node-name-{name}", "ETP-10", endpoints, spec=BOTH_LOCAL)
    pages.add(
        "node-name-lies",
        "ETP-10",
        [Endpoint(REMOTE, node_name="n1"), Endpoint(LOCAL, node_name="n3")],
        spec=BOTH_LOCAL,
    )
    pages.add("no-node-names", "CIP-8 ES-13", [Endpoint("n1", node_name=""), Endpoint("n3", node_name="")])
    pages.add("off-cluster", "ES-13", [Endpoint("outside", node_name=""), Endpoint(LOCAL)])


def selection(pages: book.Book) -> None:
    both = PATTERNS["both"]
    specs: dict[str, Object] = {
        "headless": {"clusterIP": "None", "clusterIPs": ["None"]},
        "no-cluster-ip": {"clusterIP": "", "clusterIPs": []},
        "external-name": {"type": "ExternalName", "externalName": "example.org"},
    }
    for name, spec in specs.items():
        pages.add(f"ignored-{name}", "SEL-1 SEL-2 SEL-3", both, spec=spec)
    for value in ("other-proxy", ""):
        labels = {"service.kubernetes.io/service-proxy-name": value}
        pages.add(f"ignored-proxy-name-{value or 'empty'}", "SEL-4", both, labels=labels)
    labels = {"service.kubernetes.io/headless": ""}
    pages.add("service-headless-label", "SEL-5", both, labels=labels)
    unread: Object = {"loadBalancerClass": "x/y", "publishNotReadyAddresses": True, "selector": {"app": "x"}}
    pages.add("fields-never-read", "SEL-6", [Endpoint(LOCAL), Endpoint(REMOTE, **UNREADY)], spec=unread)
    pages.add("type-unknown-to-node-ports", "SEL-7", both, spec={"type": "ClusterIP"})


def families(pages: book.Book) -> None:
    both = PATTERNS["both"]
    for family in book.FAMILIES:
        endpoints = [Slice(both, families=(family,))]
        pages.add(f"family-ipv{family}", "SEL-9 NP-14 DS-3", both, families=(family,))
        pages.add(f"family-ipv{family}-slices-of-both", "SEL-9", slices=[Slice(both)], families=(family,))
        pages.add(f"family-endpoints-ipv{family}", "DS-3", slices=endpoints)
        pages.add(f"family-endpoints-ipv{family}-local", "DS-3", slices=endpoints, spec=BOTH_LOCAL)
        own = pages.addresses()
        spec = {"clusterIP": own.cluster(family), "clusterIPs": [own.cluster(family)], "ipFamilies": []}
        pages.add(f"family-unsaid-ipv{family}", "SEL-10", both, spec=spec)
    pages.add("family-ipv6-first", "SEL-10", both, families=(6, 4))
    slices = [Slice([Endpoint(LOCAL)], families=(4,)), Slice([Endpoint(REMOTE)], families=(6,))]
    pages.add("family-other-endpoints", "DS-3", slices=slices, spec=BOTH_LOCAL)


def affinity(pages: book.Book) -> None:
    for pattern in ("both", "four", "client-and-others", "local-draining"):
        for etp, spec in ETP.items():
            pages.add(
                f"affinity-e{etp}-{pattern}",
                "AFF-2 AFF-5 AFF-8",
                PATTERNS[pattern],
                spec=AFFINITY | spec,
                thin=False,
                variants="maglev xdp" if pattern == "four" else "",
            )


def whole() -> list[book.Scenario]:
    """Return all scenarios, written by hand or drawn by lot."""
    pages = book.Book()
    for write in (
        policies,
        hints,
        conditions,
        slices,
        nodes,
        frontends.source_ranges,
        frontends.addresses,
        frontends.node_ports,
        selection,
        families,
        affinity,
        lots.draw,
    ):
        write(pages)
    return pages.scenarios
