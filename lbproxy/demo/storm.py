"""Connections without a break from one pod, read in the background."""

import queue
import threading
import time
import types

from lbproxy.lab import cluster, traffic

INTERVAL_S = 0.05
Seen = tuple[float, traffic.Progress]


class Storm:
    """A client that connects, asks and closes, again and again, while its context lasts."""

    def __init__(self, lab: cluster.Lab, where: str, address: str, port: int) -> None:
        self._client = lab.client(where, "storm", address, port, progress=True, interval_s=INTERVAL_S)
        self._seen: queue.SimpleQueue[Seen] = queue.SimpleQueue()
        self._result: traffic.Result | None = None
        self._thread = threading.Thread(target=self._read, name="storm", daemon=True)

    def __enter__(self) -> "Storm":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: types.TracebackType | None
    ) -> None:
        self._end()

    def take(self) -> list[Seen]:
        """Return the intervals that ended since the last call, each with when it was told of."""
        return [self._seen.get() for _ in range(self._seen.qsize())]

    def stop(self) -> traffic.Result:
        """End it and return what it saw in all; RuntimeError if it had ended by itself."""
        self._end()
        if self._result is None:
            raise RuntimeError("the client of the demo ended without a result")
        return self._result

    def check(self) -> None:
        """Raise RuntimeError if it has ended by itself."""
        if not self._thread.is_alive():
            raise RuntimeError("the client of the demo ended by itself")

    def _end(self) -> None:
        if self._client.process.poll() is None:
            self._client.process.terminate()
        self._thread.join()

    def _read(self) -> None:
        try:
            for line in self._client.progress():
                if isinstance(line, traffic.Result):
                    self._result = line
                else:
                    self._seen.put((time.monotonic(), line))
        except (RuntimeError, ValueError):
            # Ended or cut short: `check` and `stop` say so in the thread that can be told.
            return
