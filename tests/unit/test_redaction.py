"""What a support bundle does not tell: whatever looks like a secret, and on demand who is who."""

import ipaddress
import json
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from lbproxy.core import redaction

SECRET = "S3cr3tV4lue0123456789"


@pytest.mark.parametrize(
    "text",
    [
        f"token: {SECRET}",
        f'{{"token":"{SECRET}"}}',
        f"--token={SECRET} --v=2",
        f"password {SECRET}",
        f"client-key-data: {SECRET}",
        f"Authorization: Bearer {SECRET}",
        f"authorization: basic {SECRET}",
        f"API_KEY={SECRET}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----",
        f"-----BEGIN CERTIFICATE-----\\n{SECRET}",
        f"eyJhbGciOiJSUzI1NiJ9.{SECRET}.{SECRET}",
    ],
)
def test_what_has_the_form_of_a_secret_is_hidden(text: str) -> None:
    found = redaction.scrubbed(f"before {text}")
    assert SECRET not in found
    assert redaction.HIDDEN in found
    assert found.startswith("before ")
    assert redaction.scrubbed(found) == found


@pytest.mark.parametrize(
    "text", ["tokens are fine", "lbproxy_keys 5", "the secret of it", "10.96.0.1:443 eyes", "key=value"]
)
def test_what_has_not_stays(text: str) -> None:
    assert redaction.scrubbed(text) == text


def test_values_are_hidden_by_their_names_and_json_stays_json() -> None:
    value = {"token": SECRET, "a": [f"token={SECRET}", 1, None, {"passwd": SECRET}], "token_count": 3}
    found = redaction.scrubbed_value(value)
    assert SECRET not in json.dumps(found)
    assert found["a"][1:3] == [1, None]
    assert found["token_count"] == 3


@pytest.fixture
def names() -> redaction.Pseudonyms:
    made = redaction.Pseudonyms()
    made.learn("service", ["cart", "cart-db", "default"])
    made.learn("node", ["worker-1", "worker-1.example.org"])
    return made


def test_names_and_addresses_are_replaced_alike_wherever_they_stand(names: redaction.Pseudonyms) -> None:
    text = names.text("shop/cart:http at [fd00:96::1]:80, 10.96.0.1:80 and 10.244.0.0/16; cart-db-0 cartoon")
    assert text == "shop/service-1:http at [ipv6-1]:80, ipv4-1:80 and ipv4-2/16; service-2-0 cartoon"
    assert names.text("10.96.0.1 ::ffff:10.96.0.1 FD00:96:0::1") == "ipv4-1 ipv4-1 ipv6-1"
    assert names.text("worker-1.example.org aa:bb:cc:dd:ee:ff AA:bb:cc:dd:ee:ff") == "node-2 mac-1 mac-1"
    assert names.given["cart"] == "service-1"


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1:10249",
        "[::1]:80",
        "0.0.0.0/0",
        "::/0",
        "at 12:34:56",
        "Linux 6.18.44",
        "default/x",
        "255.255.255.0",
    ],
)
def test_what_tells_nothing_of_anybody_stays(names: redaction.Pseudonyms, text: str) -> None:
    assert names.text(text) == text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ns-a/shy:web/TCP/IPv4: the map is full", "namespace-1/service-1:port-1/TCP/IPv4: the map is full"),
        ("ns-a/shy/UDP/IPv6 has it", "namespace-1/service-1/UDP/IPv6 has it"),
        ("upsert Service ns-a/shy", "upsert Service namespace-1/service-1"),
        ("the health check of ns-a/shy on", "the health check of namespace-1/service-1 on"),
        ("EndpointSlice ns-a/shy-x7k2p: odd", "EndpointSlice namespace-1/service-1-x7k2p: odd"),
        ("EndpointSlice ns-a/shy-slice", "EndpointSlice namespace-1/service-1"),
        ('x{namespace="ns-a",service="shy"} 1', 'x{namespace="namespace-1",service="service-1"} 1'),
        ("zone 'west 1'", "zone 'zone-1'"),
        ('{"process":"a b/0"}', '{"process":"process-1"}'),
        ("at https://api.example.org:6443: refused", "at https://host-1:6443: refused"),
        ('host="3.example.org:6443",le="1"', 'host="host-1:6443",le="1"'),
    ],
)
def test_names_are_told_by_where_they_stand(text: str, told: str) -> None:
    """What found no room, is rejected or is another proxy's is in no table, but in the log and /healthz."""
    names = redaction.Pseudonyms()
    names.learn_from(text)
    assert names.text(text) == told
    again = text.replace("/TCP", "").replace("Service ", "")
    assert not any(name in names.text(again) for name in names.given)


@pytest.mark.parametrize(
    "text",
    ["TCP/IPv4", "default/kubernetes:https/TCP/IPv4", "net/snmp", "http://127.0.0.1:10249", "//localhost:80"],
)
def test_what_only_looks_like_names_stays(text: str) -> None:
    names = redaction.Pseudonyms()
    names.learn_from(text)
    assert names.text(text) == text
    assert names.given == {}


WORDS = st.text("ab-.", min_size=1, max_size=6)


@hypothesis.given(
    st.sets(WORDS | st.sampled_from(["a_b", "a/b"]), max_size=6), st.text("ab-._/ ", max_size=30)
)
def test_names_are_found_as_one_pattern_of_all_would(known: set[str], text: str) -> None:
    """The longest first, from the left; where a name does not end in a word's middle."""
    known = {name for name in known if name.strip("-.") == name}
    hypothesis.assume(known)
    names = redaction.Pseudonyms()
    names.learn("x", known)
    pattern = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    plain = re.sub(
        rf"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])", lambda found: names.given[found[0]], text
    )
    assert names.text(text) == plain


def test_tens_of_thousands_of_names_are_one_pass() -> None:
    """Each word is looked up; none is held against every name."""
    names = redaction.Pseudonyms()
    names.learn("service", (f"team-{number}-cart" for number in range(20_000)))
    text = "\n".join(f"of team-{number}-cart-0" for number in range(20_000))
    assert names.text(text).splitlines()[-1] == f"of {names.given['team-19999-cart']}-0"


def test_keys_of_json_are_ours_but_for_addresses(names: redaction.Pseudonyms) -> None:
    found = names.value({"cart": "cart", "10.96.0.1": ["10.96.0.1", 5]})
    assert found == {"cart": "service-1", "ipv4-1": ["ipv4-1", 5]}


def tells_of_somebody(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    one = getattr(address, "ipv4_mapped", None) or address
    return not (one.is_loopback or one.is_unspecified or one.is_multicast or str(one).startswith("255."))


ADDRESSES = st.ip_addresses().filter(tells_of_somebody)


@hypothesis.given(st.lists(ADDRESSES, min_size=1, max_size=8))
def test_no_address_is_left_and_none_is_mistaken_for_another(
    drawn: list[ipaddress.IPv4Address | ipaddress.IPv6Address],
) -> None:
    names = redaction.Pseudonyms()
    found = names.text(" ".join(map(str, drawn))).split()
    mapped = [str(getattr(one, "ipv4_mapped", None) or one) for one in drawn]
    assert len(set(found)) == len(set(mapped))
    assert not any(str(one) in word for one in drawn for word in found)
