"""The agent as a process: how it is set up, what it waits for, and what ends it."""

import collections.abc
import contextlib
import json
import pathlib
import shutil
import subprocess
import typing

import pytest

from lbproxy.lab import cluster
from tests import polling
from tests.lab import agents, manifests

WEB = 1


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    objects = [
        manifests.service("web", WEB),
        *manifests.slices("web", [lab["n1/p2"]]),
        node(lab, "10.1.0.0/24"),
    ]
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


def node(lab: cluster.Lab, *pod_cidrs: str) -> manifests.Object:
    return {
        **manifests.node("n1", lab["n1"].address(4), lab["n1"].address(6)),
        "spec": {"podCIDRs": list(pod_cidrs)},
    }


def events(api: agents.Api) -> list[dict[str, typing.Any]]:
    stored = api.do(lambda server: list(server.store.objects["events"].values()))
    return [json.loads(one.raw) for one in stored]


def get(lab: cluster.Lab, where: str, url: str) -> tuple[int, str]:
    """Ask an agent's server from a place of the lab; status 0 where nobody answers."""
    script = (
        "import sys,json,urllib.request,urllib.error\n"
        "try:\n"
        " a=urllib.request.urlopen(sys.argv[1],timeout=5); print(json.dumps([a.status,a.read().decode()]))\n"
        "except urllib.error.HTTPError as e: print(json.dumps([e.code,e.read().decode()]))\n"
        "except OSError as e: print(json.dumps([0,str(e)]))"
    )
    status, body = agents.run_script(lab, where, script, url)
    return status, body


class Bounded(agents.Agent):
    """An agent without CAP_SYS_ADMIN, which mounting needs."""

    def command(self, *flags: str) -> list[str]:
        """Return its command line."""
        rights = ("setpriv", "--bounding-set", "-all,+bpf,+net_admin,+perfmon", "--inh-caps", "-all")
        return [*rights, *super().command(*flags)]


def test_what_init_only_sets_up_is_what_an_agent_with_fewer_rights_starts_with(
    lab: cluster.Lab, api: agents.Api
) -> None:
    agent = Bounded(lab, api.source, *agents.SMALL_MAPS)
    with contextlib.ExitStack() as stack:
        stack.callback(agent._leave)
        argv = lab.command("n1", agents.Agent.command(agent, "--init-only"), cgroup=False)
        done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
        assert "datapath created" in done.stderr
        # Nothing is served before the tables are filled, and nothing is in the way.
        assert agent.services() == set()
        assert agent.at("n1").tcp(manifests.cluster_ip(WEB), 80, timeout_s=0.2).error == "ETIMEDOUT"
        agent.start()
        assert "datapath adopted" in agent.log
        # It may not lower its score either, and says so.
        assert "cannot set oom_score_adj to -999" in agent.log


def test_the_oom_score_is_the_configured_one(lab: cluster.Lab, api: agents.Api) -> None:
    # Raising it needs no rights, unlike the default of -999.
    with agents.Agent(lab, api.source, "--oom-score-adj=321", *agents.SMALL_MAPS) as agent:
        assert agent.process is not None
        # nsenter and the like become the agent: they exec.
        assert pathlib.Path(f"/proc/{agent.process.pid}/oom_score_adj").read_text() == "321\n"


def test_a_change_of_its_configuration_ends_it(
    lab: cluster.Lab, api: agents.Api, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "config.conf"
    path.write_text("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n")
    with agents.Agent(lab, api.source, "--config", str(path), *agents.SMALL_MAPS) as agent:
        draft = tmp_path / "draft"
        draft.write_bytes(path.read_bytes())
        draft.rename(path)
        assert agent.wait() == 1
        assert f"{path} has changed" in agent.log


def test_changed_pod_cidrs_end_it(lab: cluster.Lab, api: agents.Api) -> None:
    with agents.Agent(lab, api.source, "--detect-local-mode=NodeCIDR", *agents.SMALL_MAPS) as agent:
        try:
            api.put(node(lab, "10.2.0.0/24"))
            assert agent.wait() == 1
        finally:
            api.put(node(lab, "10.1.0.0/24"))
        assert "podCIDRs of Node n1 have changed from 10.1.0.0/24 to 10.2.0.0/24" in agent.log


def test_it_waits_for_an_api_server_and_goes_on_without_it(lab: cluster.Lab) -> None:
    objects = [manifests.service("web", WEB), *manifests.slices("web", [lab["n1/p2"]]), node(lab)]
    port = 7444
    agent = agents.Agent(lab, ("--master", f"http://127.0.0.1:{port}"), *agents.SMALL_MAPS)
    with contextlib.ExitStack() as stack:
        stack.callback(agent._leave)
        agent.start(wait=False)
        agent.says("next attempt")
        agent.says("serving health")
        assert get(lab, "n1", "http://127.0.0.1:10256/healthz")[0] == 503
        # It may be waited for: the kubelet should not restart an agent for that.
        assert get(lab, "n1", "http://127.0.0.1:10256/livez")[0] == 200
        with agents.Api(lab.netns("n1"), *objects, port=port):
            agent.wait_ready()
            agent.has_backends("web", {"n1/p2"})
            assert get(lab, "n1", "http://127.0.0.1:10256/healthz")[0] == 200
            before = agent.log.count("next attempt")
        # That it went away again is no reason to take the node out of service.
        polling.eventually(lambda: agent.log.count("next attempt") > before, what="an outage")
        assert get(lab, "n1", "http://127.0.0.1:10256/healthz")[0] == 200
        assert agent.services() == {"web"}


@pytest.mark.skipif(not shutil.which("nft"), reason="needs nft")
def test_what_kube_proxy_left_is_told_and_goes_when_told_to(lab: cluster.Lab, api: agents.Api) -> None:
    for family in ("ip", "ip6"):
        lab.check_output("n1", ["nft", "add", "table", family, "kube-proxy"], cgroup=False)
    with agents.Agent(lab, api.source, *agents.SMALL_MAPS) as agent:
        line = agent.says("kube-proxy's rules are still in force")
        assert "nftables table ip kube-proxy, nftables table ip6 kube-proxy" in line
        tables = ["nft", "list", "tables"]
        assert "table ip kube-proxy" in lab.check_output("n1", tables, cgroup=False)
        told = agent.lbproxy("cleanup", "--kube-proxy")
        assert f"left alone: an lbproxy agent runs on {agent.root}" in told
        assert "kube-proxy" not in lab.check_output("n1", tables, cgroup=False)
        assert agent.running
        assert agent.services() == {"web"}


def test_a_start_is_an_event_on_the_node(lab: cluster.Lab, api: agents.Api) -> None:
    with agents.Agent(lab, api.source, *agents.SMALL_MAPS):
        polling.eventually(lambda: "Starting" in {event["reason"] for event in events(api)})
