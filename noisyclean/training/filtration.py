"""Which pairs count as clean in the next epoch.

By default each pair is judged by the model that does not train on it. This is where self-reinforcing errors are cut: a
model that has learned a mismatch scores it well, and would keep learning it; the model of the other fold has never seen
it (ours; docs/method.md, section 2). The in-sample filters are there to be compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from noisyclean.calibration import NoiseRate, match_probability, noise_rate, q_values
from noisyclean.corpus.source import PairSource
from noisyclean.encoders import DualEncoder
from noisyclean.objectives import clean_posterior
from noisyclean.recipe import NcrObjective, SremObjective
from noisyclean.scoring.reference import ReferenceBank, draw_bank_rows, embed
from noisyclean.srem import PairStatistics, match_score, pair_logits

FILTER_BATCH = 256


@dataclass(frozen=True)
class Filtered:
    """What one model says of some pairs.

    Attributes:
        rows: (R,) int64 rows of the index.
        weight: (R,) float32 in [0, 1], how clean each pair is held to be.
        noise: the estimated share of mismatches among them; None where the filter has no null to tell it by.
        image, text: (R, d) float16 embeddings, if they were asked for.
    """

    rows: NDArray[np.int64]
    weight: NDArray[np.float32]
    noise: NoiseRate | None = None
    image: Tensor | None = None
    text: Tensor | None = None


@dataclass(frozen=True)
class Judged:
    """Pairs scored against a bank that was drawn from among them.

    Attributes:
        rows: (R,) int64 rows of the index.
        scores: six (R,) statistics.
        image, text: (R, d) embeddings, if they were asked for.
        bank: the bank.
    """

    rows: NDArray[np.int64]
    scores: PairStatistics
    bank: ReferenceBank
    image: Tensor | None
    text: Tensor | None


def judge(
    encoder: DualEncoder,
    source: PairSource,
    rows: NDArray[np.int64],
    bank_size: int,
    *,
    keep_embeddings: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Judged:
    """Score pairs as ``score`` does, against a bank drawn from themselves. Each pair is embedded once.

    Memory: the bank and six numbers a pair, unless the embeddings are kept, in half precision.

    Args:
        rows: rows of the index.
        bank_size: pairs wanted in the bank.
        on_batch: called with the number of pairs after each batch.

    Raises:
        NoisycleanError: too few pairs can be read.
    """
    index = source.index
    drawn = draw_bank_rows(index, rows, bank_size)
    found, image, text = embed(encoder, source, drawn, batch_size=FILTER_BATCH, on_batch=on_batch)
    bank = ReferenceBank.build(index.caption[found], image, text, encoder.temperature.item())
    kept_rows: list[NDArray[np.int64]] = []
    scores: list[PairStatistics] = []
    images: list[Tensor] = []
    texts: list[Tensor] = []

    def add(at: NDArray[np.int64], image: Tensor, text: Tensor) -> None:
        kept_rows.append(at)
        scores.append(PairStatistics(*(one.cpu() for one in bank.score(image, text, index.caption[at]))))
        if keep_embeddings:
            images.append(image.half().cpu())
            texts.append(text.half().cpu())

    add(found, image, text)
    with encoder.inference():
        for batch in source.batches(np.setdiff1d(rows, drawn), FILTER_BATCH):
            add(batch.rows.numpy(), *encoder.encode(batch.pixels, batch.tokens))
            if on_batch is not None:
                on_batch(len(batch))
    return Judged(
        np.concatenate(kept_rows),
        PairStatistics(*(torch.cat(parts) for parts in zip(*scores, strict=True))),
        bank,
        torch.cat(images) if keep_embeddings else None,
        torch.cat(texts) if keep_embeddings else None,
    )


def srem_filter(judged: Judged, recipe: SremObjective) -> Filtered:
    """SREM's weights: by the shuffled null, or by a mixture of two components.

    The match probability, 1 − local false discovery rate, is the default; see :mod:`noisyclean.calibration`.
    """
    p = judged.bank.p_values(judged.scores.match_score.numpy())
    noise = noise_rate(p, null_pairs=len(judged.bank))
    match recipe.threshold:
        case "posterior":
            weight = match_probability(p, noise.estimate)
        case "q_value":
            weight = (q_values(p, noise.estimate) <= recipe.filter_fdr).astype(np.float64)
        case "mixture":
            worse = judged.scores.energy if recipe.statistic == "energy" else -getattr(judged.scores, recipe.statistic)
            weight = clean_posterior(worse.numpy(), "gaussian")
        case _:  # selected within the batch
            weight = np.ones(len(p))
    return Filtered(judged.rows, weight.astype(np.float32), noise, judged.image, judged.text)


def ncr_filter(
    encoder: DualEncoder,
    source: PairSource,
    rows: NDArray[np.int64],
    batch_size: int,
    recipe: NcrObjective,
    *,
    seed: int,
    on_batch: Callable[[int], None] | None = None,
) -> Filtered:
    """NCR's selection: pairs of which a mixture over in-batch losses says that they are rather clean than not.

    Args:
        rows: the pairs that the model trains on (in-sample) or that its peer does.
        batch_size: pairs that are classified together, as in training.
        seed: of the order of the pairs.
    """
    kept: list[NDArray[np.int64]] = []
    losses: list[NDArray[np.float32]] = []
    with encoder.inference():
        for batch in source.batches(rows, batch_size, shuffle=seed):
            image, text = encoder.encode(batch.pixels, batch.tokens)
            kept.append(batch.rows.numpy())
            score = match_score(pair_logits(image, text, encoder.temperature))
            losses.append((-score / 2).cpu().numpy())
            if on_batch is not None:
                on_batch(len(batch))
    clean = clean_posterior(np.concatenate(losses), recipe.mixture) > 0.5
    return Filtered(np.concatenate(kept), clean.astype(np.float32))


class OutOfFoldTeacher:
    """The predictions of the models that never saw the pairs, from embeddings kept when these were judged.

    Models of different folds do not share a space: between pairs of different folds there is no prediction.

    Attributes:
        state: what it has learned, tensors that travel in the checkpoint: the embeddings, 2d half-precision numbers a
            pair, and where each row's are. Empty before it has learned anything.
    """

    def __init__(self, fold: NDArray[np.int64]) -> None:
        """``fold``: (N,) over the index."""
        self._fold = torch.from_numpy(fold)
        self.state: dict[str, Tensor] = {}

    def learn(self, filtered: list[Filtered], temperatures: list[float]) -> None:
        """Take over what the models of all folds now think."""
        rows = torch.cat([torch.from_numpy(one.rows) for one in filtered])
        place = torch.full_like(self._fold, -1)
        place[rows] = torch.arange(len(rows))
        self.state = {
            "place": place,
            "image": torch.cat([one.image for one in filtered if one.image is not None]),
            "text": torch.cat([one.text for one in filtered if one.text is not None]),
            "temperature": torch.tensor(temperatures),
        }

    def logits(self, rows: Tensor) -> Tensor:
        """(B,) rows → (B, B) logits; −inf between folds."""
        at, fold = self.state["place"][rows], self._fold[rows]
        similarity = self.state["image"][at].float() @ self.state["text"][at].float().T
        same = fold[:, None] == fold[None, :]
        return (similarity / self.state["temperature"][fold][:, None]).masked_fill(~same, -torch.inf)
