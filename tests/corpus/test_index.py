"""The index: every sample of every shard, in order, known by its hashes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import encode_image, pair, write_tar

from noisyclean.corpus.identity import caption_id, image_id, pair_id
from noisyclean.corpus.index import CorpusIndex, index_corpus
from noisyclean.corpus.locate import find_shards
from noisyclean.errors import NoisycleanError


def index(root: Path, workers: int = 1) -> CorpusIndex:
    return index_corpus(find_shards(root), workers=workers)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_tar(
        tmp_path / "a.tar",
        [
            ("k0", pair(0, "a dog")),
            ("k1", {"png": encode_image(1)}),
            ("k2", {"txt": b"a cat"}),
            ("k0", pair(2, "a dog again")),
            ("k4", pair(4, "A  Dog", image=0)),
        ],
    )
    write_tar(tmp_path / "b.tar", {})
    write_tar(tmp_path / "c.tar", {"k0": pair(0, "a dog"), "k1": pair(9)})
    cut = (tmp_path / "c.tar").read_bytes()
    (tmp_path / "c.tar").write_bytes(cut[: len(cut) // 3])
    return tmp_path


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_are_the_samples_in_order(corpus: Path, workers: int) -> None:
    found = index(corpus, workers)
    assert [shard.name for shard in found.shards] == ["a", "b", "c"]
    assert found.offsets.tolist() == [0, 5, 5, len(found)]
    assert [found.rows_at(i) for i in range(3)] == [slice(0, 5), slice(5, 5), slice(5, len(found))]
    assert found.usable[:5].tolist() == [True, False, False, False, True]
    assert list(found.damaged) == ["c"]
    assert found.damaged["c"].startswith("damaged tar")
    assert found.pair[:5].tolist() == [pair_id("a", key) for key in ("k0", "k1", "k2", "k0", "k4")]
    dog, cat, again = (caption_id(caption) for caption in ("a dog", "a cat", "a dog again"))
    assert found.caption[:5].tolist() == [dog, 0, cat, again, dog]
    pictures = [image_id(encode_image(colour)) for colour in (0, 1, 2)]
    assert found.image[:5].tolist() == [pictures[0], pictures[1], 0, pictures[2], pictures[0]]


def test_workers_do_not_matter(faulty_index: CorpusIndex) -> None:
    again = index_corpus(faulty_index.shards, workers=2)
    for name in ("offsets", "pair", "caption", "image", "usable"):
        np.testing.assert_array_equal(getattr(again, name), getattr(faulty_index, name))
    assert again.damaged == faulty_index.damaged
    assert again.fingerprint() == faulty_index.fingerprint()


@pytest.mark.parametrize(
    "changed",
    [
        {"k0": pair(0, "a dog"), "k1": pair(1, "a cow")},
        {"k0": pair(0, "a dog"), "k1": pair(1, "a cat", image=2)},
        {"k0": pair(0, "a dog"), "k2": pair(1, "a cat")},
        {"k1": pair(1, "a cat"), "k0": pair(0, "a dog")},
        {"k0": pair(0, "a dog")},
    ],
)
def test_fingerprint_is_of_the_pairs(tmp_path: Path, changed: dict[str, dict[str, bytes]]) -> None:
    for folder in ("one", "same"):
        write_tar(tmp_path / folder / "a.tar", {"k0": pair(0, "a dog"), "k1": pair(1, "a cat")})
    write_tar(tmp_path / "other" / "a.tar", changed)
    one, same, other = (index(tmp_path / folder).fingerprint() for folder in ("one", "same", "other"))
    assert one == same
    assert one != other


def test_empty_corpus(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {})
    found = index(tmp_path)
    assert (len(found), found.offsets.tolist()) == (0, [0, 0])


@pytest.mark.parametrize("workers", [1, 2])
def test_missing_shard_is_named(corpus: Path, workers: int) -> None:
    shards = find_shards(corpus)
    (corpus / "b.tar").unlink()
    with pytest.raises(NoisycleanError, match=r"b\.tar: cannot open the shard"):
        index_corpus(shards, workers=workers)


class TestIdentity:
    def test_captions_are_equal_but_for_case_and_spacing(self) -> None:
        assert caption_id("A  Dog\n") == caption_id("a dog")
        assert caption_id("STRASSE") == caption_id("straße")
        assert caption_id("a dog") != caption_id("adog")

    def test_shard_and_key_are_kept_apart(self) -> None:
        assert pair_id("a", "bc") != pair_id("ab", "c")

    def test_hashes_never_change(self) -> None:
        """They are in files: another hash would orphan every run."""
        assert pair_id("00000", "000000001") == 3401479183825516954
        assert caption_id("a dog") == -4081912340589182210
        assert image_id(b"\x89PNG") == -1788635086561357317
