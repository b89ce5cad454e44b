"""Puts rules into a network namespace with the tools that kube-proxy calls, and asks the kernel for them.

    at = load.Rules(lambda argv: lab.command("n1", argv), load.Backend.LEGACY, settings)
    seconds = at.start(ports)           # what kube-proxy writes at its start
    seconds = at.read_back(ports)       # what it reads before it writes anything
    seconds = at.change(ports, moved)   # what it writes when endpoints of a service have changed
    at.holds(moved[0])                  # whether the kernel draws from just that port's endpoints

They go with the namespace. What they occupy in the kernel is charged
to the cgroup of the command: `process.MemoryCgroup.kernel_bytes`.
"""

import collections.abc
import enum
import re
import subprocess
import time

from benchmarks.kubeproxy import iptables, model, nftables

Command = collections.abc.Callable[[collections.abc.Sequence[str]], list[str]]

TIMEOUT_S = 900.0  # iptables 1.8.9 on nf_tables takes minutes for 10,000 services


class Backend(enum.StrEnum):
    """What keeps the rules, and the tool that puts them there."""

    LEGACY = "iptables-legacy"
    NF_TABLES = "iptables-nft"
    NATIVE = "nft"


class Rules:
    """The rules of one namespace."""

    def __init__(self, command: Command, backend: Backend, settings: model.Settings) -> None:
        """Write nothing yet; `command` makes a command line one that runs in the namespace."""
        self.backend = backend
        self._command = command
        self._settings = settings
        self._tool = backend.replace("ip", "ip6", 1) if settings.family == 6 else str(backend)
        self._table = nftables.table(settings).split()

    def start(
        self,
        ports: collections.abc.Sequence[model.ServicePort],
        order: collections.abc.Sequence[int] | None = None,
    ) -> float:
        """Load all rules into a namespace without any; the seconds that all but jumps and sysctls took."""
        native = self.backend is Backend.NATIVE
        text = (nftables if native else iptables).full(ports, self._settings, order)
        sysctls = {} if native or self._settings.family == 6 else iptables.SYSCTLS
        for key, value in sysctls.items():
            path = f"/proc/sys/{key.replace('.', '/')}"
            self._run(["/bin/sh", "-c", 'echo "$1" > "$2"', "sysctl", value, path])
        if not native:
            self.load(iptables.hooks())
        return self.load(text)

    def change(
        self,
        before: collections.abc.Sequence[model.ServicePort],
        after: collections.abc.Sequence[model.ServicePort],
        order: collections.abc.Sequence[int] | None = None,
    ) -> float:
        """Take rules for `before` to `after` and return the seconds that the tool took for it.

        From then on packets meet the new rules. A kube-proxy has to hear of the change first,
        to `read_back` what is there, and to write the text, of which nothing is counted here.
        """
        return self.load(self.update(before, after, order))

    def update(
        self,
        before: collections.abc.Sequence[model.ServicePort],
        after: collections.abc.Sequence[model.ServicePort],
        order: collections.abc.Sequence[int] | None = None,
    ) -> str:
        """Return the text that `change` loads."""
        if self.backend is Backend.NATIVE:
            return nftables.update(before, after, self._settings, order)
        return iptables.update(before, after, self._settings, order)

    def read_back(self, ports: collections.abc.Sequence[model.ServicePort]) -> float:
        """Read what kube-proxy reads of its rules for these ports before a change; the seconds this took.

        In nftables mode the names of chains and sets are wanted, but all rules come with them.
        In iptables mode nothing is read but every 30 s, where there are many endpoints.
        """
        if self.backend is Backend.NATIVE:
            argv = ["nft", "--json", "list", "table", *self._table]
        elif not iptables.is_large(ports):
            argv = [f"{self._tool}-save", "-t", "nat"]
        else:
            return 0.0
        started_s = time.perf_counter()
        self._run(argv)
        return time.perf_counter() - started_s

    def load(self, text: str) -> float:
        """Load a text of this backend's mode, and return the seconds that the tool took for it."""
        native = self.backend is Backend.NATIVE
        argv = ["nft", "-f", "-"] if native else [f"{self._tool}-restore", "-w", "--noflush", "--counters"]
        started_s = time.perf_counter()
        self._run(argv, text)
        return time.perf_counter() - started_s

    def holds(self, port: model.ServicePort) -> bool:
        """Tell whether the kernel draws from this port's endpoints and no others, for its ClusterIP first."""
        cluster = port.uses_cluster or not port.uses_local
        endpoints = port.endpoints if cluster else port.local_endpoints
        if self.backend is Backend.NATIVE:
            name = nftables.chain("service" if cluster else "local", port)
            done = self._run(["nft", "list", "chain", *self._table, name], check=False)
            found = re.findall(r": (\S+) \. (\d+)", done.stdout)
            return found == [(each.ip, str(each.port)) for each in endpoints]
        name = iptables.chain("SVC" if cluster else "SVL", port)
        done = self._run([self._tool, "-w", "-t", "nat", "-S", name], check=False)
        targets = re.findall(r"-j (KUBE-SEP\S+)", done.stdout)
        return targets == [iptables.chain("SEP", port, str(each)) for each in endpoints]

    def saved(self) -> str:
        """Return all rules, as the tool prints them."""
        if self.backend is Backend.NATIVE:
            return self._run(["nft", "list", "table", *self._table]).stdout
        return self._run([f"{self._tool}-save"]).stdout

    def _run(
        self, argv: collections.abc.Sequence[str], text: str = "", *, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self._command(argv), input=text, text=True, capture_output=True, check=False, timeout=TIMEOUT_S
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()[-500:]}")
        return done
