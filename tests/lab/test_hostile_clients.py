"""A thousand clients that mean no good, and probes that are answered all the same."""

import collections.abc
import os
import pathlib
import subprocess
import sys

import pytest

from lbproxy.lab import cluster
from tests.lab import agents, manifests

HEALTH, METRICS, CHECK = 10256, 10249, 30103
COUNT = 334  # to each of the three
PROBES = 2 if not os.environ.get("LBPROXY_MARATHON") else 200
# Asks each URL so many times and prints, for each, the statuses and the longest answer in milliseconds.
ASK = """
import json, sys, time, urllib.request
told = {}
for _ in range(int(sys.argv[1])):
    for url in sys.argv[2:]:
        began = time.monotonic()
        status = urllib.request.urlopen(url, timeout=60).status
        statuses, longest = told.get(url, ([], 0))
        told[url] = sorted({*statuses, status}), max(longest, round(1e3 * (time.monotonic() - began)))
print(json.dumps(told))
"""
# A server keeps 256 connections at most, and an agent without any has less than a hundred files open.
MOST_FILES = 3 * 256 + 150
MOST_GROWTH_KB = 65_536


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    balanced = manifests.service(
        "balanced", 2, type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=CHECK
    )
    node = manifests.node("n1", *lab["n1"].addresses)
    objects = [balanced, *manifests.slices("balanced", [lab["n1/p2"]]), node]
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


def resident_kb(pid: int) -> int:
    (line,) = (
        line for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in line
    )
    return int(line.split()[1])


def test_probes_are_answered_whatever_others_send(lab: cluster.Lab, api: agents.Api) -> None:
    host = lab["n1"].ipv4
    urls = [f"http://{host}:{HEALTH}/{path}" for path in ("healthz", "livez")]
    urls += [f"http://{host}:{METRICS}/{path}" for path in ("metrics", "healthz")]
    urls.append(f"http://{host}:{CHECK}/")
    flags = ("--metrics-bind-address", f"0.0.0.0:{METRICS}", *agents.SMALL_MAPS)
    with agents.Agent(lab, api.source, *flags) as agent:
        assert agent.process is not None
        pid = agent.process.pid
        before_kb, most_files = resident_kb(pid), 0
        ports = ",".join(map(str, (HEALTH, METRICS, CHECK)))
        argv = [sys.executable, "-m", "tests.lab.hostile_clients", host, ports, str(COUNT)]
        hostile = lab.popen("outside", argv, stdout=subprocess.PIPE)
        assert hostile.stdout is not None
        try:
            assert hostile.stdout.readline() == "connected\n"
            for _ in range(2):
                told = agents.run_script(lab, "n2", ASK, PROBES // 2, *urls)
                assert [url for url, (statuses, _) in told.items() if statuses != [200]] == []
                most_files = max(most_files, len(os.listdir(f"/proc/{pid}/fd")))
                print({url: longest for url, (_, longest) in told.items()})
            assert hostile.poll() is None
        finally:
            hostile.kill()
            hostile.wait(10)
        print(f"files={most_files} memory=+{resident_kb(pid) - before_kb} kB")
        assert most_files <= MOST_FILES
        assert resident_kb(pid) - before_kb <= MOST_GROWTH_KB
        assert "Traceback" not in agent.log
