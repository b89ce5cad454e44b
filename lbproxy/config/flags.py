"""The flags of `lbproxy run`, made from the option table.

Values are left as text here: whatever is wrong with them is found later, all of
it at once, where the parser would stop at the first.
"""

import argparse
import difflib
import re
import textwrap
import typing
from collections.abc import Iterable, Sequence

from lbproxy import errors
from lbproxy.config import kinds
from lbproxy.config.kube_proxy_options import OPTIONS
from lbproxy.config.options import Group, Option

DESCRIPTION = """\
Serve the Services of a cluster on this node from the kernel, in kube-proxy's place.

examples:
  lbproxy run --manifests ./cluster/            no cluster: follow a folder of YAML files
  lbproxy run --kubeconfig ~/.kube/config --node-name worker-1
  lbproxy run --config /var/lib/kube-proxy/config.conf --hostname-override "$NODE_NAME"
                                                in kube-proxy's DaemonSet, with its ConfigMap
  lbproxy run --manifests ./cluster/ --cgroup /sys/fs/cgroup/demo --bpffs /sys/fs/bpf/demo
                                                only for the processes of one cgroup

The agent may stop: what it has put into the kernel goes on serving until `lbproxy cleanup`.
"""


EXIT_STATUS: typing.Final = (
    "Exit status: 0 done, 1 failure, 2 wrong flags or configuration, 3 the kernel lacks something."
)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError, and shows its description as it is written."""

    def __init__(self, **options: typing.Any) -> None:
        options.setdefault("formatter_class", _Formatter)
        super().__init__(allow_abbrev=False, **options)

    def format_help(self) -> str:
        """What --help shows: with the exit statuses, unless the description has them in its own words."""
        shown = super().format_help()
        return shown if EXIT_STATUS[:12] in shown else f"{shown}\n{EXIT_STATUS}\n"

    def error(self, message: str) -> typing.NoReturn:
        """Report what cannot be parsed at all, like a flag without its value."""
        if choice := _CHOICE.search(message):
            close = difflib.get_close_matches(choice[1], re.findall(r"'([^']*)'", choice[2]), n=1)
            message += f"; did you mean {close[0]}?" if close else ""
        raise errors.ConfigError(message.removeprefix("argument "))


_CHOICE: typing.Final = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)$")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def add_to(parser: argparse.ArgumentParser, without: Group | None = None) -> None:
    """Give a parser every flag of the table, under their groups, but for those of one group."""
    parser.usage = "%(prog)s [--manifests PATH | --kubeconfig FILE | --config FILE] [option …]"
    parser.description = DESCRIPTION
    parser.epilog = _epilog()
    for group in Group:
        if group is without:
            continue
        section = parser.add_argument_group(group.value)
        for option in OPTIONS:
            if option.flags and option.group is group:
                _add(section, option)


def texts(parsed: argparse.Namespace) -> dict[str, list[str]]:
    """Collect what was given for each flag, in order, by option name."""
    given = {option.name: getattr(parsed, option.name, None) for option in OPTIONS if option.flags}
    return {name: values for name, values in given.items() if values is not None}


def normalise(arguments: Sequence[str]) -> list[str]:
    """Write --some_flag as --some-flag, as kube-proxy's flags may be given either way."""
    normalised = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        normalised.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    return normalised


def unknown(extra: Sequence[str], known: Iterable[str]) -> list[str]:
    """Describe arguments that nothing takes, with the flag that may have been meant."""
    problems = []
    flags = [flag for flag in known if flag.startswith("--")]
    is_value = False
    for argument in extra:
        if argument.startswith("-") and argument != "-":
            name, equals, _ = argument.partition("=")
            close = difflib.get_close_matches(name, flags, n=1)
            hint = f"did you mean {close[0]}?" if close else "--help lists those there are"
            problems.append(f"{name}: unknown flag; {hint}")
            is_value = not equals
        elif is_value:
            is_value = False
        else:
            problems.append(f"{argument!r}: arguments other than flags are not taken")
    return problems


def describe(option: Option) -> str:
    """Say in one line what an option does, with its default and whether it may be repeated."""
    notes = []
    if option.default and option.type is not kinds.BOOL:
        notes.append(f"default {option.default}")
    elif option.default == "true":
        notes.append("default true")
    if option.type.joins:
        notes.append("repeatable")
    if option.no_effect:
        notes.append("no effect yet")
    return option.help_of_flag + (f" ({'; '.join(notes)})" if notes else "")


def _add(section: argparse._ArgumentGroup, option: Option) -> None:
    hidden = option.group is Group.WITHOUT_EFFECT
    text = argparse.SUPPRESS if hidden else describe(option).replace("%", "%%")
    if option.type is kinds.BOOL:
        section.add_argument(
            *option.flags,
            dest=option.name,
            action="append",
            nargs="?",
            const="true",
            metavar="BOOL",
            help=text,
        )
    else:
        section.add_argument(
            *option.flags, dest=option.name, action="append", metavar=option.value_word, help=text
        )


def _epilog() -> str:
    names = " ".join(o.flags[0] for o in OPTIONS if o.flags and o.group is Group.WITHOUT_EFFECT)
    return textwrap.fill(
        f"Accepted from kube-proxy without effect, and said so once in the log: {names}",
        width=98,
        break_on_hyphens=False,
    ) + ("\n\nDurations are written like 30s, 1m30s or 0. Every flag and file field: docs/configuration.md.")
