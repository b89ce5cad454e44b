"""The benchmarks' statistics, objects and files; `python -m benchmarks.run smoke` shows that they run."""

import argparse
import collections
import dataclasses
import io
import itertools
import os
import pathlib
import random
import sys
import time
import unittest.mock

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import (
    agents,
    api,
    arena,
    cluster,
    contestants,
    fields,
    kube_proxies,
    machine,
    node_ports,
    process,
    profiles,
    progress,
    ratios,
    results,
    rounds,
    stats,
    steps,
)
from benchmarks import run as bench_run
from benchmarks import run as run_program
from benchmarks.kubeproxy import model as kubeproxy
from lbproxy.core import decode, events, model
from lbproxy.lab import traffic

FLOATS = st.floats(-1e6, 1e6)
SITE = arena.Site("n1", 1)
MEASURED = SITE.place_of(SITE.servers[0])
NAMES = ("lbproxy", "iptables", "nftables")


# --- statistics ---


def test_a_summary_is_the_median_with_its_quartiles() -> None:
    seen = stats.summary([5, 1, 4, 2, 3])
    assert seen == stats.Summary(count=5, median=3, low=2, high=4)
    assert seen.spread == 2


@pytest.mark.parametrize("count", [8, 12, 16, 32])
def test_a_median_is_within_its_margin_about_19_times_out_of_20(count: int) -> None:
    draw = random.Random(count)
    samples = [stats.summary([draw.gauss(0, 1) for _ in range(count)]) for _ in range(2000)]
    within = sum(abs(seen.median) <= seen.margin for seen in samples) / len(samples)
    assert within == pytest.approx(0.95, abs=0.035)


def test_percentiles_lie_between_neighbours_in_proportion() -> None:
    assert stats.percentile([10, 20], 0.25) == 12.5
    assert stats.percentile([7], 0.99) == 7
    assert stats.percentile(range(101), 0.99) == 99
    with pytest.raises(ValueError, match="empty"):
        stats.percentile([], 0.5)


