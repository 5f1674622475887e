"""The frozen reference a pair is scored against: an encoder, its bank of pairs and the bank's null distribution.

A score measured in a batch changes with the shuffle. Against a frozen bank the same pair always gets the same score,
whatever the shard order, the batch size, the number of workers or the machine (ours; see docs of ``noisyclean.srem``).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from noisyclean.calibration import noise_rate, p_values, q_values
from noisyclean.corpus.index import CorpusIndex
from noisyclean.corpus.source import PairSource
from noisyclean.device import moved
from noisyclean.encoders import DualEncoder, Encoder, EncoderEnsemble, create_encoder
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.files import replacing
from noisyclean.manifest.nulls import NEAR_MISS, RANDOM
from noisyclean.progress import SILENT, Progress
from noisyclean.srem import NullScores, PairStatistics, bank_statistics, near_miss_scores, null_scores
from noisyclean.srem.bank import Partners, bank_match_scores, rival_sums

BANK_FORMAT = "3"
NULL_SCORES = 2**17
"""Known mismatches in the null: enough for p-values down to 1e-5."""
MIN_BANK = 16
"""With fewer pairs there is nothing to compare with."""
NEAR_CAPTIONS = 5
"""Captions a picture gets when near misses are made."""
NEAR_MISS_FDR = 0.05


@dataclass(frozen=True)
class ReferenceBank:
    """M embedded pairs and the known mismatches that they give, which scores are compared with.

    Attributes:
        ids: (M,) int64 caption hashes, ascending, all different.
        image, text: (M, d) float32 unit-norm embeddings.
        temperature: τ of the encoder.
        null: (n,) float32 match scores of random mismatches, ascending.
        null_similarity: (n,) float32, their similarities in the same order.
        near: (k,) float32 match scores of near misses, ascending; (0,) where none could be made.
        near_similarity: (k,) float32, their similarities in the same order.
        pairs: (M,) int64 hashes of (shard, key), which tell the bank's pairs from others with their captions; (0,)
            where they need not be told, as in training.
    """

    ids: NDArray[np.int64]
    image: Tensor
    text: Tensor
    temperature: float
    null: NDArray[np.float32]
    null_similarity: NDArray[np.float32]
    near: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    near_similarity: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    pairs: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def build(
        cls,
        ids: NDArray[np.int64],
        image: Tensor,
        text: Tensor,
        temperature: float,
        pairs: NDArray[np.int64] | None = None,
    ) -> ReferenceBank:
        """Order the pairs by caption hash, so that equal pairs make equal banks, and measure the known mismatches.

        Near misses are made of bank pairs that look true, by a q-value of ``NEAR_MISS_FDR`` among the bank's own: the
        caption of a mismatched pair is no near miss of its picture. There are none where fewer than ``MIN_BANK`` do.

        Raises:
            NoisycleanError: fewer than ``MIN_BANK`` pairs.
        """
        if len(ids) < MIN_BANK:
            raise NoisycleanError(f"{len(ids)} readable pairs for a reference bank; at least {MIN_BANK} are needed")
        if not (image.isfinite().all() and text.isfinite().all()):
            raise NoisycleanError("embeddings of the reference bank are not finite: the model's weights are broken")
        order = np.argsort(ids)
        image, text = image[torch.from_numpy(order)], text[torch.from_numpy(order)]
        rivals = rival_sums(image, text, temperature)
        null, null_similarity = _ascending(null_scores(image, text, temperature, rivals, _shifts(len(ids))))
        p = p_values(bank_match_scores(image, text, temperature, rivals).cpu().numpy(), null)
        true = q_values(p, noise_rate(p, null_pairs=len(ids)).estimate) <= NEAR_MISS_FDR
        near = near_similarity = np.zeros(0, np.float32)
        if true.sum() >= MIN_BANK:
            at = torch.from_numpy(np.flatnonzero(true)).to(image.device)
            near, near_similarity = _ascending(near_miss_scores(image, text, temperature, rivals, at, NEAR_CAPTIONS))
        names = np.zeros(0, np.int64) if pairs is None else pairs[order]
        return cls(ids[order], image, text, temperature, null, null_similarity, near, near_similarity, names)

    def __len__(self) -> int:
        return len(self.ids)

    def score(self, image: Tensor, text: Tensor, ids: NDArray[np.int64]) -> PairStatistics:
        """Score B pairs; a bank pair with the same caption, itself or no rival, is masked out.

        Args:
            image, text: (B, d) unit-norm embeddings.
            ids: (B,) int64 caption hashes.
        """
        own = moved(torch.from_numpy(places(self.ids, ids)), image.device)
        return bank_statistics(image, text, self.image, self.text, self.temperature, own)

    def score_and_rematch(self, image: Tensor, text: Tensor, ids: NDArray[np.int64]) -> tuple[PairStatistics, Partners]:
        """As :meth:`score`, with the places of the bank pairs that suit each pair best, what is masked out aside."""
        own = moved(torch.from_numpy(places(self.ids, ids)), image.device)
        return bank_statistics(image, text, self.image, self.text, self.temperature, own, partners=True)

    def places_of(self, ids: NDArray[np.int64], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where B pairs lie in the bank.

        The captions are asked too: shards that were packed anew may hold other pairs under the old names.

        Args:
            ids: (B,) int64 caption hashes.
            pairs: (B,) int64 hashes of (shard, key).

        Returns:
            (B,) int64 places; −1 for a pair that is not in the bank.
        """
        own = places(self.ids, ids)
        return np.where((own >= 0) & (self.pairs[own] == pairs), own, -1)

    def p_values(self, match_score: NDArray[np.float32]) -> NDArray[np.float64]:
        """(B,) match scores → (B,) p-values under this bank's null."""
        return p_values(match_score, self.null)

    def near_miss_p_values(self, match_score: NDArray[np.float32]) -> NDArray[np.float64]:
        """(B,) match scores → (B,) p-values under this bank's near misses; NaN where it has none."""
        return p_values(match_score, self.near) if len(self.near) else np.full(len(match_score), np.nan)

    def mismatches(self) -> pa.Table:
        """The known mismatches behind both kinds of p-value: ``kind``, ``similarity``, ``match_score``, ``p_value``."""
        parts = []
        for kind, similarity, match_score in (
            (RANDOM, self.null_similarity, self.null),
            (NEAR_MISS, self.near_similarity, self.near),
        ):
            p = self.p_values(match_score).astype(np.float32)
            columns = {"similarity": similarity, "match_score": match_score, "p_value": p}
            parts.append(pa.table({"kind": pa.repeat(kind, len(p)), **columns}))
        return pa.concat_tables(parts)

    @property
    def similarity_median(self) -> float:
        """Half of the random mismatches are less similar."""
        return float(np.median(self.null_similarity))

    def to(self, device: torch.device | str) -> ReferenceBank:
        """The bank with its embeddings on ``device``."""
        return replace(self, image=self.image.to(device), text=self.text.to(device))

    def fingerprint(self) -> str:
        """A digest of the bank: equal fingerprints score equal embeddings equally, and name the same pairs."""
        digest = hashlib.blake2b(repr(self.temperature).encode(), digest_size=16)
        for tensor in self._tensors().values():
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path, *, encoder: str) -> None:
        """Write as safetensors; ``encoder`` is the fingerprint of the encoder that made the embeddings."""
        about = {
            "format": BANK_FORMAT,
            "temperature": repr(self.temperature),
            "encoder": encoder,
            "bank": self.fingerprint(),
        }
        with replacing(path) as temporary:
            save_file(self._tensors(), temporary, metadata=about)

    def _tensors(self) -> dict[str, Tensor]:
        """All fields but the temperature, as they are digested and saved."""
        arrays = {
            "ids": self.ids,
            "null": self.null,
            "null_similarity": self.null_similarity,
            "near": self.near,
            "near_similarity": self.near_similarity,
            "pairs": self.pairs,
        }
        return {
            "image": self.image.cpu().contiguous(),
            "text": self.text.cpu().contiguous(),
            **{name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()},
        }

    @classmethod
    def load(cls, path: Path, *, encoder: str) -> ReferenceBank:
        """Read what :meth:`save` wrote.

        Raises:
            UsageError: not such a file, of another version, or it belongs to another encoder.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about["format"] != BANK_FORMAT:
                    raise UsageError(f"{path}: a bank by another version of noisyclean; make it anew")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            sides = {name: tensors.pop(name) for name in ("image", "text")}
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            bank = cls(temperature=float(about["temperature"]), **sides, **arrays)
            intact = about["bank"] == bank.fingerprint()
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path}: not a reference bank that noisyclean wrote ({error})") from error
        if not intact:
            raise UsageError(f"{path}: changed since it was written; make it anew")
        if about.get("encoder") != encoder:
            raise UsageError(f"{path}: this bank belongs to another encoder; fit again, or restore the pair of files")
        return bank


@dataclass(frozen=True)
class BankedEncoder:
    """An encoder with the bank that its pairs are scored against."""

    encoder: Encoder
    bank: ReferenceBank

    def fingerprint(self) -> str:
        """A digest of encoder and bank."""
        return hashlib.blake2b(
            json.dumps([self.encoder.fingerprint(), self.bank.fingerprint()]).encode(), digest_size=16
        ).hexdigest()


@dataclass(frozen=True)
class ReferenceModel(BankedEncoder):
    """What ``fit`` made of a fold: its folder is ``RUN/fold-k``."""

    encoder: DualEncoder

    def to(self, device: torch.device | str) -> ReferenceModel:
        """Encoder and bank on ``device``."""
        return ReferenceModel(self.encoder.to(device), self.bank.to(device))

    def save(self, directory: Path) -> None:
        """Write ``encoder/`` and ``bank.safetensors``."""
        self.encoder.save(directory / "encoder")
        self.bank.save(directory / "bank.safetensors", encoder=self.encoder.fingerprint())

    @classmethod
    def load(cls, directory: Path) -> ReferenceModel:
        """Read what :meth:`save` wrote.

        Raises:
            UsageError: a part is missing, broken, or belongs to another.
        """
        encoder = create_encoder(f"local-dir:{directory / 'encoder'}")
        return cls(encoder, ReferenceBank.load(directory / "bank.safetensors", encoder=encoder.fingerprint()))


def places(known: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """(B,) hashes → (B,) where they are among the ``known`` ones, which ascend; −1 where they are not."""
    at = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.where(known[at] == ids, at, -1)


def _shifts(pairs: int) -> int:
    return math.ceil(NULL_SCORES / pairs)


def _ascending(scores: NullScores) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Match scores in ascending order, and similarities in the order of these."""
    order = scores.match_score.argsort()
    return scores.match_score[order].cpu().numpy(), scores.similarity[order].cpu().numpy()


