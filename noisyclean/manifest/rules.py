"""The three-way rule: what a pair's numbers say of where it belongs, and why, in words.

With α the mismatch rate that is asked for:

* **clean**: q-value ≤ α, not noisy, and a swapped entropy that is not among the top 2 % of those;
* **noisy**: match probability ≤ α, that is a mismatch with probability ≥ 1 − α;
* **uncertain**: between the two, or held back from clean for its swapped entropy;
* **unreadable**: no usable image or caption; ``reason`` says what is wrong.

With ``keep`` or ``min_score`` the clean part is chosen by rank or by score instead; the rest is divided as above.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from noisyclean.calibration import Calibration
from noisyclean.errors import UsageError
from noisyclean.manifest.schema import CLEAN, HIGHER_IS_BETTER, NOISY, UNCERTAIN

DEFAULT_FDR = 0.05

EXTREME_ENTROPY = 0.02
"""Share of the otherwise clean pairs held back for their swapped entropy."""

_BETWEEN, _NOISY, _CLEAN, _HELD_BACK = range(4)
"""The places of :attr:`Decision.reasons`."""


@dataclass(frozen=True)
class SplitRule:
    """What decides who is clean; exactly one of the three.

    Attributes:
        fdr: α, the mismatch rate of the clean part that is asked for.
        keep: the share of the readable pairs to keep, best first.
        min_score: the least value (largest, where lower is better) of ``by``.
        by: the column that ``keep`` and ``min_score`` go by; None: ``rank`` and ``match_score``.
    """

    fdr: float | None = None
    keep: float | None = None
    min_score: float | None = None
    by: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("fdr", "keep", "min_score") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(f"give one of --fdr, --keep and --min-score, not {' and '.join(given) or 'none'}")
        for name in ("fdr", "keep"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"--{name} {value}: a share between 0 and 1, such as 0.05")
        if self.min_score is not None and not math.isfinite(self.min_score):
            raise UsageError(f"--min-score {self.min_score}: a number, such as 0.25; --keep 1 takes all pairs")
        if self.by is not None and self.fdr is not None:
            raise UsageError("--by goes with --keep or --min-score; --fdr goes by the q-value")
        if self.by is not None and self.by not in HIGHER_IS_BETTER:
            raise UsageError(f"--by {self.by}: no such column; there are {', '.join(HIGHER_IS_BETTER)}")

    @property
    def alpha(self) -> float:
        """α of the noisy side."""
        return DEFAULT_FDR if self.fdr is None else self.fdr


@dataclass(frozen=True)
class Decision:
    """A rule with the numbers that it takes from the corpus as a whole: then each pair can be judged alone.

    Attributes:
        rule: the rule.
        calibration: what the corpus says of each p-value.
        entropy_limit: the swapped entropy above which an otherwise clean pair is held back; infinite: none is.
    """

    rule: SplitRule
    calibration: Calibration
    entropy_limit: float = np.inf

    @property
    def clean_places(self) -> NDArray[np.bool_]:
        """(D,) which of the calibration's p-values are clean, the entropy aside, by the mismatch rate asked for."""
        # The rate of a whole may leave room for pairs that are mismatches for certain: these are noisy nonetheless.
        alpha = self.rule.alpha
        return np.asarray((self.calibration.q_value <= alpha) & (self.calibration.match_probability > alpha))

    @property
    def reasons(self) -> tuple[tuple[str, str], ...]:
        """The splits and reasons that :meth:`judge` gives the numbers of."""
        rule = self.rule
        if rule.keep is not None:
            why = f"among the best {rule.keep:.4g} by {rule.by or 'rank'}"
        elif rule.min_score is not None:
            by = rule.by or "match_score"
            why = f"{by} {'≥' if HIGHER_IS_BETTER[by] else '≤'} {rule.min_score:g}"
        else:
            why = f"q ≤ {rule.alpha:g}"
        return (
            (UNCERTAIN, "between the thresholds"),
            (NOISY, f"match probability ≤ {rule.alpha:g}"),
            (CLEAN, why),
            (UNCERTAIN, f"swapped entropy in the top {EXTREME_ENTROPY:.0%}"),
        )

    def judge(self, columns: Mapping[str, NDArray[Any]], rank: NDArray[np.int64], kept: NDArray[np.bool_]) -> Verdict:
        """Judge N pairs.

        Args:
            columns: their measured columns, (N,) each.
            rank: (N,) their ranks.
            kept: (N,) whether each is among those that ``rule.keep`` keeps; of no meaning for another rule.
        """
        at = self.calibration.places(columns["p_value"])
        q, probability = self.calibration.q_value[at], self.calibration.match_probability[at]
        code = np.where(probability <= self.rule.alpha, _NOISY, _BETWEEN).astype(np.int8)
        if self.rule.keep is not None:
            code[kept] = _CLEAN
        elif self.rule.min_score is not None:
            by = self.rule.by or "match_score"
            value = {**columns, "q_value": q, "match_probability": probability, "rank": rank}[by]
            higher = HIGHER_IS_BETTER[by]
            code[value >= self.rule.min_score if higher else value <= self.rule.min_score] = _CLEAN
        else:
            clean = self.clean_places[at]
            extreme = columns["swapped_entropy"][clean] > self.entropy_limit
            code[clean] = np.where(extreme, _HELD_BACK, _CLEAN)
        return Verdict(q, probability, rank, code, self.reasons)


@dataclass(frozen=True)
class Verdict:
    """The conclusions on N pairs; (N,) each.

    Attributes:
        q_value, match_probability: float32 in [0, 1].
        rank: int64, 1 = cleanest.
        code: int8, which of ``reasons`` holds.
        reasons: splits with their reasons in words.
    """

    q_value: NDArray[np.float32]
    match_probability: NDArray[np.float32]
    rank: NDArray[np.int64]
    code: NDArray[np.int8]
    reasons: tuple[tuple[str, str], ...]

    def is_in(self, split: str) -> NDArray[np.bool_]:
        """(N,) whether each pair is in this split."""
        return np.isin(self.code, [code for code, (name, _) in enumerate(self.reasons) if name == split])
