"""What people write by hand: webdataset, Pillow, open_clip's transform and model, a DataLoader, and a loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.utils.data import DataLoader

MISSING = "webdataset is not installed, so nothing was compared with it: `pip install 'noisyclean[bench]'` brings it"


def is_installed() -> bool:
    """Whether there is anything to compare with."""
    return find_spec("webdataset") is not None


class PlainLoop:
    """The loop for a model that lies in a folder, as open_clip loads it."""

    def __init__(self, model: Path, device: torch.device) -> None:
        self._device = device
        self._model, _, self._transform = open_clip.create_model_and_transforms(f"local-dir:{model}", device=device)
        self._model.eval()
        self._tokenizer = open_clip.get_tokenizer(f"local-dir:{model}")

    def load(self, tars: Sequence[Path], batch_size: int, workers: int) -> int:
        """Decode all pairs; returns how many."""
        return sum(len(images) for images, _ in self._batches(tars, batch_size, workers))

    def score(self, tars: Sequence[Path], batch_size: int, workers: int) -> int:
        """Decode and embed all pairs, and take their cosines; returns how many."""
        found = []
        autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda")
        with torch.inference_mode(), autocast:
            for images, tokens in self._batches(tars, batch_size, workers):
                image = self._model.encode_image(images.to(self._device), normalize=True)
                text = self._model.encode_text(tokens.to(self._device), normalize=True)
                found.append((image * text).sum(dim=1).cpu())
        return len(torch.cat(found))

    def _batches(self, tars: Sequence[Path], batch_size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        import webdataset

        pairs = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False, empty_check=False)
        pairs = pairs.decode("pilrgb").to_tuple("jpg", "txt")
        pairs = pairs.map_tuple(self._transform, partial(_tokens, self._tokenizer)).batched(batch_size)
        yield from DataLoader(pairs, batch_size=None, num_workers=workers)


def _tokens(tokenizer: Any, caption: str) -> Tensor:
    tokens: Tensor = tokenizer([caption])[0]
    return tokens