@given(st.lists(FLOATS, min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_percentiles_grow_with_the_share_and_stay_within_the_sample(
    values: list[float], one: float, other: float
) -> None:
    low, high = sorted((one, other))
    smaller, greater = stats.percentile(values, low), stats.percentile(values, high)
    assert min(values) <= smaller <= max(values)
    assert smaller <= greater or smaller == pytest.approx(greater)


# --- order of runs ---

VARIANTS = rounds.variants(NAMES)


@pytest.mark.parametrize("listed", [VARIANTS, node_ports.variants(list(NAMES))])
def test_every_variant_stands_equally_often_at_every_place_of_a_round(listed: tuple[str, ...]) -> None:
    cycle = [rounds.order(listed, number) for number in range(2 * len(listed))]
    for place in range(len(listed)):
        assert set(collections.Counter(order[place] for order in cycle).values()) == {2}
    assert all(sorted(order) == sorted(listed) for order in cycle)


def test_no_variant_follows_one_other_more_often_than_it_precedes_it() -> None:
    cycle = [rounds.order(VARIANTS, number) for number in range(2 * len(VARIANTS))]
    follows = collections.Counter(pair for order in cycle for pair in itertools.pairwise(order))
    assert all(follows[before, after] == follows[after, before] for before, after in follows)


def test_bare_is_measured_twice_and_everybody_directly_and_through_a_service() -> None:
    assert VARIANTS == (
        "bare", "lbproxy/service", "lbproxy/direct", "iptables/service",
        "bare/again", "iptables/direct", "nftables/service", "nftables/direct",
    )  # fmt: skip
    assert set(rounds.variants(["lbproxy"], services=False)) == {"bare", "lbproxy/direct", "bare/again"}
    assert [one for one in node_ports.variants(list(NAMES)) if "dsr" in one] == ["lbproxy/dsr"]


@pytest.mark.parametrize(
    "listed", [VARIANTS, node_ports.variants(list(NAMES)), rounds.variants(NAMES, services=False)]
)
def test_the_two_bare_ones_are_half_a_round_apart(listed: tuple[str, ...]) -> None:
    apart = listed.index("bare/again") - listed.index("bare")
    assert abs(apart - len(listed) / 2) < 1


def test_a_run_counts_the_cpu_time_of_client_and_server() -> None:
    of_client, of_server = traffic.CpuTime(user=0.1, system=0.3), traffic.CpuTime(user=0.2, system=0.4)
    latency = traffic.Latency(50.0, 60.0, 90.0, 95.0, 99.0)
    seen = traffic.Result(1.0, 1000, 0, 1000.0, 0, {"p2": 1000}, {}, latency, 0, 0.0, of_client)
    made = rounds.run_of(seen, traffic.Served(1000, 1000, 0, 0, of_server))
    assert made.cpu_us == pytest.approx(1000)
    assert made.own_share == pytest.approx(0.3)


# --- ratios ---


def run(rate: float, failed: int = 0) -> results.Run:
    return results.Run(
        rate, 50.0, 90.0, 1e6 / rate, 0.1, int(rate), failed, {"ECONNREFUSED": failed} if failed else {}
    )


SHOWN = ("bare", "bare/again", "lbproxy/direct", "lbproxy/service")


def made_of(*rates: tuple[float, ...], names: tuple[str, ...] = SHOWN) -> list[results.Round]:
    return [results.Round(dict(zip(names, map(run, each), strict=True))) for each in rates]


def test_ratios_are_of_rates_within_a_round() -> None:
    made = made_of((90, 110, 99, 95), (200, 200, 100, 50))
    assert ratios.ratios(made, "lbproxy/service") == [0.95, 0.25]
    assert ratios.ratios(made, "lbproxy/direct") == [0.99, 0.5]
    assert ratios.ratios(made, "bare/again") == [pytest.approx(110 / 90), 1.0]


def test_half_the_cpu_time_for_a_request_is_twice_the_speed() -> None:
    made = made_of((100, 100, 50, 200))
    assert ratios.thrift(made, "lbproxy/service") == [pytest.approx(2)]
    assert ratios.thrift(made, "lbproxy/direct") == [pytest.approx(0.5)]


def test_what_is_dialled_on_another_node_is_compared_with_its_server_there() -> None:
    names = ("bare", "bare/again", "bare/elsewhere", "lbproxy/remote", "iptables/masqueraded")
    made = made_of((100.0, 60.0, 50.0, 40.0, 20.0), names=names)
    assert ratios.ratios(made, "lbproxy/remote") == [0.8]
    assert ratios.thrift(made, "lbproxy/remote") == [pytest.approx(0.8)]
    assert ratios.ratios(made, "iptables/masqueraded") == [0.25]
    assert ratios.against(made, "lbproxy/remote", "iptables/masqueraded") == [2]


# --- objects ---


def built(services: int) -> list[cluster.Object]:
    return list(cluster.objects(services, "n1", "172.18.0.1", MEASURED, 8080))


@pytest.mark.parametrize("services", [1, 2, 1000])
def test_a_cluster_has_a_node_and_as_many_services_as_slices(services: int) -> None:
    kinds = collections.Counter(each["kind"] for each in built(services))
    assert kinds == {"Node": 1, "Service": services, "EndpointSlice": services}


def test_every_object_is_decoded_without_a_warning() -> None:
    decoders = {"Service": decode.service, "EndpointSlice": decode.endpoint_slice, "Node": decode.node}
    for each in built(50):
        event = decoders[each["kind"]](msgspec.json.encode(each))
        assert isinstance(event, events.Upsert)
        assert event.value is not None
        assert event.warnings == ()


def test_the_measured_service_is_the_last_of_a_list_and_has_both_protocols() -> None:
    services = [each for each in built(200) if each["kind"] == "Service"]
    listed = sorted((each["metadata"]["namespace"], each["metadata"]["name"]) for each in services)
    assert listed[-1] == cluster.MEASURED
    value = decode.service(msgspec.json.encode(services[-1])).value
    assert isinstance(value, model.Service)
    assert {port.protocol for port in value.ports} == {model.Protocol.TCP, model.Protocol.UDP}


def test_names_and_addresses_are_unique_at_every_size_measured() -> None:
    numbers = range(max(profiles.FULL.services))
    measured = [cluster.measured_ip(copy) for copy in range(cluster.MEASURED_COPIES)]
    measured += [cluster.remote_ip(copy) for copy in range(cluster.MEASURED_COPIES)]
    assert len(set(measured)) == len(measured)
    assert len({cluster.filler_name(number) for number in numbers}) == len(numbers)
    addresses = [address for number in numbers for address in cluster.filler_place(number).addresses]
    assert len(set(addresses)) == len(numbers) * cluster.ENDPOINTS
    services = [each["spec"]["clusterIP"] for each in built(2000) if each["kind"] == "Service"]
    assert len(set(services)) == 2000


@given(st.integers(0, cluster.MAX_FILLERS - 1), st.integers(0, 1000))
def test_each_generation_moves_one_endpoint(number: int, generation: int) -> None:
    before = cluster.filler_place(number, generation).addresses
    after = cluster.filler_place(number, generation + 1).addresses
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 1
    assert len(set(after)) == cluster.ENDPOINTS


def test_a_move_replaces_the_endpoints_and_keeps_the_rest() -> None:
    other = SITE.place_of(SITE.servers[1])
    assert not set(other.addresses) & set(MEASURED.addresses)
    patch = cluster.move_patch(other, 3)
    assert [each["addresses"] for each in patch["endpoints"]] == [[address] for address in other.addresses]
    assert set(patch) == {"metadata", "endpoints"}


@pytest.mark.parametrize("services", [0, cluster.MAX_FILLERS + 1])
def test_a_cluster_whose_addresses_would_repeat_is_refused(services: int) -> None:
    with pytest.raises(ValueError, match="services"):
        built(services)


# --- what the kernel says ---


def test_only_mappings_of_bpf_maps_count_as_such() -> None:
    smaps = """\
7f0000000000-7f0000800000 rw-s 00000000 00:0e 1 anon_inode:bpf-map
Size:               8192 kB
Rss:                  64 kB
7f0000900000-7f0000a00000 rw-p 00000000 00:00 0 [heap]
Rss:                 512 kB
7f0000b00000-7f0000c00000 r--s 00000000 00:0e 1 anon_inode:bpf-map
Rss:                   4 kB
"""
    assert process.sum_of_resident_maps(smaps) == 68 * 1024


# --- progress ---


def test_the_time_left_follows_the_pace_so_far() -> None:
    assert progress.left_s(0, 0, 100) == 100
    assert progress.left_s(done_expected_s=970, done_s=1970, ahead_expected_s=100) == 200


@pytest.mark.parametrize(("seconds", "said"), [(12.3, "12 s"), (89, "89 s"), (200, "3 min")])
def test_durations_are_said_as_people_do(seconds: float, said: str) -> None:
    assert progress.duration(seconds) == said


def test_each_step_is_announced_with_the_time_left_and_followed_by_what_it_found() -> None:
    out = io.StringIO()
    steps = [progress.Step("first", 10, lambda: "one"), progress.Step("second", 30, lambda: "two")]
    progress.run(steps, lambda *_: None, out, clock=lambda: 0.0)
    lines = out.getvalue().splitlines()
    assert lines[0] == "[  0%, 40 s left] first"
    assert lines[1].strip() == "one"
    assert lines[2].startswith("[ 25%, ")
    assert lines[-1] == "[100%] done in 0 s"


def test_after_a_step_that_failed_the_next_is_taken() -> None:
    out = io.StringIO()
    seen: list[tuple[str, str]] = []

    def failing() -> str:
        raise RuntimeError("no rules")

    steps = [progress.Step("first", 10, failing), progress.Step("second", 30, lambda: "two")]
    progress.run(steps, lambda step, error: seen.append((step.label, str(error))), out, clock=lambda: 0.0)
    assert seen == [("first", "no rules"), ("second", "None")]
    assert "FAILED: no rules" in out.getvalue()
    with pytest.raises(KeyboardInterrupt):
        progress.run([progress.Step("", 1, unittest.mock.Mock(side_effect=KeyboardInterrupt))], print, out)


# --- starts ---


def test_lbproxy_starts_with_what_it_compiled_in_this_run_alone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = unittest.mock.MagicMock(sites={"lbproxy": SITE})
    at.lab.workdir = tmp_path
    agent = unittest.mock.Mock()
    monkeypatch.setattr(agents, "Agent", agent)
    of = contestants.Lbproxy(at)
    of.start()
    cache = pathlib.Path(agent.call_args.args[3]["XDG_CACHE_HOME"])
    assert cache.is_relative_to(tmp_path)
    cache.mkdir()
    of.unpin()
    assert cache.exists()
    of.forget()
    assert not cache.exists()
    assert len({of.other_size()[-1] for _ in range(5)}) == 5


# --- who is left out ---


@pytest.fixture
def field(found: results.Results) -> fields.Field:
    who = [unittest.mock.Mock(contestants.Contestant) for _ in NAMES]
    for each, name in zip(who, NAMES, strict=True):
        each.name = name
    return fields.Field(unittest.mock.Mock(), who, found)


def test_whoever_fails_is_taken_down_and_left_out_until_the_next_size(field: fields.Field) -> None:
    failing = field.who[1]
    action = unittest.mock.Mock(side_effect=arena.BenchError("no answer"))
    with pytest.raises(arena.BenchError):
        field.attempt(failing, action)
    failing.take_down.assert_called_once_with()  # type: ignore[attr-defined]
    assert field.names == ["lbproxy", "nftables"]
    assert field.attempt(failing, action) == "left out"
    assert action.call_count == 1
    assert field.attempt(field.who[0], lambda _field, of: of.name) == "lbproxy"
    field.begin(failing, 1000)
    failing.fill.assert_called_once_with(1000)  # type: ignore[attr-defined]
    assert field.names == list(NAMES)


def test_rounds_are_measured_again_without_whoever_failed_in_them(field: fields.Field) -> None:
    made = made_of((90, 110, 99, 95))
    measure = unittest.mock.Mock(side_effect=[rounds.VariantError("iptables/service", "nobody"), made])
    assert field.together("short", measure) == made
    assert [call.args[0] for call in measure.call_args_list] == [list(NAMES), ["lbproxy", "nftables"]]
    assert field.into.failed == [results.Failed("short", "iptables/service: nobody")]
    with pytest.raises(rounds.VariantError):
        field.together("short", unittest.mock.Mock(side_effect=rounds.VariantError("bare", "nobody")))


# --- files ---


@pytest.fixture
def found() -> results.Results:
    return results.Results("quick", "2025-01-01T10:00:00+00:00", {}, {}, {})


def test_the_newest_run_is_the_last_one_that_ended(found: results.Results, tmp_path: pathlib.Path) -> None:
    results.write(found, tmp_path / "b.json")
    with pytest.raises(ValueError, match="no complete results"):
        results.newest(tmp_path)
    found.complete = True
    results.write(found, tmp_path / "b.json")
    found.started = "2025-01-02T10:00:00+00:00"
    results.write(found, tmp_path / "a.json")
    found.started, found.complete = "2025-01-03T10:00:00+00:00", False
    results.write(found, tmp_path / "c.json")
    found.profile, found.complete = "smoke", True
    results.write(found, tmp_path / "smoke.json")
    assert results.newest(tmp_path).name == "a.json"


def test_files_beside_the_newest_run_that_are_none_are_left_out_with_a_line_each(
    found: results.Results, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text('{"schema": 1, "started": "2030"}')
    (tmp_path / "b.json").write_text('{"some": "thing"}')
    (tmp_path / "c.json").mkdir()
    found.complete = True
    results.write(found, tmp_path / "d.json")
    assert results.newest(tmp_path).name == "d.json"
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(".json")[0][-1] for line in said] == ["a", "b", "c"]
    assert "is of schema 1" in said[0]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "truncated"),
        ("{}", "missing"),
        ('{"schema": 99}', "is of schema 99"),
        ('{"schema": 1, "traffic": 7}', "is of schema 1"),
        ("[]", "Expected"),
    ],
)
def test_a_file_that_is_no_run_is_refused(content: str, complaint: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=complaint):
        results.read(file)


