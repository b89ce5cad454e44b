"""The arguments of `lbproxy support-bundle`."""

import argparse


def add_to(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.description = """\
Collect what a report of an error needs into one .tar.gz: what is balanced, what is attached where, settings,
metrics, the node's devices and routes. With or without a running agent; as root. It changes nothing.

No secrets are in it: no contents of kubeconfigs, no tokens, certificates, environments or annotations, and
whatever has the form of a secret is hidden. Names and addresses are, unless --redact replaces them: the same
name always by the same pseudonym, so that the report can still be followed. manifest.json says what is in it
and what could not be had.
"""
    parser.epilog = """\
examples:
  lbproxy support-bundle                                   a file in this folder
  kubectl exec POD -- lbproxy support-bundle --redact -o - > report.tar.gz
"""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-o", "--output", metavar="FILE", help="where to; - is standard output")
    parser.add_argument("--redact", action="store_true", help="pseudonyms for names and addresses")
    parser.add_argument(
        "--trace",
        dest="trace_s",
        type=_seconds,
        default=3.0,
        metavar="SECONDS",
        help="trace connections for so long (default 3; 0: not at all)",
    )


def _seconds(text: str) -> float:
    if text.isdecimal() and int(text) <= 600:
        return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 600")
