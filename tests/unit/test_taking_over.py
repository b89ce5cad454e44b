"""Giving a node back: ports are kept from kube-proxy before it begins anything."""

from collections.abc import Iterable

import pytest

from lbproxy import flow_table
from lbproxy.core import conntrack, tables
from lbproxy.kernel import conntrack as tracker
from lbproxy.kernel import fake
from lbproxy.migrate import taking_over
from tests import serving

STATE = int(tables.FlowState.REPLIED | tables.FlowState.ASSURED)
SETTINGS = tables.NO_SETTINGS._replace(tcp_established_ticks=86_400)
RETURN = tables.row_key(int(tables.Handover.RETURN))


class Busy:
    """A node on which flows go on beginning until it is given back: so many while ports are entered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *begin: int) -> None:
        self.kernel = fake.FakeMaps(serving.sizes(flows=4096))
        self.kernel.apply([tables.Put(tables.Table.SETTINGS, tables.row_key(0), SETTINGS.pack())])
        self.rounds: list[tuple[int, bool]] = []  # how many were entered, and whether it was given back
        self._begin = list(begin)
        self._flows = 0
        self._begins(100)
        monkeypatch.setattr(tracker, "reserve", self._reserve)
        monkeypatch.setattr(flow_table, "tick", lambda: 1000)

    def _begins(self, count: int) -> None:
        for _ in range(count):
            self._flows += 1
            port = self._flows.to_bytes(2, "big")
            key = tables.FlowKey(bytes(16), bytes(16), b"\x1f\x90", port, 6, 0)
            row = tables.Flow(bytes(16), b"\x1f\x90", port, 0, 1000, bytes(3), STATE)
            self.kernel.apply([tables.Put(tables.Table.FLOWS, key.pack(), row.pack())])

    @property
    def _returned(self) -> bool:
        return any(self.kernel.row(tables.Table.HANDOVER, RETURN) or b"")

    def _reserve(self, flows: Iterable[conntrack.Reserved]) -> int:
        self.rounds.append((len(list(flows)), self._returned))
        if self._begin and not self._returned:
            self._begins(self._begin.pop(0))
        return self.rounds[-1][0]


def test_what_has_begun_is_entered_before_kube_proxy_begins_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Busy(monkeypatch, 50, 20, 3, 1)
    assert taking_over.give_back(busy.kernel) == taking_over.Returned(174, "")
    assert busy.rounds == [(100, False), (50, False), (20, False), (3, False), (1, True)]


def test_where_many_go_on_to_begin_it_is_given_back_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Busy(monkeypatch, *[50] * 100)
    assert not taking_over.give_back(busy.kernel).problem
    assert [returned for _, returned in busy.rounds] == [False] * 5 + [True]
