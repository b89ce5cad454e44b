"""Who is measured: a common face, and lbproxy behind it. kube-proxy is in `kube_proxies`."""

import abc
import collections.abc
import contextlib
import functools
import itertools
import os
import pathlib
import shutil
import sys
import tempfile

import msgspec

import lbproxy
from benchmarks import agents, api, arena, cluster, results
from lbproxy.kernel import bpffs


class Contestant(abc.ABC):
    """Someone who balances the services of a site, once `fill` has said which.

    What is common: a cluster in an API server stand-in, and the measured service, which moves
    from one of the site's servers to the other.
    """

    name: str
    real = True  # an agent runs, and can be measured itself
    # How long after a change was seen the next one comes, in seconds: drawn, to fall in step with nothing.
    pause_s = (0.05, 0.15)

    def __init__(self, at: arena.Arena) -> None:
        self.at = at
        self.site = at.sites[self.name]
        self.services = 0
        self.measured_at = self.site.servers[0]  # where the measured services' endpoints are
        self.generation = 0
        self.agent: agents.Agent | None = None
        self._changes = itertools.count()  # of slices that no traffic goes to
        self._of_cluster = contextlib.ExitStack()
        self._url = ""

    @abc.abstractmethod
    def about(self) -> results.Contestant:
        """Say who this is."""

    @abc.abstractmethod
    def forget(self) -> None:
        """Remove everything of it from the kernel: the next start is a first one."""

    @abc.abstractmethod
    def start(self) -> agents.Started:
        """Start the agent, and return it at once; where there is none, load its rules."""

    @abc.abstractmethod
    def memory(self) -> results.Memory:
        """Return what the agent, if there is one, and its objects in the kernel occupy now."""

    def objects(self) -> collections.abc.Iterator[cluster.Object]:
        """Yield the objects of its cluster, as they are at first."""
        here = cluster.Place((self.at.lab[self.site.servers[0]].ipv4,), (self.site.node,))
        more = [
            *cluster.remote_objects(self.services, self.at.far_place(), arena.PORT),
            *cluster.node_port_objects(here, self.at.far_place(), self.at.peer_place(), arena.PORT),
        ]
        place = self.site.place_of(self.site.servers[0])
        node = self.site.node
        return cluster.objects(self.services, node, self.at.lab[node].ipv4, place, arena.PORT, more)

    def fill(self, services: int) -> None:
        """Replace the cluster by one of so many services, with nothing in the kernel yet."""
        self.take_down()
        self.services = services
        self.measured_at, self.generation = self.site.servers[0], 0
        self._changes = itertools.count()
        self._url = self._of_cluster.enter_context(api.stand_in(self.at.lab, self.site.node, self.objects()))
        self._api = self._of_cluster.enter_context(contextlib.closing(self.connect()))
        self._of_cluster.callback(self.stop)

    def connect(self) -> api.Api:
        """Open another connection to the API server."""
        return api.Api(self.at.lab, self.site.node, self._url)

    def move(self) -> str:
        """Move the measured service's endpoints to the other pod, and return which."""
        self.ready_to_move()()
        return self.measured_at

    def ready_to_move(self) -> collections.abc.Callable[[], None]:
        """Prepare to move the measured service's endpoints to the other pod, now `measured_at`.

        What is returned does it: only that is the change.
        """
        self.generation += 1
        self.measured_at = self.site.servers[self.generation % 2]
        return self._prepared(self.site.place_of(self.measured_at))

    def _prepared(self, place: cluster.Place) -> collections.abc.Callable[[], None]:
        return functools.partial(self._api.move, *cluster.MEASURED, place, self.generation)

    def churn(self, per_s: float) -> api.Churn:
        """Change other slices while the block lasts."""
        return api.Churn(self.connect, self.services, per_s, self._changes)

    @abc.abstractmethod
    def forget_connections(self) -> None:
        """Forget the connections of before, where a tracker remembers them for minutes.

        One that was dialled before anything was there to answer it leads the next one from the same
        port astray: a matter of the first seconds of a node, which is not what is compared.
        """

    def stop(self) -> None:
        """End the agent, if there is one; what it has put into the kernel stays."""
        if self.agent is not None:
            self.agent.stop()
            self.agent = None

    def close(self) -> None:
        """End everything that runs for it; what is in the kernel stays."""
        self._of_cluster.close()

    @contextlib.contextmanager
    def beside(self) -> collections.abc.Iterator[None]:
        """Keep running what it needs on other nodes."""
        yield

    def __enter__(self) -> "Contestant":
        return self

    def take_down(self) -> None:
        """End everything that runs for it, and remove everything of it from the kernel."""
        try:
            self.close()
        finally:
            self.forget()

    def __exit__(self, *_: object) -> None:
        self.take_down()


