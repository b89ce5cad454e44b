"""A SYN flood from many sources takes no connection away, and keeps no new ones from other services."""

import collections.abc
import contextlib
import os
import pathlib
import subprocess
import sys

import pytest

from lbproxy import abi
from lbproxy.core import tables
from lbproxy.lab import cluster
from tests.lab import agents
from tests.lab.wire import held, wires
from tests.lab.wire.ways import BACKENDS, TARGET, Way

# A CPU's share of `flows_new`, of which each CPU forgets its own oldest. The kernel counts every CPU that
# may ever be there.
SHARE = 32768
AGENT_FLAGS = ("--map-rows", "flows=32768", "--map-rows", f"flows_new={SHARE * abi.possible_cpus()}")
ROWS = 4  # of a masqueraded flow
# What a new connection is promised is counted in flows and not in time: its handshake has to end before so
# many others began as there is room for. The kernel drops packets where one CPU is flooded and another busy,
# and until TCP sends them again a fast flood may have turned all rows over. So the flood waits for the
# connections that began beside each part of it. A part takes a quarter of the room: rows that no packet has
# met yet are forgotten when as few as 0.38 of it came after them (the kernel's LRU, played through).
PART = SHARE // ROWS // 4
PARTS = 30
EACH = 5
# SYNs from random sources and ports to one port, as fast as it can: as many as each line says; prints how
# many a second.
SEND_SYNS = """
import random, socket, struct, sys, time
device, to, by, dst, port = sys.argv[1:6]
dst, port = socket.inet_aton(dst), int(port)
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
wire.bind((device, 0))
link = bytes.fromhex((to + by).replace(":", "")) + b"\\x08\\0"
words = lambda data: sum(struct.unpack(f"!{len(data) // 2}H", data))
head = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0x4000, 64, 6, 0)
tcp = lambda sport, check: struct.pack("!HHIIBBHHH", sport, port, 1, 0, 0x50, 2, 64240, check, 0)
ip_sum, tcp_sum = words(head + dst), words(dst + struct.pack("!HH", 6, 20) + tcp(0, 0))
fold = lambda total: 0xffff - (total % 0xffff or 0xffff)
def one():
    low, sport = random.getrandbits(17), random.randrange(1024, 65536)
    src = (198 << 24 | 18 << 16 | low).to_bytes(4, "big")
    more = words(src)
    ip = head[:10] + fold(ip_sum + more).to_bytes(2, "big") + src + dst
    frame = link + ip + tcp(sport, fold(tcp_sum + more + sport))
    while True:
        try:
            return wire.send(frame)
        except OSError:  # no room at the moment
            time.sleep(0.0005)
for line in sys.stdin:
    started = time.monotonic()
    for _ in range(int(line)):
        one()
    print(round(int(line) / (time.monotonic() - started)), flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def servers(lab: cluster.Lab) -> None:
    for pod in BACKENDS:
        lab.serve(pod, ports=[TARGET])


@contextlib.contextmanager
def flooder(lab: cluster.Lab, way: Way, cpu: int) -> collections.abc.Iterator[subprocess.Popen[str]]:
    argv = ["taskset", "-c", str(cpu), sys.executable, "-I", "-S", "-c", SEND_SYNS, "eth0"]
    argv += [wires.mac(lab, "n1"), wires.mac(lab, "outside"), str(lab["n1"].ipv4), str(way.node_port)]
    with lab.popen("outside", argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process


def test_a_syn_flood_takes_no_connection_away(lab: cluster.Lab, agent: agents.Agent) -> None:
    wires.ip(lab, "n1", "route replace 198.18.0.0/15 via 172.18.0.254 dev eth0")
    assert agent.process is not None
    everyone = flooded, *others = held.targets(lab)
    cpu = min(os.sched_getaffinity(0))
    memory, rates, new = resident(agent.process.pid), [], 0
    with held.established(lab), flooder(lab, flooded[0], cpu) as flood:
        assert flood.stdin is not None
        assert flood.stdout is not None
        for _ in range(PARTS):
            flood.stdin.write(f"{PART}\n")
            flood.stdin.flush()
            # At the flooded address some are late once rows were forgotten: from the ports that those had its
            # backend has connections half open.
            asked = others if agent.counter("flows_full") else everyone
            # Of one family they come where the flood does, and their rows are beside its rows.
            fresh = [
                lab.client(
                    "outside",
                    "short",
                    node,
                    way.node_port,
                    count=EACH,
                    timeout_s=20,
                    cpu=cpu if ":" not in node else None,
                )
                for way, node in asked
            ]
            found = [client.result() for client in fresh]
            rates.append(int(flood.stdout.readline()))
            assert [result.failures for result in found] == [{}] * len(asked)
            assert [result.servers for result in found] == [{way.backend: EACH} for way, _ in asked]
            new += sum(result.count for result in found)
        grown = resident(agent.process.pid) - memory
    rows, room = len(list(agent.maps.rows(tables.Table.FLOWS))), agent.maps.rows_of("flows")
    speed = f"{min(rates)} to {max(rates)} SYNs a second"
    print(f"{speed}, {new} connections; {rows} of {room} rows; {grown} MB more")
    # All rows of the flood's CPU were turned over, more than once.
    assert agent.counter("flows_full") > 2 * SHARE
    assert rows <= room
    assert grown < 20


def resident(pid: int) -> int:
    """How much memory a process has, in MB."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024
