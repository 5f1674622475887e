"""One run of the bench: train a method on planted noise, score every pair out-of-fold, compare with the truth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from noisyclean.calibration import STOREY_LAMBDA, noise_rate_of_tail
from noisyclean.corpus.source import PairSource
from noisyclean.encoders import DualEncoder
from noisyclean.evaluation.baselines import clip_score, deep_knn, lemon_fix, neg_clip_loss
from noisyclean.evaluation.bench.corpus import BenchCorpus, PlantedCorpus
from noisyclean.evaluation.bench.methods import METHODS, ORACLE
from noisyclean.evaluation.detection import detection, ratio, share
from noisyclean.evaluation.retrieval import Retrieval, group_captions, retrieval
from noisyclean.manifest.ranking import judge_pairs
from noisyclean.manifest.rules import DEFAULT_FDR, SplitRule
from noisyclean.manifest.schema import CLEAN, NOISY, STATISTICS
from noisyclean.progress import SILENT
from noisyclean.recipe import Recipe, load_recipe
from noisyclean.scoring.reference import embed
from noisyclean.training.crossfit import CrossFit
from noisyclean.training.filtration import Judged, judge

ASKED = (0.01, 0.05, 0.1)
"""Mismatch rates asked of the clean part."""

WATCHED = 1000
"""Pairs of a fold on which detection is watched from epoch to epoch; few, so that watching costs little."""

TRAINING_FREE: dict[str, Callable[..., Tensor]] = {
    "CLIP score": clip_score,
    "negCLIPLoss": neg_clip_loss,
    "LEMoN": lemon_fix,
    "deep kNN": deep_knn,
}
"""Scores that need no training, measured with the encoders of the ``infonce`` run."""


@dataclass(frozen=True)
class RunKey:
    """Which run: equal keys on equal corpora and base recipes give equal figures, but for the clock."""

    method: str
    protocol: str
    rate: float
    seed: int


def method_recipe(base: str, overrides: list[str], key: RunKey) -> Recipe:
    """The recipe of a run: the base recipe, what the user set, and then what makes the method."""
    return load_recipe(base, [*overrides, *METHODS[key.method].overrides, f"seed={key.seed}"])


def run(corpus: BenchCorpus, recipe: Recipe, key: RunKey, device: torch.device) -> dict[str, Any]:
    """Do one run.

    Returns:
        What ``results.jsonl`` has of it: plain numbers, strings, lists and dicts.
    """
    started = time.perf_counter()
    planted = corpus.plant(key.protocol, key.rate, key.seed)  # type: ignore[arg-type]
    rows = planted.rows
    crossfit = CrossFit(
        recipe,
        planted.source,
        device,
        rows=rows,
        trainable=rows[planted.matched[rows]] if key.method == ORACLE else None,
        progress=SILENT,
    )
    sample = np.random.default_rng(key.seed)
    watched = [np.sort(sample.permutation(fold)[:WATCHED]) for fold in crossfit.judged]
    epochs: list[dict[str, Any]] = []
    best = -1.0
    kept: list[dict[str, Tensor]] = []
    with SILENT.task("training", None, "pairs") as task:
        for epoch in range(recipe.optimiser.epochs):
            measurable = _reset_peak_memory(device)
            # What the filter let through is what the coming epoch is trained on.
            filtered = _filter_figures(crossfit, planted)
            before = time.perf_counter()
            figures = crossfit.train_epoch(epoch, task)
            seconds = time.perf_counter() - before
            memory = _peak_memory(device) if measurable else None
            rsum = float(np.mean([one.rsum for one in _retrieve(crossfit.encoders, corpus.source, corpus.validation)]))
            if rsum > best:
                best = rsum
                kept = [_weights(encoder) for encoder in crossfit.encoders]
            epochs.append(
                {
                    "epoch": epoch,
                    "loss": float(np.mean([one["loss"] for one in figures])),
                    "seconds": round(seconds, 3),
                    "peak_memory": memory,
                    "validation_rsum": round(rsum, 3),
                    "auroc": _detection_figures(_judge(crossfit, planted, watched, recipe), planted)["auroc"],
                    **filtered,
                }
            )
    judged = _judge(crossfit, planted, crossfit.judged, recipe)
    seen = [one["auroc"] for one in epochs if one["auroc"] is not None]
    result = {
        "method": key.method,
        "protocol": key.protocol,
        "rate": key.rate,
        "seed": key.seed,
        **_detection_figures(judged, planted),
        "auroc_fall": max(seen) - seen[-1] if seen else None,
        **_retrieval_figures("last", _retrieve(crossfit.encoders, corpus.source, corpus.test)),
        "training_free": _training_free(crossfit, planted) if key.method == "infonce" else {},
    }
    for encoder, weights in zip(crossfit.encoders, kept, strict=True):
        encoder.model.load_state_dict(weights)
    result |= _retrieval_figures("best", _retrieve(crossfit.encoders, corpus.source, corpus.test))
    result |= {
        "seconds_per_epoch": round(float(np.mean([one["seconds"] for one in epochs])), 3),
        "peak_memory": max((one["peak_memory"] for one in epochs if one["peak_memory"]), default=None),
        "epochs": epochs,
        "seconds": round(time.perf_counter() - started, 1),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    return result


def _judge(crossfit: CrossFit, planted: PlantedCorpus, folds: list[NDArray[np.int64]], recipe: Recipe) -> list[Judged]:
    """Pairs of each fold, scored by the model that never saw them."""
    return [
        judge(encoder, planted.source, rows, recipe.bank.size)
        for encoder, rows in zip(crossfit.encoders, folds, strict=True)
    ]


def _detection_figures(judged: list[Judged], planted: PlantedCorpus) -> dict[str, Any]:
    """The figures of ``evaluate``, of pairs scored by the models that never saw them."""
    rows = np.concatenate([one.rows for one in judged])
    p = np.concatenate([one.p for one in judged]).astype(np.float32)
    values = {
        name: np.concatenate([getattr(one.scores, name).numpy() for one in judged]).astype(np.float32)
        for name in STATISTICS
    }
    below = sum(int((one.scores.similarity < one.bank.similarity_median).sum()) for one in judged)
    # As `split` has it: the smaller of two upper bounds.
    noise = noise_rate_of_tail(
        min(int((p > STOREY_LAMBDA).sum()), below), pairs=len(p), null_pairs=sum(len(one.bank) for one in judged)
    )
    headline = planted.headline[rows]
    matched = planted.matched[rows][headline]
    columns = {"p_value": p, **values}
    figures: dict[str, Any] = {"pairs": len(rows), "planted_noise": share(~matched)}
    for asked in ASKED:
        verdict = judge_pairs(columns, noise, SplitRule(fdr=asked))
        clean = verdict.is_in(CLEAN)[headline]
        name = f"{asked * 100:g}"
        figures[f"realised_{name}"] = share(~matched[clean])
        figures[f"recall_{name}"] = ratio(matched & clean, matched)
        if asked == DEFAULT_FDR:
            noisy = verdict.is_in(NOISY)[headline]
            figures["f1"] = ratio(2 * (matched & clean), matched.astype(np.int64) + clean)
            figures["noisy_precision"] = share(~matched[noisy])
            figures["noisy_recall"] = ratio(~matched & noisy, ~matched)
            figures["auroc"], figures["average_precision"] = detection(matched, verdict.rank[headline].astype(float))
    figures |= {"estimated_noise": noise.estimate, "noise_low": noise.low, "noise_high": noise.high}
    return figures


def _retrieve(encoders: list[DualEncoder], source: PairSource, rows: NDArray[np.int64]) -> list[Retrieval]:
    found = []
    for encoder in encoders:
        at, image, text = embed(encoder, source, rows)
        first, image_of_text = group_captions(source.index.image[at])
        found.append(retrieval(image[torch.from_numpy(first)].cpu(), text.cpu(), image_of_text))
    return found


def _retrieval_figures(when: str, found: list[Retrieval]) -> dict[str, float]:
    """Means over the folds' models: each trained on the other folds' pairs only."""
    figures = {f"rsum_{when}": float(np.mean([one.rsum for one in found]))}
    for k, at in enumerate((1, 5, 10)):
        figures[f"image_to_text_r{at}_{when}"] = float(np.mean([one.image_to_text[k] for one in found]))
        figures[f"text_to_image_r{at}_{when}"] = float(np.mean([one.text_to_image[k] for one in found]))
    return figures


def _filter_figures(crossfit: CrossFit, planted: PlantedCorpus) -> dict[str, float]:
    """How right the training filter is: weighted precision and recall of the true pairs."""
    precision, recall = [], []
    for rows, weights in crossfit.weights:
        if weights is None:
            return {}
        weight = weights[torch.from_numpy(rows)].numpy().astype(np.float64)
        true = planted.matched[rows]
        if weight.sum() > 0 and true.any():
            precision.append(weight[true].sum() / weight.sum())
            recall.append(weight[true].sum() / true.sum())
    if not precision:
        return {}
    return {"filter_precision": float(np.mean(precision)), "filter_recall": float(np.mean(recall))}


def _training_free(crossfit: CrossFit, planted: PlantedCorpus) -> dict[str, dict[str, float | None]]:
    scores: dict[str, list[NDArray[np.float64]]] = {name: [] for name in TRAINING_FREE}
    kept = []
    for encoder, fold in zip(crossfit.encoders, crossfit.judged, strict=True):
        rows, image, text = embed(encoder, planted.source, fold)
        kept.append(rows)
        for name, score in TRAINING_FREE.items():
            values = score(image.cpu(), text.cpu(), encoder.temperature.item()).numpy()
            # Models of two folds have two scales: within a fold, the share of pairs that score lower.
            scores[name].append(values.argsort().argsort() / len(values))
    rows = np.concatenate(kept)
    headline = planted.headline[rows]
    figures = {}
    for name, parts in scores.items():
        auroc, precision = detection(planted.matched[rows][headline], -np.concatenate(parts)[headline])
        figures[name] = {"auroc": auroc, "average_precision": precision}
    return figures


def _weights(encoder: DualEncoder) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in encoder.model.state_dict().items()}


def _reset_peak_memory(device: torch.device) -> bool:
    """Whether the system lets this process begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_memory(device: torch.device) -> int | None:
    """Bytes: of the GPU, or of this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), None)
