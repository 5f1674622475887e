"""The columns of a row, and what a score part carries besides them."""

from __future__ import annotations

import pyarrow as pa

from noisyclean.corpus.chunk import ROWS

SCHEMA_VERSION = "3"

CLEAN, NOISY, UNCERTAIN, UNREADABLE = "clean", "noisy", "uncertain", "unreadable"
SPLITS = (CLEAN, NOISY, UNCERTAIN, UNREADABLE)

_key, *_others, _fault = ROWS
_SAMPLE = [_key, pa.field("shard", pa.string(), nullable=False), *_others]

SAMPLE = tuple(one.name for one in _SAMPLE)
"""What a row says of the sample itself."""

STATISTICS = ("similarity", "energy_image", "energy_text", "energy", "swapped_entropy", "match_score")

MEASURED = (*STATISTICS, "p_value", "near_miss_p_value")
"""All that ``score`` finds out about a pair."""

_SCORES = [pa.field(name, pa.float32()) for name in MEASURED]

_JUDGE = [pa.field("fold", pa.int32()), pa.field("in_sample", pa.bool_())]
"""Which model scored the pair, and whether it has trained on it."""

_REMATCH = [
    pa.field("bank_place", pa.int32()),
    pa.field("best_text_place", pa.int32()),
    pa.field("best_text_similarity", pa.float32()),
    pa.field("best_image_place", pa.int32()),
    pa.field("best_image_similarity", pa.float32()),
]
REMATCH = tuple(one.name for one in _REMATCH)
"""What ``score --rematch`` finds out: where in the bank of its fold a pair itself lies, and where the text lies that
its image is most similar to, and the image that its text is. Without ``--rematch`` all are null."""

PART_SCHEMA = pa.schema([*_SAMPLE, *_JUDGE, *_SCORES, *_REMATCH, _fault])
"""``scores/<shard>.parquet``: what was measured. ``fault`` is why a sample is unreadable; its scores are null."""

MANIFEST_SCHEMA = pa.schema(
    [
        *_SAMPLE,
        *_JUDGE,
        *_SCORES,
        pa.field("q_value", pa.float32()),
        pa.field("match_probability", pa.float32()),
        pa.field("rank", pa.int64()),
        pa.field("best_text_key", pa.string()),
        pa.field("best_text_similarity", pa.float32()),
        pa.field("best_image_key", pa.string()),
        pa.field("best_image_similarity", pa.float32()),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
"""``manifest/split=…/<shard>.parquet``: what was concluded. ``split`` itself is the folder, as hive layouts have it.
The ``best_…`` columns are those of :mod:`noisyclean.manifest.rematch`."""

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
