"""A made-up run of the benchmarks with three contestants, as the harness would write it."""

from benchmarks import results

SIZES = (1, 1_000, 10_000)
# Rate ÷ bare by size, of short connections through a service.
SERVICE = {"lbproxy": (0.975, 0.98, 0.95), "iptables": (0.81, 0.68, 0.5), "nftables": (0.83, 0.86, 0.85)}
DIRECT = {"lbproxy": (0.995, 0.995, 0.985), "iptables": (0.82, 0.63, 0.25), "nftables": (0.87, 0.93, 0.87)}
OTHERS = ("iptables", "nftables")
_ALIKE = ("bare", "bare/again", "lbproxy/direct", "iptables/direct", "nftables/direct")
_WOBBLE = (0.0, 0.01, -0.01, 0.005, -0.005, 0.002, -0.002, 0.0)


def run(rate: float, failed: int = 0) -> results.Run:
    """Return a run in which a request takes as long as this rate says."""
    failures = {"ECONNREFUSED": failed} if failed else {}
    return results.Run(rate, 0.9e6 / rate, 3e6 / rate, 1e6 / rate, 0.08, int(rate), failed, failures)


def rounds(speeds: dict[str, float], bare: float = 30_000.0, noise: float = 1.0) -> list[results.Round]:
    """Return rounds in which each variant has about this share of the bare rate, each a little otherwise."""
    made = []
    for number in range(len(_WOBBLE)):
        runs = {}
        for place, (variant, speed) in enumerate(speeds.items()):
            wobble = noise * _WOBBLE[(number + place) % len(_WOBBLE)]
            runs[variant] = run(bare * speed * (1 + wobble))
        made.append(results.Round(runs))
    return made


def short(services: int, place: int) -> results.Traffic:
    """Return short connections at one number of services."""
    speeds = {"bare": 1.0, "bare/again": 1.0}
    for name in SERVICE:
        speeds[f"{name}/service"] = SERVICE[name][place]
        speeds[f"{name}/direct"] = DIRECT[name][place]
    return results.Traffic(services, "pod", "short", 0.3, rounds(speeds))


def other(path: str, mode: str) -> results.Traffic:
    """Return another kind of traffic at the greatest number of services."""
    speeds = {"bare": 1.0, "bare/again": 1.0, "lbproxy/service": 1.0, "lbproxy/direct": 1.0}
    speeds |= {"iptables/service": 0.83, "iptables/direct": 0.85}
    speeds |= {"nftables/service": 0.88, "nftables/direct": 0.9}
    bare = 2_500.0 if mode == "bulk" else 40_000.0
    return results.Traffic(SIZES[-1], path, mode, 0.2, rounds(speeds, bare))


def outside(services: int, iptables: float) -> results.Traffic:
    """Return connections to NodePorts."""
    speeds = {
        "bare": 1.0,
        "bare/again": 1.0,
        "bare/elsewhere": 0.9,
        "lbproxy/local": 0.9,
        "lbproxy/masqueraded": 0.88,
        "lbproxy/remote": 0.7,
        "lbproxy/dsr": 0.75,
        **{f"iptables/{way}": iptables for way in ("local", "masqueraded", "remote")},
        **{f"nftables/{way}": 0.6 for way in ("local", "masqueraded", "remote")},
    }
    return results.Traffic(services, "outside", "short", 0.2, rounds(speeds, 9_000.0))


def start(name: str, services: int, how: str, synced_s: float) -> results.Start:
    """Return a start without failures."""
    return results.Start(name, services, how, synced_s, synced_s * 1.1, 0, 4_000, ["ready"])


def memory(name: str, services: int) -> results.Memory:
    """Return what somebody occupies; of generated rules there is no agent."""
    if name in OTHERS:
        return results.Memory(name, services, 0, 0, 0, 0, None, {}, 0, 1_000_000 + 9_000 * services)
    maps = {"services": 18_000_000 + 300 * services, "flows": 16_000_000}
    rss = 54_000_000 + 2_900 * services
    return results.Memory(
        name, services, rss, rss - 15_000_000, 0, rss + 8_000_000, 132_000_000, maps, 278_528
    )


