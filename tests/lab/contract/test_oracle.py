"""The oracle against the contract's own words, item by item."""

import dataclasses
import typing

import hypothesis
import pytest
from hypothesis import strategies

from tests.lab.contract import book, oracle, scenarios, variants
from tests.lab.contract.book import LOCAL, REMOTE, Endpoint
from tests.lab.contract.oracle import Kind

POD, NODE, OUTSIDE = "10.244.1.2", "172.18.0.1", "172.18.0.100"
HERE, THERE = (oracle.Backend(book.PLACES[one].ipv4, 8080) for one in (LOCAL, REMOTE))
DRAINING: book.Object = {"ready": False, "serving": True, "terminating": True}
OWN = book.Addresses(1)
CLUSTER, NODE_PORT = (OWN.cluster(4), 80), (NODE, OWN.node_port)
EXTERNAL, BALANCER = (OWN.external(4), 80), (OWN.balancer(4), 80)
SOURCES = {POD: "cni0", NODE: "", OUTSIDE: "eth0", "10.244.2.2": "eth0", "172.18.0.2": "eth0"}


class Asked(typing.NamedTuple):
    kind: Kind
    backends: set[oracle.Backend]
    masqueraded: set[oracle.Backend]


def ask(
    source: str,
    target: tuple[str, int],
    endpoints: list[Endpoint],
    *,
    config: oracle.Config = variants.PLAIN,
    zone: str = "",
    spec: book.Object | None = None,
    **options: typing.Any,
) -> Asked:
    """Play one service in a cluster of its own."""
    pages = book.Book()
    pages.add("web", "", endpoints, spec=spec, **options)
    node = dataclasses.replace(variants.VARIANTS["plain"], zone=zone).node()
    truth = oracle.Oracle(config, [node, *pages.scenarios[0].objects])
    found = truth.verdict(oracle.Probe(source, *target, device=SOURCES[source]))
    return Asked(found.kind, set(found.backends), set(found.masqueraded))


def served(*backends: oracle.Backend, masqueraded: bool = False) -> Asked:
    return Asked(Kind.SERVED, set(backends), set(backends) if masqueraded else set())


DROPPED, REFUSED = Asked(Kind.DROP, set(), set()), Asked(Kind.REJECT, set(), set())
UNTOUCHED = Asked(Kind.UNTOUCHED, set(), set())
BOTH = [Endpoint(LOCAL), Endpoint(REMOTE)]
INTERNAL_LOCAL, EXTERNAL_LOCAL = {"internalTrafficPolicy": "Local"}, {"externalTrafficPolicy": "Local"}


@pytest.mark.parametrize(
    ("source", "masqueraded"), [(POD, False), ("10.244.2.2", False), (NODE, True), (OUTSIDE, True)]
)
def test_cluster_ips_masquerade_whoever_is_no_pod(source: str, masqueraded: bool) -> None:  # CIP-3, DET-1
    assert ask(source, CLUSTER, BOTH) == served(HERE, THERE, masqueraded=masqueraded)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", [NODE_PORT, EXTERNAL, BALANCER])
def test_external_addresses_under_cluster_policy_masquerade_everyone(
    source: str, target: tuple[str, int]
) -> None:  # ETP-2, MASQ-3
    assert ask(source, target, BOTH) == served(HERE, THERE, masqueraded=True)


@pytest.mark.parametrize("target", [NODE_PORT, EXTERNAL, BALANCER])
def test_external_policy_local_depends_on_who_asks(target: tuple[str, int]) -> None:
    assert ask(OUTSIDE, target, BOTH, spec=EXTERNAL_LOCAL) == served(HERE)  # ETP-3
    assert ask("172.18.0.2", target, BOTH, spec=EXTERNAL_LOCAL) == served(HERE)  # ETP-7
    assert ask(POD, target, BOTH, spec=EXTERNAL_LOCAL) == served(HERE, THERE)  # ETP-4
    assert ask(NODE, target, BOTH, spec=EXTERNAL_LOCAL) == served(HERE, THERE, masqueraded=True)  # ETP-5
    remote = [Endpoint(REMOTE)]
    assert ask(OUTSIDE, target, remote, spec=EXTERNAL_LOCAL) == DROPPED  # ETP-8
    assert ask(POD, target, remote, spec=EXTERNAL_LOCAL) == served(THERE)
    assert ask(OUTSIDE, target, [], spec=EXTERNAL_LOCAL) == REFUSED  # ETP-9


