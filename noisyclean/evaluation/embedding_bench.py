"""Mismatches planted among embedded pairs: how well scores without training find them, and how right our split is.

The split is what ``score --embeddings`` and ``split`` make of the planted pairs, from the file to the manifest. Its
estimate and the mismatch rate of its clean part are to be as planted and as asked.

The protocols, all in need of true pairs to begin with:

* **random**: the chosen pairs pass their captions round among themselves, in a random order;
* **near**: each chosen pair gets a copy of one of the five captions that are nearest to its own in the space of the
  text embeddings: the hard case.
* **random-foreign** and **near-foreign**: the same with captions from a random half of the pairs that is set aside and
  not scored. Without this a wrong caption belongs to another image that is scored too, as where a corpus is permuted,
  and methods that compare the pairs with one another can notice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from noisyclean.corpus.embeddings import ARRAY_NAMES, read_npz
from noisyclean.errors import UsageError
from noisyclean.evaluation.baselines import (
    bank_match_score,
    claimed_match_score,
    clip_score,
    deep_knn,
    lemon_fix,
    neg_clip_loss,
)
from noisyclean.evaluation.bench.run import ASKED
from noisyclean.evaluation.detection import detection, ratio, share
from noisyclean.evaluation.markdown import mean_cell, table_heading, table_row
from noisyclean.manifest.reading import Manifest
from noisyclean.manifest.schema import CLEAN
from noisyclean.manifest.splitting import split
from noisyclean.progress import SILENT, Progress
from noisyclean.scoring.reference import MIN_BANK
from noisyclean.scoring.score import score

if TYPE_CHECKING:
    import pandas as pd

Protocol: TypeAlias = Literal["random", "near", "random-foreign", "near-foreign"]
PROTOCOLS: Final[tuple[Protocol, ...]] = get_args(Protocol)

RATES: Final = (0.1, 0.2, 0.4, 0.6, 0.8)
TEMPERATURE: Final = 0.01
NEAR: Final = 5
"""The near protocol draws from this many nearest captions."""
MIN_PAIRS: Final = 2 * MIN_BANK
"""Half of them, where the other half is set aside, must still make a reference bank."""

METHODS: Final[Mapping[str, Callable[[Tensor, Tensor, float, int], Tensor]]] = {
    "clip_score": lambda image, text, temperature, seed: clip_score(image, text, temperature),
    "neg_clip_loss": lambda image, text, temperature, seed: neg_clip_loss(image, text, temperature, seed=seed),
    "lemon_fix": lambda image, text, temperature, seed: lemon_fix(image, text, temperature),
    "deep_knn": lambda image, text, temperature, seed: deep_knn(image, text, temperature, seed=seed),
    "match_score": lambda image, text, temperature, seed: bank_match_score(image, text, temperature),
    "claimed_match_score": lambda image, text, temperature, seed: claimed_match_score(image, text, temperature),
}
"""Name → score of (image, text, temperature, seed), higher is better matched; ours are the last two."""


_PERCENTAGES: Final[Mapping[str, str]] = {
    "estimated_noise": "estimated",
    "close_noise": "close",
    **{
        f"{figure}_{asked * 100:g}": heading.format(f"{asked * 100:g}")
        for asked in ASKED
        for figure, heading in (("realised", "asked {}: got"), ("recall", "recall"), ("kept", "kept"))
    },
}
"""Figure of the split → heading."""


class EmbeddingBench(NamedTuple):
    """What a bench found.

    Attributes:
        scores: one row a method, protocol, rate and seed: ``method``, ``protocol``, ``rate``, ``seed``, and ``auroc``
            and ``average_precision`` of finding the mismatches, missing where all pairs are of one kind.
        splits: one row a protocol, rate and seed: ``protocol``, ``rate``, ``seed``; ``planted_noise``, the share of
            mismatches; ``estimated_noise`` with ``noise_low`` and ``noise_high``, its 95 % interval, and
            ``close_noise``, of :class:`noisyclean.manifest.splitting.Summary`; and where a clean part of at most
            k % mismatches is asked for, k being 1, 5 and 10: ``realised_k``, the share of mismatches in it,
            ``recall_k``, the share of the true pairs that it holds, and ``kept_k``, the share of all pairs. A share of
            nothing is missing.
    """

    scores: pd.DataFrame
    splits: pd.DataFrame


def bench_embeddings(
    path: Path | str,
    *,
    rates: Iterable[float] = RATES,
    protocols: Iterable[Protocol] = ("random", "near"),
    seeds: Iterable[int] = range(5),
    temperature: float = TEMPERATURE,
    keys: tuple[str, str] | None = None,
    progress: Progress = SILENT,
) -> EmbeddingBench:
    """Plant mismatches among the pairs of an npz file, let every method find them, and split the pairs as we do.

    Args:
        path: an npz file with two float arrays ``[N, d]``, row i of both being a true pair; rows are brought to length
            1. The methods compute in float64, the split in float32 as always.
        rates: shares of the pairs to mismatch, from 0 to 1.
        protocols: see the module.
        seeds: of the planting; the same seed plants the same for all methods.
        temperature: τ of the methods that have one.
        keys: names of the arrays of images and texts; None: the first of ``ARRAY_NAMES`` that is there.
        progress: who is told how it goes.

    Raises:
        UsageError: the file cannot be read, lacks the arrays or they are no pairs of embeddings; or a rate, protocol or
            temperature makes no sense.
        NoisycleanError: too few of the planted captions differ to make a reference bank of.
    """
    rates, protocols, seeds = list(rates), list(protocols), list(seeds)
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise UsageError(f"no protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
    if any(not 0 <= rate <= 1 for rate in rates):
        raise UsageError(f"a rate of mismatches lies between 0 and 1: {', '.join(map(str, rates))}")
    if any(seed < 0 for seed in seeds):
        raise UsageError(f"a seed is 0 or more: {', '.join(map(str, seeds))}")
    if not temperature > 0:
        raise UsageError(f"the temperature must be above 0: {temperature}")
    image, text = load_embeddings(path, keys=keys)
    scores: list[dict[str, Any]] = []
    splits: list[dict[str, Any]] = []
    with progress.task("planting and scoring", len(protocols) * len(rates) * len(seeds), "plantings") as task:
        for protocol in protocols:
            for rate in rates:
                for seed in seeds:
                    planting = {"protocol": protocol, "rate": rate, "seed": seed}
                    planted = plant_mismatches(text, rate=rate, protocol=protocol, seed=seed)
                    pairs = image[torch.from_numpy(planted.image)], text[torch.from_numpy(planted.text)]
                    for method, find in METHODS.items():
                        auroc, precision = detection(~planted.wrong, -find(*pairs, temperature, seed).numpy())
                        scores.append({"method": method, **planting, "auroc": auroc, "average_precision": precision})
                    splits.append(planting | _split_figures(*pairs, temperature, planted.wrong))
                    task.advance()
    return EmbeddingBench(_frame(scores), _frame(splits))


def embeddings_markdown(found: EmbeddingBench) -> str:
    """Means ± standard deviations over seeds, two tables a protocol: AUROC, the best method first, and the split."""
    lines = []
    splits = dict(iter(found.splits.groupby("protocol")))
    for protocol, rows in found.scores.groupby("protocol", sort=False):
        seeds = f"{rows['seed'].nunique()} seeds"
        aurocs = rows.groupby(["method", "rate"])["auroc"]
        means, deviations = aurocs.mean().unstack(), aurocs.std().unstack()
        lines += [f"## {protocol}, AUROC, {seeds}", "", *table_heading(["method", *(f"{rate:.0%}" for rate in means)])]
        for method in means.mean(axis=1).sort_values(ascending=False).index:
            lines.append(table_row([method, *map(mean_cell, means.loc[method], deviations.loc[method], repeat(4))]))
        figures = 100 * splits[protocol].set_index("rate")[list(_PERCENTAGES)]
        means, deviations = figures.groupby("rate").mean(), figures.groupby("rate").std()
        lines += ["", f"## {protocol}, estimate and clean part in %, {seeds}", ""]
        lines += table_heading(["planted", *_PERCENTAGES.values()])
        for rate in means.index:
            lines.append(table_row([f"{rate:.0%}", *map(mean_cell, means.loc[rate], deviations.loc[rate], repeat(1))]))
        lines.append("")
    return "\n".join(lines)


def load_embeddings(path: Path | str, *, keys: tuple[str, str] | None = None) -> tuple[Tensor, Tensor]:
    """The pairs of an npz file as unit-norm float64 ``[N, d]`` images and texts.

    Args:
        path: the file.
        keys: names of the two arrays; None: the first of ``ARRAY_NAMES`` that is there.

    Raises:
        UsageError: see :func:`bench_embeddings`.
    """
    path = Path(path)
    names, image, text = read_npz(path, ARRAY_NAMES if keys is None else [keys])
    if len(image) < MIN_PAIRS:
        raise UsageError(f"{path}: {len(image)} pairs; at least {MIN_PAIRS} are needed")
    return _unit_rows(path, names[0], image), _unit_rows(path, names[1], text)


class Planting(NamedTuple):
    """Pairs, some of them wrong: image ``image[i]`` with caption ``text[i]``; both int64 ``[n]``."""

    image: NDArray[np.int64]
    text: NDArray[np.int64]

    @property
    def wrong(self) -> NDArray[np.bool_]:
        """Bool ``[n]``, which pairs are mismatched."""
        wrong: NDArray[np.bool_] = self.image != self.text
        return wrong


def plant_mismatches(text: Tensor, *, rate: float, protocol: Protocol, seed: int) -> Planting:
    """Choose which pairs get which wrong caption.

    Args:
        text: float ``[N, d]``, unit-norm rows: the true captions, N ≥ 6.
        rate: the share of pairs to mismatch, rounded to whole pairs; strictly between 0 and 1 it is at least two pairs
            and not all.
        protocol: see the module.
        seed: ≥ 0.

    Returns:
        N pairs, or half as many where the protocol sets pairs aside. No mismatched pair has its own caption, though
        another image's may read the same.
    """
    random = np.random.default_rng([seed, PROTOCOLS.index(protocol), round(rate * 1e6)])
    order = random.permutation(len(text))
    near, foreign = protocol.startswith("near"), protocol.endswith("foreign")
    scored, aside = (order[: len(order) // 2], order[len(order) // 2 :]) if foreign else (order, order)
    count = round(rate * len(scored))
    if 0 < rate < 1:
        count = min(max(count, 2), len(scored) - 1)
    chosen = scored[:count]
    source = np.arange(len(text))
    if near:
        similarity = text[torch.from_numpy(chosen)] @ text[torch.from_numpy(aside)].T
        similarity[torch.from_numpy(chosen[:, None] == aside[None, :])] = -torch.inf
        nearest = aside[similarity.topk(min(NEAR, len(aside) - 1), dim=1).indices.numpy()]
        source[chosen] = nearest[np.arange(len(chosen)), random.integers(0, nearest.shape[1], len(chosen))]
    elif foreign:
        source[chosen] = aside[: len(chosen)]
    else:
        source[chosen] = np.roll(chosen, 1)
    image = np.sort(scored)
    return Planting(image, source[image])


def _split_figures(
    image: Tensor, text: Tensor, temperature: float, wrong: NDArray[np.bool_]
) -> dict[str, float | None]:
    """What ``score`` and ``split`` make of N pairs; see :attr:`EmbeddingBench.splits`."""
    with tempfile.TemporaryDirectory(prefix="noisyclean-") as folder:
        pairs, out = Path(folder, "pairs.npz"), Path(folder, "out")
        np.savez(pairs, img=image.float().numpy(), txt=text.float().numpy())
        summary = score(embeddings=pairs, temperature=temperature, out=out)
        low, high = summary.noise_interval
        figures = {
            "planted_noise": share(wrong),
            "estimated_noise": summary.estimated_noise,
            "noise_low": low,
            "noise_high": high,
            "close_noise": summary.close_noise,
        }
        for asked in ASKED:
            split(out, fdr=asked)
            clean = np.zeros(len(wrong), np.bool_)
            clean[Manifest(out).pairs(CLEAN, columns=["index"])["index"]] = True
            name = f"{asked * 100:g}"
            figures[f"realised_{name}"] = share(wrong[clean])
            figures[f"recall_{name}"] = ratio(~wrong & clean, ~wrong)
            figures[f"kept_{name}"] = share(clean)
    return figures


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """One row each; a figure that is not to be had is NaN, also where no row has it."""
    import pandas as pd

    frame = pd.DataFrame(rows)
    figures = frame.columns.difference(["method", "protocol", "rate", "seed"])
    return frame.astype(dict.fromkeys(figures, "float64"))


def _unit_rows(path: Path, name: str, array: NDArray[Any]) -> Tensor:
    rows: Tensor = torch.from_numpy(array.astype(np.float64))
    length = rows.norm(dim=1, keepdim=True)
    odd = (~(length.isfinite() & (length > 0))).flatten().nonzero()
    if len(odd):
        raise UsageError(f"{path}: row {int(odd[0])} of {name} is no embedding: all zero, or not finite")
    return torch.div(rows, length)
