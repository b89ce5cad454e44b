"""What becomes of a growth that fails, before and after the programs were switched."""

import asyncio
import dataclasses
import pathlib
import types
import typing

import pytest

from lbproxy import errors, gate, growing

SIZES, ROWS = {"slots": 8}, {"slots": 4}
TRIES = 3


class Enough(Exception):  # noqa: N818 - how the test ends what runs for ever
    """So often was it told that tables stay full."""


@dataclasses.dataclass
class MapRows:
    slots: int = 4


class Steps:
    """The parts of a growth, of which one may fail; and what is done, in order."""

    def __init__(self, failing: str) -> None:
        self.failing = failing
        self.done: list[str] = []

    def step(self, name: str) -> typing.Callable[..., str]:
        def take(*_args: object) -> str:
            self.done.append(name)
            if self.done.count("stays_full") == TRIES:
                raise Enough
            if name == self.failing:
                raise OSError(12, "Cannot allocate memory")
            return name

        return take

    async def run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kernel = types.SimpleNamespace(reopen=self.step("reopen"))
        control = types.SimpleNamespace(grown=self.step("grown"), stays_full=self.step("stays_full"))
        found = types.SimpleNamespace(prepare=self.step("prepare"), take_over=self.step("take_over"))
        place = types.SimpleNamespace(look=lambda: "", visible=self.failing != "cgroup", path=pathlib.Path())
        settings = types.SimpleNamespace(map_growth_limit=2, map_rows=MapRows())
        parts: list[typing.Any] = [settings, place, found, kernel, control, None, gate.Gate(), int]
        made = growing.Growing(*parts)
        monkeypatch.setattr(growing, "_CHECK_S", 0)
        monkeypatch.setattr(made, "_look", lambda: made._grow(SIZES, ROWS))
        await made.run()


@pytest.mark.parametrize("failing", ["take_over", "reopen", "grown"])
def test_one_that_fails_half_way_ends_the_agent(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which maps the programs use is not known then, and only a start finds out."""
    steps = Steps(failing)
    with pytest.raises(growing.HalfGrown, match=r"ending, to finish it: .*Cannot allocate memory"):
        asyncio.run(steps.run(monkeypatch))
    assert steps.done[-1] == failing
    assert issubclass(growing.HalfGrown, errors.LbproxyError)


def test_none_begins_while_the_cgroup_is_not_to_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs could not be switched, which would end the agent."""
    steps = Steps("cgroup")
    monkeypatch.setattr(growing, "_RETRY_S", 0)
    with pytest.raises(Enough):
        asyncio.run(steps.run(monkeypatch))
    assert steps.done == ["stays_full"] * TRIES


def test_one_that_can_not_be_prepared_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps("prepare")
    monkeypatch.setattr(growing, "_RETRY_S", 0)
    with pytest.raises(Enough):
        asyncio.run(steps.run(monkeypatch))
    assert steps.done == ["prepare", "stays_full"] * TRIES
