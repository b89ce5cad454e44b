"""The loop that makes probes: how many at a time, how many a second, and what becomes of results."""

import asyncio
import collections
import logging
import random
import typing
from collections.abc import Awaitable, Callable

import pytest

from lbproxy.core import events, health, model, probe, probing, topology
from lbproxy.probes import asking, prober
from tests import virtual_time
from tests.unit import test_probing

OFTEN = probe.Probe(probe.Kind.TCP, interval_s=5.0, rise=1, fall=1, jitter=0.0)
PASSED, FAILED = probing.Result(passed=True), probing.Result(passed=False, reason="refused")


class Answers:
    """Backends that answer after so many seconds; counts how many are asked at a time."""

    def __init__(self, after_s: float = 0.001) -> None:
        self.after_s = after_s
        self.result = PASSED
        self.asked: list[float] = []
        self.running = self.most = 0

    async def __call__(self, _target: probing.Target) -> asking.Asked:
        self.asked.append(asyncio.get_running_loop().time())
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.after_s)
        self.running -= 1
        return asking.Asked(self.result, self.after_s)


class Bench:
    """A prober of so many backends, in virtual time."""

    def __init__(self, backends: int, answers: Answers, most: int = 64) -> None:
        self.answers = answers
        self.counted: collections.Counter[tuple[probe.Kind, bool]] = collections.Counter()
        self.said: list[probing.Change] = []
        self.book = health.HealthBook()
        loop = asyncio.get_running_loop()
        self.prober = prober.Prober(most, self._count, self.said.append, answers, random.Random(1), loop.time)
        hosts = [f"10.0.{n // 200}.{n % 200 + 1}" for n in range(backends)]
        self.cluster = test_probing.Cluster(*hosts, asked=OFTEN)

    def _count(self, kind: probe.Kind, result: probing.Result, _took_s: float) -> None:
        self.counted[kind, result.passed] += 1

    async def run(self, seconds: float) -> None:
        task = asyncio.create_task(self.prober.run())
        await asyncio.sleep(seconds)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def start(self, down: typing.Iterable[tuple[model.PortKey, topology.Place]] = ()) -> None:
        self.prober.take_over(self.book.note, down)
        self.prober.passed(self.cluster.state, [test_probing.WEB])


