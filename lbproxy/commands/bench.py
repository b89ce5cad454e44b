"""`lbproxy bench`: hand over to the benchmarks, which are in a checkout and in no package."""

import os
import pathlib
import sys
from collections.abc import Sequence

from lbproxy import errors
from lbproxy.config import flags as config_flags

DESCRIPTION = """\
Measure lbproxy beside kube-proxy's rules and no proxy at all, and read what was measured.

commands:
  run [PROFILE]            measure, as root, in namespaces of its own: quick (the default), full, smoke
  report [FILE]            write README.md's tables and docs/benchmarks.{md,html,png} from a run
  compare A.json B.json    what got better or worse; exit status 1 if something is worse beyond the noise,
                           or if that cannot be known

examples:
  lbproxy bench run quick --out before.json
  lbproxy bench run quick --out after.json
  lbproxy bench compare before.json after.json
  lbproxy bench run --help                                  what each of them takes

The benchmarks are in a checkout of lbproxy; an installed package does not have them.
"""

COMMANDS = ("run", "report", "compare")


def main(arguments: Sequence[str], checkout: pathlib.Path | None = None) -> int:
    """Become the program that a command names; returns only where that cannot be."""
    usage = "lbproxy bench COMMAND …"
    parser = config_flags.Parser(prog="lbproxy bench", usage=usage, description=DESCRIPTION)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=" or ".join(COMMANDS))
    # What comes after the command is read by the program.
    command = parser.parse_args(arguments[:1]).command
    root = checkout or pathlib.Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / f"{command}.py").exists():
        raise errors.AgentError(
            "the benchmarks are not part of an installed lbproxy: run this in a checkout "
            f"(there are none in {root})"
        )
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    argv = [sys.executable, "-P", "-m", f"benchmarks.{command}", *arguments[1:]]
    sys.stdout.flush()
    os.execve(sys.executable, argv, {**os.environ, "PYTHONPATH": path})
