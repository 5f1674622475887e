"""The decoded stream: every sample in one chunk, in order, whatever reads it."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from helpers import encode_noise

from noisyclean.corpus.decoding import decode_image
from noisyclean.corpus.index import CorpusIndex
from noisyclean.corpus.stream import Chunk, stream_chunks
from noisyclean.encoders import DualEncoder, Preprocessor

SIZES = {"00000": 60, "00001": 0, "00002": 47, "00003": 2, "00004": 70, "00005": 8}


@pytest.fixture(scope="module")
def preparer(encoder: DualEncoder) -> Preprocessor:
    return encoder.preprocessor


@pytest.mark.parametrize(
    ("workers", "chunk_size"), [(0, 1), (0, 10), (0, 47), (0, 1000), (1, 10), (1, 47), (2, 10), (2, 1000)]
)
def test_every_sample_once_in_chunks(
    faulty_index: CorpusIndex, preparer: Preprocessor, workers: int, chunk_size: int
) -> None:
    by_shard: dict[str, list[Chunk]] = defaultdict(list)
    for chunk in stream_chunks(faulty_index.shards, preparer, chunk_size=chunk_size, workers=workers):
        by_shard[chunk.shard].append(chunk)
    assert {name: sum(len(chunk.samples) for chunk in chunks) for name, chunks in by_shard.items()} == SIZES
    for name, chunks in by_shard.items():
        assert [sample.index for chunk in chunks for sample in chunk.samples] == list(range(SIZES[name]))
        assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert all(len(chunk.samples) == chunk_size for chunk in chunks[:-1])
        assert [chunk.damage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [name == "00005"]
        for chunk in chunks:
            readable = chunk.readable()
            assert len(chunk.pixels) == len(chunk.tokens) == len(readable)
            assert all(sample.image is None for sample in chunk.samples)


def test_content_is_that_of_the_samples(faulty_index: CorpusIndex, preparer: Preprocessor) -> None:
    shards = [shard for shard in faulty_index.shards if shard.name == "00002"]
    (chunk,) = stream_chunks(shards, preparer, chunk_size=100, workers=0)
    assert Counter(sample.fault for sample in chunk.samples) == {None: 45, "no caption": 1, "truncated PNG": 1}
    for at, (number, sample) in enumerate(zip(range(100, 145), chunk.readable(), strict=True)):
        assert sample.caption == f"caption {number} of {number % 7} things"
        assert (sample.width, sample.height) == (24, 20)
        picture = preparer.pixels(decode_image(encode_noise(number)))
        assert torch.equal(chunk.pixels[at], torch.from_numpy(picture))
        assert torch.equal(chunk.tokens[at], preparer.tokens([sample.caption])[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_only_what_is_wanted(faulty_index: CorpusIndex, preparer: Preprocessor, workers: int) -> None:
    wanted = {
        "00000": np.arange(60) % 2 == 1,  # among them two of the three faults
        "00002": np.zeros(47, bool),
        "00004": np.arange(70) == 69,
        "00005": np.ones(3, bool),  # shorter than the shard: what it does not speak of is not wanted
    }
    found = defaultdict(list)
    last: Counter[str] = Counter()
    for chunk in stream_chunks(faulty_index.shards, preparer, chunk_size=8, workers=workers, wanted=wanted):
        found[chunk.shard] += [sample.index for sample in chunk.samples]
        last[chunk.shard] += chunk.last
    assert found == {"00000": list(range(1, 60, 2)), "00004": [69], "00005": [0, 1, 2]}
    assert last == {"00000": 1, "00004": 1, "00005": 1}


def test_what_is_not_wanted_is_not_decoded(faulty_index: CorpusIndex, encoder: DualEncoder) -> None:
    class Counting:
        decoded = 0

        def pixels(self, image: object) -> np.ndarray:
            self.decoded += 1
            return encoder.preprocessor.pixels(image)  # type: ignore[arg-type]

        def tokens(self, captions: list[str]) -> torch.Tensor:
            return encoder.preprocessor.tokens(captions)

    counting = Counting()
    wanted = {"00004": np.arange(70) < 5}
    list(stream_chunks(faulty_index.shards, counting, chunk_size=8, workers=0, wanted=wanted))
    assert counting.decoded == 5


def test_no_shards(preparer: Preprocessor) -> None:
    assert list(stream_chunks([], preparer, chunk_size=8, workers=2)) == []
