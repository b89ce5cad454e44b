import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.core import decode, events, ledger, model, plan, ramp, reconcile, tables
from lbproxy.core import weights as weighing
from tests import serving

WEB = model.ServiceName("default", "web")
KEY = model.PortKey(WEB, "", model.Protocol.TCP, model.Family.IPV4)
ACTIVE, UNREADY = tables.BackendState.ACTIVE, tables.BackendState.UNREADY
SLOW_S = 30.0


def backend(
    host: int, weight: int = 1, state: tables.BackendState = ACTIVE, ill: int = 0
) -> plan.BackendPlan:
    return plan.BackendPlan(bytes(15) + bytes([host]), 80, state, int(state is ACTIVE), "", "", weight, ill)


def port(*backends: plan.BackendPlan, dsr: bool = False) -> plan.PortPlan:
    kind, bit = tables.FrontendKind.NODE_PORT, tables.BackendSet.CLUSTER
    frontend = plan.FrontendPlan(bytes(16), 80, model.Protocol.TCP, kind, bit, False, dsr=dsr)
    return plan.PortPlan(KEY, (frontend,), backends, model.Algorithm.RANDOM, 0, False, False)


def weights(
    ramps: ramp.Ramps, now_s: float, *backends: plan.BackendPlan, slow_s: float = SLOW_S
) -> list[int]:
    (planned,) = ramps.apply(WEB, slow_s, [port(*backends)], now_s)
    return [one.weight for one in planned.backends]


def test_a_new_backend_grows_in_ten_steps() -> None:
    ramps = ramp.Ramps()
    old = [backend(1), backend(2, weight=4)]
    assert weights(ramps, 99.0, *old) == [1, 4]
    assert ramps.due(1e9) == []
    seen = [weights(ramps, 100.0, *old, backend(3, weight=2))]
    last = 100.0
    while (due := ramps.next_due_s) is not None:
        assert ramps.due(due - 0.001) == []
        assert ramps.due(due) == [WEB]
        seen.append(weights(ramps, due, *old, backend(3, weight=2)))
        assert ramps.next_due_s is None or ramps.next_due_s > due
        last = due
    assert seen == [[10, 40, 2 * level] for level in range(1, 11)] + [[1, 4, 2]]
    assert 90.0 + SLOW_S <= last <= 100.0 + SLOW_S + 3.0
    assert weights(ramps, last + 1, *old, backend(3)) == [1, 4, 1]


def test_nobody_starts_slowly_where_all_are_new_or_the_agent_is() -> None:
    ramps = ramp.Ramps()
    assert weights(ramps, 0.0, backend(1)) == [1]
    assert weights(ramps, 1.0, backend(2), backend(3)) == [1, 1]
    # From nothing usable at all.
    assert weights(ramps, 2.0, backend(2, state=UNREADY)) == [1]
    assert weights(ramps, 3.0, backend(2), backend(4)) == [1, 1]
    assert ramps.next_due_s is None


@pytest.mark.parametrize("away", [backend(2, state=UNREADY), backend(2, ill=1)])
def test_who_comes_back_starts_slowly_again(away: plan.BackendPlan) -> None:
    ramps = ramp.Ramps()
    assert weights(ramps, 0.0, backend(1), backend(2)) == [1, 1]
    assert weights(ramps, 1.0, backend(1), away) == [1, 1]
    assert weights(ramps, 3.0, backend(1), backend(2)) == [10, 1]


def test_without_the_annotation_all_is_given_at_once() -> None:
    ramps = ramp.Ramps()
    weights(ramps, 0.0, backend(1))
    assert weights(ramps, 3.0, backend(1), backend(2)) == [10, 1]
    assert weights(ramps, 4.0, backend(1), backend(2), slow_s=0.0) == [1, 1]
    assert ramps.next_due_s is None
    # Switched on again: who is there is known.
    assert weights(ramps, 5.0, backend(1), backend(2)) == [1, 1]
    weights(ramps, 6.0, backend(1), backend(2), backend(3))
    assert ramps.apply(WEB, SLOW_S, [], 7.0) == []
    assert ramps.next_due_s is None


def test_tables_that_nodes_have_to_agree_on_are_left_alone() -> None:
    ramps = ramp.Ramps()
    ramps.apply(WEB, SLOW_S, [port(backend(1), dsr=True)], 0.0)
    wanted = port(backend(1), backend(2), dsr=True)
    assert ramps.apply(WEB, SLOW_S, [wanted], 1.0) == [wanted]


