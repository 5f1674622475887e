"""Ranks, counts and limits over all pairs of a corpus, exact, without holding the pairs in memory.

A pair's q-value needs no more than how often each p-value occurs; its rank and the limits of a rule need the corpus in
order. DuckDB keeps four numbers a pair, sorts them, and takes to the disk what passes its memory limit.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from noisyclean.calibration import Calibration, NoiseRate
from noisyclean.manifest.rules import EXTREME_ENTROPY, Decision, SplitRule, Verdict
from noisyclean.manifest.schema import HIGHER_IS_BETTER

MEMORY_LIMIT = "1GB"
"""Of the sorting; measured with 12.8 M pairs, which are sorted within it in six seconds on two cores."""
_CHUNK = 2**17
_AS_THE_RANK = (None, "rank", "p_value", "q_value", "match_probability")
"""Columns that order the pairs as the rank does, but for ties."""


class PairTable:
    """What is needed of each readable pair to rank the corpus and draw its split. A context manager."""

    def __init__(self, rule: SplitRule, scratch: Path | None = None) -> None:
        """``scratch``: where temporary files may be, which ``remove_leftovers`` knows; None: the system's folder."""
        import duckdb

        self._rule = rule
        # What is kept by another order than the rank's needs that column too.
        self._by = rule.by if rule.keep is not None and rule.by not in _AS_THE_RANK else None
        self._scratch = tempfile.TemporaryDirectory(
            prefix=".sorting-", suffix=f".{os.getpid()}.tmp", dir=scratch, ignore_cleanup_errors=True
        )
        self._db = duckdb.connect(config={"memory_limit": MEMORY_LIMIT, "temp_directory": self._scratch.name})
        self._db.execute("set enable_progress_bar = false")  # it would write to stdout
        self._db.execute("create table pairs (id bigint, p float, score float, entropy float, other float)")
        self.pairs = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()
        self._scratch.cleanup()

    def add(self, columns: Mapping[str, Any]) -> None:
        """Append N pairs, in the order in which :meth:`ranks` will give them back.

        Args:
            columns: ``p_value``, ``match_score``, ``swapped_entropy`` and the rule's ``by``: Arrow or NumPy arrays.
        """
        count = len(columns["p_value"])
        other = pa.nulls(count, pa.float32()) if self._by is None else columns[self._by]
        batch = pa.table(  # noqa: F841 - DuckDB finds it by its name
            {
                "id": np.arange(self.pairs, self.pairs + count),
                "p": columns["p_value"],
                "score": columns["match_score"],
                "entropy": columns["swapped_entropy"],
                "other": other,
            }
        )
        self._db.execute("insert into pairs select * from batch")
        self.pairs += count

    def counts(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The different p-values, ascending, and how many pairs have each; two (D,)."""
        found = self._db.execute("select p, count(*) as pairs from pairs group by p order by p").fetchnumpy()
        return np.asarray(found["p"], np.float32), np.asarray(found["pairs"], np.int64)

    def decide(self, noise: NoiseRate) -> Decision:
        """The rule with this corpus's numbers, where ``noise`` of the pairs are mismatches."""
        decision = Decision(self._rule, Calibration.of(*self.counts(), noise))
        if self._rule.fdr is None or not decision.clean_places.any():
            return decision
        # Both conditions are monotone in p.
        last = decision.calibration.p[decision.clean_places][-1]
        query = "select quantile_cont(entropy, ?) from pairs where p <= ?::float"
        ((limit,),) = self._db.execute(query, [1 - EXTREME_ENTROPY, float(last)]).fetchall()
        return replace(decision, entropy_limit=float(limit))

    def ranks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        """Rank and whether the rule keeps it, of every pair in the order of adding, in chunks of any size.

        Pairs above the whole null share the smallest p-value; their match scores still order them. Equal pairs rank in
        the order of adding.
        """
        query = "select id, other, row_number() over (order by p, score desc, id) as rank from pairs"
        if self._by is not None:
            order = f"other {'desc' if HIGHER_IS_BETTER[self._by] else 'asc'}, rank"
            query = f"select id, rank, row_number() over (order by {order}) as place from ({query})"
        else:
            query = f"select id, rank, rank as place from ({query})"
        keep = round((self._rule.keep or 0.0) * self.pairs)
        ordered = self._db.sql(f"select rank, place <= {keep} as kept from ({query}) order by id")
        for batch in ordered.to_arrow_reader(_CHUNK):
            yield batch["rank"].to_numpy(), batch["kept"].to_numpy(zero_copy_only=False)


def judge_pairs(columns: Mapping[str, NDArray[Any]], noise: NoiseRate, rule: SplitRule) -> Verdict:
    """Judge a corpus that is in memory: (N,) columns of its readable pairs, as :meth:`PairTable.add` has them."""
    with PairTable(rule) as table:
        table.add(columns)
        decision = table.decide(noise)
        none = np.zeros(0, np.int64), np.zeros(0, np.bool_)
        rank, kept = (np.concatenate(parts) for parts in zip(none, *table.ranks(), strict=True))
    return decision.judge(columns, rank, kept)
