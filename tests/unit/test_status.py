"""What `lbproxy status` makes of what it has read."""

import pathlib
import types
import typing

import pytest

from lbproxy import kernel_clock
from lbproxy.bundle import items as bundle_items
from lbproxy.commands import status
from lbproxy.core import notes


def test_rejections_of_an_agent_that_is_gone_are_told_as_what_it_knew() -> None:
    found = tuple(notes.Rejected("Service", f"default/s{number}", "bad") for number in range(8))
    now, then = (list(status._rejected(notes.Notes(rejected=found), runs)) for runs in (True, False))
    assert now[0].startswith("Service default/s0 is rejected")
    assert now[-1].startswith("and 2 more objects are rejected")
    assert then == [f"when the agent ended: {line}" for line in now]


def test_the_uptime_in_a_bundle_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a time namespace has another clock."""
    nobody = types.SimpleNamespace(running=False, pid=None)
    node = types.SimpleNamespace(root=pathlib.Path("/nowhere"), agent=nobody, arguments=())

    def uptime_s() -> int:
        about = bundle_items._about(typing.cast(bundle_items.Node, node))
        return typing.cast("dict[str, int]", about)["uptime_s"]

    before_s = uptime_s()
    monkeypatch.setattr(kernel_clock, "offset_ns", lambda: 10**15)
    assert before_s - 10**6 <= uptime_s() < before_s - 10**6 + 1000
