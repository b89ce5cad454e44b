"""Compares a real kube-proxy's rules with those written here: `python -m benchmarks.kubeproxy.compare PATH`.

Both get the same cluster, in a lab: kube-proxy by way of the API server stand-in, on
one node, and the rules as text on another. Every line that only one of them has is
printed. Where services stand among others is not compared, since kube-proxy draws that.
In nftables mode its releases differ: 1.30 has a chain for every endpoint.
"""

import argparse
import collections
import os
import pathlib
import re
import subprocess
import sys
import time

from benchmarks import api, cluster
from benchmarks.kubeproxy import load, model, program
from lbproxy import errors
from lbproxy.lab import cluster as lab_cluster
from lbproxy.lab import topology

NODE, OTHER = "n1", "n2"
CLUSTER_CIDR = "10.244.0.0/16"
PORT = 8080
TIMEOUT_S = 600.0
_QUIET_S = 2.0
_DRAWN = ("KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-EXTERNAL-SERVICES")


def main() -> None:
    """Compare, and say by the exit status whether there was any difference."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kubeproxy.compare", description=__doc__)
    parser.add_argument("program", type=pathlib.Path, help="a kube-proxy")
    parser.add_argument("--backend", choices=[*load.Backend], default=load.Backend.LEGACY)
    parser.add_argument("--services", type=int, default=10)
    flags = parser.parse_args()
    backend = load.Backend(flags.backend)
    with lab_cluster.Lab(topology.uniform(2, 2), families=(4,)) as lab:
        objects = _objects(lab, flags.services)
        real = facts(_real(lab, flags.program.resolve(), backend, objects))
        settings = model.Settings(CLUSTER_CIDR, lab[NODE].ipv4, service_cidrs=())
        rules = _rules(lab, OTHER, backend, settings)
        rules.start(model.ports(objects, NODE))
        ours = facts(rules.saved())
    for title, lines in (("kube-proxy alone has", real - ours), ("alone here is", ours - real)):
        for line in sorted(lines):
            print(f"{title}: {line}")
    print(f"{sum((real & ours).values())} lines in common")
    sys.exit(real != ours)


def facts(saved: str) -> collections.Counter[str]:
    """Return what `iptables-save` or `nft list table` printed, as lines that say what stands where."""
    found: collections.Counter[str] = collections.Counter()
    rules: collections.Counter[str] = collections.Counter()
    where = ""
    for line in re.sub(r",\n\s+", ", ", saved).splitlines():
        text = re.sub(r"\[\d+:\d+\]", "", line).strip()
        if match := re.fullmatch(r"(?:\*|chain |set |map |table )(.*?)(?: \{)?", text):
            where = match[1]
            found[where] += 1
        elif match := re.fullmatch(r"elements = \{ (.*) \}", text):
            found.update(f"{where}: {element}" for element in match[1].split(", "))
        elif text and text not in ("}", "COMMIT") and not text.startswith("#"):
            match = re.match(r"-A (\S+)", text)
            chain = f"{where} {match[1]}" if match else where
            rules[chain] += 1
            place = "" if text.startswith(":") or chain.endswith(_DRAWN) else f"{rules[chain]}: "
            found[f"{where}: {place}{text}"] += 1
    return found


def _objects(lab: lab_cluster.Lab, services: int) -> list[cluster.Object]:
    """Return a cluster with services of every policy, and some without endpoints."""

    def place(*pods: str) -> cluster.Place:
        return cluster.Place(tuple(lab[pod].ipv4 for pod in pods), tuple(lab[pod].node for pod in pods))

    here, there, both = place("n1/p1", "n1/p2"), place("n2/p1"), place("n1/p1", "n2/p1")
    more = list(cluster.node_port_objects(here, there, there, PORT))
    number = 0
    for inside in ("Cluster", "Local"):
        for outside in ("Cluster", "Local"):
            for endpoints in (None, here, there, both):
                name, protocols = f"corner-{number}", ("TCP", "UDP")
                made = cluster.service(
                    900_000 + number, "corners", name, f"10.110.0.{number}", protocols, 80, PORT
                )
                made["spec"] |= {"internalTrafficPolicy": inside, "externalTrafficPolicy": outside}
                made["spec"]["type"] = "NodePort"
                for port in made["spec"]["ports"]:
                    port["nodePort"] = 31000 + number
                more.append(made)
                if endpoints is not None:
                    more.append(
                        cluster.endpoint_slice(900_000 + number, "corners", name, endpoints, protocols, PORT)
                    )
                number += 1
    return list(cluster.objects(services, NODE, lab[NODE].ipv4, both, PORT, more))


def _rules(lab: lab_cluster.Lab, node: str, backend: load.Backend, settings: model.Settings) -> load.Rules:
    return load.Rules(lambda argv: lab.command(node, argv, cgroup=False), backend, settings)


def _real(
    lab: lab_cluster.Lab, path: pathlib.Path, backend: load.Backend, objects: list[cluster.Object]
) -> str:
    """Return what a kube-proxy has written, once that is all and no longer changes."""
    with api.stand_in(lab, NODE, objects) as url:
        argv = program.command(path, program.version(path), backend, url, NODE, CLUSTER_CIDR)
        if backend is load.Backend.NATIVE:
            # Later ones take the node's own address by themselves.
            argv += ["--nodeport-addresses", f"{lab[NODE].ipv4}/32"]
        tools = program.tools(lab.workdir / "tools", backend)
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
        with (lab.workdir / "kube-proxy.log").open("w") as log:
            running = lab.popen(NODE, argv, cgroup=False, env=environment, stdout=log, stderr=log)
        return _settled(lab, running, _rules(lab, NODE, backend, model.Settings()))


def _settled(lab: lab_cluster.Lab, running: subprocess.Popen[str], rules: load.Rules) -> str:
    deadline = time.monotonic() + TIMEOUT_S
    saved = ""
    while time.monotonic() < deadline:
        time.sleep(_QUIET_S)
        if running.poll() is not None:
            raise errors.LbproxyError((lab.workdir / "kube-proxy.log").read_text()[-2000:])
        # It makes some chains before all others.
        if f"{cluster.MEASURED[0]}/{cluster.MEASURED[1]}" in saved and saved == (saved := _saved(rules)):
            return saved
        saved = _saved(rules)
    raise errors.LbproxyError(f"no rules from kube-proxy in {TIMEOUT_S:.0f} s")


def _saved(rules: load.Rules) -> str:
    try:
        saved = rules.saved()
    except RuntimeError:  # no such table yet
        return ""
    return "\n".join(line for line in saved.splitlines() if not line.startswith("#"))


if __name__ == "__main__":
    main()
