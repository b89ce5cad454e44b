"""The traffic program: it counts what happened, also when things break."""

import collections.abc
import pathlib
import re
import signal
import subprocess

import pytest

from lbproxy.lab import cluster, traffic
from tests import polling

PORT = 8080


@pytest.fixture
def server(lab: cluster.Lab) -> collections.abc.Iterator[traffic.Server]:
    running = lab.serve("n2/p1", [PORT, PORT + 1])
    yield running
    running.stop()


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("mode", ["short", "storm", "established", "hold", "udp-new", "udp-established"])
def test_every_answer_is_counted_under_the_name_of_who_gave_it(
    lab: cluster.Lab, server: traffic.Server, mode: traffic.Mode, family: int
) -> None:
    address = lab["n2/p1"].address(family)
    result = lab.client("n1/p1", mode, address, PORT + 1, count=200, connections=5).result()
    assert (result.count, result.failed, result.servers) == (200, 0, {"n2/p1": 200})
    assert result.open == {"hold": 5, "established": 5, "udp-established": 5}.get(mode, 0)
    latency = result.latency_us
    assert 0 < latency.p50 <= latency.p90 <= latency.p99 <= latency.p999 <= latency.max


@pytest.mark.parametrize("family", [4, 6])
def test_what_bulk_calls_delivered_is_what_the_server_read(lab: cluster.Lab, family: int) -> None:
    running = lab.serve("n2/p2", [PORT])
    client = lab.client("n1/p1", "bulk", lab["n2/p2"].address(family), PORT, seconds=0.1)
    result = client.result()
    served = running.stop()
    assert (result.count, result.failed, result.servers) == (1, 0, {"n2/p2": 1})
    assert result.bytes == served.bytes > 0
    assert result.seconds >= 0.1
    assert result.bytes_per_second == pytest.approx(result.bytes / result.seconds, rel=1e-3)
    assert (served.accepted, served.tcp, served.udp) == (1, 1, 0)


def test_bulk_goes_on_until_it_is_stopped(lab: cluster.Lab, server: traffic.Server) -> None:
    client = lab.client("n1/p1", "bulk", lab["n2/p1"].ipv4, PORT)
    _await_bulk(lab)
    result = client.stop()
    assert (result.count, result.failed) == (1, 0)
    assert result.bytes > 0


def test_bulk_to_a_server_that_ends_midway_is_a_failure(lab: cluster.Lab) -> None:
    running = lab.serve("n2/p2", [PORT])
    client = lab.client("n1/p1", "bulk", lab["n2/p2"].ipv4, PORT)
    _await_bulk(lab)
    running.kill()
    result = client.result()
    assert (result.count, result.failed, result.servers, result.bytes) == (0, 1, {}, 0)
    assert set(result.failures) <= {"ECONNRESET", "EPIPE"}


def test_bulk_to_a_server_that_stops_reading_is_a_failure(lab: cluster.Lab) -> None:
    running = lab.serve("n2/p2", [PORT])
    client = lab.client("n1/p1", "bulk", lab["n2/p2"].ipv4, PORT, timeout_s=0.5)
    _await_bulk(lab)
    running.process.send_signal(signal.SIGSTOP)
    result = client.result()
    running.process.send_signal(signal.SIGCONT)
    running.stop()
    assert (result.failures, result.bytes) == ({"ETIMEDOUT": 1}, 0)


def test_bulk_that_is_refused_is_a_failure(lab: cluster.Lab) -> None:
    result = lab.client("n1/p1", "bulk", lab["n2/p2"].ipv4, 1, seconds=1).result()
    assert (result.count, result.failures, result.bytes) == (0, {"ECONNREFUSED": 1}, 0)


def _await_bulk(lab: cluster.Lab) -> None:
    """Wait until more is acknowledged than any buffer at the receiver holds."""

    def received() -> bool:
        sockets = lab.check_output("n1/p1", ["ss", "-Htin", "state", "established"])
        return any(int(acked) > 64 << 20 for acked in re.findall(r"bytes_acked:(\d+)", sockets))

    polling.eventually(received, what="more than 64 MiB acknowledged")


def test_a_question_that_begins_otherwise_may_hold_the_mark_of_bulk(
    lab: cluster.Lab, server: traffic.Server
) -> None:
    with lab.shell("n1/p1") as sockets, sockets.open(lab["n2/p1"].ipv4, PORT) as connection:
        connection.send(b"x\1\n")
        assert connection.recv() == b"n2/p1\n"


def test_client_and_server_account_for_their_cpu_time(lab: cluster.Lab) -> None:
    running = lab.serve("n2/p2", [PORT])
    client = lab.client("n1/p1", "short", lab["n2/p2"].ipv4, PORT, count=2000)
    result = client.result()
    served = running.stop()
    assert (served.accepted, served.tcp, served.bytes) == (2000, 2000, 0)
    for cpu_s in (result.cpu_s, served.cpu_s):
        assert cpu_s.user + cpu_s.system > 0
        assert 0 <= cpu_s.user_share <= 1


def test_whoever_has_a_result_leaves_no_process_and_no_pipe_behind(lab: cluster.Lab) -> None:
    running = lab.serve("n2/p2", [PORT])
    client = lab.client("n1/p1", "short", lab["n2/p2"].ipv4, PORT, count=1)
    client.result()
    assert client.process.returncode == 0
    running.stop()
    for process in (client.process, running.process):
        assert process.stdout is not None
        assert process.stdout.closed


