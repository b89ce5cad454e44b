"""Judges the kernel, the rights of the process, and the programs."""

from collections.abc import Iterator

from lbproxy.core.preflight import facts, findings

_NEEDED = ("CAP_NET_ADMIN", "CAP_BPF")
_NEWER = "use Linux 6.6 or newer"


def judge(known: facts.Facts) -> Iterator[findings.Finding]:
    """Say what is to be said of them."""
    yield from _process(known)
    yield from _kernel(known)
    yield _programs(known.programs)


def _process(known: facts.Facts) -> Iterator[findings.Finding]:
    process = known.process
    held = process.capabilities
    missing = [name for name in _NEEDED if name not in held and "CAP_SYS_ADMIN" not in held]
    if process.own_users:
        yield findings.blocks(
            "capabilities",
            "this process is in a user namespace of its own: what it has there counts for nothing with BPF",
            "run it as the node's root; in a pod with hostUsers: true",
        )
    elif missing:
        yield findings.blocks(
            "capabilities",
            f"lacks {' and '.join(missing)}",
            "run as root, or give the container these capabilities",
        )
    elif "CAP_SYS_ADMIN" not in held:
        lacking = [name for name in ("CAP_PERFMON", "CAP_SYS_ADMIN") if name not in held]
        yield findings.warning(
            "capabilities",
            f"lacks {' and '.join(lacking)}",
            "CAP_PERFMON is for loading programs, CAP_SYS_ADMIN for mounting the bpffs and entering pods' "
            "network namespaces: without it UDP sockets of backends that are gone stay open, and "
            "loadBalancerSourceRanges let no pod in",
        )
    else:
        yield findings.ok("capabilities", "all that are needed")
    if process.host_network is False:
        yield findings.warning(
            "namespaces",
            "this network namespace is not the node's: devices and ports are looked at, and would be served, "
            "in this one",
            "in a pod, set hostNetwork: true",
        )
    elif not process.host_processes:
        yield findings.warning(
            "namespaces",
            "the node's processes are not seen from here: a kube-proxy or another agent goes unseen",
            "in a pod, set hostPID: true; the agent needs it too, or /run/netns, to enter pods' network "
            "namespaces",
        )
    elif process.host_network is None:
        yield findings.ok(
            "namespaces", "the node's processes are seen; whether this is its network is not told"
        )
    else:
        yield findings.ok("namespaces", "the node's own")


def _kernel(known: facts.Facts) -> Iterator[findings.Finding]:
    kernel = known.kernel
    yield findings.ok("kernel", f"Linux {kernel.release}, {kernel.machine}")
    unasked = sum(1 for feature in kernel.features if feature.found is None)
    if unasked:
        yield findings.warning(
            "kernel features",
            f"{unasked} could not be asked for",
            "run this with the rights that the agent is to have",
        )
    for feature in kernel.features:
        check = f"kernel: {feature.what}"
        if feature.found:
            yield findings.ok(check, "there")
        elif feature.found is False:
            yield findings.blocks(
                check, f"lacking: exists since Linux {feature.since}", _NEWER, unsupported=True
            )
    yield _tcx(known)
    if kernel.jit is False:
        yield findings.warning(
            "kernel: BPF JIT", "switched off: programs are interpreted", "sysctl net.core.bpf_jit_enable=1"
        )
    elif kernel.jit:
        yield findings.ok("kernel: BPF JIT", "on")
    yield findings.ok("kernel: BTF", f"{'there' if kernel.btf else 'not there'}, and not needed")


def _tcx(known: facts.Facts) -> findings.Finding:
    check = "kernel: TCX, for packets from outside"
    if not known.wanted.packet_path:
        return findings.ok(check, "not needed: --packet-path=false")
    if known.kernel.tcx is None:
        return findings.warning(check, "could not be asked for", "run this as root")
    if known.kernel.tcx:
        return findings.ok(check, "there")
    return findings.warning(
        check,
        "lacking: exists since Linux 6.6; sockets of this node would be served, packets from elsewhere not",
        f"{_NEWER}, or keep kube-proxy beside lbproxy for what comes from outside",
    )


def _programs(programs: facts.Programs) -> findings.Finding:
    check = "programs"
    sockets = [one for one in programs.refused if not one.packet]
    if programs.refused:
        told = (sockets or programs.refused)[0]
        found = f"this kernel refuses {told.program}: {told.why}"
        if sockets:
            return findings.blocks(check, found, f"{_NEWER}; tell us of this one")
        return findings.warning(
            check, f"{found}; sockets would be served, packets from elsewhere not", f"{_NEWER}, or tell us"
        )
    if programs.adopted:
        return findings.ok(check, "this version's are pinned here already, and would be adopted")
    if programs.kept and programs.loaded:
        return findings.ok(
            check, f"compiled before; the kernel took all {programs.loaded} on trial, attached to nothing"
        )
    if programs.kept:
        return findings.ok(check, "compiled before; not tried on the kernel")
    if programs.lacks:
        return findings.blocks(
            check,
            f"nothing compiled is kept here, and to compile there is no {', '.join(programs.lacks)}",
            "apt-get install python3-bpfcc libbpf1 linux-libc-dev, and run lbproxy with /usr/bin/python3",
        )
    return findings.ok(
        check,
        "to be compiled with the first start, in some seconds and 250 MB; all that takes is there",
    )
