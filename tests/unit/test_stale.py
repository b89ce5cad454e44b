"""Which sockets are to be closed, by the rows that say what they were translated to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy import abi
from lbproxy.core import addresses, stale, tables
from lbproxy.kernel import fake
from tests import serving

TCP, UDP = 6, 17
DNS, WEB = 5, 6  # service ports
PORT, BACKEND_PORT = (53).to_bytes(2, "big"), (8053).to_bytes(2, "big")
State = tables.BackendState
RECORD, SPILL_KEY = abi.LAYOUTS["socket_record"], abi.LAYOUTS["socket_spill_key"]
SERVING = (State.ACTIVE, State.TERMINATING, State.SERVING)


def ip(text: str) -> bytes:
    address = addresses.parse(text)
    assert address is not None
    return address


class Kernel(fake.FakeMaps):
    """Tables with a UDP service port and a TCP one of the same address and port."""

    def __init__(self) -> None:
        super().__init__(serving.SIZES)
        self.frontend("10.96.0.10", UDP, DNS)
        self.frontend("10.96.0.10", TCP, WEB)

    def frontend(self, address: str, proto: int, service: int, scope: int = tables.SCOPE_ADDRESS) -> None:
        key = tables.FrontendKey(ip(address), PORT, proto, scope)
        row = tables.Frontend(service, 0, 0, 0, 0, 1, 1)
        self.apply([tables.Put(tables.Table.FRONTENDS, key.pack(), row.pack())])

    def backend(
        self, number: int, address: str, state: State = State.ACTIVE, *,
        service: int = DNS, port: bytes = BACKEND_PORT, proto: int = UDP,
    ) -> None:  # fmt: skip
        row = tables.Backend(ip(address), port, proto, state, service, 0, 1, 1)
        self.apply([tables.Put(tables.Table.BACKENDS, tables.row_key(number), row.pack())])

    def record(
        self, cookie: int, backend: int, address: str, frontend: str = "10.96.0.10", *,
        spilled: int | None = None, port: bytes = BACKEND_PORT,
    ) -> None:  # fmt: skip
        row = RECORD.pack(cookie, ip(frontend), ip(address), PORT, port, backend, 0)
        if spilled is None:
            self._rows["sockets"][tables.row_key(cookie % 64)] = row
        else:
            self._rows["socket_spill"][SPILL_KEY.pack(cookie, bytes(16), bytes(2), spilled)] = row

    def stale(self) -> list[int]:
        return sorted(one.cookie for one in stale.stale(self))


def test_a_socket_whose_backend_serves_is_left_alone() -> None:
    kernel = Kernel()
    for number, state in enumerate(SERVING, 1):
        kernel.backend(number, f"10.0.0.{number}", state)
        kernel.record(100 + number, number, f"10.0.0.{number}")
    assert kernel.stale() == []


@pytest.mark.parametrize("state", [State.FREE, State.UNREADY, State.DRAINING])
@pytest.mark.parametrize("spilled", [None, abi.constant("SPILL_PEER")])
def test_a_socket_whose_backend_serves_no_longer_is_stale(state: State, spilled: int | None) -> None:
    kernel = Kernel()
    kernel.backend(1, "10.0.0.1", state)
    kernel.backend(2, "10.0.0.2")
    kernel.record(101, 1, "10.0.0.1", spilled=spilled)
    (found,) = stale.stale(kernel)
    assert (found.cookie, found.address, found.port) == (101, ip("10.0.0.1"), BACKEND_PORT)


@pytest.mark.parametrize("other", [State.FREE, State.UNREADY, State.DRAINING])
def test_where_no_other_serves_it_is_not(other: State) -> None:
    kernel = Kernel()
    kernel.backend(1, "10.0.0.1", State.DRAINING)
    kernel.backend(2, "10.0.0.2", other)
    kernel.backend(3, "10.0.0.3", service=WEB, proto=TCP)
    kernel.record(101, 1, "10.0.0.1")
    assert kernel.stale() == []


def test_an_id_that_went_to_another_backend_does_not_hide_it() -> None:
    kernel = Kernel()
    kernel.backend(1, "10.0.0.2")
    kernel.record(101, 1, "10.0.0.1")
    assert kernel.stale() == [101]


def test_a_backend_that_is_back_under_another_id_is_the_same_backend() -> None:
    kernel = Kernel()
    kernel.backend(1, "10.0.0.2")
    kernel.backend(2, "10.0.0.1")
    kernel.record(101, 1, "10.0.0.1")
    assert kernel.stale() == []


def test_another_port_of_the_same_address_is_another_backend() -> None:
    kernel = Kernel()
    kernel.backend(1, "10.0.0.1", port=(9).to_bytes(2, "big"))
    kernel.record(101, 1, "10.0.0.1")
    assert kernel.stale() == [101]


def test_a_service_that_is_gone_leaves_its_sockets() -> None:
    kernel = Kernel()
    kernel.backend(1, "10.0.0.1")
    kernel.record(101, 2, "10.0.0.2", frontend="10.96.0.99")
    assert kernel.stale() == []


@pytest.mark.parametrize(("dialled", "zero"), [("192.0.2.1", "0.0.0.0"), ("2001:db8::1", "::")])
def test_a_node_port_is_found_whatever_address_was_dialled(dialled: str, zero: str) -> None:
    kernel = Kernel()
    kernel.frontend(zero, UDP, DNS, tables.SCOPE_NODE_PORT)
    kernel.backend(1, "10.0.0.1")
    kernel.record(101, 2, "10.0.0.2", frontend=dialled)
    assert kernel.stale() == [101]


def test_what_an_unconnected_socket_has_in_the_spill_map_is_left_out() -> None:
    kernel = Kernel()
    kernel.backend(1, "10.0.0.1")
    for kind in ("SPILL_FORWARD", "SPILL_REVERSE"):
        kernel.record(101, 2, "10.0.0.2", spilled=abi.constant(kind))
    assert kernel.stale() == []


def test_a_row_that_was_given_back_is_nobodys() -> None:
    kernel = Kernel()
    kernel.backend(1, "10.0.0.1")
    kernel.record(0, 2, "10.0.0.2")
    assert kernel.stale() == []


Backends = dict[int, tuple[int, State, int]]  # id to address, state and service
_BACKENDS = st.dictionaries(
    st.integers(1, 5), st.tuples(st.integers(1, 4), st.sampled_from(State), st.sampled_from((DNS, WEB)))
)


@given(_BACKENDS, st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), max_size=10))
def test_a_socket_is_stale_if_others_serve_and_its_peer_does_not(
    backends: Backends, sockets: list[tuple[int, int]]
) -> None:
    kernel = Kernel()
    for number, (address, state, service) in backends.items():
        kernel.backend(number, f"10.0.0.{address}", state, service=service)
    for cookie, (number, address) in enumerate(sockets, 1):
        kernel.record(cookie, number, f"10.0.0.{address}")
    serving = {
        address for address, state, service in backends.values() if service == DNS and state in SERVING
    }
    expected = [n for n, (_, address) in enumerate(sockets, 1) if serving and address not in serving]
    assert kernel.stale() == expected


def test_only_writes_to_backends_of_udp_concern_udp() -> None:
    kernel = Kernel()
    kernel.log.clear()
    kernel.backend(1, "10.0.0.1", proto=TCP)
    kernel.frontend("10.96.0.11", UDP, DNS)
    assert not stale.concerns_udp(kernel.log)
    kernel.backend(2, "10.0.0.1", State.DRAINING)
    assert stale.concerns_udp(kernel.log)
