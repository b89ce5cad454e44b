"""Whether this kernel can do what the programs need; asked before anything is loaded."""

import typing

from lbproxy import errors
from lbproxy.kernel import libbpf, trials

_CAPABILITIES: typing.Final = {12: "CAP_NET_ADMIN", 39: "CAP_BPF"}
_CAP_SYS_ADMIN: typing.Final = 21


class Feature(typing.NamedTuple):
    """Something the kernel must have: a program type, or a helper that it may call."""

    what: str
    since: str
    prog_type: int
    helper: int | None


_ADDR = libbpf.PROG_TYPE_CGROUP_SOCK_ADDR
_SOCK = libbpf.PROG_TYPE_CGROUP_SOCK
FEATURES: typing.Final = (
    Feature("cgroup socket address programs", "4.17", _ADDR, None),
    Feature("cgroup socket programs", "4.10", _SOCK, None),
    Feature("bpf_get_netns_cookie for socket address programs", "5.7", _ADDR, 122),
    Feature(
        "bpf_sock_ops_cb_flags_set, so that failed connections are seen",
        "4.16",
        libbpf.PROG_TYPE_SOCK_OPS,
        59,
    ),
    Feature("bpf_ktime_get_coarse_ns", "5.11", _ADDR, 160),
    Feature("bpf_set_retval, so that a connect can be refused", "5.18", _ADDR, 187),
)


def has_tcx() -> bool:
    """Whether programs can be attached to devices through links: since Linux 6.6."""
    return trials.device_hook(libbpf.TCX_INGRESS)


def effective_capabilities() -> int:
    """The bits of what this process may do."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))


def check_capabilities() -> None:
    """Raise AgentError where the process may not load and attach programs."""
    effective = effective_capabilities()
    if effective >> _CAP_SYS_ADMIN & 1:
        return
    missing = [name for bit, name in _CAPABILITIES.items() if not effective >> bit & 1]
    if missing:
        raise errors.AgentError(
            f"lacks {' and '.join(missing)}: run as root, or give the container these capabilities"
        )


def check(
    probe_type: typing.Callable[[int], bool | None] = trials.prog_type,
    probe_helper: typing.Callable[[int, int], bool | None] = trials.helper,
) -> None:
    """Raise UnsupportedKernel for the first feature that this kernel surely lacks.

    A probe that gives no answer (None) decides nothing: loading the programs will tell.
    """
    for feature in FEATURES:
        if feature.helper is None:
            found = probe_type(feature.prog_type)
        else:
            found = probe_helper(feature.prog_type, feature.helper)
        if found is False:
            raise errors.UnsupportedKernel(feature.what, feature.since, "use a newer kernel")
