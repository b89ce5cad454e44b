"""What /metrics says: names as kube-proxy's, values as the agent and the kernel have them."""

import asyncio
import collections
import dataclasses
import pathlib
import random
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import metrics_core, parser, samples

from lbproxy import abi, flow_table
from lbproxy.config import config
from lbproxy.core import (
    addresses,
    events,
    flows,
    inventory,
    ledger,
    model,
    outcomes,
    plan,
    probe,
    probing,
    reconcile,
    tables,
)
from lbproxy.kernel import fake, maps
from lbproxy.kube import manifests, reflector
from lbproxy.metrics import docs as metrics_docs
from lbproxy.metrics import metrics, table, text_format
from lbproxy.metrics import scrape as metrics_scrape

NODE = "node-a"
RESULTS = ("passed", "failed", "not-made")
WEB = model.ServiceName("default", "web")

KUBE_PROXY = {
    "kubeproxy_sync_proxy_rules_duration_seconds": ("histogram", {"ip_family"}),
    "kubeproxy_sync_full_proxy_rules_duration_seconds": ("histogram", {"ip_family"}),
    "kubeproxy_sync_partial_proxy_rules_duration_seconds": ("histogram", {"ip_family"}),
    "kubeproxy_sync_proxy_rules_last_timestamp_seconds": ("gauge", {"ip_family"}),
    "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds": ("gauge", {"ip_family"}),
    "kubeproxy_network_programming_duration_seconds": ("histogram", {"ip_family"}),
    "kubeproxy_sync_proxy_rules_endpoint_changes_pending": ("gauge", set()),
    "kubeproxy_sync_proxy_rules_endpoint_changes_total": ("counter", set()),
    "kubeproxy_sync_proxy_rules_service_changes_pending": ("gauge", set()),
    "kubeproxy_sync_proxy_rules_service_changes_total": ("counter", set()),
    "kubeproxy_sync_proxy_rules_no_local_endpoints_total": ("gauge", {"traffic_policy", "ip_family"}),
    "kubeproxy_conntrack_reconciler_sync_duration_seconds": ("histogram", {"ip_family"}),
    "kubeproxy_conntrack_reconciler_deleted_entries_total": ("counter", {"ip_family"}),
    "kubeproxy_proxy_healthz_total": ("counter", {"code"}),
    "kubeproxy_proxy_livez_total": ("counter", {"code"}),
    # Of client-go: kube-proxy's dashboards show these two as well.
    "rest_client_requests_total": ("counter", {"code", "method", "host"}),
    "rest_client_request_duration_seconds": ("histogram", {"verb", "host"}),
}


class Kernel(fake.FakeMaps):
    """Maps in memory that also tell their size, and remember who read them."""

    def __init__(self) -> None:
        super().__init__(dataclasses.asdict(config.MapRows()))
        self.reads: collections.Counter[str] = collections.Counter()
        self.readers: set[threading.Thread] = set()

    def rows(self, table: str) -> Iterator[tuple[bytes, bytes]]:
        self.reads[table] += 1
        self.readers.add(threading.current_thread())
        return super().rows(table)

    def rows_of(self, table: str) -> int:
        return self._sizes[table]

    def bytes_of(self, table: str) -> int:
        return 4096

    def count(self, name: str, number: int, *values: int) -> None:
        packed = b"".join(value.to_bytes(8, tables.BYTE_ORDER) for value in values)
        self._rows[name][tables.row_key(number)] = packed

    def fares(self, number: int, fared: outcomes.Outcomes, *, elsewhere: bool = False) -> None:
        key = outcomes.keys(number)[elsewhere]
        self._rows["backend_health"][key] = abi.LAYOUTS["backend_health"].pack(*fared)


class Prober:
    """What probes have found, as a test says."""

    targets = 0
    late_s = 0.0

    def __init__(self) -> None:
        self.found: dict[model.PortKey, tuple[int, int]] = {}

    def down(self) -> dict[model.PortKey, tuple[int, int]]:
        return self.found