def made() -> results.Results:
    """Return the run."""
    greatest = SIZES[-1]
    waits = {"lbproxy": (2.0, 0.02), "iptables": (90.0, 3.0), "nftables": (300.0, 12.0)}
    return results.Results(
        profile="quick",
        started="2026-01-02T03:04:05+00:00",
        machine={
            "cpu": "A made-up CPU", "cpus": "2", "memory": "4 GB", "virtual": "yes", "kernel": "6.18.1",
            "architecture": "x86_64",
        },
        software={
            "commit": "0123456789abcdef", "dirty": "false", "python": "3.11.2", "compiler": "gcc 12.2.0",
        },
        settings={"cpu_of_clients_and_servers": 1, "endpoints_per_service": 4},
        took_s=350.0,
        complete=True,
        noise=results.Noise(0.1, 0.001),
        contestants=[
            results.Contestant("lbproxy", "lbproxy", True, {"version": "0.1.0"}),
            *(
                results.Contestant(
                    name,
                    f"kube-proxy's rules in {name} mode, generated ({tool}): no kube-proxy ran",
                    False,
                    {"tool": tool},
                )
                for name, tool in zip(OTHERS, ("iptables v1.8.9 (nf_tables)", "nftables v1.0.6"), strict=True)
            ),
        ],
        traffic=[
            *(short(services, place) for place, services in enumerate(SIZES)),
            *(other("pod", mode) for mode in ("established", "udp-established", "udp-new", "bulk")),
            *(other(path, "short") for path in ("remote", "node")),
            outside(1, 0.7),
            outside(greatest, 0.4),
            results.Traffic(0, "pod", "short", 0.2, rounds(dict.fromkeys(_ALIKE, 1.0))),
        ],
        programming=[
            results.Programming(
                name, services, churn, [base + step * number * services / 1_000 for number in range(30)], 0, 0
            )
            for name, (base, step) in waits.items()
            for services in SIZES
            for churn in ((0.0, 9.9) if services == greatest else (0.0,))
        ],
        stand_in=[results.StandIn(greatest, [1.0, 1.2, 1.1])],
        starts=[
            *(start("lbproxy", services, "fresh", 1.1) for services in SIZES),
            *(start("lbproxy", greatest, "fresh", 1.1 + 0.1 * number) for number in range(2)),
            start("lbproxy", greatest, "compiled", 0.9),
            *(start("lbproxy", greatest, how, 0.9) for how in ("adopted", "upgraded") for _ in range(3)),
            *(start("iptables", services, "fresh", 0.2 + services / 800) for services in SIZES),
            *(start("nftables", services, "fresh", 0.1 + services / 2_000) for services in SIZES),
        ],
        memory=[memory(name, services) for name in SERVICE for services in SIZES],
        cpu=[results.Cpu("lbproxy", greatest, rate, 20.0, 0.1 * rate) for rate in (0.0, 1.0)],
        packets=[
            results.Packets(program, what, family, protocol, flows, [level, level + 2.0, level + 1.0])
            for program, what, flows, level in (
                ("tc", "returns at once", 1, 14.0),
                ("tc_from_outside", "established, to a pod here", 1, 60.0),
                ("tc_from_outside", "established, to a pod here", 65_536, 240.0),
            )
            for family in (4, 6)
            for protocol in ("TCP", "UDP")
        ],
        others_during_packets=[0.01],
        maglev=[
            results.Maglev(16_381, 100, True, [5.0, 6.0], 1.001, 0.995, 1.003, 0.997, {1: [0.01, 0.02]}),
        ],
        balancing=[
            results.Balancing(
                name, 16, 5, 20, 8, [900.0, 910.0], [share, share], [300.0, 310.0], [p95, p95], [2e4, 2e4], 0
            )
            for name, share, p95 in (("random", 0.125, 20_300.0), ("least-connections", 0.015, 450.0))
        ],
        maglev_resized=[results.Resized(41, 16_381, 4_093, [0.974, 0.976])],
        ports=[results.Ports(4, 28_976, 26_816, {"0.9": [results.Filled(900.0, 0.0)]})],
    )  # fmt: skip
