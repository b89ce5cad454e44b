"""Until when new flows stay with another proxy, and what is said meanwhile."""

import asyncio
import collections.abc
import logging
import typing

import pytest

from lbproxy import errors, gate
from lbproxy.migrate import new_flows
from tests import virtual_time


class HandOver:
    """A hand-over that fails so many times before it succeeds."""

    def __init__(self, *failures: str) -> None:
        self._failures = list(failures)
        self.calls: list[str] = []
        self.returning = self.unfinished = False

    def finish(self) -> None:
        self._call("finish")

    def resume(self, *, asked: bool) -> bool:
        self._call("resume", asked)
        self.returning = self.unfinished = False
        return True

    def started(self) -> None:
        self.calls.append("started")

    async def run(self) -> typing.NoReturn:
        self.calls.append("run")
        await asyncio.Event().wait()
        raise AssertionError

    def _call(self, *what: object) -> None:
        self.calls.append(" ".join(map(str, what)))
        if self._failures:
            raise errors.AgentError(self._failures.pop(0))


class Control:
    """What of a controller is told, and told to others."""

    def __init__(self) -> None:
        self.complete, self.ready = asyncio.Event(), asyncio.Event()
        self.handover_problem = self.return_notice = ""
        self.problems: list[str] = []

    def devices_served(self) -> None:
        self.ready.set()

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "handover_problem" and hasattr(self, "problems"):
            self.problems.append(str(value))


Story = collections.abc.Callable[[Control, asyncio.Event], collections.abc.Coroutine[object, object, None]]


def run(hand_over: HandOver, story: Story, *, left: bool) -> None:
    """Have both tasks run while the story is told."""

    async def tell() -> None:
        control, attached = Control(), asyncio.Event()
        tested = new_flows.NewFlows(
            typing.cast(typing.Any, hand_over), typing.cast(typing.Any, control), gate.Gate()
        )
        running = [
            asyncio.create_task(one) for one in (tested.begin(attached, left=left), tested.watch_return())
        ]
        await story(control, attached)
        for task in running:
            task.cancel()

    virtual_time.run(tell)


def test_they_begin_once_devices_and_services_are_there_and_the_others_known(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hand_over = HandOver("the tracker is busy", "the tracker is busy")

    async def story(control: Control, attached: asyncio.Event) -> None:
        control.complete.set()
        await asyncio.sleep(60)
        assert hand_over.calls == []
        attached.set()
        await asyncio.sleep(4)
        assert not control.ready.is_set()
        assert control.handover_problem.endswith(": the tracker is busy")
        await asyncio.sleep(60)
        assert control.ready.is_set()
        assert control.handover_problem == ""

    run(hand_over, story, left=True)
    assert hand_over.calls == ["finish"] * 3 + ["started", "run"]
    [said] = [one.message for one in caplog.records if one.levelno >= logging.ERROR]
    assert said.endswith("the tracker is busy; not ready until that is known, tried again every 5 s")


def test_at_once_where_none_were_left_to_anybody() -> None:
    hand_over = HandOver()

    async def story(control: Control, attached: asyncio.Event) -> None:
        attached.set()
        control.complete.set()
        await asyncio.sleep(1)
        assert control.ready.is_set()

    run(hand_over, story, left=False)
    assert hand_over.calls == ["started", "run"]


def test_a_return_is_told_of_and_ended_when_somebody_asks(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    hand_over = HandOver("no room")

    async def story(control: Control, attached: asyncio.Event) -> None:
        attached.set()
        control.complete.set()
        hand_over.returning = True
        await asyncio.sleep(10)
        assert "resume False" not in hand_over.calls
        assert control.return_notice
        hand_over.unfinished = True
        await asyncio.sleep(10)
        assert control.return_notice == control.handover_problem == ""
        assert [one for one in control.problems if one] == [
            "new flows from outside stay with the other proxy: no room"
        ]

    run(hand_over, story, left=False)
    assert hand_over.calls == ["started", "run", "resume False", "resume False", "started"]
    said = [one.message for one in caplog.records if one.name == new_flows.__name__]
    assert [line.split(",")[0] for line in said] == [
        "new connections are left to kube-proxy",
        "new flows from outside stay with the other proxy: no room; tried again every 1 s",
        "new connections are lbproxy's again",
    ]
