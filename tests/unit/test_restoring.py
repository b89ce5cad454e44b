import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from lbproxy.core import installed, ledger, model, quarantine, restoring, tables
from lbproxy.kernel import fake
from tests import serving, strategies
from tests.unit import test_ledger

WEB, DB = test_ledger.WEB, test_ledger.DB


def restore(maps: fake.FakeMaps, now_s: float = 0.0) -> ledger.Ledger:
    return restoring.restore(serving.capacity(), maps.dump(), now_s)


def in_use(maps: fake.FakeMaps) -> dict[tuple[bytes, bytes, bytes], int]:
    """Ids of the backends that a frontend leads to, by service and place."""
    found = {}
    for _, packed in maps.rows(tables.Table.FRONTENDS):
        row = tables.frontend(packed)
        names = maps.row(tables.Table.SERVICES, tables.row_key(row.service)) or b""
        for number in serving.slot_ids(maps, row):
            to = tables.backend(maps.row(tables.Table.BACKENDS, tables.row_key(number)) or b"")
            found[installed.traits(names) and names[:192], to.addr, to.port] = number
    return found


def unneeded(writes: list[tables.Write]) -> list[tables.Write]:
    """All but what a ledger does once after restoring: what contested frontends need, unused localities."""
    once = (tables.Table.SLOTS, tables.Table.TUNNEL_ENDS, tables.Table.LOCALITIES)
    return [write for write in writes if write.table not in once]


@given(strategies.steps(), st.integers(0, 10_000), st.booleans())
@settings(deadline=None)
def test_an_agent_killed_after_any_write_is_succeeded_without_a_gap(
    steps: list[strategies.Step], killed_at: int, lists_come_late: bool
) -> None:
    known, now_s = ledger.Ledger(serving.capacity()), 0.0
    kernel = serving.Watched(fake.FakeMaps(serving.SIZES))
    serving.begin_absence(known, kernel.maps)
    timed: list[tuple[tables.Write, float]] = []
    latest: serving.Plans = {}
    for step in steps:
        now_s += step.pause_s
        timed += [(write, now_s) for write in known.expire(now_s)]
        timed += [(write, now_s) for write in known.change(step.plans, now_s).writes]
        latest |= step.plans
    for write, written_s in timed[: killed_at % (len(timed) + 1)]:
        kernel.apply([write], written_s)

    # Starting takes an agent longer than any program runs.
    kernel.forget_programs()
    now_s += 10.0
    successor = restore(kernel.maps, now_s)
    before, ids = serving.view(kernel.maps), in_use(kernel.maps)
    serving.begin_absence(successor, kernel.maps)
    serving.assert_all_absence_said(kernel.maps)
    writes = len(kernel.maps.log)
    if lists_come_late:
        now_s += 5.0
        kernel.apply(successor.expire(now_s), now_s)
    assert serving.view(kernel.maps) == before
    untouched = (tables.Table.FRONTENDS, tables.Table.SERVICES, tables.Table.SLOTS)
    assert not [write for write in kernel.maps.log[writes:] if write.table in untouched]

    wanted: serving.Plans = {name: [] for name in successor.services()} | latest
    change = successor.change(wanted, now_s)
    assert not change.refused
    kernel.apply(change.writes, now_s)
    serving.assert_same(kernel.maps, serving.of_plans(latest))
    serving.assert_counted(successor, kernel.maps)
    serving.assert_all_absence_said(kernel.maps)
    assert successor.change(latest, now_s).writes == []
    after = in_use(kernel.maps)
    assert {place: after[place] for place in ids.keys() & after.keys()} == {
        place: ids[place] for place in ids.keys() & after.keys()
    }

    kernel.apply(successor.expire(now_s + 1.0), now_s + 1.0)
    used = {tables.backend(row).service for _, row in kernel.maps.rows(tables.Table.BACKENDS)}
    assert used <= {held.id for held in successor.installed.values()}
    assert unneeded(restore(kernel.maps).change(latest, now_s).writes) == []


@given(strategies.steps(longest=4))
@settings(max_examples=50, deadline=None)
def test_what_is_restored_is_what_was_known(steps: list[strategies.Step]) -> None:
    known, maps = ledger.Ledger(serving.capacity()), fake.FakeMaps(serving.SIZES)
    latest: serving.Plans = {}
    for step in steps:
        maps.apply(known.change(step.plans, 0.0).writes)
        latest |= step.plans
    restored = restore(maps)
    assert restored.services() == known.services()
    assert {key: held.id for key, held in restored.installed.items()} == {
        key: held.id for key, held in known.installed.items()
    }
    assert restored.service_ids.used == len(known.installed)
    assert (restored.range_rows, restored.earlier_rows) == (known.range_rows, known.earlier_rows)
    assert {key: set(held.ranges) for key, held in restored.installed.items()} == {
        key: set(held.ranges) for key, held in known.installed.items()
    }
    assert {key: held.earlier for key, held in restored.installed.items()} == {
        key: held.earlier for key, held in known.installed.items()
    }
    # Contested frontends are claimed again with the first change, which has nothing else to do.
    writes = restored.change(latest, 0.0).writes
    assert unneeded(writes) == []
    maps.apply(writes)
    serving.assert_counted(restored, maps)
    assert restored.claims.contested == known.claims.contested


