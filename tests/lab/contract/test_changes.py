"""One service that keeps changing: after each change, every answer is soon kube-proxy's again."""

import collections.abc
import os
import pathlib
import random
import time

import pytest

from tests import polling
from tests.lab.contract import book, lots, playing, variants
from tests.lab.contract.book import LOCAL, REMOTE, Endpoint, Object
from tests.lab.contract.patterns import BOTH_LOCAL, PATTERNS

STEPS = 40 if os.environ.get("LBPROXY_CONTRACT") == "all" else 5
ANSWER_S = 2.0  # for an answer that may never come
PROXY_NAME = {"service.kubernetes.io/service-proxy-name": "another"}


@pytest.fixture(scope="module")
def player(load_program: pathlib.Path) -> collections.abc.Iterator[playing.Player]:
    with playing.Player([], load_program) as started:
        started.start(variants.VARIANTS["plain"])
        yield started


def become(player: playing.Player, scenario: book.Scenario, *, chance: random.Random | None = None) -> None:
    """Make the API server have these objects and no other Services and slices, in any order."""
    before = {_key(obj): obj for one in player.scenarios for obj in one.objects}
    after = {_key(obj): obj for obj in scenario.objects}
    changes = [(player.api.delete, obj) for key, obj in before.items() if key not in after]
    changes += [(player.api.put, obj) for key, obj in after.items() if before.get(key) != obj]
    if chance:
        chance.shuffle(changes)
    for change, obj in changes:
        change(obj)
    player.scenarios[:] = [scenario]


def soon_right(player: playing.Player, what: str) -> None:
    """Wait until all answers are as they should be."""
    deadline = time.monotonic() + polling.TIMEOUT_S
    while True:
        wrong = [str(one) for several in player.play(answer_s=ANSWER_S).values() for one in several]
        if not wrong:
            return
        assert time.monotonic() < deadline, f"{what}\n" + "\n".join(wrong)


def _key(obj: Object) -> tuple[str, ...]:
    return obj["kind"], obj["metadata"]["namespace"], obj["metadata"]["name"]


def page(name: str = "changing", **options: object) -> book.Scenario:
    """Write the service down, always with the same addresses."""
    return book.Book().add(name, "", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(2))
def test_anything_into_anything(player: playing.Player, seed: int) -> None:
    chance = random.Random(seed)
    drawn = [lots.one(book.Book(), chance, "changing") for _ in range(STEPS)]
    targets = list(dict.fromkeys(target for one in drawn for target in one.targets))
    for number, scenario in enumerate(drawn):
        scenario.targets[:] = targets
        become(player, scenario, chance=chance)
        soon_right(player, f"step {number}: {scenario.objects}")


def test_one_thing_after_another(player: playing.Player) -> None:
    both = PATTERNS["both"]
    whole = page(endpoints=both)
    moved = page(slices=[book.Slice([]), book.Slice(both)])
    steps = {
        "slices before their service (ES-10)": whole.objects[1:],
        "the service": whole.objects,
        "another proxy's (SEL-4)": page(endpoints=both, labels=PROXY_NAME).objects,
        "ours again": whole.objects,
        "no balancer address (LB-7)": page(endpoints=both, ingress=[]).objects,
        "endpoints in another slice (ES-11)": moved.objects,
        "and back": page(slices=[book.Slice(both), book.Slice([])]).objects,
        "policies (ETP-11)": page(endpoints=both, spec=BOTH_LOCAL).objects,
        "only remote": page(endpoints=[Endpoint(REMOTE)], spec=BOTH_LOCAL).objects,
        "local leaving (EP-9)": page(
            endpoints=[Endpoint(LOCAL, ready=False, terminating=True), Endpoint(REMOTE)], spec=BOTH_LOCAL
        ).objects,
        "none (REJ-1)": page(spec=BOTH_LOCAL).objects,
        "another NodePort": page(endpoints=both, ports=[book.HTTP.on(31234), book.DNS.on(31234)]).objects,
        "another type": page(endpoints=both, exposed=False).objects,
        "no service": whole.objects[1:],
        "the service again": whole.objects,
    }
    extra = [book.Target("NodePort", book.PLACES["n1"].ipv4, 31234, protocol) for protocol in ("TCP", "UDP")]
    for what, objects in steps.items():
        become(player, book.Scenario("changing", (), list(objects), [*whole.targets, *extra]))
        soon_right(player, what)


def test_a_nodes_zone(player: playing.Player) -> None:  # TOP-6, NODE-8
    become(player, page(endpoints=[Endpoint(LOCAL, zones=("b",)), Endpoint(REMOTE, zones=("a",))]))
    try:
        for zone in ("b", "c", "", "a"):
            player.move(zone)
            soon_right(player, f"zone {zone}")
    finally:
        player.move("a")
