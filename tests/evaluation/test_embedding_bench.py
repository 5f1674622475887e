"""Mismatches are planted as asked, found by every method and by the split; odd files are refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from torch.nn.functional import normalize

import noisyclean as nc
from noisyclean.errors import UsageError
from noisyclean.evaluation.baselines import clip_score
from noisyclean.evaluation.embedding_bench import (
    METHODS,
    PROTOCOLS,
    bench_embeddings,
    embeddings_markdown,
    load_embeddings,
    plant_mismatches,
)


def make_pairs(size: int, seed: int = 0, width: int = 16) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    image = random.normal(size=(size, width))
    text = image + 0.5 * random.normal(size=(size, width))
    return image.astype(np.float32), text.astype(np.float32)


def unit_text(size: int, seed: int = 0) -> Tensor:
    return normalize(torch.from_numpy(make_pairs(size, seed)[1]).double(), dim=1)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    image, text = make_pairs(60)
    np.savez(tmp_path / "pairs.npz", img=image, txt=text)
    return tmp_path / "pairs.npz"


def test_one_row_a_method_protocol_rate_and_seed(pairs: Path) -> None:
    found, _ = bench_embeddings(pairs, rates=(0.2, 0.5), protocols=PROTOCOLS, seeds=[0], temperature=0.1)
    assert list(found.columns) == ["method", "protocol", "rate", "seed", "auroc", "average_precision"]
    assert len(found) == len(METHODS) * len(PROTOCOLS) * 2
    assert not found.duplicated(["method", "protocol", "rate", "seed"]).any()
    assert set(found["method"]) == set(METHODS)
    assert found[["auroc", "average_precision"]].stack().between(0, 1).all()
    mean = found.groupby(["method", "protocol"])["auroc"].mean()
    for method in METHODS:
        if method != "deep_knn":  # nothing is in groups here
            assert mean[method, "random"] > 0.9
            assert mean[method, "random"] >= mean[method, "near"]


def test_figures_are_sklearns_and_repeat(pairs: Path) -> None:
    found, splits = bench_embeddings(str(pairs), rates=[0.3], protocols=["near"], seeds=[4])
    image, text = load_embeddings(pairs)
    planted = plant_mismatches(text, rate=0.3, protocol="near", seed=4)
    scores = clip_score(image[torch.from_numpy(planted.image)], text[torch.from_numpy(planted.text)], 0.01)
    row = found[found["method"] == "clip_score"].iloc[0]
    assert row["auroc"] == pytest.approx(roc_auc_score(~planted.wrong, scores))
    assert row["average_precision"] == pytest.approx(average_precision_score(planted.wrong, -scores))
    again = bench_embeddings(str(pairs), rates=[0.3], protocols=["near"], seeds=[4])
    assert again.scores.equals(found)
    assert again.splits.equals(splits)


def test_the_split_is_that_of_score(tmp_path: Path) -> None:
    image, text = make_pairs(300)
    np.savez(tmp_path / "pairs.npz", img=image, txt=text)
    _, found = bench_embeddings(
        tmp_path / "pairs.npz", rates=[0.4], protocols=["random-foreign"], seeds=[2], temperature=0.1
    )
    (row,) = found.to_dict("records")
    _, unit = load_embeddings(tmp_path / "pairs.npz")
    planted = plant_mismatches(unit, rate=0.4, protocol="random-foreign", seed=2)
    np.savez(tmp_path / "planted.npz", img=image[planted.image], txt=text[planted.text])
    summary = nc.score(embeddings=tmp_path / "planted.npz", temperature=0.1, out=tmp_path / "out", fdr=0.1)
    assert (row["protocol"], row["rate"], row["seed"], row["planted_noise"]) == ("random-foreign", 0.4, 2, 0.4)
    assert row["estimated_noise"] == summary.estimated_noise
    assert (row["noise_low"], row["noise_high"]) == summary.noise_interval
    assert row["close_noise"] == summary.close_noise
    rows = nc.Manifest(tmp_path / "out").pairs("clean")
    wrong = planted.wrong[rows["index"]]
    assert 0 < wrong.sum() < len(rows) == summary.clean  # else this would say little
    assert row["realised_10"] == wrong.mean()
    assert row["recall_10"] == (~wrong).sum() / (~planted.wrong).sum()
    assert row["kept_10"] == len(rows) / 150
    assert row["kept_1"] < row["kept_5"] < row["kept_10"]


def test_nothing_or_everything_mismatched(tmp_path: Path) -> None:
    image, text = make_pairs(300, width=32)
    np.savez(tmp_path / "pairs.npz", img=image, txt=text)
    found = bench_embeddings(
        tmp_path / "pairs.npz", rates=[0, 1], protocols=["random"], seeds=range(2), temperature=0.05
    )
    assert found.scores[["auroc", "average_precision"]].isna().all(axis=None)
    nothing, everything = (rows for _, rows in found.splits.groupby("rate"))
    assert (nothing["planted_noise"] == 0).all()
    assert (nothing["estimated_noise"] <= 0.02).all()
    assert (nothing["realised_5"] == 0).all()
    assert (nothing["kept_5"] >= 0.97).all()
    assert (nothing["recall_5"] == nothing["kept_5"]).all()
    assert (everything["planted_noise"] == 1).all()
    assert (everything["noise_high"] == 1).all()
    assert (everything["kept_5"] <= 0.01).all()
    assert everything["recall_5"].isna().all()
    lines = embeddings_markdown(found).splitlines()
    assert "## random, AUROC, 2 seeds" in lines
    assert "| match_score | – | – |" in lines
    (none,) = (line.split(" | ") for line in lines if line.startswith("| 0% | "))
    (all_,) = (line.split(" | ") for line in lines if line.startswith("| 100% | "))
    assert none[1] == f"{100 * nothing['estimated_noise'].mean():.1f} ± {100 * nothing['estimated_noise'].std():.1f}"
    assert none[7] == f"{100 * nothing['recall_5'].mean():.1f} ± {100 * nothing['recall_5'].std():.1f}"
    assert all_[7] == "–"


def test_the_table_of_one_seed_has_no_deviations(pairs: Path) -> None:
    found = bench_embeddings(pairs, rates=[0.5], protocols=["random"], seeds=[0], temperature=0.1)
    text = embeddings_markdown(found)
    auroc = found.scores.set_index("method").loc["clip_score", "auroc"]
    assert f"| clip_score | {auroc:.4f} |" in text
    assert f"| 50% | {100 * found.splits['estimated_noise'][0]:.1f} |" in text
    assert "±" not in text
    assert "nan" not in text


@given(size=st.integers(10, 60), rate=st.floats(0, 1), protocol=st.sampled_from(PROTOCOLS), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_as_many_mismatches_as_asked_and_no_others(size: int, rate: float, protocol: Any, seed: int) -> None:
    text = unit_text(size)
    planted = plant_mismatches(text, rate=rate, protocol=protocol, seed=seed)
    scored = size // 2 if protocol.endswith("foreign") else size
    assert len(planted.image) == len(planted.text) == len(set(planted.image)) == scored
    expected = min(max(round(rate * scored), 2), scored - 1)
    assert planted.wrong.sum() == {0: 0, 1: scored}.get(rate, expected)
    taken = planted.text[planted.wrong]
    if protocol.endswith("foreign"):
        assert not set(taken) & set(planted.image)
    if protocol == "random":
        assert sorted(planted.text) == list(range(size))
    if protocol == "near":
        for i, j in zip(planted.image[planted.wrong], taken, strict=True):
            closer = (text @ text[i] > text[j] @ text[i] + 1e-12).sum() - 1  # but for itself
            assert closer < 5


def test_another_seed_rate_or_protocol_plants_otherwise() -> None:
    text = unit_text(60)
    plantings = [
        plant_mismatches(text, rate=rate, protocol=protocol, seed=seed).text.tolist()
        for rate, protocol, seed in [(0.2, "random", 0), (0.2, "random", 1), (0.4, "random", 0), (0.2, "near", 0)]
    ]
    assert all(one != other for n, one in enumerate(plantings) for other in plantings[:n])


@pytest.mark.parametrize("names", [("image", "text"), ("l14_img", "l14_txt"), ("b32_img", "b32_txt")])
def test_known_names_are_found_and_rows_brought_to_length_one(tmp_path: Path, names: tuple[str, str]) -> None:
    image, text = make_pairs(40)
    np.savez(tmp_path / "pairs.npz", **{names[0]: image.astype(np.float16), names[1]: text, "other": np.arange(3)})
    found = load_embeddings(tmp_path / "pairs.npz")
    for side in found:
        assert side.dtype == torch.float64
        torch.testing.assert_close(side.norm(dim=1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(found[1], unit_text(40))


def test_other_names_can_be_given(tmp_path: Path) -> None:
    image, text = make_pairs(40)
    np.savez(tmp_path / "pairs.npz", img=image, txt=image, a=image, b=text)
    torch.testing.assert_close(load_embeddings(tmp_path / "pairs.npz", keys=("a", "b"))[1], unit_text(40))


def test_odd_files_are_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "pairs.npz"

    def refuse(message: str, **arrays: NDArray[Any]) -> None:
        np.savez(path, **arrays)
        with pytest.raises(UsageError, match=message) as caught:
            bench_embeddings(path)
        assert str(path) in str(caught.value)

    image, text = make_pairs(40)
    with pytest.raises(UsageError, match=r"pairs\.npz: no such file"):
        bench_embeddings(path)
    refuse("needs the arrays img and txt or .* but has img, text", img=image, text=text)
    refuse("but has none")
    refuse(r"txt is int64 \[40, 2\]; floats", img=image, txt=np.zeros((40, 2), np.int64))
    refuse(r"img is float32 \[40\]; floats", img=image[:, 0], txt=text)
    refuse(r"img is \[40, 16\] but txt is \[39, 16\]", img=image, txt=text[:-1])
    refuse("31 pairs; at least 32", img=image[:31], txt=text[:31])
    image[3] = 0
    refuse("row 3 of img", img=image, txt=text)
    image, text = make_pairs(40)
    text[7, 2] = np.nan
    refuse("row 7 of txt", img=image, txt=text)
    refuse("txt cannot be read", img=image, txt=np.array([object()] * 40))
    np.savez(path, img=image, txt=text)
    with pytest.raises(UsageError, match="needs the arrays a and b, but has img, txt"):
        bench_embeddings(path, keys=("a", "b"))
    path.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UsageError, match="not an npz"):
        bench_embeddings(path)
    path.write_bytes(b"words")
    with pytest.raises(UsageError, match="not an npz"):
        bench_embeddings(path)
    np.save(tmp_path / "one.npy", image)
    with pytest.raises(UsageError, match="a single array"):
        bench_embeddings(tmp_path / "one.npy")
    with pytest.raises(UsageError, match="not an npz"):
        bench_embeddings(tmp_path)


def test_odd_options_are_refused_in_words(pairs: Path) -> None:
    for options, message in [
        ({"protocols": ["far"]}, "no protocol 'far'; there are random, near"),
        ({"rates": [0.2, 1.5]}, "between 0 and 1: 0.2, 1.5"),
        ({"rates": [float("nan")]}, "between 0 and 1"),
        ({"seeds": [-1]}, "0 or more"),
        ({"temperature": 0.0}, "above 0"),
    ]:
        with pytest.raises(UsageError, match=message):
            bench_embeddings(pairs, **options)  # type: ignore[arg-type]
