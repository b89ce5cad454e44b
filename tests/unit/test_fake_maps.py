"""What FakeMaps adds to the contract it shares with the real maps (tests/kernel/test_maps.py): faults."""

import pytest

from lbproxy import abi
from lbproxy.core import tables
from lbproxy.kernel import fake, maps
from tests import serving


def put(number: int) -> tables.Put:
    return tables.Put(
        tables.Table.BACKEND_STATS, tables.row_key(number), abi.LAYOUTS["backend_stats"].pack(number)
    )


def test_the_nth_write_fails_once_and_those_before_it_are_made() -> None:
    kernel = fake.FakeMaps(serving.SIZES)
    kernel.fail_after = 2
    with pytest.raises(maps.MapWriteError, match="injected"):
        kernel.apply([put(1), put(2), put(3), put(4)])
    assert kernel.log == [put(1), put(2)]
    assert [int.from_bytes(key, tables.BYTE_ORDER) for key, _ in kernel.rows("backend_stats")] == [1, 2]
    kernel.apply([put(3)])
    assert kernel.log[-1] == put(3)


def test_faults_are_counted_across_batches() -> None:
    kernel = fake.FakeMaps(serving.SIZES)
    kernel.fail_after = 1
    kernel.apply([put(1)])
    with pytest.raises(maps.MapWriteError):
        kernel.apply([put(2)])


@pytest.mark.parametrize(
    "write",
    [
        tables.Put(tables.Table.BACKENDS, b"\0" * 3, tables.NO_BACKEND),
        tables.Put(tables.Table.BACKENDS, b"\0" * 4, tables.NO_BACKEND[:-1]),
        tables.Delete(tables.Table.FRONTENDS, b"short"),
    ],
)
def test_a_row_of_the_wrong_size_is_a_bug(write: tables.Write) -> None:
    with pytest.raises(ValueError, match="bytes, not"):
        fake.FakeMaps(serving.SIZES).apply([write])
