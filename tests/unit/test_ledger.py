import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbproxy import abi
from lbproxy.core import (
    addresses,
    installed,
    ledger,
    maglev,
    model,
    outcomes,
    plan,
    pools,
    quarantine,
    restoring,
    tables,
)
from lbproxy.kernel import fake
from tests import serving, strategies

WEB = model.ServiceName("default", "web")
DB = model.ServiceName("default", "db")
CLUSTER = tables.BackendSet.CLUSTER


def key(service: model.ServiceName = WEB, port_name: str = "") -> model.PortKey:
    return model.PortKey(service, port_name, model.Protocol.TCP, model.Family.IPV4)


def address(host: int, network: int = 244) -> bytes:
    return bytes(10) + b"\xff\xff" + bytes([10, network, host // 256, host % 256])


def frontend(host: int = 1, kind: tables.FrontendKind = tables.FrontendKind.CLUSTER_IP) -> plan.FrontendPlan:
    return plan.FrontendPlan(address(host, 96), 80, model.Protocol.TCP, kind, CLUSTER, False)


def backend(host: int, state: tables.BackendState = tables.BackendState.ACTIVE) -> plan.BackendPlan:
    sets = 0 if state is tables.BackendState.UNREADY else int(CLUSTER)
    return plan.BackendPlan(address(host), 8080, state, sets, "node-a", "zone-1", 1)


def port(
    service: model.ServiceName = WEB,
    hosts: tuple[int, ...] = (1, 2),
    frontends: tuple[plan.FrontendPlan, ...] = (frontend(),),
    algorithm: model.Algorithm = model.Algorithm.RANDOM,
) -> plan.PortPlan:
    return plan.PortPlan(key(service), frontends, tuple(map(backend, hosts)), algorithm, 0, False, False)


def apply(
    maps: fake.FakeMaps, known: ledger.Ledger, plans: serving.Plans, now_s: float = 0.0
) -> ledger.Change:
    change = known.change(plans, now_s)
    serving.Watched(maps).apply(change.writes, now_s)
    return change


# --- properties ---


@given(strategies.steps())
@settings(deadline=None)
def test_no_write_leaves_anything_leading_nowhere(steps: list[strategies.Step]) -> None:
    known, kernel, now_s = (
        ledger.Ledger(serving.capacity()),
        serving.Watched(fake.FakeMaps(serving.SIZES)),
        0.0,
    )
    serving.begin_absence(known, kernel.maps)
    latest: serving.Plans = {}
    for step in steps:
        now_s += step.pause_s
        kernel.apply(known.expire(now_s), now_s)
        change = known.change(step.plans, now_s)
        assert not change.refused
        kernel.apply(change.writes, now_s)
        latest |= step.plans
        serving.assert_all_absence_said(kernel.maps)
        serving.assert_same(kernel.maps, serving.of_plans(latest))
        serving.assert_counted(known, kernel.maps)
    assert known.change(latest, now_s).writes == []

    kernel.apply(known.expire(now_s + quarantine.RECYCLE_AFTER_S), now_s + quarantine.RECYCLE_AFTER_S)
    assert known.next_due_s is None
    states = {tables.backend(row).state for _, row in kernel.maps.rows(tables.Table.BACKENDS)}
    assert tables.BackendState.DRAINING not in states


_SMALL = st.fixed_dictionaries(
    {
        "services": st.integers(2, 5),
        "slots": st.integers(2, 12) | st.integers(30, 60),
        "backends": st.integers(2, 30),
        "frontends": st.integers(1, 4),
        "source_ranges": st.integers(1, 3),
        "tunnel_ends": st.integers(1, 3),
        "earlier_slots": st.integers(1, 2),
        "localities": st.just(2),
    }
)


@given(strategies.steps(), _SMALL)
@settings(deadline=None)
def test_full_tables_refuse_a_port_and_change_nothing_of_it(
    steps: list[strategies.Step], small: dict[str, int]
) -> None:
    known = ledger.Ledger(serving.capacity(**small))
    kernel, now_s = serving.Watched(fake.FakeMaps(serving.sizes(**small))), 0.0
    serving.begin_absence(known, kernel.maps)
    latest: serving.Plans = {}
    for step in steps:
        now_s += step.pause_s
        kernel.apply(known.expire(now_s), now_s)
        before = dict(known.installed)
        change = known.change(step.plans, now_s)
        for refused in change.refused:
            assert known.installed.get(refused) == before.get(refused)
        kernel.apply(change.writes, now_s)
        serving.assert_counted(known, kernel.maps)
        serving.assert_all_absence_said(kernel.maps)
        latest |= step.plans

    # What remains to be done needs room only: once everything else has gone, any one service has it.
    kernel.apply(known.change({name: [] for name in known.services() | set()}, now_s).writes, now_s)
    assert not known.installed
    now_s += quarantine.RECYCLE_AFTER_S
    kernel.apply(known.expire(now_s), now_s)
    assert not list(kernel.maps.rows(tables.Table.BACKENDS))
    assert not list(kernel.maps.rows(tables.Table.FRONTENDS))
    assert (known.service_ids.used, known.backend_ids.used, known.extents.used) == (0, 0, 0)
    assert (known.range_rows, known.end_rows, known.earlier_rows) == (0, 0, 0)
    serving.assert_counted(known, kernel.maps)
    for name, ports in latest.items():
        fits = not ledger.Ledger(serving.capacity(**small)).change({name: ports}, 0.0).refused
        change = known.change({name: ports}, now_s)
        kernel.apply(change.writes, now_s)
        assert fits == (not change.refused)
        kernel.apply(known.change({name: []}, now_s).writes, now_s)
        now_s += quarantine.RECYCLE_AFTER_S
        kernel.apply(known.expire(now_s), now_s)


@given(strategies.steps(longest=3))
@settings(max_examples=30, deadline=None)
def test_services_of_one_change_do_not_depend_on_their_order(steps: list[strategies.Step]) -> None:
    latest: serving.Plans = {}
    for step in steps:
        latest |= step.plans
    expected = serving.of_plans(latest)
    for order in itertools.permutations(latest):
        serving.assert_same(serving.of_plans({name: latest[name] for name in order}), expected)


# --- examples ---


def test_what_is_pointed_at_is_written_first() -> None:
    change = ledger.Ledger(serving.capacity()).change({WEB: [port()]}, 0.0)
    written = [write.table for write in change.writes if write.table is not tables.Table.SERVICE_STATS]
    assert [table for table, _ in itertools.groupby(written)] == [
        tables.Table.SERVICES,
        tables.Table.LOCALITIES,
        tables.Table.BACKENDS,
        tables.Table.SLOTS,
        tables.Table.FRONTENDS,
    ]


def test_a_backend_that_goes_stays_readable_until_the_quarantine_is_over() -> None:
    maps, known = fake.FakeMaps(serving.SIZES), ledger.Ledger(serving.capacity())
    apply(maps, known, {WEB: [port(hosts=(1, 2))]})
    gone = known.installed[key()].backend_ids[address(1) + (8080).to_bytes(2, "big")]
    apply(maps, known, {WEB: [port(hosts=(2,))]}, now_s=10.0)

    row = tables.backend(maps.row(tables.Table.BACKENDS, tables.row_key(gone)) or b"")
    assert (row.state, row.sets, row.addr) == (tables.BackendState.DRAINING, 0, address(1))
    assert known.next_due_s == 10.0 + quarantine.RECYCLE_AFTER_S
    assert known.expire(10.0 + quarantine.RECYCLE_AFTER_S - 0.01) == []
    maps.apply(known.expire(10.0 + quarantine.RECYCLE_AFTER_S))
    assert not any(maps.row(tables.Table.BACKENDS, tables.row_key(gone)) or b"")
    assert known.next_due_s is None


def test_a_backend_keeps_its_id_and_its_slots_while_only_its_weight_of_words_changes() -> None:
    maps, known = fake.FakeMaps(serving.SIZES), ledger.Ledger(serving.capacity())
    apply(maps, known, {WEB: [port()]})
    before = known.installed[key()]
    moved = msgspec.structs.replace(backend(1), node_name="node-b")
    change = apply(maps, known, {WEB: [msgspec.structs.replace(port(), backends=(moved, backend(2)))]})
    assert [write.table for write in change.writes] == [tables.Table.LOCALITIES, tables.Table.BACKENDS]
    assert known.installed[key()].tables == before.tables
    assert known.installed[key()].backend_ids == before.backend_ids


def test_a_frontend_moves_in_one_write_from_a_service_to_another() -> None:
    maps, known = fake.FakeMaps(serving.SIZES), ledger.Ledger(serving.capacity())
    apply(maps, known, {WEB: [port()]})
    change = apply(maps, known, {WEB: [], DB: [port(DB, (3,))]})
    of_frontends = [write for write in change.writes if write.table is tables.Table.FRONTENDS]
    assert [type(write) for write in of_frontends] == [tables.Put]


def test_a_service_without_backends_has_a_frontend_without_slots() -> None:
    maps, known = fake.FakeMaps(serving.SIZES), ledger.Ledger(serving.capacity())
    apply(maps, known, {WEB: [port(hosts=())]})
    [(_, row)] = maps.rows(tables.Table.FRONTENDS)
    assert (tables.frontend(row).slot_count, tables.frontend(row).block) == (0, 0)


def test_flags_kinds_and_scopes_reach_the_rows() -> None:
    maps, known = fake.FakeMaps(serving.SIZES), ledger.Ledger(serving.capacity())
    frontends = (
        frontend(1),
        msgspec.structs.replace(frontend(2, tables.FrontendKind.NODE_PORT), drop=True),
    )
    wanted = msgspec.structs.replace(
        port(frontends=frontends, algorithm=model.Algorithm.MAGLEV), affinity_s=30, internal_local=True
    )
    apply(maps, known, {WEB: [wanted]})
    rows = {tables.frontend_key(k): tables.frontend(row) for k, row in maps.rows(tables.Table.FRONTENDS)}
    assert {k.scope: row.flags for k, row in rows.items()} == {
        tables.SCOPE_ADDRESS: tables.FrontendFlag.MAGLEV,
        tables.SCOPE_NODE_PORT: tables.FrontendFlag.MAGLEV | tables.FrontendFlag.DROP,
    }
    assert {row.affinity_s for row in rows.values()} == {30}
    [(_, meta)] = maps.rows(tables.Table.SERVICES)
    names = tables.service_meta(meta)
    assert (tables.text(names.name), names.algorithm, names.policies) == (
        "web",
        model.Algorithm.MAGLEV,
        tables.Policy.INTERNAL_LOCAL,
    )


def test_only_backends_of_least_connections_are_counted_and_an_id_starts_from_nothing() -> None:
    maps, known = fake.FakeMaps(serving.SIZES), ledger.Ledger(serving.capacity())
    least = model.Algorithm.LEAST_CONNECTIONS
    frontends = (frontend(1), msgspec.structs.replace(frontend(2), dsr=True))
    apply(maps, known, {WEB: [port(frontends=frontends, algorithm=least)], DB: [port(DB, frontends=())]})
    flags = [tables.frontend(row).flags for _, row in maps.rows(tables.Table.FRONTENDS)]
    dsr = tables.FrontendFlag.DSR | tables.FrontendFlag.MAGLEV
    assert sorted(flags) == sorted([tables.FrontendFlag.LEAST_CONN, dsr])
    counted = known.counted_backends()
    assert counted == {n: row for row, n in known.installed[key()].backend_ids.items()}
    for row_key, row in maps.rows(tables.Table.BACKENDS):
        is_counted = bool(tables.backend(row).sets & tables.BackendSet.COUNTED)
        assert is_counted is (int.from_bytes(row_key, tables.BYTE_ORDER) in counted)
    assert known.counted_anew == 1
    (number, *_) = counted
    for table in (tables.Table.BACKEND_LOAD, tables.Table.LOAD_CORRECTIONS):
        size = abi.MAPS[table].value_size
        maps.apply([tables.Put(table, tables.row_key(number), b"\7".ljust(size, b"\0"))])
    # What is there is taken over, also by a ledger that is restored.
    restored = restoring.restore(serving.capacity(), maps.dump(), 0.0)
    assert restored.counted_backends() == counted
    apply(maps, known, {WEB: []})
    assert known.counted_backends() == {}
    maps.apply(known.expire(10.0))
    for table in (tables.Table.BACKEND_LOAD, tables.Table.LOAD_CORRECTIONS):
        assert list(maps.rows(table)) == []


def test_a_service_is_counted_anew_when_it_is_switched() -> None:
    maps, known = fake.FakeMaps(serving.SIZES), ledger.Ledger(serving.capacity())
    for algorithm, anew in ((2, 1), (0, 1), (2, 2), (2, 2)):
        apply(maps, known, {WEB: [port(algorithm=model.Algorithm(algorithm))]})
        assert known.counted_anew == anew
        assert bool(known.counted_backends()) is (algorithm == 2)


def test_a_full_localities_table_leaves_a_backend_unnamed_and_served() -> None:
    maps = fake.FakeMaps(serving.sizes(localities=2))
    known = ledger.Ledger(serving.capacity(localities=2))
    elsewhere = msgspec.structs.replace(backend(2), node_name="node-b")
    change = apply(maps, known, {WEB: [msgspec.structs.replace(port(), backends=(backend(1), elsewhere))]})
    assert not change.refused
    assert sorted(tables.backend(row).locality for _, row in maps.rows(tables.Table.BACKENDS)) == [0, 1]


def refusals(table: str, rows: int, plans: serving.Plans) -> set[str]:
    known = ledger.Ledger(serving.capacity(**{table: rows}))
    maps = fake.FakeMaps(serving.sizes(**{table: rows}))
    return {full.table for full in apply(maps, known, plans).refused.values()}


def test_a_refusal_names_the_table_that_is_full() -> None:
    both = {WEB: [port()], DB: [port(DB, frontends=(frontend(2),))]}
    assert refusals("services", 2, both) == {tables.Table.SERVICES}
    assert refusals("backends", 4, both) == {tables.Table.BACKENDS}
    assert refusals("slots", 2, both) == {tables.Table.SLOTS}
    assert refusals("frontends", 1, both) == {tables.Table.FRONTENDS}
    assert (
        str(pools.Exhausted("slots", 7))
        == "the slots table is full (7 rows): raise it with --map-rows slots=N"
    )


def test_a_refused_change_leaves_the_port_as_it_was_until_there_is_room() -> None:
    small = {"backends": 5}
    maps, known = fake.FakeMaps(serving.sizes(**small)), ledger.Ledger(serving.capacity(**small))
    apply(maps, known, {WEB: [port()], DB: [port(DB, (3, 4), (frontend(2),))]})
    before, writes = serving.view(maps), len(maps.log)
    grown = {WEB: [port(hosts=(1, 2, 5))]}
    assert set(apply(maps, known, grown).refused) == {key()}
    assert (serving.view(maps), len(maps.log)) == (before, writes)

    apply(maps, known, {DB: []}, now_s=5.0)
    maps.apply(known.expire(6.0))
    assert not apply(maps, known, grown, now_s=6.0).refused
    serving.assert_same(maps, serving.of_plans(grown))


@pytest.mark.parametrize(("table", "rows"), [("services", 2), ("backends", 3), ("slots", 2)])
def test_what_went_is_not_given_out_again_before_the_quarantine_is_over(table: str, rows: int) -> None:
    small = {table: rows}
    maps, known = fake.FakeMaps(serving.sizes(**small)), ledger.Ledger(serving.capacity(**small))
    kernel = serving.Watched(maps)
    # Without backends, a service has nothing in quarantine that its id could hide behind.
    hosts = () if table == "services" else (1, 2)
    kernel.apply(known.change({WEB: [port(hosts=hosts)]}, 0.0).writes, 0.0)
    kernel.apply(known.change({WEB: []}, 5.0).writes, 5.0)
    wanted: serving.Plans = {DB: [port(DB, (3, 4), (frontend(2),))]}
    for now_s in (5.0, 5.99):
        kernel.apply(known.expire(now_s), now_s)
        assert [full.table for full in known.change(wanted, now_s).refused.values()] == [table]
    kernel.apply(known.expire(6.0), 6.0)
    change = known.change(wanted, 6.0)
    assert not change.refused
    kernel.apply(change.writes, 6.0)


def test_frontends_that_come_and_go_in_one_change_never_overfill_the_table() -> None:
    """What goes is deleted after what comes is written: until then both have a row."""
    small = {"frontends": 2}
    maps, known = fake.FakeMaps(serving.sizes(**small)), ledger.Ledger(serving.capacity(**small))
    apply(maps, known, {DB: [port(DB, frontends=(frontend(1), frontend(2)))]})
    wanted: serving.Plans = {DB: [], WEB: [port(frontends=(frontend(3), frontend(4)))]}
    apply(maps, known, wanted)
    assert not apply(maps, known, wanted).refused
    serving.assert_same(maps, serving.of_plans(wanted))


def test_the_statistics_of_a_row_are_cleared_before_another_has_it() -> None:
    maps, known = fake.FakeMaps(serving.SIZES), ledger.Ledger(serving.capacity())
    apply(maps, known, {WEB: [port(hosts=(1,))]})
    held = known.installed[key()]
    apply(maps, known, {WEB: []})
    writes = known.expire(1.0)
    cleared = {(w.table, w.key) for w in writes if isinstance(w, tables.Put) and not any(w.value)}
    [number] = held.backends
    # Before the row that says whose they are is free.
    freed = next(n for n, w in enumerate(writes) if w.table == tables.Table.BACKENDS)
    for row in outcomes.keys(number):
        assert writes.index(tables.Delete(tables.Table.BACKEND_HEALTH, row)) < freed
    assert {
        (tables.Table.BACKENDS, tables.row_key(number)),
        (tables.Table.BACKEND_STATS, tables.row_key(number)),
        (tables.Table.SERVICE_STATS, tables.row_key(held.id)),
    } == cleared


def test_ten_thousand_backends_in_one_service() -> None:
    big = {"backends": 10_001, "slots": 5000}
    maps, known = fake.FakeMaps(serving.sizes(**big)), ledger.Ledger(serving.capacity(**big))
    maps.apply(known.change({WEB: [port(hosts=tuple(range(1, 10_001)))]}, 0.0).writes)
    assert not serving.dangling(maps)
    [served] = serving.view(maps).values()
    assert len(set(served.slots)) == 10_000
    assert installed.make(0, b"", {}, {}, ()).backend_count == 0
    assert known.installed[key()].backend_count == 10_000


# --- source ranges, and what clients outside have ---


def ranged(*texts: str, service: model.ServiceName = WEB) -> plan.PortPlan:
    networks = [addresses.parse_cidr(text) for text in texts]
    ranges = tuple(model.SourceRange(one.base, one.prefix_length) for one in networks if one)
    restricted = msgspec.structs.replace(
        frontend(kind=tables.FrontendKind.LOAD_BALANCER), restricted=bool(ranges)
    )
    return msgspec.structs.replace(port(service, frontends=(restricted,)), source_ranges=ranges)


def allowed(maps: fake.FakeMaps, service: int, text: str) -> bool:
    """Whether the programs let a source in."""
    address = addresses.parse(text)
    assert address is not None
    found = maps.row(
        tables.Table.SOURCE_RANGES, installed.range_key(service, model.SourceRange(address, 128))
    )
    return found == tables.ALLOWED


def test_source_ranges_are_of_their_own_service() -> None:
    maps, known = fake.FakeMaps(serving.SIZES), ledger.Ledger(serving.capacity())
    apply(
        maps,
        known,
        {WEB: [ranged("192.0.2.0/24", "192.0.2.128/25")], DB: [ranged("2001:db8::/32", service=DB)]},
    )
    web, db = (known.installed[key(name)].id for name in (WEB, DB))
    assert allowed(maps, web, "192.0.2.7")
    assert allowed(maps, web, "192.0.2.200")
    assert not allowed(maps, web, "192.0.3.7")
    assert not allowed(maps, web, "2001:db8::7")
    assert allowed(maps, db, "2001:db8::7")
    assert not allowed(maps, db, "192.0.2.7")
    assert not allowed(maps, db + 1, "2001:db8::7")
    assert known.range_rows == 3


def test_ranges_come_before_the_frontend_and_go_after_it() -> None:
    maps, known = fake.FakeMaps(serving.SIZES), ledger.Ledger(serving.capacity())
    both = (tables.Table.SOURCE_RANGES, tables.Table.FRONTENDS)

    def written(port: plan.PortPlan | None) -> list[tuple[str, str]]:
        change = apply(maps, known, {WEB: [port] if port else []})
        return [(type(write).__name__, write.table) for write in change.writes if write.table in both]

    put, delete = "Put", "Delete"
    ranges, frontends = both
    assert written(ranged()) == [(put, frontends)]
    assert written(ranged("192.0.2.0/24")) == [(put, ranges), (put, frontends)]
    assert written(ranged("192.0.2.0/25")) == [(put, ranges), (delete, ranges)]
    assert written(ranged()) == [(put, frontends), (delete, ranges)]
    assert written(ranged("192.0.2.0/24")) == [(put, ranges), (put, frontends)]
    assert written(None) == [(delete, frontends), (delete, ranges)]
    assert known.range_rows == 0


def test_ranges_that_come_and_go_in_one_change_never_overfill_the_table() -> None:
    small = {"source_ranges": 3}
    maps, known = fake.FakeMaps(serving.sizes(**small)), ledger.Ledger(serving.capacity(**small))
    apply(maps, known, {WEB: [ranged("192.0.2.0/24", "198.51.100.0/24")]})
    grown: serving.Plans = {WEB: [ranged("192.0.2.0/25", "198.51.100.0/25")]}
    assert {full.table for full in apply(maps, known, grown).refused.values()} == {"source_ranges"}
    assert not apply(maps, known, {WEB: [ranged("192.0.2.0/24", "198.51.100.0/25")]}).refused
    assert known.range_rows == 2


def test_clients_outside_have_a_row_of_their_own_and_it_comes_first_and_goes_last() -> None:
    maps, known = fake.FakeMaps(serving.SIZES), ledger.Ledger(serving.capacity())
    plain = msgspec.structs.replace(frontend(kind=tables.FrontendKind.NODE_PORT), external_local=True)
    outside = msgspec.structs.replace(
        plain, external_local=False, outside=True, set=tables.BackendSet.LOCAL, drop=True
    )
    change = apply(maps, known, {WEB: [port(frontends=(plain, outside))]})
    rows = {tables.frontend_key(k).scope: tables.frontend(row) for k, row in maps.rows("frontends")}
    scope = tables.SCOPE_NODE_PORT
    assert rows[scope].flags == tables.FrontendFlag.EXTERNAL_LOCAL
    assert rows[scope | tables.SCOPE_OUTSIDE].flags == tables.FrontendFlag.DROP
    assert (rows[scope].slot_count, rows[scope | tables.SCOPE_OUTSIDE].slot_count) == (2, 0)
    removed = apply(maps, known, {WEB: []})
    for done, order in ((change, [2, 0]), (removed, [0, 2])):
        scopes = [w.key[-1] & tables.SCOPE_OUTSIDE for w in done.writes if w.table == "frontends"]
        assert scopes == order
    assert known.claims.places == 0


# --- DSR ---


def dsr(*hosts: int) -> plan.PortPlan:
    external = msgspec.structs.replace(frontend(kind=tables.FrontendKind.EXTERNAL_IP), dsr=True)
    return port(hosts=hosts, frontends=(external,))


@pytest.mark.parametrize("stays", [False, True])
def test_a_frontend_that_its_heir_gives_up_at_once_never_leads_there(stays: bool) -> None:
    """What the heir had before the change does not fit what it has now: `serving.Watched` looks."""
    known, watched = ledger.Ledger(serving.capacity()), serving.Watched(fake.FakeMaps(serving.SIZES))
    external = frontend(kind=tables.FrontendKind.EXTERNAL_IP)
    heir = dsr(1)
    first: serving.Plans = {DB: [port(DB, hosts=(2,), frontends=(external,))], WEB: [heir]}
    watched.apply(known.change(first, 0.0).writes, 0.0)
    assert {row.service for row in serving.view(watched.maps).values()} == {name_of(known, watched.maps, DB)}
    sets = int(CLUSTER | tables.BackendSet.HERE)
    here = msgspec.structs.replace(
        heir,
        backends=tuple(msgspec.structs.replace(one, sets=sets) for one in heir.backends),
        frontends=(external,) if stays else (),
    )
    writes = known.change({DB: [], WEB: [here]}, 0.0).writes
    watched.apply(writes, 0.0)
    assert len([write for write in writes if write.table is tables.Table.FRONTENDS]) == 1
    serving.assert_same(watched.maps, serving.of_plans({WEB: [here]}))


def name_of(known: ledger.Ledger, maps: fake.FakeMaps, service: model.ServiceName) -> bytes | None:
    return maps.row(tables.Table.SERVICES, tables.row_key(known.installed[key(service)].id))


def test_ends_of_tunnels_that_go_make_room_for_others() -> None:
    small = {"tunnel_ends": 2}
    maps, known = fake.FakeMaps(serving.sizes(**small)), ledger.Ledger(serving.capacity(**small))

    def here(*hosts: int) -> plan.PortPlan:
        sets = int(CLUSTER | tables.BackendSet.HERE)
        backends = tuple(msgspec.structs.replace(backend(host), sets=sets) for host in hosts)
        return msgspec.structs.replace(dsr(*hosts), backends=backends)

    for hosts in ((1, 2), (1,), (1, 3), (), (4, 5)):
        assert not apply(maps, known, {WEB: [here(*hosts)]}).refused
        serving.assert_counted(known, maps)
        assert known.end_rows == len(hosts)
    # Both that come have a row before both that go have none.
    assert {full.table for full in apply(maps, known, {WEB: [here(6, 7)]}).refused.values()} == {
        "tunnel_ends"
    }


def earlier(maps: fake.FakeMaps) -> list[bytes]:
    """The places that slots lead to of the one row of earlier_slots, if there is one."""
    rows = list(maps.rows(tables.Table.EARLIER_SLOTS))
    if not rows:
        return []
    [(packed, row)] = rows
    assert tables.earlier_key(packed).set == CLUSTER
    before = tables.earlier(row)
    drawn = tables.Frontend(0, before.block, before.slot_count, 0, 0, 0, 0)
    found = []
    for number in serving.slot_ids(maps, drawn):
        row = maps.row(tables.Table.BACKENDS, tables.row_key(number)) or b""
        found.append(tables.backend(row).addr)
    return found


def drawn(maps: fake.FakeMaps) -> list[bytes]:
    [served] = serving.view(maps).values()
    return [place for place, _ in served.slots]


def test_the_slots_before_the_last_change_stay() -> None:
    maps, known = fake.FakeMaps(serving.SIZES), ledger.Ledger(serving.capacity())
    watched, now_s = serving.Watched(maps), 0.0
    history: list[list[bytes]] = [[]]
    for hosts in ((1, 2), (1, 3), (2, 3), (4,), (2, 3)):
        watched.apply(known.change({WEB: [dsr(*hosts)]}, now_s).writes, now_s)
        if len(hosts) > 1:
            assert len(drawn(maps)) == maglev.SIZES[0]
        assert earlier(maps) == history[-1]
        history.append(drawn(maps))
        assert known.change({WEB: [dsr(*hosts)]}, now_s).writes == []
        assert known.earlier_rows == len(list(maps.rows("earlier_slots")))
        # What went three changes ago is free again.
        now_s += 2.0
        watched.apply(known.expire(now_s), now_s)
        assert known.extents.used <= 2 * 16


def test_slots_outlast_a_time_without_any_backend() -> None:
    maps, known = fake.FakeMaps(serving.SIZES), ledger.Ledger(serving.capacity())
    apply(maps, known, {WEB: [dsr(1, 2)]})
    before = drawn(maps)
    apply(maps, known, {WEB: [dsr()]})
    assert earlier(maps) == before
    apply(maps, known, {WEB: [dsr(1, 2, 3)]})
    assert earlier(maps) == before


@pytest.mark.parametrize("end", [[], [port(hosts=(2, 3))]], ids=["the service goes", "DSR ends"])
def test_earlier_slots_go_with_dsr(end: list[plan.PortPlan]) -> None:
    maps, known = fake.FakeMaps(serving.SIZES), ledger.Ledger(serving.capacity())
    for hosts in ((1, 2), (2, 3)):
        apply(maps, known, {WEB: [dsr(*hosts)]})
    assert earlier(maps)
    writes = apply(maps, known, {WEB: end}, now_s=5.0).writes
    assert not earlier(maps)
    order = [write.table for write in writes if write.table in ("frontends", "earlier_slots")]
    assert order[-1] == "earlier_slots"
    maps.apply(known.expire(6.0))
    assert (known.earlier_rows, known.extents.used) == (0, 1 if end else 0)


def test_what_was_drawn_at_random_is_not_kept() -> None:
    maps, known = fake.FakeMaps(serving.SIZES), ledger.Ledger(serving.capacity())
    apply(maps, known, {WEB: [port()]})
    apply(maps, known, {WEB: [dsr(1, 2, 3)]})
    assert not earlier(maps)


def test_without_room_for_earlier_slots_a_port_is_served_all_the_same() -> None:
    small = {"earlier_slots": 1}
    maps, known = fake.FakeMaps(serving.sizes(**small)), ledger.Ledger(serving.capacity(**small))
    other = msgspec.structs.replace(
        dsr(1, 2),
        key=key(DB),
        frontends=(msgspec.structs.replace(frontend(2, tables.FrontendKind.EXTERNAL_IP), dsr=True),),
    )
    more = msgspec.structs.replace(other, backends=tuple(map(backend, (7, 8, 9))))
    apply(maps, known, {WEB: [dsr(1, 2)], DB: [other]})
    assert not apply(maps, known, {WEB: [dsr(2, 3)], DB: [more]}).refused
    assert (known.earlier_rows, len(list(maps.rows("earlier_slots")))) == (1, 1)
    assert not apply(maps, known, {WEB: [dsr(1, 2)], DB: [other]}).refused
    maps.apply(known.expire(quarantine.RECYCLE_AFTER_S))
    assert known.extents.used == 3 * 16
