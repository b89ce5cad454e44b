"""What happens in the demo, in order, while connections flow without a break.

Each change is waited for by what the client sees of it, never by the clock.
"""

import collections.abc
import time

from lbproxy import errors
from lbproxy.demo import interrupts, node_agent, probes, scene, screen, stage, storm
from lbproxy.lab import cluster, traffic

TICK_S = 0.03
EFFECT_TIMEOUT_S = 15.0
READY_TIMEOUT_S = 60.0
# So many in a row elsewhere, of a quarter each, are no chance.
PASSED_OVER = 200
# How the time of a run is divided; what is left is for what takes as long as it takes.
BALANCED, REMOVED, RESTORED, AGENTLESS, RESTARTED = 0.22, 0.18, 0.18, 0.14, 0.12


class Story:
    """The course of events; `play` raises Interrupted, AgentError or LabError where it can not go on."""

    def __init__(
        self,
        lab: cluster.Lab,
        agent: node_agent.NodeAgent,
        manifests: stage.Manifests,
        shown: scene.Scene,
        shows: screen.Screen,
        stop: interrupts.Interrupts,
    ) -> None:
        self._lab = lab
        self._agent = agent
        self._manifests = manifests
        self._scene = shown
        self._screen = shows
        self._stop = stop
        self._storm: storm.Storm | None = None
        self._servers: dict[str, traffic.Server] = {}

    def play(self, seconds: float) -> None:
        """Run it all, with traffic for about this long."""
        for name in stage.BACKENDS:
            self._serve(name)
        self._screen.step("starting the agent: it compiles and loads its BPF programs")
        self._agent.start()
        self._until(self._agent.is_ready, "answer of the agent at /healthz", READY_TIMEOUT_S)
        address, port = stage.SHOP[4], stage.SERVICE_PORT
        with storm.Storm(self._lab, stage.CLIENT, address, port) as self._storm:
            self._happened(f"the client pod connects to {address}:{port}, again and again")
            self._balanced(seconds)
            self._backend_leaves_and_returns(seconds)
            self._agent_is_killed(seconds)
            self._happened("other ways to the Service are tried")
            self._scene.findings += probes.ways(self._lab)
            self._scene.findings.append(probes.refusal(self._lab))
            self._tick()
            result = self._storm.stop()
            self._take()
        self._storm = None
        self._scene.happened("traffic ends")
        self._screen.happened(self._scene.moments[-1])
        self._totals(result)
        self._screen.step("comparing connections through a ClusterIP with direct ones")
        self._stop.check()
        self._scene.findings.append(probes.cost(self._lab))

    def _balanced(self, seconds: float) -> None:
        backends = self._scene.backends
        self._until(lambda: all(backend.total for backend in backends), "connection to every backend")
        self._stay(seconds * BALANCED)
        shares = [f"{self._scene.share(backend):.1%}" for backend in backends]
        self._found("Shares while all serve", " ".join(shares))

    def _backend_leaves_and_returns(self, seconds: float) -> None:
        leaving = self._scene[stage.LEAVING]
        self._happened(f"{leaving.name} is taken out of the EndpointSlice")
        leaving.passed_over = 0
        leaving.state = scene.State.REMOVED
        changed_s = time.monotonic()
        self._manifests.list_shop(tuple(name for name in stage.BACKENDS if name != leaving.name))
        self._until(lambda: leaving.passed_over >= PASSED_OVER, f"end of connections to {leaving.name}")
        effect_s = max(0.0, leaving.last_seen_s - changed_s)
        self._found("Removal reached the client after", f"{effect_s:.2f} s {_RESOLUTION}")
        self._servers.pop(leaving.name).stop()
        leaving.state = scene.State.STOPPED
        self._happened(f"no new connection goes to {leaving.name}; its server is stopped")
        self._stay(seconds * REMOVED)
        self._serve(leaving.name)
        self._happened(f"{leaving.name} runs again and is put back into the EndpointSlice")
        leaving.forget()
        leaving.state = scene.State.SERVING
        changed_s = time.monotonic()
        self._manifests.list_shop(tuple(stage.BACKENDS))
        self._until(lambda: leaving.first_seen_s is not None, f"connection to {leaving.name}")
        effect_s = (leaving.first_seen_s or changed_s) - changed_s
        self._found("Return reached the client after", f"{effect_s:.2f} s {_RESOLUTION}")
        self._happened(f"connections go to {leaving.name} again")
        self._stay(seconds * RESTORED)

    def _agent_is_killed(self, seconds: float) -> None:
        before = self._scene.connections
        killed_s = time.monotonic()
        self._agent.kill()
        self._happened("the agent is killed (SIGKILL): the kernel goes on alone")
        self._stay(seconds * AGENTLESS)
        self._agent.start()
        self._until(self._agent.is_ready, "answer of the restarted agent at /healthz", READY_TIMEOUT_S)
        away_s = time.monotonic() - killed_s
        how = self._agent.datapath()
        self._happened(f"the agent is back: datapath {how}")
        self._found(
            f"Agent away for {away_s:.1f} s",
            f"{self._scene.connections - before:,} connections, datapath {how}",
            ok=how == "adopted",
        )
        self._stay(seconds * RESTARTED)

    def _totals(self, result: traffic.Result) -> None:
        reasons = " ".join(f"{name} ×{times}" for name, times in sorted(result.failures.items()))
        # The client's own sums are the truth: they hold its last, unfinished interval too.
        self._scene.connections, self._scene.failures = result.count, dict(result.failures)
        for backend in self._scene.backends:
            backend.total = result.servers.get(backend.name, 0)
        first = [
            scene.Finding(
                "Connections", f"{result.count:,} ({result.per_second:,.0f} a second)", result.count > 0
            ),
            scene.Finding("Failed", f"{result.failed:,} {reasons}".strip(), not result.failed),
        ]
        self._scene.findings[:0] = first

    def _serve(self, name: str) -> None:
        where = stage.place(name)
        self._servers[name] = self._lab.serve(where, [stage.TARGET_PORT], name=name)

    def _found(self, what: str, found: str, *, ok: bool = True) -> None:
        self._scene.findings.append(scene.Finding(what, found, ok))

    def _happened(self, words: str) -> None:
        self._scene.happened(words)
        self._screen.happened(self._scene.moments[-1])

    def _until(
        self, reached: collections.abc.Callable[[], bool], what: str, timeout_s: float = EFFECT_TIMEOUT_S
    ) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not reached():
            if time.monotonic() > deadline_s:
                raise errors.AgentError(f"no {what} within {timeout_s:.0f} s")
            self._tick()

    def _stay(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            self._tick()

    def _tick(self) -> None:
        self._stop.check()
        self._agent.check()
        if self._storm is not None:
            self._storm.check()
            self._take()
            self._screen.refresh(self._scene)
        time.sleep(TICK_S)

    def _take(self) -> None:
        if self._storm is not None:
            for told_s, seen in self._storm.take():
                self._scene.count(seen, told_s)


_RESOLUTION = f"± {storm.INTERVAL_S:g} (files are polled)"
