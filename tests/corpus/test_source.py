"""Batches: the same pairs from memory as from the stream, each once, and undecodable ones never."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from noisyclean.corpus.index import CorpusIndex
from noisyclean.corpus.source import Batch, MemorySource, PairSource, StreamSource, fits_in_memory
from noisyclean.encoders import DualEncoder

UNDECODABLE = {7, 20, 60 + 46, 60 + 47}
"""Rows that have a caption and bytes of a picture, which cannot be decoded."""


@pytest.fixture(scope="module")
def memory(faulty_index: CorpusIndex, encoder: DualEncoder) -> MemorySource:
    return MemorySource(StreamSource(faulty_index, encoder.preprocessor, workers=0))


@pytest.fixture(scope="module")
def stream(faulty_index: CorpusIndex, encoder: DualEncoder) -> StreamSource:
    return StreamSource(faulty_index, encoder.preprocessor, workers=0, shuffle_buffer=64)


@pytest.fixture(scope="module", params=["memory", "stream", "one worker", "two workers", "tiny buffer"])
def source(
    request: pytest.FixtureRequest,
    faulty_index: CorpusIndex,
    encoder: DualEncoder,
    memory: MemorySource,
    stream: StreamSource,
) -> PairSource:
    def streamed(workers: int, buffer: int) -> StreamSource:
        return StreamSource(faulty_index, encoder.preprocessor, workers=workers, shuffle_buffer=buffer)

    made = {"one worker": streamed(1, 64), "two workers": streamed(2, 64), "tiny buffer": streamed(0, 1)}
    return {"memory": memory, "stream": stream, **made}[request.param]


@pytest.fixture(scope="module")
def usable(faulty_index: CorpusIndex) -> np.ndarray:
    return np.flatnonzero(faulty_index.usable)


def rows_of(batches: list[Batch]) -> list[int]:
    return [int(row) for batch in batches for row in batch.rows]


@pytest.mark.parametrize("shuffle", [None, 5])
def test_every_pair_once_in_whole_batches(source: PairSource, usable: np.ndarray, shuffle: int | None) -> None:
    batches = list(source.batches(usable, 32, shuffle=shuffle))
    rows = rows_of(batches)
    assert sorted(rows) == sorted(set(usable.tolist()) - UNDECODABLE)
    assert [len(batch) for batch in batches] == [32] * (len(rows) // 32) + [len(rows) % 32]
    for batch in batches:
        assert len(batch.rows) == len(batch.pixels) == len(batch.tokens)
        assert batch.pixels.dtype == torch.uint8


@pytest.mark.parametrize("shuffle", [None, 5])
def test_memory_and_stream_give_the_same_pairs(
    memory: MemorySource, source: PairSource, usable: np.ndarray, shuffle: int | None
) -> None:
    (expected,) = memory.batches(usable, 1000)
    for batch in source.batches(usable, 50, shuffle=shuffle):
        at = torch.searchsorted(expected.rows, batch.rows)
        assert torch.equal(expected.rows[at], batch.rows)
        assert torch.equal(expected.pixels[at], batch.pixels)
        assert torch.equal(expected.tokens[at].long(), batch.tokens.long())


def test_shuffle_goes_by_the_seed(source: PairSource, usable: np.ndarray) -> None:
    def order(seed: int | None) -> list[int]:
        return rows_of(list(source.batches(usable, 32, shuffle=seed)))

    orders = [order(seed) for seed in (None, 1, 2)]
    assert orders[1] == order(1)
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("buffer", [64, 10_000])
def test_shuffle_mixes_shards(faulty_index: CorpusIndex, encoder: DualEncoder, usable: np.ndarray, buffer: int) -> None:
    """Whether the buffer holds less than two shards or the whole corpus."""
    source = StreamSource(faulty_index, encoder.preprocessor, workers=0, shuffle_buffer=buffer)
    for batch in list(source.batches(usable, 32, shuffle=0))[:-1]:
        rows = batch.rows.numpy()
        assert np.mean(np.diff(rows) < 0) > 0.2
        shard = np.searchsorted(faulty_index.offsets, rows, side="right")
        assert len(set(shard)) > 1


def test_only_the_rows_asked_for(source: PairSource) -> None:
    wanted = np.array([61, 3, 7, 170, 0])  # 7 cannot be decoded
    assert sorted(rows_of(list(source.batches(wanted, 2)))) == [0, 3, 61, 170]
    assert sorted(rows_of(list(source.batches(wanted, 2, shuffle=0)))) == [0, 3, 61, 170]


def test_nothing_asked_for_or_nothing_decodable(source: PairSource) -> None:
    assert list(source.batches(np.zeros(0, np.int64), 8)) == []
    assert list(source.batches(np.array(sorted(UNDECODABLE)), 8, shuffle=1)) == []


def test_memory_of_nothing(faulty_index: CorpusIndex, encoder: DualEncoder) -> None:
    shards = [shard for shard in faulty_index.shards if shard.name in {"00001", "00003"}]
    index = CorpusIndex(shards, np.array([0, 0, 2]), np.arange(2), np.arange(2), np.arange(2), np.array([True, False]))
    memory = MemorySource(StreamSource(index, encoder.preprocessor, workers=0))
    assert list(memory.batches(np.array([0]), 8)) == []


class TestPlanted:
    """Sources that differ from another in a few pairs: what noise is planted in without a copy of the pictures."""

    TO, FROM = np.array([0, 100, 3, 5]), np.array([100, 0, 170, 3])

    def batch(self, source: MemorySource, usable: np.ndarray) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        (batch,) = source.batches(usable, 1000)
        return {row: (batch.pixels[at], batch.tokens[at]) for at, row in enumerate(batch.rows.tolist())}

    @pytest.mark.parametrize("what", ["pictures", "captions"])
    def test_exactly_these_are_passed_on(self, what: str, memory: MemorySource, usable: np.ndarray) -> None:
        change = memory.with_pictures_of if what == "pictures" else memory.with_captions_of
        changed = change(self.TO, self.FROM)
        donor = {
            **{row: row for row in usable.tolist()},
            **dict(zip(self.TO.tolist(), self.FROM.tolist(), strict=True)),
        }
        before, after = self.batch(memory, usable), self.batch(changed, usable)
        assert before.keys() == after.keys()
        for row, (pixels, tokens) in after.items():
            picture, caption = (donor[row], row) if what == "pictures" else (row, donor[row])
            assert torch.equal(pixels, before[picture][0])
            assert torch.equal(tokens, before[caption][1])
            assert changed.index.image[row] == memory.index.image[picture]
            assert changed.index.caption[row] == memory.index.caption[caption]
        np.testing.assert_array_equal(changed.index.pair, memory.index.pair)
        assert changed._pixels is memory._pixels

    def test_captions_of_ones_own(self, memory: MemorySource, encoder: DualEncoder, usable: np.ndarray) -> None:
        rows = np.array([170, 2])
        tokens = encoder.preprocessor.tokens(["nothing at all", "click to enlarge"])
        changed = memory.with_captions(rows, np.array([7, 8]), tokens)
        before, after = self.batch(memory, usable), self.batch(changed, usable)
        for row, (pixels, found) in after.items():
            assert torch.equal(pixels, before[row][0])
            expected = tokens[rows.tolist().index(row)] if row in rows else before[row][1]
            assert torch.equal(found.long(), expected.long())
        assert changed.index.caption[rows].tolist() == [7, 8]

    def test_the_original_stays_as_it_is(self, memory: MemorySource, encoder: DualEncoder, usable: np.ndarray) -> None:
        before, fingerprint = self.batch(memory, usable), memory.index.fingerprint()
        both = memory.with_pictures_of(self.TO, self.FROM).with_captions_of(self.TO, self.FROM)
        both.with_captions(self.TO, self.TO, encoder.preprocessor.tokens(["x"] * len(self.TO)))
        assert memory.index.fingerprint() == fingerprint
        for row, (pixels, tokens) in self.batch(memory, usable).items():
            assert torch.equal(pixels, before[row][0])
            assert torch.equal(tokens, before[row][1])
        # Picture and caption of one donor are a true pair again.
        assert torch.equal(self.batch(both, usable)[3][0], before[170][0])
        assert torch.equal(self.batch(both, usable)[3][1], before[170][1])

    def test_a_donor_that_cannot_be_decoded_leaves_no_pair(self, memory: MemorySource, usable: np.ndarray) -> None:
        for changed in (
            memory.with_pictures_of(np.array([0]), np.array([7])),
            memory.with_captions_of(np.array([0]), np.array([7])),
        ):
            rows = rows_of(list(changed.batches(usable, 32, shuffle=1)))
            assert set(usable.tolist()) - set(rows) == {0, *UNDECODABLE}

    def test_nothing_changed(self, memory: MemorySource, usable: np.ndarray) -> None:
        none = np.zeros(0, np.int64)
        for same in (memory.with_pictures_of(none, none), memory.with_captions_of(none, none)):
            assert same.index.fingerprint() == memory.index.fingerprint()
            assert self.batch(same, usable).keys() == self.batch(memory, usable).keys()


def test_fits_in_memory(faulty_index: CorpusIndex) -> None:
    assert fits_in_memory(faulty_index, (32, 32), 16)
    assert not fits_in_memory(faulty_index, (2**20, 2**20), 16)
