"""Rematch suggestions: each noisy pair gets the bank's nearest caption and picture, by name, whatever it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import Listener
from numpy.typing import NDArray
from typer.testing import CliRunner

import noisyclean as nc
from noisyclean.cli import app
from noisyclean.corpus.identity import caption_id
from noisyclean.corpus.index import CorpusIndex
from noisyclean.corpus.source import StreamSource
from noisyclean.encoders import DualEncoder
from noisyclean.errors import UsageError
from noisyclean.manifest.schema import MEASURED, REMATCH
from noisyclean.scoring import window
from noisyclean.scoring.folds import FoldMap
from noisyclean.scoring.reference import ReferenceBank, ReferenceModel, embed
from noisyclean.scoring.run import RunRecord, fold_directory, write_folds, write_record

SUGGESTED = ["best_text_key", "best_text_similarity", "best_image_key", "best_image_similarity"]
ALL_NOISY = 1.0
"""At this rate no pair is clean and every one has a match probability that low."""

Vectors = NDArray[np.floating[Any]]


def embedded_corpus() -> tuple[list[str], list[str], Vectors, Vectors]:
    """Shards of 60 pairs: the captions of every third are permuted, and eight pairs share one caption."""
    random = np.random.default_rng(3)
    image = random.normal(size=(180, 24))
    text = image + 0.4 * random.normal(size=image.shape)
    caption = [f"caption {i}" for i in range(180)]
    text[::3] = np.roll(text[::3], 1, axis=0)
    for i in range(1, 24, 3):
        caption[i], text[i] = "the same", text[1]
    image[10], text[20] = 0, np.nan
    return [f"{i % 60:03d}" for i in range(180)], caption, image, text


KEY, CAPTION, IMAGE, TEXT = embedded_corpus()
NAME = [f"{i // 60}/{key}" for i, key in enumerate(KEY)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("embedded")
    for number in range(3):
        rows = slice(60 * number, 60 * number + 60)
        np.savez(root / f"{number}.npz", img=IMAGE[rows], txt=TEXT[rows])
        pq.write_table(pa.table({"uid": KEY[rows], "caption": CAPTION[rows]}), root / f"{number}.parquet")
    return root


def score(corpus: Path, out: Path, **options: Any) -> pd.DataFrame:
    nc.score(embeddings=corpus, out=out, temperature=0.1, device="cpu", **{"fdr": 0.2, "rematch": True, **options})
    return read(out)


def read(out: Path) -> pd.DataFrame:
    """The manifest by ``shard/key``."""
    rows = nc.Manifest(out).pairs()
    return rows.set_index(rows["shard"] + "/" + rows["key"]).sort_index()


@pytest.fixture(scope="module")
def out(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored") / "out"
    score(corpus, out)
    return out


def unit(vector: Vectors) -> Vectors:
    return vector.astype(np.float64) / np.linalg.norm(vector.astype(np.float64))


def names_in_bank(bank: ReferenceBank, pairs: Iterator[tuple[str, str, Vectors]]) -> dict[int, str]:
    """Place in the bank → ``shard/key``, told by caption and picture, of pairs given as name, caption and image."""
    places = {identity: place for place, identity in enumerate(bank.ids.tolist())}
    found = {}
    for name, caption, image in pairs:
        place = places.get(caption_id(caption), -1)
        if place >= 0 and np.allclose(unit(image), bank.image[place].numpy(), atol=1e-5):
            found[place] = name
    return found


def best(vector: Vectors, side: Vectors, rivals: NDArray[np.bool_]) -> tuple[int, float]:
    similarity = np.where(rivals, side.astype(np.float64) @ unit(vector), -np.inf)
    return int(similarity.argmax()), float(similarity.max())


def check_suggestions(
    row: pd.Series, image: Vectors, text: Vectors, bank: ReferenceBank, names: dict[int, str]
) -> None:
    rivals = bank.ids != caption_id(row["caption"])
    for kind, vector, side in (("text", image, bank.text), ("image", text, bank.image)):
        place, similarity = best(vector, side.numpy(), rivals)
        found = row[f"best_{kind}_key"]
        assert (None if pd.isna(found) else found) == names.get(place), row.name
        assert row[f"best_{kind}_similarity"] == pytest.approx(similarity, abs=1e-5)


class TestEmbedded:
    def test_suggestions_are_the_best_by_brute_force(self, out: Path) -> None:
        bank = ReferenceBank.load(out / "bank.safetensors", encoder="embeddings .npz 0.1")
        readable = [i for i in range(180) if i not in {10, 20}]
        names = names_in_bank(bank, ((NAME[i], CAPTION[i], IMAGE[i]) for i in readable))
        assert len(names) == len(bank) == 178 - 6  # one pair of the seven that share a caption and can be read
        nc.split(out, fdr=ALL_NOISY)
        rows = read(out)
        assert (rows.loc[[NAME[i] for i in readable], "split"] == "noisy").all()
        for i in readable:
            check_suggestions(rows.loc[NAME[i]], IMAGE[i], TEXT[i], bank, names)
        nc.split(out, fdr=0.2)

    def test_permuted_captions_are_found(self, out: Path) -> None:
        rows = read(out)
        noisy = [i for i in range(0, 180, 3) if rows.loc[NAME[i], "split"] == "noisy"]
        assert len(noisy) > 40
        for i in noisy:
            assert rows.loc[NAME[i], "best_text_key"] == NAME[(i + 3) % 180]
            assert rows.loc[NAME[i], "best_image_key"] == NAME[(i - 3) % 180]

    def test_only_noisy_rows_have_them(self, out: Path) -> None:
        rows = read(out)
        noisy = rows["split"] == "noisy"
        assert rows.loc[noisy, SUGGESTED].notna().all(axis=None)
        assert rows.loc[~noisy, SUGGESTED].isna().all(axis=None)
        assert set(rows["split"]) == {"clean", "noisy", "uncertain", "unreadable"}

    def test_another_split_keeps_them(self, out: Path) -> None:
        before = read(out)
        nc.split(out, keep=1.0)
        assert read(out)[SUGGESTED].isna().all(axis=None)
        nc.split(out, fdr=0.2)
        pd.testing.assert_frame_equal(read(out), before)

    def test_without_the_option_there_are_none_and_all_else_is_the_same(
        self, corpus: Path, out: Path, tmp_path: Path
    ) -> None:
        rows = score(corpus, tmp_path / "out", rematch=False)
        others = [name for name in rows if name not in SUGGESTED]
        pd.testing.assert_frame_equal(rows[others], read(out)[others])
        assert rows[SUGGESTED].isna().all(axis=None)
        parts = pd.concat(map(pd.read_parquet, sorted((tmp_path / "out" / "scores").iterdir())))
        assert parts[list(REMATCH)].isna().all(axis=None)
        assert parts[list(MEASURED)].notna().any().all()

    @pytest.mark.parametrize(
        ("first", "said"), [(True, "with --rematch; give it"), (False, "without --rematch; leave")]
    )
    def test_a_change_of_mind_needs_another_out(self, corpus: Path, tmp_path: Path, first: bool, said: str) -> None:
        before = score(corpus, tmp_path, rematch=first)
        with pytest.raises(UsageError, match=f"{tmp_path}: scored {said}"):
            score(corpus, tmp_path, rematch=not first)
        pd.testing.assert_frame_equal(read(tmp_path), before)
        pd.testing.assert_frame_equal(score(corpus, tmp_path, rematch=first), before)

    def test_interrupted_it_goes_on(
        self, corpus: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(window, "PASSES", 2)  # or all pairs wait together until the end
        with pytest.raises(KeyboardInterrupt):
            score(corpus, tmp_path, batch_size=32, progress=Listener("120 pairs"))
        assert len(list((tmp_path / "scores").iterdir())) == 1
        found, expected = score(corpus, tmp_path, batch_size=32), read(out)
        keys = ["best_text_key", "best_image_key"]
        pd.testing.assert_frame_equal(found[keys], expected[keys])

    def test_the_command_line_does_the_same(self, corpus: Path, out: Path, tmp_path: Path) -> None:
        words = ["score", "--embeddings", str(corpus), "--temperature", "0.1", "--device", "cpu", "--fdr", "0.2"]
        done = CliRunner().invoke(app, [*words, "--rematch", "-o", str(tmp_path)])
        assert done.exit_code == 0, done.output
        pd.testing.assert_frame_equal(read(tmp_path), read(out))


@pytest.fixture(scope="module")
def run(
    faulty_corpus: Path, fold_models: list[ReferenceModel], fold_map: FoldMap, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A cross-fitted RUN, with a bank for each fold."""
    run = tmp_path_factory.mktemp("fitted") / "run"
    for fold, model in enumerate(fold_models):
        model.save(fold_directory(run, fold))
    write_folds(run, fold_map, np.zeros(0, np.uint64))
    shards = [str(path) for path in sorted(faulty_corpus.glob("*.tar"))]
    folds = [model.fingerprint() for model in fold_models]
    write_record(run, RunRecord(shards, "", "", 0, folds, 0.0, "cpu", {}, {}))
    return run


