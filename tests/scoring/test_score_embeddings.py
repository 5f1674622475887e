"""Pairs that come embedded are scored by the same formulas as all others, and saved embeddings give the same scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import Listener
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy.special import log_softmax
from typer.testing import CliRunner

import noisyclean as nc
from noisyclean.cli import app
from noisyclean.corpus.identity import caption_id
from noisyclean.encoders import DualEncoder
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.manifest.schema import STATISTICS
from noisyclean.scoring import window
from noisyclean.scoring.folds import FoldMap
from noisyclean.scoring.reference import ReferenceModel
from noisyclean.scoring.run import RunRecord, fold_directory, write_folds, write_record

PAIRS = 150
TEMPERATURE = 0.1
MEASURED = [*STATISTICS, "p_value"]


def make_pairs() -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Every third pair is mismatched; two rows are no embeddings."""
    random = np.random.default_rng(5)
    image = random.normal(size=(PAIRS, 16))
    text = image + 0.5 * random.normal(size=image.shape)
    text[::3] = np.roll(text[::3], 1, axis=0)
    image[10], text[20] = 0, np.nan
    return image.astype(np.float16), text.astype(np.float16)


IMAGE, TEXT = make_pairs()
CAPTIONS = [f"caption {i}" for i in range(PAIRS)]
KEYS = [f"{i:05d}" for i in range(PAIRS)]


def write_npz(root: Path, *, per_file: int = PAIRS) -> Path:
    root.mkdir(exist_ok=True)
    for number, first in enumerate(range(0, PAIRS, per_file)):
        rows = slice(first, first + per_file)
        np.savez(root / f"{number}.npz", img=IMAGE[rows], txt=TEXT[rows])
        pq.write_table(pa.table({"uid": KEYS[rows], "caption": CAPTIONS[rows]}), root / f"{number}.parquet")
    return root


def write_clip_retrieval(root: Path) -> Path:
    for side, vectors in (("img", IMAGE), ("text", TEXT)):
        (root / f"{side}_emb").mkdir(parents=True)
        np.save(root / f"{side}_emb" / f"{side}_emb_0.npy", vectors)
    (root / "metadata").mkdir()
    pq.write_table(pa.table({"image_path": KEYS, "caption": CAPTIONS}), root / "metadata" / "metadata_0.parquet")
    return root


def write_table(root: Path) -> Path:
    root.mkdir()
    vectors = {
        f"{name}_embedding": pa.array([list(row) for row in side], pa.list_(pa.float16()))
        for name, side in (("image", IMAGE), ("text", TEXT))
    }
    pq.write_table(pa.table({"key": KEYS, "text": CAPTIONS, **vectors}), root / "0.parquet", row_group_size=40)
    return root


def score(path: Path, out: Path, **options: Any) -> pd.DataFrame:
    nc.score(embeddings=path, out=out, temperature=TEMPERATURE, device="cpu", **options)
    return read_scores(out)


def read_scores(out: Path) -> pd.DataFrame:
    parts = [pd.read_parquet(path) for path in sorted((out / "scores").rglob("*.parquet"))]
    return pd.concat(parts).set_index("key").sort_index()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("embedded") / "corpus")


