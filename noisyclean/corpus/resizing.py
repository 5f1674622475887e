"""Decoded pictures of any size brought to the one that the model takes: resized, and cropped to the middle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import InterpolationMode, Resize
from torchvision.transforms.v2 import functional as one_by_one

MOST_REDUCED = 32
"""What a GPU resizes has sides at most so many times as long as they are to be (torch's kernels take some 47)."""


class Fit(NamedTuple):
    """How pictures get their size.

    Attributes:
        size: (height, width) in the end.
        shorter: what the shorter side is resized to, before the rest is cropped; None: both are resized to ``size``.
        kernel: of the resizing, which antialiases.
    """

    size: tuple[int, int]
    shorter: int | None
    kernel: Literal["bilinear", "bicubic"]

    @classmethod
    def of(cls, resize: object, size: tuple[int, int]) -> Fit | None:
        """What begins with torchvision's ``resize`` and ends with ``size``; None: it is another kind of resizing."""
        if not isinstance(resize, Resize):
            return None
        shorter = resize.size if isinstance(resize.size, int) else None
        return cls(size, shorter, resize.interpolation.value)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of such a picture once it is resized, before the crop."""
        if self.shorter is None:
            return self.size
        least = min(height, width)
        return self.shorter * height // least, self.shorter * width // least

    def suits_gpu(self, height: int, width: int) -> bool:
        """Whether a GPU can resize such a picture: its kernels hold what one pixel is made of, and refuse too much."""
        to = self.resized(height, width)
        return height <= MOST_REDUCED * to[0] and width <= MOST_REDUCED * to[1]


def fit_one(picture: Tensor, fit: Fit) -> Tensor:
    """(3, h, w) → (3, H, W) of the same type, by torchvision, which on a CPU resizes bytes as they are."""
    to = list(fit.size) if fit.shorter is None else [fit.shorter]
    resized = one_by_one.resize(picture, to, InterpolationMode(fit.kernel))
    return cast(Tensor, one_by_one.center_crop(resized, list(fit.size)))


def fit_all(pictures: Sequence[Tensor], fit: Fit) -> Tensor:
    """n pictures, (3, hₖ, wₖ) uint8 on one device → (n, 3, H, W) uint8, as :func:`fit_one` but for rounding.

    By few calls a picture: a GPU takes longer to be told of one than to resize it. (A CPU does bytes sooner singly.)
    """
    places = defaultdict(list)
    for place, picture in enumerate(pictures):
        places[picture.shape].append(place)
    resized = [_resized([pictures[place] for place in alike], fit) for alike in places.values()]
    order = torch.tensor([place for alike in places.values() for place in alike]).argsort()
    fitted = torch.cat(resized)[order.to(pictures[0].device)]
    return fitted.round_().clamp_(0, 255).to(torch.uint8)


def _resized(pictures: Sequence[Tensor], fit: Fit) -> Tensor:
    """n pictures of one size → (n, 3, H, W) float32, not yet rounded."""
    to = fit.resized(*pictures[0].shape[1:])
    resized = functional.interpolate(torch.stack([*pictures]).float(), to, mode=fit.kernel, antialias=True)
    top, left = (round((side - kept) / 2) for side, kept in zip(to, fit.size, strict=True))
    # Copied, or the whole of what was resized would be held as long as the middle of it.
    return resized[:, :, top : top + fit.size[0], left : left + fit.size[1]].clone()
