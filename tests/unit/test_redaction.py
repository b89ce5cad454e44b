"""What a support bundle does not tell: whatever looks like a secret, and on demand who is who."""

import ipaddress
import json

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