@pytest.fixture(scope="module")
def out(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored") / "out"
    score(corpus, out)
    return out


def test_every_row_has_its_place_and_mismatches_are_seen(out: Path) -> None:
    summary = nc.Manifest(out).summary
    assert summary.pairs == PAIRS
    assert summary.clean + summary.noisy + summary.uncertain == PAIRS - 2
    unreadable = nc.Manifest(out).pairs("unreadable").set_index("key")["reason"].to_dict()
    assert unreadable == {
        "00010": "image embedding is zero",
        "00020": "text embedding is missing or not finite",
    }
    rows = nc.Manifest(out).pairs()
    assert sorted(rows["key"]) == KEYS
    rank = rows.dropna(subset="rank").set_index("key")["rank"]
    wrong = rank.index.astype(int) % 3 == 0
    assert rank[wrong].min() > np.quantile(rank[~wrong], 0.9)


def test_scores_are_those_of_the_formulas(out: Path) -> None:
    """Each pair by itself, in float64 numpy, from its embeddings and the bank."""
    bank = load_file(out / "bank.safetensors")
    found = read_scores(out)
    compared = 0
    for i, (key, row) in enumerate(found.iterrows()):
        assert key == KEYS[i]
        if pd.notna(row["fault"]):
            continue
        image, text = (
            side[i].astype(np.float64) / np.linalg.norm(side[i].astype(np.float64)) for side in (IMAGE, TEXT)
        )
        rivals = bank["ids"] != caption_id(CAPTIONS[i])
        similarity = image @ text
        log_p, log_r = (
            log_softmax(np.append(side[rivals].astype(np.float64) @ own, similarity) / TEMPERATURE)
            for side, own in ((bank["text"], image), (bank["image"], text))
        )
        assert row["similarity"] == pytest.approx(similarity, abs=1e-6)
        assert row["match_score"] == pytest.approx(log_p[-1] + log_r[-1], abs=5e-5)
        assert row["swapped_entropy"] == pytest.approx(-(np.exp(log_p) @ log_r + np.exp(log_r) @ log_p) / 2, abs=5e-5)
        reached = 1 + (bank["null"] >= row["match_score"]).sum()
        assert row["p_value"] == pytest.approx(reached / (1 + len(bank["null"])), abs=1e-4)
        compared += 1
    assert compared == PAIRS - 2


@pytest.mark.parametrize("write", [write_clip_retrieval, write_table])
def test_every_layout_gives_the_same_scores(tmp_path: Path, out: Path, write: Callable[[Path], Path]) -> None:
    found = score(write(tmp_path / "corpus"), tmp_path / "out")
    expected = read_scores(out)
    assert found["fault"].tolist() == expected["fault"].tolist()
    assert found["caption"].tolist() == CAPTIONS
    pd.testing.assert_frame_equal(found[MEASURED], expected[MEASURED], rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [32, 37, None])
def test_scores_do_not_depend_on_files_or_passes(
    corpus: Path, out: Path, tmp_path: Path, batch_size: int | None
) -> None:
    """The bank is copied, since which pairs it holds depends on the names of the files."""
    write_npz(tmp_path / "corpus", per_file=40)
    expected = read_scores(out)
    (tmp_path / "out").mkdir()
    shutil.copy(out / "bank.safetensors", tmp_path / "out")
    found = score(tmp_path / "corpus", tmp_path / "out", batch_size=batch_size)
    assert sorted(path.name for path in (tmp_path / "out" / "scores").iterdir()) == [f"{i}.parquet" for i in range(4)]
    pd.testing.assert_frame_equal(found[MEASURED], expected[MEASURED], rtol=0, atol=1e-5)


def test_only_what_is_left_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "PASSES", 1)  # else all of these pairs are scored together, at the end
    corpus, out = write_npz(tmp_path / "corpus", per_file=50), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        score(corpus, out, batch_size=32, progress=Listener("100 pairs"))
    assert sorted(path.name for path in (out / "scores").iterdir()) == ["0.parquet"]
    first = (out / "scores" / "0.parquet").stat().st_mtime_ns
    listener = Listener()
    interrupted = score(corpus, out, batch_size=32, progress=listener)
    assert listener.said == ["1 of 3 shards are scored already"]
    assert (out / "scores" / "0.parquet").stat().st_mtime_ns == first
    whole = score(corpus, tmp_path / "whole", batch_size=32)
    pd.testing.assert_frame_equal(interrupted[MEASURED], whole[MEASURED], rtol=0, atol=1e-5)

    pq.write_table(pa.table({"uid": KEYS[:50], "caption": ["another"] * 50}), corpus / "0.parquet")
    # Nothing says whether the vectors beside the new captions are still by the model that the bank is of.
    with pytest.raises(UsageError, match=r"0\.npz: changed since .*; give another folder"):
        score(corpus, out)


