"""Judges where lbproxy would live: cgroup, bpffs, memory, ports."""

from collections.abc import Iterator

from lbproxy.core.preflight import facts, findings

_MIB = 1 << 20
_FEW_FILES = 512


def judge(known: facts.Facts) -> Iterator[findings.Finding]:
    """Say what is to be said of them."""
    for note in known.wanted.notes:
        yield findings.warning("configuration", note, "see docs/configuration.md")
    yield _cgroup(known)
    yield from _bpffs(known)
    yield from _memory(known)
    for listener in known.listeners:
        yield _listener(listener, known.wanted)


def _cgroup(known: facts.Facts) -> findings.Finding:
    check, cgroup = "cgroup v2", known.cgroup
    if cgroup.problem:
        return findings.blocks(
            check,
            cgroup.problem,
            "mount it (mount -t cgroup2 none /sys/fs/cgroup/unified), in a pod as a hostPath, or name a "
            "folder of it with --cgroup",
        )
    if not known.wanted.cgroup_named and not cgroup.is_root:
        return findings.blocks(
            check,
            f"{cgroup.path} is a container's part of the hierarchy: only its own processes would be served",
            "mount the node's (hostPath /sys/fs/cgroup) and name it with --cgroup",
        )
    beside = "; cgroup v1 is mounted beside it, which does not matter" if cgroup.hybrid else ""
    if not cgroup.is_root:
        return findings.ok(check, f"{cgroup.path}: only the processes in it would be served{beside}")
    return findings.ok(check, f"{cgroup.path}{beside}")


def _bpffs(known: facts.Facts) -> Iterator[findings.Finding]:
    check, bpffs = "bpffs", known.bpffs
    if bpffs.problem:
        yield findings.blocks(check, f"{bpffs.path}: {bpffs.problem}", "name another place with --bpffs")
        return
    if bpffs.mounted:
        yield findings.ok(check, f"{bpffs.path} lies on one")
    elif "CAP_SYS_ADMIN" not in known.process.capabilities:
        yield findings.blocks(
            check,
            f"none at {bpffs.path}, and mounting one needs CAP_SYS_ADMIN",
            "mount it (mount -t bpf bpf /sys/fs/bpf), or run `lbproxy run --init-only` as root before",
        )
    elif known.process.container:
        yield findings.warning(
            check,
            f"none at {bpffs.path}: one that a container mounts may end with it, and balancing with that",
            "mount it on the node (mount -t bpf bpf /sys/fs/bpf) and give the pod the hostPath /sys/fs/bpf",
        )
    else:
        yield findings.ok(check, f"none at {bpffs.path}: the first start mounts one")
    if bpffs.agent_running:
        pid = f" (pid {bpffs.agent_pid})" if bpffs.agent_pid else ""
        yield findings.blocks(
            "lbproxy here",
            f"an lbproxy agent{pid} runs on {bpffs.path}: a second one there would not start",
            "lbproxy status tells how it does; stop it to replace it, or give the new one its own --bpffs",
        )
    elif bpffs.version:
        yield findings.ok(
            "lbproxy here",
            f"the datapath of lbproxy {bpffs.version} is at {bpffs.path}: a start takes it over, and it "
            "serves meanwhile",
        )


def _memory(known: facts.Facts) -> Iterator[findings.Finding]:
    memory = known.memory
    lasting = memory.maps + memory.agent
    at_first = lasting + memory.compiler
    room = min((one for one in (memory.available, memory.limit) if one is not None), default=None)
    needs = f"needs {_mib(lasting)}: {_mib(memory.maps)} of maps, {_mib(memory.agent)} for the agent"
    needs += f"; {_mib(memory.compiler)} more while it compiles" if memory.compiler else ""
    if room is None:
        yield findings.warning("memory", f"{needs}; how much there is could not be found out", "see free -m")
    elif room < at_first:
        whose = "the memory limit of this cgroup leaves" if room == memory.limit else "the node has"
        yield findings.blocks(
            "memory",
            f"{needs}; {whose} {_mib(room)}",
            "give it more, or smaller tables: --map-rows (maps are charged to the agent's container)",
        )
    else:
        yield findings.ok("memory", f"{needs}; there are {_mib(room)}")
    if known.process.open_files < _FEW_FILES:
        yield findings.warning(
            "open files",
            f"at most {known.process.open_files}",
            "ulimit -n 1024: each health check node port takes one, and each map",
        )
    else:
        yield findings.ok(
            "open files", f"up to {known.process.open_files}; BPF has no limit of locked memory"
        )


def _mib(count: int) -> str:
    return f"{count / _MIB:.0f} MiB"


def _listener(listener: facts.Listener, wanted: facts.Wanted) -> findings.Finding:
    check = f"port: {listener.what}"
    if not listener.taken:
        return findings.ok(check, f"{listener.address} is free")
    who = f"{listener.command} (pid {listener.pid})" if listener.command else "another process"
    todo = f"end that, or choose another address with {listener.flag}"
    if listener.command == "kube-proxy":
        todo = f"it is free once kube-proxy is gone; to run beside it, {listener.flag} with another port"
    if wanted.hard_fail:
        return findings.blocks(check, f"{listener.address} is taken by {who}: the agent would end", todo)
    return findings.warning(
        check, f"{listener.address} is taken by {who}: the agent tries again until it is free", todo
    )
