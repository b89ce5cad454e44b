"""`lbproxy demo`: set the stage, play, show the result, and leave nothing behind."""

import argparse
import contextlib
import pathlib
import sys

from lbproxy import errors
from lbproxy.demo import interrupts, node_agent, picture, scene, screen, stage, story
from lbproxy.kernel import features
from lbproxy.lab import cluster

DEFAULT_SECONDS = 12.0


def main(arguments: argparse.Namespace) -> int:
    """Run the demo; returns 0 if no connection failed and everything was as it should be."""
    _require()
    _check_writable(arguments.screenshot)
    with interrupts.Interrupts() as stop:
        try:
            shown = _run(arguments.seconds or DEFAULT_SECONDS, screen.choose(plain=arguments.plain), stop)
        except Exception:
            # An interrupt at the terminal also reaches what we were waiting for, which then fails.
            if not stop.number:
                raise
            print("lbproxy: interrupted; nothing is left behind", file=sys.stderr)
            return stop.exit_status
        if arguments.screenshot:
            picture.save_svg(shown, arguments.screenshot)
    return 0 if shown.succeeded else 1


def _run(seconds: float, shows: screen.Screen, stop: interrupts.Interrupts) -> scene.Scene:
    shown = scene.Scene(
        [scene.Backend(name, node) for name, node in stage.BACKENDS.items()],
        title=f"Service shop · {stage.SHOP[4]} and {stage.SHOP[6]} · NodePort {stage.NODE_PORT}",
    )
    with shows, contextlib.ExitStack() as stack:
        shows.step("building a cluster of namespaces: 2 nodes, 5 pods, IPv4 and IPv6")
        lab = stack.enter_context(cluster.Lab(stage.nodes()))
        stop.check()
        shows.step("compiling the traffic program")
        lab.program()
        stop.check()
        manifests = stage.Manifests(lab)
        agent = stack.enter_context(node_agent.NodeAgent(lab, stage.NODE, manifests.folder))
        story.Story(lab, agent, manifests, shown, shows, stop).play(seconds)
        shows.finish(shown)
    return shown


def _require() -> None:
    """Raise AgentError or UnsupportedKernel for what the demo can not do without."""
    missing = cluster.missing_capabilities()
    if missing:
        raise errors.AgentError(f"the demo needs {', '.join(missing)}")
    features.check_capabilities()
    features.check()


def _check_writable(path: pathlib.Path | None) -> None:
    # Found out now, not when the show is over.
    if path is not None and not path.parent.is_dir():
        raise errors.ConfigError(f"--screenshot {path}: {path.parent} is no folder")