class Lbproxy(Contestant):
    """lbproxy: `python -m lbproxy run` on the site's node."""

    name = "lbproxy"

    def __init__(self, at: arena.Arena) -> None:
        super().__init__(at)
        self.pins = pathlib.Path(tempfile.gettempdir()) / f"{arena.own_prefix()}pins"
        # Its own, or what it had compiled in other runs would make its first start short.
        self._compiled = at.lab.workdir / "compiled"
        self._fragment_rows = 4096

    def about(self) -> results.Contestant:
        """Say which version."""
        return results.Contestant(self.name, "lbproxy", True, {"version": lbproxy.__version__})

    def forget(self) -> None:
        """End the agent, and remove its pins and what it has compiled."""
        self.unpin()
        shutil.rmtree(self._compiled, ignore_errors=True)

    def unpin(self) -> None:
        """End the agent and remove its pins: as a reboot does, which leaves what was compiled."""
        self.stop()
        bpffs.remove(self.pins)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "XDG_CACHE_HOME": str(self._compiled)}

    def start(self, extra: collections.abc.Sequence[str] = ()) -> agents.Agent:
        """Start the agent, with these arguments as well, and return it at once."""
        argv = [
            sys.executable, "-m", "lbproxy", "run",
            "--master", self._url, "--node-name", self.site.node,
            "--cgroup", str(self.at.lab.cgroup(self.site.node)), "--bpffs", str(self.pins),
            "--cluster-cidr", arena.PODS,
            *extra,
        ]  # fmt: skip
        self.agent = agents.Agent(self.at.lab, self.site.node, argv, self._environment())
        return self.agent

    def forget_connections(self) -> None:
        """Do nothing: it follows no connections of its node's pods."""

    def other_size(self) -> list[str]:
        """Return arguments for a datapath other than any before.

        An upgrade compiles it and replaces the old. Any map will do whose size is another each time.
        """
        self._fragment_rows += 16
        return ["--map-rows", f"fragments={self._fragment_rows}"]

    def memory(self) -> results.Memory:
        """Return what the agent and what it has pinned occupy now."""
        assert self.agent is not None
        of_agent = self.agent.memory()
        maps, programs = agents.pinned(self.pins)
        return results.Memory(
            contestant=self.name,
            services=self.services,
            rss=of_agent["VmRSS"],
            rss_anonymous=of_agent["RssAnon"],
            rss_of_maps=self.agent.resident_maps(),
            rss_peak=of_agent["VmHWM"],
            cgroup_peak=self.agent.cgroup_peak(),
            maps=maps,
            programs=programs,
        )

    @contextlib.contextmanager
    def beside(self) -> collections.abc.Iterator[None]:
        """Keep an agent running on the peer, which takes DSR packets out of their tunnels."""
        lab, node = self.at.lab, arena.PEER
        file, pins = lab.workdir / "peer.json", pathlib.Path(f"{self.pins}-peer")
        far, peer = self.at.far_place(), self.at.peer_place()
        items = list(cluster.node_port_objects(far, far, peer, arena.PORT))
        file.write_bytes(msgspec.json.encode({"apiVersion": "v1", "kind": "List", "items": items}))
        argv = [
            sys.executable, "-m", "lbproxy", "run", "--manifests", str(file), "--node-name", node,
            "--node-ip", lab[node].ipv4, "--cgroup", str(lab.cgroup(node)), "--bpffs", str(pins),
            "--cluster-cidr", arena.PODS,
        ]  # fmt: skip
        agent = agents.Agent(lab, node, argv, self._environment())
        try:
            yield
        finally:
            agent.stop()
            bpffs.remove(pins)
