"""Scoring a chunk of decoded pairs: one row a sample, readable or not."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from noisyclean.corpus.identity import caption_id, pair_id
from noisyclean.corpus.stream import Chunk
from noisyclean.manifest.schema import PART_SCHEMA, STATISTICS
from noisyclean.scoring.folds import FoldMap
from noisyclean.scoring.reference import ReferenceModel

# The width of a forward pass, whatever the chunk's: matrix products of another shape are rounded otherwise, and a
# pair's score must not depend on how many pairs happened to come with it.
FORWARD = 64


class PairScorer:
    """Scores pairs with the reference model of their fold."""

    def __init__(self, models: Sequence[ReferenceModel], folds: FoldMap | None) -> None:
        """``folds`` says which model scores a pair; None: there is only one model, that trained on none of them."""
        if folds is None and len(models) != 1:
            raise ValueError("several models need a fold map")
        self.models = list(models)
        self.folds = folds

    def fingerprint(self) -> str:
        """A digest of all models, banks and the fold map: equal fingerprints give equal scores."""
        digest = hashlib.blake2b(digest_size=16)
        for model in self.models:
            digest.update(model.fingerprint().encode())
        if self.folds is not None:
            digest.update(self.folds.captions.tobytes() + self.folds.exceptions.tobytes())
        return digest.hexdigest()

    def score(self, chunk: Chunk) -> pa.Table:
        """One row a sample, as :data:`noisyclean.manifest.schema.PART_SCHEMA` has them."""
        samples = chunk.samples
        readable = np.array([sample.fault is None for sample in samples], np.bool_)
        columns = {
            name: pa.array([getattr(sample, name) for sample in samples], PART_SCHEMA.field(name).type)
            for name in ("key", "shard", "index", "uid", "url", "caption", "width", "height", "fault")
        }
        for name, values in self._scores(chunk).items():
            spread = np.zeros(len(samples), values.dtype)
            spread[readable] = values
            columns[name] = pa.array(spread, PART_SCHEMA.field(name).type, mask=~readable)
        return pa.table([columns[name] for name in PART_SCHEMA.names], schema=PART_SCHEMA)

    def _scores(self, chunk: Chunk) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
        readable = chunk.readable()
        captions = np.array([caption_id(sample.caption or "") for sample in readable], np.int64)
        ids = np.array([pair_id(sample.shard, sample.key) for sample in readable], np.int64)
        fold = np.zeros(len(readable), np.int64) if self.folds is None else self.folds.fold_of(captions)
        scores = {name: np.zeros(len(readable), np.float32) for name in (*STATISTICS, "p_value")}
        for k, model in enumerate(self.models):
            (at,) = np.nonzero(fold == k)
            for start in range(0, len(at), FORWARD):
                part = at[start : start + FORWARD]
                statistics = self._forward(model, chunk, part, ids[part])
                for name, values in statistics.items():
                    scores[name][part] = values
        return {"fold": fold, **scores}

    def _forward(
        self, model: ReferenceModel, chunk: Chunk, part: NDArray[np.int64], ids: NDArray[np.int64]
    ) -> dict[str, NDArray[np.float32]]:
        rows = torch.from_numpy(part)
        with model.encoder.inference():
            image = model.encoder.encode_image(_padded(chunk.pixels[rows])).float()
            text = model.encoder.encode_text(_padded(chunk.tokens[rows])).float()
            found = model.bank.score(image, text, np.concatenate([ids, np.repeat(ids[-1:], FORWARD - len(ids))]))
        values = {name: getattr(found, name)[: len(part)].cpu().numpy() for name in STATISTICS}
        return {**values, "p_value": model.bank.p_values(values["match_score"]).astype(np.float32)}


def _padded(batch: Tensor) -> Tensor:
    missing = FORWARD - len(batch)
    return batch if missing == 0 else torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])])
