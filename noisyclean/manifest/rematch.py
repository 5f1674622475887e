"""Rematch suggestions: the caption and the picture of the bank that suit a mismatched pair best, by name.

Score parts say it in places of the bank, since whose these are is not known before all shards are read; the parts of
the bank's own pairs then say it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from noisyclean.corpus.parallel import map_in_threads
from noisyclean.manifest.parts import read_part
from noisyclean.progress import SILENT, Progress


@dataclass(frozen=True)
class BankNames:
    """Whose the places of the banks of all folds are.

    Attributes:
        places: int64, a fold and a place in its bank as one number.
        names: string, as many: the ``shard/key`` of the pair there.
    """

    places: pa.Array
    names: pa.Array

    @classmethod
    def none(cls) -> BankNames:
        """No place is anyone's."""
        return cls(pa.array([], pa.int64()), pa.array([], pa.string()))

    @classmethod
    def read(cls, out: Path, shards: Sequence[str], progress: Progress = SILENT) -> BankNames:
        """Find the bank's pairs in the score parts of OUT; one that is in no part has no name.

        Raises:
            UsageError: a part is broken or of another version of the schema.
        """
        parts = [pa.table({"places": pa.array([], pa.int64()), "names": pa.array([], pa.string())})]
        with progress.task("finding the bank's pairs", len(shards), "shards") as task:
            columns = ["shard", "key", "fold", "bank_place"]
            for part in map_in_threads(partial(read_part, out, columns=columns), shards):
                part = part.filter(part["bank_place"].is_valid())
                name = pc.binary_join_element_wise(part["shard"], part["key"], "/")
                parts.append(pa.table({"places": _number(part["fold"], part["bank_place"]), "names": name}))
                task.advance()
        found = pa.concat_tables(parts).combine_chunks()
        return cls(found["places"].combine_chunks(), found["names"].combine_chunks())

    def suggest(self, rows: pa.Table, wanted: NDArray[np.bool_]) -> pa.Table:
        """Give the rows of a part their ``best_text_key`` and ``best_image_key``.

        Args:
            rows: (N) of :data:`noisyclean.manifest.schema.PART_SCHEMA`.
            wanted: (N,) which of them get suggestions; what the others have is taken from them.
        """
        mask, nothing = pa.array(wanted), pa.scalar(None)
        for side in ("text", "image"):
            place = pc.if_else(mask, rows[f"best_{side}_place"], nothing)
            name = self.names.take(pc.index_in(_number(rows["fold"], place), value_set=self.places))
            similarity = pc.if_else(mask, rows[f"best_{side}_similarity"], nothing)
            rows = rows.drop_columns(f"best_{side}_similarity").append_column(f"best_{side}_similarity", similarity)
            rows = rows.append_column(f"best_{side}_key", name)
        return rows


def _number(fold: pa.ChunkedArray, place: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.add(pc.shift_left(fold.cast(pa.int64()), 32), place.cast(pa.int64()))
