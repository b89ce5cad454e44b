"""When the proxy counts as healthy, and what it says then (contract HZ-1 to HZ-6)."""

import json
from typing import Any

import pytest

from lbproxy.core import healthz

PERIOD_S = 30.0
WALL_S = 1_700_000_000.25
NOW_TEXT = "2023-11-14T22:13:20.250000Z"


@pytest.fixture
def health() -> healthz.ProxyHealth:
    return healthz.ProxyHealth(PERIOD_S)


def at(monotonic_s: float) -> healthz.Moment:
    return healthz.Moment(monotonic_s, WALL_S)


def said(answer: healthz.Answer) -> dict[str, Any]:
    body = json.loads(answer.body)
    assert isinstance(body, dict)
    return body


def test_idle_time_alone_is_healthy(health: healthz.ProxyHealth) -> None:
    health.synced(0)
    assert health.healthy(1e9)


def test_a_change_that_waits_for_two_periods_is_not(health: healthz.ProxyHealth) -> None:
    health.synced(0)
    health.queued(100)
    assert health.healthy(159.9)
    assert not health.healthy(160)


def test_the_oldest_change_counts(health: healthz.ProxyHealth) -> None:
    health.synced(0)
    health.queued(100)
    health.queued(159)
    assert not health.healthy(160)


def test_a_success_makes_it_healthy_again(health: healthz.ProxyHealth) -> None:
    health.synced(0)
    health.queued(100)
    health.synced(500)
    assert health.healthy(1000)
    health.queued(1000)
    assert health.healthy(1059)


def test_it_is_healthy_before_the_first_success(health: healthz.ProxyHealth) -> None:
    health.queued(0)
    assert health.healthy(1e6)
    answer = healthz.livez(health, at(1e6))
    assert answer.status == 200
    assert "status" not in said(answer)


@pytest.mark.parametrize(
    ("ready", "eligible", "late", "status", "healthy"),
    [
        (True, True, False, 200, True),
        (False, True, False, 503, False),
        (True, False, False, 503, True),
        (True, True, True, 503, False),
    ],
)
def test_healthz_wants_all_three(
    health: healthz.ProxyHealth, ready: bool, eligible: bool, late: bool, status: int, healthy: bool
) -> None:
    health.synced(0)
    health.queued(10)
    answer = healthz.healthz(
        health, at(100 if late else 20), ready=ready, ineligible="" if eligible else "it goes"
    )
    assert answer.status == status
    assert said(answer)["healthy"] is healthy
    assert said(answer)["nodeEligible"] is eligible


def test_livez_does_not_ask_for_the_node(health: healthz.ProxyHealth) -> None:
    health.synced(0)
    body = said(healthz.livez(health, at(1), ["a reason"]))
    assert "nodeEligible" not in body
    assert body["reasons"] == ["a reason"]


def test_last_updated_is_now_while_all_is_well(health: healthz.ProxyHealth) -> None:
    health.synced(10)
    body = said(healthz.healthz(health, at(15), ready=True, ineligible=""))
    synced_text = "2023-11-14T22:13:15.250000Z"
    assert body["lastUpdated"] == body["currentTime"] == NOW_TEXT
    family = {"lastUpdated": synced_text, "healthy": True}
    assert body["status"] == {"IPv4": family, "IPv6": family}
    assert body["reasons"] == []


def test_last_updated_is_the_last_success_otherwise(health: healthz.ProxyHealth) -> None:
    health.synced(10)
    body = said(healthz.healthz(health, at(15), ready=True, ineligible="it goes"))
    assert body["lastUpdated"] == "2023-11-14T22:13:15.250000Z"
    assert body["currentTime"] == NOW_TEXT
    assert body["reasons"] == ["it goes"]


def test_last_updated_is_gos_zero_time_where_nothing_ever_succeeded(health: healthz.ProxyHealth) -> None:
    body = said(healthz.healthz(health, at(15), ready=False, ineligible=""))
    assert body["lastUpdated"] == "0001-01-01T00:00:00Z"


def test_the_reason_says_how_long_changes_have_waited(health: healthz.ProxyHealth) -> None:
    health.synced(0)
    health.queued(10)
    answer = healthz.livez(health, at(85))
    assert answer.status == 503
    body = said(answer)
    assert "75 s" in body["reasons"][0]
    assert body["status"]["IPv4"]["healthy"] is False
