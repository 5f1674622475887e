"""Which pairs count as clean in the next epoch.

By default each pair is judged by the model that does not train on it. This is where self-reinforcing errors are cut: a
model that has learned a mismatch scores it well, and would keep learning it; the model of the other fold has never seen
it (ours; docs/method.md, section 2). The in-sample filters are there to be compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from noisyclean.calibration import NoiseRate, information, match_probability, noise_rate, p_values, q_values
from noisyclean.corpus.source import PairSource
from noisyclean.encoders import DualEncoder
from noisyclean.objectives import clean_posterior
from noisyclean.recipe import NcrObjective, SremObjective
from noisyclean.scoring.reference import MIN_BANK, ReferenceBank, draw_bank_rows, embed
from noisyclean.srem import PairStatistics, match_score
from noisyclean.training.distributed import ALONE, World
from noisyclean.training.neighbourhood import LEAST_PROBABILITY, Neighbourhood

FILTER_BATCH = 256
FOLD_BANK_SHARE = 0.25
"""The largest share of a fold's pairs that its bank takes: more cost more time and judge no better (measured on 10,000
icons: AUROC .8486 with a quarter, a half and all)."""
NEIGHBOUR_POOL = 2**15
"""So many of the pairs that are judged together are asked about pairs like them: more are nearer, and take longer."""


@dataclass(frozen=True)
class Filtered:
    """What one model says of some pairs.

    Attributes:
        rows: (R,) int64 rows of the index.
        weight: (R,) float32 in [0, 1], how clean each pair is held to be.
        noise: the estimated share of mismatches among them; None where the filter has no null to tell it by.
    """

    rows: NDArray[np.int64]
    weight: NDArray[np.float32]
    noise: NoiseRate | None = None


@dataclass(frozen=True)
class Judged:
    """Pairs scored against a bank that was drawn from among them.

    Attributes:
        rows: (R,) int64 rows of the index.
        scores: six (R,) statistics, of each pair alone.
        bank: the bank.
        p: (R,) p-values of the match scores; those in which neighbours have a say, if these tell more.
    """

    rows: NDArray[np.int64]
    scores: PairStatistics
    bank: ReferenceBank
    p: NDArray[np.float64]


def fold_bank_size(wanted: int, pairs: int) -> int:
    """How many of a fold's ``pairs`` pairs its bank takes, where ``wanted`` are wanted."""
    return min(wanted, max(MIN_BANK, int(pairs * FOLD_BANK_SHARE)))


def judge(
    encoder: DualEncoder,
    source: PairSource,
    rows: NDArray[np.int64],
    bank_size: int,
    *,
    neighbours: int = 0,
    on_batch: Callable[[int], None] | None = None,
    world: World = ALONE,
) -> Judged:
    """Score pairs as ``score`` does, against a bank drawn from themselves. Each pair is embedded once.

    Memory: the bank, twice the pairs that are asked about others, and some twenty numbers a pair.

    Args:
        rows: rows of the index.
        bank_size: the largest bank that is wanted; see :func:`fold_bank_size`.
        neighbours: how many pairs like it by picture, and by caption, are asked about a pair.
        on_batch: called with the number of pairs after each batch.
        world: the processes that share the pairs; all of them get the scores of all pairs.

    Raises:
        NoisycleanError: too few pairs can be read.
    """
    index = source.index
    batch_size, on_batch = FILTER_BATCH * world.size, world.for_all(on_batch)
    size = fold_bank_size(bank_size, len(rows))
    drawn = draw_bank_rows(index, rows, max(size, NEIGHBOUR_POOL) if neighbours else size)
    found, image, text = world.joined(embed(encoder, source, drawn, batch_size=batch_size, on_batch=on_batch))
    ids = index.caption[found]
    at = np.flatnonzero(np.isin(found, drawn[:size]))
    bank = ReferenceBank.build(ids[at], image[at], text[at], encoder.temperature.item())
    alone = bank.score(image, text, ids)
    neighbourhood = None
    if neighbours:
        neighbourhood = Neighbourhood.of(bank, index, (found, image, text), alone.match_score, neighbours)
    kept_rows: list[NDArray[np.int64]] = []
    scores: list[list[Tensor]] = []

    def add(at: NDArray[np.int64], image: Tensor, text: Tensor, alone: Sequence[Tensor]) -> None:
        asked = [neighbourhood.match_scores(at, image, text)] if neighbourhood is not None else []
        kept_rows.append(at)
        scores.append([one.cpu() for one in (*alone, *asked)])

    own = world.share(len(found))
    add(found[own], image[own], text[own], [one[own] for one in alone])
    with encoder.inference():
        for batch in filter(len, source.batches(np.setdiff1d(rows, drawn), batch_size)):
            at, sides = batch.rows.numpy(), encoder.encode(batch.pixels, batch.tokens)
            add(at, *sides, bank.score(*sides, index.caption[at]))
            if on_batch is not None:
                on_batch(len(batch))
    everyones = world.everyone((np.concatenate(kept_rows), [torch.cat(parts) for parts in zip(*scores, strict=True)]))
    columns = [torch.cat(parts) for parts in zip(*(found for _, found in everyones), strict=True)]
    statistics = PairStatistics(*columns[: len(PairStatistics._fields)])
    p = bank.p_values(statistics.match_score.numpy())
    if neighbourhood is not None:
        opinions = p, p_values(columns[-1].numpy(), neighbourhood.null())
        # One process decides: where they tell as much, others might come to another end.
        p = opinions[world.once(lambda: more_telling(opinions, null_pairs=len(bank)))]
    return Judged(np.concatenate([at for at, _ in everyones]), statistics, bank, p)


