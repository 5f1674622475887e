"""The choice of donors, without shards."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from noisyclean.corpus.donors import DonorProtocol, choose_donors, is_new, known_pairs, uninformative_captions
from noisyclean.corpus.identity import caption_id

TEXTS = [f"a {('dog', 'cat', 'horse')[i % 3]} on the {('beach', 'road')[i % 2]} {i}" for i in range(60)]
CAPTIONS = [caption_id(text) for text in TEXTS]
IMAGES = [1000 + i // 5 for i in range(60)]
KNOWN = known_pairs(CAPTIONS, IMAGES)


def choose(protocol: DonorProtocol, count: int = 20, seed: int = 0) -> dict[int, int]:
    return choose_donors(CAPTIONS, IMAGES, TEXTS, protocol, count, np.random.default_rng(seed), KNOWN)


@pytest.mark.parametrize("protocol", get_args(DonorProtocol))
def test_nobody_gets_what_is_known_to_match(protocol: DonorProtocol) -> None:
    donors = choose(protocol)
    assert len(donors) == 20
    for recipient, donor in donors.items():
        image, caption = (donor, recipient) if protocol == "image" else (recipient, donor)
        assert IMAGES[image] ^ CAPTIONS[caption] not in KNOWN
    assert donors == choose(protocol)
    assert donors != choose(protocol, seed=1)
    assert choose(protocol, count=0) == {}


def test_pairs_of_one_image_get_the_same_one() -> None:
    donors = choose("image")
    groups = {IMAGES[recipient] for recipient in donors}
    assert all(len({IMAGES[donors[r]] for r in donors if IMAGES[r] == image}) == 1 for image in groups)
    assert len(groups) == 4


def test_uninformative_captions_fit() -> None:
    captions = uninformative_captions(30, np.random.default_rng(0))
    assert len(captions) == 30
    assert captions == uninformative_captions(30, np.random.default_rng(0))
    known = known_pairs([caption_id(captions[0])], [7])
    assert not is_new(captions[0], 7, known)
    others = uninformative_captions(30, np.random.default_rng(0), lambda _, caption: is_new(caption, 7, known))
    assert captions[0] not in others
