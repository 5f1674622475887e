"""The truth beside a corpus: which pairs match, where that is known. Made with the corpus or by planting noise.

Only ``corrupt``, which carries it on, and ``evaluate`` read it; fit, score and split never do.
"""

from __future__ import annotations

import io
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from noisyclean.corpus.locate import Shard, is_address, split_query, without_secrets
from noisyclean.errors import NoisycleanError

if TYPE_CHECKING:
    import pandas as pd

    from noisyclean.corpus.survey import Corpus

TRUTH_NAME = "truth.parquet"

TRUTH_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("matched", pa.bool_(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("donor_shard", pa.string()),
        pa.field("donor_key", pa.string()),
    ]
)

RANDOM = "random"
"""The kind of a mismatch at random: what a clean split is held to."""

TRUE_KINDS = ("match", "near_duplicate")
"""The kinds of pairs that match."""


def known_truth(corpus: Corpus) -> pd.DataFrame:
    """What is known before anything is planted; row r is sample r, the columns are those of ``TRUTH_SCHEMA``.

    Raises:
        NoisycleanError: what lies beside the shards as ``TRUTH_NAME`` is no such table.
    """
    import pandas as pd

    names = [shard.name for shard in corpus.shards]
    samples = pd.DataFrame({"shard": np.repeat(names, np.diff(corpus.starts)), "key": corpus.keys}, dtype=object)
    earlier = _earlier_truth(corpus.shards)
    truth = samples.merge(earlier, how="left", on=["shard", "key"])
    truth["matched"] = truth["matched"].ne(False)  # true where there is no row as well
    truth["kind"] = truth["kind"].fillna("match")
    truth.loc[~corpus.usable, ["matched", "kind", "donor_shard", "donor_key"]] = [True, "unreadable", None, None]
    return truth


def _earlier_truth(shards: Sequence[Shard]) -> pd.DataFrame:
    """The rows of all truth tables that lie beside the shards, under the names that the shards have in this run."""
    import pandas as pd

    folders: dict[tuple[str, str], None] = {}  # (folder, what this run puts before the names it knows)
    for shard in shards:
        # A shard named "en/00000" may be the 00000 of a corpus in en/, or the en/00000 of one further up.
        place, query = split_query(shard.path)
        if query:
            continue  # signed for the shard alone: nothing beside it may be asked for
        for known in (posixpath.basename(shard.name), shard.name):
            folder = place.replace("\\", "/").rpartition(f"{known}.")[0]
            folders[folder, shard.name.removesuffix(known)] = None
    tables = [pd.DataFrame(columns=TRUTH_SCHEMA.names)]
    for folder, prefix in folders:
        table = _read_truth(f"{folder}{TRUTH_NAME}")
        if table is not None:
            tables.append(table.assign(shard=prefix + table["shard"], donor_shard=prefix + table["donor_shard"]))
    return pd.concat([table.astype(object) for table in tables]).drop_duplicates(["shard", "key"])


def _read_truth(path: str) -> pd.DataFrame | None:
    import pandas as pd

    from noisyclean.corpus.remote import MissingObjectError, read_remote

    try:
        data = read_remote(path) if is_address(path) else Path(path).read_bytes()
        return pd.read_parquet(io.BytesIO(data), columns=TRUTH_SCHEMA.names)
    except (FileNotFoundError, MissingObjectError):
        return None
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        shown = without_secrets(path)
        raise NoisycleanError(f"{shown}: not a truth table ({error}); repair it or move it away") from error


def write_truth(truth: pd.DataFrame, path: Path) -> None:
    """Write such a table."""
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pandas(truth, schema=TRUTH_SCHEMA, preserve_index=False), path)
