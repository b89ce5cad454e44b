"""Connected UDP sockets whose backend goes: woken and closed, so that they reach another one."""

import collections.abc
import contextlib
import errno
import subprocess
import sys
import time
import typing

import pytest

from lbproxy.lab import cluster, shell
from tests import polling
from tests.lab import agents, manifests

PODS = ("n1/p2", "n1/p3")
CLIENTS = ("n1/p1", "n1")
HOME, AWAY = PODS
_NUMBERS = iter(range(1, 100))
# Says how a blocked recv() ended, and after how long.
WAITER = (
    "import json, socket, sys, time\n"
    "family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET\n"
    "waiting = socket.socket(family, socket.SOCK_DGRAM)\n"
    "waiting.connect((sys.argv[1], int(sys.argv[2])))\n"
    "print('connected', flush=True)\n"
    "try:\n"
    "    waiting.recv(1)\n"
    "except OSError as error:\n"
    "    print(error.errno, flush=True)\n"
)

families = pytest.mark.parametrize("family", [4, 6])
clients = pytest.mark.parametrize("where", CLIENTS)


class Service(typing.NamedTuple):
    """A service whose endpoints a test moves about."""

    name: str
    number: int
    api: agents.Api
    agent: agents.Agent

    def is_served_by(self, *members: str | manifests.Member) -> None:
        """Give it these endpoints, and wait until the kernel has them."""
        made = [self.agent.lab[one] if isinstance(one, str) else one for one in members]
        self.api.put(*manifests.slices(self.name, made))
        places = {one.place.name if isinstance(one, manifests.Member) else one.name for one in made}
        if all(isinstance(one, str) for one in members):
            self.agent.has_backends(self.name, places)

    def address(self, family: int = 4) -> str:
        return manifests.cluster_ip(self.number, family)

    def open(self, where: str, family: int = 4, *, mapped: bool = False) -> shell.Socket:
        """A connected UDP socket that has had an answer."""
        opened = self.agent.at(where).open(self.address(family), manifests.UDP_PORT, udp=True, mapped=mapped)
        assert opened.ask().server in PODS
        return opened


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    with agents.Api(lab.netns("n1")) as running:
        yield running


@pytest.fixture
def service(api: agents.Api, agent: agents.Agent) -> collections.abc.Iterator[Service]:
    number = next(_NUMBERS)
    made = Service(f"svc-{number}", number, api, agent)
    objects = [manifests.service(made.name, number), *manifests.slices(made.name, [agent.lab[HOME]])]
    api.put(*objects)
    agent.has_backends(made.name, {HOME})
    yield made
    api.delete(*objects)
    polling.eventually(lambda: made.name not in agent.services(), what="the service gone")


def is_closed(opened: shell.Socket) -> None:
    """Wait until the socket has been closed from outside; nothing else may have happened to it."""
    with pytest.raises(ConnectionAbortedError):
        opened.recvfrom(polling.TIMEOUT_S)


def is_open(opened: shell.Socket, server: str) -> None:
    assert opened.ask().server == server


@families
@clients
def test_a_socket_of_a_backend_that_went_is_closed_and_reaches_another(
    service: Service, where: str, family: int
) -> None:
    opened = service.open(where, family)
    service.is_served_by(AWAY)
    is_closed(opened)
    opened.connect(service.address(family), manifests.UDP_PORT)
    is_open(opened, AWAY)
    opened.close()


def test_a_dual_stack_socket_is_closed_too(service: Service) -> None:
    opened = service.open("n1/p1", mapped=True)
    service.is_served_by(AWAY)
    is_closed(opened)
    opened.close()


@families
def test_a_blocked_receiver_is_woken(service: Service, family: int) -> None:
    argv = [sys.executable, "-I", "-S", "-c", WAITER, service.address(family), str(manifests.UDP_PORT)]
    waiting = service.agent.lab.popen("n1/p1", argv, stdout=subprocess.PIPE)
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "connected\n"
    service.is_served_by(AWAY)
    assert waiting.stdout.readline() == f"{errno.ECONNABORTED}\n"
    assert waiting.wait(polling.TIMEOUT_S) == 0
    waiting.stdout.close()


def test_what_dialled_the_backend_itself_and_what_other_backends_have_stays(service: Service) -> None:
    service.is_served_by(HOME, AWAY)
    direct = service.agent.at("n1/p1").open(service.agent.lab[HOME].ipv4, manifests.TARGET_PORT, udp=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(direct)
        opened = {HOME: list[shell.Socket](), AWAY: list[shell.Socket]()}
        while not all(opened.values()):
            one = stack.enter_context(service.open("n1/p1"))
            opened[one.ask().server].append(one)
        tcp = stack.enter_context(service.agent.at("n1/p1").open(service.address(), manifests.TCP_PORT))
        server = tcp.ask().server
        service.is_served_by(AWAY)
        for one in opened[HOME]:
            is_closed(one)
        for one in opened[AWAY]:
            is_open(one, AWAY)
        is_open(direct, HOME)
        is_open(tcp, server)


def test_connections_of_tcp_are_not_cut(service: Service) -> None:
    with service.agent.at("n1/p1").open(service.address(), manifests.TCP_PORT) as tcp:
        udp = service.open("n1/p1")
        service.is_served_by(AWAY)
        is_closed(udp)
        is_open(tcp, HOME)
        udp.close()


def test_a_backend_that_terminates_but_serves_keeps_its_sockets(service: Service) -> None:
    lab = service.agent.lab
    with service.open("n1/p1") as opened, service.open("n1/p1") as left:
        terminating = manifests.Member(lab[HOME], ready=False, terminating=True)
        service.is_served_by(manifests.Member(lab[AWAY]), terminating)
        service.agent.has_backends(service.name, {AWAY})
        time.sleep(0.5)
        is_open(opened, HOME)
        service.is_served_by(manifests.Member(lab[AWAY]), terminating._replace(serving=False))
        is_closed(left)


def test_where_no_other_serves_the_socket_stays_until_one_does(service: Service) -> None:
    with service.open("n1/p1") as opened:
        service.is_served_by()
        time.sleep(0.5)
        is_open(opened, HOME)
        service.is_served_by(AWAY)
        is_closed(opened)


def test_what_went_while_no_agent_ran_is_made_up_for(service: Service) -> None:
    opened = service.open("n1/p1")
    service.agent.kill()
    service.api.put(*manifests.slices(service.name, [service.agent.lab[AWAY]]))
    is_open(opened, HOME)
    service.agent.start()
    is_closed(opened)
    opened.close()
