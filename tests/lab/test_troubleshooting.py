"""docs/troubleshooting.md shows what its commands print: each is run here, on a node like the page's."""

import collections.abc
import pathlib
import re
import shlex
import subprocess
import typing

import pytest

from lbproxy.lab import cluster
from tests import polling
from tests.lab import agents, manifests

PAGE: typing.Final = pathlib.Path(__file__).parents[2] / "docs/troubleshooting.md"
PODS = ("n1/p2", "n2/p1")
AGENT_FLAGS = ("--cluster-cidr=10.244.0.0/16,fd00:244::/32",)
HTTP = manifests.HTTP

_COMMENTS = r"((?:^<!-- [^\n]* -->\n)*)"
_BLOCK = re.compile(rf"{_COMMENTS}^```console\n(.*?)^```\n{_COMMENTS}", re.M | re.S)
_ORDER = re.compile(r"<!-- (before|meanwhile|after): (.*) -->")
_COMMAND = re.compile(r"(lbproxy|curl)\b")


class Example(typing.NamedTuple):
    """A command of the page, what it shows of its output, and what happens around it."""

    command: str
    shown: tuple[str, ...]
    orders: tuple[tuple[str, str], ...]


def examples() -> list[Example]:
    found = []
    for before, body, after in _BLOCK.findall(PAGE.read_text()):
        orders = tuple(_ORDER.findall(before + after))
        for part in body.split("$ ")[1:]:
            command, *shown = part.strip("\n").split("\n")
            found.append(Example(command, tuple(line for line in shown if line.strip()), orders))
    return found


EXAMPLES = examples()


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    here, there = (lab[pod] for pod in PODS)
    unready = manifests.Member(there, ready=False, serving=False)
    closed = HTTP._replace(target=9)

    def service(
        name: str, number: int, port: manifests.Port = HTTP, ip: str = "", **spec: typing.Any
    ) -> manifests.Object:
        more: dict[str, typing.Any] = {"load_balancer": [{"ip": ip}], "type": "LoadBalancer"} if ip else {}
        return manifests.service(name, number, ports=[port], **more, **spec)

    objects = [
        manifests.node("n1", str(lab["n1"].ipv4), str(lab["n1"].ipv6)),
        service("cart", 1, HTTP.on_node_port(30080)),
        *manifests.slices("cart", [here, there], ports=[HTTP]),
        service("empty", 2),
        *manifests.slices("empty", [unready], ports=[HTTP]),
        service("office", 3, ip="203.0.113.3", loadBalancerSourceRanges=["172.18.0.2/32"]),
        *manifests.slices("office", [here], ports=[HTTP]),
        service("local", 4, ip="203.0.113.4", externalTrafficPolicy="Local", healthCheckNodePort=32004),
        *manifests.slices("local", [there], ports=[HTTP]),
        service("closed", 5, closed),
        *manifests.slices("closed", [there], ports=[closed]),
        service("sticky", 6, **manifests.affinity(10800)),
        *manifests.slices("sticky", [here, there], ports=[HTTP]),
        service("direct", 7, ip="203.0.113.7", annotations={"lbproxy.io/mode": "dsr"}),
        *manifests.slices("direct", [there], ports=[HTTP]),
    ]
    with agents.Api(lab.netns("n1"), *objects) as running:
        for network in ("10.96.0.0/16", "203.0.113.0/24"):
            via = ["via", str(lab["n1"].ipv4)]
            lab.check_output("outside", ["ip", "route", "add", network, *via], cgroup=False)
        yield running


def test_the_page_has_examples_of_all_that_it_recommends() -> None:
    assert len(EXAMPLES) >= 18
    assert all(_COMMAND.match(example.command) for example in EXAMPLES)
    used = {example.command.split()[1] for example in EXAMPLES if example.command.startswith("lbproxy")}
    assert used == {"explain", "trace", "backends", "status", "maps", "support-bundle"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.command)
def test_what_the_page_shows_is_what_is_printed(
    lab: cluster.Lab, agent: agents.Agent, tmp_path: pathlib.Path, example: Example
) -> None:
    polling.eventually(lambda: agent.ports("direct"), what="services")
    for when, what in example.orders:
        if when == "before":
            do(lab, agent, what)
    try:
        said = run(lab, agent, example, tmp_path)
    finally:
        for when, what in example.orders:
            if when == "after":
                do(lab, agent, what)
    for line in example.shown:
        shown = line.replace("/tmp/lbproxy-bundle", str(tmp_path / "lbproxy-bundle"))
        assert re.search(pattern(shown), said, re.MULTILINE), (line, said)


def run(lab: cluster.Lab, agent: agents.Agent, example: Example, tmp_path: pathlib.Path) -> str:
    argv = shlex.split(example.command.replace("/tmp/lbproxy-bundle", str(tmp_path / "lbproxy-bundle")))
    if argv[0] == "lbproxy":
        argv = [*agents.LBPROXY, argv[1], "--bpffs", str(agent.root), *argv[2:]]
    meanwhile = [what for when, what in example.orders if when == "meanwhile"]
    if meanwhile and "trace" in argv:
        # It is ended below: the page's seconds may be over before a busy machine has got to the traffic.
        argv[argv.index("--for") + 1] = str(polling.TIMEOUT_S)
    running = lab.popen(agent.node, argv, cgroup=False, stdout=subprocess.PIPE)
    assert running.stdout is not None
    said = ""
    if meanwhile and "trace" in argv:
        while "WHERE" not in said:
            line = running.stdout.readline()
            assert line
            said += line
        for what in meanwhile:
            do(lab, agent, what)
        steps = [pattern(line) for line in example.shown if not line.startswith("#")]
        while not all(re.search(one, said, re.MULTILINE) for one in steps):
            line = running.stdout.readline()
            if not line:
                break
            said += line
        running.terminate()
    said += running.communicate(timeout=60)[0]
    assert running.returncode == 0
    return said


def do(lab: cluster.Lab, agent: agents.Agent, what: str) -> None:
    action, where, *more = what.split()
    if action in ("mute", "unmute"):
        # It hears, and its answers get nowhere.
        verb = {"mute": "add", "unmute": "del"}[action]
        lab.check_output(where, ["ip", "route", verb, "blackhole", "10.244.1.0/24"], cgroup=False)
    else:
        assert action == "tcp"
        with lab.shell(where, cgroup=where != "outside") as at:
            at.tcp(more[0], int(more[1]), timeout_s=1.5)


def pattern(line: str) -> str:
    """Any number of blanks for some, anything for …, any port that the kernel gave for another."""
    pieces = []
    for piece in re.split(r"(…|\s+|:\d{5}\b)", line.strip()):
        if piece == "…":
            pieces.append(".*")
        elif not piece.strip():
            pieces.append(r"\s+" if piece else "")
        elif re.fullmatch(r":\d{5}", piece) and piece != ":30080":
            pieces.append(r":\d+")
        else:
            pieces.append(re.escape(piece))
    return "".join(pieces)
