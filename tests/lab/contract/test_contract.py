"""Hundreds of services, dialled from everywhere: each answer must be kube-proxy's.

See `book` for the cluster, `scenarios` for what is in it, `oracle` for what kube-proxy
does, `judging.EXPLAINED` for what is not as there, on purpose.
`LBPROXY_CONTRACT=all` plays every scenario in the plain configuration, as `make contract`
does; the suite plays one in five there, and those of the other configurations.
"""

import collections.abc
import os
import pathlib

import pytest

from tests.lab.contract import book, judging, playing, scenarios, variants

WHOLE = os.environ.get("LBPROXY_CONTRACT") == "all"
EVERY = 5
WRITTEN = scenarios.whole()
PLAIN = [one for index, one in enumerate(WRITTEN) if WHOLE or index % EVERY == 0]


class Results:
    """What came of each variant, played when it is first asked for."""

    def __init__(self, player: playing.Player) -> None:
        self._player = player
        self._found: dict[str, dict[str, list[judging.Mismatch]]] = {}

    def of(self, variant: str, scenario: str) -> list[judging.Mismatch]:
        if variant not in self._found:
            self._player.start(variants.VARIANTS[variant])
            self._found[variant] = self._player.play(played(variant))
        return self._found[variant][scenario]


def played(variant: str) -> list[book.Scenario]:
    """Return the scenarios of a variant: in the suite those drawn by lot only in the plain one."""
    if variant == "plain":
        return PLAIN
    return [one for one in WRITTEN if variant in one.variants and (WHOLE or one.ids)]


@pytest.fixture(scope="module")
def results(load_program: pathlib.Path) -> collections.abc.Iterator[Results]:
    with playing.Player(WRITTEN, load_program) as player:
        yield Results(player)


@pytest.mark.parametrize(
    ("variant", "scenario"),
    [(variant, scenario.name) for variant in variants.VARIANTS for scenario in played(variant)],
)
def test_every_answer_is_kube_proxys(results: Results, variant: str, scenario: str) -> None:
    mismatches = results.of(variant, scenario)
    assert not mismatches, "\n" + "\n".join(str(one) for one in mismatches)
