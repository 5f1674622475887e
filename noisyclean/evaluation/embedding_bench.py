"""How well the training-free scores find mismatches that are planted among embedded pairs.

The protocols, all in need of true pairs to begin with:

* **random**: the chosen pairs pass their captions round among themselves, in a random order;
* **near**: each chosen pair gets a copy of one of the five captions that are nearest to its own in the space of the
  text embeddings: the hard case.
* **random-foreign** and **near-foreign**: the same with captions from a random half of the pairs that is set aside and
  not scored. Without this a wrong caption belongs to another image that is scored too, as where a corpus is permuted,
  and methods that compare the pairs with one another can notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
from noisyclean.progress import SILENT, Progress

if TYPE_CHECKING:
    import pandas as pd

Protocol: TypeAlias = Literal["random", "near", "random-foreign", "near-foreign"]
PROTOCOLS: Final[tuple[Protocol, ...]] = get_args(Protocol)

RATES: Final = (0.1, 0.2, 0.4, 0.6, 0.8)
TEMPERATURE: Final = 0.01
NEAR: Final = 5
"""The near protocol draws from this many nearest captions."""
MIN_PAIRS: Final = 10


METHODS: Final[Mapping[str, Callable[[Tensor, Tensor, float, int], Tensor]]] = {
    "clip_score": lambda image, text, temperature, seed: clip_score(image, text, temperature),
    "neg_clip_loss": lambda image, text, temperature, seed: neg_clip_loss(image, text, temperature, seed=seed),
    "lemon_fix": lambda image, text, temperature, seed: lemon_fix(image, text, temperature),
    "deep_knn": lambda image, text, temperature, seed: deep_knn(image, text, temperature, seed=seed),
    "match_score": lambda image, text, temperature, seed: bank_match_score(image, text, temperature),
    "claimed_match_score": lambda image, text, temperature, seed: claimed_match_score(image, text, temperature),
}
"""Name → score of (image, text, temperature, seed), higher is better matched; ours are the last two."""


def bench_embeddings(
    path: Path | str,
    *,
    rates: Iterable[float] = RATES,
    protocols: Iterable[Protocol] = ("random", "near"),
    seeds: Iterable[int] = range(5),
    temperature: float = TEMPERATURE,
    keys: tuple[str, str] | None = None,
    progress: Progress = SILENT,
) -> pd.DataFrame:
    """Plant mismatches among the pairs of an npz file and let every method find them.

    Args:
        path: an npz file with two float arrays ``[N, d]``, row i of both being a true pair; rows are brought to length
            1 and all is computed in float64.
        rates: shares of the pairs to mismatch, between 0 and 1.
        protocols: see the module.
        seeds: of the planting; the same seed plants the same for all methods.
        temperature: τ of the methods that have one.
        keys: names of the arrays of images and texts; None: the first of ``ARRAY_NAMES`` that is there.
        progress: who is told how it goes.

    Returns:
        One row a method, protocol, rate and seed: ``method``, ``protocol``, ``rate``, ``seed``, and ``auroc`` and
        ``average_precision`` of finding the mismatches.

    Raises:
        UsageError: the file cannot be read, lacks the arrays or they are no pairs of embeddings; or a rate, protocol or
            temperature makes no sense.
    """
    import pandas as pd
    from sklearn.metrics import average_precision_score, roc_auc_score

    rates, protocols, seeds = list(rates), list(protocols), list(seeds)
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise UsageError(f"no protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
    if any(not 0 < rate < 1 for rate in rates):
        raise UsageError(f"a rate of mismatches lies between 0 and 1: {', '.join(map(str, rates))}")
    if any(seed < 0 for seed in seeds):
        raise UsageError(f"a seed is 0 or more: {', '.join(map(str, seeds))}")
    if not temperature > 0:
        raise UsageError(f"the temperature must be above 0: {temperature}")
    image, text = load_embeddings(path, keys=keys)
    rows: list[dict[str, Any]] = []
    with progress.task("planting and scoring", len(protocols) * len(rates) * len(seeds), "plantings") as task:
        for protocol in protocols:
            for rate in rates:
                for seed in seeds:
                    planted = plant_mismatches(text, rate=rate, protocol=protocol, seed=seed)
                    pairs = image[torch.from_numpy(planted.image)], text[torch.from_numpy(planted.text)]
                    for method, score in METHODS.items():
                        suspicion = -score(*pairs, temperature, seed).numpy()
                        rows.append(
                            {
                                "method": method,
                                "protocol": protocol,
                                "rate": rate,
                                "seed": seed,
                                "auroc": float(roc_auc_score(planted.wrong, suspicion)),
                                "average_precision": float(average_precision_score(planted.wrong, suspicion)),
                            }
                        )
                    task.advance()
    return pd.DataFrame(rows, columns=["method", "protocol", "rate", "seed", "auroc", "average_precision"])


def embeddings_markdown(table: pd.DataFrame) -> str:
    """Mean AUROC ± standard deviation over seeds, a table for each protocol, the best method first."""
    lines = []
    for protocol, rows in table.groupby("protocol", sort=False):
        means, deviations = (
            rows.pivot_table(index="method", columns="rate", values="auroc", aggfunc=how) for how in ("mean", "std")
        )
        lines += [f"## {protocol}, AUROC, {rows['seed'].nunique()} seeds", ""]
        lines.append("| method | " + " | ".join(f"{rate:.0%}" for rate in means.columns) + " |")
        lines.append("|" + "---|" * (len(means.columns) + 1))
        for method in means.mean(axis=1).sort_values(ascending=False).index:
            pairs = zip(means.loc[method], deviations.loc[method], strict=True)
            lines.append(f"| {method} | " + " | ".join(f"{mean:.4f} ± {sd:.4f}" for mean, sd in pairs) + " |")
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
        rate: the share of pairs to mismatch, rounded to whole pairs, but at least two and not all.
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
    chosen = scored[: min(max(round(rate * len(scored)), 2), len(scored) - 1)]
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


def _unit_rows(path: Path, name: str, array: NDArray[Any]) -> Tensor:
    rows: Tensor = torch.from_numpy(array.astype(np.float64))
    length = rows.norm(dim=1, keepdim=True)
    odd = (~(length.isfinite() & (length > 0))).flatten().nonzero()
    if len(odd):
        raise UsageError(f"{path}: row {int(odd[0])} of {name} is no embedding: all zero, or not finite")
    return torch.div(rows, length)
