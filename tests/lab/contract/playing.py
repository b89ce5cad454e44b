"""Plays scenarios: the lab with its servers and routes, the agent, and what the probes bring back."""

import collections
import collections.abc
import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys
import typing

from lbproxy.lab import cluster, netns, topology
from tests.lab import agents
from tests.lab.contract import book, judging, oracle, variants

PROBER = pathlib.Path(__file__).with_name("prober.py")
TO_SERVICES = ("10.96.0.0/16", "198.18.0.0/15", "203.0.0.0/16", "fd00:96::/32", "2001:db8::/32")
TO_PODS = ("10.244.0.0/16", "fd00:244::/32")
# Longer than a first answer may take on a busy machine, shorter than a second SYN.
QUIET_S, ANSWER_S = 0.7, 10.0


class Player:
    """A lab with an agent on n1 that can be started in each variant."""

    def __init__(
        self, played: collections.abc.Iterable[book.Scenario], program: pathlib.Path | None = None
    ) -> None:
        self.lab = cluster.Lab(book.NODES, program=program)
        self.scenarios = list(played)
        self.variant = variants.VARIANTS["plain"]
        self._stack = contextlib.ExitStack()
        self._agent: agents.Agent | None = None
        self._api: agents.Api | None = None

    def __enter__(self) -> "Player":
        with self._stack:
            self._stack.enter_context(self.lab)
            self._route()
            self._serve()
            objects = [self.variant.node()]
            for scenario in self.scenarios:
                objects += scenario.objects
            self._api = self._stack.enter_context(agents.Api(self.lab.netns("n1"), *objects))
            self._agent = agents.Agent(self.lab, self._api.source)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *exception: typing.Any) -> None:
        if self._agent is not None:
            self._agent.__exit__(None, None, None)
        self._stack.close()

    @property
    def agent(self) -> agents.Agent:
        assert self._agent is not None
        return self._agent

    @property
    def api(self) -> agents.Api:
        assert self._api is not None
        return self._api

    def start(self, variant: variants.Variant) -> None:
        """Start the agent with the flags of a variant, and its Node."""
        if self.agent.running:
            self.agent.stop()
        self.api.put(variant.node())
        self.variant = variant
        self.agent.flags = [*self.api.source, *variant.flags]
        self.agent.start()

    def move(self, zone: str) -> None:
        """Change the zone of n1, while the agent runs."""
        self.variant = dataclasses.replace(self.variant, zone=zone)
        self.api.put(self.variant.node())

    def play(
        self,
        chosen: collections.abc.Sequence[book.Scenario] | None = None,
        clients: collections.abc.Sequence[book.Client] | None = None,
        answer_s: float = ANSWER_S,
    ) -> dict[str, list[judging.Mismatch]]:
        """Probe scenarios from everywhere, and return what is not as the oracle says, by scenario."""
        played = self.scenarios if chosen is None else chosen
        clients = self.variant.clients if clients is None else clients
        objects = [self.variant.node(), *(obj for one in self.scenarios for obj in one.objects)]
        judge = judging.Judge(oracle.Oracle(self.variant.config, objects), self.listening)
        found: dict[str, list[judging.Mismatch]] = {one.name: [] for one in played}
        # The machine has few processors: three clients at a time keep them busy, with much to do.
        with concurrent.futures.ThreadPoolExecutor(3 if len(played) > 10 else len(clients)) as pool:
            batches = pool.map(lambda client: self._probe(client, played, judge, answer_s), clients)
            for mismatches in batches:
                for one in mismatches:
                    found[one.scenario].append(one)
        return found

    def _probe(
        self,
        client: book.Client,
        played: collections.abc.Sequence[book.Scenario],
        judge: judging.Judge,
        answer_s: float,
    ) -> list[judging.Mismatch]:
        probes = [
            (scenario, target)
            for scenario in played
            if client in scenario.clients
            for target in scenario.targets
        ]
        expected = [judge.expect(client, target) for _, target in probes]
        chains: dict[object, list[int]] = collections.defaultdict(list)
        for index, ((scenario, target), one) in enumerate(zip(probes, expected, strict=True)):
            # Two first connections of a client at once may both be remembered.
            key: object = (scenario.name, target.family, target.protocol) if one.verdict.affinity else index
            chains[key].append(index)
        jobs = [
            [_job(client, probes[index][1], expected[index], answer_s) for index in one]
            for one in chains.values()
        ]
        answers = self._run(client, jobs)
        results: dict[int, judging.Outcomes] = {}
        for indexes, of_chain in zip(chains.values(), answers, strict=True):
            for index, outcomes in zip(indexes, of_chain, strict=True):
                results[index] = judging.outcomes(outcomes)
        mismatches = [
            judging.Mismatch(
                scenario.name, str(client), str(target), one.text, judging.text(results[index]), why
            )
            for index, ((scenario, target), one) in enumerate(zip(probes, expected, strict=True))
            if (why := judge.compare(client, one, results[index]))
        ]
        for key, indexes in chains.items():
            if isinstance(key, tuple):
                mismatches += judging.unfaithful(
                    key[0], str(client), [(probes[i][1], expected[i], results[i]) for i in indexes]
                )
        return mismatches

    def _run(self, client: book.Client, jobs: list[list[dict[str, object]]]) -> list[typing.Any]:
        process = self.lab.popen(
            client.place,
            [sys.executable, "-I", "-S", str(PROBER)],
            cgroup=client.socket,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        output, _ = process.communicate(json.dumps(jobs) + "\n", timeout=200)
        answers: list[typing.Any] = json.loads(output)
        return answers

    # --- the lab ---

    @property
    def listening(self) -> dict[str, set[int]]:
        """Ports that each place listens on."""
        found = {place: {book.TARGET, book.OTHER_TARGET} for place in book.SERVERS}
        # NodePorts that others, or the node itself, use for something else (NP-1, NP-11).
        numbers = {
            target.port
            for scenario in self.scenarios
            if scenario.name == "node-port-addresses"
            for target in scenario.targets
            if target.label == "NodePort"
        }
        for node in ("n1", "n2", "n3"):
            found.setdefault(node, set()).update(numbers)
        return found

    def _serve(self) -> None:
        for place, ports in self.listening.items():
            for port in ports:
                self.lab.serve(place, [port], name=f"{place}@{port}")

    def _route(self) -> None:
        """Lead service addresses to n1, and what n3 and outside answer back through it."""
        n1 = book.PLACES["n1"]
        for place in ("n2", "n3", "outside"):
            self._ip(place, [f"route add {cidr} via {_of(cidr, n1)}" for cidr in TO_SERVICES])
            self._set(place, "accept_redirects", "0")
        self._ip("outside", [f"route add {cidr} via {_of(cidr, n1)}" for cidr in TO_PODS])
        for family in book.FAMILIES:
            n3, pods = book.PLACES["n3"].address(family), topology.pod_subnet(family, 3).cidr
            self._ip(
                "n3",
                [
                    f"route add default via {n1.address(family)} table 100",
                    f"route add {pods} dev cni0 table 100",
                    f"rule add from {pods} lookup 100",
                    f"rule add from {n3} lookup 100",
                ],
                family,
            )

    def _ip(self, place: str, lines: list[str], family: int | None = None) -> None:
        for line in lines:
            words = line.split()
            version = [f"-{family}"] if family else ["-6"] if ":" in line else []
            self.lab.check_output(place, ["ip", *version, *words], cgroup=False)

    def _set(self, place: str, name: str, value: str) -> None:
        def write() -> None:
            for family in ("ipv4", "ipv6"):
                for device in ("all", "eth0"):
                    netns.set_sysctl(f"net.{family}.conf.{device}.{name}", value)

        netns.inside(self.lab.netns(place), write)


def _of(cidr: str, place: topology.Place) -> str:
    return place.ipv6 if ":" in cidr else place.ipv4


def _job(
    client: book.Client, target: book.Target, expected: judging.Expectation, answer_s: float
) -> dict[str, object]:
    count = len(expected.servers)
    if expected.verdict.affinity:
        wanted, least, most = 0, 5, 5
    elif count:
        # With so many at most, one of n is missed once in a hundred million times.
        wanted, least, most = count, 6 + 2 * count, 24 * count
    else:
        wanted, least, most = 0, 2, 2
    return {
        "address": target.address,
        "port": target.port,
        "udp": target.protocol == "UDP",
        "timeout_s": QUIET_S if expected.may_be_quiet else answer_s,
        "wanted": wanted,
        "at_least": least,
        "at_most": most,
        # Elsewhere an unconnected socket would not be told of a refusal.
        "sendto": client.socket,
    }
