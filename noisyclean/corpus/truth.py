"""The truth beside a corpus: which pairs match, where that is known. Made with the corpus or by planting noise.

Only ``corrupt``, which carries it on, and ``evaluate`` read it; fit, score and split never do.
"""

from __future__ import annotations

import pyarrow as pa

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