# --- what belongs to nobody ---


def filled(plans: serving.Plans) -> fake.FakeMaps:
    maps = fake.FakeMaps(serving.SIZES)
    maps.apply(ledger.Ledger(serving.capacity()).change(plans, 0.0).writes)
    return maps


def settle(maps: fake.FakeMaps, plans: serving.Plans) -> None:
    """Restore, bring to the plans, and let everything expire."""
    known = restore(maps)
    kernel = serving.Watched(maps)
    for now_s in (0.0, 2.0):
        gone: serving.Plans = {name: [] for name in known.services()}
        kernel.apply(known.change(gone | plans, now_s).writes, now_s)
        kernel.apply(known.expire(now_s), now_s)
    serving.assert_same(maps, serving.of_plans(plans))


def test_a_locality_that_nobody_is_in_goes_and_its_id_is_given_out_again() -> None:
    maps = filled({WEB: [test_ledger.port()], DB: []})
    settle(maps, {WEB: []})
    assert len(list(maps.rows(tables.Table.LOCALITIES))) == 1

    # The first change of the next agent both removes that row and needs an id.
    settle(maps, {WEB: [test_ledger.port()]})
    [(_, row)] = maps.rows(tables.Table.LOCALITIES)
    assert tables.text(tables.locality(row).node) == "node-a"


def test_a_new_node_has_its_name_after_a_restart() -> None:
    maps = filled({WEB: [test_ledger.port()]})
    maps.apply([tables.Put(tables.Table.LOCALITIES, tables.row_key(2), tables.Locality(b"old", b"z").pack())])
    port = test_ledger.port()
    moved = tuple(msgspec.structs.replace(backend, node_name="node-new") for backend in port.backends)
    settle(maps, {WEB: [msgspec.structs.replace(port, backends=moved)]})
    names = {tables.text(tables.locality(row).node) for _, row in maps.rows(tables.Table.LOCALITIES)}
    assert "node-new" in names
    assert "old" not in names


def test_an_end_whose_backend_an_earlier_version_did_not_note_has_it_with_the_first_change() -> None:
    port = test_ledger.dsr(1, 2)
    sets = int(tables.BackendSet.CLUSTER | tables.BackendSet.HERE)
    here = tuple(msgspec.structs.replace(backend, sets=sets) for backend in port.backends)
    plans: serving.Plans = {WEB: [msgspec.structs.replace(port, backends=here)]}
    maps = filled(plans)
    ends = dict(maps.rows(tables.Table.TUNNEL_ENDS))
    assert len(ends) == 2
    maps.apply([tables.Put(tables.Table.TUNNEL_ENDS, key, bytes(4)) for key in ends])
    settle(maps, plans)
    assert dict(maps.rows(tables.Table.TUNNEL_ENDS)) == ends


def spoil_name(maps: fake.FakeMaps, service: int) -> None:
    row = tables.service_meta(maps.row(tables.Table.SERVICES, tables.row_key(service)) or b"")
    spoilt = row._replace(family=99).pack()
    maps.apply([tables.Put(tables.Table.SERVICES, tables.row_key(service), spoilt)])


def test_a_service_whose_name_can_not_be_read_serves_until_it_is_replaced() -> None:
    plans: serving.Plans = {WEB: [test_ledger.port()]}
    maps = filled(plans)
    spoil_name(maps, 1)
    known = restore(maps)
    assert not known.services()
    kernel = serving.Watched(maps)
    kernel.apply(known.expire(100.0), 100.0)
    [served] = serving.view(maps).values()
    assert len(served.slots) == 2
    other: serving.Plans = {DB: [test_ledger.port(DB, (7, 8, 9), (test_ledger.frontend(2),))]}
    kernel.apply(known.change(plans | other, 100.0).writes, 100.0)
    serving.assert_same(maps, serving.of_plans(plans | other))
    kernel.apply(known.expire(101.0), 101.0)
    serving.assert_same(maps, serving.of_plans(plans | other))
    assert len(list(maps.rows(tables.Table.SERVICES))) == 2


def test_frontends_and_backends_of_nobody_go_with_the_first_change() -> None:
    maps = filled({WEB: [test_ledger.port()]})
    maps.apply([tables.Delete(tables.Table.SERVICES, tables.row_key(1))])
    known, now_s = restore(maps), 0.0
    maps.apply(known.expire(50.0))
    [served] = serving.view(maps).values()
    assert len(served.slots) == 2
    maps.apply(known.change({}, 50.0).writes)
    assert not serving.view(maps)
    maps.apply(known.expire(now_s + 51.0))
    assert not list(maps.rows(tables.Table.BACKENDS))
    assert (known.service_ids.used, known.backend_ids.used, known.extents.used) == (0, 0, 0)


