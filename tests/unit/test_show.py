"""What the read-side commands print, over maps in memory."""

import argparse
import io
import itertools
import json
import pathlib
import typing

import msgspec
import pytest
import yaml

from lbproxy import abi, errors, noting
from lbproxy.commands import render, show
from lbproxy.core import devices as roles
from lbproxy.core import fill, inventory, listing, model, notes, tables
from lbproxy.kernel import fake, inspection, maps
from lbproxy.trace import command as trace
from tests import installing
from tests.installing import endpoint

UNREADY: dict[str, typing.Any] = {"ready": False, "serving": False}
TERMINATING: dict[str, typing.Any] = {"ready": False, "terminating": True}


class Pinned(fake.FakeMaps):
    """Maps in memory that can be opened like pinned ones."""

    def __init__(self, sizes: typing.Mapping[str, int] = installing.SIZES) -> None:
        super().__init__(sizes)
        self.installer = installing.Installer(self, maps.capacity(sizes))

    def close(self) -> None: ...

    def bytes_of(self, _table: str) -> int:
        return 4096


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> Pinned:
    made = Pinned()
    monkeypatch.setattr(inspection, "open_maps", lambda _root: made)
    return made


def run(
    capsys: pytest.CaptureFixture[str],
    command: str,
    output: str = "table",
    name: str | None = None,
    namespace: str | None = None,
) -> str:
    args = argparse.Namespace(
        command=command, bpffs=pathlib.Path("/nowhere"), output=output, name=name, namespace=namespace
    )
    assert show.main(args) == 0
    return capsys.readouterr().out


def a_bit_of_everything(installer: installing.Installer) -> None:
    installer.node("192.0.2.10", "2001:db8::10")
    installer.service(
        "shop/web",
        ["10.96.0.10", "fd00::10"],
        [
            endpoint("10.244.0.2"),
            endpoint("10.244.0.10", "node-2", weight=3),
            endpoint("10.244.0.3", "", **UNREADY),
            endpoint("fd00:1::2"),
        ],
        node_port=30080,
        external=["198.51.100.7"],
        load_balancer=["203.0.113.9", "198.51.100.7"],
        affinity_s=10800,
        external_local=True,
        algorithm=model.Algorithm.MAGLEV,
        source_ranges=["192.0.2.0/24", "2001:db8::/32", "10.0.0.0/8"],
        mode=model.PacketMode.DSR,
    )
    installer.service("default/dns", ["10.96.0.53"], [], protocol=model.Protocol.UDP, port_name="", port=53)


def test_services_as_json(pinned: Pinned, capsys: pytest.CaptureFixture[str]) -> None:
    a_bit_of_everything(pinned.installer)
    web, *_ = (p for p in inventory.read(pinned).ports if p.key.service.name == "web")
    pinned.apply(
        [
            tables.Put(tables.Table.SERVICE_STATS, tables.row_key(web.id), pack("service_stats", 7, 2)),
            tables.Put(
                tables.Table.BACKEND_STATS, tables.row_key(web.backends[0].id), pack("backend_stats", 5)
            ),
        ]
    )
    dns, web4, web6 = json.loads(run(capsys, "services", "json"))
    assert dns == {
        "namespace": "default",
        "name": "dns",
        "port_name": "",
        "protocol": "UDP",
        "family": "IPv4",
        "algorithm": "random",
        "frontends": [{"ip": "10.96.0.53", "port": 53, "type": "ClusterIP"}],
        "backends": [],
        "session_affinity": {"type": "None", "timeout_s": 0},
        "internal_traffic_policy": "Cluster",
        "external_traffic_policy": "Cluster",
        "connections": 0,
        "refused": 0,
        "source_ranges": [],
        "mode": "snat",
        "all_unhealthy": False,
        "probe": None,
    }
    assert web4["frontends"] == [
        {"ip": "10.96.0.10", "port": 80, "type": "ClusterIP"},
        {"ip": "0.0.0.0", "port": 30080, "type": "NodePort", "addresses": ["192.0.2.10", "127.0.0.1"]},
        {"ip": "198.51.100.7", "port": 80, "type": "ExternalIP"},
        {"ip": "203.0.113.9", "port": 80, "type": "LoadBalancer"},
    ]
    assert web4["backends"] == [
        backend("10.244.0.2", connections=5),
        backend("10.244.0.3", node="", state="unready", usable=False),
        backend("10.244.0.10", node="node-2", weight=3),
    ]
    assert web4["session_affinity"] == {"type": "ClientIP", "timeout_s": 10800}
    assert (web4["algorithm"], web4["external_traffic_policy"]) == ("maglev", "Local")
    assert (web4["connections"], web4["refused"]) == (7, 2)
    assert (web4["source_ranges"], web4["mode"]) == (["10.0.0.0/8", "192.0.2.0/24"], "dsr")
    assert (web6["source_ranges"], web6["mode"]) == ([], "dsr")
    assert web6["family"] == "IPv6"
    assert web6["frontends"][1] == {
        "ip": "::",
        "port": 30080,
        "type": "NodePort",
        "addresses": ["2001:db8::10"],
    }