def test_pairs_without_captions_are_scored(tmp_path: Path) -> None:
    np.savez(tmp_path / "0.npz", img=IMAGE, txt=TEXT)
    found = score(tmp_path / "0.npz", tmp_path / "out")
    assert found["caption"].isna().all()
    assert found["match_score"].notna().sum() == PAIRS - 2


def test_another_temperature_or_width_needs_another_out(corpus: Path, out: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"another model \(embeddings at temperature 0.1\); give another folder"):
        nc.score(embeddings=corpus, out=out, temperature=0.2)
    shutil.copytree(out, tmp_path / "out")
    shutil.copytree(corpus, tmp_path / "corpus")
    np.savez(tmp_path / "corpus" / "0.npz", img=IMAGE[:, :4], txt=TEXT[:, :4])
    with pytest.raises(UsageError, match=r"0\.npz: changed since"):
        score(tmp_path / "corpus", tmp_path / "out")
    np.savez(tmp_path / "corpus" / "new.npz", img=IMAGE[:, :4], txt=TEXT[:, :4])
    shutil.copy2(corpus / "0.npz", tmp_path / "corpus" / "0.npz")
    with pytest.raises(UsageError, match="embeddings of width 4, all others have 16"):
        score(tmp_path / "corpus", tmp_path / "out")


