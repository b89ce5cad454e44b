"""What the packet path costs, in ns a packet, by BPF_PROG_TEST_RUN.

Cases that share a table of flows are measured in rounds: each once, in an order that
rotates. Before anything counts, each program is given the first and the last flow's
packet and must make of it what it should; afterwards its verdict and its counters
must be those of the path that was meant.
"""

import collections.abc
import dataclasses
import random
import statistics
import time
import typing

from benchmarks import arena, bed, frames, process, results, talks, test_runs

FLOWS = 1 << 16
NOTHING = "returns at once"
NOTHING_SINGLY = "returns at once, one run at a time"
STRANGER = "of no service"
HERE = "established, to a pod here"
LEAVES = "established, its answers leave"
ELSEWHERE = "established, to another node"
NEW_ELSEWHERE = "new, to another node, masqueraded"
NO_STATE = "with nothing to remember, one run at a time"  # part of what such packets are called
STALE = "established, each the first of its flow in a second"
_TIMES_HOT = 1 << 16
_TIMES_COLD = 1 << 16
_TIMES_NEW = 4096
_TIMES_SINGLY = 1000
_CLOCK_MONOTONIC_COARSE = 6
PROTOCOLS = {frames.TCP: "TCP", frames.UDP: "UDP"}
# What must not move while anything here is measured.
_MISHAPS = ("PORTS_EXHAUSTED", "FLOWS_FULL", "FLOW_FAILED", "MANGLED", "NO_ROUTE", "BAD_SLOT", "UNSTEADY")
FILLS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99)
_TIMES_FILLED = 512


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A program and the packets that it is given."""

    program: str
    what: str
    flows: int  # so many in turn; 0: each packet is of a new one
    asks: test_runs.Flows
    becomes: test_runs.Flows | None = None  # None: the packet is left as it is
    verdict: int = test_runs.NEXT
    tcp_flags: int = frames.ACK
    device: str = "up0"
    proved: bool = True
    # One run at a time, since no wrapper can undo it: the kernel encapsulates no packet twice,
    # and takes away what was before its headers.
    singly: bool = False

    @property
    def times(self) -> int:
        """How often it is run for a sample."""
        if not self.flows:
            return _TIMES_SINGLY if self.singly else _TIMES_NEW
        if self.what == STALE:
            return self.flows
        return _TIMES_HOT if self.flows == 1 else _TIMES_COLD


@dataclasses.dataclass(frozen=True, slots=True)
class Set:
    """Cases that share a table of flows."""

    family: int
    proto: int
    cases: tuple[Case, ...]
    copies: tuple[talks.Copies, ...] = ()


def expected_s(rounds: int) -> float:
    """Return about how long `measure` takes."""
    return 3 + 0.8 * (rounds + 1)


def measure(at: bed.Bed, family: int, proto: int, rounds: int, into: list[results.Packets]) -> float:
    """Measure all cases of a family and protocol; returns the share of the CPUs that others had meanwhile."""
    others = process.Others()
    for make in (_near, _far, _new):
        into += _measure(at, make(at, family, proto), rounds)
    return others.share()


def _measure(at: bed.Bed, listed: Set, rounds: int) -> list[results.Packets]:
    at.forget_flows()
    for one in listed.copies:
        at.put_flows(one.keys, bytes(one.rows), len(one.keys) // talks.KEY_SIZE)
    frame_of = {
        case: at.frame(case.device, case.asks(0), listed.proto, case.tcp_flags) for case in listed.cases
    }
    for case in listed.cases:
        _prove(at, listed, case)
    samples: dict[Case, list[float]] = {case: [] for case in listed.cases}
    for number in range(rounds + 1):
        turn = number % len(listed.cases)
        order = (*listed.cases[turn:], *listed.cases[:turn])
        for case in order if number // len(listed.cases) % 2 == 0 else order[::-1]:
            ns = _sample(at, listed, case, frame_of[case])
            if number:  # the first round warms up
                samples[case].append(ns)
    return [
        results.Packets(
            case.program if case.what not in (NOTHING, NOTHING_SINGLY) else test_runs.kind_of(case.program),
            case.what, listed.family, PROTOCOLS[listed.proto], case.flows, ns,
        )
        for case, ns in samples.items()
    ]  # fmt: skip


def _prove(at: bed.Bed, listed: Set, case: Case) -> None:
    """Raise BenchError unless the program does with the first and last flow's packet what is expected."""
    if not case.proved:
        return
    for number in {0, max(0, case.flows - 1)}:
        asked = case.asks(number)
        frame = at.frame(case.device, asked, listed.proto, case.tcp_flags)
        outcome = at.once(case.program, case.device, frame)
        wanted = asked if case.becomes is None else case.becomes(number)
        if outcome.verdict != case.verdict or frames.read(outcome.frame) != wanted:
            raise arena.BenchError(
                f"{case.program}, {case.what}: verdict {outcome.verdict} and {frames.read(outcome.frame)} "
                f"where {case.verdict} and {wanted} were expected"
            )
        if not frames.l4_checksum_is_right(outcome.frame, listed.proto):
            raise arena.BenchError(f"{case.program}, {case.what}: a wrong checksum")
    if not case.flows:
        at.forget_flows()