def backend(ip: str, **fields: object) -> dict[str, object]:
    usual = {"port": 8080, "node": "node-1", "zone": "zone-a", "state": "active", "weight": 1}
    return {
        "ip": ip,
        **usual,
        "connections": 0,
        "usable": True,
        "health": [],
        "open_connections": None,
        "probe": None,
        **fields,
    }


def pack(layout: str, *values: int) -> bytes:
    return abi.LAYOUTS[layout].pack(*values)


def test_the_listing_does_not_depend_on_what_was_written_first() -> None:
    def listed(order: typing.Sequence[str]) -> bytes:
        made = Pinned()
        for name in order:
            ips = [endpoint("10.244.0.9"), endpoint("10.244.0.1")]
            made.installer.service(f"default/{name}", [f"10.96.0.{ord(name)}"], ips, node_port=ord(name))
        found = inventory.read(made)
        return render.to_json(
            [listing.services(found, inventory.node_ports(made)), listing.backends(found)]
        ).encode()

    assert len({listed(order) for order in itertools.permutations("abc")}) == 1


@pytest.mark.parametrize("command", ["services", "backends"])
def test_yaml_says_the_same_as_json(pinned: Pinned, capsys: pytest.CaptureFixture[str], command: str) -> None:
    a_bit_of_everything(pinned.installer)
    as_json = json.loads(run(capsys, command, "json"))
    assert as_json
    assert yaml.safe_load(run(capsys, command, "yaml")) == as_json


@pytest.mark.parametrize(
    "value",
    ["", "no", "NULL", "1e3", "0x10", "a: b", "- a", "#", "line\nbreak", "é", '"', "~", "2020-01-01", "🙂"],
)
def test_yaml_keeps_text_text(value: str) -> None:
    nested = {"key": value, "list": [[value], [], {}, {"x": value}], "none": None, "yes": True, "n": 1.5}
    assert yaml.safe_load(render.to_yaml(nested)) == nested


