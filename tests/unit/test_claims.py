import itertools

from hypothesis import given
from hypothesis import strategies as st

from lbproxy.core import claims, model

PORTS = [
    model.PortKey(model.ServiceName("default", name), "", model.Protocol.TCP, model.Family.IPV4)
    for name in ("a", "b", "c", "d")
]
KEY = b"frontend"


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(PORTS)), max_size=30))
def test_the_first_in_name_order_of_those_who_claim_has_it(steps: list[tuple[bool, model.PortKey]]) -> None:
    known, claiming = claims.Claims(), set[model.PortKey]()
    for claims_it, port in steps:
        before = known.owner(KEY)
        if claims_it:
            claiming.add(port)
            assert known.claim(KEY, port) == (min(claiming) == port)
        elif port in claiming:
            claiming.discard(port)
            assert known.release(KEY, port) == (before == port, min(claiming, default=None))
        assert known.owner(KEY) == min(claiming, default=None)
        assert (KEY in known, len(known)) == (bool(claiming), min(len(claiming), 1))
        assert known.contested == ({KEY: claiming} if len(claiming) > 1 else {})


def test_every_order_of_coming_ends_with_the_same_owner() -> None:
    for order in itertools.permutations(PORTS):
        known = claims.Claims()
        for port in order:
            known.claim(KEY, port)
        assert known.owner(KEY) == PORTS[0]


def test_a_second_claim_changes_nothing() -> None:
    known = claims.Claims()
    assert known.claim(KEY, PORTS[0])
    assert known.claim(KEY, PORTS[0])
    assert not known.contested


def test_releasing_what_one_never_had_tells_who_has_it() -> None:
    known = claims.Claims()
    assert known.release(KEY, PORTS[1]) == (False, None)
    known.claim(KEY, PORTS[0])
    assert known.release(KEY, PORTS[1]) == (False, PORTS[0])
