"""Which health checks there are, what they count, and where they listen (HC-1 to HC-6)."""

import json

import pytest

from lbproxy.core import addresses, events, health_checks, model, state

NODE = "node-a"
WEB = model.ServiceName("shop", "web")
HTTP = model.SlicePort("http", model.Protocol.TCP, 8080)
IPV4, IPV6 = model.Family.IPV4, model.Family.IPV6


def packed(text: str) -> bytes:
    address = addresses.parse(text)
    assert address is not None
    return address


def service(port: int = 30100, ips: tuple[str, ...] = ("10.96.0.1",), name: str = "web") -> events.Upsert:
    value = model.Service(
        name=model.ServiceName("shop", name),
        cluster_ips=tuple(map(packed, ips)),
        external_ips=(),
        load_balancer_ips=(),
        ports=(model.ServicePort("http", model.Protocol.TCP, 80, 30080),),
        affinity_s=0,
        internal_local=False,
        external_local=True,
        algorithm=None,
        health_check_node_port=port,
    )
    return events.Upsert(events.Kind.SERVICE, events.ObjectName("shop", name), value)


def endpoint(text: str, node: str = NODE, *, ready: bool = True, terminating: bool = False) -> model.Endpoint:
    return model.Endpoint(packed(text), ready, True, terminating, model.Location(node, ""))


def slice_of(
    *endpoints: model.Endpoint,
    ports: tuple[model.SlicePort, ...] = (HTTP,),
    family: model.Family = IPV4,
    name: str = "web-1",
) -> events.Upsert:
    value = model.EndpointSlice("shop", name, WEB, family, ports, endpoints, 0.0)
    return events.Upsert(events.Kind.ENDPOINT_SLICE, events.ObjectName("shop", name), value)


def cluster(*happened: events.Event) -> state.ClusterState:
    known = state.ClusterState(NODE)
    for event in happened:
        known.apply(event)
    return known


def count(*happened: events.Event, family: model.Family = IPV4) -> int:
    found = health_checks.check(cluster(service(ips=("10.96.0.1", "fd00::1")), *happened), WEB)
    assert found is not None
    return found.local[family]


def test_a_service_without_a_health_check_port_has_none() -> None:
    assert health_checks.check(cluster(service(port=0)), WEB) is None
    assert health_checks.check(cluster(), WEB) is None


def test_ready_endpoints_of_this_node_count() -> None:
    assert count() == 0
    assert count(slice_of(endpoint("10.0.0.1"), endpoint("10.0.0.2"))) == 2
    assert count(slice_of(endpoint("10.0.0.1", "node-b"), endpoint("10.0.0.2", ""))) == 0
    assert count(slice_of(endpoint("10.0.0.1", ready=False))) == 0


def test_a_terminating_endpoint_does_not_count_although_it_still_serves() -> None:
    assert count(slice_of(endpoint("10.0.0.1", ready=False, terminating=True))) == 0


def test_an_address_counts_once_whatever_ports_and_slices_it_is_in() -> None:
    metrics = model.SlicePort("metrics", model.Protocol.TCP, 9090)
    first = slice_of(endpoint("10.0.0.1"), ports=(HTTP, metrics))
    second = slice_of(endpoint("10.0.0.1"), endpoint("10.0.0.2"), ports=(metrics,), name="web-2")
    assert count(first, second) == 2


def test_families_are_counted_apart() -> None:
    happened = (slice_of(endpoint("10.0.0.1")), slice_of(family=IPV6, name="web-6"))
    assert count(*happened) == 1
    assert count(*happened, family=IPV6) == 0


def test_a_family_that_the_service_lacks_is_not_served() -> None:
    checks = health_checks.Checks()
    assert checks.look(cluster(service()), [WEB])
    wanted = checks.wanted(health_checks.places((), (), ()))
    assert wanted == ({health_checks.Listener(addresses.IPV4_ZERO, 30100): WEB}, {})


def test_looking_again_finds_changes_alone() -> None:
    checks = health_checks.Checks()
    known = cluster(service(), slice_of(endpoint("10.0.0.1")))
    assert checks.look(known, [WEB])
    assert not checks.look(known, [WEB])
    known.apply(slice_of())
    assert checks.look(known, [WEB])
    assert checks.by_service[WEB].local == {IPV4: 0}
    known.apply(events.Delete(events.Kind.SERVICE, events.ObjectName("shop", "web")))
    assert checks.look(known, [WEB])
    assert not checks.by_service


@pytest.mark.parametrize(
    ("cidrs", "ipv4", "ipv6"),
    [
        ([], ["0.0.0.0"], ["::"]),
        (["0.0.0.0/0"], ["0.0.0.0"], ["::"]),
        (["192.0.2.0/24"], ["192.0.2.1", "192.0.2.2"], ["::"]),
        (["192.0.2.2/32", "2001:db8::/64"], ["192.0.2.2"], ["2001:db8::1"]),
        (["203.0.113.0/24"], [], ["::"]),
        (["10.0.0.0/8", "0.0.0.0/0"], ["0.0.0.0"], ["::"]),
        (["fe80::/10"], ["0.0.0.0"], []),
        (["primary"], ["192.0.2.1"], ["2001:db8::1"]),
    ],
)
def test_listeners_follow_node_port_addresses(cidrs: list[str], ipv4: list[str], ipv6: list[str]) -> None:
    local = [packed(text) for text in ("127.0.0.1", "192.0.2.1", "192.0.2.2", "2001:db8::1", "fe80::1")]
    node = [packed(text) for text in ("192.0.2.1", "2001:db8::1", "192.0.2.2")]
    found = health_checks.places(cidrs, local, node)
    assert {family: list(map(addresses.text, of)) for family, of in found.items()} == {IPV4: ipv4, IPV6: ipv6}


def test_of_two_services_with_one_port_the_first_is_served() -> None:
    checks = health_checks.Checks()
    checks.look(cluster(service(name="b"), service(name="a")), [WEB._replace(name=name) for name in "ba"])
    wanted = checks.wanted(health_checks.places((), (), ()))
    assert [name.name for name in wanted.listeners.values()] == ["a"]
    assert [name.name for name in wanted.refused] == ["b"]


@pytest.mark.parametrize(
    ("local", "healthy", "status"), [(2, True, 200), (0, True, 503), (2, False, 503), (0, False, 503)]
)
def test_the_answer_is_kube_proxys_to_the_byte(local: int, healthy: bool, status: int) -> None:
    answer, headers = health_checks.answer(WEB, local, healthy=healthy)
    assert answer.status == status
    assert headers == {"X-Load-Balancing-Endpoint-Weight": str(local)}
    assert answer.body.decode() == (
        '{\n\t"service": {\n\t\t"namespace": "shop",\n\t\t"name": "web"\n\t},\n'
        f'\t"localEndpoints": {local},\n\t"serviceProxyHealthy": {json.dumps(healthy)}\n}}'
    )
