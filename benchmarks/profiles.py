"""How much a run measures, by the name of a profile."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """How much to measure."""

    name: str
    services: tuple[int, ...]
    short_rounds: int
    short_s: float
    other_rounds: int
    other_s: float
    everywhere: (
        bool  # all kinds of traffic, churn and CPU time at every number of services, not only large ones
    )
    starts: int  # of each kind, at the large numbers of services; 0: only the one that is needed
    changes: int
    cpu_s: float
    packet_rounds: int
    packet_services: int  # that share the tables
    maglev_repeats: int
    balancing_rounds: int  # with one slow backend, of two seconds for each algorithm
    outside_rounds: int  # of connections to NodePorts, at the least and the greatest number of services
    outside_s: float
    takes: str = ""  # on 2 CPUs: Makefile and docs/benchmarks.md say the same


QUICK = Profile(
    name="quick",
    takes="about 9 minutes, 14 with a real kube-proxy",
    services=(1, 1_000, 10_000),
    short_rounds=16,
    short_s=0.2,
    other_rounds=8,
    other_s=0.15,
    everywhere=False,
    starts=2,
    changes=30,
    cpu_s=7.0,
    packet_rounds=5,
    packet_services=10_000,
    maglev_repeats=5,
    balancing_rounds=3,
    outside_rounds=8,
    outside_s=0.15,
)
FULL = Profile(
    name="full",
    takes="about 50 minutes",
    services=(1, 100, 1_000, 5_000, 10_000, 30_000),
    short_rounds=24,
    short_s=0.3,
    other_rounds=8,
    other_s=0.25,
    everywhere=True,
    starts=5,
    changes=60,
    cpu_s=20.0,
    packet_rounds=15,
    packet_services=30_000,
    maglev_repeats=21,
    balancing_rounds=9,
    outside_rounds=12,
    outside_s=0.3,
)
# Shows that everything works; its figures mean nothing.
SMOKE = Profile(
    name="smoke",
    takes="about three minutes",
    services=(1, 200),
    short_rounds=2,
    short_s=0.2,
    other_rounds=2,
    other_s=0.2,
    everywhere=False,
    starts=1,
    changes=5,
    cpu_s=2.0,
    packet_rounds=2,
    packet_services=200,
    maglev_repeats=1,
    balancing_rounds=1,
    outside_rounds=2,
    outside_s=0.2,
)
PROFILES = {profile.name: profile for profile in (QUICK, FULL, SMOKE)}
