from __future__ import annotations

import pytest

from noisyclean.scoring.engines.parcels import Waiting, parcel_size


@pytest.mark.parametrize(
    ("waiting", "crew", "workers", "expected"),
    [
        (100_000, 64, 8, 781),  # half of an equal share
        (4_000, 64, 8, 32),  # no less than four for each decoding process
        (640, 64, 8, 10),  # but where there are few, each gets its share
        (63, 64, 8, 1),
        (1, 64, 8, 1),
        (100, 1, 2, 50),
        (5, 2, 0, 3),  # decoded by the model's own process
    ],
)
def test_size(waiting: int, crew: int, workers: int, expected: int) -> None:
    assert parcel_size(waiting, crew, workers) == expected


def test_all_are_handed_out_in_parcels_that_shrink() -> None:
    waiting, sizes = 100_000, []
    while waiting:
        sizes.append(parcel_size(waiting, 64, 8))
        waiting -= sizes[-1]
    assert sum(sizes) == 100_000
    assert sizes == sorted(sizes, reverse=True)


def test_a_shard_that_ends_whoever_has_it_is_soon_alone() -> None:
    waiting = Waiting(dict.fromkeys(map(str, range(1000)), "state"), crew=4, workers=8)
    done: list[str] = []
    alone = lost = 0
    while waiting and alone < 3:
        parcel = waiting.take()
        if "777" in parcel:
            lost += 1
            alone = waiting.give_back(parcel)
        else:
            done += parcel
    assert sorted(done) == sorted(set(map(str, range(1000))) - {"777"})
    assert alone == 3
    assert lost < 12
