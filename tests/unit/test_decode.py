import json
import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.core import addresses, decode, events, identity, model

Object = dict[str, typing.Any]
Encoding = typing.Callable[[Object], identity.Source]


def to_json(value: Object) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture(params=["json", "mapping", "raw"])
def encoded(request: pytest.FixtureRequest) -> Encoding:
    """Objects come as JSON from the API server, and as mappings from YAML."""
    encodings: dict[str, Encoding] = {
        "json": to_json,
        "mapping": lambda value: value,
        "raw": lambda value: msgspec.Raw(to_json(value)),
    }
    return encodings[request.param]


def ips(*texts: str) -> tuple[bytes, ...]:
    parsed = tuple(addresses.parse(text) for text in texts)
    assert all(parsed)
    return typing.cast(tuple[bytes, ...], parsed)


def a_service(metadata: Object | None = None, status: Object | None = None, **spec: typing.Any) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "team", "uid": "uid-1", "resourceVersion": "7"}
        | (metadata or {}),
        "spec": {
            "type": "ClusterIP",
            "clusterIP": "10.96.0.10",
            "clusterIPs": ["10.96.0.10"],
            "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": "www"}],
        }
        | spec,
        "status": status or {"loadBalancer": {}},
    }


def a_slice(metadata: Object | None = None, **fields: typing.Any) -> Object:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-x1", "namespace": "team", "labels": {"kubernetes.io/service-name": "web"}}
        | (metadata or {}),
        "addressType": "IPv4",
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
        "endpoints": [{"addresses": ["10.244.1.2"], "nodeName": "node-a", "zone": "zone-1"}],
    } | fields


def a_node(
    metadata: Object | None = None, spec: Object | None = None, status: Object | None = None
) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "node-a", "labels": {"topology.kubernetes.io/zone": "zone-1"}}
        | (metadata or {}),
        "spec": spec or {},
        "status": status or {},
    }


def service_of(upsert: events.Upsert) -> model.Service:
    assert isinstance(upsert.value, model.Service)
    return upsert.value


def slice_of(upsert: events.Upsert) -> model.EndpointSlice:
    assert isinstance(upsert.value, model.EndpointSlice)
    return upsert.value


