"""A few thousand of the frames that `make fuzz` draws by the million; the seed is this suite's own."""

import collections

import pytest

from tests.packets import checking, fuzz, harness, packets, reference

SEED = 20261126


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_drawn_frames_are_served_as_the_reference_says(made: harness.Harness, seed: int) -> None:
    tally = made.inside(lambda: fuzz.run(made, seed, 4000, scene_frames=1000))
    assert tally.frames == 4000
    assert min(tally) > 10, "some kind of frame is hardly drawn"


def test_a_reference_that_is_wrong_is_told(made: harness.Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "is_closed", lambda state: False)
    with pytest.raises(checking.MismatchError, match=f"seed {SEED}, scene"):
        made.inside(lambda: fuzz.run(made, SEED, 8000))


def test_the_builders_checksums_are_right() -> None:
    wrong = collections.Counter[str]()
    for side in (packets.V4, packets.V6):
        for l4 in (packets.tcp(1, 2), packets.udp(1, 2), packets.sctp(1, 2)):
            wrong.update(packets.wrong_checksums(packets.frame(packets.ip(side.client, side.pod, l4))))
    assert not wrong