def test_without_a_detector_pods_are_outside() -> None:
    blind = dataclasses.replace(variants.PLAIN, cluster_cidrs=())
    assert ask(POD, BALANCER, BOTH, config=blind, spec=EXTERNAL_LOCAL) == served(HERE)  # ETP-6
    assert ask(NODE, BALANCER, BOTH, config=blind, spec=EXTERNAL_LOCAL) == served(
        HERE, THERE, masqueraded=True
    )
    assert ask(OUTSIDE, CLUSTER, BOTH, config=blind) == served(HERE, THERE)  # MASQ-2


def test_internal_policy_is_for_cluster_ips_alone() -> None:  # ITP-1 to ITP-4
    for source in SOURCES:
        assert ask(source, CLUSTER, BOTH, spec=INTERNAL_LOCAL).backends == {HERE}
        assert ask(source, CLUSTER, [Endpoint(REMOTE)], spec=INTERNAL_LOCAL) == DROPPED
        assert ask(source, CLUSTER, [], spec=INTERNAL_LOCAL) == REFUSED
        assert ask(source, BALANCER, BOTH, spec=INTERNAL_LOCAL).backends == {HERE, THERE}


@pytest.mark.parametrize("ready", [True, False, None])
@pytest.mark.parametrize("serving", [True, False, None])
@pytest.mark.parametrize("terminating", [True, False, None])
def test_conditions(ready: bool | None, serving: bool | None, terminating: bool | None) -> None:
    endpoint = Endpoint(LOCAL, ready, serving, terminating)
    usable = ready is not False or (serving is not False and terminating is True)  # EP-1, EP-3, EP-5
    assert ask(POD, CLUSTER, [endpoint]) == (served(HERE) if usable else REFUSED)
    beside = ask(POD, CLUSTER, [endpoint, Endpoint(REMOTE)])
    assert beside == (served(HERE, THERE) if ready is not False else served(THERE))


def test_the_terminating_fallback_is_for_each_set_alone() -> None:  # EP-4, EP-9
    endpoints = [Endpoint(LOCAL, **DRAINING), Endpoint(REMOTE)]
    assert ask(OUTSIDE, BALANCER, endpoints, spec=EXTERNAL_LOCAL) == served(HERE)
    assert ask(POD, BALANCER, endpoints, spec=EXTERNAL_LOCAL) == served(THERE)
    assert ask(POD, CLUSTER, endpoints, spec=EXTERNAL_LOCAL) == served(THERE)


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        ({"zones": ("b",)}, {"zones": ("a",)}, {THERE}),  # TOP-3
        ({"zones": ("b",)}, {"zones": ("c",)}, {HERE, THERE}),
        ({"zones": ("b",)}, {}, {HERE, THERE}),  # TOP-4
        ({"nodes": ("n3",)}, {"nodes": ("n1",)}, {THERE}),  # TOP-2
        ({"nodes": ("n3",), "zones": ("a",)}, {"nodes": ("n2",), "zones": ("b",)}, {HERE}),
        ({"nodes": ("n3",), "zones": ("a",)}, {"nodes": ("n1",), "zones": ("b",)}, {THERE}),
    ],
)
def test_hints(
    here: dict[str, typing.Any], there: dict[str, typing.Any], expected: set[oracle.Backend]
) -> None:
    endpoints = [Endpoint(LOCAL, **here), Endpoint(REMOTE, **there)]
    assert ask(POD, CLUSTER, endpoints, zone="a").backends == expected
    assert ask(OUTSIDE, BALANCER, endpoints, zone="a").backends == expected  # TOP-7
    assert ask(OUTSIDE, BALANCER, endpoints, zone="a", spec=EXTERNAL_LOCAL).backends == {HERE}


def test_zones_need_a_zone() -> None:  # TOP-5
    endpoints = [Endpoint(LOCAL, zones=("b",)), Endpoint(REMOTE, zones=("a",))]
    assert ask(POD, CLUSTER, endpoints).backends == {HERE, THERE}


def test_hairpin_is_for_that_backend_alone() -> None:  # MASQ-5
    own = oracle.Backend(POD, 8080)
    found = ask(POD, CLUSTER, [Endpoint("n1/p1"), Endpoint(REMOTE)])
    assert found == Asked(Kind.SERVED, {own, THERE}, {own})


def test_backends_of_the_node_itself_see_their_client() -> None:  # MASQ-8
    own = oracle.Backend(NODE, 8080)
    assert ask(OUTSIDE, NODE_PORT, [Endpoint("n1"), Endpoint(REMOTE)]) == Asked(
        Kind.SERVED, {own, THERE}, {THERE}
    )