def test_service(encoded: Encoding) -> None:
    value = a_service(
        status={"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}, {"hostname": "lb.example.com"}]}},
        type="LoadBalancer",
        clusterIP="10.96.0.10",
        clusterIPs=["10.96.0.10", "2001:db8::10"],
        ipFamilies=["IPv4", "IPv6"],
        externalIPs=["198.51.100.7", "2001:db8:1::7"],
        ports=[
            {"name": "http", "port": 80, "nodePort": 30080},
            {"name": "dns", "port": 53, "protocol": "UDP"},
        ],
        sessionAffinity="ClientIP",
        sessionAffinityConfig={"clientIP": {"timeoutSeconds": 60}},
        internalTrafficPolicy="Local",
        externalTrafficPolicy="Local",
        loadBalancerSourceRanges=["192.0.2.0/24 ", "2001:db8::/32"],
        healthCheckNodePort=32100,
    )
    assert decode.service(encoded(value)) == events.Upsert(
        events.Kind.SERVICE,
        events.ObjectName("team", "web"),
        model.Service(
            name=model.ServiceName("team", "web"),
            cluster_ips=ips("10.96.0.10", "2001:db8::10"),
            external_ips=ips("198.51.100.7", "2001:db8:1::7"),
            load_balancer_ips=ips("192.0.2.1"),
            ports=(
                model.ServicePort("http", model.Protocol.TCP, 80, 30080),
                model.ServicePort("dns", model.Protocol.UDP, 53, 0),
            ),
            affinity_s=60,
            internal_local=True,
            external_local=True,
            algorithm=None,
            source_ranges=(
                model.SourceRange(ips("192.0.2.0")[0], 120),
                model.SourceRange(ips("2001:db8::")[0], 32),
            ),
            health_check_node_port=32100,
        ),
    )


def test_endpoint_slice(encoded: Encoding) -> None:
    value = a_slice(
        {
            "annotations": {
                "endpoints.kubernetes.io/last-change-trigger-time": "1970-01-01T00:01:00.250000001Z"
            }
        },
        endpoints=[
            {
                "addresses": ["10.244.1.2", "10.244.9.9"],
                "conditions": {"ready": False, "serving": True, "terminating": True},
                "nodeName": "node-a",
                "zone": "zone-1",
                "hints": {"forZones": [{"name": "zone-1"}], "forNodes": [{"name": "node-a"}]},
            },
        ],
    )
    assert decode.endpoint_slice(encoded(value)) == events.Upsert(
        events.Kind.ENDPOINT_SLICE,
        events.ObjectName("team", "web-x1"),
        model.EndpointSlice(
            namespace="team",
            name="web-x1",
            service=model.ServiceName("team", "web"),
            family=model.Family.IPV4,
            ports=(model.SlicePort("http", model.Protocol.TCP, 8080),),
            endpoints=(
                model.Endpoint(
                    ips("10.244.1.2")[0],
                    False,
                    True,
                    True,
                    model.Location("node-a", "zone-1", ("zone-1",), ("node-a",)),
                ),
            ),
            trigger_time_s=60.25,
        ),
    )


def test_node(encoded: Encoding) -> None:
    value = a_node(
        spec={"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "2001:db8:244::/64"]},
        status={
            "addresses": [
                {"type": "Hostname", "address": "node-a"},
                {"type": "ExternalIP", "address": "203.0.113.1"},
                {"type": "InternalIP", "address": "192.0.2.1"},
                {"type": "InternalIP", "address": "nonsense"},
                {"type": "InternalIP", "address": "2001:db8::1"},
            ]
        },
    )
    assert decode.node(encoded(value)) == events.Upsert(
        events.Kind.NODE,
        events.ObjectName("", "node-a"),
        model.Node(
            name="node-a",
            addresses=ips("192.0.2.1", "2001:db8::1", "203.0.113.1"),
            zone="zone-1",
            pod_cidrs=("10.244.1.0/24", "2001:db8:244::/64"),
            eligible=True,
        ),
    )


TAINT = {"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}


@pytest.mark.parametrize(
    ("metadata", "spec"), [({"deletionTimestamp": "2025-01-01T00:00:00Z"}, {}), ({}, {"taints": [TAINT]})]
)
def test_a_node_about_to_go_is_not_eligible(encoded: Encoding, metadata: Object, spec: Object) -> None:
    value = decode.node(encoded(a_node(metadata, spec))).value
    assert isinstance(value, model.Node)
    assert not value.eligible
    assert value.deleting is bool(metadata)


@pytest.mark.parametrize(
    ("annotations", "told"),
    [
        (None, ""),
        ({}, ""),
        ({"lbproxy.io/migrate": "take-over/1"}, "take-over/1"),
        ({"lbproxy.io/migrate": 1}, "1"),
    ],
)
def test_a_node_says_what_its_agent_is_to_do(annotations: Object | None, told: str) -> None:
    read = decode.node({"metadata": {"name": "node-a", "annotations": annotations}}).value
    assert isinstance(read, model.Node)
    assert read.migrate == told


@pytest.mark.parametrize(
    ("labels", "who"),
    [(None, ""), ({}, ""), ({"lbproxy.io/proxy": "both"}, "both"), ({"lbproxy.io/proxy": 1}, "1")],
)
def test_a_node_says_who_is_to_run_there(labels: Object | None, who: str) -> None:
    read = decode.node({"metadata": {"name": "node-a", "labels": labels}}).value
    assert isinstance(read, model.Node)
    assert read.proxy == who


def test_a_node_with_another_taint_or_little_else_is_eligible() -> None:
    assert decode.node(a_node(spec={"taints": [{"key": "dedicated"}]})).value == model.Node(
        "node-a", (), "zone-1", (), True
    )
    assert decode.node(
        {"metadata": {"name": "node-a"}, "spec": {"podCIDR": "10.0.0.0/8"}}
    ).value == model.Node("node-a", (), "", ("10.0.0.0/8",), True)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(a_service(clusterIP="None", clusterIPs=["None"]), id="headless (SEL-1)"),
        pytest.param(a_service(clusterIP="", clusterIPs=None), id="no cluster IP (SEL-2)"),
        pytest.param(a_service(type="ExternalName"), id="ExternalName (SEL-3)"),
        pytest.param(
            a_service({"labels": {"service.kubernetes.io/service-proxy-name": ""}}), id="proxy name (SEL-4)"
        ),
        pytest.param(
            a_service(type="ExternalName", ports=[{"port": 70000}]), id="ignored, whatever else is wrong"
        ),
    ],
)
def test_services_to_ignore_have_no_value(encoded: Encoding, value: Object) -> None:
    assert decode.service(encoded(value)) == events.Upsert(
        events.Kind.SERVICE, events.ObjectName("team", "web"), None
    )


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(a_slice({"labels": None}), id="no labels (ES-1)"),
        pytest.param(a_slice({"labels": {"kubernetes.io/service-name": ""}}), id="empty label (ES-1)"),
        pytest.param(
            a_slice({"labels": {"kubernetes.io/service-name": "web", "service.kubernetes.io/headless": ""}}),
            id="headless (SEL-5)",
        ),
        pytest.param(
            a_slice(addressType="FQDN", endpoints=[{"addresses": ["example.com"]}]), id="FQDN (ES-2)"
        ),
        pytest.param(a_slice(addressType="IPv7"), id="unknown address type (ES-2)"),
        pytest.param(a_slice(addressType=None), id="no address type"),
    ],
)
def test_slices_to_ignore_have_no_value(encoded: Encoding, value: Object) -> None:
    assert decode.endpoint_slice(encoded(value)) == events.Upsert(
        events.Kind.ENDPOINT_SLICE, events.ObjectName("team", "web-x1"), None
    )


