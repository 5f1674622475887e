"""The frozen bank: made of the pairs' identities and content alone, and tied to the encoder that made it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn.functional import normalize

from noisyclean.calibration import noise_rate_of_tail
from noisyclean.corpus.index import CorpusIndex
from noisyclean.corpus.source import MemorySource, StreamSource
from noisyclean.encoders import DualEncoder
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.scoring.reference import (
    BANK_FORMAT,
    MIN_BANK,
    ReferenceBank,
    ReferenceModel,
    build_bank,
    draw_bank_rows,
    embed,
)


def unit(rows: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def make_bank(size: int = 40) -> ReferenceBank:
    """Pairs that match, so that a pair is the strongest rival of its own double."""
    ids = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, size)
    image = unit(size, 1)
    return ReferenceBank.build(ids, image, normalize(image + unit(size, 2) / 4, dim=1), 0.05, ids ^ 1)


@pytest.fixture(scope="module")
def source(faulty_index: CorpusIndex, encoder: DualEncoder) -> StreamSource:
    return StreamSource(faulty_index, encoder.preprocessor, workers=0)


class TestBank:
    def test_order_of_the_pairs_does_not_matter(self) -> None:
        bank = make_bank()
        order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))
        again = ReferenceBank.build(bank.ids[order], bank.image[order], bank.text[order], 0.05, bank.pairs[order])
        assert again.fingerprint() == bank.fingerprint()
        np.testing.assert_array_equal(again.null, bank.null)

    def test_null_is_sorted_and_below_what_pairs_score(self, fold_models: list[ReferenceModel]) -> None:
        for bank in [make_bank(), *(model.bank for model in fold_models)]:
            assert bank.null.dtype == np.float32
            assert np.all(np.diff(bank.null) >= 0)
            assert len(bank.null) == len(bank.null_similarity) == len(bank) * (len(bank) - 1)  # all of so small a bank

    def test_a_pair_of_the_bank_is_not_its_own_rival(self) -> None:
        bank = make_bank()
        for at in (0, 17, 39):
            others = np.arange(len(bank)) != at
            without = ReferenceBank(
                bank.ids[others],
                bank.image[others],
                bank.text[others],
                bank.temperature,
                bank.null,
                bank.null_similarity,
            )
            pair = bank.image[at : at + 1], bank.text[at : at + 1], bank.ids[at : at + 1]
            for found, expected in zip(bank.score(*pair), without.score(*pair), strict=True):
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            stranger = bank.score(*pair[:2], bank.ids[at : at + 1] ^ 1)
            assert stranger.match_score < bank.score(*pair).match_score - 0.5

    def test_scores_of_a_batch_are_those_of_its_pairs(self) -> None:
        bank = make_bank()
        image, text = unit(5, 3), unit(5, 4)
        ids = np.array([bank.ids[-1], 3, bank.ids[0], 2**63 - 1, -(2**63)])
        together = bank.score(image, text, ids)
        for i in range(5):
            alone = bank.score(image[i : i + 1], text[i : i + 1], ids[i : i + 1])
            for one, all_ in zip(alone, together, strict=True):
                torch.testing.assert_close(one[0], all_[i], atol=1e-5, rtol=1e-5)

    def test_p_values_are_those_of_its_null(self) -> None:
        bank = make_bank()
        scores = np.array([bank.null[0], bank.null[-1], np.float32(1.0)])
        n = len(bank.null)
        np.testing.assert_allclose(bank.p_values(scores), [1.0, 2 / (n + 1), 1 / (n + 1)])

    def test_too_small(self) -> None:
        make_bank(MIN_BANK)
        with pytest.raises(NoisycleanError, match=str(MIN_BANK)):
            make_bank(MIN_BANK - 1)

    def test_fingerprint_names_everything_in_it(self) -> None:
        bank = make_bank()
        image = bank.image.clone()
        image[3, 3] += 1e-6
        changed = [
            replace(bank, temperature=0.06),
            replace(bank, image=image),
            replace(bank, text=bank.image),
            replace(bank, ids=bank.ids + 1),
            replace(bank, null=bank.null - 1),
            replace(bank, null_similarity=bank.null_similarity / 2),
            replace(bank, near=bank.near - 1),
            replace(bank, near_similarity=bank.near_similarity / 2),
            replace(bank, pairs=bank.pairs + 1),
        ]
        assert len({bank.fingerprint(), *(one.fingerprint() for one in changed)}) == 10

    def test_pairs_of_the_bank_are_told_by_caption_and_name(self) -> None:
        """Not one with its caption, nor another one under its name, as where shards were packed anew."""
        bank = make_bank()
        ids = np.array([bank.ids[5], bank.ids[5], bank.ids[6] ^ 1, bank.ids[39]])
        pairs = np.array([bank.pairs[5], bank.pairs[6], bank.pairs[6], bank.pairs[39]])
        assert bank.places_of(ids, pairs).tolist() == [5, -1, -1, 39]


class TestFiles:
    def test_round_trip(self, tmp_path: Path) -> None:
        bank = make_bank()
        bank.save(tmp_path / "bank.safetensors", encoder="abc")
        again = ReferenceBank.load(tmp_path / "bank.safetensors", encoder="abc")
        assert again.fingerprint() == bank.fingerprint()
        assert again.temperature == bank.temperature
        assert len(again.near) > 0
        assert again.mismatches() == bank.mismatches()
        np.testing.assert_array_equal(again.pairs, bank.pairs)
        assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]

    def test_bank_of_another_encoder_is_refused(self, tmp_path: Path) -> None:
        make_bank().save(tmp_path / "bank.safetensors", encoder="abc")
        with pytest.raises(UsageError, match=r"bank\.safetensors: this bank belongs to another encoder"):
            ReferenceBank.load(tmp_path / "bank.safetensors", encoder="abd")

    @pytest.mark.parametrize("keep", [0, 20, -1])
    def test_broken_file_is_refused(self, tmp_path: Path, keep: int) -> None:
        path = tmp_path / "bank.safetensors"
        make_bank().save(path, encoder="abc")
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(UsageError, match="not a reference bank"):
            ReferenceBank.load(path, encoder="abc")

    def test_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="not a reference bank"):
            ReferenceBank.load(tmp_path / "bank.safetensors", encoder="abc")

    def test_file_of_another_version_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "bank.safetensors"
        save_file({"ids": torch.zeros(1)}, path, metadata={"format": "2"})
        with pytest.raises(UsageError, match=r"bank\.safetensors: a bank by another version of noisyclean"):
            ReferenceBank.load(path, encoder="abc")

    def test_file_that_lacks_something_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "bank.safetensors"
        sides = {"image": unit(20, 1), "text": unit(20, 2)}
        save_file(sides, path, metadata={"format": BANK_FORMAT, "temperature": "0.05", "bank": "", "encoder": "abc"})
        with pytest.raises(UsageError, match=r"bank\.safetensors: not a reference bank"):
            ReferenceBank.load(path, encoder="abc")

    def test_model_round_trip(self, tmp_path: Path, fold_models: list[ReferenceModel]) -> None:
        fold_models[0].save(tmp_path)
        assert ReferenceModel.load(tmp_path).fingerprint() == fold_models[0].fingerprint()

    def test_model_with_the_bank_of_another_is_refused(self, tmp_path: Path, fold_models: list[ReferenceModel]) -> None:
        for fold, model in enumerate(fold_models):
            model.save(tmp_path / str(fold))
        (tmp_path / "1" / "bank.safetensors").replace(tmp_path / "0" / "bank.safetensors")
        with pytest.raises(UsageError, match="another encoder"):
            ReferenceModel.load(tmp_path / "0")


def index_of(pair: list[int], caption: list[int] | None = None, image: list[int] | None = None) -> CorpusIndex:
    """Pairs by their hashes; captions and pictures all differ where they are not given."""
    rows = np.arange(len(pair), dtype=np.int64)
    columns = (np.array(one, np.int64) if one is not None else rows for one in (pair, caption, image))
    return CorpusIndex([], np.zeros(1, np.int64), *columns, usable=np.ones(len(pair), np.bool_))


class TestDrawing:
    @given(st.sets(st.integers(-(2**63), 2**63 - 1), max_size=200), st.integers(0, 60), st.randoms())
    def test_depends_on_identities_only(self, identities: set[int], size: int, random: Random) -> None:
        ids = sorted(identities)
        rows = np.arange(len(ids))
        index = index_of(ids)
        drawn = set(index.pair[draw_bank_rows(index, rows, size)])
        assert len(drawn) == min(size, len(ids))
        shuffled = index_of(random.sample(ids, len(ids)))
        assert set(shuffled.pair[draw_bank_rows(shuffled, rows, size)]) == drawn

    def test_from_candidates_only(self) -> None:
        index = index_of(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 1000).tolist())
        candidates = np.arange(0, 1000, 2)
        drawn = draw_bank_rows(index, candidates, 100)
        assert set(drawn) <= set(candidates)
        assert len(set(drawn)) == 100
        # More candidates can displace what is drawn, but never reorder it: a larger bank contains the smaller one.
        assert set(draw_bank_rows(index, candidates, 50)) < set(drawn)

    def test_no_caption_or_picture_twice(self) -> None:
        """Or the null would hold true pairs: an icon of a brain with the caption of another brain."""
        random = np.random.default_rng(0)
        index = index_of(list(range(400)), random.integers(0, 60, 400).tolist(), random.integers(0, 90, 400).tolist())
        drawn = draw_bank_rows(index, np.arange(400), 1000)
        assert len(set(index.caption[drawn])) == len(set(index.image[drawn])) == len(drawn) > MIN_BANK

    def test_build_bank(self, faulty_index: CorpusIndex, encoder: DualEncoder, source: StreamSource) -> None:
        """Whatever holds the pairs; those that cannot be decoded are left out."""
        usable = np.flatnonzero(faulty_index.usable)
        bank = build_bank(encoder, source, usable, 1000)
        assert len(usable) - 10 < len(bank) < len(usable)  # some cannot be decoded
        assert bank.temperature == pytest.approx(0.05)
        rows = usable[np.isin(faulty_index.pair[usable], bank.pairs)]
        by_caption = rows[np.argsort(faulty_index.caption[rows])]
        np.testing.assert_array_equal(bank.ids, faulty_index.caption[by_caption])
        np.testing.assert_array_equal(bank.pairs, faulty_index.pair[by_caption])
        again = build_bank(encoder, MemorySource(source), usable[::-1].copy(), 1000)
        np.testing.assert_array_equal(again.ids, bank.ids)
        torch.testing.assert_close(again.image, bank.image, atol=1e-6, rtol=0)
        torch.testing.assert_close(again.text, bank.text, atol=1e-6, rtol=0)

    def test_the_estimate_holds_though_true_partners_are_in_the_bank(self) -> None:
        """Captions permuted within the corpus, all of it in the bank: similarities know nothing of partners."""
        images = unit(4000, 1)
        texts = normalize(images + unit(4000, 2) * 0.6, dim=1)
        wrong = np.random.default_rng(0).permutation(4000)[:1600]
        texts[wrong] = texts[np.roll(wrong, 1)]
        index = index_of(np.random.default_rng(1).permutation(4000).tolist())
        drawn = draw_bank_rows(index, np.arange(4000), 8192)
        bank = ReferenceBank.build(index.caption[drawn], images[drawn], texts[drawn], 0.05)
        assert len(bank) == 4000
        scores = bank.score(images, texts, index.caption)
        below = int((scores.similarity < bank.similarity_median).sum())
        assert noise_rate_of_tail(below, pairs=4000, null_pairs=len(bank)).estimate == pytest.approx(0.4, abs=0.03)


class TestNearMisses:
    def test_are_between_true_pairs_and_random_ones(self) -> None:
        topics = unit(20, 3).repeat_interleave(30, dim=0)
        images = normalize(topics + 0.8 * unit(600, 4), dim=1)
        texts = normalize(images + 0.3 * unit(600, 5), dim=1)
        bank = ReferenceBank.build(np.arange(600), images, texts, 0.05)
        mismatches = bank.mismatches().to_pandas().groupby("kind")["match_score"].median()
        true = np.median(bank.score(images, texts, np.arange(600)).match_score)
        assert mismatches["random"] < mismatches["near miss"] - 2 < true - 4
        assert (bank.mismatches()["kind"].to_numpy() == "near miss").sum() == 5 * 600
        # A score in the middle of the near misses is a rare one among random mismatches.
        middle = np.array([mismatches["near miss"]], np.float32)
        assert bank.near_miss_p_values(middle) == pytest.approx(0.5, abs=0.01)
        assert bank.p_values(middle) < 0.1

    def test_of_mismatched_pairs_there_are_none(self) -> None:
        """A bank in which no pair looks true: there is no caption that would nearly be right."""
        bank = ReferenceBank.build(np.arange(200), unit(200, 1), unit(200, 2), 0.05)
        assert np.isnan(bank.near_miss_p_values(np.zeros(3, np.float32))).all()
        assert set(bank.mismatches()["kind"].to_pylist()) == {"random"}


class TestEmbed:
    def test_embeds_what_can_be_decoded(
        self, faulty_index: CorpusIndex, encoder: DualEncoder, source: StreamSource
    ) -> None:
        wanted = np.arange(0, 25)
        counts: list[int] = []
        rows, image, text = embed(encoder, source, wanted, batch_size=10, on_batch=counts.append)
        assert rows.tolist() == [row for row in wanted if row not in {7, 11, 20}]
        assert counts == [10, 10, 2]
        assert image.shape == text.shape == (22, encoder.config["model_cfg"]["embed_dim"])
        for embedding in (image, text):
            torch.testing.assert_close(embedding.norm(dim=1), torch.ones(22))
            assert len(embedding.unique(dim=0)) == 22

    def test_nothing(self, encoder: DualEncoder, source: StreamSource) -> None:
        rows, image, text = embed(encoder, source, np.zeros(0, np.int64))
        assert (len(rows), len(image), len(text)) == (0, 0, 0)
