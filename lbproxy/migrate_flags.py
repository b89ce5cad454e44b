"""The arguments of `lbproxy migrate`."""

import argparse

from lbproxy import errors
from lbproxy.core import migration_plan

DESCRIPTION = """\
From kube-proxy to lbproxy, and back, with no connection broken: of this node, or of a whole cluster.

A connection stays with whoever began it. An agent that starts beside kube-proxy leaves alone
what the kernel's connection tracker translates for kube-proxy, and serves what is new. So, on a node:

  there:  1. start the agent (lbproxy run, or its DaemonSet)
          2. stop kube-proxy on this node; its rules stay
          3. lbproxy migrate take-over    removes kube-proxy's rules; open connections go on
  back:   1. start kube-proxy beside the agent, and wait until its rules are there
          2. lbproxy migrate return       new connections are kube-proxy's, open ones go on
          3. when lbproxy migrate status says that none is left: stop the agent, lbproxy cleanup

Run these as root on the node, or in the agent's pod: there, kube-proxy's process is not seen.

In a cluster where both are DaemonSets, lbproxy migrate cluster does all this, one node after another,
from any machine that has a kubeconfig and the official client (pip install 'lbproxy[migrate]'):

  lbproxy migrate cluster                                  how far each node is; changes nothing
  lbproxy migrate cluster --to lbproxy --node n1           one node first
  lbproxy migrate cluster --to lbproxy --all-nodes         then the others; those that are there stay
  lbproxy migrate cluster --to kube-proxy --all-nodes      back

Before that: kubectl apply -k deploy/kustomize/overlays/migrate. It stops at the first node that does
not get on, and says why; run again, it goes on there. docs/migration.md has it all.

Nothing is removed or changed without being named; --dry-run only names it.
"""
_OF_CLUSTER = (
    "kubeconfig", "context", "to", "node", "all_nodes", "at_once", "timeout", "leave_flows", "yes",
    "kube_proxy", "lbproxy",
)  # fmt: skip


def add_to(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command, but for those that it shares with others."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "step",
        choices=("status", "take-over", "return", "cluster"),
        metavar="status|take-over|return|cluster",
        help="say how far this node is; remove what kube-proxy has left; leave new connections to "
        "kube-proxy; or do it for a cluster",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument(
        "--force",
        action="store_true",
        help="return even where no kube-proxy is to be seen from here; take over even where connections of "
        "IPVS break",
    )
    group = parser.add_argument_group("of a cluster")
    group.add_argument("--kubeconfig", default="", metavar="FILE", help="default: as kubectl finds it")
    group.add_argument("--context", default="", metavar="NAME", help="default: the kubeconfig's current one")
    group.add_argument(
        "--to",
        choices=tuple(migration_plan.Target),
        metavar="lbproxy|kube-proxy",
        help="who is to serve; without it: only show",
    )
    group.add_argument("--node", action="append", default=[], metavar="NAME", help="this one; repeatable")
    group.add_argument("--all-nodes", action="store_true", help="all of them")
    group.add_argument(
        "--at-once", type=_count, default=1, metavar="N", help="so many nodes at a time (default 1)"
    )
    group.add_argument(
        "--timeout",
        type=_seconds,
        default=300.0,
        metavar="SECONDS",
        help="stop at a node that has not got on for so long (default 300)",
    )
    group.add_argument(
        "--leave-flows",
        action="store_true",
        help="back: take lbproxy's pod away though it has flows that go on; they do so in the kernel, until "
        "lbproxy cleanup",
    )
    group.add_argument(
        "-y", "--yes", action="store_true", help="change kube-proxy's DaemonSet without asking"
    )
    group.add_argument(
        "--kube-proxy", type=_named, default=("kube-system", "kube-proxy"), metavar="NAMESPACE/NAME",
        help="kube-proxy's DaemonSet (default kube-system/kube-proxy)",
    )  # fmt: skip
    group.add_argument(
        "--lbproxy", type=_named, default=("kube-system", "lbproxy"), metavar="NAMESPACE/NAME",
        help="lbproxy's DaemonSet (default kube-system/lbproxy)",
    )  # fmt: skip
    parser.set_defaults(parser_of_migrate=parser)


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError where arguments of a cluster are given for a node."""
    parser: argparse.ArgumentParser = args.parser_of_migrate
    if args.step != "cluster":
        given = [name for name in _OF_CLUSTER if getattr(args, name) != parser.get_default(name)]
        if given:
            raise errors.ConfigError(
                f"--{name.replace('_', '-')}: only for lbproxy migrate cluster" for name in given
            )


def _named(text: str) -> tuple[str, str]:
    namespace, _, name = text.partition("/")
    if not (namespace and name) or "/" in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAMESPACE/NAME")
    return namespace, name


def _count(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= 100:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 100")


def _seconds(text: str) -> float:
    if text.isdecimal() and 1 <= int(text) <= 86400:
        return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 to 86400")