SLICE = decode.endpoint_slice
SERVICE = decode.service

MALFORMED: dict[str, tuple[typing.Callable[[identity.Source], events.Upsert], Object, str]] = {
    "unparseable cluster IP": (
        SERVICE,
        a_service(clusterIP="10.96.0.256", clusterIPs=["10.96.0.256"]),
        "spec.clusterIPs[0]: '10.96.0.256' is not an IP address",
    ),
    "unparseable cluster IP without families": (
        SERVICE,
        a_service(clusterIP="ten", clusterIPs=None, ipFamilies=None),
        "spec.clusterIP: 'ten' is not an IP address",
    ),
    "cluster IP of another family": (
        SERVICE,
        a_service(clusterIPs=["2001:db8::1"]),
        "spec.clusterIPs[0]: '2001:db8::1' is not an IPv4 address",
    ),
    "cluster IP that means every pod itself": (
        SERVICE,
        a_service(clusterIPs=["127.0.0.1"]),
        "spec.clusterIPs[0]: '127.0.0.1' is loopback: no Service can have it",
    ),
    "cluster IP that is none": (
        SERVICE,
        a_service(clusterIP="0.0.0.0", clusterIPs=None, ipFamilies=None),
        "spec.clusterIP: '0.0.0.0' is unspecified: no Service can have it",
    ),
    "external IP that is loopback": (
        SERVICE,
        a_service(externalIPs=["bad", "198.51.100.1", "127.9.9.9"]),
        "spec.externalIPs[2]: '127.9.9.9' is loopback: the API server refuses it",
    ),
    "external IP that is link-local, of a family that the Service has not": (
        SERVICE,
        a_service(externalIPs=["fe80::1"]),
        "spec.externalIPs[0]: 'fe80::1' is link-local: the API server refuses it",
    ),
    "endpoint that is a cloud's metadata": (
        SLICE,
        a_slice(endpoints=[{"addresses": [text]} for text in ("10.244.1.2", "169.254.169.254")]),
        "endpoints[1].addresses[0]: '169.254.169.254' is link-local: the API server refuses it",
    ),
    "endpoint that is loopback": (
        SLICE,
        a_slice(addressType="IPv6", endpoints=[{"addresses": ["::1"]}]),
        "endpoints[0].addresses[0]: '::1' is loopback: the API server refuses it",
    ),
    "endpoint that is unspecified": (
        SLICE,
        a_slice(endpoints=[{"addresses": ["0.0.0.0"]}]),
        "endpoints[0].addresses[0]: '0.0.0.0' is unspecified: the API server refuses it",
    ),
    "endpoint that is multicast": (
        SLICE,
        a_slice(endpoints=[{"addresses": ["224.0.0.18"]}]),
        "endpoints[0].addresses[0]: '224.0.0.18' is link-local multicast: the API server refuses it",
    ),
    "cluster IP that is no text": (
        SERVICE,
        a_service(clusterIP=10),
        "spec.clusterIP: Expected str | null, got int",
    ),
    "port out of range": (
        SERVICE,
        a_service(ports=[{"port": 80, "name": "a"}, {"port": 65536, "name": "b"}]),
        "spec.ports[1].port: 65536 is not in 1..65535",
    ),
    "port zero": (SERVICE, a_service(ports=[{"port": 0}]), "spec.ports[0].port: 0 is not in 1..65535"),
    "negative node port": (
        SERVICE,
        a_service(ports=[{"port": 80, "nodePort": -1}]),
        "spec.ports[0].nodePort: -1 is not in 1..65535",
    ),
    "port that is text": (
        SERVICE,
        a_service(ports=[{"port": "80"}]),
        "spec.ports[0].port: Expected int, got str",
    ),
    "port that is missing": (
        SERVICE,
        a_service(ports=[{"name": "http"}]),
        "spec.ports[0]: Object missing required field port",
    ),
    "enormous port": (SERVICE, a_service(ports=[{"port": 10**400}]), "spec.ports[0].port: "),
    "unknown protocol": (
        SERVICE,
        a_service(ports=[{"port": 80, "protocol": "tcp"}]),
        "spec.ports[0].protocol: 'tcp' is not TCP, UDP or SCTP",
    ),
    "port name too long": (
        SERVICE,
        a_service(ports=[{"port": 80, "name": "p" * 64}]),
        f"spec.ports[0].name: '{'p' * 64}' is longer than 63 characters",
    ),
    "ports that are no list": (
        SERVICE,
        a_service(ports={"port": 80}),
        "spec.ports: Expected array | null, got object",
    ),
    "no name": (SERVICE, {"metadata": {"namespace": "team"}}, "metadata: Object missing required field name"),
    "null name": (SERVICE, {"metadata": {"name": None}}, "metadata.name: Expected str, got null"),
    "empty name": (
        SERVICE,
        a_service({"name": ""}),
        "metadata.name: '' is not a DNS label of at most 63 characters",
    ),
    "name too long": (
        SERVICE,
        a_service({"name": "n" * 64}),
        f"metadata.name: '{'n' * 64}' is not a DNS label of at most 63 characters",
    ),
    "name with a line break": (
        SERVICE,
        a_service({"name": "a\nb"}),
        "metadata.name: 'a\\nb' is not a DNS label of at most 63 characters",
    ),
    "namespace that is none": (
        SERVICE,
        a_service({"namespace": "Team/1"}),
        "metadata.namespace: 'Team/1' is not a DNS label of at most 63 characters",
    ),
    "no metadata": (SERVICE, {"spec": {}}, "Object missing required field metadata"),
    "another kind": (
        SERVICE,
        {"kind": "Pod", "metadata": {"name": "x"}},
        "apiVersion, kind: 'v1 Pod' is not understood, v1 Service is",
    ),
    "another version of slices": (
        SLICE,
        a_slice(apiVersion="discovery.k8s.io/v1beta1"),
        "apiVersion, kind: 'discovery.k8s.io/v1beta1 EndpointSlice' is not understood, "
        "discovery.k8s.io/v1 EndpointSlice is",
    ),
    "another version, with fields of other types": (
        SLICE,
        a_slice(apiVersion="discovery.k8s.io/v2", endpoints={"a": 1}),
        "apiVersion, kind: 'discovery.k8s.io/v2 EndpointSlice' is not understood, "
        "discovery.k8s.io/v1 EndpointSlice is",
    ),
    "slice port out of range": (
        SLICE,
        a_slice(ports=[{"name": "", "port": 65536}]),
        "ports[0].port: 65536 is not in 1..65535",
    ),
    "slice protocol": (
        SLICE,
        a_slice(ports=[{"name": "", "port": 1, "protocol": "ICMP"}]),
        "ports[0].protocol: 'ICMP' is not TCP, UDP or SCTP",
    ),
    "condition that is text": (
        SLICE,
        a_slice(endpoints=[{"addresses": ["10.0.0.1"], "conditions": {"ready": "yes"}}]),
        "endpoints[0].conditions.ready: Expected bool | null, got str",
    ),
    "address that is a number": (
        SLICE,
        a_slice(endpoints=[{"addresses": [1]}]),
        "endpoints[0].addresses[0]: Expected str, got int",
    ),
    "slice name too long": (
        SLICE,
        a_slice({"name": "n" * 254}),
        f"metadata.name: '{'n' * 75}... is not a DNS subdomain of at most 253 characters",
    ),
    "endless slice name": (
        SLICE,
        a_slice({"name": "n" * 100_000}),
        f"metadata.name: '{'n' * 75}... is not a DNS subdomain of at most 253 characters",
    ),
    "node without a name": (decode.node, {"metadata": {}}, "metadata: Object missing required field name"),
}


