"""Streaming: one row a sample, and a score that depends on the pair and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import encode_noise, read_tar, write_tar
from scipy.special import log_softmax, logsumexp

from noisyclean.corpus.identity import caption_id
from noisyclean.corpus.index import CorpusIndex, index_corpus
from noisyclean.corpus.locate import Shard
from noisyclean.corpus.source import StreamSource
from noisyclean.corpus.stream import stream_chunks
from noisyclean.encoders import DualEncoder
from noisyclean.manifest.schema import PART_SCHEMA, STATISTICS
from noisyclean.scoring import window
from noisyclean.scoring.folds import FoldMap
from noisyclean.scoring.reference import ReferenceModel, embed
from noisyclean.scoring.scorer import ScoredShard, Scorer, ScoringStream


@pytest.fixture(scope="module")
def scorer(fold_models: list[ReferenceModel], fold_map: FoldMap) -> Scorer:
    return Scorer(fold_models, fold_map)


def score(
    scorer: Scorer, shards: Sequence[Shard], *, width: int = 48, chunk_size: int = 20, workers: int = 0
) -> dict[str, ScoredShard]:
    preparer = scorer.models[0].encoder.preprocessor
    stream = ScoringStream(scorer, width)
    scored: list[ScoredShard] = []
    for chunk in stream_chunks(shards, preparer, chunk_size=chunk_size, workers=workers):
        scored.extend(stream.add(chunk))
    scored.extend(stream.finish())
    found = {one.shard: one for one in scored}
    assert len(found) == len(scored), "a shard came out twice"
    return found


def in_order(scored: dict[str, ScoredShard]) -> pa.Table:
    return pa.concat_tables([scored[name].table for name in sorted(scored)])


@pytest.fixture(scope="module")
def scored(scorer: Scorer, faulty_index: CorpusIndex) -> dict[str, ScoredShard]:
    return score(scorer, faulty_index.shards)


def test_one_row_a_sample_in_order(scored: dict[str, ScoredShard], faulty_index: CorpusIndex) -> None:
    assert {name: one.table.num_rows for name, one in scored.items()} == {
        "00000": 60,
        "00001": 0,
        "00002": 47,
        "00003": 2,
        "00004": 70,
        "00005": 8,
    }
    for shard in faulty_index.shards[:-1]:  # the last one is cut off
        table, samples = scored[shard.name].table, read_tar(Path(shard.path))
        assert table.schema == PART_SCHEMA
        assert table["key"].to_pylist() == [sample.key for sample in samples]
        assert table["caption"].to_pylist() == [sample.caption for sample in samples]
        assert table["index"].to_pylist() == list(range(len(samples)))
        assert set(table["shard"].to_pylist()) <= {shard.name}


def test_faults_and_damage(scored: dict[str, ScoredShard]) -> None:
    rows = in_order(scored).to_pandas()
    faults = rows[rows["fault"].notna()]
    assert dict(zip(faults["shard"] + "/" + faults["index"].astype(str), faults["fault"], strict=True)) == {
        "00000/7": "truncated PNG",
        "00000/11": "no caption",
        "00000/20": "not a picture",
        "00002/0": "no caption",
        "00002/46": "truncated PNG",
        "00003/0": "truncated PNG",
        "00003/1": "no caption",
        "00005/7": "cut off with its shard",
    }
    measured = ["fold", *STATISTICS, "p_value"]
    assert faults[measured].isna().all(axis=None)
    readable = rows[rows["fault"].isna()]
    assert readable[measured].notna().all(axis=None)
    assert (readable["width"] == 24).all()
    assert (readable["height"] == 20).all()
    damage = {name: one.damage for name, one in scored.items() if one.damage is not None}
    assert list(damage) == ["00005"]
    assert damage["00005"].startswith("damaged tar")


def test_pairs_go_to_the_model_of_their_fold(scored: dict[str, ScoredShard], fold_map: FoldMap) -> None:
    rows = in_order(scored).to_pandas().dropna(subset="fold")
    captions = np.array([caption_id(caption) for caption in rows["caption"]])
    np.testing.assert_array_equal(rows["fold"], fold_map.fold_of(captions))
    assert set(rows["fold"]) == {0, 1}


def test_scores_are_those_of_the_formulas(
    scored: dict[str, ScoredShard], faulty_index: CorpusIndex, fold_models: list[ReferenceModel]
) -> None:
    """Each pair by itself, in float64 numpy, from its embeddings and the bank of its fold."""
    source = StreamSource(faulty_index, fold_models[0].encoder.preprocessor, workers=0)
    embedded = []
    for model in fold_models:
        rows, image, text = embed(model.encoder, source, np.flatnonzero(faulty_index.usable))
        embedded.append({int(row): pair for row, *pair in zip(rows, image.numpy(), text.numpy(), strict=True)})
    table = in_order(scored)
    found = np.column_stack([table[name].to_numpy() for name in (*STATISTICS, "p_value")])
    expected = np.full_like(found, np.nan, dtype=np.float64)
    for row, one in enumerate(table.select(["caption", "fold"]).to_pylist()):
        if (fold := one["fold"]) is not None:
            identity = caption_id(one["caption"])
            expected[row] = reference_scores(*embedded[fold][row], identity, fold_models[fold])
    statistics = len(STATISTICS)
    np.testing.assert_allclose(found[:, :statistics], expected[:, :statistics], atol=5e-5)
    # One score of the null more or less may lie within rounding of the pair's own.
    np.testing.assert_allclose(found[:, statistics], expected[:, statistics], atol=3e-3)


def reference_scores(image: np.ndarray, text: np.ndarray, identity: int, model: ReferenceModel) -> list[float]:
    bank = model.bank
    image, text = image.astype(np.float64), text.astype(np.float64)
    rivals = bank.ids != identity
    similarity = image @ text
    image_logits = np.append(bank.text.numpy().astype(np.float64)[rivals] @ image, similarity) / bank.temperature
    text_logits = np.append(bank.image.numpy().astype(np.float64)[rivals] @ text, similarity) / bank.temperature
    log_p, log_r = log_softmax(image_logits), log_softmax(text_logits)
    energies = [-bank.temperature * logsumexp(logits) for logits in (image_logits, text_logits)]
    match_score = log_p[-1] + log_r[-1]
    statistics = {
        "similarity": similarity,
        "energy_image": energies[0],
        "energy_text": energies[1],
        "energy": np.mean(energies),
        "swapped_entropy": -(np.exp(log_p) @ log_r + np.exp(log_r) @ log_p) / 2,
        "match_score": match_score,
    }
    p_value = (1 + np.sum(bank.null >= match_score)) / (1 + len(bank.null))
    return [*(statistics[name] for name in STATISTICS), p_value]


@pytest.mark.parametrize(
    ("width", "chunk_size", "workers", "backwards"),
    [
        (32, 20, 0, False),
        (64, 20, 0, True),
        (100, 7, 0, False),
        (48, 1000, 0, True),
        (48, 1, 1, False),
        (64, 16, 2, False),
        (32, 33, 2, True),
    ],
)
def test_scores_do_not_depend_on_the_way_pairs_come(
    scorer: Scorer,
    faulty_index: CorpusIndex,
    scored: dict[str, ScoredShard],
    width: int,
    chunk_size: int,
    workers: int,
    backwards: bool,
) -> None:
    shards = faulty_index.shards[::-1] if backwards else faulty_index.shards
    found = in_order(score(scorer, shards, width=width, chunk_size=chunk_size, workers=workers))
    expected = in_order(scored)
    exact = [name for name in PART_SCHEMA.names if name not in {*STATISTICS, "p_value"}]
    assert found.select(exact) == expected.select(exact)
    for name in STATISTICS:
        np.testing.assert_allclose(found[name].to_numpy(), expected[name].to_numpy(), atol=1e-5, err_msg=name)
    np.testing.assert_allclose(found["p_value"].to_numpy(), expected["p_value"].to_numpy(), atol=3e-3)


def test_same_way_same_bits(scorer: Scorer, faulty_index: CorpusIndex, scored: dict[str, ScoredShard]) -> None:
    assert in_order(score(scorer, faulty_index.shards)) == in_order(scored)


def test_shards_come_out_as_soon_as_they_are_scored(
    scorer: Scorer, faulty_index: CorpusIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory stays bounded: what is read is not held until the end."""
    monkeypatch.setattr(window, "PASSES", 1)
    stream = ScoringStream(scorer, width=8)
    preparer = scorer.models[0].encoder.preprocessor
    held = []
    read: set[str] = set()
    written: set[str] = set()
    for chunk in stream_chunks(faulty_index.shards, preparer, chunk_size=10, workers=0):
        written |= {one.shard for one in stream.add(chunk)}
        if chunk.last:
            read.add(chunk.shard)
            held.append(len(read - written))
    # At most 7 pairs of either fold wait: those of the shard that was just read and, if it was a short one, of another.
    assert max(held) <= 2
    assert written | {one.shard for one in stream.finish()} == read