def draw_bank_rows(index: CorpusIndex, rows: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The rows of smallest pair hash: a random sample that depends on nothing but the pairs' identities.

    No two of them share a caption or a picture, or pairing them with one another would make no known mismatches.

    Args:
        rows: candidate rows of the index.
        size: how many to draw, if there are so many.
    """
    ordered = rows[np.argsort(index.pair[rows].view(np.uint64), kind="stable")]
    for hashes in (index.caption, index.image):
        _, first = np.unique(hashes[ordered], return_index=True)
        ordered = ordered[np.sort(first)]
    return ordered[:size]


Embedded: TypeAlias = tuple[NDArray[np.int64], Tensor, Tensor]
"""Rows (R,) int64, and (R, d) float32 embeddings of images and texts."""


def embed(
    encoder: DualEncoder | EncoderEnsemble,
    source: PairSource,
    rows: NDArray[np.int64],
    *,
    batch_size: int = 256,
    on_batch: Callable[[int], None] | None = None,
) -> Embedded:
    """Embed the pairs of ``rows`` that can be decoded.

    Args:
        on_batch: called with the number of pairs after each batch.

    Returns:
        Their rows (R,) int64, and (R, d) float32 embeddings of images and texts, on the encoder's device.
    """
    kept: list[Tensor] = []
    images: list[Tensor] = []
    texts: list[Tensor] = []
    with encoder.inference():
        for batch in filter(len, source.batches(rows, batch_size)):
            image, text = encoder.encode(batch.pixels, batch.tokens)
            kept.append(batch.rows)
            images.append(image)
            texts.append(text)
            if on_batch is not None:
                on_batch(len(batch))
    if not kept:
        return np.zeros(0, np.int64), torch.empty(0), torch.empty(0)
    return torch.cat(kept).numpy(), torch.cat(images), torch.cat(texts)


def build_bank(
    encoder: DualEncoder | EncoderEnsemble,
    source: PairSource,
    candidates: NDArray[np.int64],
    size: int,
    *,
    progress: Progress = SILENT,
    joined: Callable[[Embedded], Embedded] = lambda own: own,
) -> ReferenceBank:
    """Draw, embed and freeze a bank of ``size`` pairs from the candidate rows.

    Args:
        joined: where several processes each have a part of ``source``: what makes all pairs of one's own.

    Raises:
        NoisycleanError: too few of them can be read.
    """
    drawn = draw_bank_rows(source.index, candidates, size)
    with progress.task("embedding the reference bank", len(drawn), "pairs") as task:
        rows, image, text = joined(embed(encoder, source, drawn, on_batch=task.advance))
    index = source.index
    return ReferenceBank.build(index.caption[rows], image, text, encoder.temperature.item(), index.pair[rows])
