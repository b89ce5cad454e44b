"""Who is ejected, for how long, and who never is."""

import contextlib
import math
import pathlib
import random
import time
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.core import decode, ejection, model, outcomes, outliers, service_annotations, topology
from tests import installing
from tests.unit import test_probe

HOW = ejection.Ejection()
GOOD, BAD, IDLE = (10, 0), (0, 10), (0, 0)  # connections that succeed and that fail, in a second


def place(host: int) -> topology.Place:
    return topology.Place(installing.address(f"10.244.0.{host}"), 8080)


class World:
    """Backends whose connections fare as a test says, looked at every second."""

    def __init__(self, count: int, how: ejection.Ejection = HOW) -> None:
        self.judge = outliers.Outliers(how)
        self.now_s = 1000.0
        self.totals = {place(host): [0, 0] for host in range(1, count + 1)}
        self.ids = {where: number for number, where in enumerate(self.totals, 1)}
        self.changes: list[outliers.Change] = []
        self.down: set[int] = set()  # by probes
        self.look()

    def look(self) -> None:
        samples = {
            where: outliers.Sample(
                self.ids[where],
                outcomes.Outcomes(established=good, refused=bad),
                self.ids[where] in self.down,
            )
            for where, (good, bad) in self.totals.items()
        }
        found = self.judge.look(samples, self.now_s)
        self.changes += found

    def second(self, *fared: tuple[int, int], seconds: int = 1) -> None:
        """Whoever is out gets no connections."""
        for _ in range(seconds):
            self.now_s += 1
            for where, (good, bad) in zip(self.totals, fared, strict=True):
                if where not in self.judge.ejected:
                    self.totals[where][0] += good
                    self.totals[where][1] += bad
            self.look()

    @property
    def out(self) -> list[int]:
        return sorted(where.address[-1] for where in self.judge.ejected)


def test_one_that_fails_is_out_for_its_time_and_then_back() -> None:
    world = World(3)
    world.second(GOOD, BAD, GOOD)
    assert world.out == [2]
    (change,) = world.changes
    assert change == outliers.Change(place(2), True, "10 of its last 10 connections failed", world.now_s + 30)
    world.second(GOOD, GOOD, GOOD, seconds=29)
    assert world.out == [2]
    world.second(GOOD, GOOD, GOOD)
    assert world.out == []
    assert world.changes[1:] == [outliers.Change(place(2), False, "its time is over")]


def test_who_fails_again_is_out_for_twice_as_long_and_up_to_a_bound() -> None:
    world = World(3, ejection.Ejection(base_s=10))
    took = []
    for _ in range(8):
        world.second(GOOD, BAD, GOOD)
        assert world.out == [2]
        took.append(round(world.changes[-1].until_s - world.now_s))
        world.second(GOOD, BAD, GOOD, seconds=took[-1])
        assert world.out == []
    assert took == [10, 20, 40, 80, 160, 320, 320, 320]
    # On trial one failure is enough; who has done well for as long begins anew.
    world.second(GOOD, GOOD, GOOD, seconds=400)
    world.second(GOOD, (6, 4), GOOD)
    assert world.out == []
    world.second(GOOD, BAD, GOOD)
    assert round(world.changes[-1].until_s - world.now_s) == 10


def test_on_trial_one_failure_is_enough() -> None:
    world = World(2)
    world.second(GOOD, BAD)
    world.second(GOOD, GOOD, seconds=30)
    world.second(GOOD, (0, 1))
    assert world.out == [2]


@pytest.mark.parametrize(
    ("fared", "out"),
    [
        ([GOOD, GOOD], []),
        ([BAD, BAD], []),
        ([GOOD, BAD], [2]),
        ([BAD], []),
        ([GOOD, BAD, BAD], []),  # by chance, where half of the others' fail
        ([(20, 0), (0, 20), (0, 20)], [3]),
        ([GOOD, GOOD, BAD, BAD], [3, 4]),
        ([(30, 0), (0, 30), (0, 30), (0, 30)], [3, 4]),
        ([BAD, BAD, BAD, BAD], []),
        ([GOOD, (96, 4)], []),  # too few
        ([GOOD, (95, 5)], []),  # too small a share
        ([GOOD, (12, 8)], [2]),
        ([(6, 4), (4, 6)], []),  # not clearly worse than the others
        ([IDLE, BAD], [2]),  # nothing speaks against the other one
        ([IDLE, (0, 9)], []),  # but nothing for it, either: twice as much is needed
    ],
)
def test_who_is_an_outlier(fared: list[tuple[int, int]], out: list[int]) -> None:
    world = World(len(fared))
    world.second(*fared)
    assert world.out == out


def test_failures_add_up_within_the_window_and_no_longer() -> None:
    world = World(2)
    world.second(GOOD, (0, 1), seconds=4)
    world.second(GOOD, IDLE, seconds=10)
    world.second(GOOD, (0, 1), seconds=4)
    assert world.out == []
    world.second(GOOD, (0, 1))
    assert world.out == [2]