def test_source_ranges_are_for_balancer_addresses_alone() -> None:  # SR-1, SR-2, SR-3
    ranges: book.Object = {"loadBalancerSourceRanges": ["172.18.0.0/25 "]}
    assert ask(OUTSIDE, BALANCER, BOTH, spec=ranges) == served(HERE, THERE, masqueraded=True)
    assert ask(POD, BALANCER, BOTH, spec=ranges) == DROPPED
    for target in (CLUSTER, NODE_PORT, EXTERNAL):
        assert ask(POD, target, BOTH, spec=ranges).kind is Kind.SERVED
    assert ask(POD, BALANCER, [], spec=ranges) == REFUSED  # SR-10
    ranges = {"loadBalancerSourceRanges": ["fd00::/64"]}
    assert ask(POD, BALANCER, BOTH, spec=ranges).kind is Kind.SERVED  # SR-7
    ranges = {"loadBalancerSourceRanges": ["192.0.2.0/24", "0.0.0.0/0"]}
    assert ask(POD, BALANCER, BOTH, spec=ranges).kind is Kind.SERVED  # SR-6


def test_node_ports_are_on_addresses_of_the_node() -> None:
    port = OWN.node_port
    assert ask(POD, ("172.18.0.2", port), BOTH) == UNTOUCHED  # NP-1
    assert ask(POD, ("10.244.1.1", port), BOTH).kind is Kind.SERVED  # NP-3
    assert ask(NODE, ("127.0.0.1", port), BOTH) == served(HERE, THERE, masqueraded=True)  # NP-8
    assert ask(NODE, ("::1", port), BOTH) == UNTOUCHED  # NP-9
    some = dataclasses.replace(variants.PLAIN, nodeport_addresses=("172.18.0.0/24",))
    assert ask(POD, ("10.244.1.1", port), BOTH, config=some) == UNTOUCHED  # NP-5
    assert ask(NODE, ("127.0.0.1", port), BOTH, config=some) == UNTOUCHED
    other = dataclasses.replace(variants.PLAIN, nodeport_addresses=("fd00::/64",))
    assert ask(POD, ("10.244.1.1", port), BOTH, config=other).kind is Kind.SERVED  # NP-6
    nftables = dataclasses.replace(variants.PLAIN, nftables=True)
    assert ask(POD, NODE_PORT, BOTH, config=nftables).kind is Kind.SERVED
    assert ask(POD, ("10.244.1.1", port), BOTH, config=nftables) == UNTOUCHED


def test_what_is_not_a_frontend_is_left_alone() -> None:
    assert ask(POD, (OWN.cluster(4), 81), BOTH) == UNTOUCHED  # CIP-4
    assert ask(POD, (NODE, 80), BOTH) == UNTOUCHED  # NP-13
    proxied = [{"ip": OWN.balancer(4), "ipMode": "Proxy"}]
    assert ask(POD, BALANCER, BOTH, ingress=proxied) == UNTOUCHED  # LB-2
    assert ask(POD, BALANCER, [], ingress=proxied) == UNTOUCHED  # REJ-9
    assert ask(POD, NODE_PORT, BOTH, families=(6,)) == UNTOUCHED  # SEL-9
    labels = {"service.kubernetes.io/service-proxy-name": ""}
    assert ask(POD, CLUSTER, BOTH, labels=labels) == UNTOUCHED  # SEL-4
    assert ask(POD, CLUSTER, BOTH, spec={"type": "ExternalName"}) == UNTOUCHED  # SEL-3


def test_a_live_duplicate_beats_a_terminating_one() -> None:  # ES-8
    for endpoints in (
        [Endpoint(LOCAL), Endpoint(LOCAL, **DRAINING)],
        [Endpoint(LOCAL, **DRAINING), Endpoint(LOCAL)],
    ):
        assert ask(POD, CLUSTER, [*endpoints, Endpoint(REMOTE)]) == served(HERE, THERE)


@hypothesis.given(
    strategies.sampled_from(scenarios.whole()),
    strategies.sampled_from(list(variants.VARIANTS.values())),
    strategies.sampled_from(sorted(SOURCES)),
    strategies.data(),
)
@hypothesis.settings(max_examples=300, deadline=None)
def test_verdicts_hang_together(
    scenario: book.Scenario, variant: variants.Variant, source: str, data: strategies.DataObject
) -> None:
    target = data.draw(strategies.sampled_from([one for one in scenario.targets if one.family == 4]))
    truth = oracle.Oracle(variant.config, [variant.node(), *scenario.objects])
    probe = oracle.Probe(source, target.address, target.port, target.protocol, SOURCES[source])
    verdict = truth.verdict(probe)
    assert (verdict.kind is Kind.SERVED) == bool(verdict.backends)
    assert verdict.masqueraded <= verdict.backends
    assert verdict.kind not in verdict.also
    backwards = oracle.Oracle(variant.config, [*reversed(scenario.objects), variant.node()])
    assert backwards.verdict(probe) == verdict
