"""The arguments of `lbproxy migrate`."""

import argparse
import typing
from collections.abc import Container, Sequence

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
from any machine that has a kubeconfig: lbproxy migrate cluster --help.

Nothing is removed or changed without being named; --dry-run only names it.
"""
CLUSTER = """\
From kube-proxy to lbproxy, and back, node by node, where both are DaemonSets.

It needs a kubeconfig and the official client: pip install '.[migrate]' in a checkout of lbproxy. Before
that: kubectl apply -k deploy/kustomize/overlays/migrate. docs/migration.md has it all, and the rights.

  lbproxy migrate cluster                                  how far each node is; changes nothing
  lbproxy migrate cluster --to lbproxy --all-nodes --dry-run
  lbproxy migrate cluster --to lbproxy --node n1           one node first
  lbproxy migrate cluster --to lbproxy --all-nodes         then the others; those that are there stay
  lbproxy migrate cluster --to kube-proxy --all-nodes      back

It stops at the first node that does not get on, and says why; run again, it goes on there, also after Ctrl-C.
-o json has each node's state: finished, flows-left, rules-stay, cleanup-left, gone, stopped or contradicted.

Exit status: 0 finished, 1 failure, or somebody else has changed a label meanwhile, 2 wrong flags or
kubeconfig, 4 nothing failed, but something is left (states flows-left, rules-stay and cleanup-left).
"""
_OF_CLUSTER = (
    "kubeconfig", "context", "to", "node", "all_nodes", "excepted", "at_once", "timeout", "leave_flows",
    "without_agent", "yes", "kube_proxy", "lbproxy",
)  # fmt: skip
_CHANGES = ("dry_run", "at_once", "timeout", "yes")  # mean nothing where nothing is to be changed
_BACK = ("leave_flows", "without_agent")
_FLAGS = {"excepted": "--except"}


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
    _add_dry_run(parser)
    parser.add_argument(
        "--force",
        action="store_true",
        help="return even where no kube-proxy is to be seen from here; take over even where lbproxy does not "
        "serve all that kube-proxy's rules do, or connections of IPVS break",
    )
    _add_cluster(parser, shown=False)
    parser.set_defaults(parser_of_migrate=parser)


class Help(argparse.Action):
    """--help, of the whole or, behind its name, of what is for a cluster."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: typing.Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="show this, and exit")

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> typing.NoReturn:
        """Show it."""
        if getattr(namespace, "step", None) == "cluster":
            parser = type(parser)(
                prog="lbproxy migrate cluster",
                description=CLUSTER,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            _add_dry_run(parser)
            _add_cluster(parser, shown=True)
            parser.add_argument("-o", "--output", metavar="table|json|yaml", help="how to show it")
        parser.print_help()
        parser.exit()


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")


def _add_cluster(parser: argparse.ArgumentParser, *, shown: bool) -> None:
    def add(*flags: str, help: str, **options: typing.Any) -> None:
        parser.add_argument(*flags, help=help if shown else argparse.SUPPRESS, **options)

    add("--kubeconfig", default="", metavar="FILE", help="default: as kubectl finds it")
    add("--context", default="", metavar="NAME", help="default: the kubeconfig's current one")
    add("--to", choices=[str(one) for one in migration_plan.Target], metavar="lbproxy|kube-proxy",
        help="who is to serve; without it: only show")  # fmt: skip
    add("--node", action="append", default=[], metavar="NAME", help="this one; repeatable")
    add("--all-nodes", action="store_true", help="all of them")
    add("--except", action="append", default=[], metavar="NAME", dest="excepted",
        help="with --all-nodes: but this one, which stays as it is; repeatable")  # fmt: skip
    add("--at-once", type=_count, default=1, metavar="N", help="so many nodes at a time (default 1)")
    add("--timeout", type=_seconds, default=300.0, metavar="SECONDS",
        help="stop at a node that has not got on for so long (default 300)")  # fmt: skip
    add("--leave-flows", action="store_true",
        help="back: take lbproxy's pod away though it has flows that go on; they do so in the kernel, until "
        "lbproxy cleanup")  # fmt: skip
    add("--without-agent", action="store_true",
        help="back, where lbproxy's pod is not ready or its agent does not answer: it is not asked. Until "
        f"{migration_plan.CLEANUP} has been on the node, what lbproxy has in the kernel serves with backends "
        "as they were; then what goes on through it breaks")  # fmt: skip
    add("-y", "--yes", action="store_true", help="change kube-proxy's DaemonSet without asking")
    add("--kube-proxy", type=_named, default=("kube-system", "kube-proxy"), metavar="NAMESPACE/NAME",
        help="kube-proxy's DaemonSet (default kube-system/kube-proxy)")  # fmt: skip
    add("--lbproxy", type=_named, default=("kube-system", "lbproxy"), metavar="NAMESPACE/NAME",
        help="lbproxy's DaemonSet (default kube-system/lbproxy)")  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError where arguments mean nothing for what is to be done, or too little is said."""
    given = {name for name in vars(args) if _is_given(args, name)}
    problems = _of_a_cluster(args, given) if args.step == "cluster" else _of_a_node(args, given)
    if problems:
        raise errors.ConfigError(problems)


def _is_given(args: argparse.Namespace, name: str) -> bool:
    parser: argparse.ArgumentParser = args.parser_of_migrate
    return bool(getattr(args, name) != parser.get_default(name))


def _of_a_node(args: argparse.Namespace, given: Container[str]) -> list[str]:
    problems = [f"{_flag(name)}: only for lbproxy migrate cluster" for name in _OF_CLUSTER if name in given]
    if args.step == "status":
        looked = [name for name in ("dry_run", "force") if name in given]
        problems += [f"{_flag(name)}: lbproxy migrate status changes nothing" for name in looked]
    return problems


def _of_a_cluster(args: argparse.Namespace, given: Container[str]) -> list[str]:
    problems = []
    if args.force:
        problems.append("--force: only for a node; in a cluster an agent that refuses says why")
    if args.node and args.all_nodes:
        problems.append("--node and --all-nodes: one of them")
    if args.excepted and not args.all_nodes:
        problems.append("--except: only with --all-nodes")
    if not args.to:
        if args.node or args.all_nodes:
            problems.append("--to lbproxy or --to kube-proxy: which way the nodes are to go")
        problems += [f"{_flag(name)}: only with --to" for name in (*_CHANGES, *_BACK) if name in given]
        return problems
    if not (args.node or args.all_nodes):
        problems.append("--to: say which nodes: --node NAME, more than once if you like, or --all-nodes")
    if args.to != migration_plan.Target.KUBE_PROXY:
        problems += [f"{_flag(name)}: only with --to kube-proxy" for name in _BACK if name in given]
    return problems


def _flag(name: str) -> str:
    return _FLAGS.get(name) or f"--{name.replace('_', '-')}"


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