def test_a_draining_backend_is_a_backend_but_no_service_lists_it(
    pinned: Pinned, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [endpoint("10.244.0.1"), endpoint("10.244.0.2")]
    pinned.installer.service("default/web", ["10.96.0.1"], both)
    pinned.installer.service("default/web", ["10.96.0.1"], both[:1])
    (service,) = json.loads(run(capsys, "services", "json"))
    assert [one["ip"] for one in service["backends"]] == ["10.244.0.1"]
    states = {one["ip"]: (one["state"], one["sets"]) for one in json.loads(run(capsys, "backends", "json"))}
    assert states == {"10.244.0.1": ("active", ["Cluster", "Local"]), "10.244.0.2": ("draining", [])}
    pinned.installer.expire()
    assert [one["ip"] for one in json.loads(run(capsys, "backends", "json"))] == ["10.244.0.1"]


def test_a_backend_that_outlives_its_service_is_listed_without_one(
    pinned: Pinned, capsys: pytest.CaptureFixture[str]
) -> None:
    pinned.installer.service("default/web", ["10.96.0.1"], [endpoint("10.244.0.1")])
    pinned.installer.remove("default/web")
    assert json.loads(run(capsys, "services", "json")) == []
    (left,) = json.loads(run(capsys, "backends", "json"))
    assert (left["ip"], left["namespace"], left["name"], left["state"]) == ("10.244.0.1", "", "", "draining")
    with pytest.raises(errors.AgentError, match="no backends in the namespace default here"):
        run(capsys, "backends", namespace="default")


def test_states_are_named_as_people_know_them(pinned: Pinned) -> None:
    pinned.installer.service("default/one", ["10.96.0.1"], [endpoint("10.244.0.1", **TERMINATING)])
    pinned.installer.service("default/two", ["10.96.0.2"], [endpoint("10.244.0.2", **UNREADY)])
    count = listing.backends_by_state(inventory.read(pinned))
    assert count == {"active": 0, "terminating": 1, "unready": 1, "draining": 0, "serving": 0, "unhealthy": 0}


def test_rows_that_lead_nowhere_are_left_out(pinned: Pinned) -> None:
    pinned.installer.service("default/web", ["10.96.0.1"], [endpoint("10.244.0.1")])
    key, row = next(pinned.rows("services"))
    pinned.apply([tables.Delete(tables.Table.SERVICES, key)])
    assert inventory.read(pinned).ports == ()
    unknown_protocol = tables.service_meta(row)._replace(proto=99).pack()
    pinned.apply([tables.Put(tables.Table.SERVICES, key, unknown_protocol)])
    assert inventory.read(pinned).ports == ()


@pytest.mark.parametrize(
    ("name", "namespace", "found"),
    [
        ("web", None, ["a/web", "b/web"]),
        ("b/web", None, ["b/web"]),
        ("web", "a", ["a/web"]),
        (None, "a", ["a/web"]),
    ],
)
def test_services_by_name_and_namespace(
    pinned: Pinned,
    capsys: pytest.CaptureFixture[str],
    name: str | None,
    namespace: str | None,
    found: list[str],
) -> None:
    for number, namespace_of in enumerate("ab", 1):
        pinned.installer.service(
            f"{namespace_of}/web", [f"10.96.0.{number}"], [endpoint(f"10.244.0.{number}")]
        )
    for command in ("services", "backends"):
        listed = json.loads(run(capsys, command, "json", name, namespace))
        assert [f"{one['namespace']}/{one['name']}" for one in listed] == found


def test_a_name_that_is_not_there_is_an_error(pinned: Pinned, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(errors.AgentError, match="default/web"):
        run(capsys, "services", "json", "default/web")
    with pytest.raises(errors.ConfigError, match="not in the namespace other"):
        run(capsys, "services", "json", "default/web", "other")


def test_plain_tables_can_be_split_at_blanks(pinned: Pinned, capsys: pytest.CaptureFixture[str]) -> None:
    a_bit_of_everything(pinned.installer)
    header, dns, web4, web6 = run(capsys, "services").splitlines()
    assert header.split() == [
        "SERVICE",
        "FRONTENDS",
        "BACKENDS",
        "USABLE",
        "ALGORITHM",
        "CONNECTIONS",
        "REFUSED",
        "PROBE",
    ]
    assert dns.split() == ["default/dns:UDP", "ClusterIP=10.96.0.53:53", "-", "0/0", "random", "0", "0", "-"]
    assert web4.split()[0] == "shop/web:http/TCP"
    assert web4.split()[1].split(",")[:2] == ["ClusterIP=10.96.0.10:80", "NodePort=*:30080"]
    assert web4.split()[1].endswith(",+1")
    assert web4.split()[3] == "2/3"
    assert "[fd00::10]:80" in web6
    assert web4.isascii()


FELL, FAILING = "10.244.0.1", "10.244.0.2"
REFUSED = "connection refused"


def noted(**changes: typing.Any) -> notes.Notes:
    def trouble(ip: str, *, up: bool, needed: int) -> notes.Trouble:
        return notes.Trouble("default", "web", "http", 6, ip, 8080, up, 1, needed, REFUSED, 1_000_000_000)

    return msgspec.structs.replace(
        notes.Notes(
            asked=(notes.Asked("default", "web", "http", "http:/healthz every 2s"),),
            troubles=(trouble(FELL, up=False, needed=2), trouble(FAILING, up=True, needed=3)),
        ),
        **changes,
    )


def test_probes_are_shown_and_why_they_fail(
    pinned: Pinned, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noting, "read", lambda _root: noted())
    pinned.installer.service("default/web", ["10.96.0.1"], [endpoint(FELL), endpoint(FAILING)])
    pinned.installer.service("other/web", ["10.96.0.2"], [endpoint(FELL)])
    since = "2001-09-09T01:46:40Z"
    down = {"state": "down", "in_a_row": 1, "needed": 2, "reason": REFUSED, "since": since}
    failing = {**down, "state": "failing", "needed": 3}
    web, other = json.loads(run(capsys, "services", "json"))
    assert web["probe"] == {"asks": "http:/healthz every 2s", "off": "", "invalid": ""}
    assert [one["probe"] for one in web["backends"]] == [down, failing]
    assert other["probe"] is other["backends"][0]["probe"] is None
    assert [one["probe"] for one in json.loads(run(capsys, "backends", "json"))] == [down, failing, None]

    assert [line.split()[-1] for line in run(capsys, "services").splitlines()] == [
        "PROBE",
        "http:/healthz",
        "-",
    ]
    lines = run(capsys, "backends").splitlines()
    assert [line.split()[-1] for line in lines[:4]] == ["PROBE", "down,1/2", "failing,1/3", "-"]
    assert lines[5:] == [
        f"{FELL}:8080 of default/web:http: down, failing since {since}: {REFUSED}; passed 1 of 2 times since",
        f"{FAILING}:8080 of default/web:http: failing since {since}, 1 of 3 times in a row: {REFUSED}",
    ]


HERE, THERE, FURTHER = "10.244.0.2", "10.244.1.2", "10.244.1.3"


def by_dsr(pinned: Pinned, **fields: typing.Any) -> None:
    endpoints = [endpoint(HERE), *(endpoint(ip, "node-2") for ip in (THERE, FURTHER))]
    fields = {"node_port": 30080, "mode": model.PacketMode.DSR, **fields}
    pinned.installer.service("default/web", ["10.96.0.1"], endpoints, **fields)


def failed(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The column FAILED by address."""
    rows = run(capsys, "backends").splitlines()[1:4]
    return {line.split(":")[0]: line.split()[10] for line in rows}


def test_whose_connections_by_dsr_are_not_seen_is_said(
    pinned: Pinned, capsys: pytest.CaptureFixture[str]
) -> None:
    by_dsr(pinned)
    found = {one["ip"]: one["not_seen"] for one in json.loads(run(capsys, "backends", "json"))}
    assert found == {HERE: [], THERE: ["dsr"], FURTHER: ["dsr"]}
    assert failed(capsys) == {HERE: "0", THERE: "-", FURTHER: "-"}
    assert run(capsys, "backends").splitlines()[5] == (
        f"not seen: how connections by DSR to {THERE}:8080 of default/web:http and 1 more fare: "
        "backends of other nodes answer past this one, and are counted there"
    )
    # What this node's own have met with is worth a number.
    there = next(number for number, one in backend_rows(pinned) if one.addr == installing.address(THERE))
    row = abi.LAYOUTS["backend_health"].pack(0, 5, 0, 0, 0, 0, 0)
    pinned.apply([tables.Put(tables.Table.BACKEND_HEALTH, there, row)])
    assert failed(capsys) == {HERE: "0", THERE: "0", FURTHER: "-"}


def backend_rows(pinned: Pinned) -> typing.Iterator[tuple[bytes, tables.Backend]]:
    return ((key, tables.backend(row)) for key, row in pinned.rows("backends"))


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": model.PacketMode.SNAT},
        {"node_port": 0},  # a ClusterIP alone
    ],
)
def test_only_where_dsr_leads_to_other_nodes(
    pinned: Pinned, capsys: pytest.CaptureFixture[str], fields: dict[str, typing.Any]
) -> None:
    by_dsr(pinned, **fields)
    assert {tuple(one["not_seen"]) for one in json.loads(run(capsys, "backends", "json"))} == {()}
    assert set(failed(capsys).values()) == {"0"}


def test_of_datagrams_nothing_is_said_to_have_failed(
    pinned: Pinned, capsys: pytest.CaptureFixture[str]
) -> None:
    by_dsr(pinned, protocol=model.Protocol.UDP)
    assert failed(capsys) == {HERE: "-", THERE: "-", FURTHER: "-"}


def test_backends_that_pass_and_those_that_nobody_asks_are_told_apart(
    pinned: Pinned, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ("10.244.0.3", "10.244.0.4")
    spared = tuple(notes.Spared("default", "web", "http", 6, ip, 8080, "it is this node's own") for ip in own)
    monkeypatch.setattr(noting, "read", lambda _root: noted(troubles=(), spared=spared))
    endpoints = [*map(endpoint, (FELL, *own)), endpoint("10.244.0.5", **UNREADY)]
    pinned.installer.service("default/web", ["10.96.0.1"], endpoints)
    lines = run(capsys, "backends").splitlines()
    assert [line.split()[-1] for line in lines[1:5]] == ["up", "not-asked", "not-asked", "not-asked"]
    assert lines[5:] == [
        "",
        "not-asked: 10.244.0.3:8080 of default/web:http and 1 more: it is this node's own",
        "",
        "not-asked: 10.244.0.5:8080 of default/web:http: this node does not use it",
    ]
    none = {"in_a_row": 0, "needed": 0, "reason": "", "since": ""}
    first, second, *_ = (one["probe"] for one in json.loads(run(capsys, "backends", "json")))
    assert first == {**none, "state": "up"}
    assert second == {**none, "state": "not-asked", "reason": "it is this node's own"}


def test_one_that_probes_have_found_down_is_so_without_room_for_it_in_the_notes(
    pinned: Pinned, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noting, "read", lambda _root: noted(troubles=()))
    pinned.installer.service("default/web", ["10.96.0.1"], [endpoint(FELL), endpoint(FAILING)])
    for key, packed in list(pinned.rows("backends")):
        row = tables.backend(packed)
        if row.addr == installing.address(FELL):
            row = row._replace(health=tables.Health.PROBE_FAILED)
            pinned.apply([tables.Put(tables.Table.BACKENDS, key, row.pack())])
    found = json.loads(run(capsys, "backends", "json"))
    assert [one["probe"]["state"] for one in found] == ["down", "up"]


def test_annotations_that_are_not_understood_are_shown(
    pinned: Pinned, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "lbproxy.io/probe: 'htp:/': begins with none of tcp, http"
    mistaken = noted(asked=(), troubles=(), mistakes=(notes.Mistake("default", "web", why),))
    monkeypatch.setattr(noting, "read", lambda _root: mistaken)
    pinned.installer.service("default/web", ["10.96.0.1", "fd00::1"], [endpoint(FELL)])
    (probe,) = {tuple(one["probe"].items()) for one in json.loads(run(capsys, "services", "json"))}
    assert dict(probe) == {"asks": "", "off": "", "invalid": why}
    _, one, two, *below = run(capsys, "services").splitlines()
    assert one.split()[-1] == two.split()[-1] == "invalid"
    assert below == ["", f"default/web: {why}"]
    assert [one["probe"] for one in json.loads(run(capsys, "backends", "json"))] == [None]


def test_services_say_that_probes_are_off(
    pinned: Pinned, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    off = noted(probes_off="--probe-concurrency is 0", troubles=(), left_out=7)
    monkeypatch.setattr(noting, "read", lambda _root: off)
    pinned.installer.service("default/web", ["10.96.0.1"], [endpoint(FELL)])
    _, row, *below = run(capsys, "services").splitlines()
    assert row.split()[-1] == "http:/healthz,off"
    assert below == [
        "",
        "Probes are asked for and not made: --probe-concurrency is 0.",
        "",
        "7 more ports, backends or rejections have no room in the agent's notes.",
    ]
    assert [line.split()[-1] for line in run(capsys, "backends").splitlines()[:2]] == ["PROBE", "off"]
    assert "off: 10.244.0.1:8080 of default/web:http: --probe-concurrency is 0" in run(capsys, "backends")


def test_what_is_open_is_shown_where_it_is_counted(
    pinned: Pinned, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoints = [endpoint("10.244.0.1"), endpoint("10.244.0.2")]
    least = model.Algorithm.LEAST_CONNECTIONS
    pinned.installer.service("default/least", ["10.96.0.1"], endpoints, algorithm=least)
    pinned.installer.service("default/other", ["10.96.0.2"], endpoints)
    (number, _) = pinned.installer.ledger.counted_backends()
    pinned.apply(
        [
            tables.Put(tables.Table.BACKEND_LOAD, tables.row_key(number), pack("backend_load", 9, 3)),
            tables.Put(tables.Table.LOAD_CORRECTIONS, tables.row_key(number), b"\xff\xff\xff\xff"),
        ]
    )
    first, _ = json.loads(run(capsys, "services", "json"))
    assert [one["open_connections"] for one in first["backends"]] == [5, 0]
    header, *rows = (line.split() for line in run(capsys, "backends").splitlines())
    at = header.index("OPEN")
    assert [row[at] for row in rows] == ["5", "0", "-", "-"]
    assert [row.split()[4] for row in run(capsys, "services").splitlines()] == [
        "ALGORITHM",
        "least-connections",
        "random",
    ]


@pytest.mark.parametrize(
    ("nodes", "local", "usable"),
    [
        (["node-2"], True, "0/1"),
        (["node-2"], False, "1/1"),
        (["node-1", "node-2"], True, "1/2"),
        (["node-1", "node-2"], False, "2/2"),
    ],
)
def test_usable_is_what_the_cluster_ip_may_choose(
    pinned: Pinned, capsys: pytest.CaptureFixture[str], nodes: list[str], local: bool, usable: str
) -> None:
    endpoints = [endpoint(f"10.244.0.{n}", node) for n, node in enumerate(nodes, 1)]
    # The NodePort draws from all of them, whatever the internal policy says.
    pinned.installer.service("default/web", ["10.96.0.1"], endpoints, internal_local=local, node_port=30080)
    _, row = run(capsys, "services").splitlines()
    assert row.split()[3] == usable
    (service,) = json.loads(run(capsys, "services", "json"))
    chosen = [one["node"] for one in service["backends"] if one["usable"]]
    assert chosen == ([node for node in nodes if node == "node-1"] if local else nodes)


def test_a_terminating_backend_is_usable_only_while_none_is_ready(
    pinned: Pinned, capsys: pytest.CaptureFixture[str]
) -> None:
    going = endpoint("10.244.0.1", **TERMINATING)
    for endpoints, usable in (([going], "1/1"), ([going, endpoint("10.244.0.2")], "1/2")):
        pinned.installer.service("default/web", ["10.96.0.1"], endpoints)
        _, row = run(capsys, "services").splitlines()
        assert row.split()[3] == usable


def test_without_its_cluster_ip_a_service_is_reached_where_it_still_has_frontends(
    pinned: Pinned, capsys: pytest.CaptureFixture[str]
) -> None:
    remote = [endpoint("10.244.0.1", "node-2")]
    pinned.installer.service("default/a", ["10.96.0.1"], remote)
    pinned.installer.service("default/b", ["10.96.0.1"], remote)
    pinned.installer.service("default/c", ["10.96.0.1"], remote, internal_local=True, node_port=30080)
    _, first, nowhere, node_port = run(capsys, "services").splitlines()
    assert first.split()[3] == "1/1"
    assert (nowhere.split()[1], nowhere.split()[3]) == ("-", "0/1")
    assert (node_port.split()[1], node_port.split()[3]) == ("NodePort=*:30080", "1/1")


def test_a_service_asked_for_by_name_is_shown_whole(
    pinned: Pinned, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoints = [endpoint(f"10.244.0.{n}") for n in range(1, 30)]
    pinned.installer.service("default/web", ["10.96.0.1"], endpoints)
    assert "10.244.0.29:8080" not in run(capsys, "services")
    assert "10.244.0.29:8080" in run(capsys, "services", name="web")


class Terminal(io.StringIO):
    """Somebody's screen."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_colors_and_whole_addresses(pinned: Pinned, monkeypatch: pytest.MonkeyPatch) -> None:
    a_bit_of_everything(pinned.installer)
    screen = Terminal()
    for name, value in {"COLUMNS": "40", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.stdout", screen)
    namespace = argparse.Namespace(
        command="backends", bpffs=pathlib.Path("/"), output="table", name=None, namespace=None
    )
    assert show.main(namespace) == 0
    text = screen.getvalue()
    assert "\x1b[32mactive" in text
    assert "\x1b[31munready" in text
    assert "[fd00:1::2]:8080" in text


# --- maps and counters ---


def test_every_map_is_described() -> None:
    assert set(fill.HOLDS) == set(abi.MAPS)


def test_counters_are_those_of_the_header(pinned: Pinned) -> None:
    assert inventory.COUNTERS["refused"] == abi.constant("COUNTER_REFUSED")
    assert sorted(inventory.COUNTERS.values()) == list(range(len(inventory.COUNTERS)))
    key = tables.row_key(inventory.COUNTERS["bad_slot"])
    pinned._rows["counters"][key] = (3).to_bytes(8, tables.BYTE_ORDER)
    assert inventory.counters(pinned) == dict.fromkeys(inventory.COUNTERS, 0) | {"bad_slot": 3}


def test_rows_in_use(pinned: Pinned) -> None:
    endpoints = [endpoint(f"10.244.0.{n}") for n in range(1, 18)]
    pinned.installer.service("default/web", ["10.96.0.1"], endpoints, node_port=30080)
    used = fill.all_used(pinned)
    expected = {"frontends": 2, "slots": 2, "backends": 17, "backend_stats": 17, "services": 1}
    assert {name: used[name] for name in expected} == expected
    # A smaller service leaves its old slots behind, uncleared.
    pinned.installer.service("default/web", ["10.96.0.1"], endpoints[:1], node_port=30080)
    pinned.installer.expire()
    assert len(list(pinned.rows("slots"))) > 1
    assert (fill.used(pinned, "slots"), fill.used(pinned, "backends")) == (1, 1)


def test_a_released_socket_uses_no_row(pinned: Pinned) -> None:
    layout = abi.LAYOUTS["socket_record"]
    held, released = (layout.pack(cookie, bytes(16), b"\x01" * 16, b"\0P", b"\0P", 1, 0) for cookie in (7, 0))
    pinned._rows["sockets"] = {tables.row_key(1): held, tables.row_key(2): released}
    assert fill.used(pinned, "sockets") == 1


def test_a_table_that_is_nearly_full_is_warned_of() -> None:
    used = dict.fromkeys(abi.MAPS, 79) | {"affinity": 100, "socket_spill": 100}
    assert fill.warnings(used, lambda _name: 101) == []
    (line,) = fill.warnings({**used, "slots": 80}, lambda _name: 101)
    assert line == "the slots table is 80 % full (80 of 100 rows): raise it with --map-rows slots=N"
    (line,) = fill.warnings({**used, "frontends": 101}, lambda _name: 101)
    assert line == (
        "the frontends table is 100 % full (101 of 101 rows), and what does not fit is not served: "
        "raise it with --map-rows frontends=N"
    )
    (line,) = fill.warnings({**used, "flows": 101}, lambda _name: 101)
    assert "(101 of 101 rows), and what does not fit goes to flows_new, where the oldest is" in line


def test_a_table_that_takes_no_more_is_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {**installing.SIZES, "backends": 3, "services": 2, "slots": 2, "localities": 2}
    full = Pinned(sizes)
    full.installer.service("default/web", ["10.96.0.1"], [endpoint("10.244.0.1"), endpoint("10.244.0.2")])
    with pytest.raises(AssertionError):
        full.installer.service("default/more", ["10.96.0.2"], [])
    monkeypatch.setattr(inspection, "open_maps", lambda _root: full)
    rows = {one["name"]: one for one in json.loads(run(capsys, "maps", "json"))}
    for name in ("backends", "backend_stats", "services", "service_stats", "slots", "localities"):
        assert (name, rows[name]["percent"], rows[name]["used"]) == (name, 100.0, rows[name]["capacity"])
    warned = fill.warnings(fill.all_used(full), full.rows_of)
    assert [line.split()[1] for line in warned] == ["slots", "backends", "services", "localities"]


def test_a_table_of_one_size_has_no_percent(pinned: Pinned, capsys: pytest.CaptureFixture[str]) -> None:
    shown = {line.split()[0]: line.split() for line in run(capsys, "maps").splitlines()}
    assert {name for name, cells in shown.items() if cells[4] == "-"} == {
        "settings",
        "counters",
        "unassured",
        "ticks",
        "scratch",
        "handover",
        "no_flows",
        "no_frontends",
        "total",
    }
    assert shown["backends"][2:5] == ["0", "255", "0.00%"]


# --- what is known but not served ---


def test_a_service_whose_address_is_anothers_is_warned_of(pinned: Pinned) -> None:
    for name in ("a", "b", "c"):
        assert listing.warnings(inventory.read(pinned)) == []
        pinned.installer.service(f"default/{name}", [f"10.96.0.{ord(name)}"], [])
    for name, count in (("b", "1 service port"), ("c", "2 service ports")):
        pinned.installer.service(f"default/{name}", [f"10.96.0.{ord('a')}"], [])
        assert listing.warnings(inventory.read(pinned)) == [
            f"{count} with no frontend, such as default/b:http/TCP/IPv4: another service has their address"
        ]


def test_sctp_is_said_not_to_be_balanced(pinned: Pinned, capsys: pytest.CaptureFixture[str]) -> None:
    pinned.installer.service("default/web", ["10.96.0.1"], [endpoint("10.244.0.1")])
    assert "SCTP" not in run(capsys, "services")
    pinned.installer.service(
        "default/sctp", ["10.96.0.2"], [endpoint("10.244.0.1")], protocol=model.Protocol.SCTP
    )
    *_, note = run(capsys, "services").splitlines()
    assert note.startswith("SCTP is served packet by packet: what the node's own processes send")
    assert listing.warnings(inventory.read(pinned)) == [
        "1 service port of SCTP, such as default/sctp:http/SCTP/IPv4: "
        "what the node's own processes send is not balanced"
    ]


def test_a_backend_that_serves_without_being_ready_is_shown_so(
    pinned: Pinned, capsys: pytest.CaptureFixture[str]
) -> None:
    pinned.installer.service("default/web", ["10.96.0.1"], [endpoint("10.244.0.1", ready=False)])
    (one,) = json.loads(run(capsys, "backends", "json"))
    assert (one["state"], one["sets"]) == ("serving", [])
    assert "serving" in run(capsys, "backends")


def test_what_clients_outside_have_is_no_frontend_of_its_own(
    pinned: Pinned, capsys: pytest.CaptureFixture[str]
) -> None:
    for local in (False, True):
        pinned.installer.service(
            "default/web", ["10.96.0.1"], [endpoint("10.244.0.1")], node_port=30080, external_local=local
        )
        (web,) = json.loads(run(capsys, "services", "json"))
        assert [one["type"] for one in web["frontends"]] == ["ClusterIP", "NodePort"]


def test_maps_count_what_the_packet_path_has(pinned: Pinned, capsys: pytest.CaptureFixture[str]) -> None:
    for hosts in ((1, 2), (2, 3)):
        pinned.installer.service(
            "default/web",
            ["10.96.0.1"],
            [endpoint(f"10.244.0.{host}") for host in hosts],
            load_balancer=["203.0.113.9"],
            source_ranges=["192.0.2.0/24", "198.51.100.0/24"],
            mode=model.PacketMode.DSR,
        )
    used = {one["name"]: one["used"] for one in json.loads(run(capsys, "maps", "json"))}
    assert (used["source_ranges"], used["earlier_slots"], used["slots"]) == (2, 1, 2 * 16)


# --- columns ---


def test_a_column_of_numbers_stays_in_its_place() -> None:
    """Whether it has any or not; and words that are all missing stay under their header."""
    columns = ("NAME", "OPEN", "HEALTH")
    none = render.plain(render.Table(columns, [("aa", "", ""), ("bb", "", "")], right=("OPEN",)))
    some = render.plain(render.Table(columns, [("aa", "", ""), ("bb", 12345, "ill")], right=("OPEN",)))
    assert none.splitlines() == ["NAME  OPEN  HEALTH", "aa       -  -", "bb       -  -"]
    assert some.splitlines() == ["NAME   OPEN  HEALTH", "aa        -  -", "bb    12345  ill"]


# --- names ---


def test_trace_takes_names_as_the_others_do(pinned: Pinned) -> None:
    for name in ("a/cart", "b/cart", "b/web"):
        pinned.installer.service(name, [f"10.96.0.{len(inventory.read(pinned).ports) + 1}"], [])
    numbers = {str(port.key.service): port.id for port in inventory.read(pinned).ports}
    rows = typing.cast(maps.BpfMaps, pinned)
    both = {numbers["a/cart"], numbers["b/cart"]}
    assert set(trace._services("cart", rows)) == set(trace._services("cart:http", rows)) == both
    assert list(trace._services("b/cart:80", rows)) == [numbers["b/cart"]]
    with pytest.raises(errors.AgentError, match="no ports of a Service cart:81 here"):
        trace._services("cart:81", rows)


@pytest.mark.parametrize(
    ("name", "namespace", "said"),
    [
        ("", None, "'' is not a NAME or NAMESPACE/NAME of a Service"),
        ("shop/", None, "'shop/' is not a NAME"),
        ("/cart", None, "'/cart' is not a NAME"),
        ("a/b/c", None, "'a/b/c' is not a NAME"),
        ("web", "", "-n: '' is not a NAMESPACE"),
        (None, "a/b", "-n: 'a/b' is not a NAMESPACE"),
    ],
)
@pytest.mark.parametrize("command", ["services", "backends"])
def test_what_is_no_name_is_wrong_usage(command: str, name: str | None, namespace: str, said: str) -> None:
    args = argparse.Namespace(
        command=command, bpffs=pathlib.Path("/nowhere"), output="table", name=name, namespace=namespace
    )
    with pytest.raises(errors.ConfigError) as caught:
        show.main(args)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(("command", "what"), [("services", "ports"), ("backends", "backends")])
def test_a_namespace_with_nothing_is_a_failure(
    pinned: Pinned, capsys: pytest.CaptureFixture[str], command: str, what: str
) -> None:
    a_bit_of_everything(pinned.installer)
    with pytest.raises(errors.AgentError, match=f"^no {what} in the namespace shopp here$"):
        run(capsys, command, namespace="shopp")


# --- status ---


def test_the_status_has_the_counters_that_count_and_devices_seen_from_elsewhere(
    pinned: Pinned, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    devices = [inspection.Device(7, "eth0", roles.Role.UPLINK, "", "")]
    identity = argparse.Namespace(version="1", fingerprint="f", cgroup="/cg", refused="")
    monkeypatch.setattr(inspection, "pinned", lambda _root: identity)
    monkeypatch.setattr(inspection, "hooks", lambda _root, _identity: [])
    monkeypatch.setattr(inspection, "is_of_this_version", lambda _identity: True)
    monkeypatch.setattr(inspection, "agent", lambda _root: inspection.Agent(False, None))
    monkeypatch.setattr(inspection, "attached_devices", lambda _root, _netns: devices)
    shown = run(capsys, "status")
    assert "counters     none" in shown
    assert "another network namespace" not in shown
    key = tables.row_key(inventory.COUNTERS["refused"])
    pinned._rows["counters"][key] = (3).to_bytes(8, tables.BYTE_ORDER)
    devices[0] = devices[0]._replace(name="7")
    shown = run(capsys, "status")
    assert "counters     refused 3\n" in shown
    assert "(seen from another network namespace: device numbers)" in shown
    assert json.loads(run(capsys, "status", "json"))["counters"].keys() == inventory.COUNTERS.keys()
