"""The rules that the benchmarks write in kube-proxy's place: names, texts, and what an update leaves.

Texts are played on small models of `iptables-restore --noflush` and `nft -f -`, which
refuse what the tools refuse. `tests/lab/test_kubeproxy_rules.py` sends connections through.
"""

import dataclasses
import re
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import cluster
from benchmarks.kubeproxy import compare, iptables, model, nftables

NODE = "n1"
SETTINGS = model.Settings(cluster_cidr="10.244.0.0/16", node_ip="172.18.0.1")
PODS = tuple(model.Endpoint(f"10.244.{node}.{host}", 8080, node == 1) for node in (1, 2) for host in (10, 2))
WEB = model.ServicePort("shop", "web", "http", "tcp", "10.96.0.7", 80, 30080, PODS)
API = model.ServicePort("default", "kubernetes", "https", "tcp", "10.96.0.1", 443)


def _ports() -> st.SearchStrategy[tuple[model.ServicePort, ...]]:
    """Any ports of three services, each with its own address and NodePort."""

    def build(number: int) -> st.SearchStrategy[model.ServicePort]:
        return st.builds(
            model.ServicePort,
            st.just("shop"),
            st.just(f"service-{number // 2}"),
            st.just("a" if number % 2 else "b"),
            st.sampled_from(["tcp", "udp"]),
            st.just(f"10.96.0.{number // 2 + 1}"),
            st.just(80 + number),
            st.sampled_from([0, 30000 + number]),
            st.sets(st.sampled_from(PODS)).map(lambda found: tuple(sorted(found, key=str))),
            st.booleans(),
            st.booleans(),
        )

    chosen = st.sets(st.integers(0, 5)).map(sorted)
    return chosen.flatmap(lambda numbers: st.tuples(*map(build, numbers)))


