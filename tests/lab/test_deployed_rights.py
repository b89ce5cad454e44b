"""The agent with the rights that deploy/ gives its containers, and no others.

From the checkout, or, where LBPROXY_ROOTFS names one, from an image's file system.
"""

import collections.abc
import contextlib
import pathlib
import subprocess
import typing

import pytest

from deploy import kustomizing
from lbproxy.core import migration, migration_plan
from lbproxy.kernel import anchor
from lbproxy.lab import cluster
from tests.lab import agents, manifests, rootfs

KUSTOMIZE: typing.Final = pathlib.Path(__file__).parents[2] / "deploy/kustomize"
WEB: typing.Final = 1


def rights(folder: str) -> dict[str, list[str]]:
    """The capabilities of each container, by its name."""
    (found,) = (one for one in kustomizing.build(KUSTOMIZE / folder) if one["kind"] == "DaemonSet")
    return {
        container["name"]: container["securityContext"]["capabilities"].get("add", [])
        for container in kustomizing.containers(found)
    }


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    objects = [
        manifests.service("web", WEB),
        *manifests.slices("web", [lab["n1/p2"]]),
        manifests.node("n1", lab["n1"].address(4), lab["n1"].address(6)),
    ]
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


def limited(given: collections.abc.Iterable[str]) -> list[str]:
    """What is to stand before a command that is to have these capabilities."""
    kept = ",".join(["-all", *(f"+{one.lower()}" for one in given)])
    return [*rootfs.enter(), "setpriv", "--bounding-set", kept, "--inh-caps", "-all", "--no-new-privs"]


class Contained(agents.Agent):
    """An agent as a container runtime starts it: root, with some of root's rights."""

    rights: collections.abc.Sequence[str] = ()

    def command(self, *flags: str) -> list[str]:
        """Return its command line."""
        own = super().command(*flags)[len(agents.LBPROXY) :]
        return [*limited(self.rights), *rootfs.lbproxy(), *own]


def look(lab: cluster.Lab, agent: Contained) -> None:
    """Commands that look run in the agent's container, and have its rights; nothing is compiled yet."""
    cache = f"XDG_CACHE_HOME={lab.workdir}/no-cache-{agent.root.parent.name}"
    own = ["env", cache, *limited(agent.rights), *rootfs.lbproxy()]
    pins = f"--bpffs={agent.root}"
    trace = [*own, "trace", pins, "--to", manifests.cluster_ip(WEB), "--count", "2", "--for", "20"]
    with lab.popen("n1", trace, cgroup=False, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        while "WHERE" not in running.stdout.readline():
            assert running.poll() is None
        agent.at("n1/p1").tcp(manifests.cluster_ip(WEB), manifests.TCP_PORT)
        told = running.stdout.read()
    assert running.returncode == 0
    assert "2 lines, 0 events lost" in told
    argv = [*own, "support-bundle", pins, "--trace", "0", "-o", f"{lab.workdir}/bundle.tar.gz"]
    assert "files" in lab.check_output("n1", argv, cgroup=False, timeout_s=60)


def take_over(lab: cluster.Lab, api: agents.Api, agent: Contained) -> None:
    """Told by its Node, it removes what kube-proxy has left in nf_tables; no tool is called for that."""
    for script in ("add table ip kube-proxy", "add table ip nat", "add chain ip nat KUBE-SERVICES"):
        lab.check_output("n1", ["nft", script], cgroup=False)
    for order in ("take-over/1", None):
        labels = {migration.LABEL: migration_plan.LBPROXY}
        patch = {"metadata": {"annotations": {migration.ANNOTATION: order}, "labels": labels}}
        api.do(lambda server, patch=patch: server.store.patch("nodes", ("", "n1"), patch))  # type: ignore[misc]
        said = agent.says("take-over/1: done")
    assert "iptables-nft: 1 chains" in said
    assert "nftables: table ip kube-proxy" in said


@pytest.mark.usefixtures("spare_cache")
@pytest.mark.parametrize("overlay", ["default", "hostile"])
def test_what_the_containers_may_do_is_enough(overlay: str, lab: cluster.Lab, api: agents.Api) -> None:
    given, cleaning = rights(f"overlays/{overlay}"), rights("cleanup")
    home, away = "n1/p2", "n1/p3"
    agent = Contained(lab, api.source, *agents.SMALL_MAPS, "--take-over=when-told")
    with contextlib.ExitStack() as stack:
        # The node has a bpffs: no container may have to mount one.
        hostile = "load" in given
        shared = lab.workdir / f"node-bpf-{overlay}"
        shared.mkdir()
        subprocess.run(["mount", "-t", "bpf", "bpf", str(shared)], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", str(shared)], check=True)
        agent.root = shared / "lbproxy"
        stack.callback(agent._leave)
        api.put(*manifests.slices("web", [lab[home]]))
        servers = [lab.serve(home), lab.serve(away)]
        for server in servers:
            stack.callback(server.stop)
        if hostile:
            agent.rights = given["load"]
            argv = lab.command("n1", agent.command("--init-only"), cgroup=False)
            subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
        agent.rights = given["lbproxy"]
        agent.start()
        assert ("datapath adopted" in agent.log) is hostile
        address = manifests.cluster_ip(WEB)
        assert agent.at("n1/p1").tcp(address, manifests.TCP_PORT).server == home
        waiting = agent.at("n1/p1").open(address, manifests.UDP_PORT, udp=True)
        assert waiting.ask().server == home
        api.put(*manifests.slices("web", [lab[away]]))
        # What the price of fewer rights is, docs/install.md says.
        agent.says("cannot look for sockets in" if hostile else "closed UDP sockets")
        assert "setns: Operation not permitted" in agent.log or not hostile
        agent.has_backends("web", {away})
        assert agent.at("n1/p1").tcp(address, manifests.TCP_PORT).server == away
        look(lab, agent)
        take_over(lab, api, agent)
        # The way back. It waits for the agent to be gone.
        argv = [*limited(cleaning["cleanup"]), *rootfs.lbproxy(), "cleanup", f"--bpffs={agent.root}"]
        clean = lab.command("n1", argv, cgroup=False)
        refused = subprocess.run(clean, capture_output=True, text=True, check=False, timeout=60)
        assert refused.returncode == 1
        assert "stop it first" in refused.stderr
        assert agent.stop() == 0
        # As it is left where connections that kube-proxy began outlive the agent.
        lab.check_output("n1", ["nft", f"add table inet {anchor.NAME}"], cgroup=False)
        subprocess.run(clean, check=True, timeout=60)
        assert not agent.root.exists()
        assert anchor.NAME not in lab.check_output("n1", ["nft", "list tables"], cgroup=False)