def test_a_run_of_another_schema_is_refused(found: results.Results, tmp_path: pathlib.Path) -> None:
    found.schema = results.SCHEMA + 1
    results.write(found, tmp_path / "x.json")
    with pytest.raises(ValueError, match="schema"):
        results.read(tmp_path / "x.json")


@pytest.mark.parametrize("profile", profiles.PROFILES.values(), ids=lambda profile: profile.name)
def test_every_profile_measures_short_connections_and_everybody_at_every_size(
    profile: profiles.Profile, found: results.Results
) -> None:
    at = unittest.mock.MagicMock(
        sites={name: arena.Site(name, number) for number, name in enumerate(NAMES, 2)}
    )
    who: list[contestants.Contestant] = [
        contestants.Lbproxy(at),
        *(kube_proxies.Generated(at, mode, "legacy") for mode in kube_proxies.MODES),
    ]
    labels = [step.label for step in steps.of_cluster(profile, fields.Field(at, who, found))]
    assert len([label for label in labels if ": short, pod to pod" in label]) == len(profile.services) + 1
    for name in NAMES:
        filled = [label for label in labels if f"{name}: fill" in label]
        assert len(filled) == len([label for label in labels if f"{name}: end" in label])
        assert len(filled) == len(profile.services)
    assert len([label for label in labels if "NodePorts" in label]) >= 2
    large = [size for size in profile.services if size >= 10_000] or profile.services[-1:]
    wanted = profile.services if profile.everywhere else large
    for what in ("CPU at 0 ", "CPU at 10 ", ", 0 others a second", ", 10 others a second"):
        of_agent = [label for label in labels if ": lbproxy: " in label and what in label]
        assert len(of_agent) == len(wanted), what


