"""``nulls.parquet``: the known mismatches that pairs were compared with, so that anyone can recompute the p-values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from noisyclean.errors import UsageError
from noisyclean.files import open_parquet, write_parquet

NULLS_FILE = "nulls.parquet"
RANDOM, NEAR_MISS = "random", "near miss"

NULLS_SCHEMA = pa.schema(
    [
        pa.field("fold", pa.int32(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("similarity", pa.float32(), nullable=False),
        pa.field("match_score", pa.float32(), nullable=False),
        pa.field("p_value", pa.float32(), nullable=False),
    ]
)
"""One row a mismatch: ``random`` is a bank picture with another pair's caption, ``near miss`` one with a caption
that is like its own. ``p_value`` is under the random ones of its fold."""


@dataclass(frozen=True)
class Nulls:
    """What the split needs of the nulls.

    Attributes:
        similarity_median: (folds,) of the random mismatches of each fold.
        near_miss_p: p-values of all near misses, under the random mismatches.
        below_near_misses: share of the random mismatches that score lower than half of the near misses of their fold.
    """

    similarity_median: NDArray[np.float32]
    near_miss_p: NDArray[np.float32]
    below_near_misses: float


def write_nulls(out: Path, table: pa.Table) -> None:
    """Write a table of :data:`NULLS_SCHEMA`."""
    write_parquet(out / NULLS_FILE, table.cast(NULLS_SCHEMA))


def read_null_table(out: Path) -> pa.Table:
    """Read what :func:`write_nulls` wrote.

    Raises:
        UsageError: it is missing or broken.
    """
    path = out / NULLS_FILE
    try:
        with open_parquet(path) as file:
            return file.read(NULLS_SCHEMA.names).cast(NULLS_SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(
            f"{path}: missing or broken; repeat the `noisyclean score` command to write it anew"
        ) from error


def read_nulls(out: Path) -> Nulls:
    """What the split needs of it.

    Raises:
        UsageError: it is missing or broken.
    """
    table = read_null_table(out)
    folds = table.to_pandas().groupby("fold")
    medians, near, below = [], [], []
    for _, known in folds:
        random, close = (known[known["kind"] == kind] for kind in (RANDOM, NEAR_MISS))
        medians.append(random["similarity"].median())
        near.append(close["p_value"].to_numpy())
        if len(close):
            below.append((random["match_score"] < close["match_score"].median()).mean())
    return Nulls(np.array(medians, np.float32), np.concatenate(near), float(np.mean(below)) if below else 0.0)