def test_of_two_services_with_one_name_the_one_with_frontends_stays() -> None:
    plans: serving.Plans = {WEB: [test_ledger.port()]}
    maps = filled(plans)
    row = maps.row(tables.Table.SERVICES, tables.row_key(1)) or b""
    maps.apply([tables.Put(tables.Table.SERVICES, tables.row_key(number), row) for number in (2, 3)])
    known = restore(maps)
    assert [held.id for held in known.installed.values()] == [1]
    other: serving.Plans = {DB: [test_ledger.port(DB, (7,), (test_ledger.frontend(2),))]}
    settle(maps, plans | other)


def test_two_tables_of_one_set_are_settled_into_one() -> None:
    """An agent that is killed half way through its frontends leaves some on the old table."""
    both = (test_ledger.frontend(1), test_ledger.frontend(2))
    known = ledger.Ledger(serving.capacity())
    maps = fake.FakeMaps(serving.SIZES)
    maps.apply(known.change({WEB: [test_ledger.port(frontends=both)]}, 0.0).writes)
    plans: serving.Plans = {WEB: [test_ledger.port(hosts=(1, 2, 3), frontends=both)]}
    writes = known.change(plans, 0.0).writes
    first = next(n for n, write in enumerate(writes) if write.table is tables.Table.FRONTENDS)
    maps.apply(writes[: first + 1])
    restored = restore(maps)
    [held] = restored.installed.values()
    assert [table.slot_count for table in held.tables] in ([2, 3], [3, 2])
    settle(maps, plans)


def test_the_id_of_a_draining_backend_is_not_given_out_before_its_row_is_cleared() -> None:
    small = {"backends": 4}
    maps, known = fake.FakeMaps(serving.sizes(**small)), ledger.Ledger(serving.capacity(**small))
    for hosts in ((1, 2), (2,)):
        maps.apply(known.change({WEB: [test_ledger.port(hosts=hosts)]}, 0.0).writes)
    restored = restoring.restore(serving.capacity(**small), maps.dump(), 0.0)
    grown: serving.Plans = {WEB: [test_ledger.port(hosts=(2, 3, 4))]}
    assert restored.change(grown, 0.0).refused
    maps.apply(restored.expire(quarantine.RECYCLE_AFTER_S))
    assert not test_ledger.apply(maps, restored, grown, 1.0).refused
    serving.assert_same(maps, serving.of_plans(grown))


def test_an_empty_kernel_is_an_empty_ledger() -> None:
    known = restore(fake.FakeMaps(serving.SIZES))
    assert not known.services()
    assert known.next_due_s is None
    assert known.change({}, 0.0).writes == []


def test_ranges_and_earlier_slots_of_nobody_go_before_their_service_id_is_given_out_again() -> None:
    maps = fake.FakeMaps(serving.SIZES)
    stale = model.SourceRange(bytes(16), 32)
    maps.apply(
        [
            tables.Put(tables.Table.SOURCE_RANGES, installed.range_key(1, stale), tables.ALLOWED),
            tables.Put(
                tables.Table.EARLIER_SLOTS, tables.EarlierKey(1, 1).pack(), tables.Earlier(5, 17).pack()
            ),
        ]
    )
    known = restore(maps)
    assert (known.range_rows, known.earlier_rows, known.extents.used) == (0, 0, 0)
    writes = known.change({WEB: [test_ledger.ranged("192.0.2.0/24")]}, 0.0).writes
    gone = [at for at, write in enumerate(writes) if isinstance(write, tables.Delete)]
    assert max(gone) < next(
        at for at, write in enumerate(writes) if write.table == "source_ranges" and at not in gone
    )
    maps.apply(writes)
    assert serving.source_ranges(maps) == {(1, 120, test_ledger.ranged("192.0.2.0/24").source_ranges[0].base)}
    assert not list(maps.rows(tables.Table.EARLIER_SLOTS))


def test_earlier_slots_are_kept_over_a_restart_and_replaced_after_it() -> None:
    known, maps = ledger.Ledger(serving.capacity()), fake.FakeMaps(serving.SIZES)
    for hosts in ((1, 2), (1, 3)):
        maps.apply(known.change({WEB: [test_ledger.dsr(*hosts)]}, 0.0).writes)
    known.expire(quarantine.RECYCLE_AFTER_S)
    before, drawn = test_ledger.earlier(maps), test_ledger.drawn(maps)
    restored = restore(maps)
    assert restored.extents.used == known.extents.used == 2 * 16
    assert restored.change({WEB: [test_ledger.dsr(1, 3)]}, 0.0).writes == []
    assert test_ledger.earlier(maps) == before
    maps.apply(restored.change({WEB: [test_ledger.dsr(2, 3)]}, 0.0).writes)
    assert test_ledger.earlier(maps) == drawn
