"""A SYN flood from many sources takes no connection away, and keeps no new ones from other services."""

import pathlib
import sys

import pytest

from lbproxy.core import tables
from lbproxy.lab import cluster
from tests.lab import agents
from tests.lab.wire import wires
from tests.lab.wire.held import connections, results
from tests.lab.wire.ways import BACKENDS, TARGET, WAYS

AGENT_FLAGS = ("--map-rows", "flows=65536", "--map-rows", "flows_new=32768")
FLOOD = 100_000
# SYNs from random sources and ports to one port, as fast as it can; prints how many a second.
SEND_SYNS = """
import random, socket, struct, sys, time
device, to, by, dst, port, count = sys.argv[1:7]
dst, port = socket.inet_aton(dst), int(port)
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
wire.bind((device, 0))
link = bytes.fromhex((to + by).replace(":", "")) + b"\\x08\\0"
words = lambda data: sum(struct.unpack(f"!{len(data) // 2}H", data))
head = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0x4000, 64, 6, 0)
tcp = lambda sport, check: struct.pack("!HHIIBBHHH", sport, port, 1, 0, 0x50, 2, 64240, check, 0)
ip_sum, tcp_sum = words(head + dst), words(dst + struct.pack("!HH", 6, 20) + tcp(0, 0))
fold = lambda total: 0xffff - (total % 0xffff or 0xffff)
started = time.monotonic()
for _ in range(int(count)):
    low, sport = random.getrandbits(17), random.randrange(1024, 65536)
    src = (198 << 24 | 18 << 16 | low).to_bytes(4, "big")
    more = words(src)
    ip = head[:10] + fold(ip_sum + more).to_bytes(2, "big") + src + dst
    frame = link + ip + tcp(sport, fold(tcp_sum + more + sport))
    while True:
        try:
            wire.send(frame)
            break
        except OSError:  # no room at the moment
            time.sleep(0.0005)
print(round(int(count) / (time.monotonic() - started)))
"""


@pytest.fixture(scope="module", autouse=True)
def servers(lab: cluster.Lab) -> None:
    for pod in BACKENDS:
        lab.serve(pod, ports=[TARGET])


def test_a_syn_flood_takes_no_connection_away(lab: cluster.Lab, agent: agents.Agent) -> None:
    wires.ip(lab, "n1", "route replace 198.18.0.0/15 via 172.18.0.254 dev eth0")
    assert agent.process is not None
    flooded = WAYS[0]
    with connections(lab) as fresh:
        agent.serves_on("near", "far", "kept")
        memory = resident(agent.process.pid)
        argv = [
            sys.executable,
            "-I",
            "-S",
            "-c",
            SEND_SYNS,
            "eth0",
            wires.mac(lab, "n1"),
            wires.mac(lab, "outside"),
        ]
        rate = int(lab.check_output("outside", [*argv, lab["n1"].ipv4, str(flooded.node_port), str(FLOOD)]))
        grown = resident(agent.process.pid) - memory
        found = results(fresh)
    rows, room = len(list(agent.maps.rows(tables.Table.FLOWS))), agent.maps.rows_of("flows")
    new = round(sum(result.per_second for result in found))
    print(f"{rate} SYNs and {new} connections a second; {rows} of {room} rows; {grown} MB more")
    # At the flooded address itself some may be late: from most ports its backend has a connection half open.
    assert [result.failures for result in found[1:]] == [{}] * len(found[1:])
    assert all(result.count > 20 for result in found)
    assert agent.counter("flows_full") > 0
    assert rows <= room
    assert grown < 20


def resident(pid: int) -> int:
    """How much memory a process has, in MB."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024