def test_too_few_pairs_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", img=IMAGE[:8], txt=TEXT[:8])
    with pytest.raises(NoisycleanError, match="8 readable pairs for a reference bank"):
        score(tmp_path / "a.npz", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embeddings": "x", "shards": "y"}, "leave out SHARDS"),
        ({"embeddings": "x", "model": "y"}, "leave out --model"),
        ({"embeddings": "x", "save_embeddings": "y"}, "leave out --save-embeddings"),
        ({"embeddings": "x", "temperature": 0.0}, "a number above 0"),
        ({"embeddings": "x", "temperature": float("nan")}, "a number above 0"),
        ({"shards": "x", "temperature": 0.1}, "--temperature goes with --embeddings"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        nc.score(out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def saved(faulty_corpus: Path, encoder: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder, scores by it and the embeddings that were saved."""
    home = tmp_path_factory.mktemp("saved")
    encoder.save(home / "encoder")
    score_and_save(faulty_corpus, home)
    return home


def score_and_save(corpus: Path, home: Path, **options: Any) -> None:
    place = {"out": home / "out", "save_embeddings": home / "embedded", "workers": 0, "device": "cpu"}
    nc.score(corpus, model=home / "encoder", **{**place, **options})


def test_saved_embeddings_are_those_of_the_readable_pairs(saved: Path) -> None:
    names = [f"{i:05d}" for i in range(6)]
    assert sorted(path.name for path in (saved / "embedded").iterdir()) == sorted(
        f"{name}.{suffix}" for name in names for suffix in ("npz", "parquet")
    )
    for name in names:
        scored = pd.read_parquet(saved / "out" / "scores" / f"{name}.parquet")
        readable = scored[scored["fault"].isna()]
        described = pd.read_parquet(saved / "embedded" / f"{name}.parquet")
        assert described["key"].tolist() == readable["key"].tolist()
        assert described["index"].tolist() == readable["index"].tolist()
        assert described["caption"].tolist() == readable["caption"].tolist()
        arrays = np.load(saved / "embedded" / f"{name}.npz")
        assert arrays["img"].dtype == arrays["txt"].dtype == np.float16
        similarity = (arrays["img"].astype(np.float64) * arrays["txt"]).sum(axis=1)
        np.testing.assert_allclose(similarity, readable["similarity"], atol=1e-3)


def test_saved_embeddings_give_the_same_scores(saved: Path, tmp_path: Path) -> None:
    nc.score(embeddings=saved / "embedded", out=tmp_path / "again", device="cpu")  # the temperature is recorded
    found, first = read_scores(tmp_path / "again"), read_scores(saved / "out")
    first = first[first["fault"].isna()]
    assert found.index.tolist() == first.index.tolist()
    assert found["shard"].tolist() == first["shard"].tolist()
    bank, again = load_file(saved / "out" / "bank.safetensors"), load_file(tmp_path / "again" / "bank.safetensors")
    assert bank["ids"].tolist() == again["ids"].tolist()
    # float16 moves a similarity by up to 5e-4, and a logit by that over the temperature of 0.05.
    pd.testing.assert_frame_equal(found[["similarity"]], first[["similarity"]], rtol=0, atol=1e-3)
    pd.testing.assert_frame_equal(found[["match_score"]], first[["match_score"]], rtol=0, atol=0.02)


def test_a_shard_is_done_only_when_both_are_there(saved: Path, faulty_corpus: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(saved, home)
    (home / "embedded" / "00002.npz").unlink()
    (home / "out" / "scores" / "00004.parquet").unlink()
    listener = Listener()
    score_and_save(faulty_corpus, home, progress=listener)
    assert listener.said == ["4 of 6 shards are scored already"]
    assert (home / "embedded" / "00002.npz").is_file()
    pd.testing.assert_frame_equal(read_scores(home / "out"), read_scores(saved / "out"), rtol=0, atol=1e-5)


def test_what_lies_in_the_way_is_not_overwritten(saved: Path, faulty_corpus: Path, tmp_path: Path) -> None:
    sidecar = tmp_path / "shards" / "00003.parquet"
    shutil.copytree(faulty_corpus, tmp_path / "shards")
    pq.write_table(pa.table({"key": ["img2dataset's"]}), sidecar)
    with pytest.raises(UsageError, match="in the way of the embeddings"):
        score_and_save(faulty_corpus, saved, save_embeddings=tmp_path / "shards", out=tmp_path / "out")
    assert pq.read_table(sidecar)["key"].to_pylist() == ["img2dataset's"]


def test_embeddings_of_several_models_are_not_mixed(
    saved: Path, faulty_corpus: Path, fold_models: list[ReferenceModel], fold_map: FoldMap, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "home")
    fold_models[1].encoder.save(tmp_path / "home" / "encoder")
    with pytest.raises(UsageError, match="holds embeddings by another model"):
        score_and_save(faulty_corpus, tmp_path / "home", out=tmp_path / "out")

    run = tmp_path / "run"
    for fold, model in enumerate(fold_models):
        model.save(fold_directory(run, fold))
    write_folds(run, fold_map, np.zeros(0, np.uint64))
    folds = [model.fingerprint() for model in fold_models]
    write_record(
        run,
        RunRecord([str(path) for path in sorted(faulty_corpus.glob("*.tar"))], "", "", 0, folds, 0.0, "cpu", {}, {}),
    )
    with pytest.raises(UsageError, match=f"name one of them: -m {run}/fold-0/encoder"):
        nc.score(model=run, out=tmp_path / "refused", save_embeddings=tmp_path / "embedded")
    assert not (tmp_path / "refused").exists()
    nc.score(
        faulty_corpus / "00000.tar",
        model=run / "fold-0" / "encoder",
        out=tmp_path / "one",
        save_embeddings=tmp_path / "embedded",
        workers=0,
    )
    assert len(list((tmp_path / "embedded").glob("*.npz"))) == 1


def test_the_command_line_does_the_same(corpus: Path, out: Path, tmp_path: Path) -> None:
    words = ["score", "--embeddings", str(corpus), "--temperature", str(TEMPERATURE), "--device", "cpu", "--json"]
    done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout[done.stdout.index("{") :])["pairs"] == PAIRS
    pd.testing.assert_frame_equal(read_scores(tmp_path / "out"), read_scores(out))
