"""`lbproxy migrate` on a node, but for its kernel: when it refuses, and what it asks of the agent."""

import argparse
import collections.abc
import contextlib
import threading
import typing

import pytest

from lbproxy import cli, errors, leftovers, noting
from lbproxy.core import inventory, notes, tables
from lbproxy.kernel import anchor, fake, inspection, ipvs
from lbproxy.migrate import command as migrate
from lbproxy.migrate import handover, taking_over
from tests import installing
from tests.unit import test_handover

RULES = "nftables table ip kube-proxy"


class Node:
    """A node with rules of kube-proxy's, whose agent is a thread."""

    def __init__(self) -> None:
        self.kernel = fake.FakeMaps(installing.SIZES)
        self.noted = notes.NOTHING
        self.rules = [RULES]
        self.flows: dict[str, int] = {}
        self.keeper = test_handover.Keeper()
        self.removed_when: list[tuple[bool, ...]] = []  # whether the anchor was there, and RETURN
        self.removed: list[str] = []
        self.kept: list[str] = []
        self.failed: list[str] = []
        self.unable: list[str] = []

    def all(self) -> None:
        """What `leftovers.Cleanup` does."""
        returning = inventory.is_set(self.kernel, tables.Handover.RETURN)
        self.removed_when.append((self.keeper.there[-1], returning))
        self.removed, self.rules = self.rules, []

    @contextlib.contextmanager
    def agent(self) -> collections.abc.Iterator[None]:
        """It looks whether somebody asks for something."""
        made = handover.HandOver(self.kernel, entries=lambda: iter(()), keeper=test_handover.Keeper())
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(0.001):
                made.resume(asked=False)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    found = Node()
    replaced: list[tuple[typing.Any, str, object]] = [
        (leftovers, "Cleanup", lambda *_: found),
        (leftovers, "present", lambda: list(found.rules)),
        (leftovers, "unseen", list),
        (ipvs, "look", lambda *_: None),
        (anchor, "Keeper", lambda: found.keeper),
        (anchor, "exists", lambda: False),
        (taking_over, "kube_proxies", list),
        (taking_over, "flows", lambda _: taking_over.Flows(found.flows, {})),
        (inspection, "open_maps", lambda _: found.kernel),
        (inspection, "agent", lambda _: inspection.Agent(running=True, pid=1)),
        (noting, "read", lambda _: found.noted),
    ]
    for where, name, value in replaced:
        monkeypatch.setattr(where, name, value)
    monkeypatch.setattr(found.kernel, "close", lambda: None, raising=False)
    return found


def parsed(*given: str) -> argparse.Namespace:
    return cli._parsers()[0].parse_args(["migrate", *given, "--bpffs", "/none"])


def test_rules_stay_where_lbproxy_does_not_serve_all(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.noted = notes.Notes(unserved=("the packet path is off: no TCX", "services: full"))
    with pytest.raises(errors.AgentError, match=r"off: no TCX; services: full\. --force removes"):
        migrate.main(parsed("take-over"))
    assert node.rules
    assert migrate.main(parsed("status")) == 0
    assert "not all of it: the packet path is off: no TCX; services: full" in capsys.readouterr().out
    assert migrate.main(parsed("take-over", "--force")) == 0
    assert not node.rules


@pytest.mark.parametrize("how", [[], ["--dry-run"]])
def test_that_nothing_was_to_be_removed_is_said_and_only_then(
    node: Node, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: list[str]
) -> None:
    nothing = "nothing of kube-proxy's is there to be removed"
    monkeypatch.setattr(leftovers, "kept", lambda: list(node.kept))

    def said() -> list[str]:
        assert migrate.main(parsed("take-over", *how)) == (1 if node.unable and not how else 0)
        return capsys.readouterr().out.splitlines()

    assert any(RULES in line for line in said())
    node.rules = []
    assert said().count(nothing) == 1
    # Also where something of it is not to be removed.
    node.kept = ["iptables-nft, table nat: KUBE-MARK-MASQ"]
    lines = said()
    assert lines.count(nothing) == 1
    assert any(line.endswith(node.kept[0]) for line in lines)
    # But not where something ought to go, and nothing here can remove it.
    node.unable = ["kube-proxy's rules of iptables-legacy stay"]
    monkeypatch.setattr(leftovers, "staying", lambda _: list(node.unable))
    assert nothing not in said()


def test_translation_is_kept_before_anything_is_removed(node: Node) -> None:
    node.flows = {"TCP": 1}
    assert migrate.main(parsed("take-over")) == 0
    assert node.removed_when == [(True, False)]
    assert node.keeper.there == [True, True]
    node.flows = {}
    assert migrate.main(parsed("take-over")) == 0
    assert node.keeper.there[-1] is False
    node.keeper.problem, node.flows, node.rules = "no nf_tables", {"TCP": 1}, [RULES]
    with pytest.raises(errors.AgentError, match="no nf_tables"):
        migrate.main(parsed("take-over"))
    assert node.rules


def test_the_agent_is_had_to_begin_flows_before_rules_go(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.kernel.apply([tables.handover(tables.Handover.RETURN, tables.Return.YES)])
    with node.agent():
        assert migrate.main(parsed("take-over")) == 0
    assert node.removed_when == [(True, False)]

    node.rules = [RULES]
    node.kernel.apply([tables.handover(tables.Handover.RETURN, tables.Return.YES)])
    monkeypatch.setattr(taking_over, "RESUME_S", 0.01)
    with pytest.raises(errors.AgentError, match="has not ended `return` within"):
        migrate.main(parsed("take-over"))
    assert node.rules
    assert inventory.is_set(node.kernel, tables.Handover.RETURN)
