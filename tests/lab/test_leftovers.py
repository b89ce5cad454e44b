"""`lbproxy cleanup --kube-proxy` on the real packet filter, in network namespaces of its own."""

import pathlib
import shutil
import subprocess
import sys
import textwrap

import pytest

from lbproxy.core import leftovers

pytestmark = [
    pytest.mark.usefixtures("needs_lab"),
    pytest.mark.skipif(not (shutil.which("iptables-nft") and shutil.which("nft")), reason="needs the tools"),
]

FLAVOURS = ("iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy")
SVC, SEP = "KUBE-SVC-NPX46M4PTMTKRN6Y", "KUBE-SEP-Z3MIC2SVL7VFUQ7T"
KUBE_PROXY = f"""\
*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-PROXY-CANARY - [0:0]
COMMIT
*nat
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:{SVC} - [0:0]
:{SEP} - [0:0]
:OTHERS - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -j OTHERS
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-SERVICES -p tcp --dport 443 -j {SVC}
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A {SVC} -j {SEP}
-A {SEP} -m comment --comment "default/kubernetes:https" -j KUBE-MARK-MASQ
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
COMMIT
"""
STAYS = ["KUBE-FIREWALL", "KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY", "KUBE-KUBELET-CANARY", "OTHERS"]

SEEN = f"{sys.executable} -c 'from lbproxy import leftovers; print(leftovers.present())'"


