"""How long an agent takes to start, and what it computes afterwards.

A start is over when a connection reaches what the API server says now: for a first
start any answer of the last service will do; for a restart the last service has
moved while the agent was down, and its new pod must answer. Of lbproxy a restart
can be an upgrade: a datapath of another size, which replaces the one that serves.
"""

import collections.abc
import time

from benchmarks import agents, arena, contestants, results

# Shorter than the answer of a service that is there, longer than a connection to it takes.
_FRESH_TIMEOUT_MS = 5
_STEADY_TIMEOUT_MS = 2000
_ANSWER_TIMEOUT_S = 120.0
# A loop without pauses would keep a CPU from the agent and from the stand-in.
_PAUSE_MS = 1


def fresh(of: contestants.Contestant) -> results.Start:
    """Start where it never was: compile, load, list, fill."""
    of.stop()
    of.forget()
    return _first(of, "fresh")


def compiled(of: contestants.Lbproxy) -> results.Start:
    """Start with nothing in the kernel, but with the programs that were compiled before: load, list, fill."""
    of.unpin()
    return _first(of, "compiled")


def _first(of: contestants.Contestant, how: str) -> results.Start:
    with of.at.serving(of.site):
        with of.at.poll(of.site, _FRESH_TIMEOUT_MS, _PAUSE_MS) as poller:
            agent = of.start()
            synced_ns = _until_answer(of, agent, poller, of.measured_at)
        of.forget_connections()
        # Before, nothing could be reached: a connection counts from the first that succeeded.
        with of.at.poll(of.site, _STEADY_TIMEOUT_MS, _PAUSE_MS) as steady:
            if steady.until_answer(of.measured_at, _ANSWER_TIMEOUT_S) is None:
                raise arena.BenchError(f"{of.name}: the measured service answered once, and then no more")
            cpu_s = agent.settle()
            answered, failures = steady.stop()
    return _start(of, how, agent, synced_ns, cpu_s, answered, failures)


def adopted(of: contestants.Contestant) -> results.Start:
    """Restart over what serves already, while connections flow."""
    return _restart(of, "adopted", of.start)


def upgraded(of: contestants.Lbproxy) -> results.Start:
    """Restart with a datapath that is to replace the one that serves, while connections flow."""
    return _restart(of, "upgraded", lambda: of.start(of.other_size()))


def _restart(
    of: contestants.Contestant, how: str, start: collections.abc.Callable[[], agents.Started]
) -> results.Start:
    with of.at.serving(of.site), of.at.poll(of.site, _STEADY_TIMEOUT_MS, _PAUSE_MS) as poller:
        if poller.until_answer(of.measured_at, _ANSWER_TIMEOUT_S) is None:
            raise arena.BenchError(f"{of.name}: the measured service does not answer before the restart")
        of.stop()
        wanted = of.move()
        agent = start()
        synced_ns = _until_answer(of, agent, poller, wanted)
        cpu_s = agent.settle()
        answered, failures = poller.stop()
    return _start(of, how, agent, synced_ns, cpu_s, answered, failures)


def cpu(of: contestants.Contestant, changes_per_s: float, seconds: float) -> results.Cpu:
    """Measure the agent's CPU time while so many slices change, from when it has nothing else to do."""
    assert of.agent is not None
    of.agent.settle()
    with of.churn(changes_per_s) as churn:
        before_s, began_s = of.agent.cpu_s(), time.monotonic()
        time.sleep(seconds)
        spent_s, took_s = of.agent.cpu_s() - before_s, time.monotonic() - began_s
        achieved = churn.changes / took_s
    return results.Cpu(of.name, of.services, round(achieved, 2), took_s, spent_s)


def _until_answer(
    of: contestants.Contestant, agent: agents.Started, poller: arena.Poller, wanted: str
) -> int:
    timeout_s = agents.start_timeout_s(of.services)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        synced_ns = poller.until_answer(wanted, 1.0)
        if synced_ns is not None:
            return synced_ns
        agent.check()
    raise arena.BenchError("\n".join([f"no answer after {timeout_s:.0f} s:", *agent.log()[-15:]]))


def _start(
    of: contestants.Contestant,
    how: str,
    agent: agents.Started,
    synced_ns: int,
    cpu_s: float,
    answered: int,
    failures: dict[str, int],
) -> results.Start:
    failed = sum(failures.values())
    synced_s = (synced_ns - agent.started_ns) / 1e9
    return results.Start(of.name, of.services, how, synced_s, cpu_s, failed, answered + failed, agent.log())
