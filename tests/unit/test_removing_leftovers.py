"""What is done about what kube-proxy has left, where the kernel and its tools are stood in for."""

import errno
import os
import shutil
import socket
import typing

import pytest

from lbproxy import cli, errors, leftovers
from lbproxy.core import leftovers as core
from lbproxy.core import model, tables
from lbproxy.kernel import fake, ipvs, legacy_tables, nf_tables
from lbproxy.migrate import command as migrate
from tests import installing, serving
from tests.unit import test_outdated

SVC = "KUBE-SVC-NPX46M4PTMTKRN6Y"
NAT = {"PREROUTING": True, "KUBE-SERVICES": False, SVC: False}
ENTERED = nf_tables.Rule("PREROUTING", 4, "KUBE-SERVICES")
LED = nf_tables.Rule("KUBE-SERVICES", 5, SVC)


class Kernel:
    """The nat table of iptables-nft, and nothing else; `refusals` is what it says to each deletion first."""

    def __init__(self, patch: pytest.MonkeyPatch, *refusals: OSError) -> None:
        self.refusals = list(refusals)
        self.chains = dict(NAT)
        self.deleted: list[list[str]] = []
        for name, stand_in in (
            ("tables", lambda: [("ip", "nat")] if self.chains else []),
            ("generation", lambda: 1),
            ("has_chain", lambda *_: False),
            ("chains", lambda of, table: self.chains if (of, table) == ("ip", "nat") else {}),
            ("jumps", lambda *_: iter([ENTERED, LED])),
            ("delete_chains", self._delete_chains),
        ):
            patch.setattr(nf_tables, name, stand_in)
        patch.setattr(legacy_tables, "names", lambda _: [])
        patch.setattr(ipvs, "in_use", lambda: False)
        patch.setattr(shutil, "which", lambda _: None)

    def _delete_chains(
        self, _of: str, _table: str, own: list[str], _rules: typing.Iterable[nf_tables.Rule], _since: int
    ) -> None:
        if self.refusals:
            raise self.refusals.pop(0)
        self.deleted.append(list(own))
        self.chains = {"PREROUTING": True}


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def test_where_rules_change_it_is_asked_again_whether_kube_proxy_is_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = Kernel(monkeypatch, *(error(errno.ERESTART) for _ in range(2)))
    asked: list[str] = []

    def here() -> str:
        asked.append("")
        return "kube-proxy runs here (pid 7)" if len(asked) == 2 else ""

    done = leftovers.Cleanup(here)
    done.all()
    assert done.failed == ["nothing more is removed: kube-proxy runs here (pid 7)"]
    assert (kernel.deleted, done.removed) == ([], [])
    assert leftovers.present() == ["iptables-nft chains"]
    done = leftovers.Cleanup(here)
    done.all()
    assert len(asked) == 2
    assert done.removed == ["iptables-nft: 2 chains and 1 rules that lead to them"]
    assert (done.failed, kernel.deleted) == ([], [["KUBE-SERVICES", SVC]])
    assert leftovers.present() == []


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        (error(errno.EBUSY), "a map or rule of somebody else leads to a chain of kube-proxy's"),
        (error(errno.EPERM), "Operation not permitted"),
        (TimeoutError("timed out"), "timed out"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_why_something_stays_is_said(monkeypatch: pytest.MonkeyPatch, refusal: OSError, said: str) -> None:
    Kernel(monkeypatch, refusal)
    done = leftovers.Cleanup()
    done.all()
    (failure,) = done.failed
    assert failure.startswith(f"iptables-nft, table nat: {said}")
    assert done.removed == []


def legacy(monkeypatch: pytest.MonkeyPatch, version: str | None) -> list[str]:
    """Stand in for iptables-legacy's nat table, and for a plain iptables-restore of this version."""
    Kernel(monkeypatch).chains = {}
    ran: list[str] = []
    jumps = [legacy_tables.Jump("PREROUTING", 0, "KUBE-SERVICES")]

    def read(family: socket.AddressFamily, table: str) -> legacy_tables.Table:
        there = (family, table) == (socket.AF_INET, "nat")
        return legacy_tables.Table(NAT, jumps) if there else legacy_tables.Table({}, [])

    def output(argv: typing.Sequence[str], given: str = "") -> str:
        ran.append(argv[0])
        return version or "" if "--version" in argv else ""

    plain = ("iptables-save", "iptables-restore") if version else ()
    monkeypatch.setattr(legacy_tables, "read", read)
    monkeypatch.setattr(shutil, "which", lambda tool: tool if tool in plain else None)
    monkeypatch.setattr(leftovers, "_output", output)
    return ran


@pytest.mark.parametrize("version", [None, "iptables-restore v1.8.9 (nf_tables)"])
def test_rules_of_old_stay_and_what_that_means_is_said_where_no_tool_is_theirs(
    monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    ran = legacy(monkeypatch, version)
    done = leftovers.Cleanup()
    done.all()
    assert "iptables-save" not in ran
    (unable,) = done.unable
    assert unable == (
        "kube-proxy's rules of iptables-legacy stay, and a Service that is deleted stays reachable through "
        f"them, since iptables-legacy-restore can not be found here: {core.BY_HAND}"
    )
    assert leftovers.staying(leftovers.present()) == [unable]
    assert leftovers.removable(leftovers.present()) == []
    assert (done.removed, done.failed) == ([], [])


def test_a_tool_that_does_nothing_and_says_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    legacy(monkeypatch, "iptables-restore v1.8.9 (legacy)")
    done = leftovers.Cleanup()
    done.all()
    assert done.failed == ["iptables: kube-proxy's chains are still there, and it reports no error"]
    assert done.removed == []


V4, V6 = model.Family.IPV4, model.Family.IPV6


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ((), (), "have no Service yet: nobody would serve new flows"),
        ((V4,), (), "have no Service of IPv4 yet"),
        ((V4, V6), (V4,), "have no Service of IPv6 yet"),
        ((V4, V6), (), "have no Service of IPv4 and IPv6 yet"),
        ((V4,), (V4, V6), ""),
        ((), (V4,), ""),
        ((V4, V6), (V4, V6), ""),
    ],
)
@pytest.mark.parametrize("mode", ["iptables-nft", "nftables", "IPVS"])
def test_new_flows_are_left_to_rules_that_have_services_of_each_family(
    monkeypatch: pytest.MonkeyPatch,
    ours: tuple[model.Family, ...],
    theirs: tuple[model.Family, ...],
    said: str,
    mode: str,
) -> None:
    maps = fake.FakeMaps(installing.SIZES)
    for family in ours:
        address = installing.address("10.96.0.1" if family is V4 else "fd00:96::1")
        key = tables.FrontendKey(address, b"\0\x50", 6, tables.SCOPE_ADDRESS)
        maps.apply(
            [tables.Put(tables.Table.FRONTENDS, key.pack(), tables.Frontend(1, 1, 2, 0, 0, 0, 1).pack())]
        )
    Kernel(monkeypatch)
    names = {"ip" if family is V4 else "ip6" for family in theirs}

    def chains(of: str, table: str) -> dict[str, bool]:
        if of not in names:
            return {}
        if mode == "nftables" and table == "kube-proxy":
            return {"nat-prerouting": True, "service-ABCD-default/web/tcp/": False}
        return NAT if (mode, table) == ("iptables-nft", "nat") else {}

    monkeypatch.setattr(nf_tables, "chains", chains)
    monkeypatch.setattr(ipvs, "families", lambda: frozenset(theirs) if mode == "IPVS" else frozenset())
    problem = leftovers.lacking(maps)
    assert said in problem
    assert bool(problem) == bool(said)
    assert leftovers.serving() == frozenset(theirs)


