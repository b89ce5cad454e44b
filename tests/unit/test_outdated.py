"""Whether rules of iptables are of what is served, told by the names of kube-proxy's chains."""

import pytest

from benchmarks.kubeproxy import iptables
from benchmarks.kubeproxy import model as kubeproxy
from lbproxy.core import leftovers, model, outdated
from lbproxy.kernel import fake
from tests import installing, serving

V4, V6 = model.Family
FIRST, SECOND, OTHER = "10.244.1.5", "10.244.2.6", "10.244.3.7"


def rules_of(saved: str) -> list[leftovers.Rule]:
    """The rules of a text for iptables-restore."""
    found = [line.split() for line in saved.splitlines() if line.startswith("-A ")]
    return [leftovers.Rule(words[1], "", words[words.index("-j") + 1]) for words in found if "-j" in words]


def written(*endpoints: str, name: str = "web", port_name: str = "", **fields: bool) -> list[leftovers.Rule]:
    """The rules of a kube-proxy that knows one Service."""
    family, ip = (6, "fd00:96::1") if ":" in endpoints[0] else (4, "10.96.0.1")
    served = tuple(kubeproxy.Endpoint(one, 8080, is_local=True) for one in endpoints)
    port = kubeproxy.ServicePort(
        "test", name, port_name, "tcp", ip, 80, 0, served, external_local=False, **fields
    )
    return rules_of(iptables.full([port], kubeproxy.Settings(family=family)))


def stale(rules: list[leftovers.Rule], *endpoints: str, family: model.Family = V4) -> list[str]:
    """The ports whose rules are not of what a node serves that has a Service with these endpoints."""
    maps = fake.FakeMaps(installing.SIZES)
    ip = "fd00:96::1" if family is V6 else "10.96.0.1"
    made = installing.Installer(maps, serving.capacity())
    # One that has gone has a row for a moment more.
    for there in ([*endpoints, OTHER], endpoints):
        made.service("test/web", [ip], [installing.endpoint(one) for one in there], port_name="")
    return [str(key) for key in outdated.outdated(rules, outdated.ports(maps, family))]


@pytest.mark.parametrize(
    ("name", "chain"),
    [
        # As they are on every cluster that kubeadm has made.
        (("default", "kubernetes", "https", model.Protocol.TCP), "NPX46M4PTMTKRN6Y"),
        (("kube-system", "kube-dns", "dns", model.Protocol.UDP), "TCOU7JCQXEZGVUNU"),
        (("kube-system", "kube-dns", "dns-tcp", model.Protocol.TCP), "ERIFXISQEP7F7OF4"),
    ],
)
def test_chains_are_named_as_kube_proxy_names_them(
    name: tuple[str, str, str, model.Protocol], chain: str
) -> None:
    namespace, service, port, protocol = name
    key = model.PortKey(model.ServiceName(namespace, service), port, protocol, V4)
    assert outdated._hash(outdated._name(key)) == chain


def test_rules_of_what_is_served_are_not_outdated() -> None:
    assert stale(written(FIRST, SECOND), FIRST, SECOND) == []
    # Hints, weights and health choose among endpoints, here or there.
    assert stale(written(FIRST), FIRST, SECOND) == []
    assert stale(written(FIRST, SECOND, internal_local=True), FIRST, SECOND) == []
    assert stale(written("fd00:244::5"), "fd00:244::5", family=V6) == []


def test_rules_of_another_time_are() -> None:
    [port] = stale(written(FIRST, OTHER), FIRST, SECOND)
    assert port.startswith("test/web")
    assert stale(written(OTHER), FIRST) == [port]
    assert stale(written(FIRST, name="shop"), FIRST) == [port]
    assert stale(written(FIRST, port_name="http"), FIRST) == [port]
    assert stale([], FIRST) == [port]
    assert len(stale(written("fd00:244::6"), "fd00:244::5", family=V6)) == 1


def test_what_nobody_serves_is_nobodys_to_miss() -> None:
    assert stale([], family=V4) == []
    assert stale(written(FIRST, name="gone") + written(SECOND), SECOND) == []
    assert stale(written(FIRST), FIRST, family=V6) == []
