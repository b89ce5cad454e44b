import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.core import addresses, model
from tests import strategies


def ip(text: str) -> bytes:
    address = addresses.parse(text)
    assert address is not None, text
    return address


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("010.000.0.01", "10.0.0.1"),
        ("0000000000192.0.2.1", "192.0.2.1"),
        ("2001:DB8::0001", "2001:db8::1"),
        ("2001:db8:0:0:0:0:0:0", "2001:db8::"),
        ("002001:db8::00000", "2001:db8::"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::ffff:192.000.02.1", "192.0.2.1"),
        ("::ffff:c000:201", "192.0.2.1"),
        ("::192.0.2.1", "::c000:201"),
        ("::", "::"),
        ("::1", "::1"),
        ("0.0.0.0", "0.0.0.0"),
    ],
)
def test_text_is_read_leniently_and_written_canonically(text: str, canonical: str) -> None:
    assert addresses.text(ip(text)) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        " 10.0.0.1",
        "10.0.0.1 ",
        "10.0.0",
        "10.0.0.256",
        "10.0.0.1000000000000000000000",
        "10.0.0.-1",
        "10.0.0.1/32",
        "0x0a.0.0.1",
        "10.0.0.١",
        "10.0.0.²",
        "10.0.0.1\n",
        "10.0.0.1\0",
        "fe80::1%eth0",
        "1:2:3:4:5:6:7:8:9",
        "1::2::3",
        "12345::",
        ":::",
        "::ffff:1.2.3.256",
        "::1.2.3.4:5",
        "None",
        "example.com",
        "\ud800",
        "::\ud800",
    ],
)
def test_what_is_no_address_is_none(text: str) -> None:
    assert addresses.parse(text) is None


@given(st.binary(min_size=16, max_size=16))
def test_parse_undoes_text(address: bytes) -> None:
    assert addresses.parse(addresses.text(address)) == address


