"""Which port of a Service is asked by which probe, and with which settings."""

import random

import pytest

from lbproxy.core import decode, events, model, port_probes, probe, probing, service_annotations, state
from tests.unit import test_decode, test_probing
from tests.unit import test_health_checks as objects

Kind = probe.Kind
HTTP, TCP = probe.Probe(Kind.HTTP, "/healthz"), probe.Probe(Kind.TCP)
PORTS = [
    {"name": "web", "port": 80},
    {"name": "grpc", "port": 50051},
    {"name": "metrics", "port": 9100},
    {"name": "dns", "port": 53, "protocol": "UDP"},
]


def decoded(text: str, settings: str | None = None) -> events.Upsert:
    annotations = {service_annotations.PROBE_ANNOTATION: text}
    if settings is not None:
        annotations[service_annotations.PROBE_SETTINGS_ANNOTATION] = settings
    return decode.service(test_decode.a_service({"annotations": annotations}, ports=PORTS))


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("http:/healthz", "", {"web": HTTP, "metrics": HTTP, "": HTTP}),
        ("http:/healthz\n", "\n", {"web": HTTP, "": HTTP}),
        ("http:/healthz\nmetrics none", "", {"web": HTTP, "grpc": HTTP, "metrics": None}),
        ("web http:/healthz", "", {"web": HTTP, "grpc": None, "metrics": None}),
        (
            "web\t http:/healthz\n\n  grpc   grpc:shop.Cart\n",
            "",
            {"web": HTTP, "grpc": probe.Probe(Kind.GRPC, "shop.Cart"), "metrics": None},
        ),
        # Names of ports that are words of ours, too.
        ("grpc tcp", "", {"grpc": TCP, "web": None}),
        (
            "http:/healthz",
            "interval=2s, fall=2\nmetrics fall=5,\nweb status=204",
            {
                "grpc": probe.Probe(Kind.HTTP, "/healthz", interval_s=2.0, fall=2),
                "metrics": probe.Probe(Kind.HTTP, "/healthz", interval_s=2.0, fall=5),
                "web": probe.Probe(
                    Kind.HTTP, "/healthz", interval_s=2.0, fall=2, lowest_status=204, highest_status=204
                ),
            },
        ),
        (
            "web http:/healthz\nmetrics tcp",
            "web status=200\nmetrics port=9101",
            {
                "web": probe.Probe(Kind.HTTP, "/healthz", lowest_status=200, highest_status=200),
                "metrics": probe.Probe(Kind.TCP, port=9101),
            },
        ),
        # What is sent is sent as it stands.
        ("dns udp:a b ", "", {"dns": probe.Probe(Kind.UDP, payload=b"a b "), "web": None}),
        ("udp:a b ", "", {"dns": probe.Probe(Kind.UDP, payload=b"a b ")}),
        ("dns udp:a b \r\nweb none\r\n", "", {"dns": probe.Probe(Kind.UDP, payload=b"a b "), "web": None}),
        # All else ends where it can be seen to end.
        (" http:/healthz \r\nmetrics none\t\r\n", "web fall=2 \r\n", {"grpc": HTTP, "metrics": None}),
        # As a word it switches off, whatever settings wait for.
        ("none", "", {"web": None, "dns": None}),
        ("none\nweb tcp\n", "interval=5s", {"web": TCP, "metrics": None}),
        ("none", "interval=2s", {"web": None}),
        # At a port of its own whatever the Service's is.
        ("dns tcp", "port=8080", {"dns": probe.Probe(Kind.TCP, port=8080)}),
        # All TCP ports are named, by settings alone.
        ("tcp", "web fall=1\ngrpc fall=1\nmetrics fall=1", {"web": probe.Probe(Kind.TCP, fall=1)}),
    ],
)
def test_ports_have_their_probes(text: str, settings: str, expected: dict[str, probe.Probe | None]) -> None:
    upsert = decoded(text, settings)
    assert upsert.warnings == ()
    assert isinstance(upsert.value, model.Service)
    probes = upsert.value.probes
    assert probes is not None
    assert {name: probes.of(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "settings", "reason"),
    [
        ("web http:healthz", "", "port web: the path has no / in front, or is not short printable ASCII"),
        ("web http:/\nweb tcp", "", "two lines for port web"),
        ("tcp\nhttp:/", "", "two lines for all ports"),
        ("tcp", "fall=1\nrise=1", "two lines for all ports"),
        ("web none\nshop tcp", "", "the Service has no port shop"),
        ("tcp", "shop fall=1", "the Service has no port shop"),
        ("web tcp", "metrics fall=1", "port metrics: settings, and no probe"),
        ("tcp\nmetrics none", "metrics fall=1", "port metrics: settings, and it is not to be probed"),
        ("tcp none", "", "the Service has no port tcp"),
        ("grpc", "tls=none", "tls='none': https is always TLS, and grpc is not where tls= is left out"),
        ("web http\nmetrics tcp", "status=200", "port metrics: status= is not for tcp"),
        ("web udp:x", "", "port web: asks at UDP ports, and that is none"),
        ("dns tcp", "", "port dns: asks at TCP ports, and that is none"),
        (
            "udp:x\ndns none",
            "",
            "asks at UDP ports, and the Service has none that no line names",
        ),
        ("Web tcp", "", "begins with none of tcp, http, https, grpc, udp"),
    ],
)
def test_what_is_not_understood_is_one_warning_and_no_probe(text: str, settings: str, reason: str) -> None:
    upsert = decoded(text, settings)
    assert isinstance(upsert.value, model.Service)
    assert upsert.value.probes is None
    (warning,) = upsert.warnings
    assert warning.endswith(f": {reason}: backends are not probed")