def test_when_those_that_are_left_fail_too_all_are_back_until_something_is_known() -> None:
    world = World(2)
    world.second(GOOD, BAD)
    assert world.out == [2]
    world.second(BAD, BAD)
    assert world.out == []
    assert world.changes[-1].reason == "the others fail as well"
    # Alike for good: nobody is out.
    world.second(BAD, BAD, seconds=40)
    assert world.out == []
    # Only one of them goes on failing.
    world.second(BAD, GOOD, seconds=12)
    assert world.out == [1]


def test_a_backend_that_is_gone_or_another_one_begins_anew() -> None:
    world = World(3)
    world.second(GOOD, BAD, GOOD)
    gone = world.totals.pop(place(2))
    world.look()
    assert world.changes[-1] == outliers.Change(place(2), False, "it is not ready any more")
    world.totals[place(2)] = gone
    world.look()
    # The counts of another id at that place are no failures of a second.
    world.ids[place(2)] = 99
    world.totals[place(2)] = [0, 5000]
    world.look()
    assert world.out == []


def test_one_that_an_earlier_agent_ejected_is_out_for_the_first_time() -> None:
    judge = outliers.Outliers(HOW)
    judge.was_ejected(place(1), 100.0)
    samples = {place(host): outliers.Sample(host, outcomes.Outcomes()) for host in (1, 2)}
    assert judge.look(samples, 129.0) == []
    assert judge.look(samples, 130.0) == [outliers.Change(place(1), False, "its time is over")]


@pytest.mark.parametrize(("count", "rate", "share"), [(10, 10, 0.2), (20, 3, 0.2), (3, 5, 0.1)])
def test_where_all_fail_alike_by_chance_hardly_anybody_is_out(count: int, rate: int, share: float) -> None:
    """A minute of each of ten worlds; compared by their shares alone some 70 would be out."""
    ejections = 0
    for seed in range(10):
        chances = random.Random(seed)
        world = World(count)
        for _ in range(60):
            fared = []
            for _ in range(count):
                failed = sum(chances.random() < share for _ in range(rate))
                fared.append((rate - failed, failed))
            world.second(*fared)
        ejections += sum(change.ejected for change in world.changes)
    assert ejections <= 5


@pytest.mark.parametrize("share", [0.05, 0.2, 0.35])
def test_who_fails_for_good_among_others_that_sometimes_do_is_out_soon(share: float) -> None:
    chances = random.Random(7)
    world = World(10)
    for _ in range(5):
        failed = [sum(chances.random() < share for _ in range(10)) for _ in range(9)]
        world.second(*((10 - bad, bad) for bad in failed), BAD)
    assert world.out == [10]


@given(st.integers(1, 40), st.data(), st.sampled_from([0.01, 0.2, 0.5, 0.9, 0.999]))
def test_the_chance_is_a_binomial_one(attempts: int, data: st.DataObject, usual: float) -> None:
    failures = data.draw(st.integers(0, attempts))
    found = outliers.chance(attempts, failures, usual)
    exact = sum(
        math.comb(attempts, k) * usual**k * (1 - usual) ** (attempts - k)
        for k in range(failures, attempts + 1)
    )
    assert found == (1.0 if failures <= attempts * usual else pytest.approx(exact, rel=0.05))


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0, 1))
def test_the_chance_of_anything_is_one(attempts: int, failures: int, usual: float) -> None:
    assert 0 <= outliers.chance(attempts, failures, usual) <= 1 + 1e-6


