"""`lbproxy migrate take-over` and `return` for programs: one JSON value, whatever comes of it."""

import json
import types
import typing

import pytest

from lbproxy import cli as command
from lbproxy import leftovers
from lbproxy.kernel import fake, inspection
from lbproxy.migrate import command as migrate
from lbproxy.migrate import taking_over
from tests import installing

FOUND = {
    "agent_running": True,
    "learning": False,
    "unserved": [],
    "ipvs_mode": None,
    "not_removable": ["iptables-legacy"],
    "returning": True,
    "kube_proxy_running": True,
    "kube_proxy_rules": ["table ip kube-proxy"],
    "not_looked_for": [],
    "flows_of_kube_proxy": {"TCP": 3},
    "flows_of_lbproxy": {"UDP": 2},
}
KEPT = "iptables-nft, table nat: KUBE-MARK-MASQ, since rules in PREROUTING use that"
TAKEN_OVER = {
    "removed": ["table ip kube-proxy"],
    "resumed": True,
    "flows_of_kube_proxy": {"TCP": 3},
    "kept": [KEPT],
    "problems": ["iptables-legacy"],
}
GIVEN_BACK = {"flows_of_lbproxy": {"UDP": 2}, "problem": ""}


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = fake.FakeMaps(installing.SIZES)
    monkeypatch.setattr(kernel, "close", lambda: None, raising=False)
    monkeypatch.setattr(inspection, "open_maps", lambda _: kernel)
    monkeypatch.setattr(migrate, "read", lambda *_: types.SimpleNamespace(**FOUND))
    monkeypatch.setattr(taking_over, "kube_proxies", list)
    monkeypatch.setattr(taking_over, "flows", lambda _: taking_over.Flows({"TCP": 3}, {}))
    removed = taking_over.Removed(("table ip kube-proxy",), (), ("iptables-legacy",), (), (KEPT,))
    monkeypatch.setattr(leftovers, "kept", lambda: [KEPT])
    monkeypatch.setattr(taking_over, "take_over_beside", lambda _: removed)
    monkeypatch.setattr(taking_over, "give_back", lambda _: taking_over.Returned(5, ""))


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["take-over", "--dry-run"], 0, {**TAKEN_OVER, "dry_run": True}),
        (["take-over"], 1, {**TAKEN_OVER, "dry_run": False}),
        (["return", "--force", "--dry-run"], 0, {**GIVEN_BACK, "dry_run": True, "reserved_ports": 0}),
        (["return", "--force"], 0, {**GIVEN_BACK, "dry_run": False, "reserved_ports": 5}),
    ],
)
def test_what_is_done_and_what_would_be_is_json_for_whoever_wants_it(
    capsys: pytest.CaptureFixture[str], argv: list[str], status: int, said: dict[str, typing.Any]
) -> None:
    assert command.main(["migrate", *argv, "-o", "json"]) == status
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in said} == said
    assert command.main(["migrate", *argv]) == status
    told = capsys.readouterr()
    assert all(what in told.out for what in said.get("kept", ()))
    assert all(what in told.out + told.err for what in said.get("problems", ()))
    assert told.out


def test_looking_takes_no_flags_that_are_for_doing(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["migrate", "status", "--dry-run", "--force"]) == 2
    assert capsys.readouterr().err.count("lbproxy migrate status changes nothing") == 2