def in_virtual_time(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            await test()

        virtual_time.run(main)

    run.__name__ = test.__name__
    return run


@in_virtual_time
async def test_every_backend_is_asked_once_an_interval() -> None:
    bench = Bench(1000, Answers())
    bench.start()
    await bench.run(50.0)
    assert 9_800 <= len(bench.answers.asked) <= 10_000
    assert bench.prober.late_s == 0
    seconds = collections.Counter(int(at_s) for at_s in bench.answers.asked)
    assert max(seconds.values()) < 400
    assert bench.said == []


@in_virtual_time
async def test_hanging_backends_hold_up_so_many_and_no_more() -> None:
    bench = Bench(1000, Answers(after_s=4.0))
    bench.start()
    await bench.run(60.0)
    # Half of what may be: the other half is for other Services.
    assert bench.answers.most == 32
    # 32 in 4 s, where 1,000 in 5 s are wanted: late, but nothing piles up.
    assert 400 <= len(bench.answers.asked) <= 32 * 16
    assert bench.prober.late_s > 10
    assert bench.prober.targets == 1000


@in_virtual_time
async def test_no_more_begin_in_a_second_than_are_allowed() -> None:
    bench = Bench(8000, Answers(), most=4096)
    bench.start()
    await bench.run(10.0)
    seconds = collections.Counter(int(at_s) for at_s in bench.answers.asked)
    assert max(seconds.values()) <= prober.STARTS_PER_S * 1.1
    assert bench.prober.late_s > 1


@in_virtual_time
async def test_verdicts_reach_the_book_and_people() -> None:
    bench = Bench(2, Answers())
    bench.start()
    bench.answers.result = FAILED
    await bench.run(10.0)
    assert len(bench.book) == 2
    assert [change.usable for change in bench.said] == [False, False]
    assert prober.describe(bench.said[0]).endswith(" of shop/web:http/TCP/IPv4 is down: refused")
    bench.answers.result = PASSED
    await bench.run(20.0)
    assert len(bench.book) == 0
    assert [change.usable for change in bench.said] == [False, False, True, True]
    assert prober.describe(bench.said[-1]).endswith(" is up: its probes pass")


@in_virtual_time
async def test_who_answers_at_once_does_not_wait_for_who_does_not() -> None:
    hangs = Answers(after_s=50.0)
    quick = test_probing.user("10.0.0.1").place.address

    async def answer(target: probing.Target) -> asking.Asked:
        if target.address != quick:
            return await hangs(target)
        return await bench.answers(target)

    bench = Bench(3, Answers())
    bench.prober._ask = answer
    bench.start()
    await bench.run(52.0)
    assert hangs.most == 2
    assert len(bench.answers.asked) == 11


@in_virtual_time
async def test_a_service_whose_backends_hang_does_not_keep_another_ones_waiting() -> None:
    hangs = Answers(after_s=60.0)

    async def answer(target: probing.Target) -> asking.Asked:
        return await (bench.answers if target.probe.kind is probe.Kind.HTTP else hangs)(target)

    bench = Bench(64, Answers(), most=16)
    bench.prober._ask = answer
    bench.start()
    task = asyncio.create_task(bench.prober.run())
    await asyncio.sleep(100.0)
    good = probe.Probe(probe.Kind.HTTP, "/", interval_s=100.0, jitter=0.0)
    bench.cluster.annotate(good, test_probing.OTHER)
    bench.prober.passed(bench.cluster.state, [test_probing.OTHER])
    await asyncio.sleep(300.0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert len(bench.answers.asked) == 3 * 64
    assert hangs.most == 8
    assert 8 * 6 <= len(hangs.asked) <= 8 * 7


def test_of_thousands_that_go_down_some_are_said_and_the_others_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        bench = Bench(1000, Answers())
        bench.start()
        bench.answers.result = FAILED
        await bench.run(12.0)
        assert len(bench.book) == 1000
        assert prober.LINES <= len(bench.said) <= prober.LINES + 15

    with caplog.at_level(logging.WARNING):
        virtual_time.run(main)
    counted = [int(line.split()[0]) for line in caplog.messages if " more backends " in line]
    said = [line for line in caplog.messages if " is down: " in line]
    assert counted
    assert len(said) + sum(counted) == 1000


@in_virtual_time
async def test_what_an_earlier_agent_found_down_stays_down_until_a_probe_passes() -> None:
    bench = Bench(2, Answers())
    known, gone = test_probing.user("10.0.0.1"), test_probing.user("10.0.9.9")
    bench.start([known, gone])
    assert list(bench.book.against(health.Source.ACTIVE)) == [known]
    await bench.run(10.0)
    assert len(bench.book) == 0


@in_virtual_time
async def test_where_nothing_may_be_probed_nothing_is_and_nothing_is_down() -> None:
    bench = Bench(2, Answers(), most=0)
    bench.start([test_probing.user("10.0.0.1")])
    await bench.run(100.0)
    assert bench.answers.asked == []
    assert len(bench.book) == 0
    assert bench.prober.targets == 0
    assert bench.prober.off == "--probe-concurrency is 0 on this node"
    assert test_probing.WEB in bench.prober.asked


@in_virtual_time
async def test_what_is_not_understood_is_known_for_as_long_as_it_is_so() -> None:
    bench = Bench(2, Answers())
    bench.start()
    assert dict(bench.prober.mistakes) == {}
    before = bench.prober.changes
    wrong = test_probing.service(None, probe_mistake="lbproxy.io/probe: 'tpc': begins with none of them")
    bench.cluster.state.apply(events.Upsert(events.Kind.SERVICE, test_probing.WEB, wrong))
    bench.prober.passed(bench.cluster.state, [test_probing.WEB])
    assert bench.prober.mistakes == {test_probing.WEB: wrong.probe_mistake}
    assert test_probing.WEB not in bench.prober.asked
    assert bench.prober.changes > before
    bench.cluster.annotate(OFTEN)
    bench.prober.passed(bench.cluster.state, [test_probing.WEB])
    assert dict(bench.prober.mistakes) == {}


@in_virtual_time
async def test_a_service_without_a_probe_any_more_is_left_alone() -> None:
    bench = Bench(2, Answers())
    bench.start()
    bench.answers.result = FAILED
    await bench.run(10.0)
    bench.cluster.annotate(None)
    bench.prober.passed(bench.cluster.state, [test_probing.WEB])
    assert len(bench.book) == 0
    before = len(bench.answers.asked)
    await bench.run(100.0)
    assert len(bench.answers.asked) == before