@pytest.mark.parametrize(("decoder", "value", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_what_can_not_be_understood_is_said_in_one_line_that_names_the_field(
    encoded: Encoding,
    decoder: typing.Callable[[identity.Source], events.Upsert],
    value: Object,
    reason: str,
) -> None:
    with pytest.raises(decode.DecodeError) as caught:
        decoder(encoded(value))
    assert caught.value.reason.startswith(reason)
    assert caught.value.reason == reason or reason.endswith(": ")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (to_json(a_service())[:-20], "Input data was truncated"),
        (b"", "Input data was truncated"),
        (b"null", "Expected object, got null"),
        (b"[]", "Expected object, got array"),
        (
            to_json(a_service()).replace(b'"10.96.0.10"', b'"10.96.0.\xff"', 1),
            "invalid UTF-8: invalid start byte",
        ),
        (to_json(a_service()) + b"x", "JSON is malformed: trailing characters (byte 382)"),
        (b'{"metadata": {"name": "web"}, "x": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_json_is_an_error_in_one_line(raw: bytes, reason: str) -> None:
    with pytest.raises(decode.DecodeError) as caught:
        decode.service(raw)
    assert caught.value.reason.partition(" (byte")[0] == reason.partition(" (byte")[0]


def test_an_error_names_the_object_and_becomes_an_event() -> None:
    with pytest.raises(decode.DecodeError) as caught:
        decode.service(to_json(a_service(ports=[{"port": -1}])))
    assert str(caught.value) == "Service team/web: spec.ports[0].port: -1 is not in 1..65535"
    assert caught.value.event == events.Rejected(
        events.Kind.SERVICE,
        events.ObjectName("team", "web"),
        "spec.ports[0].port: -1 is not in 1..65535",
        "uid-1",
    )


WARNED: dict[str, tuple[typing.Callable[[identity.Source], events.Upsert], Object, str]] = {
    "algorithm": (
        SERVICE,
        a_service({"annotations": {"lbproxy.io/algorithm": "maglef"}}),
        "metadata.annotations[lbproxy.io/algorithm]: 'maglef' is not least-connections or maglev or "
        "random: the default is used",
    ),
    "mode": (
        SERVICE,
        a_service({"annotations": {"lbproxy.io/mode": "DSR"}}),
        "metadata.annotations[lbproxy.io/mode]: 'DSR' is not dsr or snat: the default is used",
    ),
    "source range": (
        SERVICE,
        a_service(loadBalancerSourceRanges=["", None, "192.0.2.0/33"]),
        "spec.loadBalancerSourceRanges[2]: '192.0.2.0/33' is not a CIDR: passed over",
    ),
    "algorithm that is no text": (
        SERVICE,
        a_service({"annotations": {"lbproxy.io/algorithm": ["maglev"]}}),
        "metadata.annotations[lbproxy.io/algorithm]: ['maglev'] is not a text: put it in quotes: "
        "the default is used",
    ),
    "factor that YAML takes for a number": (
        SERVICE,
        a_service({"annotations": {"lbproxy.io/zone-spill-over": 1.4}}),
        "metadata.annotations[lbproxy.io/zone-spill-over]: 1.4 is not a text: put it in quotes: passed over",
    ),
    "ejection that YAML takes for a truth": (
        SERVICE,
        a_service({"annotations": {"lbproxy.io/outlier-ejection": True}}),
        "metadata.annotations[lbproxy.io/outlier-ejection]: True: not a text: put it in quotes: "
        "no backend is ejected",
    ),
    "settings that are no text": (
        SERVICE,
        a_service({"annotations": {"lbproxy.io/probe": "tcp", "lbproxy.io/probe-settings": 5}}),
        "metadata.annotations[lbproxy.io/probe-settings]: 5: not a text: put it in quotes: "
        "backends are not probed",
    ),
    "UDP probe without a UDP port": (
        SERVICE,
        a_service({"annotations": {"lbproxy.io/probe": "udp:ping"}}),
        "metadata.annotations[lbproxy.io/probe]: 'udp:ping': asks at UDP ports, and the Service has none: "
        "backends are not probed",
    ),
    "port name twice": (
        SERVICE,
        a_service(ports=[{"name": "http", "port": 80}, {"name": "http", "port": 81}]),
        "spec.ports[1]: has the name 'http' of an earlier TCP port: passed over",
    ),
    "port number twice": (
        SERVICE,
        a_service(ports=[{"name": "http", "port": 80}, {"name": "www", "port": 80}]),
        "spec.ports[1]: has the port 80 of an earlier TCP port: passed over",
    ),
    "affinity of an unknown kind": (
        SERVICE,
        a_service(sessionAffinity="Cookie"),
        "spec.sessionAffinity: 'Cookie' is unknown: none is kept",
    ),
    "families missing": (
        SERVICE,
        a_service(clusterIPs=["10.96.0.10", "2001:db8::1"], ipFamilies=None),
        "spec.ipFamilies: missing, so only '10.96.0.10' is served",
    ),
    "unknown family": (
        SERVICE,
        a_service(clusterIPs=["10.96.0.10", "x"], ipFamilies=["IPv4", "IPv9"]),
        "spec.ipFamilies[1]: 'IPv9' is no IP family: passed over",
    ),
    "slice port without a name": (
        SLICE,
        a_slice(ports=[{"port": 8080}, {"name": "http", "port": 8080}]),
        'ports[0].name: missing: passed over (an unnamed port has the name "")',
    ),
    "bad endpoint addresses": (
        SLICE,
        a_slice(endpoints=[{"addresses": [text]} for text in ("x", "10.244.1.2", "2001:db8::1")]),
        "endpoints[0].addresses[0]: 'x' is not an IPv4 address, nor 1 more: passed over",
    ),
}


@pytest.mark.parametrize(("decoder", "value", "warning"), WARNED.values(), ids=WARNED)
def test_a_lesser_mistake_is_a_warning_and_the_rest_of_the_object_counts(
    encoded: Encoding,
    decoder: typing.Callable[[identity.Source], events.Upsert],
    value: Object,
    warning: str,
) -> None:
    upsert = decoder(encoded(value))
    assert upsert.warnings == (warning,)
    assert upsert.uid == value["metadata"].get("uid", "")
    good = decoder(a_service() if decoder is SERVICE else a_slice())
    if decoder is SERVICE:
        # It is not as if nothing had been said: listings have what is wrong with a probe.
        found = msgspec.structs.replace(service_of(upsert), probe_mistake="")
        assert found == service_of(good)
    else:
        assert [e.address for e in slice_of(upsert).endpoints] == [
            e.address for e in slice_of(good).endpoints
        ]
        assert slice_of(upsert).ports == slice_of(good).ports


def test_the_second_of_two_equal_node_ports_is_closed() -> None:
    upsert = decode.service(
        a_service(
            ports=[
                {"name": "a", "port": 80, "nodePort": 30080},
                {"name": "b", "port": 81, "nodePort": 30080},
                {"name": "c", "port": 81, "nodePort": 30080, "protocol": "UDP"},
            ]
        )
    )
    assert [port.node_port for port in service_of(upsert).ports] == [30080, 0, 30080]
    assert upsert.warnings == ("spec.ports[1].nodePort: 30080 is an earlier TCP port's: passed over",)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            {"clusterIPs": ["2001:db8::1", "10.96.0.1"], "ipFamilies": ["IPv6", "IPv4"]},
            ["2001:db8::1", "10.96.0.1"],
        ),
        ({"clusterIPs": ["10.96.0.1"], "ipFamilies": ["IPv4", "IPv6"]}, ["10.96.0.1"]),
        ({"clusterIPs": None, "ipFamilies": ["IPv4"]}, ["10.96.0.10"]),
        ({"clusterIPs": None, "ipFamilies": None}, ["10.96.0.10"]),
        ({"clusterIP": "2001:db8::2", "clusterIPs": None, "ipFamilies": []}, ["2001:db8::2"]),
        ({"clusterIP": None, "clusterIPs": ["10.96.0.1"]}, ["10.96.0.1"]),
        ({"clusterIP": "010.096.0.010", "clusterIPs": ["010.096.0.010"]}, ["10.96.0.10"]),
    ],
)
def test_cluster_ips_of_each_family(encoded: Encoding, spec: Object, expected: list[str]) -> None:
    assert service_of(decode.service(encoded(a_service(**spec)))).cluster_ips == ips(*expected)


