"""The `lbproxy` command: read the arguments, hand over, turn expected failures into a line and a status."""

import argparse
import contextlib
import importlib
import importlib.metadata
import math
import os
import pathlib
import sys
from collections.abc import Sequence

from lbproxy import errors, interrupts, secrecy
from lbproxy.bundle import flags as bundle_flags
from lbproxy.commands import output
from lbproxy.config import config, kinds, loading
from lbproxy.config import flags as config_flags
from lbproxy.config import options as config_options
from lbproxy.migrate import flags as migrate_flags
from lbproxy.trace import flags as trace_flags

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
BROKEN_PIPE = 141  # 128 + SIGPIPE

DESCRIPTION = """\
An eBPF service proxy that takes kube-proxy's place on a Kubernetes node.

examples:
  lbproxy demo                                  see it work: a small cluster on this machine
  lbproxy run --manifests ./cluster/            balance the Services in a folder of YAML files
  lbproxy preflight --config FILE               whether this node can run it, and what is in the way
  lbproxy services -o json                      what the kernel balances now
  lbproxy explain --from pod --to 10.96.0.1:443 what would happen to such a connection
  lbproxy trace --service shop/cart             what does happen, live
  lbproxy support-bundle                        one file for a report of an error
  lbproxy migrate --help                        from kube-proxy to lbproxy and back, with nothing broken
  lbproxy cleanup                               leave no trace
  lbproxy bench --help                          measure it, and compare two measurements
"""

EXPLAIN = """\
Follow a connection through the live maps, step by step.

examples:
  lbproxy explain --to 10.96.0.10:53/UDP                        from a pod of this node
  lbproxy explain --from 198.51.100.7 --to 192.0.2.10:30080     from a client outside to a NodePort
  lbproxy explain --from 198.51.100.7:40312 --to 192.0.2.10:30080   a connection of his that is open
"""

PREFLIGHT = """\
Look whether this node can run lbproxy, and say what to do about each thing that stands in the way.
It changes nothing. It takes the flags of `lbproxy run`, and is best given those that the agent will have.

Exit status: 0 fit, 1 something is in the way, 2 wrong flags, 3 the kernel lacks something.

examples:
  lbproxy preflight --config /var/lib/kube-proxy/config.conf --hostname-override "$NODE_NAME"
  lbproxy preflight --kubeconfig /etc/kubernetes/kubelet.conf -o json
"""

