"""The drawn corpus: laid out as img2dataset does it, the same for the same seed, and true where it says so."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from noisyclean.corpus.synthetic import Kind, PairSampler, generate_corpus
from noisyclean.corpus.synthetic.captions import SYNONYMS, holds
from noisyclean.corpus.synthetic.drawing import OUTLINES, draw
from noisyclean.corpus.synthetic.scenes import COLOURS, SCENERIES, SHAPES, Background, Scene, visible_colours
from noisyclean.errors import UsageError

PAIRS, PER_SHARD = 250, 100
generate_faulty = partial(generate_corpus, near_duplicates=0.2, wrong_attribute=0.2, uninformative=0.2)

indices = st.integers(0, 10**6)
# No deadline: a busy machine would fail a test of truth, not of speed.
some_examples = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    generate_faulty(directory, pairs=PAIRS, pairs_per_shard=PER_SHARD)
    return directory


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: file.read() for member in tar if (file := tar.extractfile(member))}


def read_metas(directory: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (path.stem, meta["key"]): meta
        for path in sorted(directory.glob("*.tar"))
        for name, content in read_tar(path).items()
        if name.endswith(".json")
        for meta in [json.loads(content)]
    }


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


class TestLayout:
    def test_files(self, corpus: Path) -> None:
        shards = [f"{shard:05d}{suffix}" for shard in range(3) for suffix in (".parquet", ".tar", "_stats.json")]
        assert sorted(path.name for path in corpus.iterdir()) == sorted([*shards, "truth.parquet"])

    def test_members(self, corpus: Path) -> None:
        members = read_tar(corpus / "00002.tar")
        keys = [f"00002{offset:04d}" for offset in range(50)]
        assert list(members) == [f"{key}.{suffix}" for key in keys for suffix in ("jpg", "json", "txt")]

    def test_samples_agree_with_their_metadata(self, corpus: Path) -> None:
        members = read_tar(corpus / "00000.tar")
        for name, content in members.items():
            if not name.endswith(".json"):
                continue
            meta = json.loads(content)
            jpeg = members[f"{meta['key']}.jpg"]
            image = Image.open(io.BytesIO(jpeg))
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (meta["width"], meta["height"]))
            assert min(image.size) == 64
            assert max(image.size) <= 80
            assert meta["sha256"] == hashlib.sha256(jpeg).hexdigest()
            assert meta["caption"] == members[f"{meta['key']}.txt"].decode()
            assert meta["status"] == "success"
            assert meta["error_message"] is None
            assert re.fullmatch("[0-9a-f]{32}", meta["uid"])

    def test_uids_are_unique(self, corpus: Path) -> None:
        assert len({meta["uid"] for meta in read_metas(corpus).values()}) == PAIRS

    def test_webdataset_reads_it(self, corpus: Path) -> None:
        urls = [str(path) for path in sorted(corpus.glob("*.tar"))]
        samples = list(wds.WebDataset(urls, shardshuffle=False).decode("rgb8"))
        assert len(samples) == PAIRS
        for sample in samples:
            assert sample["json"]["key"] == sample["__key__"]
            assert sample["json"]["caption"] == sample["txt"]
            assert sample["jpg"].shape == (sample["json"]["height"], sample["json"]["width"], 3)

    def test_sidecar_parquet_repeats_the_jsons(self, corpus: Path) -> None:
        rows = [row for path in sorted(corpus.glob("0*.parquet")) for row in pq.read_table(path).to_pylist()]
        assert rows == list(read_metas(corpus).values())

    def test_stats(self, corpus: Path) -> None:
        stats = json.loads((corpus / "00002_stats.json").read_text())
        assert (stats["count"], stats["successes"], stats["failed_to_download"], stats["failed_to_resize"]) == (
            50,
            50,
            0,
            0,
        )
        assert stats["status_dict"] == {"success": 50}


class TestTruth:
    def test_joins_the_corpus(self, corpus: Path) -> None:
        truth = pd.read_parquet(corpus / "truth.parquet")
        assert list(truth.columns) == ["shard", "key", "matched", "kind", "donor_shard", "donor_key"]
        assert list(zip(truth["shard"], truth["key"], strict=True)) == list(read_metas(corpus))

    def test_matched_says_what_the_kind_says(self, corpus: Path) -> None:
        truth = pd.read_parquet(corpus / "truth.parquet")
        assert truth["matched"].dtype == bool
        assert truth.groupby("kind")["matched"].agg(["min", "max"]).to_dict("index") == {
            "match": {"min": True, "max": True},
            "near_duplicate": {"min": True, "max": True},
            "wrong_attribute": {"min": False, "max": False},
            "uninformative": {"min": False, "max": False},
        }

    def test_donors_are_earlier_originals(self, corpus: Path) -> None:
        truth = pd.read_parquet(corpus / "truth.parquet")
        repeats = truth[truth["kind"] == "near_duplicate"]
        others = truth[truth["kind"] != "near_duplicate"]
        assert others[["donor_shard", "donor_key"]].isna().all(axis=None)
        donors = repeats.merge(others, left_on=["donor_shard", "donor_key"], right_on=["shard", "key"])
        assert len(donors) == len(repeats)
        assert (donors["key_y"] < donors["key_x"]).all()


class TestDeterminism:
    def test_same_seed_same_bytes(self, corpus: Path, tmp_path: Path) -> None:
        generate_faulty(tmp_path, pairs=PAIRS, pairs_per_shard=PER_SHARD)
        assert files(tmp_path) == files(corpus)

    def test_smaller_corpus_begins_the_larger(self, corpus: Path, tmp_path: Path) -> None:
        generate_faulty(tmp_path, pairs=PER_SHARD, pairs_per_shard=PER_SHARD)
        assert (tmp_path / "00000.tar").read_bytes() == (corpus / "00000.tar").read_bytes()

    def test_other_seed_other_pairs(self, corpus: Path, tmp_path: Path) -> None:
        generate_faulty(tmp_path, pairs=50, seed=1)
        ours, theirs = (read_tar(directory / "00000.tar") for directory in (corpus, tmp_path))
        assert not any(ours[name] == theirs[name] for name in theirs if not name.endswith(".txt"))

    def test_image_size(self, tmp_path: Path) -> None:
        generate_corpus(tmp_path, pairs=5, image_size=96)
        assert all(min(meta["width"], meta["height"]) == 96 for meta in read_metas(tmp_path).values())


class TestPairs:
    def test_kinds_come_at_their_rates(self) -> None:
        sampler = PairSampler(seed=3, near_duplicates=0.1, wrong_attribute=0.05, uninformative=0.15)
        counts = Counter(sampler.pair(index).kind for index in range(1200))
        shares = {kind: counts[kind] / 1200 for kind in Kind}
        # Five standard deviations of the widest.
        assert shares == pytest.approx(
            {Kind.MATCH: 0.7, Kind.NEAR_DUPLICATE: 0.1, Kind.WRONG_ATTRIBUTE: 0.05, Kind.UNINFORMATIVE: 0.15}, abs=0.05
        )

    def test_no_faults_when_none_are_asked_for(self) -> None:
        sampler = PairSampler(near_duplicates=0, wrong_attribute=0, uninformative=0)
        assert {sampler.pair(index).kind for index in range(200)} == {Kind.MATCH}

    @some_examples
    @given(index=indices)
    def test_true_captions_hold_and_say_something(self, index: int) -> None:
        pair = PairSampler(near_duplicates=0.5, wrong_attribute=0, uninformative=0).pair(index)
        assert pair.description is not None
        assert holds(pair.description, pair.scene)
        assert pair.description.facts >= 2

    @some_examples
    @given(index=indices)
    def test_wrong_captions_differ_in_one_colour_or_shape(self, index: int) -> None:
        pair = PairSampler(near_duplicates=0, wrong_attribute=1, uninformative=0).pair(index)
        assert pair.description is not None
        assert not holds(pair.description, pair.scene)
        figures = [figure.traits for figure in pair.scene.figures]
        wrong = [
            said
            for mention in pair.description.mentions
            for said, true in zip(mention, zip(*figures, strict=True), strict=True)
            if said and said not in true
        ]
        assert len(wrong) == 1
        assert wrong[0] in {*SHAPES, *COLOURS}

    @some_examples
    @given(index=indices)
    def test_captions_word_what_is_claimed(self, index: int) -> None:
        pair = PairSampler(near_duplicates=0, wrong_attribute=0.5, uninformative=0).pair(index)
        assert pair.description is not None
        caption = pair.caption.lower().replace("-", " ")
        for mention in pair.description.mentions:
            for trait in filter(None, mention):
                assert any(word.replace("-", " ") in caption for word in SYNONYMS.get(trait, (trait,)))

    @some_examples
    @given(index=indices)
    def test_uninformative_captions_describe_nothing(self, index: int) -> None:
        pair = PairSampler(near_duplicates=0, wrong_attribute=0, uninformative=1).pair(index)
        assert pair.description is None
        assert not set(re.findall("[a-z]+", pair.caption.lower())) & {*SHAPES, *COLOURS}

    @some_examples
    @given(index=st.integers(1, 10**6))
    def test_near_duplicates_show_the_scene_of_their_donor(self, index: int) -> None:
        sampler = PairSampler(near_duplicates=1, wrong_attribute=0, uninformative=0)
        pair = sampler.pair(index)
        assert pair.repeats == 0  # all others are near-duplicates themselves
        donor = sampler.pair(0)
        assert [figure.traits for figure in pair.scene.figures] == [figure.traits for figure in donor.scene.figures]
        pixels, donors = (
            np.asarray(draw(scene, 64, np.random.default_rng(index)), float) for scene in (pair.scene, donor.scene)
        )
        assert 0 < np.abs(pixels - donors).mean() < 40

    def test_captions_of_random_pairs_rarely_fit(self) -> None:
        sampler = PairSampler(near_duplicates=0, wrong_attribute=0, uninformative=0)
        pairs = [sampler.pair(index) for index in range(150)]
        fits = [
            holds(caption.description, picture.scene)
            for caption in pairs
            for picture in pairs
            if caption is not picture and caption.description
        ]
        assert np.mean(fits) < 0.005


class TestDrawing:
    def test_every_shape_has_an_outline_that_touches_the_unit_circle(self) -> None:
        assert set(OUTLINES) == set(SHAPES)
        for outline in OUTLINES.values():
            reach = max(float(np.linalg.norm(polygon, axis=1).max()) for polygon in outline.solids)
            assert reach == pytest.approx(1)

    @pytest.mark.parametrize("kind", SCENERIES)
    @pytest.mark.parametrize("image_size", [16, 64, 200])
    def test_scenery_has_its_stated_colour(self, kind: str, image_size: int) -> None:
        scene = Scene((), Background(kind), 5, (1.25, 1.0), (1.0, 0.0, 0.0))
        image = draw(scene, image_size, np.random.default_rng(0))
        assert image.size == (round(1.25 * image_size), image_size)
        assert np.asarray(image).mean(axis=(0, 1)) == pytest.approx(SCENERIES[kind], abs=45)

    def test_every_background_leaves_a_choice_of_colours(self) -> None:
        backgrounds = {PairSampler().pair(index).scene.background for index in range(1000)}
        assert min(len(visible_colours(background)) for background in backgrounds) >= 6


class TestArguments:
    @pytest.mark.parametrize(
        "arguments",
        [
            {"pairs": 0},
            {"pairs": 10, "seed": -1},
            {"pairs": 10, "image_size": 8},
            {"pairs": 10, "pairs_per_shard": 0},
            {"pairs": 10, "pairs_per_shard": 10_001},
            {"pairs": 100_001, "pairs_per_shard": 1},
            {"pairs": 10, "uninformative": -0.1},
            {"pairs": 10, "near_duplicates": 0.6, "wrong_attribute": 0.6},
        ],
    )
    def test_out_of_range(self, tmp_path: Path, arguments: dict[str, Any]) -> None:
        with pytest.raises(UsageError):
            generate_corpus(tmp_path, **arguments)
        assert not list(tmp_path.iterdir())

    def test_directory_with_shards(self, corpus: Path) -> None:
        with pytest.raises(UsageError, match="shards already"):
            generate_corpus(corpus, pairs=1)

    def test_directory_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UsageError, match="not a directory"):
            generate_corpus(tmp_path / "file", pairs=1)
