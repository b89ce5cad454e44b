"""A DaemonSet controller and a kubelet for a lab: pods are whatever a `Runner` starts on a node.

It does what a migration depends on: pods come and go as their DaemonSet's affinity and the nodes'
labels say, one by one on each node; they are ready when they say so, and gone from the API only
when their process is.
"""

import contextlib
import threading
import typing

from lbproxy.core import migration_plan
from lbproxy.lab import apiserver, apistore
from tests.lab import agents, manifests

NAMESPACE = "kube-system"
_PAUSE_S = 0.05


class Runner(typing.Protocol):
    """A DaemonSet's program."""

    def start(self, node: str) -> None:
        """Start it on a node, without waiting for it."""
        ...

    def ready(self, node: str) -> bool:
        """Whether it is ready there."""
        ...

    def stop(self, node: str) -> None:
        """End it there."""
        ...


def daemon_set(name: str, **pod_spec: typing.Any) -> manifests.Object:
    """Describe a DaemonSet."""
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"template": {"spec": {"containers": [{"name": name}], **pod_spec}}},
    }


class DaemonSets:
    """The controller, while the `with` block lasts; `runners` are by the names of DaemonSets."""

    def __init__(self, api: agents.Api, runners: typing.Mapping[str, Runner]) -> None:
        self._api = api
        self._runners = runners
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="daemon-sets")
        self.problem: Exception | None = None

    def __enter__(self) -> "DaemonSets":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(60)
        if self.problem is not None:
            raise self.problem

    def _run(self) -> None:
        try:
            while not self._ended.wait(_PAUSE_S):
                for name, runner in self._runners.items():
                    self._reconcile(name, runner)
        except Exception as error:
            self.problem = error

    def _reconcile(self, name: str, runner: Runner) -> None:
        key = (NAMESPACE, name)

        def look(server: apiserver.ApiServer) -> tuple[apistore.Object, list[apistore.Object]]:
            nodes = [server.store.get("nodes", node) for node in server.store.objects["nodes"]]
            return server.store.get("daemonsets", key), nodes

        found, nodes = self._api.do(look)
        spec, ready = found["spec"]["template"]["spec"], 0
        wanted = 0
        for node in nodes:
            where, labels = node["metadata"]["name"], node["metadata"].get("labels") or {}
            pod = self._pod(f"{name}-{where}")
            if migration_plan.admits(spec, labels):
                wanted += 1
                ready += self._keep(found, where, pod, runner)
            elif pod is not None:
                runner.stop(where)
                self._api.delete(pod)
        generation = found["metadata"]["generation"]
        status = {
            "observedGeneration": generation,
            "desiredNumberScheduled": wanted,
            "updatedNumberScheduled": wanted,
            "numberUnavailable": wanted - ready,
        }
        if found.get("status") != status:
            self._api.do(lambda server: server.store.patch("daemonsets", key, {"status": status}))

    def _keep(self, of: manifests.Object, where: str, pod: manifests.Object | None, runner: Runner) -> bool:
        """Have a pod there; whether it is ready."""
        before = None if pod is None else pod["status"]["conditions"][0]["status"] == "True"
        if before is None:
            runner.start(where)
        ready = runner.ready(where)
        if ready != before:
            name = of["metadata"]["name"]
            owner = {"kind": "DaemonSet", "name": name, "uid": of["metadata"]["uid"]}
            self._api.put(
                {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {
                        "name": f"{name}-{where}",
                        "namespace": NAMESPACE,
                        "ownerReferences": [owner],
                    },
                    "spec": {"nodeName": where},
                    "status": {"conditions": [{"type": "Ready", "status": str(ready)}]},
                }
            )
        return ready

    def _pod(self, name: str) -> manifests.Object | None:
        with contextlib.suppress(KeyError):
            return self._api.do(lambda server: server.store.get("pods", (NAMESPACE, name)))
        return None
