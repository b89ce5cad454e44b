"""What each kind of value reads, refuses and writes."""

import ipaddress
import math
import typing

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.config import config, kinds, kube_proxy_options
from lbproxy.config import options as config_options
from lbproxy.core import model


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("0s", 0),
        ("30s", 30),
        ("1m30s", 90),
        ("1.5h", 5400),
        (".5s", 0.5),
        ("24h0m0s", 86400),
        ("250ms", 0.25),
        ("10us", 1e-05),
        ("10µs", 1e-05),
        ("7ns", 7e-09),
        ("+2s", 2),
        ("-0s", 0),
    ],
)
def test_durations_are_read_as_go_reads_them(text: str, seconds: float) -> None:
    assert kinds.parse_duration_s(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "30", "s", "1 s", "1s ", "1d", "-5s", "1s30", "1e3s", "--1s", "9999999999h", "１s", "1.s.", "+-1s"],
)
def test_what_go_does_not_read_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"duration|negative"):
        kinds.parse_duration_s(text)


@given(st.integers(min_value=0, max_value=10**15))
def test_durations_read_back_to_the_microsecond(microseconds: int) -> None:
    text = kinds.format_duration(microseconds / 10**6)
    assert math.isclose(kinds.parse_duration_s(text), microseconds / 10**6, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (30, "30s"), (90, "1m30s"), (86400, "24h"), (0.25, "0.25s")]
)
def test_durations_are_written_shortly(seconds: float, text: str) -> None:
    assert kinds.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("", None),
        ("0.0.0.0", ("0.0.0.0", 0)),
        ("127.0.0.1:10249", ("127.0.0.1", 10249)),
        ("::1", ("::1", 0)),
        ("::", ("::", 0)),
        ("[::1]", ("::1", 0)),
        ("[2001:db8::1]:65535", ("2001:db8::1", 65535)),
    ],
)
def test_addresses_to_listen_on(text: str, address: tuple[str, int] | None) -> None:
    assert kinds.parse_listen(text) == address


