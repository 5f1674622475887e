"""What a model in training thought of its pairs when it last saw them: the teacher of its soft targets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from noisyclean.srem import PairMatrix


class EmbeddingMemory:
    """A model's own embeddings of the pairs it trains on, each as of the pair's last turn, an epoch ago.

    They cost no forward pass. And they know nothing of the pairs that the model will judge, as the predictions of the
    other fold's model would (docs/method.md, section 3.7).

    Attributes:
        state: tensors that travel in the checkpoint: the embeddings, (R, d) half precision a side, and which of the
            pairs have any. Empty before the first batch.
    """

    def __init__(self, rows: NDArray[np.int64]) -> None:
        """``rows``: (R,) the rows of the index that are trained on."""
        self._rows = torch.from_numpy(np.sort(rows))
        self.state: dict[str, Tensor] = {}

    def remember(self, rows: Tensor, image: Tensor, text: Tensor) -> None:
        """Keep the (B, d) embeddings of (B,) rows in place of what was kept of them before."""
        if not self.state:
            shape = (len(self._rows), image.shape[1])
            self.state = {
                "known": torch.zeros(len(self._rows), dtype=torch.bool),
                "image": torch.zeros(shape, dtype=torch.half),
                "text": torch.zeros(shape, dtype=torch.half),
            }
        at = self._at(rows)
        self.state["known"][at] = True
        self.state["image"][at] = image.detach().half().cpu()
        self.state["text"][at] = text.detach().half().cpu()

    def similarity(self, rows: Tensor, own: slice, gather: Callable[[Tensor], Tensor]) -> PairMatrix | None:
        """(B,) rows → [B, B] float32 cosines, those of the pairs ``own`` held here; None before anything is known.

        A pair of which nothing is known is alone: −inf beside all others, 0 with itself.

        Args:
            gather: see :class:`noisyclean.srem.PairMatrix`.
        """
        if not self.state:
            return None
        at = self._at(rows)
        known, image, text = (self.state[name][at] for name in ("known", "image", "text"))

        def cosines(images: slice, texts: slice) -> Tensor:
            alone = ~(known[images, None] & known[None, texts])
            alone.diagonal(images.start - texts.start).fill_(False)
            return (image[images].float() @ text[texts].float().T).masked_fill(alone, -torch.inf)

        return PairMatrix.shared(cosines, len(at), own, gather)

    def _at(self, rows: Tensor) -> Tensor:
        return torch.searchsorted(self._rows, rows)
