"""How soon a changed slice is in the kernel, as a client sees it.

One process opens connections to a service in a tight loop while the service's
EndpointSlice is patched, over HTTP, to name another pod. From the moment before
the patch is sent to the first answer of the new pod: nothing is subtracted, neither
the stand-in's time (which `stand_in` measures by itself) nor the connection's.
"""

import json
import random
import threading
import time

from benchmarks import cluster, results, stage

_POLL_TIMEOUT_MS = 2000
_SHOW_TIMEOUT_S = 20.0
_PAUSE_S = (0.05, 0.15)  # so that changes fall in step with nothing


def programming(at: stage.Stage, changes: int, churn_per_s: float) -> results.Programming:
    """Change the measured service so many times."""
    pauses = random.Random(changes)
    took_ms: list[float] = []
    lost = 0
    with at.serving():
        poller = at.poll(_POLL_TIMEOUT_MS)
        if poller.until_answer(at.measured_at, _SHOW_TIMEOUT_S) is None:
            raise stage.BenchError("the measured service does not answer")
        with stage.Churn(at, churn_per_s) as churn:
            began_s = time.monotonic()
            for _ in range(changes):
                time.sleep(pauses.uniform(*_PAUSE_S))
                sent_ns = time.monotonic_ns()
                wanted = at.move()
                shown_ns = poller.until_answer(wanted, _SHOW_TIMEOUT_S)
                if shown_ns is None:
                    lost += 1
                else:
                    took_ms.append((shown_ns - sent_ns) / 1e6)
            achieved = churn.changes / (time.monotonic() - began_s)
        _, failures = poller.stop()
    return results.Programming(at.services, round(achieved, 1), took_ms, lost, sum(failures.values()))


def stand_in(at: stage.Stage, changes: int) -> results.StandIn:
    """Measure the stand-in alone: from the patch to the event on a watch that only reads the clock."""
    watching = stage.Api(at.lab, at.url)
    lines = watching.watch()
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

    reader = threading.Thread(target=read)
    reader.start()
    took_ms = []
    for number in range(changes):
        time.sleep(0.02)
        arrived.clear()
        sent_ns = time.monotonic_ns()
        at.move()
        if not arrived.wait(10):
            raise stage.BenchError("the stand-in sent no event for a change")
        took_ms.append((arrived_ns[number] - sent_ns) / 1e6)
    reader.join()
    watching.close()
    return results.StandIn(at.services, took_ms)