@pytest.mark.parametrize(
    "text",
    [
        *(
            "localhost:1",
            ":1",
            "1.2.3:1",
            "1.2.3.4:",
            "1.2.3.4:0",
            "1.2.3.4:65536",
            "1.2.3.4:x",
            "[1.2.3.4]:1",
        ),
        *("[::1:1", "::1]:1", "[]:1", "[fe80::1%eth0]:1", "1.2.3.4:1:2", " 1.2.3.4:1", "1.2.3.4:99999999999"),
    ],
)
def test_what_is_no_address_to_listen_on(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not an IP:PORT|the port is not in"):
        kinds.parse_listen(text)


@given(st.ip_addresses(), st.integers(1, 65535))
def test_an_address_to_listen_on_reads_back(address: config.IPAddress, port: int) -> None:
    listen = config.ListenAddress(str(address), port)
    assert kinds.parse_listen(str(listen)) == listen


def test_bits_beyond_a_prefix_are_dropped_as_in_go() -> None:
    assert kinds.parse_cidr("10.1.2.3/8") == ipaddress.ip_network("10.0.0.0/8")


@pytest.mark.parametrize(
    "text", ["10.0.0.0", "10.0.0.0/33", "10.0.0.0/255.0.0.0", "x/8", "::/129", "/8", "10.0.0.0/"]
)
def test_what_is_no_cidr(text: str) -> None:
    with pytest.raises(ValueError, match="is not a CIDR"):
        kinds.parse_cidr(text)


@pytest.mark.parametrize(
    ("text", "protocol"),
    [
        ("10.96.0.1:443", model.Protocol.TCP),
        ("10.96.0.1:443/tcp", model.Protocol.TCP),
        ("[fd00::1]:53/UDP", model.Protocol.UDP),
        ("[fd00::1]:53/sctp", model.Protocol.SCTP),
    ],
)
def test_destinations(text: str, protocol: model.Protocol) -> None:
    assert kinds.parse_destination(text).protocol is protocol


@pytest.mark.parametrize(
    "text", ["", "10.96.0.1", "10.96.0.1/tcp", "fd00::1", "10.96.0.1:443/icmp", "x:1", "1.2.3.4:1/2/3"]
)
def test_what_is_no_destination(text: str) -> None:
    with pytest.raises(ValueError, match="is not an IP:PORT"):
        kinds.parse_destination(text)


@pytest.mark.parametrize(
    ("type_", "text", "value"),
    [
        (kinds.BOOL, "T", True),
        (kinds.BOOL, "0", False),
        (kinds.integer(-5), "-5", -5),
        (kinds.IPS, "10.0.0.1, ::1", (ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("::1"))),
        (kinds.NODE_PORT_RANGES, "primary", ("primary",)),
        (kinds.MAP_ROWS, "sockets=1024,backends=7", {"sockets": 1024, "backends": 7}),
        (kinds.GATES, "A=true,B=false", {"A": True, "B": False}),
        (kinds.NAME, " x ", "x"),
    ],
)
def test_flag_texts(type_: kinds.ValueType[typing.Any], text: str, value: object) -> None:
    assert type_.parse(text) == value
    assert type_.decode(type_.encode(value)) == value


@pytest.mark.parametrize(
    ("type_", "text"),
    [
        (kinds.BOOL, "yes"),
        (kinds.BOOL, ""),
        (kinds.integer(0), "-1"),
        (kinds.integer(0), "1.0"),
        (kinds.integer(0), "1_000"),
        (kinds.integer(0, 31), "32"),
        (kinds.NUMBER, "nan"),
        (kinds.POSITIVE_DURATION, "0"),
        (kinds.MAP_ROWS, "sockets=1000"),
        (kinds.MAP_ROWS, "sockets=0"),
        (kinds.MAP_ROWS, "sokets=1024"),
        (kinds.MAP_ROWS, "services=16777217"),
        (kinds.MAP_ROWS, "sockets"),
        (kinds.MAP_ROWS, "backends=99999999999"),
        (kinds.MAP_ROWS, "backends=many"),
        (kinds.GATES, "A=perhaps"),
        (kinds.PATH, "a\0b"),
        (kinds.choice(config.Xdp), ""),
        (kinds.IP, "fe80::1%lo"),
    ],
)
def test_refused_flag_texts(type_: kinds.ValueType[typing.Any], text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        type_.parse(text)


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        (kinds.TEXT, 5),
        (kinds.BOOL, "true"),
        (kinds.BOOL, 1),
        (kinds.integer(0), True),
        (kinds.integer(0), "5"),
        (kinds.integer(0), 1.5),
        (kinds.NUMBER, "5"),
        (kinds.DURATION, 30),
        (kinds.DURATION, True),
        (kinds.FLUSH_INTERVAL, -1),
        (kinds.IPS, "10.0.0.1"),
        (kinds.IPS, [1]),
        (kinds.IPS, {"a": 1}),
        (kinds.MAP_ROWS, ["sockets"]),
        (kinds.MAP_ROWS, {"sockets": True}),
        (kinds.GATES, {"A": "true"}),
        (kinds.GATES, {1: True}),
    ],
)
def test_refused_file_values(type_: kinds.ValueType[typing.Any], value: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        type_.decode(value)


_WORDS: typing.Final = (
    "0 30s 1m30s -0 +1.5h .5us 10µs 5 10.0.0.1 ::1 [::]:80 0.0.0.0:80 0.0.0.0 1.2.3.4:70000 10.0.0.0/8 "
    "fd00::/8 1::2/200 ::ffff:1.2.3.4 fe80::1%eth0 [::1] primary 5-7 9-1 1-65535 random RANDOM maglev "
    "iptables IPTABLES nftables snat dsr native off text json ClusterCIDR clustercidr true eth0 /x "
)
_NUMBERS: typing.Final = st.integers(-2, 2**31) | st.sampled_from([1, 64, 4096, 2**24 + 1]) | st.floats()
_ANYTHING: typing.Final = st.recursive(
    st.sampled_from(_WORDS.split(" ")) | st.booleans() | _NUMBERS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["flows", "sockets", "services", "Gate"]), inner, max_size=3),
    ),
    max_leaves=4,
)


@given(option=st.sampled_from(kube_proxy_options.OPTIONS), value=_ANYTHING)
def test_what_the_agent_takes_its_schema_takes(option: config_options.Option, value: object) -> None:
    validator = jsonschema.Draft7Validator(option.type.schema)
    try:
        option.type.decode(value)
    except ValueError:
        return
    assert validator.is_valid(value)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (kinds.BOOL, "true"),
        (kinds.integer(0, 7), 8),
        (kinds.DURATION, "30"),
        (kinds.DURATION, 30),
        (kinds.LISTEN, "host:80"),
        (kinds.IPS, ["node-a"]),
        (kinds.CIDRS, ["10.0.0.0"]),
        (kinds.NODE_PORT_RANGES, ["secondary"]),
        (kinds.PORT_RANGE, "50000"),
        (kinds.MAP_ROWS, {"sockets": 1000}),
        (kinds.MAP_ROWS, {"frontend": 1}),
        (kinds.GATES, {"a": "true"}),
        (kinds.choice(config.ProxyMode, fold_case=True), "ipvs2"),
        (kinds.named({"a": 1}), "b"),
    ],
)
def test_a_schema_refuses_what_is_plainly_wrong(kind: kinds.ValueType[typing.Any], value: object) -> None:
    assert not jsonschema.Draft7Validator(kind.schema).is_valid(value)
    with pytest.raises(ValueError, match=r".+"):
        kind.decode(value)
