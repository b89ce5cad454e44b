"""How long the agent takes to start, what it then occupies, and what it computes afterwards.

A start is over when a connection reaches what the API server says now: for a first
start any answer of the last service will do; for a restart the last service has
moved while the agent was down, and its new pod must answer.
"""

import time

from benchmarks import results, stage

# Shorter than the answer of a service that is there, longer than a connection to it takes.
_FRESH_TIMEOUT_MS = 5
_ADOPTED_TIMEOUT_MS = 2000
# A loop without pauses would keep a CPU from the agent and from the stand-in.
_PAUSE_MS = 1


def fresh(at: stage.Stage) -> results.Start:
    """Start with nothing in the kernel: compile, load, list, fill."""
    at.stop_agent()
    at.forget_datapath()
    with at.serving():
        poller = at.poll(_FRESH_TIMEOUT_MS, _PAUSE_MS)
        agent = at.start_agent()
        synced_ns = _until_answer(agent, poller, at.measured_at)
        poller.stop()
        # Before, nothing could be reached: a connection counts from the first that succeeded.
        steady = at.poll(_ADOPTED_TIMEOUT_MS, _PAUSE_MS)
        cpu_s = agent.settle()
        answered, failures = steady.stop()
    return _start(at, "fresh", agent, synced_ns, cpu_s, answered, failures)


def adopted(at: stage.Stage) -> results.Start:
    """Restart over a datapath that serves, while connections flow."""
    with at.serving():
        poller = at.poll(_ADOPTED_TIMEOUT_MS, _PAUSE_MS)
        if poller.until_answer(at.measured_at, stage.START_TIMEOUT_S) is None:
            raise stage.BenchError("the measured service does not answer before the restart")
        at.stop_agent()
        wanted = at.move()
        agent = at.start_agent()
        synced_ns = _until_answer(agent, poller, wanted)
        cpu_s = agent.settle()
        answered, failures = poller.stop()
    return _start(at, "adopted", agent, synced_ns, cpu_s, answered, failures)


def cpu(at: stage.Stage, changes_per_s: float, seconds: float) -> results.Cpu:
    """Measure the agent's CPU time while so many slices change a second."""
    assert at.agent is not None
    with stage.Churn(at, changes_per_s) as churn:
        before_s, began_s = at.agent.cpu_s(), time.monotonic()
        time.sleep(seconds)
        spent_s, took_s = at.agent.cpu_s() - before_s, time.monotonic() - began_s
        achieved = churn.changes / took_s
    return results.Cpu(at.services, round(achieved, 2), took_s, spent_s)


def _until_answer(agent: stage.Agent, poller: stage.Poller, wanted: str) -> int:
    deadline = time.monotonic() + stage.START_TIMEOUT_S
    while time.monotonic() < deadline:
        synced_ns = poller.until_answer(wanted, 1.0)
        if synced_ns is not None:
            return synced_ns
        agent.check()
    raise stage.BenchError("\n".join([f"no answer after {stage.START_TIMEOUT_S:.0f} s:", *agent.log()[-15:]]))


def _start(
    at: stage.Stage,
    how: str,
    agent: stage.Agent,
    synced_ns: int,
    cpu_s: float,
    answered: int,
    failures: dict[str, int],
) -> results.Start:
    failed = sum(failures.values())
    return results.Start(
        at.services, how, (synced_ns - agent.started_ns) / 1e9, cpu_s, failed, answered + failed, agent.log()
    )