def test_cpu_at_rest_is_taken_before_there_is_traffic(found: results.Results) -> None:
    at = unittest.mock.MagicMock(sites={"lbproxy": arena.Site("lbproxy", 2)})
    at_one = profiles.Profile(**{**dataclasses.asdict(profiles.QUICK), "services": (10_000,)})
    labels = [
        step.label
        for step in steps.of_cluster(at_one, fields.Field(at, [contestants.Lbproxy(at)], found))
        if step.label.startswith("10,000")
    ]
    cpu = [number for number, label in enumerate(labels) if ": CPU at" in label]
    traffic = [number for number, label in enumerate(labels) if "rounds" in label or "changes seen" in label]
    assert len(cpu) == 3
    assert max(cpu) < min(traffic)


def test_how_long_it_takes_is_said_alike_everywhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["run", "--help"])
    with pytest.raises(SystemExit):
        run_program.main()
    said = " ".join(capsys.readouterr().out.split())
    documents = [
        " ".join((machine.ROOT / name).read_text().split()) for name in ("Makefile", "docs/benchmarks.md")
    ]
    for profile in (profiles.QUICK, profiles.FULL):
        assert all(profile.takes in text for text in (said, *documents))
    assert profiles.SMOKE.takes in said
    assert profiles.SMOKE.takes in documents[1]