@given(
    st.floats(0, 1e6),
    st.lists(st.tuples(st.floats(0, 40), st.sets(st.integers(1, 6))), min_size=1, max_size=12),
)
def test_however_many_come_tables_are_written_as_often_as_there_are_steps(
    start_s: float, comings: list[tuple[float, set[int]]]
) -> None:
    ramps, now_s, steps = ramp.Ramps(), start_s, 0
    weights(ramps, now_s, backend(9))
    for after_s, hosts in comings:
        until_s = now_s + after_s
        everyone = [backend(9), *map(backend, sorted(hosts))]
        found = weights(ramps, now_s, *everyone)
        assert found[0] in (1, ramp.STEPS)
        assert all(0 < weight <= found[0] for weight in found)
        while (due_s := ramps.next_due_s) is not None and due_s <= until_s:
            steps += 1
            later = weights(ramps, due_s, *everyone)
            assert [a * found[0] <= b * later[0] * found[0] for a, b in zip(found, later, strict=True)]
            shares = [(a / found[0], b / later[0]) for a, b in zip(found, later, strict=True)]
            assert all(before <= after for before, after in shares)
            found = later
        now_s = until_s
    assert steps <= (now_s - start_s) / (SLOW_S / ramp.STEPS) + 1


@pytest.mark.parametrize(("text", "seconds"), [("1s", 1), (" 30s ", 30), ("2m", 120), ("1h", 3600)])
def test_durations(text: str, seconds: float) -> None:
    assert ramp.parse_s(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "30", "1.5s", "-1s", "2h", "3601s", "9999h", "1m30s", "٣s"])
def test_what_is_no_duration_is_one_warning(text: str) -> None:
    upsert = decode.service(
        {
            "metadata": {"name": "web", "annotations": {"lbproxy.io/slow-start": text}},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]},
        }
    )
    assert isinstance(upsert.value, model.Service)
    assert upsert.value.slow_start_s == 0
    assert upsert.warnings == (
        f"metadata.annotations[lbproxy.io/slow-start]: {text!a} is no duration from 1s to 1h: passed over",
    )


def slice_(*hosts: int) -> events.Upsert:
    return decode.endpoint_slice(
        {
            "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "ports": [{"name": "", "port": 80}],
            "endpoints": [{"addresses": [f"10.244.0.{host}"]} for host in hosts],
        }
    )


def test_passes_take_the_steps() -> None:
    reconciler = reconcile.Reconciler(
        "node-a", plan.Defaults(model.Algorithm.RANDOM), ledger.Ledger(serving.capacity())
    )
    service = decode.service(
        {
            "metadata": {"name": "web", "annotations": {"lbproxy.io/slow-start": "30s"}},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]},
        }
    )
    synced = [
        events.Synced(kind) for kind in (events.Kind.SERVICE, events.Kind.ENDPOINT_SLICE, events.Kind.NODE)
    ]
    reconciler.take(service)
    reconciler.take(slice_(1, 2))
    for event in synced:
        reconciler.take(event)

    def passed(now_s: float) -> list[int]:
        reconciler.step_ramps(now_s)
        done = reconciler.next_pass(now_s)
        rows = [write for write in done.writes if write.table is tables.Table.BACKENDS]
        return sorted(tables.backend(write.value).weight for write in rows if isinstance(write, tables.Put))

    assert passed(0.0) == [1, 1]
    reconciler.take(slice_(1, 2, 3))
    assert passed(3.0) == [1, 10, 10]
    assert reconciler.pending is False
    assert passed(5.9) == []
    for number, level in itertools.zip_longest(range(2, 11), range(2, 10)):
        # One row a step, and in the end all of them.
        assert passed(3.0 * number) == ([level] if level else [10])
    assert passed(33.0) == [1, 1, 1]
    assert reconciler.ramps.next_due_s is None
    # A write that failed has everything planned again, and nobody starts anew.
    reconciler.start_over(ledger.Ledger(serving.capacity()))
    assert passed(34.0) == [1, 1, 1]


def test_a_ramp_scales_what_weights_there_are() -> None:
    planned = port(backend(1, 7), backend(2, 0, UNREADY))
    assert msgspec.structs.replace(planned) == planned
    ramps = ramp.Ramps()
    ramps.apply(WEB, SLOW_S, [planned], 0.0)
    (later,) = ramps.apply(WEB, SLOW_S, [port(backend(1, 7), backend(2, 3))], 0.0)
    assert [one.weight for one in later.backends] == [70, 3]


@given(st.lists(st.integers(1, weighing.LARGEST_PRODUCT), min_size=1, max_size=8), st.floats(0, SLOW_S))
def test_whatever_weights_there_are_fit_into_rows(old: list[int], later_s: float) -> None:
    """Those of a zone that spills over are as large as they get before any ramp."""
    ramps = ramp.Ramps()
    known = [backend(host, weight) for host, weight in enumerate(old)]
    weights(ramps, 0.0, *known)
    weights(ramps, 1.0, *known, backend(99, 1))
    (planned,) = ramps.apply(WEB, SLOW_S, [port(*known, backend(99, 1))], 1.0 + later_s)
    assert all(0 < one.weight <= weighing.LARGEST_PRODUCT for one in planned.backends)
    cluster = max(planned.backends, key=lambda one: one.weight)
    assert cluster.weight >= max(old) * 0.9