def test_fingerprint_names_models_and_folds(fold_models: list[ReferenceModel], fold_map: FoldMap) -> None:
    scorer = Scorer(fold_models, fold_map)
    others = [
        Scorer(fold_models[::-1], fold_map),
        Scorer(fold_models, FoldMap(2, np.array([1]), np.array([0]))),
        Scorer(fold_models[:1], None),
    ]
    assert scorer.fingerprint() == Scorer(fold_models, fold_map).fingerprint()
    assert len({scorer.fingerprint(), *(one.fingerprint() for one in others)}) == 4


def test_several_models_need_folds(fold_models: list[ReferenceModel]) -> None:
    with pytest.raises(ValueError, match="fold map"):
        Scorer(fold_models, None)


def test_a_repeated_picture_or_caption_is_embedded_once(
    scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scorer.models[0]
    shards = [Shard("repeats", str(tmp_path / "repeats.tar"))]
    write_tar(
        tmp_path / "repeats.tar",
        [(f"{i:03d}", {"png": encode_noise(i % 40), "txt": f"caption {i % 30}".encode()}) for i in range(120)],
    )
    alone = score(Scorer([model], None), shards, width=32)
    seen: dict[str, list[int]] = {"encode_image": [], "encode_text": []}
    for name, rows in seen.items():
        encode = getattr(DualEncoder, name)

        def counted(self: DualEncoder, inputs: torch.Tensor, encode: Any = encode, rows: list[int] = rows) -> Any:
            rows.append(len(inputs))
            return encode(self, inputs)

        monkeypatch.setattr(DualEncoder, name, counted)
    table = score(Scorer([model], None), shards, width=32)["repeats"].table
    assert seen == {"encode_image": [32, 32], "encode_text": [32]}
    assert table.equals(alone["repeats"].table)
    monkeypatch.undo()
    source = StreamSource(index_corpus(shards, workers=0), model.encoder.preprocessor, workers=0)
    rows, image, text = embed(model.encoder, source, np.arange(120))
    assert rows.tolist() == list(range(120))
    np.testing.assert_allclose(table["similarity"].to_numpy(), (image * text).sum(dim=1).numpy(), atol=1e-6)