def test_the_measured_services_stand_evenly_among_all() -> None:
    more = cluster.remote_objects(808, MEASURED, 8080)
    ports = model_of(list(cluster.objects(808, "n1", "172.18.0.1", MEASURED, 8080, more)))
    listed = kube_proxies.spread(ports)
    owners = [owner for owner, _ in itertools.groupby(port.owner for port in listed)]
    assert len(owners) == 816
    for name in (cluster.measured_name, cluster.remote_name):
        places = [owners.index(name(copy)) for copy in range(cluster.MEASURED_COPIES)]
        assert [after - before for before, after in itertools.pairwise(places)] == [102] * 7
    assert sorted(listed, key=str) == sorted(ports, key=str)


def test_a_churn_goes_on_where_the_one_before_ended() -> None:
    moved: list[tuple[object, ...]] = []
    connected = unittest.mock.Mock()
    connected.move.side_effect = lambda *change: moved.append(change)
    numbers = itertools.count()
    for least in (15, 30):
        before = len(moved)
        with api.Churn(lambda: connected, 20, 500.0, numbers) as churn:
            while len(moved) < least:
                time.sleep(0.001)
        assert churn.changes == len(moved) - before
    places = [change[:3] for change in moved]
    assert len(set(places)) == len(places)


def test_a_run_is_written_whole_or_not_at_all(
    found: results.Results, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.json"
    results.write(found, file)
    before = file.read_bytes()
    monkeypatch.setattr(os, "replace", unittest.mock.Mock(side_effect=OSError("full")))
    with pytest.raises(OSError, match="full"):
        results.write(found, file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_run_is_not_written_over_what_is_no_ordinary_file(tmp_path: pathlib.Path) -> None:
    results.check_writable(tmp_path / "new" / "run.json")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for path in (tmp_path, tmp_path / "link", pathlib.Path("/dev/null")):
        with pytest.raises(ValueError, match="no ordinary file"):
            results.check_writable(path)
    with pytest.raises(OSError, match="File exists"):
        results.check_writable(pathlib.Path("/dev/null/run.json"))


def model_of(objects: list[cluster.Object]) -> tuple[kubeproxy.ServicePort, ...]:
    return kubeproxy.ports(objects, "n1")


# --- what can be chosen ---


def chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, *arguments: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["run", "--out", str(tmp_path / "run.json"), *arguments])
    return bench_run.flags()


def test_sizes_can_be_chosen_and_come_in_their_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    assert chosen(monkeypatch, tmp_path).services is None
    assert chosen(monkeypatch, tmp_path, "--services", "30000,1,30000").services == (1, 30_000)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--services", "0"),
        ("--services", "1,many"),
        ("--services", "600000"),
        ("--contestants", "lbproxy,ipvs"),
        ("--contestants", "lbproxy,lbproxy"),
        ("--iptables", "ebtables"),
        ("--out", "/dev/null"),
    ],
)
def test_a_choice_that_can_not_be_is_refused_at_once(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(SystemExit) as refused:
        chosen(monkeypatch, tmp_path, *arguments)
    assert refused.value.code == 2