def _sample(at: bed.Bed, listed: Set, case: Case, frame: bytes) -> float:
    if case.what == STALE:
        now = time.clock_gettime_ns(_CLOCK_MONOTONIC_COARSE) >> talks.TICK_SHIFT
        for one in listed.copies:
            talks.set_seen(one.rows, now - 2)
            at.put_flows(one.keys, bytes(one.rows), len(one.keys) // talks.KEY_SIZE)
    before = at.counters()
    if case.singly:
        return _singly(at, listed, case)
    verdict, ns = at.repeat(case.program, case.device, frame, case.asks, case.flows, case.times)
    if verdict != case.verdict:
        raise arena.BenchError(f"{case.program}, {case.what}: verdict {verdict}, not {case.verdict}")
    if not case.flows:
        at.forget_flows()
    after = at.counters()
    wrong = [name for name in _MISHAPS if name != "FLOWS_FULL" and after[name] != before[name]]
    if wrong:
        raise arena.BenchError(f"{case.program}, {case.what}: counted {', '.join(wrong)}")
    return ns


def _singly(at: bed.Bed, listed: Set, case: Case) -> float:
    made = [
        at.frame(case.device, case.asks(number), listed.proto, case.tcp_flags) for number in range(case.times)
    ]
    verdicts, ns = at.singly(case.program, case.device, made)
    if verdicts != {case.verdict} or at.flows():
        raise arena.BenchError(f"{case.program}, {case.what}: verdicts {verdicts}, {len(at.flows())} rows")
    return statistics.median(ns)


def _floors(asks: test_runs.Flows) -> list[Case]:
    verdicts = {"xdp": test_runs.XDP_PASS}
    return [
        Case(
            test_runs.nothing(kind),
            NOTHING,
            1,
            asks,
            verdict=verdicts.get(kind, test_runs.NEXT),
            proved=False,
        )
        for kind in test_runs.KINDS
    ]


def _turned(of: test_runs.Flows) -> test_runs.Flows:
    """The answers."""
    return lambda number: of(number).turned()


def _both(*case: typing.Any, **more: typing.Any) -> list[Case]:
    """One flow, and many."""
    return [Case(case[0], case[1], flows, *case[2:], **more) for flows in (1, FLOWS)]


def _near(at: bed.Bed, family: int, proto: int) -> Set:
    """Flows to a pod of this node that sees its client, and packets of no service."""
    side = bed.SIDES[family]
    talk, rows = talks.hold(at, bed.LOCAL, family, proto)
    copied = talks.copies(rows, talk.inside(0), None, at, talk, FLOWS)

    def passing(number: int) -> frames.Ends:
        return talk.asked(number)._replace(dst=side.stranger, dport=8080)

    def leaving(number: int) -> frames.Ends:
        return passing(number).turned()

    def answer(number: int) -> frames.Ends:
        return talk.inside(number).turned()

    cases = [
        *_floors(talk.asked),
        *_both("tc_from_outside", STRANGER, passing),
        *_both("tc_from_inside", STRANGER, leaving, device="pod0"),
        *_both("tc_to_any", STRANGER, leaving),
        *_both("xdp_from_outside", STRANGER, passing, verdict=test_runs.XDP_PASS),
        *_both("tc_from_outside", HERE, talk.asked, talk.inside),
        Case("tc_from_outside", STALE, FLOWS, talk.asked, talk.inside),
        *_both(
            "tc_to_any", LEAVES, answer, lambda number: talk.asked(number).turned()
        ),
        *_both(
            "xdp_from_outside", "established, to a pod here: left to tc", talk.asked,
            verdict=test_runs.XDP_PASS,
        ),
    ]  # fmt: skip
    return Set(family, proto, tuple(cases), tuple(copied))


def _far(at: bed.Bed, family: int, proto: int) -> Set:
    """Masqueraded flows to pods of another node."""
    talk, rows = talks.hold(at, bed.FAR, family, proto)
    leaving = [key.becomes(row) for key, row in rows.items()]
    [beyond] = [
        (packet.src, int.from_bytes(packet.sport, "big")) for packet in leaving
        if (packet.src, packet.dst) == (talk.masquerade, talk.backend)
    ]  # fmt: skip
    copied = talks.copies(rows, talk.inside(0), beyond, at, talk, FLOWS)

    def answer(number: int) -> frames.Ends:
        return talk.beyond(number).turned()

    def answer_inside(number: int) -> frames.Ends:
        return talk.inside(number).turned()

    def answered(number: int) -> frames.Ends:
        return talk.asked(number).turned()

    cases = [
        *_floors(talk.asked),
        *_both("tc_from_outside", ELSEWHERE, talk.asked, talk.inside),
        *_both("tc_to_any", "established, it leaves masqueraded", talk.inside, talk.beyond),
        *_both("tc_from_outside", "established, its answers from another node", answer, answer_inside),
        *_both("tc_to_any", "established, those leave", answer_inside, answered),
        *_both(
            "xdp_from_outside", ELSEWHERE, talk.asked, talk.beyond,
            verdict=test_runs.XDP_TX,
        ),
        *_both(
            "xdp_from_outside", "established, its answers from another node", answer, answered,
            verdict=test_runs.XDP_TX,
        ),
    ]  # fmt: skip
    return Set(family, proto, tuple(cases), tuple(copied))


def _new(at: bed.Bed, family: int, proto: int) -> Set:
    """First packets of flows, in an empty table."""

    def asked(service: bed.Service) -> test_runs.Flows:
        side = bed.SIDES[family]
        return talks.Talk(service, proto, side.client, side.node, side.pod, None).asked

    def inside(number: int) -> frames.Ends:
        return asked(bed.LOCAL)(number)._replace(dst=bed.SIDES[family].pod, dport=8080)

    refused = asked(bed.NONE)
    tcp = proto == frames.TCP
    unproved: dict[str, typing.Any] = {"tcp_flags": frames.SYN, "proved": False}
    cases = [
        *_floors(asked(bed.LOCAL)),
        Case(
            "tc_from_outside", "new, to a pod here that sees its client", 0, asked(bed.LOCAL), inside,
            tcp_flags=frames.SYN,
        ),
        Case(
            "tc_from_outside", "new, to a pod here, masqueraded", 0, asked(bed.NEAR), inside,
            tcp_flags=frames.SYN,
        ),
        Case("tc_from_outside", NEW_ELSEWHERE, 0, asked(bed.FAR), **unproved),
        Case("tc_from_outside", "the same by least connections", 0, asked(bed.LEAST), **unproved),
        Case(
            "tc_from_outside", "new, refused: no backend, one run at a time", 0, refused,
            None if not tcp else _turned(refused),
            verdict=test_runs.REDIRECT, tcp_flags=frames.SYN, proved=tcp, singly=True,
        ),
        Case(test_runs.nothing("tc"), NOTHING_SINGLY, 0, asked(bed.DSR), proved=False, singly=True),
        Case(
            "tc_from_outside", f"new, to another node by DSR, {NO_STATE}", 0, asked(bed.DSR),
            verdict=test_runs.REDIRECT, tcp_flags=frames.SYN, proved=False, singly=True,
        ),
        Case(
            "xdp_from_outside", "new: left to tc", 0, asked(bed.FAR), verdict=test_runs.XDP_PASS,
            tcp_flags=frames.SYN,
        ),
    ]  # fmt: skip
    return Set(family, proto, tuple(cases))


# --- ports ---


def ports(at: bed.Bed, family: int, rounds: int) -> results.Ports:
    """Measure masqueraded flows to one address while more and more of its ports are taken."""
    talk, rows = talks.hold(at, bed.ONE, family, frames.TCP)
    answers = talk.backend, talk.masquerade
    [(key, row)] = [(key, row) for key, row in rows.items() if (key.src, key.dst) == answers]
    frame = at.frame("up0", talk.asked(0), frames.TCP, frames.SYN)
    reached = _until_exhausted(at, talk, frame)
    found: dict[float, list[results.Filled]] = {share: [] for share in FILLS}
    chosen = random.Random(1)
    for _ in range(rounds):
        for share in FILLS:
            at.forget_flows()
            taken = chosen.sample(range(bed.PORTS.first, bed.PORTS.first + bed.PORTS.size),
                                  int(share * bed.PORTS.size))  # fmt: skip
            if taken:
                _take(at, key, row, taken)
            before = at.counters()["PORTS_EXHAUSTED"]
            _, ns = at.repeat("tc_from_outside", "up0", frame, talk.asked, 0, _TIMES_FILLED)
            refused = at.counters()["PORTS_EXHAUSTED"] - before
            found[share].append(results.Filled(ns, refused / _TIMES_FILLED))
    at.forget_flows()
    return results.Ports(
        family, bed.PORTS.size, reached, {f"{share:g}": each for share, each in found.items()}
    )


def _until_exhausted(at: bed.Bed, talk: talks.Talk, frame: bytes) -> int:
    """Return how many flows there were when one was refused first, to within 16."""
    at.forget_flows()
    before = at.counters()["PORTS_EXHAUSTED"]
    opened = 0

    def asked(number: int) -> frames.Ends:
        return talk.asked(number + opened)

    while at.counters()["PORTS_EXHAUSTED"] == before and opened < bed.PORTS.size:
        now = at.frame("up0", asked(0), frames.TCP, frames.SYN)
        at.repeat("tc_from_outside", "up0", now, asked, 0, 16)
        opened += 16
    return opened


def _take(at: bed.Bed, key: typing.Any, row: typing.Any, taken: collections.abc.Sequence[int]) -> None:
    """Have other clients own these ports."""
    of_port = talks.columns([talks.word(key.dst)] * len(taken), taken)
    clients = talks.columns(
        [0x0B000000 + number for number in range(len(taken))], [talks.FIRST_PORT] * len(taken)
    )
    became = {
        (key.dst, int.from_bytes(key.dport, "big")): of_port,
        (row.addr, int.from_bytes(row.dport, "big")): clients,
    }
    made = talks.copy(key, row, became, len(taken))
    at.put_flows(made.keys, bytes(made.rows), len(taken))