def inside(script: str, given: str = "") -> str:
    """Run a shell script in a namespace of its own and return what it prints; never outside of one."""
    cleanup = f"cleanup() {{ {sys.executable} -m lbproxy cleanup --kube-proxy --bpffs /none; }}"
    guarded = "\n".join(("set -e", cleanup, textwrap.dedent(script)))
    done = subprocess.run(
        ["unshare", "--net", "--", "bash", "-c", guarded],
        input=given, capture_output=True, text=True, check=False, timeout=60,
        cwd=pathlib.Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def user_chains(saved: str) -> list[str]:
    return sorted(
        line[1:].split()[0] for line in saved.splitlines() if line.startswith(":") and " - " in line
    )


@pytest.mark.parametrize("tool", FLAVOURS)
def test_chains_go_whichever_tool_made_them(tool: str) -> None:
    printed = inside(
        f"""
        {tool}-restore
        cleanup
        echo ===
        {tool}-save
        """,
        KUBE_PROXY,
    )
    told, saved = printed.split("===\n")
    assert f"removed what kube-proxy left: {tool}: 10 chains and 4 rules that lead to them" in told
    assert user_chains(saved) == STAYS
    rules = [line for line in saved.splitlines() if line.startswith("-A")]
    assert rules == ["-A PREROUTING -j OTHERS", "-A INPUT -j KUBE-FIREWALL"] or rules == [
        "-A INPUT -j KUBE-FIREWALL",
        "-A PREROUTING -j OTHERS",
    ]


def test_tables_of_its_nftables_mode_go_and_others_stay() -> None:
    printed = inside(
        """
        for family in ip ip6; do
          nft add table $family kube-proxy
          nft add chain $family kube-proxy services
        done
        nft add table inet mine
        cleanup
        echo ===
        nft list tables
        """
    )
    told, tables = printed.split("===\n")
    assert "removed what kube-proxy left: nftables: table ip6 kube-proxy" in told
    assert tables == "table inet mine\n"


@pytest.mark.parametrize(
    ("tool", "family"),
    [
        ("iptables-nft", "inet"),
        ("ip6tables-nft", "inet6"),
        ("iptables-legacy", "inet"),
        ("ip6tables-legacy", "inet6"),
    ],
)
def test_what_its_ipvs_mode_left_goes(tool: str, family: str) -> None:
    # There is no canary in this mode.
    printed = inside(
        f"""
        ip link add kube-ipvs0 type veth peer name other
        ipset create KUBE-CLUSTER-IP hash:ip,port family {family}
        ipset create KUBE-LOOP-BACK hash:ip,port,ip family {family}
        ipset create mine hash:ip
        {tool} -t nat -N KUBE-SERVICES
        {tool} -t nat -A OUTPUT -j KUBE-SERVICES
        {tool} -t nat -A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT
        {SEEN}
        cleanup
        echo ===
        ip -o link
        {tool}-save -t nat
        ipset list -n
        """
    )
    told, left = printed.split("===\n")
    assert f"['{tool} chains', 'IPVS device kube-ipvs0']\n" in told
    assert "removed what kube-proxy left: IPVS: device kube-ipvs0" in told
    assert "removed what kube-proxy left: ipset: 2 sets" in told
    assert "kube-ipvs0" not in left
    assert "KUBE-" not in left
    assert left.endswith("mine\n")


@pytest.mark.parametrize("tool", FLAVOURS)
def test_what_others_have_of_it_stays_and_works(tool: str) -> None:
    """A CNI's host ports mark with KUBE-MARK-MASQ; a user has a rule of their own for that."""
    printed = inside(
        f"""
        {tool}-restore
        {tool} -t nat -N CNI-HOSTPORT-SETMARK
        {tool} -t nat -A CNI-HOSTPORT-SETMARK -j KUBE-MARK-MASQ
        {tool} -t nat -A PREROUTING -p udp -j KUBE-MARK-MASQ
        cleanup
        cleanup
        echo ===
        {SEEN}
        {tool}-save -t nat
        """,
        KUBE_PROXY,
    )
    told, saved = printed.split("===\n")
    assert f"removed what kube-proxy left: {tool}: 8 chains and 3 rules that lead to them" in told
    kept = "KUBE-MARK-MASQ, KUBE-POSTROUTING, since rules in CNI-HOSTPORT-SETMARK, PREROUTING use that"
    assert told.count(f"left alone: {tool}, table nat: {kept}\n") == 2
    assert "kube-proxy has left nothing else" in told
    assert saved.startswith("[]\n")
    assert user_chains(saved) == [
        "CNI-HOSTPORT-SETMARK", "KUBE-KUBELET-CANARY", "KUBE-MARK-MASQ", "KUBE-POSTROUTING", "OTHERS",
    ]  # fmt: skip
    assert "-A POSTROUTING -m comment --comment" in saved
    assert "-A PREROUTING -p udp -j KUBE-MARK-MASQ" in saved


def test_a_node_that_never_had_kube_proxy_is_left_as_it_is() -> None:
    printed = inside(
        """
        cleanup
        echo ===
        nft list tables
        """
    )
    assert printed.split("===\n") == [
        "nothing to remove: there is nothing at /none\nnothing to remove: kube-proxy has left nothing\n",
        "",
    ]


def test_tools_that_are_missing_are_no_failure() -> None:
    assert "kube-proxy has left nothing" in inside("PATH=/none; cleanup")


def test_what_needs_a_tool_that_is_missing_is_told_and_fails() -> None:
    printed = inside(
        """
        iptables-legacy-restore
        PATH=/none; cleanup 2>&1 || echo status $?
        """,
        KUBE_PROXY,
    )
    (line,) = [line for line in printed.splitlines() if "iptables-legacy" in line]
    assert line.startswith(
        "lbproxy: error: kube-proxy's rules of iptables-legacy stay, and a Service that is"
    )
    assert line.endswith(f"since iptables-legacy-restore can not be found here: {leftovers.BY_HAND}")
    assert printed.endswith("\nstatus 1\n")


@pytest.mark.parametrize("used_by_others", [False, True])
def test_what_the_docs_have_for_rules_of_old_takes_them_away_and_nothing_else(
    tmp_path: pathlib.Path, used_by_others: bool
) -> None:
    page = (pathlib.Path(__file__).parents[2] / "docs" / "migration.md").read_text()
    section = page.partition("## Rules in iptables-legacy\n")[2].partition("\n## ")[0]
    script = section.partition("```sh\n")[2].partition("```")[0]
    undo = section.partition("`iptables-legacy-restore ")[2].partition("`")[0]
    if used_by_others:
        script = script.replace("MARK-MASQ|POSTROUTING|", "")
    printed = inside(
        f"""
        iptables-legacy-restore
        iptables-legacy-save | sed 's,127.0.0.1,::1,' | ip6tables-legacy-restore
        {"iptables-legacy -t nat -A OTHERS -j KUBE-MARK-MASQ" if used_by_others else ""}
        cd {tmp_path}
        """
        + script
        + f"""
        {SEEN}
        echo ===
        iptables-legacy-save
        echo ===
        iptables-legacy-restore {undo}
        {SEEN}
        """,
        KUBE_PROXY,
    )
    seen, saved, undone = printed.split("===\n")
    # Of IPv6 nobody uses anything: there what stays of it leads nowhere, and is seen.
    assert seen == ("['ip6tables-legacy chains']\n" if used_by_others else "[]\n")
    marks = ["KUBE-MARK-MASQ", "KUBE-POSTROUTING"] if used_by_others else []
    assert sorted(user_chains(saved)) == sorted([*STAYS, *marks])
    assert "-A PREROUTING -j OTHERS" in saved
    assert ("-A OTHERS -j KUBE-MARK-MASQ" in saved) == used_by_others
    assert "'iptables-legacy chains'" in undone


def test_a_plain_tool_is_taken_where_it_is_of_old_and_not_where_it_is_of_nf_tables(
    tmp_path: pathlib.Path,
) -> None:
    for flavour in ("nft", "legacy"):
        (tmp_path / flavour).mkdir()
        for what in ("save", "restore"):
            found = shutil.which(f"iptables-{flavour}-{what}")
            assert found is not None
            (tmp_path / flavour / f"iptables-{what}").symlink_to(found)
    printed = inside(
        f"""
        iptables-legacy-restore
        (PATH={tmp_path}/nft; cleanup 2>&1 || echo status $?)
        echo ===
        (PATH={tmp_path}/legacy; cleanup)
        iptables-legacy-save
        """,
        KUBE_PROXY,
    )
    without, gone = printed.split("===\n")
    assert "kube-proxy's rules of iptables-legacy stay" in without
    assert without.endswith("\nstatus 1\n")
    assert "left nothing" not in without
    assert "removed what kube-proxy left: iptables: 10 chains and 4 rules that lead to them" in gone
    assert user_chains(gone.partition("#")[2]) == STAYS


def test_what_can_not_be_removed_is_told_and_fails() -> None:
    # Somebody's map leads to a chain of kube-proxy's: the kernel keeps it, and so all of the table.
    printed = inside(
        """
        iptables-nft-restore
        nft add map ip nat theirs '{ type inet_service : verdict; }'
        nft add element ip nat theirs '{ 80 : jump KUBE-SERVICES }'
        cleanup 2>&1 || echo status $?
        iptables-nft-save -t nat
        """,
        KUBE_PROXY,
    )
    why = "a map or rule of somebody else leads to a chain of kube-proxy's, so all of it stays"
    assert f"lbproxy: error: iptables-nft, table nat: {why} (Device or resource busy)\nstatus 1\n" in printed
    assert '-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES' in printed


def test_many_chains_go_at_once_and_without_a_tool() -> None:
    printed = inside(
        """
        { echo '*nat'; echo ':KUBE-SERVICES - [0:0]'; echo '-A OUTPUT -j KUBE-SERVICES'
          seq 10000 13999 | tr 0-9 A-J | sed 's/.*/:KUBE-SVC-ABCDEFGHIJK& - [0:0]/'
          echo COMMIT; } | iptables-nft-restore
        (PATH=/none; cleanup)
        iptables-nft-save | grep -c KUBE || true
        """
    )
    assert "iptables-nft: 4001 chains and 1 rules that lead to them" in printed
    assert printed.endswith("\n0\n")


def test_it_is_seen_that_kube_proxy_was_here() -> None:
    printed = inside(
        f"""
        {SEEN}
        iptables-legacy-restore
        nft add table ip6 kube-proxy
        {SEEN}
        """,
        KUBE_PROXY,
    )
    assert printed.splitlines() == ["[]", "['iptables-legacy chains', 'nftables table ip6 kube-proxy']"]


@pytest.mark.parametrize("tool", FLAVOURS)
def test_rules_that_serve_are_told_from_rules_that_are_only_there(tool: str) -> None:
    asks = f"{sys.executable} -c 'from lbproxy import leftovers; print(bool(leftovers.serving()))'"
    printed = inside(
        f"""
        ip link add kube-ipvs0 type veth peer name other
        {asks}
        {tool}-restore
        {asks}
        {tool} -t nat -D PREROUTING 1
        {tool} -t nat -D OUTPUT 1
        {asks}
        """,
        KUBE_PROXY,
    )
    assert printed.splitlines() == ["False", "True", "False"]


@pytest.mark.parametrize(("family", "tool"), [("AF_INET", "iptables"), ("AF_INET6", "ip6tables")])
def test_tables_of_old_are_read_as_their_tool_prints_them(family: str, tool: str) -> None:
    script = (
        "import socket; from lbproxy.kernel import legacy_tables; "
        f'nat = legacy_tables.read(socket.{family}, "nat"); '
        "print(sorted(nat.chains.items())); [print(one.chain, one.target) for one in nat.jumps]"
    )
    printed = inside(
        f"""
        {tool}-legacy-restore
        {sys.executable} -c '{script}'
        echo ===
        {tool}-legacy-save -t nat
        """,
        KUBE_PROXY,
    )
    (chains, *jumps), saved = (part.splitlines() for part in printed.split("===\n"))
    heads = [line[1:].split()[:2] for line in saved if line.startswith(":")]
    assert chains == str(sorted((name, policy != "-") for name, policy in heads))
    leads = [line.split() for line in saved if line.startswith("-A") and "-j MARK" not in line]
    assert sorted(jumps) == sorted(f"{words[1]} {words[-1]}" for words in leads)
