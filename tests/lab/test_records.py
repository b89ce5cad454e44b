"""What sockets are remembered by must not outlive, or be mistaken for, what it stood for."""

import collections.abc
import itertools

import pytest

from lbproxy.core import addresses, inventory, tables
from lbproxy.kernel import libbpf, map_rows
from lbproxy.lab import cluster, shell
from tests import polling
from tests.lab import agents, manifests

WEB, OTHER = 1, 2
PODS = ("n1/p1", "n1/p2", "n1/p3")
IPPROTO_MPTCP = 262
# So few that ids go round.
FEW_IDS = ("--map-rows", "backends=17", "--map-growth-limit=1")


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    objects = [manifests.service("web", WEB), *manifests.slices("web", [lab["n1/p2"]])]
    objects += [manifests.service("other", OTHER), *manifests.slices("other", [lab["n1/p3"]])]
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


@pytest.fixture(scope="module")
def agent(lab: cluster.Lab, api: agents.Api) -> collections.abc.Iterator[agents.Agent]:
    for pod in PODS:
        lab.serve(pod, [manifests.TARGET_PORT])
    with agents.Agent(lab, api.source, *agents.SMALL_MAPS, *FEW_IDS) as running:
        yield running


def ask(opened: shell.Socket, number: int) -> tuple[str, shell.Address | None]:
    opened.sendto(b"?\n", manifests.cluster_ip(number), manifests.UDP_PORT)
    data, sender = opened.recvfrom()
    return shell.parse_identity(data)[0], sender


def backend(agent: agents.Agent) -> inventory.Backend:
    """The one backend of the UDP port that is in use; one that drains may stand beside it."""
    (found,) = [one for one in agent.port("web", "dns").backends if one.sets]
    return found


def test_a_backend_id_that_went_to_another_backend_is_not_trusted(
    lab: cluster.Lab, api: agents.Api, agent: agents.Agent
) -> None:
    service = (manifests.cluster_ip(WEB), manifests.UDP_PORT)
    opened = agent.at("n1/p1").socket(4, udp=True)
    assert ask(opened, WEB) == ("n1/p2", service)
    first = backend(agent)
    # The service goes round its pods until the id that the socket remembers is another pod's.
    for pod in itertools.islice(itertools.cycle(("n1/p3", "n1/p1")), 20):
        api.put(*manifests.slices("web", [lab[pod]]))
        agent.has_backends("web", {pod})
        now = backend(agent)
        if now.id == first.id and now.address != first.address:
            break
        # Ids are given out again when the quarantine is over.
        polling.eventually(
            lambda: len(agent.port("web", "dns").backends) == 1, what="the drained row cleared"
        )
    assert (now.id, now.address != first.address) == (first.id, True)
    assert ask(opened, WEB) == (pod, service)
    opened.close()
    api.put(*manifests.slices("web", [lab["n1/p2"]]))
    agent.has_backends("web", {"n1/p2"})


def test_a_backend_that_is_dialled_itself_is_shown_as_itself(lab: cluster.Lab, agent: agents.Agent) -> None:
    opened = agent.at("n1/p1").socket(4, udp=True)
    for number, pod in ((WEB, "n1/p2"), (OTHER, "n1/p3")):
        assert ask(opened, number)[0] == pod
    itself = (lab["n1/p3"].ipv4, manifests.TARGET_PORT)
    opened.connect(*itself)
    assert opened.getpeername() == itself
    opened.send(b"?\n")
    assert opened.recvfrom()[1] == itself
    opened.close()


def test_multipath_tcp_holds_no_row_after_it_is_closed(lab: cluster.Lab, agent: agents.Agent) -> None:
    polling.eventually(lambda: agent.live_sockets() == 0, what="no socket left")
    script = (
        "import json, socket, sys\n"
        "answers = []\n"
        "for _ in range(5):\n"
        f"    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, {IPPROTO_MPTCP}) as opened:\n"
        "        opened.settimeout(5)\n"
        "        opened.connect((sys.argv[1], int(sys.argv[2])))\n"
        "        opened.send(b'?\\n')\n"
        "        answers.append(opened.recv(99).decode().split()[0])\n"
        "print(json.dumps(answers))\n"
    )
    answers = agents.run_script(lab, "n1/p1", script, manifests.cluster_ip(WEB), manifests.TCP_PORT)
    assert answers == ["n1/p2"] * 5
    polling.eventually(lambda: agent.live_sockets() == 0, what="rows given back")


def test_rows_that_change_places_in_memory_are_not_mixed_up(lab: cluster.Lab, agent: agents.Agent) -> None:
    rows = {}
    for key, row in agent.maps.rows("frontends"):
        unpacked = tables.frontend_key(key)
        for number in (WEB, OTHER):
            if unpacked.proto == 6 and addresses.text(unpacked.addr) == manifests.cluster_ip(number):
                rows[number] = (key, row)
    keys = (rows[WEB][0] + rows[OTHER][0]) * 512
    values = (rows[WEB][1] + rows[OTHER][1]) * 512
    before = agent.port("other").connections
    address = manifests.cluster_ip(WEB)
    client = lab.client("n1/p1", "short", address, manifests.TCP_PORT, count=30_000, seconds=60)
    fd = libbpf.obj_get(str(agent.root / "maps" / "frontends"))
    while client.process.poll() is None:
        map_rows.update_batch(fd, keys, values, 1024)
    result = client.result()
    # At a million writes a second, one row may leave and come back to its place while a lookup stands on
    # it, which then finds nothing and leaves the address alone. A wrong answer it must never give.
    assert set(result.failures) <= {"ETIMEDOUT"}
    assert result.count > 29 * result.failed
    assert set(result.servers) == {"n1/p2"}
    assert agent.port("other").connections == before
    assert agent.counter("bad_slot") == agent.counter("unsteady") == 0
