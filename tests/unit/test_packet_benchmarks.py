"""The benchmarks of the packet path: frames, copies of flows, figures and tables; `smoke` runs them."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import (
    bed,
    cluster,
    frames,
    packet_rows,
    packets,
    profiles,
    remarks,
    report,
    results,
    steps,
    talks,
    targets,
    test_runs,
)
from benchmarks import tables as tables_of
from lbproxy import abi
from lbproxy.core import decode, events, tables

PORTS = st.integers(0, 65535)


# --- frames ---


@given(st.sampled_from([4, 6]), st.sampled_from([frames.TCP, frames.UDP]), PORTS, PORTS)
def test_a_frame_says_who_it_is_from_and_has_a_right_checksum(
    family: int, proto: int, sport: int, dport: int
) -> None:
    side = bed.SIDES[family]
    ends = frames.Ends(side.client, sport, side.pod, dport)
    frame = frames.build(ends, proto, frames.SYN, bed.UPLINK_MAC, bed.OTHER_MAC)
    assert len(frame) == frames.LENGTH
    assert frames.read(frame) == ends
    assert frames.l4_checksum_is_right(frame, proto)
    assert not frames.l4_checksum_is_right(frame[:-1] + bytes([frame[-1] ^ 1]), proto)


@pytest.mark.parametrize("family", [4, 6])
def test_what_the_wrapper_changes_is_where_it_writes(family: int) -> None:
    side, ipv4 = bed.SIDES[family], family == 4
    frame = bytearray(
        frames.build(frames.Ends(side.client, 1, side.pod, 2), frames.TCP, 0, bed.UPLINK_MAC, bed.OTHER_MAC)
    )
    for source, address in ((True, side.client), (False, side.pod)):
        at = frames.word_at(ipv4, source)
        assert frame[at : at + 4] == address[-4:]
        assert at + 4 <= test_runs.HEAD
    assert frame[frames.port_at(ipv4, True) :][:4] == bytes([0, 1, 0, 2])


# --- copies of flows ---

SIDE = bed.SIDES[4]
TALK = talks.Talk(bed.FAR, frames.TCP, SIDE.client, SIDE.node, SIDE.remote, SIDE.node)


def flow_key(ends: frames.Ends, stage_: int) -> tables.FlowKey:
    return tables.FlowKey(
        ends.src, ends.dst, ends.sport.to_bytes(2, "big"), ends.dport.to_bytes(2, "big"), 6, stage_
    )


def flow_row(ends: frames.Ends, stage_: int, backend: int = 0) -> tables.Flow:
    key = flow_key(ends, 0)
    addr = key.src if stage_ else key.dst
    return tables.Flow(addr, key.sport, key.dport, backend, 1, b"\7\0\0", 2)


def test_a_rows_copies_are_those_of_the_other_flows() -> None:
    first = TALK.inside(0)
    beyond = frames.Ends(SIDE.node, 5555, first.dst, first.dport)
    opened = {
        flow_key(TALK.asked(0), 0): flow_row(first, 0, backend=1),
        flow_key(first, 1): flow_row(beyond, 1),
        flow_key(beyond.turned(), 0): flow_row(first.turned(), 0),
        flow_key(first.turned(), 1): flow_row(TALK.asked(0).turned(), 1),
    }
    at = bed.Bed(0, 0)
    at.backends = {(bed.later(SIDE.remote, number), 8080, 6, 7): number + 1 for number in range(2)}
    count = test_runs.PORTS + 2
    made = talks.copies(opened, first, (beyond.src, beyond.sport), at, TALK, count)
    for number in (0, 1, count - 1):
        pairs = {}
        for one in made:
            key = one.keys[number * talks.KEY_SIZE :][: talks.KEY_SIZE]
            size = len(one.rows) // count
            pairs[tables.flow_key(key)] = tables.flow(bytes(one.rows[number * size :][:size]))
        asked, inside, seen = TALK.asked(number), TALK.inside(number), TALK.beyond(number)
        assert pairs == {
            flow_key(asked, 0): flow_row(inside, 0, backend=1 + number // test_runs.PORTS),
            flow_key(inside, 1): flow_row(seen, 1),
            flow_key(seen.turned(), 0): flow_row(inside.turned(), 0),
            flow_key(inside.turned(), 1): flow_row(asked.turned(), 1),
        }
    talks.set_seen(made[0].rows, 99)
    assert tables.flow(bytes(made[0].rows[: abi.LAYOUTS["flow"].size])).seen == 99


def test_no_two_flows_of_a_talk_look_alike_anywhere() -> None:
    numbers = range(0, packets.FLOWS, 97)
    for of in (TALK.asked, TALK.inside, TALK.beyond):
        assert len({of(number) for number in numbers}) == len(numbers)
    last = TALK.beyond(packets.FLOWS - 1)
    assert last.sport < bed.PORTS.first + bed.PORTS.size
    assert last.dst == bed.later(SIDE.remote, bed.FAR.endpoints - 1)


# --- NodePorts ---


def test_node_port_services_are_decoded_without_a_warning() -> None:
    here, elsewhere = cluster.Place(("10.244.1.3",), ("n1",)), cluster.Place(("10.244.2.2",), ("n2",))
    decoders = {"Service": decode.service, "EndpointSlice": decode.endpoint_slice}
    listed = list(cluster.node_port_objects(here, elsewhere, elsewhere, 8080))
    for each in listed:
        event = decoders[each["kind"]](msgspec.json.encode(each))
        assert isinstance(event, events.Upsert)
        assert event.value is not None
        assert event.warnings == ()
    of_remote = [each for each in listed if each["kind"] == "EndpointSlice"][-1]
    assert of_remote["endpoints"][0]["nodeName"] == "n2"


# --- tables ---


@pytest.fixture
def found() -> results.Results:
    made = results.Results(
        "quick", "2025-01-01T10:00:00+00:00",
        {"cpu": "A CPU", "cpus": "2", "memory": "4 GB", "virtual": "yes", "kernel": "6.1"},
        {"commit": "0123456789abcdef", "dirty": "false", "python": "3.11"}, {}, complete=True,
    )  # fmt: skip
    made.packets = [
        results.Packets("tc_from_outside", packets.HERE, 4, "TCP", 1, [40.0, 41.0, 42.0]),
        results.Packets("tc_from_outside", packets.HERE, 6, "TCP", 1, [50.0, 55.0, 60.0]),
        results.Packets("tc_from_outside", packets.HERE, 4, "TCP", packets.FLOWS, [200.0, 210.0]),
        results.Packets("tc_from_outside", packets.STALE, 4, "TCP", packets.FLOWS, [900.0]),
        results.Packets("tc", packets.NOTHING, 4, "TCP", 1, [10.0]),
        results.Packets("tc", packets.NOTHING, 4, "TCP", 1, [12.0]),
        results.Packets("tc_from_outside", "new, masqueraded", 4, "TCP", 0, [1000.0]),
    ]
    filled = {"0": [results.Filled(900, 0)], "0.9": [results.Filled(2000, 0.25)]}
    made.ports = [results.Ports(4, 28976, 19000, filled)]
    return made


def test_single_packets_have_a_line_a_kind_and_the_worst_protocol_decides(found: results.Results) -> None:
    lines = packet_rows.lines(found)
    assert lines[0].what == packets.NOTHING
    assert lines[0].found[4, "TCP"].median == 11
    by_key = {(line.what, line.flows): line for line in lines}
    one, many = by_key[packets.HERE, 1], by_key[packets.HERE, packets.FLOWS]
    assert (one.target, one.worst) == (targets.PACKET, 55)
    assert (many.target, many.worst) == (targets.PACKET_OF_MANY, 205)
    assert by_key[packets.STALE, packets.FLOWS].target is None
    assert by_key["new, masqueraded", 0].target is None
    table = tables_of.markdown(packet_rows.table(lines))
    assert "| `tc_from_outside` | established, to a pod here | 1 | ≤ 45 ns | **41** (40 – 42) |" in table
    assert "missed by 10 ns" in table
    assert "| tc | returns at once |" in table


def test_ports_are_in_the_report(found: results.Results) -> None:
    page = report.page(found)
    assert "refused when 19,000 were open" in page
    assert "| 90% | **2,000** (2,000 – 2,000) | 25.0% |" in page


def test_a_machine_too_busy_for_single_packets_is_told(found: results.Results) -> None:
    found.others_during_packets = [0.01, 0.09]
    assert not [each for each in remarks.remarks(found) if "Too busy" in each.text]
    found.others_during_packets = [0.01, 0.4]
    [said] = [each for each in remarks.remarks(found) if "Too busy" in each.text]
    assert said.warning
    assert "up to 40% of the CPUs" in said.text


def test_every_profile_measures_packets_of_both_families(found: results.Results) -> None:
    for profile in profiles.PROFILES.values():
        labels = [step.label for step in steps.of_packets(profile, 0, found, contextlib.ExitStack())]
        assert len([label for label in labels if "IPv" in label]) == 4
