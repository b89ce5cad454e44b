"""Judges how the API server is reached, whether the Node is known, and how pods are told from others."""

from collections.abc import Iterable, Iterator

from lbproxy.core import addresses
from lbproxy.core.preflight import facts, findings
from lbproxy.core.preflight.network import named


def judge(known: facts.Facts) -> Iterator[findings.Finding]:
    """Say what is to be said of them."""
    if known.wanted.manifests:
        yield findings.ok("API server", f"not asked: the cluster is read from {known.wanted.manifests}")
    else:
        yield from _api(known.cluster)
        if not known.cluster.problem:
            yield _node(known)
    yield from _detect_local(known)


def _api(cluster: facts.Cluster) -> Iterator[findings.Finding]:
    if cluster.problem:
        yield findings.blocks("API server", cluster.problem, _reach(cluster))
    elif cluster.by_service:
        yield findings.blocks(
            "API server",
            f"{cluster.url} is the address of the Service default/kubernetes: after a reboot nobody would "
            "translate it, and lbproxy would wait for an answer that only lbproxy makes possible",
            _reach(cluster),
        )
    elif cluster.by_service is None and cluster.in_pod:
        yield findings.warning(
            "API server",
            f"{cluster.url} answers, and comes from the pod's environment: it may be a Service's address",
            _reach(cluster),
        )
    else:
        yield findings.ok("API server", f"{cluster.url} answers, and is no Service's address")
    if cluster.forbidden:
        yield findings.blocks(
            "API rights",
            f"may not list {', '.join(cluster.forbidden)}",
            "grant list and watch on services, endpointslices (discovery.k8s.io) and nodes",
        )
    elif not cluster.problem:
        yield findings.ok("API rights", "services, endpointslices and nodes may be listed")


def _reach(cluster: facts.Cluster) -> str:
    real = f", for example {cluster.servers[0]}" if cluster.servers else ""
    if cluster.in_pod:
        return (
            "set KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT of the DaemonSet to where the API "
            f"server really is, or a load balancer in front of it{real}; --master URL does it too"
        )
    return f"name where it really is, with --kubeconfig or --master{real}"


def _node(known: facts.Facts) -> findings.Finding:
    name, node = known.wanted.node_name, known.cluster.node
    if node is not None:
        return findings.ok("Node", f"{name}, pods in {', '.join(node.pod_cidrs) or 'no podCIDRs of its own'}")
    similar = known.cluster.similar
    return findings.blocks(
        "Node",
        f"there is none called {name}: which endpoints are on this node could not be known",
        f"--node-name {similar}: it has an address of this machine"
        if similar
        else "name it with --node-name",
    )


def _detect_local(known: facts.Facts) -> Iterator[findings.Finding]:
    check, wanted, network, node = "pods", known.wanted, known.network, known.cluster.node
    match wanted.detect_local:
        case "ClusterCIDR" if not wanted.cluster_cidrs:
            likely = f", such as one around {', '.join(node.pod_cidrs)}" if node and node.pod_cidrs else ""
            yield findings.warning(
                check,
                "nothing tells pods from clients outside: they count as outside, get this node's "
                "backends only where externalTrafficPolicy is Local, and nobody is masqueraded towards a "
                "ClusterIP",
                f"--cluster-cidr{likely}, or another --detect-local-mode",
            )
        case "ClusterCIDR":
            yield _families(known)
        case "NodeCIDR" if node is not None and not node.pod_cidrs:
            yield findings.warning(
                check,
                "--detect-local-mode NodeCIDR, and the Node has no podCIDRs: nobody counts as a pod",
                "have the controller manager give them (--allocate-node-cidrs), or use another mode",
            )
        case "BridgeInterface" if wanted.bridge not in network.names:
            yield findings.warning(
                check,
                f"{wanted.bridge}: no such device: nobody counts as a pod until there is",
                f"--pod-bridge-interface; bridges here: {named(network.bridges)}",
            )
        case "BridgeInterface" if wanted.bridge not in network.bridges:
            yield findings.warning(
                check,
                f"{wanted.bridge} is no bridge",
                f"--pod-bridge-interface; bridges here: {named(network.bridges)}",
            )
        case "InterfaceNamePrefix" if not any(one.startswith(wanted.prefix) for one in network.names):
            yield findings.warning(
                check,
                f"no device is called {wanted.prefix}…: nobody counts as a pod, unless none has started yet",
                f"--pod-interface-name-prefix; there are {named(network.names)}",
            )
        case _:
            yield findings.ok(check, f"told by {wanted.detect_local}")


def _families(known: facts.Facts) -> findings.Finding:
    told = _told(known.wanted.cluster_cidrs)
    node = known.cluster.node
    pods = node.pod_cidrs if node else ()
    lacking = sorted(_told(pods) - told)
    shown = ", ".join(known.wanted.cluster_cidrs)
    if lacking:
        families = " and ".join(f"IPv{family}" for family in lacking)
        return findings.warning(
            "pods",
            f"told by {shown}, which has no {families}; the Node's podCIDRs have",
            f"--cluster-cidr with one CIDR of each family, around {', '.join(pods)}",
        )
    return findings.ok("pods", f"told by {shown}")


def _told(cidrs: Iterable[str]) -> set[int]:
    """The families, 4 and 6, that there are CIDRs of."""
    return {network.family.value for cidr in cidrs if (network := addresses.parse_cidr(cidr))}
