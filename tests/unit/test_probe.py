"""What annotations say of probes, and what is no probe."""

import pathlib
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.core import decode, model, probe, service_annotations
from tests.unit import test_decode

Kind = probe.Kind


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("tcp", "", probe.Probe(Kind.TCP)),
        ("http", "", probe.Probe(Kind.HTTP, "/")),
        ("http:/healthz?full=1", "", probe.Probe(Kind.HTTP, "/healthz?full=1")),
        (
            "https:/ready",
            "server-name=web.example",
            probe.Probe(Kind.HTTPS, "/ready", server_name="web.example"),
        ),
        ("https", "tls=verify", probe.Probe(Kind.HTTPS, "/", tls=probe.Tls.VERIFY)),
        (
            "grpc:shop.Cart",
            "tls=verify,server-name=cart.example",
            probe.Probe(Kind.GRPC, "shop.Cart", server_name="cart.example", tls=probe.Tls.VERIFY),
        ),
        ("grpc", "tls=unverified", probe.Probe(Kind.GRPC, tls=probe.Tls.UNVERIFIED)),
        ("grpc", "", probe.Probe(Kind.GRPC)),
        ("grpc:shop.Cart", "host=cart:50051", probe.Probe(Kind.GRPC, "shop.Cart", host="cart:50051")),
        ("udp:ping", "expect=pong", probe.Probe(Kind.UDP, payload=b"ping", expect=b"pong")),
        (r"udp:a\x00\\\x2c ", "", probe.Probe(Kind.UDP, payload=b"a\0\\, ")),
        (
            "http:/",
            " interval=1.5s, timeout=500ms,rise=1,fall=2 ,jitter=0%,port=8081,host=a.b,status=204,",
            probe.Probe(Kind.HTTP, "/", b"", b"", "a.b", "", 204, 204, 1.5, 0.5, 1, 2, 0.0, 8081),
        ),
        ("tcp", "interval=1m,timeout=2s", probe.Probe(Kind.TCP, interval_s=60.0, timeout_s=2.0)),
    ],
)
def test_texts_are_read(text: str, settings: str, expected: probe.Probe) -> None:
    assert probe.parse(text, settings) == expected


@pytest.mark.parametrize(
    ("text", "settings", "reason"),
    [
        ("", "", "begins with none of tcp, http, https, grpc, udp"),
        ("TCP", "", "begins with none of tcp, http, https, grpc, udp"),
        ("icmp", "", "begins with none of tcp, http, https, grpc, udp"),
        ("tcp:80", "", "tcp asks for nothing: it is tcp alone"),
        ("http:healthz", "", "the path has no / in front, or is not short printable ASCII"),
        ("http://evil.example/", "port=0", "port='0': not in 1..65535"),
        ("http:/a b", "", "the path has no / in front, or is not short printable ASCII"),
        (
            "http:/\r\nX-Evil: 1",
            "",
            "the path has no / in front, or is not short printable ASCII",
        ),
        ("grpc:a\nb", "", "the service is not short printable ASCII"),
        ("udp", "", "udp needs something to send: udp:ping"),
        ("udp:", "", "udp needs something to send: udp:ping"),
        ("udp:\\xg0", "", r"what to send: other than printable ASCII, \xNN and \\"),
        ("udp:" + "a" * 513, "", "what to send: more than 512 bytes"),
        ("tcp", "interval", "'interval' is none of " + ", ".join(f"{name}=" for name in probe.SETTINGS)),
        ("tcp", "interval=5", "interval='5': not a time such as 5s, 500ms or 1m"),
        ("tcp", "interval=100ms", "interval='100ms': not in 1s..3600s"),
        ("tcp", "timeout=0s", "timeout='0s': not in 0.05s..60s"),
        ("tcp", "rise=0", "rise='0': not in 1..100"),
        ("tcp", "fall=-1", "fall='-1': not in 1..100"),
        ("tcp", "jitter=20", "jitter='20': not a share such as 20%"),
        ("tcp", "jitter=101%", "jitter='101%': not a share such as 20%"),
        ("tcp", "port=http", "port='http': not in 1..65535"),
        ("tcp", ",", "a comma without a setting in front"),
        ("tcp", "rise=1,,fall=1", "a comma without a setting in front"),
        ("tcp", "port=1,port=2", "port= stands twice"),
        ("tcp", "host=a", "host= is not for tcp"),
        ("http", "server-name=a", "server-name= is not for http"),
        ("http", "tls=verify", "tls= is not for http"),
        ("tcp", "tls=verify", "tls= is not for tcp"),
        ("https", "tls=off", "tls='off': neither unverified nor verify"),
        ("grpc", "tls=", "tls='': neither unverified nor verify"),
        ("grpc", "server-name=a", "server-name= is for TLS: with tls=unverified or tls=verify"),
        ("http", "host=a\r\nb", "host='a\\r\\nb': not a host's name"),
        ("http", "host=10.0.0.1/x", "host='10.0.0.1/x': not a host's name"),
        ("http", "status=399-200", "status='399-200': no status or range in 200-599"),
        ("http", "status=100", "status='100': no status or range in 200-599"),
    ],
)  # fmt: skip
def test_other_texts_are_no_probe(text: str, settings: str, reason: str) -> None:
    with pytest.raises(probe.ProbeError) as raised:
        probe.parse(text, settings)
    assert str(raised.value) == reason


