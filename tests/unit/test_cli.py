"""The command line: what is handed to whom, and how failures end."""

import argparse
import importlib.metadata
import io
import os
import pathlib
import subprocess
import sys
import types
import typing

import pytest
import yaml

from lbproxy import cli as command
from lbproxy import errors
from lbproxy.config import config
from lbproxy.config import flags as config_flags

Calls = list[tuple[str, typing.Any]]


class Outcome:
    """What the modules behind the commands do in a test."""

    status = 0
    failure: BaseException | None = None


@pytest.fixture
def outcome() -> Outcome:
    return Outcome()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, outcome: Outcome) -> Calls:
    """Stand in for the modules behind the commands; records what they are called with."""
    made: Calls = []

    def stand_in(name: str) -> typing.Callable[[typing.Any], int]:
        def call(argument: object) -> int:
            made.append((name, argument))
            if outcome.failure:
                raise outcome.failure
            return outcome.status

        return call

    for module, functions in (
        *(("agent", ("run", "init_only")), ("commands.cleanup", ("main",)), ("commands.show", ("main",))),
        *(("commands.explain", ("main",)), ("demo.command", ("main",)), ("commands.preflight", ("main",))),
    ):
        fake = types.ModuleType(f"lbproxy.{module}")
        for function in functions:
            name = module.removeprefix("commands.")
            setattr(fake, function, stand_in(name if function != "init_only" else "init"))
        monkeypatch.setitem(sys.modules, f"lbproxy.{module}", fake)
    return made


def test_run_hands_the_configuration_to_the_agent(calls: Calls, outcome: Outcome) -> None:
    outcome.status = 7
    assert command.main(["run", "--node-name=Here", "--manifests", "/"]) == 7
    ((name, given),) = calls
    assert name == "agent"
    assert isinstance(given, config.Config)
    assert (given.node_name, given.manifests) == ("here", pathlib.Path("/"))


@pytest.mark.parametrize("name", ["services", "backends", "maps", "status"])
def test_read_side_commands(calls: Calls, name: str) -> None:
    assert command.main([name, "-o", "json", "--bpffs=/b"]) == 0
    ((module, args),) = calls
    assert module == "show"
    assert (args.command, args.output, args.bpffs) == (name, "json", pathlib.Path("/b"))
    assert (args.name, args.namespace) == (None, None)


def test_services_may_be_chosen(calls: Calls) -> None:
    assert command.main(["services", "web", "-n", "shop"]) == 0
    ((_, args),) = calls
    assert (args.name, args.namespace, args.output, args.bpffs) == ("web", "shop", "table", config.BPFFS)


def test_explain(calls: Calls) -> None:
    assert command.main(["explain", "--from", "192.0.2.1", "--to", "[fd00::1]:53/udp"]) == 0
    ((module, args),) = calls
    assert module == "explain"
    assert args.source == "192.0.2.1"
    assert str(args.destination) == "[fd00::1]:53/UDP"


def test_preflight_takes_what_run_takes(calls: Calls, outcome: Outcome) -> None:
    outcome.status = 3
    assert command.main(["preflight", "--node-name=Here", "--manifests", "/", "-v", "2", "-o", "yaml"]) == 3
    ((module, args),) = calls
    assert (module, args.output) == ("preflight", "yaml")
    assert (args.config.node_name, args.config.manifests) == ("here", pathlib.Path("/"))


@pytest.mark.parametrize("flag", ["--cleanup", "--init-only", "--write-config-to=x", "--xdp=fast", "-o=xml"])
def test_preflight_does_nothing_else(calls: Calls, flag: str) -> None:
    assert command.main(["preflight", flag]) == 2
    assert calls == []


def test_cleanup_and_demo(calls: Calls) -> None:
    assert command.main(["cleanup", "--kube-proxy"]) == 0
    assert command.main(["demo", "--seconds", "2.5", "--plain", "--screenshot", "x.svg"]) == 0
    (_, cleanup), (_, demo) = calls
    assert cleanup.kube_proxy
    assert (demo.seconds, demo.plain, demo.screenshot) == (2.5, True, pathlib.Path("x.svg"))


def test_cleanup_as_a_flag_of_run(calls: Calls) -> None:
    assert command.main(["run", "--cleanup", "--bpffs=/b"]) == 0
    assert calls == [
        ("cleanup", argparse.Namespace(command="cleanup", bpffs=pathlib.Path("/b"), kube_proxy=True))
    ]


