import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.core import installed, model, plan, pools, tables
from tests.unit import test_ledger

FRONTENDS = st.dictionaries(
    st.binary(min_size=tables.FRONTEND_KEY_SIZE, max_size=tables.FRONTEND_KEY_SIZE),
    st.binary(min_size=tables.FRONTEND_SIZE, max_size=tables.FRONTEND_SIZE),
    max_size=4,
)
BACKENDS = st.dictionaries(
    st.integers(1, 2**32 - 1),
    st.binary(min_size=tables.BACKEND_SIZE, max_size=tables.BACKEND_SIZE),
    max_size=4,
)


@given(FRONTENDS, BACKENDS)
def test_packed_rows_come_out_as_they_went_in(
    frontends: dict[bytes, bytes], backends: dict[int, bytes]
) -> None:
    held = installed.make(7, b"traits", frontends, backends, ())
    assert (held.id, held.traits) == (7, b"traits")
    assert list(held.frontends.items()) == sorted(frontends.items())
    assert list(held.backends.items()) == list(backends.items())
    assert held.backend_count == len(backends)


@given(FRONTENDS)
def test_frontends_are_the_same_whoever_told_of_them_first(frontends: dict[bytes, bytes]) -> None:
    turned = dict(reversed(frontends.items()))
    assert installed.make(7, b"", turned, {}, ()) == installed.make(7, b"", frontends, {}, ())


def test_a_table_is_found_by_its_set() -> None:
    local = installed.SlotTable(int(tables.BackendSet.LOCAL), 5, 2, 20, b"")
    held = installed.make(1, b"", {}, {}, [local])
    assert held.table(int(tables.BackendSet.LOCAL)) is local
    assert held.table(int(tables.BackendSet.CLUSTER)) is None
    assert local.extent == pools.Extent(5, 2)


@given(st.lists(st.integers(1, 2**32 - 1), max_size=40))
def test_slots_fill_whole_blocks(ids: list[int]) -> None:
    packed = installed.blocks(ids)
    assert len(packed) % tables.BLOCK_SIZE == 0
    assert len(packed) // tables.BLOCK_SIZE == -(-len(ids) // tables.SLOTS_PER_BLOCK)
    words = [packed[i : i + 4] for i in range(0, len(packed), 4)]
    assert words == [*map(tables.row_key, ids), *[bytes(4)] * (len(words) - len(ids))]


def test_a_digest_looks_at_the_slots_in_use_and_their_order() -> None:
    assert installed.digest(installed.blocks([1, 2]), 2) != installed.digest(installed.blocks([2, 1]), 2)
    assert installed.digest(installed.blocks([1, 2]), 2) == installed.digest(installed.blocks([1, 2, 3]), 2)


@pytest.mark.parametrize("family", model.Family)
@pytest.mark.parametrize("protocol", model.Protocol)
def test_a_row_names_its_port(protocol: model.Protocol, family: model.Family) -> None:
    key = model.PortKey(model.ServiceName("n" * 63, "s" * 63), "p" * 15, protocol, family)
    wanted = plan.PortPlan(key, (), (), model.Algorithm.MAGLEV, 60, True, True)
    row = installed.meta(wanted)
    assert installed.port_key(row) == key
    names = b"".join(name.encode().ljust(64, b"\0") for name in ("n" * 63, "s" * 63, "p" * 15))
    assert row == names + installed.traits(row)


def test_a_row_that_names_no_port_is_an_error() -> None:
    row = tables.service_meta(installed.meta(test_ledger.port()))
    for spoilt in (row._replace(proto=99), row._replace(family=99)):
        with pytest.raises(ValueError, match="99"):
            installed.port_key(spoilt.pack())


def test_a_backend_is_the_same_by_address_and_port_alone() -> None:
    row = tables.Backend(bytes(16), b"\x00\x50", 6, 1, 5, 3, 1, 1)
    other = row._replace(state=3, service=9, locality=0, weight=7, sets=2)
    assert installed.identity(row.pack()) == installed.identity(other.pack())
    assert installed.identity(row.pack()) != installed.identity(row._replace(port=b"\x00\x51").pack())
