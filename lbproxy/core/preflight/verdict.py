"""From everything that is known of a node to whether it can run lbproxy."""

from lbproxy.core.preflight import cluster, facts, findings, kernel, network, others, places


def judge(known: facts.Facts) -> findings.Report:
    """Judge all of it: first what nothing goes without, last what the cluster says."""
    return findings.report(
        one for judged in (kernel, places, network, others, cluster) for one in judged.judge(known)
    )