Embedded = dict[str, tuple[Vectors, Vectors]]


@pytest.fixture(scope="module")
def embedded(faulty_index: CorpusIndex, fold_models: list[ReferenceModel]) -> Callable[[int], Embedded]:
    """Fold → what its encoder makes of each pair, by ``shard/index``."""
    place = {
        int(offset) + i: f"{shard.name}/{i}"
        for shard, offset, end in zip(
            faulty_index.shards, faulty_index.offsets[:-1], faulty_index.offsets[1:], strict=True
        )
        for i in range(end - offset)
    }
    found = []
    for model in fold_models:
        source = StreamSource(faulty_index, model.encoder.preprocessor, workers=0)
        rows, image, text = embed(model.encoder, source, np.flatnonzero(faulty_index.usable))
        found.append({place[int(row)]: pair for row, *pair in zip(rows, image.numpy(), text.numpy(), strict=True)})
    return found.__getitem__  # type: ignore[return-value]


class TestTars:
    def check(self, rows: pd.DataFrame, models: list[ReferenceBank], embedded: Callable[[int], Embedded]) -> int:
        """Each noisy row against its fold's bank; returns how many suggestions have a name."""
        noisy = rows[rows["split"] == "noisy"]
        for fold, bank in enumerate(models):
            vectors = embedded(fold)
            at = noisy["shard"] + "/" + noisy["index"].astype(str)
            names = names_in_bank(
                bank, ((name, noisy.loc[name, "caption"], vectors[where][0]) for name, where in at.items())
            )
            for name, row in noisy[noisy["fold"] == fold].iterrows():
                check_suggestions(row, *vectors[at[name]], bank, names)
        return int(noisy[["best_text_key", "best_image_key"]].notna().sum().sum())

    def test_each_fold_suggests_from_its_own_bank(
        self, run: Path, fold_models: list[ReferenceModel], embedded: Callable[[int], Embedded], tmp_path: Path
    ) -> None:
        summary = nc.score(model=run, out=tmp_path, fdr=ALL_NOISY, rematch=True, workers=0, device="cpu")
        rows = read(tmp_path)
        assert set(rows["fold"].dropna()) == {0, 1}
        named = self.check(rows, [model.bank for model in fold_models], embedded)
        assert named == 2 * summary.noisy > 300

    def test_a_bank_pair_that_is_not_scored_has_no_name(
        self,
        run: Path,
        faulty_corpus: Path,
        fold_models: list[ReferenceModel],
        embedded: Callable[[int], Embedded],
        tmp_path: Path,
    ) -> None:
        """Some of the fitted shards: similarities are there nonetheless."""
        shard = faulty_corpus / "00004.tar"
        summary = nc.score(shard, model=run, out=tmp_path, fdr=ALL_NOISY, rematch=True, workers=0, device="cpu")
        rows = read(tmp_path)
        named = self.check(rows, [model.bank for model in fold_models], embedded)
        assert 0 < named < 2 * summary.noisy == 140
        assert rows[["best_text_similarity", "best_image_similarity"]].notna().all(axis=None)

    def test_a_bank_drawn_from_the_corpus_names_its_pairs(
        self, faulty_corpus: Path, encoder: DualEncoder, embedded: Callable[[int], Embedded], tmp_path: Path
    ) -> None:
        encoder.save(tmp_path / "encoder")
        options = {"out": tmp_path / "out", "fdr": ALL_NOISY, "rematch": True, "workers": 0, "device": "cpu"}
        summary = nc.score(faulty_corpus, model=tmp_path / "encoder", **options)  # type: ignore[arg-type]
        bank = ReferenceBank.load(tmp_path / "out" / "bank.safetensors", encoder=encoder.fingerprint())
        assert self.check(read(tmp_path / "out"), [bank], embedded) == 2 * summary.noisy
