"""Secrets are planted in every place where an agent reads some; none is told again."""

import collections.abc
import pathlib
import subprocess
import sys

import pytest
import yaml

from lbproxy.lab import cluster
from tests import polling
from tests.lab import agents, manifests, test_life

SECRETS = {
    "token": "t0ken-of-a-user",
    "password": "passw0rd-of-a-user",
    "url": "passw0rd-of-a-url",
    "env": "s3cret-of-a-plugin",
    "plugin": "t0ken-of-a-plugin",
}
NODE_AND_SERVICE = 2


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    objects = [manifests.node("n1", lab["n1"].ipv4), manifests.service("web", 1)]
    bad = manifests.service("bad", 2)
    bad["spec"]["ports"][0]["port"] = 0
    with agents.Api(lab.netns("n1"), *objects, bad, tokens=[SECRETS["token"]]) as running:
        yield running


def kubeconfig(path: pathlib.Path, server: str, user: dict[str, object]) -> pathlib.Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "lab", "user": "agent"}}],
        "clusters": [{"name": "lab", "cluster": {"server": server}}],
        "users": [{"name": "agent", "user": user}],
    }
    path.write_text(yaml.safe_dump(config))
    return path


def plugin(script: str) -> dict[str, object]:
    return {
        "exec": {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": sys.executable,
            "args": ["-c", script],
            "env": [{"name": "PLUGIN_SECRET", "value": SECRETS["env"]}],
            "interactiveMode": "Never",
        }
    }


def tells_nothing(text: str) -> None:
    assert {name: text.count(secret) for name, secret in SECRETS.items() if secret in text} == {}


def test_an_agent_that_serves_tells_no_secret(
    lab: cluster.Lab, api: agents.Api, tmp_path: pathlib.Path
) -> None:
    assert api.server is not None
    url = api.server.url.replace("://", f"://somebody:{SECRETS['url']}@")
    path = kubeconfig(tmp_path / "kubeconfig", url, {"token": SECRETS["token"]})
    flags = ["--kubeconfig", str(path), "--master", url, "-v=9", *agents.SMALL_MAPS]
    with agents.Agent(lab, flags) as agent:
        agent.says("API server http://127.0.0.1:")

        def echo(server: object) -> None:
            # A server that says what it was asked with.
            server.faults.fail, server.faults.fail_status = 2, 500  # type: ignore[attr-defined]
            server.faults.fail_message = f"who is Bearer {SECRETS['token']}?"  # type: ignore[attr-defined]
            server.cut()  # type: ignore[attr-defined]

        api.do(echo)
        agent.says("who is Bearer (hidden)?")
        pages = [
            test_life.get(lab, "n1", f"http://127.0.0.1:{port}/{page}")
            for port, names in ((10256, "healthz livez"), (10249, "metrics flagz statusz configz"))
            for page in names.split()
        ]
        assert [status for status, _ in pages] == [200] * len(pages)
        for _, body in pages:
            tells_nothing(body)
        assert any("master=http://127.0.0.1:" in body for _, body in pages)
        polling.eventually(lambda: len(test_life.events(api)) >= NODE_AND_SERVICE, what="Events")
        tells_nothing(str(test_life.events(api)))
        argv = lab.command("n1", [*agents.LBPROXY, "preflight", "--node-name=n1", *flags[:4]], cgroup=False)
        found = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
        assert "API server" in found.stdout
        tells_nothing(found.stdout + found.stderr)
        tells_nothing(agent.log)


@pytest.mark.parametrize(
    ("user", "told"),
    [
        ({"token": "wrong-" + SECRETS["token"]}, "401"),
        ({"username": "u", "password": SECRETS["password"]}, "401"),
        (plugin("import os, sys; sys.exit('no: ' + os.environ['PLUGIN_SECRET'])"), "no: (hidden)"),
        (plugin(f"print('{SECRETS['plugin']}')"), "failed to decode"),
        (plugin(f'print(\'{{"kind": 1, "token": "{SECRETS["plugin"]}"}}\')'), "apiVersion"),
    ],
    ids=["token", "password", "plugin's complaint", "plugin's nonsense", "plugin's object"],
)
def test_what_can_not_be_used_is_told_without_it(
    lab: cluster.Lab, api: agents.Api, tmp_path: pathlib.Path, user: dict[str, object], told: str
) -> None:
    assert api.server is not None
    path = kubeconfig(tmp_path / "kubeconfig", api.server.url, user)
    argv = [*agents.LBPROXY, "preflight", "--node-name=n1", "--kubeconfig", str(path)]
    found = subprocess.run(
        lab.command("n1", argv, cgroup=False), capture_output=True, text=True, check=False, timeout=60
    )
    assert told in found.stdout
    tells_nothing(found.stdout + found.stderr)


def test_a_malformed_kubeconfig_is_not_quoted(lab: cluster.Lab, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(f"users:\n- name: agent\n  user: {{token: {SECRETS['token']}\nclusters: []\n")
    for command in ("preflight", "run"):
        argv = [*agents.LBPROXY, command, "--node-name=n1", "--kubeconfig", str(path)]
        argv += ["--bpffs", str(lab.workdir / "none"), "--cgroup", str(lab.cgroup("n1"))]
        found = subprocess.run(
            lab.command("n1", argv, cgroup=False), capture_output=True, text=True, check=False, timeout=60
        )
        assert "malformed YAML: line " in found.stdout + found.stderr
        tells_nothing(found.stdout + found.stderr)
