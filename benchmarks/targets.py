"""What lbproxy has to reach, as design.md section 5 states it."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A bound for a measured value, in that value's unit."""

    bound: float
    at_least: bool
    unit: str = ""

    def missed_by(self, value: float) -> float:
        """Return how far a value is on the wrong side, 0 where it is met."""
        return max(0.0, self.bound - value if self.at_least else value - self.bound)

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}{unit}"


SHORT = Target(0.97, at_least=True)
DIRECT = Target(0.99, at_least=True)
ESTABLISHED = Target(0.99, at_least=True)
PROGRAMMING_P50 = Target(3, at_least=False, unit="ms")
PROGRAMMING_P99 = Target(15, at_least=False, unit="ms")
START = {10_000: Target(2, at_least=False, unit="s"), 30_000: Target(6, at_least=False, unit="s")}
AGENT_MEMORY = Target(80, at_least=False, unit="MB")
BPF_MEMORY = Target(40, at_least=False, unit="MB")
MEMORY_SERVICES = 10_000  # up to which both are meant
CPU = Target(1, at_least=False, unit="%")
PACKET = Target(45, at_least=False, unit="ns")
PACKET_OF_MANY = Target(250, at_least=False, unit="ns")
PACKET_NEW = Target(150, at_least=False, unit="ns")
FAILED = Target(0, at_least=False)


def node_port(services: int) -> Target | None:
    """Return what a NodePort's rate from outside has to be ÷ that of kube-proxy's iptables mode."""
    if services == 1:
        return Target(1.2, at_least=True)
    return Target(2, at_least=True) if services >= 10_000 else None