@pytest.mark.parametrize(
    ("text", "settings", "annotation", "quoted"),
    [
        ("htp:/", "interval=2s", "lbproxy.io/probe", "'htp:/'"),
        ("web tcp\nweb tcp", "", "lbproxy.io/probe", "'web tcp\\nweb tcp'"),
        ("shop tcp", "", "lbproxy.io/probe", "'shop tcp'"),
        ("tcp", "intervall=2s", "lbproxy.io/probe-settings", "'intervall=2s'"),
        ("tcp", "interval=0s", "lbproxy.io/probe-settings", "'interval=0s'"),
        ("web tcp", "status=200", "lbproxy.io/probe-settings", "'status=200'"),
        ("tcp", "fall=1\nrise=1", "lbproxy.io/probe-settings", "'fall=1\\nrise=1'"),
        ("grpc", "server-name=a", "lbproxy.io/probe-settings", "'server-name=a'"),
        ("web tcp", "metrics fall=1", "lbproxy.io/probe-settings", "'metrics fall=1'"),
        ("web none", "web fall=1", "lbproxy.io/probe-settings", "'web fall=1'"),
        ("tcp", "shop fall=1", "lbproxy.io/probe-settings", "'shop fall=1'"),
    ],
)
def test_the_annotation_that_is_wrong_is_named(
    text: str, settings: str, annotation: str, quoted: str
) -> None:
    upsert = decoded(text, settings)
    (warning,) = upsert.warnings
    assert warning.startswith(f"metadata.annotations[{annotation}]: {quoted}: ")
    assert isinstance(upsert.value, model.Service)
    assert upsert.value.probe_mistake == warning.removeprefix("metadata.annotations[").replace(
        "]", "", 1
    ).removesuffix(": backends are not probed")


def test_a_port_is_asked_by_its_own_probe_and_judged_by_itself() -> None:
    """The backend of one port is down, and that of the other is not: they are one pod."""
    ports = (
        model.ServicePort("web", model.Protocol.TCP, 80, 0),
        model.ServicePort("metrics", model.Protocol.TCP, 9100, 0),
        model.ServicePort("admin", model.Protocol.TCP, 81, 0),
    )
    probes = port_probes.parse("http:/healthz\nmetrics tcp\nadmin none", "fall=1")
    cluster, told = state.ClusterState(objects.NODE), probing.Probing(random.Random(1), 10)
    value = test_probing.service(ports=ports, probes=probes)
    cluster.apply(events.Upsert(events.Kind.SERVICE, objects.WEB, value))
    listed = tuple(
        model.SlicePort(name, model.Protocol.TCP, number)
        for name, number in (("web", 8080), ("metrics", 9100), ("admin", 8081))
    )
    cluster.apply(objects.slice_of(objects.endpoint("10.0.0.1"), ports=listed))
    told.look(cluster, [objects.WEB], 0.0)
    found = {}
    for attempt in told.take(100.0, 10):
        found[attempt.target.port] = attempt.target.probe.kind
        result = probing.Result(passed=attempt.target.probe.kind is Kind.HTTP, reason="no")
        told.finished(attempt, result, 100.0)
    assert found == {8080: Kind.HTTP, 9100: Kind.TCP}
    assert {key.port_name: down for key, down in told.down().items()} == {"web": (0, 1), "metrics": (1, 1)}