def test_the_share_of_a_programs_own_code_is_of_its_cpu_time() -> None:
    assert traffic.CpuTime(user=1.0, system=3.0).user_share == 0.25
    assert traffic.CpuTime(user=0.0, system=0.0).user_share == 0


def test_a_server_counts_datagrams_apart(lab: cluster.Lab) -> None:
    running = lab.serve("n2/p2", [PORT])
    assert lab.client("n1/p1", "udp-new", lab["n2/p2"].ipv4, PORT, count=3).result().failed == 0
    served = running.stop()
    assert (served.accepted, served.tcp, served.udp) == (0, 0, 3)
    assert running.stop() == served


def test_a_server_that_was_killed_has_no_result(lab: cluster.Lab) -> None:
    running = lab.serve("n2/p2", [PORT])
    running.kill()
    with pytest.raises(RuntimeError, match="status -9"):
        running.stop()


def test_a_request_may_come_in_pieces_and_several_in_one(lab: cluster.Lab, server: traffic.Server) -> None:
    with lab.shell("n1/p1") as sockets, sockets.open(lab["n2/p1"].ipv4, PORT) as connection:
        local = connection.getsockname()
        connection.send(b"some?")
        connection.send(b"\n\n")
        received = b""
        while received.count(b"\n") < 2:
            received += connection.recv()
    assert received == f"n2/p1 {local[0]} {local[1]}\nn2/p1\n".encode()


def test_failures_are_counted_by_name(lab: cluster.Lab) -> None:
    refused = lab.client("n1/p1", "short", lab["n2/p2"].ipv4, 1, count=3).result()
    assert (refused.count, refused.failures) == (0, {"ECONNREFUSED": 3})
    unanswered = lab.client("n1/p1", "short", "10.96.0.1", 1, count=2, timeout_s=0.1).result()
    assert unanswered.failures == {"ETIMEDOUT": 2}
    silent = lab.client("n1/p1", "udp-new", "10.96.0.1", 1, count=2, timeout_s=0.1).result()
    assert silent.failures == {"ETIMEDOUT": 2}


def test_held_connections_that_break_are_reported(lab: cluster.Lab) -> None:
    running = lab.serve("n2/p2", [PORT])
    client = lab.client(
        "n1/p1", "hold", lab["n2/p2"].ipv4, PORT, connections=30, progress=True, interval_s=0.01
    )
    lines = client.progress()
    before = next(line for line in lines if line.open == 30 and line.count)
    assert before.failed == 0
    running.kill()
    result = client.result()
    assert (result.open, result.failed) == (0, 30)
    assert set(result.failures) <= {"ECONNRESET", "EPIPE"}


def test_a_storm_runs_until_it_is_stopped_and_reports_as_it_goes(
    lab: cluster.Lab, server: traffic.Server
) -> None:
    client = lab.client("n1/p1", "storm", lab["n2/p1"].ipv4, PORT, progress=True, interval_s=0.02)
    lines = client.progress()
    seen = [next(lines) for _ in range(3)]
    result = client.stop()
    assert all(line.servers == {"n2/p1": line.count} for line in seen)
    assert result.count >= sum(line.count for line in seen) > 0
    assert result.failed == 0


def test_a_client_waiting_for_an_answer_stops_at_once_without_calling_it_a_failure(lab: cluster.Lab) -> None:
    client = lab.client("n1/p1", "short", "10.96.0.1", 1, timeout_s=600)
    waiting = ["ss", "-Htn", "state", "syn-sent"]
    polling.eventually(lambda: "10.96.0.1:1" in lab.check_output("n1/p1", waiting), what="its SYN")
    result = client.stop()
    assert (result.count, result.failed) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["short", "--to", "nowhere", "--port", "1"], "IPv4 or IPv6"),
        (["short", "--port", "1"], "--to is missing"),
        (["short", "--to", "::1"], "--port is missing"),
        (["short", "--to", "::1", "--port", "65536"], "not a number"),
        (["short", "--to", "::1", "--port", "1x"], "not a number"),
        (["bulk", "--to", "::1", "--port", "1", "--count", "1"], "--seconds, not --count"),
        (["wrong", "--to", "::1", "--port", "1"], "unknown mode"),
        (["serve", "--port", "1"], "--name"),
        (["serve", "--port", "1", "--name", "x" * 127], "--name"),
        (["serve", "--port", "1", "--name", "x", "--bind", "x"], "--bind"),
        ([], "no mode"),
    ],
)
def test_bad_arguments_are_explained(
    load_program: pathlib.Path, arguments: list[str], complaint: str
) -> None:
    done = subprocess.run([load_program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert complaint in done.stderr


def test_a_second_build_takes_the_first_ones_program(tmp_path: pathlib.Path) -> None:
    first = traffic.build(tmp_path)
    made = first.stat().st_ino
    assert traffic.build(tmp_path).stat().st_ino == made
    assert list(tmp_path.iterdir()) == [first]


def test_traffic_that_does_not_start_is_an_error(lab: cluster.Lab, server: traffic.Server) -> None:
    with pytest.raises(RuntimeError, match="status 2"):
        lab.client("n1/p1", "short", "nowhere", 1, count=1)
    with pytest.raises(RuntimeError, match="status 1"):
        lab.serve("n2/p1", [PORT])


def test_a_client_that_is_killed_has_no_result(lab: cluster.Lab, server: traffic.Server) -> None:
    client = lab.client("n1/p1", "storm", lab["n2/p1"].ipv4, PORT)
    client.process.kill()
    with pytest.raises(RuntimeError, match="status -9"):
        client.result()
