"""The decoded stream: every sample in one chunk, in order, whatever reads it."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import encode_noise

from noisyclean.corpus.chunk import Chunk
from noisyclean.corpus.identity import caption_id, image_id
from noisyclean.corpus.index import CorpusIndex
from noisyclean.corpus.stream import stream_chunks
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
    assert {name: sum(chunk.rows.num_rows for chunk in chunks) for name, chunks in by_shard.items()} == SIZES
    for name, chunks in by_shard.items():
        assert [index for chunk in chunks for index in chunk.rows["index"].to_pylist()] == list(range(SIZES[name]))
        assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert all(chunk.rows.num_rows == chunk_size for chunk in chunks[:-1])
        assert [chunk.damage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [name == "00005"]
        for chunk in chunks:
            readable = chunk.readable.sum()
            assert readable == chunk.rows["fault"].null_count
            assert {len(one) for one in (chunk.image, chunk.text, chunk.image_ids, chunk.caption_ids)} == {readable}


def test_content_is_that_of_the_samples(faulty_index: CorpusIndex, preparer: Preprocessor) -> None:
    shards = [shard for shard in faulty_index.shards if shard.name == "00002"]
    (chunk,) = stream_chunks(shards, preparer, chunk_size=100, workers=0)
    assert Counter(chunk.rows["fault"].to_pylist()) == {None: 45, "no caption": 1, "truncated PNG": 1}
    readable = chunk.rows.filter(pa.array(chunk.readable)).to_pylist()
    for at, (number, row) in enumerate(zip(range(100, 145), readable, strict=True)):
        assert row["caption"] == f"caption {number} of {number % 7} things"
        assert (row["width"], row["height"]) == (24, 20)
        pixels, _ = preparer.pixels(encode_noise(number))
        assert torch.equal(chunk.image[at], torch.from_numpy(pixels))
        assert torch.equal(chunk.text[at], preparer.tokens([row["caption"]])[0])
        assert chunk.image_ids[at] == image_id(encode_noise(number))
        assert chunk.caption_ids[at] == caption_id(row["caption"])


def test_whoever_is_ready_hands_over(faulty_index: CorpusIndex, preparer: Preprocessor) -> None:
    chunks = stream_chunks(faulty_index.shards, preparer, chunk_size=10, workers=2, in_order=False, niceness=5)
    found = defaultdict(list)
    for chunk in chunks:
        found[chunk.shard] += chunk.rows["index"].to_pylist()
    assert found == {name: list(range(size)) for name, size in SIZES.items()}


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
        found[chunk.shard] += chunk.rows["index"].to_pylist()
        last[chunk.shard] += chunk.last
    assert found == {"00000": list(range(1, 60, 2)), "00004": [69], "00005": [0, 1, 2]}
    assert last == {"00000": 1, "00004": 1, "00005": 1}


def test_what_is_not_wanted_is_not_decoded(faulty_index: CorpusIndex, encoder: DualEncoder) -> None:
    class Counting:
        decoded = 0

        def prepare(self, data: bytes) -> tuple[np.ndarray, tuple[int, int]]:
            self.decoded += 1
            return encoder.preprocessor.pixels(data)

        def finish(self, *prepared: Any) -> tuple[torch.Tensor, dict[int, str]]:
            return encoder.preprocessor.finish(*prepared)

        def tokens(self, captions: list[str]) -> torch.Tensor:
            return encoder.preprocessor.tokens(captions)

    counting = Counting()
    wanted = {"00004": np.arange(70) < 5}
    list(stream_chunks(faulty_index.shards, counting, chunk_size=8, workers=0, wanted=wanted))
    assert counting.decoded == 5


def test_no_shards(preparer: Preprocessor) -> None:
    assert list(stream_chunks([], preparer, chunk_size=8, workers=2)) == []
