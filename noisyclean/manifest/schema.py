"""The columns of a row, and what a score part carries besides them."""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = "2"

CLEAN, NOISY, UNCERTAIN, UNREADABLE = "clean", "noisy", "uncertain", "unreadable"
SPLITS = (CLEAN, NOISY, UNCERTAIN, UNREADABLE)

_SAMPLE = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("shard", pa.string(), nullable=False),
    pa.field("index", pa.int64(), nullable=False),
    pa.field("uid", pa.string()),
    pa.field("url", pa.string()),
    pa.field("caption", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
]

STATISTICS = ("similarity", "energy_image", "energy_text", "energy", "swapped_entropy", "match_score")

MEASURED = (*STATISTICS, "p_value", "near_miss_p_value")
"""All that ``score`` finds out about a pair."""

_SCORES = [pa.field(name, pa.float32()) for name in MEASURED]

_JUDGE = [pa.field("fold", pa.int32()), pa.field("in_sample", pa.bool_())]
"""Which model scored the pair, and whether it has trained on it."""

PART_SCHEMA = pa.schema([*_SAMPLE, *_JUDGE, *_SCORES, pa.field("fault", pa.string())])
"""``scores/<shard>.parquet``: what was measured. ``fault`` is why a sample is unreadable; its scores are null."""

MANIFEST_SCHEMA = pa.schema(
    [
        *_SAMPLE,
        *_JUDGE,
        *_SCORES,
        pa.field("q_value", pa.float32()),
        pa.field("match_probability", pa.float32()),
        pa.field("rank", pa.int64()),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
"""``manifest/split=…/<shard>.parquet``: what was concluded. ``split`` itself is the folder, as hive layouts have it."""

HIGHER_IS_BETTER = {
    "similarity": True,
    "energy_image": False,
    "energy_text": False,
    "energy": False,
    "swapped_entropy": False,
    "match_score": True,
    "p_value": False,
    "near_miss_p_value": False,
    "q_value": False,
    "match_probability": True,
    "rank": False,
}
"""The columns a corpus can be ordered by, and which end of each is the clean one."""