@given(st.ip_addresses())
def test_text_agrees_with_the_standard_library(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    packed = ip(str(address))
    assert len(packed) == 16
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    assert addresses.text(packed) == str(mapped or address)
    assert addresses.family_of(packed) == (4 if mapped else address.version)


@given(st.ip_addresses(v=4), st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_leading_zeros_of_an_octet_are_decimal(address: ipaddress.IPv4Address, zeros: list[int]) -> None:
    octets = str(address).split(".")
    padded = ".".join("0" * count + octet for count, octet in zip(zeros, octets, strict=True))
    assert addresses.parse(padded) == addresses.parse(str(address))


@pytest.mark.parametrize(
    ("cidr", "inside", "outside"),
    [
        ("10.0.0.0/8", "10.255.0.1", "11.0.0.0"),
        ("10.1.2.3/8", "10.255.0.1", "11.0.0.0"),
        ("010.0.0.0/08", "10.255.0.1", "11.0.0.0"),
        ("192.0.2.1/32", "192.0.2.1", "192.0.2.2"),
        ("0.0.0.0/0", "203.0.113.1", "2001:db8::1"),
        ("::/0", "2001:db8::1", "203.0.113.1"),
        ("2001:db8::/33", "2001:db8:7fff::1", "2001:db8:8000::1"),
    ],
)
def test_a_network_contains_its_own_family_only(cidr: str, inside: str, outside: str) -> None:
    network = addresses.parse_cidr(cidr)
    assert network is not None
    assert ip(inside) in network
    assert ip(outside) not in network


@pytest.mark.parametrize(
    "cidr",
    ["", "10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/-1", "::/129", "/8", "x/8", "::/" + "9" * 5000],
)
def test_what_is_no_network_is_none(cidr: str) -> None:
    assert addresses.parse_cidr(cidr) is None


@given(st.ip_addresses(v=4), st.integers(0, 32), st.ip_addresses(v=4))
def test_membership_agrees_with_the_standard_library(
    base: ipaddress.IPv4Address, length: int, member: ipaddress.IPv4Address
) -> None:
    network = addresses.parse_cidr(f"{base}/{length}")
    assert network is not None
    expected = member in ipaddress.ip_network(f"{base}/{length}", strict=False)
    assert (ip(str(member)) in network) is expected


LOCAL = [ip(text) for text in ("127.0.0.1", "::1", "192.0.2.1", "10.5.0.1", "2001:db8::1", "fe80::1")]
NODE = [ip(text) for text in ("192.0.2.1", "192.0.2.9", "2001:db8::1")]


@pytest.mark.parametrize(
    ("cidrs", "node_addresses", "served", "loopback"),
    [
        pytest.param([], NODE, ["192.0.2.1", "10.5.0.1", "2001:db8::1", "fe80::1"], True, id="unset: all"),
        pytest.param(["primary"], NODE, ["192.0.2.1", "2001:db8::1"], False, id="primary"),
        pytest.param(
            ["primary"], NODE[:2], ["192.0.2.1", "2001:db8::1", "fe80::1"], False, id="primary of one family"
        ),
        pytest.param(
            ["primary"], [], ["192.0.2.1", "10.5.0.1", "2001:db8::1", "fe80::1"], True, id="primary unknown"
        ),
        pytest.param(
            ["primary"],
            [ip("127.0.0.1"), ip("2001:db8::1")],
            ["192.0.2.1", "10.5.0.1", "2001:db8::1"],
            True,
            id="a loopback placeholder is no primary",
        ),
        pytest.param(
            ["10.0.0.0/8"],
            NODE,
            ["10.5.0.1", "2001:db8::1", "fe80::1"],
            False,
            id="other family unrestricted",
        ),
        pytest.param(["10.0.0.0/8", "2001:db8::/32"], NODE, ["10.5.0.1", "2001:db8::1"], False, id="both"),
        pytest.param(
            ["10.0.0.0/8", "0.0.0.0/0", "2001:db8::/32"],
            NODE,
            ["192.0.2.1", "10.5.0.1", "2001:db8::1"],
            True,
            id="zero-length prefix",
        ),
        pytest.param(["2001:db8::/32"], NODE, ["192.0.2.1", "10.5.0.1", "2001:db8::1"], True, id="IPv6 only"),
        pytest.param(["127.0.0.1/32", "::/128"], NODE, [], True, id="part of loopback"),
        pytest.param(["126.0.0.0/7", "::/128"], NODE, [], True, id="more than loopback"),
        pytest.param(["nonsense"], NODE, ["192.0.2.1", "10.5.0.1", "2001:db8::1", "fe80::1"], True, id="bad"),
    ],
)
def test_nodeport_addresses(
    cidrs: list[str], node_addresses: list[bytes], served: list[str], loopback: bool
) -> None:
    assert addresses.nodeport_addresses(cidrs, LOCAL, node_addresses) == (
        tuple(ip(text) for text in served),
        loopback,
    )


@given(st.lists(strategies.addresses()), st.lists(strategies.addresses()))
def test_nodeport_addresses_are_local_and_never_loopback(local: list[bytes], node: list[bytes]) -> None:
    for cidrs in ([], ["primary"], ["0.0.0.0/0", "::/0"]):
        chosen = addresses.nodeport_addresses(cidrs, local, node).addresses
        assert set(chosen) <= set(local)
        assert not any(addresses.is_loopback(address) for address in chosen)


def test_family_of() -> None:
    assert addresses.family_of(addresses.IPV4_ZERO) is model.Family.IPV4
    assert addresses.family_of(addresses.IPV6_ZERO) is model.Family.IPV6


# What ValidateEndpointIP of the API server refuses, by Go's net.IP; of IPv6 multicast whatever its flags are.
REFUSED = {
    "unspecified": ["0.0.0.0/32", "::/128"],
    "loopback": ["127.0.0.0/8", "::1/128"],
    "link-local": ["169.254.0.0/16", "fe80::/10"],
    "link-local multicast": ["224.0.0.0/24", *(f"ff{flags:x}2::/16" for flags in range(16))],
}
NETWORKS = [(why, ipaddress.ip_network(cidr)) for why, cidrs in REFUSED.items() for cidr in cidrs]


def why_refused(packed: bytes) -> str:
    """Found by arithmetic on numbers, not bytes."""
    text = ipaddress.ip_address(addresses.text(packed))
    return next((why for why, network in NETWORKS if text in network), "")


def edges() -> list[bytes]:
    """The first and last addresses of these networks, and those beside them."""
    found = []
    for _, network in NETWORKS:
        first, last = int(network.network_address), int(network.broadcast_address)
        for number in (first - 1, first, last, last + 1):
            if 0 <= number < 1 << network.max_prefixlen:
                found.append(addresses.packed(type(network.network_address)(number)))
    return found


@given(st.one_of(st.sampled_from(edges()), strategies.addresses()))
def test_special_is_what_the_api_server_refuses_and_nothing_else(address: bytes) -> None:
    assert addresses.special(address) == why_refused(address)


@pytest.mark.parametrize("address", edges(), ids=addresses.text)
def test_where_what_is_special_begins_and_ends(address: bytes) -> None:
    why = why_refused(address)
    assert addresses.special(address) == why
    assert addresses.nobodys(address) == (why if why in ("unspecified", "loopback") else "")


@pytest.mark.parametrize(
    "text", ["10.0.0.1", "100.64.0.1", "239.1.1.1", "240.0.0.1", "fc00::1", "ff05::1", "::2"]
)
def test_endpoints_of_a_real_cluster_are_not_special(text: str) -> None:
    assert addresses.special(ip(text)) == ""