def test_what_a_person_wrote_is_filled_in(encoded: Encoding) -> None:
    slice_ = encoded(a_slice(ports=[{"port": 8080}]))
    assert slice_of(decode.endpoint_slice(slice_)).ports == ()
    upsert = decode.written("EndpointSlice", slice_)
    assert slice_of(upsert).ports == (model.SlicePort("", model.Protocol.TCP, 8080),)
    assert upsert.warnings == ()
    both = ["10.96.0.10", "2001:db8::1"]
    for families in (None, ["IPv4"]):
        upsert = decode.written("Service", encoded(a_service(clusterIPs=both, ipFamilies=families)))
        assert service_of(upsert).cluster_ips == ips(*both)
        assert upsert.warnings == ()


def test_outside_addresses_are_filtered(encoded: Encoding) -> None:
    upsert = decode.service(
        encoded(
            a_service(
                status={
                    "loadBalancer": {
                        "ingress": [
                            {"ip": "192.0.2.1", "ipMode": "VIP"},
                            {"ip": "192.0.2.2", "ipMode": "Proxy"},
                            {"ip": "2001:db8::1"},
                            {"ip": "bad"},
                            {"ip": ""},
                        ]
                    }
                },
                externalIPs=["198.51.100.1", "", None, "bad", "2001:db8::2", "198.51.100.001"],
            )
        )
    )
    assert service_of(upsert).external_ips == ips("198.51.100.1")
    assert service_of(upsert).load_balancer_ips == ips("192.0.2.1")
    assert upsert.warnings == ("spec.externalIPs[3]: 'bad' is not an IP address: passed over",)