@pytest.mark.parametrize(
    ("text", "protocols", "asked"),
    [
        ("udp:ping", ["UDP"], True),
        ("udp:ping", ["TCP", "UDP"], True),
        ("udp:ping", ["TCP", "SCTP"], False),
        ("http", ["UDP", "TCP"], True),
        ("tcp", ["UDP"], False),
    ],
)
def test_a_probe_without_a_port_of_its_protocol_is_a_warning(
    text: str, protocols: list[str], asked: bool
) -> None:
    ports = [{"name": name.lower(), "protocol": name, "port": 80} for name in protocols]
    annotations = {service_annotations.PROBE_ANNOTATION: text}
    upsert = decode.service(test_decode.a_service({"annotations": annotations}, ports=ports))
    assert isinstance(upsert.value, model.Service)
    assert (upsert.value.probes is not None) is asked
    assert len(upsert.warnings) == (not asked)
    annotations[service_annotations.PROBE_SETTINGS_ANNOTATION] = "port=8080"  # asked whatever the ports are
    upsert = decode.service(test_decode.a_service({"annotations": annotations}, ports=ports))
    assert upsert.warnings == ()


def test_the_table_says_the_defaults() -> None:
    for name, setting in probe.SETTINGS.items():
        if name in ("port", "host", "tls", "server-name", "expect"):
            continue  # without a value of their own
        for field, value in setting.read(setting.default).items():
            assert getattr(probe.Probe(setting.kinds[0]), field) == value


def bounds(said: str) -> tuple[list[str], list[str]]:
    """The values that a setting's help says are the least and the most, and ones beyond."""
    found = re.search(r"; ([0-9.]+)(s|%|) to ([0-9]+)(s|%|)$", said)
    assert found is not None, said
    least, unit, most, _ = found.groups()
    beyond = float(least) - 0.001 if unit == "s" else int(least) - 1
    return [least + unit, most + unit], [f"{beyond:g}{unit}", f"{int(most) + 1}{unit}"]


@pytest.mark.parametrize("name", ["interval", "timeout", "rise", "fall", "jitter", "port", "panic"])
def test_the_table_says_the_bounds(name: str) -> None:
    inside, outside = bounds(probe.SETTINGS[name].help)
    for text in inside:
        probe.parse("tcp", f"{name}={text}")
    for text in outside:
        with pytest.raises(probe.ProbeError):
            probe.parse("tcp", f"{name}={text}")


def test_the_documentation_has_the_table() -> None:
    page = (pathlib.Path(__file__).parents[2] / "docs" / "health.md").read_text()
    for name, setting in probe.SETTINGS.items():
        kinds = "all" if setting.kinds == tuple(Kind) else ", ".join(setting.kinds)
        assert f"| `{name}` | {kinds} | {setting.default} | {setting.help} |\n" in page
    for kind in Kind:
        assert f"`{kind}" in page


words = st.one_of(
    st.text(string.printable, max_size=30),
    st.sampled_from([*probe.SETTINGS, *Kind, "5s", "=", ",", ":", "/", "1", "\n", "t ", "u\t", "none"]),
)


@given(st.lists(words, max_size=6).map("".join), st.lists(words, max_size=8).map("".join))
def test_any_text_is_a_probe_within_bounds_or_a_warning(text: str, settings: str) -> None:
    annotations = {
        service_annotations.PROBE_ANNOTATION: text,
        service_annotations.PROBE_SETTINGS_ANNOTATION: settings,
    }
    ports = [{"name": "t", "port": 80}, {"name": "u", "protocol": "UDP", "port": 80}]
    upsert = decode.service(test_decode.a_service({"annotations": annotations}, ports=ports))
    assert isinstance(upsert.value, model.Service)
    probes = upsert.value.probes
    assert (probes is None) == (len(upsert.warnings) == 1)
    for found in probes or ():
        assert found.interval_s >= 1
        assert 0 < found.timeout_s <= 60
        assert 0 <= found.jitter <= 1
        assert 0 <= found.port <= 65535
        # What goes into a request line stays on that line.
        assert not set(found.text + found.host + found.server_name) & set(string.whitespace)
        assert found.kind is not Kind.HTTP or found.text.startswith("/")


def test_a_bad_probe_is_one_warning_and_no_probe() -> None:
    metadata = {
        "annotations": {
            service_annotations.PROBE_ANNOTATION: "http:/",
            service_annotations.PROBE_SETTINGS_ANNOTATION: "rise=x",
        }
    }
    upsert = decode.service(test_decode.a_service(metadata))
    assert isinstance(upsert.value, model.Service)
    assert upsert.value.probes is None
    assert upsert.warnings == (
        "metadata.annotations[lbproxy.io/probe-settings]: 'rise=x': rise='x': not in 1..100: "
        "backends are not probed",
    )


def test_settings_without_a_probe_are_a_warning() -> None:
    upsert = decode.service(
        test_decode.a_service({"annotations": {service_annotations.PROBE_SETTINGS_ANNOTATION: "rise=1"}})
    )
    assert upsert.warnings == (
        "metadata.annotations[lbproxy.io/probe-settings]: without lbproxy.io/probe: passed over",
    )


def test_an_annotation_that_is_no_text_is_a_warning() -> None:
    upsert = decode.service(test_decode.a_service({"annotations": {service_annotations.PROBE_ANNOTATION: 7}}))
    assert upsert.warnings == (
        "metadata.annotations[lbproxy.io/probe]: 7: not a text: put it in quotes: backends are not probed",
    )