def test_init_only_sets_up_and_does_not_run(calls: Calls) -> None:
    assert command.main(["run", "--init-only", "--manifests=/none"]) == 0
    [(module, settings)] = calls
    assert (module, settings.manifests) == ("init", pathlib.Path("/none"))


def test_write_config_to_starts_nothing(calls: Calls, tmp_path: pathlib.Path) -> None:
    target = tmp_path / "written.yaml"
    assert command.main(["run", f"--write-config-to={target}", "--algorithm=maglev"]) == 0
    kube_proxy, own = yaml.safe_load_all(target.read_text())
    assert kube_proxy["healthzBindAddress"] == "0.0.0.0:10256"
    assert own["algorithm"] == "maglev"
    assert calls == []


def test_write_config_to_nowhere(
    calls: Calls, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    assert command.main(["run", f"--write-config-to={tmp_path}"]) == 1
    assert capsys.readouterr().err == f"lbproxy: error: --write-config-to: {tmp_path}: Is a directory\n"


def test_every_problem_on_a_line_of_its_own(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["run", "--xdp=fast", "--node-ip", "nowhere", "--xdpp"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "lbproxy: error: --xdpp: unknown flag; did you mean --xdp?",
        "lbproxy: error: --node-ip: 'nowhere' is not an IP address",
        "lbproxy: error: --xdp: 'fast' is not one of native, generic, off",
    ]
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no command given; lbproxy --help lists them"),
        (["serve"], "COMMAND: invalid choice: 'serve'"),
        (["services", "a", "b"], "'b': arguments other than flags are not taken"),
        (["services", "-o", "xml"], "-o/--output: invalid choice: 'xml'"),
        (["status", "--verbose"], "--verbose: unknown flag"),
        (["explain"], "the following arguments are required: --to"),
        (["explain", "--to", "10.0.0.1"], "--to: '10.0.0.1' is not an IP:PORT[/PROTOCOL]"),
        (["trace", "--for", "0"], "--for: '0' is not a number of seconds above 0 and up to 3600"),
        (["trace", "--service", "a/b/c"], "--service: 'a/b/c' is not a NAME or NAMESPACE/NAME"),
        (["trace", "--service", "cart:"], "--service: 'cart:' has no PORT after the colon"),
        (["migrate"], "the following arguments are required: status|take-over|return|cluster"),
        (
            ["explain", "--from", "moon", "--to", "10.0.0.1:1"],
            "--from: 'moon' is not an IP address, pod, node",
        ),
        (["demo", "--seconds", "nan"], "--seconds: 'nan' is not a number of seconds"),
    ],
)
def test_bad_arguments(
    calls: Calls, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert command.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lbproxy: error: {said}")
    assert calls == []


@pytest.mark.parametrize(
    ("place", "hint"),
    [
        ("web.default:80", "; it takes an address, not a name"),
        ("cart", "; it takes an address, not a name"),
        ("10.96.0.300:80", ""),
    ],
)
@pytest.mark.parametrize("name", ["explain", "trace"])
def test_a_destination_that_is_none(
    calls: Calls, capsys: pytest.CaptureFixture[str], name: str, place: str, hint: str
) -> None:
    assert command.main([name, "--to", place]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"[fd00::1]:53/UDP{hint}")
    assert calls == []


def test_an_ipv6_destination_without_brackets(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["explain", "--to", "fd00:96::80:80"]) == 2
    assert capsys.readouterr().err.endswith("; an IPv6 address before a port is in brackets\n")
    assert calls == []


def test_a_command_that_is_nearly_one(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["servces"]) == 2
    assert capsys.readouterr().err.endswith("; did you mean services?\n")


@pytest.mark.parametrize(
    ("failure", "status", "said"),
    [
        (errors.AgentError("another agent\nis running"), 1, "another agent is running"),
        (errors.ConfigError("--cgroup: not a cgroup"), 2, "--cgroup: not a cgroup"),
        (
            errors.UnsupportedKernel("BPF links for cgroups", "5.7", "use a newer kernel"),
            3,
            "this kernel lacks BPF links for cgroups, which exists since Linux 5.7: use a newer kernel",
        ),
    ],
)
def test_expected_failures_are_one_line_and_a_status(
    calls: Calls,
    outcome: Outcome,
    capsys: pytest.CaptureFixture[str],
    failure: Exception,
    status: int,
    said: str,
) -> None:
    outcome.failure = failure
    assert command.main(["run"]) == status
    assert capsys.readouterr().err == f"lbproxy: error: {said}\n"
    assert len(calls) == 1


def test_an_interrupt_is_quiet(calls: Calls, outcome: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    outcome.failure = KeyboardInterrupt()
    assert command.main(["demo"]) == 130
    assert capsys.readouterr().err == ""
    assert len(calls) == 1


def test_a_bug_is_not_hidden(calls: Calls, outcome: Outcome) -> None:
    outcome.failure = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        command.main(["run"])
    outcome.failure = BrokenPipeError()
    with pytest.raises(BrokenPipeError):
        command.main(["run"])
    assert len(calls) == 2


@pytest.mark.parametrize("size", [1, 1_000_000])
def test_a_reader_that_leaves_early_is_no_failure(tmp_path: pathlib.Path, size: int) -> None:
    script = tmp_path / "early.py"
    script.write_text(
        "import sys, types\n"
        "show = types.ModuleType('lbproxy.commands.show')\n"
        f"show.main = lambda args: sys.stdin.read() or print('x' * {size}) or 0\n"
        "sys.modules['lbproxy.commands.show'] = show\n"
        "from lbproxy.cli import main\n"
        "sys.exit(main(['services']))\n"
    )
    pipe = subprocess.PIPE
    # Buffered, so that a short output reaches the pipe only when it is flushed.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=pipe, stdout=pipe, stderr=pipe, env=buffered
    ) as child:
        assert child.stdin
        assert child.stdout
        assert child.stderr
        # It writes only once its input has ended: after nobody reads any more.
        child.stdout.close()
        child.stdin.close()
        assert child.stderr.read() == b""
        assert child.wait() == 141


@pytest.mark.parametrize(
    ("redirected", "why"), [(">/dev/full", "No space left on device"), (">&-", "standard output is closed")]
)
@pytest.mark.parametrize("size", [1, 1_000_000])
def test_output_that_cannot_be_written_is_one_line(
    tmp_path: pathlib.Path, redirected: str, why: str, size: int
) -> None:
    script = tmp_path / "unwritable.py"
    script.write_text(
        "import sys, types\n"
        "from lbproxy.commands import render\n"
        "show = types.ModuleType('lbproxy.commands.show')\n"
        f"show.main = lambda args: render.show('x' * {size}, 'json', list) or 0\n"
        "sys.modules['lbproxy.commands.show'] = show\n"
        "from lbproxy.cli import main\n"
        "sys.exit(main(['services']))\n"
    )
    shell = ["sh", "-c", f'"$0" "$1" {redirected}', sys.executable, str(script)]
    done = subprocess.run(shell, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == f"lbproxy: error: cannot write the output: {why}\n"
    assert done.returncode == 1


@pytest.mark.parametrize("arguments", [["--version"], ["run", "--version"]])
def test_version(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert command.main(arguments) == 0
    assert capsys.readouterr().out == f"lbproxy {importlib.metadata.version('lbproxy')}\n"


@pytest.mark.parametrize(
    "name", ["run", "services", "backends", "maps", "status", "explain", "cleanup", "demo"]
)
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main([name, "--help"])
    assert not caught.value.code
    out = capsys.readouterr().out
    assert out.startswith(f"usage: lbproxy {name} ")
    assert max(map(len, io.StringIO(out))) <= 102


@pytest.mark.parametrize("name", [*command._parsers()[1], ""])
def test_every_help_says_the_exit_statuses_once(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit):
        command.main([*filter(None, [name]), "--help"])
    assert capsys.readouterr().out.count("Exit status: 0 ") == 1


def test_exit_statuses_are_documented() -> None:
    page = (pathlib.Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
    for status in (
        0,
        errors.AgentError.exit_status,
        errors.ConfigError.exit_status,
        errors.UnsupportedKernel.exit_status,
    ):
        assert f"\n| {status} |" in page
        assert f" {status} " in config_flags.EXIT_STATUS
    assert f"| {command.INTERRUPTED}, {command.BROKEN_PIPE} |" in page
