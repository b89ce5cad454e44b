"""Which address a network namespace stands for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.core import addresses, model, netns_rows, tables
from lbproxy.kernel import fake
from tests import serving

V4, V6 = model.Family.IPV4, model.Family.IPV6
GLOBAL, LINK, HOST = 0, 253, 254
HOST_NETNS, POD = 1, 77


def ip(text: str) -> bytes:
    address = addresses.parse(text)
    assert address is not None
    return address


def one(text: str, device: int = 2, scope: int = GLOBAL, flags: int = 0x80) -> netns_rows.Address:
    return netns_rows.Address(ip(text), device, scope, flags)


def test_the_first_global_address_of_the_first_device_is_the_primary_one() -> None:
    found = [
        one("127.0.0.1", 1, HOST), one("10.1.0.2", 3), one("10.244.0.5"), one("10.244.0.6"),
        one("::1", 1, HOST), one("fe80::5", 2, LINK), one("fd00::5"),
    ]  # fmt: skip
    assert netns_rows.primary(found) == {V4: ip("10.244.0.5"), V6: ip("fd00::5")}


@pytest.mark.parametrize("flag", [0x01, 0x08, 0x20, 0x40])
def test_a_secondary_failed_deprecated_or_tentative_address_is_not(flag: int) -> None:
    assert netns_rows.primary([one("fd00::1", flags=flag)]) == {}
    assert netns_rows.primary([one("fd00::1", flags=flag), one("fd00::2", 9)]) == {V6: ip("fd00::2")}


def test_a_global_address_of_the_loopback_device_comes_last() -> None:
    assert netns_rows.primary([one("192.0.2.1", 1), one("10.0.0.1", 2)]) == {V4: ip("10.0.0.1")}
    assert netns_rows.primary([one("192.0.2.1", 1)]) == {V4: ip("192.0.2.1")}


def test_the_nodes_own_namespace_has_the_nodes_primary_addresses() -> None:
    spaces = [
        netns_rows.Namespace(HOST_NETNS, (one("10.244.0.1"), one("fd00::1"))),
        netns_rows.Namespace(POD, (one("10.244.0.5"),)),
    ]
    rows = netns_rows.rows(spaces, HOST_NETNS, {V4: ip("192.0.2.1")})
    assert {(int.from_bytes(key[:8], "little"), key[8]): row for key, row in rows.items()} == {
        (HOST_NETNS, 4): ip("192.0.2.1"),
        (HOST_NETNS, 6): ip("fd00::1"),
        (POD, 4): ip("10.244.0.5"),
    }


def test_what_the_node_is_called_is_in_the_settings() -> None:
    assert netns_rows.own_addresses(tables.NO_SETTINGS) == {}
    settings = tables.NO_SETTINGS._replace(node6_addr=ip("fd00::1"))
    assert netns_rows.own_addresses(settings) == {V6: ip("fd00::1")}


_ROWS = st.dictionaries(
    st.integers(0, 20).map(lambda n: n.to_bytes(16, "big")),
    st.integers(0, 3).map(lambda n: n.to_bytes(16, "big")),
    max_size=16,
)


@given(_ROWS, _ROWS)
def test_the_writes_lead_to_what_is_wanted_and_change_nothing_else(
    want: dict[bytes, bytes], have: dict[bytes, bytes]
) -> None:
    kernel = fake.FakeMaps(serving.SIZES)  # which has room for no more than 16
    kernel.apply(netns_rows.writes(have, {}))
    writes = netns_rows.writes(want, have)
    kernel.apply(writes)
    assert dict(kernel.rows("netns_addresses")) == want
    assert len(writes) == len({*want.items()} - {*have.items()}) + len(have.keys() - want.keys())
