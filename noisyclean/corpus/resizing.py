"""Decoded pictures of any size brought to the one that the model takes: resized, and cropped to the middle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, Resize
from torchvision.transforms.v2 import functional as one_by_one

Kernel = Literal["bilinear", "bicubic"]

_REACH: dict[Kernel, int] = {"bilinear": 1, "bicubic": 2}
_AT_A_TIME = 2**24
"""Pixels of pictures that are padded to one size: 200 MB in float32."""
_MOST_PADDED = 1.5
"""These are at most so many times as many as there are without padding."""


class Fit(NamedTuple):
    """How pictures get their size.

    Attributes:
        size: (height, width) in the end.
        shorter: what the shorter side is resized to, before the rest is cropped; None: both are resized to ``size``.
        kernel: of the resizing, which antialiases.
    """

    size: tuple[int, int]
    shorter: int | None
    kernel: Kernel

    @classmethod
    def of(cls, resize: object, size: tuple[int, int]) -> Fit | None:
        """What begins with torchvision's ``resize`` and ends with ``size``; None: it is another kind of resizing."""
        if not isinstance(resize, Resize):
            return None
        shorter = resize.size if isinstance(resize.size, int) else None
        return cls(size, shorter, resize.interpolation.value)


def fit_one(picture: Tensor, fit: Fit) -> Tensor:
    """(3, h, w) uint8 → (3, H, W) uint8, by torchvision."""
    to = list(fit.size) if fit.shorter is None else [fit.shorter]
    resized = one_by_one.resize(picture, to, InterpolationMode(fit.kernel))
    return cast(Tensor, one_by_one.center_crop(resized, list(fit.size)))


def fit_all(pictures: Sequence[Tensor], fit: Fit) -> Tensor:
    """n pictures, (3, hₖ, wₖ) uint8 on one device → (n, 3, H, W) uint8, as :func:`fit_one` but for rounding."""
    if pictures[0].device.type == "cpu":  # where torch resizes bytes as they are
        return torch.stack([fit_one(picture, fit) for picture in pictures])
    return fit_by_products(pictures, fit)


def fit_by_products(pictures: Sequence[Tensor], fit: Fit) -> Tensor:
    """The same on any device by matrix products, since to resize is linear along each side: many pictures at a time.

    A GPU takes longer to be told of a picture than to resize it.
    """
    sizes = [(picture.shape[1], picture.shape[2]) for picture in pictures]
    fitted = torch.empty((len(pictures), 3, *fit.size), dtype=torch.uint8, device=pictures[0].device)
    for places in groups(sizes):
        fitted[places] = _fit_padded([pictures[place] for place in places], fit)
    return fitted


def groups(sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """The places of all (height, width), in groups that take little padding and can be held at a time."""
    group: list[int] = []
    height = width = pixels = 0
    for place in sorted(range(len(sizes)), key=sizes.__getitem__):
        own = sizes[place][0] * sizes[place][1]
        higher, wider = max(height, sizes[place][0]), max(width, sizes[place][1])
        padded = (len(group) + 1) * higher * wider
        if group and (padded > _AT_A_TIME or padded > _MOST_PADDED * (pixels + own)):
            yield group
            group, (higher, wider), pixels = [], sizes[place], 0
        group.append(place)
        height, width, pixels = higher, wider, pixels + own
    if group:
        yield group


def _fit_padded(pictures: Sequence[Tensor], fit: Fit) -> Tensor:
    """(n, 3, H, W) uint8 of n pictures."""
    device = pictures[0].device
    sizes = torch.tensor([picture.shape[1:] for picture in pictures])
    resized = _resized_sizes(sizes, fit)
    padded = torch.zeros((len(pictures), 3, *sizes.amax(dim=0).tolist()), dtype=torch.uint8, device=device)
    for place, picture in zip(padded, pictures, strict=True):
        place[:, : picture.shape[1], : picture.shape[2]] = picture
    down, across = (
        side_weights(sizes[:, side].to(device), resized[:, side].to(device), fit.size[side], fit.kernel)
        for side in (0, 1)
    )
    narrow = padded.float().flatten(1, 2) @ across.mT
    pixels = down[:, None] @ narrow.view(*padded.shape[:3], -1)
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


def _resized_sizes(sizes: Tensor, fit: Fit) -> Tensor:
    """(n, 2) int64 heights and widths → those after resizing, before the crop."""
    if fit.shorter is None:
        return torch.tensor(fit.size).expand_as(sizes)
    return torch.div(fit.shorter * sizes, sizes.amin(dim=1, keepdim=True), rounding_mode="floor")


def side_weights(lengths: Tensor, resized: Tensor, kept: int, kernel: Kernel) -> Tensor:
    """By what the pixels along one side of n pictures are multiplied, to give those of the resized side's middle.

    Each is a mean of the pixels that the kernel reaches from its place, stretched where the side is made shorter
    (antialiasing), with weights that sum to 1.

    Args:
        lengths: (n,) int64, pixels along the side.
        resized: (n,) int64, pixels along it once it is resized.
        kept: how many of these are asked for.

    Returns:
        (n, kept, longest) float32, zero where a side has no pixel.
    """
    sides = torch.stack([lengths, resized], dim=1)
    kinds, kind = torch.unique(sides, dim=0, return_inverse=True)
    before, after = kinds[:, 0, None, None], kinds[:, 1, None, None]
    first = torch.round((after - kept).double() / 2)
    scale = before.double() / after
    centre = (first + torch.arange(kept, device=lengths.device)[:, None] + 0.5) * scale
    place = torch.arange(int(lengths.amax()), device=lengths.device)
    away = (place - (centre - 0.5).float()).abs() / scale.clamp(min=1).float()
    weights = torch.where(place < before, _kernel_values(away, kernel), 0)
    return (weights / weights.sum(dim=2, keepdim=True))[kind]


def _kernel_values(away: Tensor, kernel: Kernel) -> Tensor:
    """The kernel at distances ≥ 0; Keys' cubic with a = −1/2, as Pillow and torch have it where they antialias."""
    near = 1 - away if kernel == "bilinear" else (1.5 * away - 2.5) * away**2 + 1
    far = ((2.5 - 0.5 * away) * away - 4) * away + 2
    return torch.where(away < 1, near, torch.where(away < _REACH[kernel], far, 0))