def test_a_load_balancer_on_loopback_is_nobodys_and_its_service_stays(encoded: Encoding) -> None:
    """As `minikube tunnel` writes it; the API server takes what it is told of load balancers."""
    texts = ("127.0.0.1", "192.0.2.1", "0.0.0.0", "169.254.7.7")
    ingress = [{"ip": text} for text in texts] + [{"ip": "127.0.0.1", "ipMode": "Proxy"}]
    upsert = decode.service(encoded(a_service(status={"loadBalancer": {"ingress": ingress}})))
    assert service_of(upsert).load_balancer_ips == ips("192.0.2.1", "169.254.7.7")
    assert upsert.warnings == (
        "status.loadBalancer.ingress[0].ip: '127.0.0.1' is loopback: passed over",
        "status.loadBalancer.ingress[2].ip: '0.0.0.0' is unspecified: passed over",
    )


@pytest.mark.parametrize("address", ["169.254.20.10", "224.0.0.10", "239.1.1.1", "0.1.2.3"])
def test_a_cluster_ip_is_of_whatever_range_the_api_server_was_given(address: str) -> None:
    assert service_of(decode.service(a_service(clusterIPs=[address]))).cluster_ips == ips(address)


@pytest.mark.parametrize(
    ("spec", "local"),
    [
        ({"type": "NodePort"}, True),
        ({"type": "LoadBalancer"}, True),
        ({"type": "ClusterIP"}, False),
        ({"type": "ClusterIP", "externalIPs": ["198.51.100.1"]}, True),
        ({"type": None, "externalIPs": ["198.51.100.1"]}, True),
    ],
)
def test_external_policy_counts_where_there_is_an_outside(spec: Object, local: bool) -> None:
    upsert = decode.service(a_service(externalTrafficPolicy="Local", **spec))
    assert service_of(upsert).external_local is local


