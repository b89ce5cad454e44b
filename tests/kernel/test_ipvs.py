"""kube-proxy's IPVS mode as it shows in a network namespace; the kernel need not have IPVS."""

import collections.abc
import os
import socket
import struct
import subprocess

import pytest

from lbproxy.core import conntrack, leftovers, model
from lbproxy.kernel import conntrack as tracker
from lbproxy.kernel import ipvs, namespaces, netlink
from lbproxy.lab import netns
from tests import installing

CLIENT, SERVICE, POD = ("192.0.2.9", "10.96.0.1", "10.244.1.2")
NEW = 1 << 8  # IPCTNL_MSG_CT_NEW


@pytest.fixture
def space(needs_bpf: None) -> collections.abc.Iterator[str]:
    name = f"lbp-ipvs-{os.getpid()}"
    netns.create(name, {})
    try:
        yield name
    finally:
        netns.remove(name)


def tracked(answers: str) -> None:
    """Enter a connection to the service as IPVS leaves it: `answers` does, and no bit says why."""
    client, service, backend = map(installing.address, (CLIENT, SERVICE, answers))
    ends = conntrack.Tuple(client, service, (40000).to_bytes(2, "big"), (80).to_bytes(2, "big"))
    payload = conntrack.reservation(conntrack.Reserved(model.Protocol.TCP, ends, 600))
    # The source of the answers comes second: the first time, it is where the client sends to.
    at = payload.rindex(service[12:])
    payload = payload[:at] + backend[12:] + payload[at + 4 :]
    with netlink.Netlink(12) as kernel:
        kernel.request(NEW, payload, 0x600)


def device() -> None:
    make = ["ip", "link", "add", leftovers.IPVS_DEVICE, "type", "veth", "peer", "name", "other"]
    subprocess.run(make, check=True)


def test_where_kube_proxys_device_is_its_virtual_servers_are_asked_for(space: str) -> None:
    def script() -> None:
        assert ipvs.look() is None
        device()
        found = ipvs.look()
        assert found is not None
        assert (found.servers, found.connections, found.problem) == (0, {}, "")

    namespaces.inside(netns.path(space), script)


@pytest.mark.parametrize(("answers", "by_ipvs"), [(POD, True), (SERVICE, False)])
def test_what_ipvs_translates_is_known_by_who_answers(space: str, answers: str, by_ipvs: bool) -> None:
    def script() -> None:
        tracked(answers)
        assert list(tracker.translated()) == []
        device()
        found = [
            (socket.inet_ntoa(one.reply.src[12:]), *struct.unpack(">H", one.original.dport))
            for one in tracker.translated()
        ]
        assert found == ([(POD, 80)] if by_ipvs else [])

    namespaces.inside(netns.path(space), script)