class Agent:
    """A controller's state without its loop."""

    def __init__(self) -> None:
        self.kernel = Kernel()
        self.flow_table = flow_table.FlowTable(self.kernel)
        self.prober = Prober()
        sizes = maps.capacity(dataclasses.asdict(config.MapRows()))
        self.reconciler = reconcile.Reconciler(
            NODE, plan.Defaults(model.Algorithm.RANDOM), ledger.Ledger(sizes)
        )
        self.rejected: dict[tuple[events.Kind, events.ObjectName], str] = {}
        self.datapath_problems: list[str] = []
        for kind in events.Kind:
            self.reconciler.take(events.Synced(kind))

    def put(self, service: model.Service, *endpoints: model.Endpoint, family: int = 4) -> None:
        name = service.name
        ports = tuple(model.SlicePort(port.name, port.protocol, 8080) for port in service.ports)
        slice_ = model.EndpointSlice(
            name.namespace, f"{name.name}-x", name, model.Family(family), ports, endpoints, 0.0
        )
        slice_name = events.ObjectName(name.namespace, slice_.name)
        self.reconciler.take(events.Upsert(events.Kind.SERVICE, events.ObjectName(*name), service))
        self.reconciler.take(events.Upsert(events.Kind.ENDPOINT_SLICE, slice_name, slice_))
        self.apply()

    def apply(self) -> None:
        while self.reconciler.pending:
            self.kernel.apply(self.reconciler.next_pass(0.0).writes)

    def installed(self, name: model.ServiceName = WEB) -> Any:
        return next(v for key, v in self.reconciler.ledger.installed.items() if key.service == name)

    def attach(
        self, sources: list[metrics_scrape.Source] | None = None, max_series: int = 1000
    ) -> metrics.Metrics:
        telemetry = metrics.Metrics()
        telemetry.attach(
            controller=self,
            kernel=self.kernel,
            sources=sources or [],
            flow_table=self.flow_table,
            prober=self.prober,
            max_series=max_series,
            fingerprint="f00d",
            start="adopted",
        )
        return telemetry


@pytest.fixture
def agent() -> Agent:
    return Agent()


def ip(text: str) -> bytes:
    address = addresses.parse(text)
    assert address is not None
    return address


def service(name: model.ServiceName = WEB, cluster_ip: str = "10.96.0.1", **more: Any) -> model.Service:
    port = model.ServicePort("http", model.Protocol.TCP, 80, more.pop("node_port", 0))
    fields = {
        "external_ips": (),
        "load_balancer_ips": (),
        "affinity_s": 0,
        "internal_local": False,
        "external_local": False,
        "algorithm": None,
    }
    return model.Service(name=name, cluster_ips=(ip(cluster_ip),), ports=(port,), **{**fields, **more})


def endpoint(address: str, node: str = NODE, ready: bool = True, terminating: bool = False) -> model.Endpoint:
    return model.Endpoint(ip(address), ready, True, terminating, model.Location(node, ""))