@pytest.mark.parametrize(
    ("spec", "affinity_s"),
    [
        ({}, 0),
        ({"sessionAffinity": "None", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 5}}}, 0),
        ({"sessionAffinity": "ClientIP"}, 10800),
        ({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {}}}, 10800),
        (
            {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86400}}},
            86400,
        ),
        (
            {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}}},
            10800,
        ),
    ],
)
def test_affinity(encoded: Encoding, spec: Object, affinity_s: int) -> None:
    assert service_of(decode.service(encoded(a_service(**spec)))).affinity_s == affinity_s


@pytest.mark.parametrize("mode", list(model.PacketMode))
def test_a_service_chooses_its_mode(mode: model.PacketMode) -> None:
    assert (
        service_of(decode.service(a_service({"annotations": {"lbproxy.io/mode": mode.value}}))).mode is mode
    )


@pytest.mark.parametrize(
    ("spec", "port"),
    [
        ({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000}, 32000),
        ({"type": "LoadBalancer", "externalTrafficPolicy": "Cluster", "healthCheckNodePort": 32000}, 0),
        ({"type": "NodePort", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000}, 0),
        ({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": None}, 0),
        ({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 70000}, 0),
        ({"type": "LoadBalancer", "externalTrafficPolicy": "Local"}, 0),
    ],
)
def test_health_checks_are_answered_where_load_balancers_ask(spec: Object, port: int) -> None:
    assert service_of(decode.service(a_service(**spec))).health_check_node_port == port


@pytest.mark.parametrize("algorithm", list(model.Algorithm))
def test_a_service_chooses_its_algorithm(algorithm: model.Algorithm) -> None:
    upsert = decode.service(a_service({"annotations": {"lbproxy.io/algorithm": algorithm.label}}))
    assert service_of(upsert).algorithm is algorithm
    assert upsert.warnings == ()


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (None, (True, True, False)),
        ({}, (True, True, False)),
        ({"ready": None, "serving": None, "terminating": None}, (True, True, False)),
        ({"ready": False, "serving": False, "terminating": True}, (False, False, True)),
        ({"ready": False}, (False, True, False)),
    ],
)
def test_conditions_have_defaults(
    encoded: Encoding, conditions: Object | None, expected: tuple[bool, ...]
) -> None:
    value = a_slice(endpoints=[{"addresses": ["10.0.0.1"], "conditions": conditions}])
    (endpoint,) = slice_of(decode.endpoint_slice(encoded(value))).endpoints
    assert (endpoint.ready, endpoint.serving, endpoint.terminating) == expected


def test_ports_and_endpoints_that_say_nothing_are_passed_over(encoded: Encoding) -> None:
    value = a_slice(
        ports=[{"name": "a"}, {"name": "b", "port": 0}, {"name": "", "port": 1, "protocol": None}],
        endpoints=[{"addresses": []}, {}, {"addresses": None}],
    )
    decoded = slice_of(decode.endpoint_slice(encoded(value)))
    assert decoded.ports == (model.SlicePort("", model.Protocol.TCP, 1),)
    assert decoded.endpoints == ()
    bare = slice_of(decode.endpoint_slice(encoded(a_slice(ports=None, endpoints=None))))
    assert (bare.ports, bare.endpoints) == ((), ())


def test_an_endpoint_of_a_mapped_address_is_no_ipv6_endpoint() -> None:
    value = a_slice(addressType="IPv6", endpoints=[{"addresses": ["::ffff:10.0.0.1"]}])
    assert slice_of(decode.endpoint_slice(value)).endpoints == ()


@pytest.mark.parametrize("text", ["", "yesterday", "2025-01-01", "2025-01-01T00:00:00", 5, None])
def test_an_unparseable_trigger_time_is_unknown(text: object) -> None:
    metadata = {"annotations": {"endpoints.kubernetes.io/last-change-trigger-time": text}}
    assert slice_of(decode.endpoint_slice(a_slice(metadata))).trigger_time_s == 0


