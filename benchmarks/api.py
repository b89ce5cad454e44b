"""The API server stand-in of one contestant, and changes made to it from here, over HTTP."""

import collections.abc
import contextlib
import http.client
import json
import subprocess
import sys
import threading
import time
import types
import urllib.parse

import msgspec

from benchmarks import arena, cluster
from lbproxy.lab import cluster as lab_cluster
from lbproxy.lab import netns


@contextlib.contextmanager
def stand_in(
    lab: lab_cluster.Lab, node: str, items: collections.abc.Iterable[cluster.Object]
) -> collections.abc.Iterator[str]:
    """Serve these objects on a node's loopback, outside all hooks, and return the URL."""
    file = lab.workdir / f"objects-{node}.json"
    file.write_bytes(b'{"items":[' + b",".join(map(msgspec.json.encode, items)) + b"]}")
    argv = [sys.executable, "-m", "lbproxy.lab.apiserver", "--load", str(file)]
    popen = lab.popen(node, argv, cgroup=False, stdout=subprocess.PIPE)
    try:
        assert popen.stdout is not None
        url = popen.stdout.readline().strip()
        if not url:
            raise arena.BenchError("the API server stand-in did not start")
        yield url
    finally:
        arena.end(popen)


class Api:
    """A connection to a stand-in from this process."""

    def __init__(self, lab: lab_cluster.Lab, node: str, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        # A socket stays in the namespace it was made in.
        netns.inside(lab.netns(node), self._connection.connect)

    def move(self, namespace: str, name: str, place: cluster.Place, generation: int) -> None:
        """Patch a service's slice so that its endpoints are there."""
        path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices/{cluster.slice_name(name)}"
        body = msgspec.json.encode(cluster.move_patch(place, generation))
        self._connection.request("PATCH", path, body, {"Content-Type": "application/merge-patch+json"})
        response = self._connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise arena.BenchError(f"PATCH {path}: {response.status} {answer[:200]!r}")

    def watch(self) -> http.client.HTTPResponse:
        """Open a watch of all slices on this connection: a line an event, from now on."""
        self._connection.request("GET", "/apis/discovery.k8s.io/v1/endpointslices?limit=1")
        version = json.loads(self._connection.getresponse().read())["metadata"]["resourceVersion"]
        self._connection.request(
            "GET", f"/apis/discovery.k8s.io/v1/endpointslices?watch=1&resourceVersion={version}"
        )
        return self._connection.getresponse()

    def close(self) -> None:
        """Close it."""
        self._connection.close()


class Churn:
    """Changes slices of services that no traffic goes to, so many a second, while the `with` block lasts.

    `numbers` are those of the changes, counted over all blocks: one that had been made before would
    change nothing.
    """

    def __init__(
        self,
        connect: collections.abc.Callable[[], Api],
        services: int,
        per_s: float,
        numbers: collections.abc.Iterator[int],
    ) -> None:
        self.changes = 0  # in this block
        self.per_s = per_s
        self._numbers = numbers
        self._fillers = cluster.fillers(services)
        self._connect = connect
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error: Exception | None = None

    def _run(self) -> None:
        due_s = time.monotonic() + 1 / self.per_s
        try:
            with contextlib.closing(self._connect()) as api:
                while not self._stopped.wait(max(0.0, due_s - time.monotonic())):
                    # A prime step visits all of them before any a second time.
                    change = next(self._numbers)
                    number = change * 7919 % self._fillers
                    generation = change // self._fillers + 1
                    namespace, name = cluster.filler_name(number)
                    api.move(namespace, name, cluster.filler_place(number, generation), generation)
                    self.changes += 1
                    due_s += 1 / self.per_s
        except Exception as error:  # handed to whoever leaves the block
            self._error = error

    def __enter__(self) -> "Churn":
        if self.per_s and self._fillers:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: types.TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._error is not None and value is None:
            raise self._error