def test_the_command_asks_what_the_agent_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    maps: typing.Any = fake.FakeMaps(installing.SIZES)
    # kube-proxy runs, and its first chains are there: that is not enough.
    monkeypatch.setattr(migrate, "read", lambda *_: typing.cast("typing.Any", object()))
    Kernel(monkeypatch)
    monkeypatch.setattr(nf_tables, "jumps", lambda *_: iter([ENTERED]))
    assert leftovers.present()
    args = cli._parsers()[0].parse_args(["migrate", "return", "--dry-run", "--bpffs", "/none"])
    with pytest.raises(errors.AgentError, match=r"have no Service yet.*start kube-proxy first"):
        migrate._return(args, maps)


class Legacy:
    """The nat table of iptables-legacy, which has the rules of one Service; and maps that serve that."""

    def __init__(self, patch: pytest.MonkeyPatch, *endpoints: str) -> None:
        self.looks = list(endpoints)  # whom the rules lead to, from one look to the next
        self.maps: typing.Any = fake.FakeMaps(installing.SIZES)
        made = installing.Installer(self.maps, serving.capacity())
        made.service("test/web", ["10.96.0.1"], [installing.endpoint("10.244.1.5")], port_name="")
        kernel = Kernel(patch)
        kernel.chains.clear()
        patch.setattr(legacy_tables, "read", self.read)
        patch.setattr(ipvs, "families", frozenset)
        patch.setattr(leftovers, "_CURRENT_PAUSE_S", 0)

    def read(self, family: socket.AddressFamily, _table: str) -> legacy_tables.Table:
        if family != socket.AF_INET:
            return legacy_tables.Table({}, [])
        endpoint = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        written = [(rule.chain, rule.target) for rule in test_outdated.written(endpoint)]
        rules = [("PREROUTING", "KUBE-SERVICES"), *written]
        jumps = [legacy_tables.Jump(chain, at, target) for at, (chain, target) in enumerate(rules)]
        return legacy_tables.Table({"PREROUTING": True, **{one.target: False for one in jumps}}, jumps)


def test_rules_of_old_that_are_of_another_time_are_nobody_to_leave_new_flows_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = Legacy(monkeypatch, "10.244.3.7")
    monkeypatch.setattr(leftovers, "_CURRENT_S", 0.01)
    assert leftovers.serving() == {V4}
    problem = leftovers.lacking(node.maps)
    assert problem.startswith("kube-proxy's rules are in iptables-legacy alone, and an earlier one's: for ")
    assert "test/web" in problem
    node.looks = ["10.244.1.5"]
    assert leftovers.lacking(node.maps) == ""


def test_what_kube_proxy_is_about_to_write_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "_CURRENT_S", 3600)
    node = Legacy(monkeypatch, *["10.244.3.7"] * 3, "10.244.1.5")
    assert leftovers.lacking(node.maps) == ""
    # Late again, with another endpoint at each look: somebody writes there.
    node.looks = [f"10.244.3.{number}" for number in range(1, 9)]
    assert leftovers.lacking(node.maps) == ""
    assert len(node.looks) > 1


def test_beside_rules_of_nf_tables_those_of_old_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Legacy(monkeypatch, "10.244.3.7")
    monkeypatch.setattr(
        nf_tables,
        "chains",
        lambda of, table: (
            {"nat-prerouting": True, "service-ABCD-test/web/tcp/": False}
            if (of, table) == ("ip", "kube-proxy")
            else {}
        ),
    )
    assert leftovers.lacking(node.maps) == ""
