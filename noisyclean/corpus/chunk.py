"""What a corpus is streamed as: runs of consecutive samples, ready for an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from noisyclean.device import moved

ROWS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("uid", pa.string()),
        pa.field("url", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("fault", pa.string()),
    ]
)
"""What a chunk says of its samples; ``fault`` is why one cannot be read, else null."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive samples of one shard. Those that can be read have no ``fault``; there are R of them.

    Attributes:
        shard: the shard's name.
        rows: of all samples, with the columns ``ROWS``.
        caption_ids, image_ids: (R,) int64 hashes of the captions and of the pictures, as they lie in the corpus.
        image: what an encoder takes for the R pictures in order: (R, H, W, 3) uint8, maybe on its device, or (R, d)
            embeddings.
        text: what it takes for their captions: (R, context) int64, or (R, d) embeddings.
        last: whether the shard ends with this chunk. Every shard ends with exactly one such chunk, maybe empty.
        damage: on the last chunk: what is wrong with the tar, if anything.
    """

    shard: str
    rows: pa.Table
    caption_ids: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    image: Tensor
    text: Tensor
    last: bool
    damage: str | None = None

    @property
    def readable(self) -> NDArray[np.bool_]:
        """For each row, whether it is one of the R."""
        mask: NDArray[np.bool_] = self.rows["fault"].is_null().to_numpy()
        return mask

    def with_faults(self, faults: Mapping[int, str]) -> Chunk:
        """This chunk, but some of the R, by their places among them, cannot be read, for these reasons."""
        if not faults:
            return self
        kept = np.setdiff1d(np.arange(len(self.image_ids)), [*faults])
        at = torch.from_numpy(kept)
        reasons = self.rows["fault"].to_pylist()
        for row, reason in zip(np.flatnonzero(self.readable)[[*faults]], faults.values(), strict=True):
            reasons[row] = reason
        column = self.rows.schema.get_field_index("fault")
        return replace(
            self,
            rows=self.rows.set_column(column, ROWS.field("fault"), pa.array(reasons, pa.string())),
            caption_ids=self.caption_ids[kept],
            image_ids=self.image_ids[kept],
            image=self.image[moved(at, self.image.device)],
            text=self.text[at],
        )