def more_telling(opinions: Sequence[NDArray[np.float64]], *, null_pairs: int) -> int:
    """Which of several opinions, (N,) p-values each, tells most of which pairs are clean; the first of equals (ours).

    Of each its match probabilities are taken, all with one noise rate: the least of their estimates, as each of these
    is an upper bound. (With its own, who takes true pairs for mismatches would seem to have much to tell.)

    Args:
        null_pairs: independent pairs behind the null.
    """
    least = min(noise_rate(p, null_pairs=null_pairs).estimate for p in opinions)
    return int(np.argmax([information(match_probability(p, least)) for p in opinions]))


def srem_filter(judged: Judged, recipe: SremObjective) -> Filtered:
    """SREM's weights: by the shuffled null, or by a mixture of two components.

    The match probability, 1 − local false discovery rate, is the default; see :mod:`noisyclean.calibration`.
    """
    p = judged.p
    noise = noise_rate(p, null_pairs=len(judged.bank))
    match recipe.threshold:
        case "posterior":
            weight = selective_weights(
                match_probability(p, noise.estimate), recipe.selectivity, recipe.min_trained_share
            )
        case "q_value":
            weight = (q_values(p, noise.estimate) <= recipe.filter_fdr).astype(np.float64)
        case "mixture":
            worse = judged.scores.energy if recipe.statistic == "energy" else -getattr(judged.scores, recipe.statistic)
            weight = selective_weights(
                clean_posterior(worse.numpy(), "gaussian"), recipe.selectivity, recipe.min_trained_share
            )
        case _:  # selected within the batch
            weight = np.ones(len(p))
    return Filtered(judged.rows, weight.astype(np.float32), noise)


def selective_weights(probability: NDArray[np.float64], selectivity: float, min_share: float) -> NDArray[np.float64]:
    """Weights p^γ, with the largest γ ≤ ``selectivity`` at which they still train on enough pairs (ours).

    A judge that knows little gives hardly any pair a high probability, and a fixed exponent would leave the training
    to a handful of pairs. Pairs are counted by the effective size of a weighted sample, (Σw)²/Σw² (Kish), which falls
    as γ grows. At γ = 0 all pairs count alike, as in the warm-up.

    Args:
        probability: (N,) in [0, 1], that a pair is clean.
        selectivity: the largest γ.
        min_share: of N, the fewest pairs that the weights may come down to, in [0, 1).

    Returns:
        (N,) weights in [0, 1].
    """
    # None is impossible: else γ would have no say in pairs of probability 0, however few the others are.
    probability = np.maximum(probability, LEAST_PROBABILITY)

    def surplus(exponent: float) -> float:
        weight = probability**exponent
        return float(weight.sum() ** 2 / (weight @ weight) / len(weight) - min_share)

    if surplus(selectivity) < 0:
        selectivity = brentq(surplus, 0.0, selectivity)
    weights: NDArray[np.float64] = probability**selectivity
    return weights


def ncr_filter(
    encoder: DualEncoder,
    source: PairSource,
    rows: NDArray[np.int64],
    batch_size: int,
    recipe: NcrObjective,
    *,
    seed: int,
    on_batch: Callable[[int], None] | None = None,
    world: World = ALONE,
) -> Filtered:
    """NCR's selection: pairs of which a mixture over in-batch losses says that they are rather clean than not.

    Args:
        rows: the pairs that the model trains on (in-sample) or that its peer does.
        batch_size: pairs that are classified together, as in training.
        seed: of the order of the pairs.
        world: the processes that share the pairs.
    """
    kept: list[NDArray[np.int64]] = []
    losses: list[NDArray[np.float32]] = []
    with encoder.inference():
        for batch, parts in world.in_step(source.batches(rows, batch_size, shuffle=seed)):
            *_, similarity = world.embed(encoder, batch, parts)
            kept.append(world.gather(batch.rows, parts).numpy())
            score = match_score(similarity / encoder.temperature)
            losses.append((-score / 2).cpu().numpy())
            if on_batch is not None:
                on_batch(parts.total)
    clean = clean_posterior(np.concatenate(losses), recipe.mixture) > 0.5
    return Filtered(np.concatenate(kept), clean.astype(np.float32))
