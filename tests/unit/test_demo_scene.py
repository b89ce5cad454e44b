"""What the demo counts and draws, from intervals made up here."""

import argparse
import pathlib
from xml.etree import ElementTree

import pytest

from lbproxy import errors
from lbproxy.demo import command, picture, scene
from lbproxy.lab import cluster, traffic


def progress(t_ms: int, servers: dict[str, int], failures: dict[str, int] | None = None) -> traffic.Progress:
    failures = failures or {}
    return traffic.Progress(t_ms, 0, sum(servers.values()), sum(failures.values()), servers, failures)


@pytest.fixture
def shown() -> scene.Scene:
    return scene.Scene([scene.Backend("a", "n1"), scene.Backend("b", "n2")], title="shop")


def test_connections_are_counted_by_backend_and_time(shown: scene.Scene) -> None:
    shown.count(progress(50, {"a": 3, "b": 1}), 10.0)
    shown.count(progress(100, {"a": 1}), 10.05)
    shown.count(progress(150, {"b": 5}), 10.1)
    assert shown["a"].history == {0: 4}
    assert shown["b"].history == {0: 1, 1: 5}
    assert (shown.connections, shown.failed, shown.share(shown["a"])) == (10, 0, 0.4)


def test_a_backend_knows_when_it_was_last_seen_and_how_many_went_elsewhere_since(shown: scene.Scene) -> None:
    shown.count(progress(50, {"a": 3, "b": 1}), 10.0)
    for t_ms in (100, 150):
        shown.count(progress(t_ms, {"b": 7}), 10.0 + t_ms / 1000)
    leaving = shown["a"]
    assert (leaving.last_seen_s, leaving.passed_over) == (10.0, 14)
    leaving.forget()
    shown.count(progress(200, {"a": 1}), 11.0)
    assert (leaving.first_seen_s, leaving.passed_over) == (11.0, 0)


def test_a_rate_is_over_the_last_full_slots(shown: scene.Scene) -> None:
    for slot in range(8):
        shown.count(progress(slot * scene.SLOT_MS + scene.SLOT_MS, {"a": 10}), float(slot))
    assert shown.rate(shown["a"]) == 10 * 1000 / scene.SLOT_MS
    assert shown.rate(shown["b"]) == 0


@pytest.mark.parametrize(
    ("connections", "failures", "ok", "succeeded"),
    [(10, {}, True, True), (0, {}, True, False), (10, {"ETIMEDOUT": 1}, True, False), (10, {}, False, False)],
)
def test_success_is_traffic_without_failures_and_every_finding_as_it_should_be(
    shown: scene.Scene, connections: int, failures: dict[str, int], ok: bool, succeeded: bool
) -> None:
    shown.connections, shown.failures = connections, failures
    shown.findings.append(scene.Finding("it", "was found", ok))
    assert shown.succeeded is succeeded


@pytest.mark.parametrize("slots", [0, 1, 5, 6, 11, 400])
def test_a_history_keeps_its_sum_in_at_most_so_many_columns(slots: int) -> None:
    history = {slot: slot % 7 for slot in range(slots)}
    drawn = scene.condensed(history, slots, 5)
    assert len(drawn) <= 5
    width = -(-slots // 5) if slots else 1
    widths = [min(width, slots - first) for first in range(0, slots, width)]
    total = sum(value * columns for value, columns in zip(drawn, widths, strict=True))
    assert total == pytest.approx(sum(history.values()))


def test_whatever_is_not_nothing_shows_in_a_history() -> None:
    drawn = picture.history(scene.Backend("a", "n1", history={0: 1000, 2: 1, 3: 500}), 4, 1000.0, 10)
    assert drawn == "█ ▁▄"


def test_the_svg_is_whole_and_names_no_other_host(shown: scene.Scene, tmp_path: pathlib.Path) -> None:
    shown.count(progress(50, {"a": 3, "b": 1}), 10.0)
    shown.happened("b leaves")
    shown.findings.append(scene.Finding("Failed", "0"))
    path = tmp_path / "picture.svg"
    picture.save_svg(shown, path)
    text = path.read_text()
    assert "://" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "@import" not in text
    words = "".join(ElementTree.fromstring(text).itertext()).replace("\N{NO-BREAK SPACE}", " ")
    for expected in ("lbproxy demo", "a on n1", "b leaves", "4 connections", "0 failed"):
        assert expected in words


def arguments(screenshot: pathlib.Path | None = None) -> argparse.Namespace:
    return argparse.Namespace(seconds=None, plain=True, screenshot=screenshot)


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "missing_capabilities", lambda: ["root"])
    with pytest.raises(errors.AgentError, match="the demo needs root"):
        command.main(arguments())


def test_a_screenshot_that_can_not_be_written_is_refused_before_the_show(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(command, "_require", lambda: None)
    with pytest.raises(errors.ConfigError, match="no-folder"):
        command.main(arguments(tmp_path / "no-folder" / "picture.svg"))
