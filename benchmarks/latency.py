"""How soon a changed slice is in the kernel, as a client sees it.

One process opens connections to a service in a tight loop while the service's
EndpointSlice is patched, over HTTP, to name another pod. From the moment before
the patch is sent to the first answer of the new pod: nothing is subtracted, neither
the stand-in's time (which `stand_in` measures by itself) nor the connection's.
"""

import contextlib
import http.client
import json
import random
import threading
import time

from benchmarks import arena, cluster, contestants, results

_POLL_TIMEOUT_MS = 2000
_SHOW_TIMEOUT_S = 200.0  # nftables with 30,000 services, and then some
_PATIENCE_S, _FEW = 60.0, 3


def programming(of: contestants.Contestant, changes: int, churn_per_s: float) -> results.Programming:
    """Change the measured service so many times, fewer where that takes minutes, or one is never seen."""
    pauses = random.Random(changes)
    took_ms: list[float] = []
    lost = 0
    with of.at.serving(of.site), of.at.poll(of.site, _POLL_TIMEOUT_MS) as poller:
        if poller.until_answer(of.measured_at, _SHOW_TIMEOUT_S) is None:
            raise arena.BenchError(f"{of.name}: the measured service does not answer")
        with of.churn(churn_per_s) as churn:
            began_s = time.monotonic()
            for number in range(changes):
                if number >= _FEW and time.monotonic() - began_s > _PATIENCE_S:
                    break
                time.sleep(pauses.uniform(*of.pause_s))
                change = of.ready_to_move()
                sent_ns = time.monotonic_ns()
                change()
                shown_ns = poller.until_answer(of.measured_at, _SHOW_TIMEOUT_S)
                if shown_ns is None:
                    # The next one would lead back to who still answers, and be seen as little.
                    lost += 1
                    break
                took_ms.append((shown_ns - sent_ns) / 1e6)
            achieved = churn.changes / (time.monotonic() - began_s)
        _, failures = poller.stop()
    failed = sum(failures.values())
    return results.Programming(of.name, of.services, round(achieved, 1), took_ms, lost, failed)


def stand_in(of: contestants.Contestant, changes: int) -> results.StandIn:
    """Measure the stand-in alone: from the patch to the event on a watch that only reads the clock."""
    with contextlib.closing(of.connect()) as watching:
        return results.StandIn(of.services, _events(of, watching.watch(), changes))


def _events(of: contestants.Contestant, lines: http.client.HTTPResponse, changes: int) -> list[float]:
    namespace, name = cluster.MEASURED
    wanted = f'"name":"{cluster.slice_name(name)}"'.encode()
    arrived_ns: list[int] = []
    arrived = threading.Event()

    def read() -> None:
        while len(arrived_ns) < changes and (line := lines.readline()):
            now_ns = time.monotonic_ns()
            if wanted in line and json.loads(line)["object"]["metadata"]["namespace"] == namespace:
                arrived_ns.append(now_ns)
                arrived.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    took_ms = []
    for number in range(changes):
        time.sleep(0.02)
        arrived.clear()
        sent_ns = time.monotonic_ns()
        of.move()
        if not arrived.wait(10):
            raise arena.BenchError("the stand-in sent no event for a change")
        took_ms.append((arrived_ns[number] - sent_ns) / 1e6)
    reader.join()
    return took_ms