@pytest.mark.parametrize("failing", [400, 1000])
def test_many_that_fail_at_once_take_no_time(failing: int) -> None:
    """Ten seconds of CPU time, once; it is some ten milliseconds."""
    count = 1000
    judge = outliers.Outliers(HOW)
    places = [topology.Place(installing.address(f"10.{n >> 8}.{n & 255}.1"), 80) for n in range(count)]

    def look(second: int) -> list[outliers.Change]:
        fared = [(0, 20 * second) if n < failing else (20 * second, 0) for n in range(count)]
        samples = {
            where: outliers.Sample(n, outcomes.Outcomes(established=good, refused=bad))
            for n, (where, (good, bad)) in enumerate(zip(places, fared, strict=True))
        }
        return judge.look(samples, float(second))

    look(1)
    began_s = time.process_time()
    changes = look(2)
    assert time.process_time() - began_s < 1
    assert len(changes) == (failing if failing < count // 2 else 0)


def test_who_is_down_by_probes_is_out_already() -> None:
    world = World(2)
    world.down = {1}
    world.second(IDLE, (28, 12), seconds=5)
    assert world.out == []
    world.down = set()
    world.second(GOOD, (28, 12))
    assert world.out == [2]
    # Now the other one is found down: nobody better is left.
    world.down = {1}
    world.second(IDLE, IDLE)
    assert world.out == []
    assert world.changes[-1].reason == "no other is left"


def test_who_is_down_by_probes_is_no_outlier_and_no_other() -> None:
    world = World(4)
    world.down = {1, 2}
    world.second(BAD, GOOD, GOOD, BAD)
    assert world.out == []  # half of them are out
    world = World(6)
    world.down = {1, 2}
    world.second(BAD, BAD, GOOD, GOOD, GOOD, BAD)
    assert world.out == [6]


def test_counts_that_go_back_begin_anew() -> None:
    """A table that grows is copied while others still write to it, and read here a moment later."""
    world = World(2)
    world.second(GOOD, (90, 3))
    world.totals[place(2)] = [85, 2]
    world.second(GOOD, IDLE)
    assert world.out == []
    world.second(GOOD, (6, 4))
    assert world.out == []
    world.second(GOOD, BAD)
    assert world.out == [2]


_FARED = st.tuples(st.integers(0, 20), st.integers(0, 20))


@given(st.integers(1, 7), st.integers(1, 100), st.data())
def test_whatever_happens_the_bound_holds(count: int, share: int, data: st.DataObject) -> None:
    world = World(count, ejection.Ejection(failures=2, share_percent=share, window_s=2, base_s=2))
    most = max(1, count * share // 100)
    for _ in range(data.draw(st.integers(1, 12))):
        before = len(world.changes)
        world.second(*(data.draw(_FARED) for _ in range(count)))
        assert len(world.out) <= min(most, count - 1)
        for change in world.changes[before:]:
            assert not change.ejected or world.now_s < change.until_s <= world.now_s + 2 * 32
    # Each place goes out and comes back in turns.
    for where in world.totals:
        turns = [change.ejected for change in world.changes if change.place == where]
        assert turns == [bool(1 - number % 2) for number in range(len(turns))]


@given(st.lists(_FARED, min_size=2, max_size=6), st.randoms())
def test_the_order_of_backends_does_not_matter(fared: list[tuple[int, int]], shuffled: typing.Any) -> None:
    world, other = World(len(fared)), World(len(fared))
    items = list(other.totals.items())
    shuffled.shuffle(items)
    world.second(*fared)
    other.totals = dict(items)
    other.second(*(fared[where.address[-1] - 1] for where in other.totals))
    assert world.out == other.out


# --- the annotation ---


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("on", ejection.Ejection()),
        (" on ", ejection.Ejection()),
        ("On", ejection.Ejection()),
        ("true", ejection.Ejection()),
        ("off", None),
        ("False", None),
        ("failures=10, share=30%,window=1m,base=2m", ejection.Ejection(10, 30, 60.0, 120.0)),
        ("share=100%", ejection.Ejection(share_percent=100)),
        ("clients=all,failures=9", ejection.Ejection(9, clients=ejection.Clients.ALL)),
        ("clients=node", ejection.Ejection()),
    ],
)
def test_what_is_understood(text: str, said: ejection.Ejection | None) -> None:
    assert ejection.parse(text) == said


@pytest.mark.parametrize("name", ["failures", "share", "window", "base"])
def test_the_table_says_the_bounds(name: str) -> None:
    inside, outside = test_probe.bounds(ejection.SETTINGS[name].help)
    for text in inside:
        ejection.parse(f"{name}={text}")
    for text in outside:
        with pytest.raises(ejection.EjectionError):
            ejection.parse(f"{name}={text}")


@pytest.mark.parametrize(
    "text",
    [
        "", "yes", "on,share=10%", "failures", "failures=", "failures=0", "failures=-1", "failures=1.5",
        "share=0%", "share=50", "share=101%", "window=1s", "window=10", "window=10m", "base=0s", "base=2h",
        "failures=5,failures=6", "clients=", "clients=outside", "clients=node|all", "Failures=5",
        "failures=٣",
    ],
)  # fmt: skip
def test_what_is_not_understood_switches_nothing_on(text: str) -> None:
    with pytest.raises(ejection.EjectionError):
        ejection.parse(text)
    found = decode.service(
        {
            "metadata": {"name": "web", "annotations": {service_annotations.EJECTION_ANNOTATION: text}},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]},
        }
    )
    assert isinstance(found.value, model.Service)
    assert found.value.ejection is None
    (warning,) = found.warnings
    assert warning.startswith(f"metadata.annotations[{service_annotations.EJECTION_ANNOTATION}]: ")
    assert warning.endswith(": no backend is ejected")


def test_the_defaults_are_those_that_the_table_says() -> None:
    said = ",".join(f"{name}={setting.default}" for name, setting in ejection.SETTINGS.items())
    assert ejection.parse(said) == ejection.Ejection()


def test_the_documentation_has_the_table() -> None:
    page = (pathlib.Path(__file__).parents[2] / "docs" / "health.md").read_text()
    for name, setting in ejection.SETTINGS.items():
        assert f"| `{name}` | {setting.default} | {setting.help} |\n" in page


@given(st.text())
def test_any_text_is_an_answer_or_an_error(text: str) -> None:
    with contextlib.suppress(ejection.EjectionError):
        found = ejection.parse(text)
        assert found is None or 1 <= found.share_percent <= 100