class Scraped:
    """A parsed answer of /metrics."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.types: dict[str, str] = {}
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for line in text.splitlines():
            if line.startswith("# TYPE "):
                _, _, name, kind = line.split(" ")
                assert name not in self.types
                self.types[name] = kind
        for family in parser.text_string_to_metric_families(text):
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                assert key not in self.values, f"{key} is given twice"
                self.values[key] = sample.value

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.values.get((name, frozenset(labels.items())))

    def series(self, name: str) -> list[dict[str, str]]:
        return [dict(labels) for known, labels in self.values if known == name]


async def scrape(telemetry: metrics.Metrics) -> Scraped:
    return Scraped((await telemetry.exposition()).decode())


# --- the table ---


def test_names_types_and_labels_are_kube_proxys() -> None:
    mine = {d.name: (d.type.value, set(d.labels)) for d in table.TABLE if not d.name.startswith("lbproxy_")}
    assert mine == KUBE_PROXY


def test_every_other_name_is_our_own() -> None:
    others = [d.name for d in table.TABLE if d.name not in KUBE_PROXY]
    assert all(name.startswith("lbproxy_") for name in others)
    assert len({d.name for d in table.TABLE}) == len(table.TABLE)
    # The text format takes a counter's name apart at this suffix.
    assert all(d.name.endswith("_total") for d in table.TABLE if d.type is table.Type.COUNTER)


def test_buckets_are_kube_proxys() -> None:
    assert len(table.SYNC_DURATION.buckets) == 15
    assert table.SYNC_DURATION.buckets[0] == 0.001
    assert table.SYNC_DURATION.buckets[-1] == pytest.approx(16.384)
    programming = table.NETWORK_PROGRAMMING.buckets
    assert programming[:5] == (0, 0.25, 0.5, 1, 2)
    assert {59, 60, 65, 115, 120, 150, 300} <= set(programming)
    assert len(programming) == 1 + 2 + 59 + 12 + 7


def test_the_documentation_is_current() -> None:
    page = pathlib.Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text() == metrics_docs.render(), "run python -m lbproxy.metrics.docs > docs/metrics.md"


async def test_everything_in_the_table_is_exported_as_its_type(agent: Agent) -> None:
    scraped = await scrape(agent.attach())
    prefixes = ("lbproxy_", "kubeproxy_", "rest_client_")
    ours = {name: kind for name, kind in scraped.types.items() if name.startswith(prefixes)}
    assert ours == {definition.name: definition.type.value for definition in table.TABLE}
    assert scraped("process_open_fds")
    assert scraped.series("python_info")


# --- what the controller reports ---


async def test_labelled_series_appear_with_their_first_use() -> None:
    scraped = await scrape(metrics.Metrics())
    assert not scraped.series("kubeproxy_proxy_healthz_total")
    assert scraped("kubeproxy_proxy_livez_total", code="503") == 0
    assert not scraped.series("kubeproxy_sync_proxy_rules_duration_seconds_count")
    assert "_created" not in scraped.text


async def test_changes_wait_until_a_pass_succeeds() -> None:
    telemetry = metrics.Metrics()
    for kind in (
        events.Kind.SERVICE,
        events.Kind.ENDPOINT_SLICE,
        events.Kind.ENDPOINT_SLICE,
        events.Kind.NODE,
    ):
        telemetry.changed(kind)
    telemetry.queued(1000.5)
    scraped = await scrape(telemetry)
    prefix = "kubeproxy_sync_proxy_rules"
    assert scraped(f"{prefix}_endpoint_changes_pending") == 2
    assert scraped(f"{prefix}_service_changes_pending") == 1
    assert scraped(f"{prefix}_last_queued_timestamp_seconds", ip_family="IPv6") == 1000.5

    telemetry.synced(0.003, 1001.0, [])
    telemetry.changed(events.Kind.SERVICE)
    scraped = await scrape(telemetry)
    assert scraped(f"{prefix}_endpoint_changes_pending") == 0
    assert scraped(f"{prefix}_service_changes_pending") == 1
    assert scraped(f"{prefix}_endpoint_changes_total") == 2
    assert scraped(f"{prefix}_service_changes_total") == 2
    assert scraped(f"{prefix}_last_timestamp_seconds", ip_family="IPv4") == 1001


async def test_a_pass_is_a_full_one_first_and_after_a_failure() -> None:
    telemetry = metrics.Metrics()
    for _ in range(3):
        telemetry.synced(0.003, 0, [])
    telemetry.sync_failed()
    telemetry.synced(0.003, 0, [])
    scraped = await scrape(telemetry)
    counts = [
        scraped(f"kubeproxy_sync_{which}proxy_rules_duration_seconds_count", ip_family="IPv4")
        for which in ("", "full_", "partial_")
    ]
    assert counts == [4, 2, 2]
    assert scraped("lbproxy_sync_failures_total") == 1


async def test_programming_latency_is_kept_by_family_in_kube_proxys_buckets() -> None:
    telemetry = metrics.Metrics()
    telemetry.synced(0.003, 0, [(model.Family.IPV6, 0.3), (model.Family.IPV6, 2.0)])
    scraped = await scrape(telemetry)
    name = "kubeproxy_network_programming_duration_seconds"
    assert [labels["ip_family"] for labels in scraped.series(f"{name}_count")] == ["IPv6"]
    # As client_golang writes bounds: le="1", not le="1.0".
    buckets = {
        le: scraped(f"{name}_bucket", ip_family="IPv6", le=le)
        for le in ("0", "0.25", "0.5", "1", "2", "+Inf")
    }
    assert list(buckets.values()) == [0, 0, 1, 1, 2, 2]


async def test_requests_to_the_api_server_are_counted() -> None:
    telemetry = metrics.Metrics()
    telemetry.requested("GET", "200", "api:6443", 0.2)
    telemetry.requested("GET", "<error>", "api:6443", 3.0)
    scraped = await scrape(telemetry)
    assert scraped("rest_client_requests_total", code="<error>", method="GET", host="api:6443") == 1
    assert scraped("rest_client_request_duration_seconds_sum", verb="GET", host="api:6443") == 3.2


async def test_answers_and_rejections_are_counted() -> None:
    telemetry = metrics.Metrics()
    telemetry.answered_healthz(200)
    telemetry.answered_healthz(503)
    telemetry.answered_livez(200)
    telemetry.rejected(events.Kind.SERVICE)
    scraped = await scrape(telemetry)
    assert scraped("kubeproxy_proxy_healthz_total", code="503") == 1
    assert scraped("kubeproxy_proxy_livez_total", code="200") == 1
    assert scraped("lbproxy_rejected_total", kind="Service") == 1


# --- what a scrape finds ---


async def test_what_is_balanced_is_counted(agent: Agent) -> None:
    agent.put(
        service(node_port=30080),
        endpoint("10.244.0.1"),
        endpoint("10.244.0.2", ready=False, terminating=True),
        endpoint("10.244.0.3", ready=False),
    )
    agent.put(service(model.ServiceName("default", "six"), "fd00::1"), endpoint("fd00:1::1"), family=6)
    scraped = await scrape(agent.attach())
    assert scraped("lbproxy_services") == 2
    assert scraped("lbproxy_service_ports", ip_family="IPv4") == 1
    assert scraped("lbproxy_service_ports", ip_family="IPv6") == 1
    assert scraped("lbproxy_frontends") == 3
    states = {
        state: scraped("lbproxy_backends", state=state) for state in ("active", "terminating", "serving")
    }
    assert states == {"active": 2, "terminating": 1, "serving": 1}
    assert scraped("lbproxy_backends", state="draining") == 0
    assert scraped("lbproxy_starved_service_ports") == 0
    assert scraped("lbproxy_build_info", version="0.1.0", fingerprint="f00d") == 1
    assert scraped("lbproxy_datapath_start", how="adopted") == 1


async def test_programs_that_are_not_where_they_belong_are_counted(agent: Agent) -> None:
    attached = agent.attach()
    scraped = await scrape(attached)
    assert scraped("lbproxy_datapath_problems") == 0
    assert scraped("lbproxy_programs_put_back_total") == 0
    agent.datapath_problems = ["connect4 can not be put back", "no uplink"]
    attached.put_back(3)
    scraped = await scrape(attached)
    assert scraped("lbproxy_datapath_problems") == 2
    assert scraped("lbproxy_programs_put_back_total") == 3


async def test_what_is_open_is_told_of_counted_backends_those_with_the_most_first(agent: Agent) -> None:
    endpoints = [endpoint(f"10.244.0.{host}") for host in (1, 2, 3)]
    agent.put(service(algorithm=model.Algorithm.LEAST_CONNECTIONS), *endpoints)
    for opened, number in enumerate(agent.installed().backends, 1):
        row = opened.to_bytes(4, "little") + bytes(4)
        agent.kernel.apply([tables.Put(tables.Table.BACKEND_LOAD, tables.row_key(number), row)])
    scraped = await scrape(agent.attach(max_series=2))
    name = "lbproxy_backend_open_connections"
    web = {"namespace": "default", "service": "web", "port": "http", "protocol": "TCP"}
    assert scraped(name, **web, backend="10.244.0.3:8080") == 3
    assert scraped(name, **web, backend="10.244.0.2:8080") == 2
    assert len(scraped.series(name)) == 2


async def test_a_removed_backend_is_draining_until_its_row_is_cleared(agent: Agent) -> None:
    agent.put(service(), endpoint("10.244.0.1"), endpoint("10.244.0.2"))
    removed = agent.installed().backends
    for number in removed:
        agent.kernel.count("backend_stats", number, 5)
    agent.put(service(), endpoint("10.244.0.2"))
    telemetry = agent.attach()
    scraped = await scrape(telemetry)
    assert scraped("lbproxy_backends", state="draining") == 1
    assert [labels["backend"] for labels in scraped.series("lbproxy_backend_connections_total")] == [
        "10.244.0.2:8080"
    ]
    agent.kernel.apply(agent.reconciler.ledger.expire(1e9))
    assert (await scrape(telemetry))("lbproxy_backends", state="draining") == 0


async def test_connections_are_told_by_service_port_and_backend(agent: Agent) -> None:
    agent.put(service(), endpoint("10.244.0.1"), endpoint("10.244.0.2"))
    six = model.ServiceName("default", "six")
    agent.put(service(six, "fd00::1"), endpoint("fd00:1::1"), family=6)
    agent.kernel.count("service_stats", agent.installed().id, 7, 2)
    agent.kernel.count("service_stats", agent.installed(six).id, 0, 1)
    first, _second = agent.installed().backends
    agent.kernel.count("backend_stats", first, 4)
    agent.kernel.count("backend_stats", next(iter(agent.installed(six).backends)), 9)
    agent.kernel.count("backend_stats", 4000, 11)  # of a row that names nothing
    scraped = await scrape(agent.attach())
    web = {"namespace": "default", "service": "web", "port": "http", "protocol": "TCP"}
    assert len(scraped.series("lbproxy_service_connections_total")) == 1
    assert scraped("lbproxy_service_connections_total", **web, ip_family="IPv4") == 7
    assert scraped("lbproxy_service_connects_refused_total", **web, ip_family="IPv4") == 2
    assert scraped("lbproxy_backend_connections_total", **web, backend="10.244.0.1:8080") == 4
    backends = {labels["backend"] for labels in scraped.series("lbproxy_backend_connections_total")}
    assert backends == {"10.244.0.1:8080", "[fd00:1::1]:8080"}, "a backend without connections has no series"


async def test_how_connections_to_backends_fare(agent: Agent) -> None:
    agent.put(service(), endpoint("10.244.0.1"), endpoint("10.244.0.2"), endpoint("10.244.0.3"))
    first, second, _third = agent.installed().backends
    for number, fared in (
        (first, outcomes.Outcomes(9_000_000, 30, refused=2, lost=1, srtt_us=250)),
        (second, outcomes.Outcomes(unanswered=5, resets=1)),
        (4000, outcomes.Outcomes(1, 1)),  # of a row that names nothing
    ):
        agent.kernel.fares(number, fared)
    agent.kernel.fares(first, outcomes.Outcomes(1_000_000, 3, unanswered=40, srtt_us=900), elsewhere=True)
    web = {"namespace": "default", "service": "web", "port": "http", "protocol": "TCP"}
    one, two = ({**web, "backend": f"10.244.0.{n}:8080", "clients": "node"} for n in (1, 2))
    scraped = await scrape(agent.attach())
    assert scraped("lbproxy_backend_handshakes_total", **one) == 30
    assert scraped("lbproxy_backend_handshakes_total", **{**one, "clients": "elsewhere"}) == 3
    assert scraped("lbproxy_backend_handshake_seconds_total", **one) == 9
    assert scraped("lbproxy_backend_rtt_seconds", **one) == 0.00025
    failures = {
        (labels["backend"], labels["clients"], labels["reason"]): scraped(
            "lbproxy_backend_failures_total", **labels
        )
        for labels in scraped.series("lbproxy_backend_failures_total")
    }
    assert failures == {
        (one["backend"], "node", "refused"): 2,
        (one["backend"], "node", "lost"): 1,
        (one["backend"], "elsewhere", "unanswered"): 40,
        (two["backend"], "node", "unanswered"): 5,
        (two["backend"], "node", "resets"): 1,
    }
    assert len(scraped.series("lbproxy_backend_handshakes_total")) == 3
    assert len(scraped.series("lbproxy_backend_rtt_seconds")) == 2

    scraped = await scrape(agent.attach(max_series=1))
    assert {labels["backend"] for labels in scraped.series("lbproxy_backend_handshakes_total")} == {
        "10.244.0.1:8080"
    }
    scraped = await scrape(agent.attach(max_series=0))
    assert not scraped.series("lbproxy_backend_failures_total")


async def test_the_busiest_backends_are_shown_and_the_others_counted(agent: Agent) -> None:
    agent.put(service(), *(endpoint(f"10.244.0.{n}") for n in range(1, 11)))
    numbers = list(agent.installed().backends)
    for number in numbers:
        agent.kernel.count("backend_stats", number, number)
    scraped = await scrape(agent.attach(max_series=3))
    shown = sorted(
        value for (name, _), value in scraped.values.items() if name == "lbproxy_backend_connections_total"
    )
    assert shown == sorted(numbers)[-3:]
    assert scraped("lbproxy_metrics_series_omitted") == 7
    scraped = await scrape(agent.attach(max_series=0))
    assert not scraped.series("lbproxy_backend_connections_total")
    assert scraped("lbproxy_metrics_series_omitted") == 10


async def test_what_is_left_out_of_any_metric_is_counted(agent: Agent) -> None:
    agent.put(service(), *(endpoint(f"10.244.0.{n}") for n in range(1, 4)))
    for busy, number in enumerate(agent.installed().backends, 1):
        fared = outcomes.Outcomes(1, busy, refused=busy - 1, lost=1, srtt_us=100 * (busy - 1))
        row = abi.LAYOUTS["backend_health"].pack(*fared)
        agent.kernel.apply([tables.Put(tables.Table.BACKEND_HEALTH, tables.row_key(number), row)])
    assert (await scrape(agent.attach(max_series=3)))("lbproxy_metrics_series_omitted") == 0
    # Of the least busy one: handshakes, what they took, and lost.
    assert (await scrape(agent.attach(max_series=2)))("lbproxy_metrics_series_omitted") == 3
    assert (await scrape(agent.attach(max_series=0)))("lbproxy_metrics_series_omitted") == 3 + 2 * 5


async def test_probes_are_counted_by_what_they_speak_and_how_they_ended(agent: Agent) -> None:
    telemetry = agent.attach()
    telemetry.probed(probe.Kind.TCP, probing.Result(passed=True), 0.001)
    telemetry.probed(probe.Kind.TCP, probing.Result(passed=False, reason="refused"), 0.002)
    telemetry.probed(probe.Kind.TCP, probing.Result(passed=False, blameless=True), 0.003)
    agent.prober.targets, agent.prober.late_s = 5, 0.25
    scraped = await scrape(telemetry)
    results = {result: scraped("lbproxy_probes_total", type="tcp", result=result) for result in RESULTS}
    assert results == dict.fromkeys(RESULTS, 1)
    assert scraped("lbproxy_probe_duration_seconds_count", type="tcp") == 2
    assert scraped("lbproxy_probe_targets") == 5
    assert scraped("lbproxy_probe_late_seconds") == 0.25


async def test_service_ports_with_the_most_backends_down_are_shown(agent: Agent) -> None:
    keys = [
        model.PortKey(model.ServiceName("shop", f"s{n}"), "http", model.Protocol.TCP, model.Family.IPV4)
        for n in range(5)
    ]
    agent.prober.found = {key: (n, 9) for n, key in enumerate(keys)}
    for most, expected in ((3, {"s4", "s3", "s2"}), (0, set()), (10, {f"s{n}" for n in range(5)})):
        series = (await scrape(agent.attach(max_series=most))).series("lbproxy_probe_failed_backends")
        assert {labels["service"] for labels in series} == expected


async def test_every_counter_of_the_header_is_exported(agent: Agent) -> None:
    agent.kernel.count("counters", abi.constant("COUNTER_REFUSED"), 3)
    scraped = await scrape(agent.attach())
    assert scraped("lbproxy_datapath_events_total", event="refused") == 3
    names = {labels["event"] for labels in scraped.series("lbproxy_datapath_events_total")}
    kept = {"health_failed", "spilled", "spill_failed", "affinity_failed"}
    of_packets = {
        "source_denied", "ports_exhausted", "flows_full", "flow_failed", "fragment_lost",
        "too_big", "bad_tunnel", "mangled", "no_route",
    }  # fmt: skip
    assert names == {"refused", "dropped", "bad_slot", "unsteady", *kept, *of_packets}


async def test_maps_tell_their_fill_and_size(agent: Agent) -> None:
    agent.put(service(), endpoint("10.244.0.1"))
    scraped = await scrape(agent.attach())
    used = {name: scraped("lbproxy_map_rows", map=name) for name in abi.MAPS}
    assert used["frontends"] == used["slots"] == used["backends"] == used["services"] == 1
    assert used["affinity"] == used["sockets"] == 0
    assert scraped("lbproxy_map_capacity_rows", map="frontends") == config.MapRows().frontends
    assert scraped("lbproxy_map_bytes", map="slots") == 4096


async def test_closed_sockets_are_counted_by_family(agent: Agent) -> None:
    telemetry = agent.attach()
    telemetry.closed_sockets({model.Family.IPV6: 3}, 0.01)
    telemetry.closed_sockets({}, 0.01)
    scraped = await scrape(telemetry)
    name = "kubeproxy_conntrack_reconciler"
    assert scraped(f"{name}_deleted_entries_total", ip_family="IPv6") == 3
    assert scraped(f"{name}_deleted_entries_total", ip_family="IPv4") == 0
    assert scraped(f"{name}_sync_duration_seconds_count", ip_family="IPv4") == 2


async def test_flows_are_counted_as_the_last_look_found_them(agent: Agent) -> None:
    counts = agent.flow_table.counts
    counts.rows = 6
    counts.flows[flows.Flows(model.Protocol.UDP, assured=True)] = 2
    scraped = await scrape(agent.attach())
    assert scraped("lbproxy_flows", protocol="UDP", assured="true") == 2
    assert scraped("lbproxy_flows", protocol="SCTP", assured="false") == 0
    assert scraped("lbproxy_map_rows", map="flows") == 6
    assert agent.kernel.reads["flows"] == 0


async def test_large_maps_are_not_counted_at_each_scrape(agent: Agent) -> None:
    telemetry = agent.attach()
    await scrape(telemetry)
    await scrape(telemetry)
    assert agent.kernel.reads["service_stats"] == 2
    assert agent.kernel.reads["affinity"] == agent.kernel.reads["socket_spill"] == 1


async def test_the_kernel_is_read_beside_the_event_loop(agent: Agent) -> None:
    await scrape(agent.attach())
    assert agent.kernel.readers
    assert threading.current_thread() not in agent.kernel.readers


async def test_a_scrape_keeps_nothing_of_what_it_saw(agent: Agent) -> None:
    agent.put(service(), endpoint("10.0.0.1"))
    held = agent.installed()
    known = sys.getrefcount(held)
    telemetry = agent.attach()
    assert sys.getrefcount(held) == known
    assert b"lbproxy_services 1" in await telemetry.exposition()
    assert sys.getrefcount(held) == known


async def test_scrapes_that_meet_are_made_one_after_the_other(agent: Agent) -> None:
    telemetry = agent.attach()
    texts = await asyncio.gather(*(telemetry.exposition() for _ in range(5)))
    assert all(b"lbproxy_services 0" in text for text in texts)


@pytest.mark.parametrize(
    ("policy", "more", "nodes", "expected"),
    [
        ("internal", {"internal_local": True}, ["node-b"], 1),
        ("internal", {"internal_local": True}, [NODE, "node-b"], 0),
        ("internal", {"internal_local": True}, [], 0),
        ("internal", {}, ["node-b"], 0),
        ("external", {"external_local": True, "node_port": 30080}, ["node-b"], 1),
        ("external", {"external_local": True, "node_port": 30080}, [NODE], 0),
        ("external", {"external_local": True, "node_port": 30080}, [], 0),
        ("external", {"node_port": 30080}, ["node-b"], 0),
        ("external", {"external_local": True, "internal_local": True, "node_port": 30080}, ["node-b"], 1),
        ("internal", {"external_local": True, "node_port": 30080}, ["node-b"], 0),
    ],
)
async def test_service_ports_without_local_endpoints(
    agent: Agent, policy: str, more: dict[str, Any], nodes: list[str], expected: int
) -> None:
    agent.put(service(**more), *(endpoint(f"10.244.0.{n}", node) for n, node in enumerate(nodes, 1)))
    scraped = await scrape(agent.attach())
    name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total"
    assert scraped(name, traffic_policy=policy, ip_family="IPv4") == expected
    assert scraped(name, traffic_policy=policy, ip_family="IPv6") == 0


async def test_a_terminating_endpoint_here_is_a_local_endpoint(agent: Agent) -> None:
    leaving = endpoint("10.244.0.1", ready=False, terminating=True)
    agent.put(service(external_local=True, node_port=30080), leaving, endpoint("10.244.0.2", "node-b"))
    scraped = await scrape(agent.attach())
    name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total"
    assert scraped(name, traffic_policy="external", ip_family="IPv4") == 0


async def test_a_frontend_for_clients_outside_is_not_another_place_to_dial(agent: Agent) -> None:
    agent.put(service(external_local=True, node_port=30080), endpoint("10.244.0.1"))
    scraped = await scrape(agent.attach())
    assert scraped("lbproxy_frontends") == 2
    assert scraped("lbproxy_map_rows", map="frontends") == 3
    agent.put(service(node_port=30080), endpoint("10.244.0.1"))
    assert (await scrape(agent.attach()))("lbproxy_frontends") == 2


def test_every_event_is_explained() -> None:
    assert table.EVENTS.keys() == inventory.COUNTERS.keys()


async def test_sources_tell_how_they_fare(agent: Agent) -> None:
    watch = reflector.Reflector(None, reflector.services(), lambda _batch: None)  # type: ignore[arg-type]
    watch.state.connected = True
    watch.state.last_heard_s = 1234.5
    watch.state.lists = 3
    watch.state.failures = 2
    files = manifests.Manifests(pathlib.Path("/nonexistent"), lambda _batch: None)
    files.state.synced = True
    files.state.last_error = "gone"
    agent.rejected = {
        (events.Kind.SERVICE, events.ObjectName("default", "a")): "bad",
        (events.Kind.SERVICE, events.ObjectName("default", "b")): "bad",
    }
    scraped = await scrape(agent.attach([watch, files]))
    assert scraped("lbproxy_watch_connected", kind="Service") == 1
    assert scraped("lbproxy_watch_last_event_timestamp_seconds", kind="Service") == 1234.5
    assert scraped("lbproxy_watch_relists_total", kind="Service") == 2
    assert scraped("lbproxy_watch_failures_total", kind="Service") == 2
    assert scraped("lbproxy_watch_connected", kind="Manifest") == 0
    assert scraped("lbproxy_rejected_objects", kind="Service") == 2
    assert scraped("lbproxy_rejected_objects", kind="Node") == 0


async def test_a_scrape_may_coincide_with_changes(agent: Agent) -> None:
    """Scrapes run in a thread while the reconciler adds and removes services: they must always parse."""
    telemetry = agent.attach()
    draw = random.Random(4)
    done = asyncio.Event()

    async def scrapes() -> None:
        for _ in range(20):
            await scrape(telemetry)
        done.set()

    task = asyncio.create_task(scrapes())
    while not done.is_set():
        name = model.ServiceName("default", f"s{draw.randrange(50)}")
        number = draw.randrange(1, 250)
        agent.put(service(name, f"10.96.0.{number}"), endpoint(f"10.244.0.{number}"))
        for row in agent.installed(name).backends:
            agent.kernel.count("backend_stats", row, 1)
        agent.kernel.apply(agent.reconciler.ledger.expire(time.monotonic()))
        # The scraping thread needs the interpreter too: a busy loop would hand it over every 5 ms only.
        await asyncio.sleep(0.0002)
        if task.done():
            break
    await task


# --- the text ---


@given(st.text(), st.one_of(st.integers(0, 2**53), st.floats(allow_nan=False)))
@example('say "web"', 1)
@example("back\\slash\nand line", 1)
def test_any_label_and_value_reads_back(label: str, value: float) -> None:
    family = metrics_core.Metric("some", "help", "gauge")
    family.samples = [samples.Sample("some", {"a": label, "b": "plain"}, value)]
    text = text_format.render([family]).decode()
    (read,) = parser.text_string_to_metric_families(text)
    assert read.samples[0].labels == {"a": label, "b": "plain"}
    assert read.samples[0].value == value


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1"), (7, "7"), (0.25, "0.25"), (float("inf"), "+Inf"), (float("nan"), "NaN"), (True, "1")],
)
def test_numbers_are_written_as_client_golang_does(value: float, text: str) -> None:
    family = metrics_core.Metric("some", "a\nb\\c", "gauge")
    family.samples = [samples.Sample("some", {}, value)]
    assert text_format.render([family]).decode() == (
        f"# HELP some a\\nb\\\\c\n# TYPE some gauge\nsome {text}\n"
    )