READERS = {
    "services": "the service ports that are balanced, with their frontends and backends",
    "backends": "the backends, with their state and connections",
    "maps": "how full each BPF map is",
    "status": "whether programs are attached and an agent is running",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    given = config_flags.normalise(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(given)
    except errors.LbproxyError as error:
        for line in error.lines():
            print(f"lbproxy: error: {' '.join(secrecy.without(line).split())}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return INTERRUPTED


def _dispatch(arguments: Sequence[str]) -> int:
    parser, subparsers = _parsers()
    if arguments[:1] == ["bench"]:
        # Its arguments are read by the programs that it hands over to.
        return _call("commands.bench", "main", arguments[1:])
    parsed, extra = parser.parse_known_args(arguments)
    if parsed.version:
        print(f"lbproxy {importlib.metadata.version('lbproxy')}")
        return 0
    command = parsed.command
    chosen = subparsers.get(command, parser)
    problems = config_flags.unknown(extra, chosen._option_string_actions)
    if command == "run":
        return _run(parsed, problems)
    if command == "preflight":
        loaded = loading.load(config_flags.texts(parsed), loading.this_host(), problems)
        given = argparse.Namespace(config=loaded.config, output=parsed.output)
        return _read_side("commands.preflight", given)
    if problems:
        raise errors.ConfigError(problems)
    if command is None:
        raise errors.ConfigError("no command given; lbproxy --help lists them")
    return _read_side(_MODULES[command], parsed)


# Where the `main` of each command is that reads its own arguments.
_MODULES = {
    **dict.fromkeys(READERS, "commands.show"),
    "cleanup": "commands.cleanup",
    "demo": "demo.command",
    "explain": "commands.explain",
    "migrate": "migrate.command",
    "support-bundle": "bundle.command",
    "trace": "trace.command",
}


def _run(parsed: argparse.Namespace, problems: Sequence[str]) -> int:
    loaded = loading.load(config_flags.texts(parsed), loading.this_host(), problems)
    if target := loaded.settings["--write-config-to"].value:
        from lbproxy.config import writing  # noqa: PLC0415 - with YAML, which an agent may do without

        try:
            target.write_text(writing.render(loaded))
        except OSError as error:
            raise errors.AgentError(f"--write-config-to: {target}: {error.strerror}") from error
        return 0
    if loaded.settings["--cleanup"].value:
        everything = argparse.Namespace(command="cleanup", bpffs=loaded.config.bpffs, kube_proxy=True)
        return _read_side(_MODULES["cleanup"], everything)
    if loaded.settings["--init-only"].value:
        return _call("agent", "init_only", loaded.config)
    return _call("agent", "run", loaded.config)


def _read_side(module: str, parsed: argparse.Namespace) -> int:
    output.check()
    try:
        status = _call(module, "main", parsed)
        output.flush()
    except BrokenPipeError:
        # The reader of our output has had enough.
        output.discard()
        return BROKEN_PIPE
    return status


def _call(module: str, function: str, argument: argparse.Namespace | config.Config | Sequence[str]) -> int:
    # Imported only now: no command pays for what the others need, and the agent stays small.
    found = getattr(importlib.import_module(f"lbproxy.{module}"), function)
    with interrupts.raised():
        return int(found(argument))


def _parsers() -> tuple[config_flags.Parser, dict[str, config_flags.Parser]]:
    """Build the parser of the whole command line, and those of the commands by name."""
    parser = config_flags.Parser(prog="lbproxy", description=DESCRIPTION)
    parser.add_argument("--version", action="store_true", help="say which version this is")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    run = commands.add_parser("run", help="the agent: serve this node until stopped")
    config_flags.add_to(run)
    run.add_argument("--version", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    preflight = commands.add_parser("preflight", help="whether this node can run lbproxy; changes nothing")
    config_flags.add_to(preflight, without=config_options.Group.ONCE)
    preflight.description, preflight.usage = PREFLIGHT, "%(prog)s [-o FORMAT] [option of lbproxy run …]"
    _add_output(preflight)
    for name, summary in READERS.items():
        reader = commands.add_parser(name, help=summary, description=f"Show {summary}, read from the kernel.")
        _add_output(reader)
        _add_bpffs(reader)
        reader.set_defaults(name=None, namespace=None)
        if name in ("services", "backends"):
            reader.add_argument(
                "name", nargs="?", metavar="NAME", help="only this Service, or NAMESPACE/NAME"
            )
            reader.add_argument("-n", "--namespace", help="only Services of this namespace")
    explain = commands.add_parser(
        "explain",
        help="what the kernel would do with a connection, step by step",
        description=EXPLAIN,
    )
    explain.add_argument(
        "--from",
        dest="source",
        type=_source,
        default="pod",
        metavar="IP[:PORT]|pod|node|outside",
        help="who connects: an address, or a pod or process of this node, or somebody outside (default pod); "
        "the port tells a flow that is known already",
    )
    explain.add_argument(
        "--to",
        dest="destination",
        type=_destination,
        required=True,
        metavar="IP:PORT[/PROTO]",
        help="to where",
    )
    _add_output(explain)
    _add_bpffs(explain)
    bundle = commands.add_parser(
        "support-bundle", help="collect what a report of an error needs into one file"
    )
    bundle_flags.add_to(bundle)
    _add_bpffs(bundle)
    trace = commands.add_parser("trace", help="follow connections live, through sockets and devices")
    trace_flags.add_to(trace)
    _add_bpffs(trace)
    cleanup = commands.add_parser(
        "cleanup",
        help="remove every trace of lbproxy",
        description="Detach and unpin everything that lbproxy has put into the kernel.",
    )
    _add_bpffs(cleanup)
    cleanup.add_argument(
        "--kube-proxy",
        action="store_true",
        help="also remove what kube-proxy left behind; an agent that runs is then left alone",
    )
    _add_migrate(commands)
    demo = commands.add_parser(
        "demo",
        help="see it work: a small cluster of namespaces on this machine",
        description="Build a small cluster of namespaces, balance real traffic in it, and clean up.",
    )
    demo.add_argument("--seconds", type=_seconds, default=None, metavar="N", help="how long traffic runs")
    demo.add_argument("--plain", action="store_true", help="lines instead of a live picture")
    demo.add_argument(
        "--screenshot", type=pathlib.Path, metavar="FILE.svg", help="write the last picture here"
    )
    commands.add_parser("bench", help="measure it, and compare two measurements", add_help=False)
    return parser, commands.choices


def _add_migrate(commands: "argparse._SubParsersAction[config_flags.Parser]") -> None:
    migrate = commands.add_parser(
        "migrate",
        help="take a node or a cluster over from kube-proxy, or give it back, with no connection broken",
        add_help=False,
    )
    migrate.add_argument("-h", "--help", action=migrate_flags.Help)
    migrate_flags.add_to(migrate)
    _add_output(migrate)
    _add_bpffs(migrate)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", choices=("table", "json", "yaml"), default="table", help="how to show it"
    )


def _add_bpffs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bpffs",
        type=pathlib.Path,
        default=pathlib.Path(os.environ.get("LBPROXY_BPFFS") or config.BPFFS),
        help=f"where lbproxy is pinned (default $LBPROXY_BPFFS, else {config.BPFFS})",
    )


def _source(text: str) -> str:
    if text in ("pod", "node", "outside"):
        return text
    with contextlib.suppress(ValueError):
        found = kinds.parse_destination(text)
        return str(config.ListenAddress(str(found.address), found.port))
    try:
        return str(kinds.parse_ip(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address, pod, node or outside") from None


def _destination(text: str) -> kinds.Destination:
    try:
        return kinds.parse_destination(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds
