"""At the port of a bridge answers to masqueraded clients are translated, and nothing else."""

from tests.packets.bench import NEXT, Bench
from tests.packets.packets import ACK, SYN, Side, frame, ip, tcp


def test_an_answer_is_for_the_client_before_the_bridge_has_it(lb: Bench, side: Side) -> None:
    lb.service(side.pod)
    lb.outside(frame(ip(side.client, side.external_ip, tcp(40000, 80, SYN))))
    [port] = [key.dport for key, row in lb.flows().items() if not key.stage and not row.state & 1]
    answer = frame(ip(side.pod, side.node_to_pods, tcp(8080, int.from_bytes(port, "big"), SYN | ACK)))
    at_port = lb.made.run("tc_from_port", answer, "pod0")
    assert at_port.verdict == NEXT
    # The same as the bridge's own device would make of it; and that leaves alone what it gets then.
    assert at_port == lb.made.run("tc_from_inside", answer, "pod0")
    assert at_port.frame != answer
    assert lb.made.run("tc_from_inside", at_port.frame, "pod0") == at_port


def test_nothing_is_begun_there(lb: Bench, side: Side) -> None:
    lb.service(side.pod)
    for to, port in ((side.cluster_ip, 80), (side.node_to_pods, 30080), (side.other_client, 80)):
        given = frame(ip(side.pod, to, tcp(40000, port, SYN)))
        assert lb.made.run("tc_from_port", given, "pod0") == (NEXT, given)
    assert lb.flows() == {}
    assert lb.made.counted() == {}