def test_names_of_the_maximal_length() -> None:
    name, namespace = "n" * 63, "s" * 63
    upsert = decode.service(
        a_service({"name": name, "namespace": namespace}, ports=[{"port": 1, "name": "p" * 63}])
    )
    assert upsert.name == events.ObjectName(namespace, name)
    assert service_of(upsert).ports[0].name == "p" * 63
    long = decode.endpoint_slice(a_slice({"name": "n" * 253}))
    assert long.name.name == "n" * 253


def test_ten_thousand_endpoints_in_one_slice(encoded: Encoding) -> None:
    endpoints = [
        {"addresses": [f"10.{n >> 8}.{n & 255}.1"], "nodeName": f"node-{n % 7}"} for n in range(10_000)
    ]
    decoded = slice_of(decode.endpoint_slice(encoded(a_slice(endpoints=endpoints))))
    assert len({endpoint.address for endpoint in decoded.endpoints}) == 10_000
    assert len({id(endpoint.location) for endpoint in decoded.endpoints}) == 7, "locations are shared"


def test_short_manifests_get_the_api_servers_defaults() -> None:
    upsert = decode.service(
        {"metadata": {"name": "web"}, "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}}
    )
    assert upsert.name == events.ObjectName("default", "web")
    assert service_of(upsert).ports == (model.ServicePort("", model.Protocol.TCP, 80, 0),)


def test_every_kind_has_its_decoder() -> None:
    assert decode.DECODERS.keys() == {"Service", "EndpointSlice", "Node"}
    assert decode.DECODERS["Service"](a_service()) == decode.service(a_service())


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (a_service(), ("v1", "Service", ("team", "web"), "uid-1", "7")),
        (to_json(a_service()), ("v1", "Service", ("team", "web"), "uid-1", "7")),
        (to_json(a_service(ports=5)), ("v1", "Service", ("team", "web"), "uid-1", "7")),
        (to_json(a_service())[:150], ("v1", "Service", ("team", "web"), "uid-1", "7")),
        (
            b'{"type":"ADDED","object":' + to_json(a_service())[:-9],
            ("v1", "Service", ("team", "web"), "uid-1", "7"),
        ),
        (b'{"metadata":{"name":"w\xffb","uid":"u"}}', ("", "Service", ("default", "w\\ufffdb"), "u", "")),
        (b"\x00\xff", ("", "Service", ("default", "(unnamed)"), "", "")),
        (b'{"metadata": 5}', ("", "Service", ("default", "(unnamed)"), "", "")),
        ({"metadata": 5, "kind": "Pod"}, ("", "Pod", ("default", "(unnamed)"), "", "")),
        ({"metadata": {1: 2, "name": "a\nb"}}, ("", "Service", ("default", "a\\nb"), "", "")),
        ({"metadata": {"name": 7, "resourceVersion": 8}}, ("", "Service", ("default", "7"), "", "8")),
        ({"kind": "Node", "metadata": {"name": "n"}}, ("", "Node", ("", "n"), "", "")),
    ],
)
def test_an_object_is_named_even_if_it_is_broken(
    raw: identity.Source, expected: tuple[typing.Any, ...]
) -> None:
    assert decode.identify(raw, "Service") == expected


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.sampled_from(
        [(decode.service, a_service()), (decode.endpoint_slice, a_slice()), (decode.node, a_node())]
    ),
    st.data(),
)
def test_one_field_replaced_by_anything_decodes_or_is_a_decode_error(
    case: tuple[typing.Callable[[identity.Source], events.Upsert], Object], data: st.DataObject
) -> None:
    decoder, good = case
    value = json.loads(to_json(good))
    here: typing.Any = value
    while True:
        if not here:
            break
        step = data.draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        if isinstance(here[step], dict | list) and data.draw(st.booleans()):
            here = here[step]
            continue
        here[step] = data.draw(JSON)
        break
    lines: list[str] = []
    results: list[events.Upsert | events.Rejected] = []
    for raw in (value, json.dumps(value).encode()):
        try:
            results.append(decoder(raw))
        except decode.DecodeError as error:
            lines += str(error).splitlines()
            results.append(error.event._replace(reason=""))
    assert results[0] == results[1], "JSON and YAML are understood alike"
    assert len(lines) in (0, 2)


@given(st.binary(max_size=60), st.integers(0, 500))
def test_random_bytes_never_raise_anything_else(noise: bytes, at: int) -> None:
    raw = to_json(a_service())
    lines: list[str] = []
    try:
        decode.service(raw[:at] + noise + raw[at + len(noise) :])
    except decode.DecodeError as error:
        lines = str(error).splitlines()
    assert len(lines) <= 1