class Tables:
    """What `iptables-restore --noflush` has made of texts: rules by table and chain."""

    def __init__(self) -> None:
        self.chains: dict[str, dict[str, list[str]]] = {
            "filter": {name: [] for name in ("INPUT", "FORWARD", "OUTPUT")},
            "nat": {name: [] for name in ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING")},
            "mangle": {},
        }

    def restore(self, text: str) -> None:
        table = ""
        for line in text.splitlines():
            if line.startswith("*"):
                table = line[1:]
                continue
            chains = self.chains[table]
            match line.split(" ", 2):
                case ["COMMIT"]:
                    for rules in chains.values():
                        assert all(target in chains for target in self.targets(rules))
                case [name, *_] if name.startswith(":"):
                    chains[name[1:]] = []
                case ["-A", name, rule]:
                    chains[name].append(rule)
                case ["-I", name, rule]:
                    chains[name].insert(0, rule)
                case ["-X", name]:
                    assert chains.pop(name) == []
                case _:
                    raise AssertionError(line)

    @staticmethod
    def targets(rules: list[str]) -> list[str]:
        return [target for rule in rules for target in re.findall(r"-j (KUBE-\S+)", rule)]

    def nat(self, name: str) -> list[str]:
        return self.chains["nat"][name]


class Table:
    """What `nft -f -` has made of texts: rules by chain, and elements by set or map."""

    def __init__(self) -> None:
        self.chains: dict[str, list[str]] = {}
        self.elements: dict[str, dict[str, str]] = {}

    def load(self, text: str) -> None:
        for line in text.splitlines():
            verb, kind, family, table, rest = line.split(" ", 4)
            assert (family, table) == ("ip", "kube-proxy")
            name, _, rest = rest.partition(" ")
            match verb, kind:
                case ("add", "table"):
                    pass
                case ("add", "chain"):
                    self.chains.setdefault(name, [])
                case ("flush", "chain"):
                    self.chains[name].clear()
                case ("delete", "chain"):
                    del self.chains[name]
                    assert name not in self.targets()
                case ("add", "rule"):
                    self.chains[name].append(rest)
                case ("add", "set" | "map"):
                    self.elements.setdefault(name, {})
                case ("flush", "set"):
                    self.elements[name].clear()
                case (_, "element"):
                    key, _, value = rest.removeprefix("{ ").removesuffix(" }").partition(" : ")
                    if verb == "delete":
                        del self.elements[name][key]
                    else:
                        assert key.partition(" comment ")[0] not in self.elements[name]
                        self.elements[name][key.partition(" comment ")[0]] = value
                case _:
                    raise AssertionError(line)
        assert self.targets() <= set(self.chains)
        assert set(re.findall(r"@([\w-]+)", str(self.chains))) <= set(self.elements)

    def targets(self) -> set[str]:
        rules = [rule for rules in self.chains.values() for rule in rules]
        verdicts = [value for elements in self.elements.values() for value in elements.values()]
        return set(re.findall(r"(?:jump|goto) (\S+)", "\n".join(rules + verdicts)))


def loaded(ports: tuple[model.ServicePort, ...]) -> tuple[Tables, Table]:
    tables, table = Tables(), Table()
    tables.restore(iptables.hooks())
    tables.restore(iptables.full(ports, SETTINGS))
    table.load(nftables.full(ports, SETTINGS))
    return tables, table


# --- the cluster's objects ---


def test_ports_are_those_of_the_cluster_with_this_nodes_endpoints_marked() -> None:
    here = cluster.Place(("10.244.1.10", "10.244.1.2"), (NODE, "n2"))
    more = cluster.node_port_objects(here, here, here, 8080)
    ports = model.ports(cluster.objects(10, NODE, "172.18.0.1", here, 8080, more), NODE)
    assert len(ports) == 2 + len(cluster.NODE_PORTS) + 2 * cluster.MEASURED_COPIES
    local, *_, tcp, udp = ports[2:]
    assert (local.node_port, local.external_local, local.text) == (30080, True, "node-ports/local:tcp-80")
    assert (tcp.protocol, udp.protocol, tcp.cluster_ip) == ("tcp", "udp", cluster.MEASURED_IP)
    assert [(str(each), each.is_local) for each in tcp.endpoints] == [
        ("10.244.1.10:8080", True),
        ("10.244.1.2:8080", False),
    ]


def test_endpoints_that_are_not_ready_are_left_out() -> None:
    place = cluster.Place(("10.244.1.2", "10.244.1.3"), (NODE, NODE))
    slice_ = cluster.endpoint_slice(0, "shop", "web", place, ("TCP",), 8080)
    slice_["endpoints"][0]["conditions"]["ready"] = False
    (port,) = model.ports([cluster.service(0, "shop", "web", "10.96.0.7", ("TCP",), 80, 8080), slice_], NODE)
    assert [each.ip for each in port.endpoints] == ["10.244.1.3"]


def test_services_that_have_more_than_is_modelled_are_refused() -> None:
    service = cluster.service(0, "shop", "web", "10.96.0.7", ("TCP",), 80, 8080)
    service["spec"]["sessionAffinity"] = "ClientIP"
    with pytest.raises(ValueError, match=r"shop/web: .* sessionAffinity"):
        model.ports([service], NODE)


# --- IPv6 ---


def in_ipv6(text: str) -> str:
    """Put an address of IPv6 in place of each one of IPv4, in the same order when sorted as text."""
    ends = re.sub(r"(\d+)\.(\d+)\.(\d+)\.(\d+)(?=:\d)", r"[fd00::\1:\2:\3:\4]", text)
    return re.sub(r"(\d+)\.(\d+)\.(\d+)\.(\d+)", r"fd00::\1:\2:\3:\4", ends)


SETTINGS_6 = dataclasses.replace(
    SETTINGS,
    family=6,
    cluster_cidr=in_ipv6(SETTINGS.cluster_cidr),
    node_ip=in_ipv6(SETTINGS.node_ip),
    service_cidrs=tuple(map(in_ipv6, SETTINGS.service_cidrs)),
)


@given(_ports())
def test_ipv6_has_the_rules_of_ipv4_with_other_addresses(ports: tuple[model.ServicePort, ...]) -> None:
    same = tuple(
        dataclasses.replace(
            port,
            cluster_ip=in_ipv6(port.cluster_ip),
            endpoints=tuple(each._replace(ip=in_ipv6(each.ip)) for each in port.endpoints),
        )
        for port in ports
    )
    wanted = in_ipv6(nftables.full(ports, SETTINGS)).replace("ipv4_addr", "ipv6_addr")
    assert nftables.full(same, SETTINGS_6) == re.sub(r"\bip (kube-proxy|[sd]?addr)", r"ip6 \1", wanted)

    def hashed(text: str) -> str:
        """Without the names that are hashes of an endpoint's address."""
        return re.sub(r"KUBE-SEP-\w+", "KUBE-SEP", text)

    wanted = re.sub(r"-A KUBE-FIREWALL .*\n", "", iptables.full(ports, SETTINGS))
    wanted = in_ipv6(wanted).replace("LOCAL -j KUBE-NODEPORTS", "LOCAL ! -d ::1/128 -j KUBE-NODEPORTS")
    assert hashed(iptables.full(same, SETTINGS_6)) == hashed(wanted)


# --- names, which are the same on every node that runs kube-proxy ---


def test_iptables_chains_are_named_after_a_hash() -> None:
    assert iptables.chain("SVC", API) == "KUBE-SVC-NPX46M4PTMTKRN6Y"
    dns = dataclasses.replace(API, namespace="kube-system", name="kube-dns", port_name="dns", protocol="udp")
    assert iptables.chain("SVC", dns) == "KUBE-SVC-TCOU7JCQXEZGVUNU"


def test_nftables_chains_are_named_after_a_hash_and_the_port() -> None:
    assert nftables.chain("service", API) == "service-2QRHZV4L-default/kubernetes/tcp/https"


def test_a_port_without_a_name_has_none_in_its_text() -> None:
    assert dataclasses.replace(API, port_name="").text == "default/kubernetes"


# --- a service with a NodePort ---


def test_iptables_draws_an_endpoint_rule_by_rule() -> None:
    tables, _ = loaded((API, WEB))
    marks, *picks = tables.nat(iptables.chain("SVC", WEB))
    assert "-d 10.96.0.7 --dport 80 ! -s 10.244.0.0/16 -j KUBE-MARK-MASQ" in marks
    assert [re.search(r"probability (\S+)", pick) is not None for pick in picks] == [True, True, True, False]
    assert '"shop/web:http -> 10.244.1.10:8080"' in picks[0]
    masquerade, translate = tables.nat(iptables.chain("SEP", WEB, "10.244.1.2:8080"))
    assert masquerade.endswith("-s 10.244.1.2 -j KUBE-MARK-MASQ")
    assert translate.endswith("-m tcp -p tcp -j DNAT --to-destination 10.244.1.2:8080")


@pytest.mark.parametrize("local", [False, True])
def test_node_ports_by_policy(local: bool) -> None:
    port = dataclasses.replace(WEB, external_local=local)
    tables, table = loaded((port,))
    *_, last = tables.nat(iptables.chain("EXT", port))
    assert last == f"-j {iptables.chain('SVL' if local else 'SVC', port)}"
    *first, last = table.chains[nftables.chain("external", port)]
    assert last == f"goto {nftables.chain('local' if local else 'service', port)}"
    assert len(first) == (3 if local else 1)
    drawn = table.chains[nftables.chain("local" if local else "service", port)]
    assert drawn[0].count("8080") == (2 if local else 4)


@pytest.mark.parametrize(
    ("change", "filtered", "verdict"),
    [({"endpoints": ()}, "REJECT", "goto reject-chain"), ({"endpoints": PODS[2:]}, "DROP", "drop")],
)
def test_ports_without_endpoints_are_refused(
    change: dict[str, typing.Any], filtered: str, verdict: str
) -> None:
    port = dataclasses.replace(WEB, external_local=True, internal_local=True, **change)
    tables, table = loaded((port,))
    for name in ("KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES"):
        (rule,) = tables.chains["filter"][name]
        assert rule.endswith(f"-j {filtered}")
    assert table.elements["no-endpoint-services"] == {"10.96.0.7 . tcp . 80": verdict}
    assert table.elements["no-endpoint-nodeports"] == {"tcp . 30080": verdict}
    assert table.elements["service-ips"] == {}


def test_without_a_cluster_cidr_nobody_is_told_from_a_pod() -> None:
    settings = dataclasses.replace(SETTINGS, cluster_cidr="")
    port = dataclasses.replace(WEB, external_local=True)
    assert "10.244.0.0" not in iptables.full((port,), settings) + nftables.full((port,), settings)


def test_a_large_cluster_has_no_comments_in_its_own_chains() -> None:
    many = tuple(model.Endpoint(f"10.244.{host >> 8}.{host & 255}", 80, False) for host in range(1001))
    text = iptables.full((dataclasses.replace(WEB, endpoints=many),), SETTINGS)
    assert "->" not in text
    assert not re.search(r"-A KUBE-SEP\S+ .*comment", text)
    assert '"shop/web:http cluster IP"' in text
    assert "->" in iptables.full((dataclasses.replace(WEB, endpoints=many[1:]),), SETTINGS)


def test_what_is_walked_first_was_put_there_last() -> None:
    tables, _ = loaded(())
    targets = tables.targets(tables.chains["filter"]["FORWARD"])
    assert targets == ["KUBE-PROXY-FIREWALL", "KUBE-FORWARD", "KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES"]


def test_services_stand_in_the_order_that_is_asked_for() -> None:
    ports = tuple(dataclasses.replace(WEB, name=f"s{number}", node_port=0) for number in range(3))
    tables = Tables()
    tables.restore(iptables.hooks())
    tables.restore(iptables.full(ports, SETTINGS, [2, 0, 1]))
    tables.restore(iptables.update(ports, ports, SETTINGS, [1, 2, 0]))
    names = re.findall(r"shop/(s\d)", "\n".join(tables.nat("KUBE-SERVICES")))
    assert names == ["s1", "s2", "s0"]
    with pytest.raises(ValueError, match="each index once"):
        iptables.full(ports, SETTINGS, [0, 0, 1])


# --- properties ---


@given(_ports())
def test_every_target_is_there_and_each_endpoint_as_likely_as_another(
    ports: tuple[model.ServicePort, ...],
) -> None:
    tables, table = loaded(ports)  # they look for targets
    for port in ports:
        for prefix, endpoints, used in (
            ("SVC", port.endpoints, port.uses_cluster),
            ("SVL", port.local_endpoints, port.uses_local),
        ):
            name = iptables.chain(prefix, port)
            assert (name in tables.chains["nat"]) is used
            left = 1.0
            shares = {}
            for rule in tables.chains["nat"].get(name, []):
                if target := re.search(r"-j (KUBE-SEP\S+)", rule):
                    chance = re.search(r"probability (\S+)", rule)
                    shares[target[1]] = left * (float(chance[1]) if chance else 1.0)
                    left -= shares[target[1]]
            expected = {iptables.chain("SEP", port, str(each)): 1 / len(endpoints) for each in endpoints}
            assert shares == pytest.approx(expected if used else {}, abs=1e-8)
        if port.uses_cluster:
            (drawn,) = table.chains[nftables.chain("service", port)]
            assert re.findall(r"\d+ : (\S+) \. 8080", drawn) == [each.ip for each in port.endpoints]
            assert f"mod {len(port.endpoints)} map" in drawn


@given(_ports(), _ports())
def test_an_update_leads_where_all_rules_anew_would(
    before: tuple[model.ServicePort, ...], after: tuple[model.ServicePort, ...]
) -> None:
    tables, table = loaded(before)
    tables.restore(iptables.update(before, after, SETTINGS))
    table.load(nftables.update(before, after, SETTINGS))
    table.load(nftables.sweep(before, after, SETTINGS))
    fresh_tables, fresh_table = loaded(after)
    assert tables.chains == fresh_tables.chains
    assert table.chains == fresh_table.chains
    assert table.elements == fresh_table.elements


@given(_ports())
def test_what_has_not_changed_is_not_written_again(ports: tuple[model.ServicePort, ...]) -> None:
    assert nftables.update(ports, ports, SETTINGS) == ""
    assert "-A KUBE-S" not in iptables.update(ports, ports, SETTINGS).replace("-A KUBE-SERVICES", "")


def test_a_large_clusters_update_leaves_the_sweeping_for_later() -> None:
    many = tuple(model.Endpoint(f"10.244.{host >> 8}.{host & 255}", 80, False) for host in range(1002))
    before, after = dataclasses.replace(WEB, endpoints=many), dataclasses.replace(WEB, endpoints=many[1:])
    assert "\n-X" not in iptables.update((before,), (after,), SETTINGS)
    assert iptables.update((before,), (after,), SETTINGS, sweep=True).count("\n-X") == 1


# --- the comparison with a real kube-proxy ---


def test_services_may_stand_in_any_order_and_rules_of_one_may_not() -> None:
    ports = tuple(dataclasses.replace(WEB, name=name, cluster_ip=f"10.96.0.{name}") for name in "12")
    texts = [iptables.full(ports, SETTINGS, order) for order in ([0, 1], [1, 0])]
    assert compare.facts(texts[0]) == compare.facts(texts[1])
    lines = texts[0].splitlines()
    first = next(index for index, line in enumerate(lines) if "statistic" in line)
    lines[first : first + 2] = lines[first + 1], lines[first]
    assert compare.facts("\n".join(lines)) != compare.facts(texts[0])


def test_elements_of_a_set_are_compared_one_by_one() -> None:
    texts = [
        f"table ip kube-proxy {{\n\tset s {{\n\t\telements = {{ {elements} }}\n\t}}\n}}\n"
        for elements in ("a . 1,\n\t\t\t     b . 2", "b . 2, a . 1", "a . 1")
    ]
    assert compare.facts(texts[0]) == compare.facts(texts[1])
    assert compare.facts(texts[0]) - compare.facts(texts[2]) == {"s: b . 2": 1}
