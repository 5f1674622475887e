"""Cross-modal retrieval as the field reports it: R@1, R@5 and R@10 both ways, and their sum.

The protocol of VSE++ (Faghri et al. 2018) and its successors on Flickr30K and MS-COCO: several captions an image; an
image's rank is that of the best-ranked of its captions, a caption's rank that of its image. What the protocol leaves
open is what a tie counts, and there an encoder that maps everything to one point must not look perfect: **a wrong
candidate of equal score counts as ranked above the right one**.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Recalls: TypeAlias = tuple[float, float, float]

DEPTHS = (1, 5, 10)
"""The k of R@k, in the order of the recalls."""


@dataclass(frozen=True)
class Retrieval:
    """How well each modality finds the other.

    Attributes:
        image_to_text: R@1, R@5, R@10 in percent: the images with a caption of theirs among the best k captions.
        text_to_image: R@1, R@5, R@10 in percent: the captions with their image among the best k images.
        image_median_rank: of the images' ranks, 1 being the best.
        text_median_rank: of the captions' ranks.
    """

    image_to_text: Recalls
    text_to_image: Recalls
    image_median_rank: float
    text_median_rank: float

    @property
    def rsum(self) -> float:
        """The sum of the six recalls, at most 600."""
        return sum(self.image_to_text) + sum(self.text_to_image)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``: the fields and ``rsum``."""
        return {**asdict(self), "rsum": self.rsum}


@torch.no_grad()
def retrieval(image: Tensor, text: Tensor, image_of_text: NDArray[np.int64], *, chunk: int = 256) -> Retrieval:
    """Rank all captions for every image and all images for every caption by inner product.

    The products are taken in float64 and compared in float32, the precision of the embeddings: so rounding, which
    differs with the size of a chunk, does not tell equal scores apart.

    Args:
        image: float ``[Ni, d]``, unit-norm rows.
        text: float ``[Nt, d]``, unit-norm rows, in any order.
        image_of_text: int64 ``[Nt]``, the image that each caption belongs to.
        chunk: how many images to take at a time; memory is a few ``[chunk, Nt]`` matrices, and the result the same.

    Returns:
        The figures. R@k is 100 where there are no more than k candidates.

    Raises:
        ValueError: shapes that do not fit, an index out of range, an image without a caption, or an embedding that is
            not finite (nothing compares as greater than a NaN, which would look like a perfect rank).
    """
    owner = _checked_owners(image, text, image_of_text)
    image, text = image.double(), text.double()
    own = (image[owner] * text).sum(dim=1).float()
    best_own = own.new_full((len(image),), -torch.inf).scatter_reduce(0, owner, own, "amax")
    text_ranks = torch.ones_like(owner)
    image_ranks = []
    for start in range(0, len(image), chunk):
        scores = (image[start : start + chunk] @ text.T).float()
        rows = torch.arange(start, start + len(scores), device=owner.device)
        wrong = owner[None, :] != rows[:, None]
        image_ranks.append(1 + (wrong & (scores >= best_own[rows, None])).sum(dim=1))
        text_ranks += (wrong & (scores >= own[None, :])).sum(dim=0)
    image_rank, text_rank = torch.cat(image_ranks).cpu().numpy(), text_ranks.cpu().numpy()
    return Retrieval(
        image_to_text=_recalls(image_rank),
        text_to_image=_recalls(text_rank),
        image_median_rank=float(np.median(image_rank)),
        text_median_rank=float(np.median(text_rank)),
    )


def group_captions(picture: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs that show the same picture are one image with several captions.

    Args:
        picture: int64 ``[Nt]``, a hash of each pair's picture.

    Returns:
        The first pair of each image, int64 ``[Ni]`` ascending, and the image of each pair's caption, int64 ``[Nt]``.
    """
    _, first, image_of_text = np.unique(picture, return_index=True, return_inverse=True)
    # Images in the order they first come in, not in that of their hashes.
    order = np.argsort(first)
    return first[order], np.argsort(order)[image_of_text]


def five_fold(
    image: Tensor, text: Tensor, image_of_text: NDArray[np.int64], folds: int = 5, *, chunk: int = 256
) -> Retrieval:
    """The MS-COCO 1K protocol: the test set in contiguous fifths, retrieval within each, the mean of the figures.

    Args:
        image: float ``[Ni, d]``, unit-norm rows; 5,000 of them in MS-COCO.
        text: float ``[Nt, d]``, unit-norm rows, in any order: a caption goes where its image goes.
        image_of_text: int64 ``[Nt]``, the image that each caption belongs to.
        folds: how many parts; they differ by at most one image where ``folds`` does not divide Ni.
        chunk: see :func:`retrieval`.

    Returns:
        The mean of every figure over the folds, median ranks included.

    Raises:
        ValueError: as :func:`retrieval`, or there are fewer images than folds, or no fold.
    """
    owner = _checked_owners(image, text, image_of_text).cpu().numpy()
    if not 1 <= folds <= len(image):
        raise ValueError(f"between 1 and {len(image)} folds can be made of {len(image)} images: {folds}")
    bounds = [fold * len(image) // folds for fold in range(folds + 1)]
    parts = []
    for start, end in pairwise(bounds):
        captions = np.flatnonzero((owner >= start) & (owner < end))
        parts.append(
            retrieval(
                image[start:end], text[torch.from_numpy(captions).to(text.device)], owner[captions] - start, chunk=chunk
            )
        )
    return Retrieval(
        image_to_text=_mean_recalls([part.image_to_text for part in parts]),
        text_to_image=_mean_recalls([part.text_to_image for part in parts]),
        image_median_rank=float(np.mean([part.image_median_rank for part in parts])),
        text_median_rank=float(np.mean([part.text_median_rank for part in parts])),
    )


def _checked_owners(image: Tensor, text: Tensor, image_of_text: NDArray[np.int64]) -> Tensor:
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(f"images and texts must be rows of the same width: {list(image.shape)} and {list(text.shape)}")
    owner = np.asarray(image_of_text)
    if owner.shape != (len(text),) or not np.issubdtype(owner.dtype, np.integer):
        raise ValueError(f"one integer index a text is needed: {len(text)} texts, {owner.dtype} {list(owner.shape)}")
    if not len(image):
        raise ValueError("there is no image to retrieve")
    if len(owner) and not 0 <= owner.min() <= owner.max() < len(image):
        outside = owner.min() if owner.min() < 0 else owner.max()
        raise ValueError(f"a text belongs to image {outside}, but there are {len(image)} images")
    without = np.flatnonzero(np.bincount(owner, minlength=len(image)) == 0)
    if len(without):
        raise ValueError(f"{len(without)} of {len(image)} images have no caption, the first being image {without[0]}")
    if not (image.isfinite().all() and text.isfinite().all()):
        raise ValueError("an embedding is not finite")
    return torch.from_numpy(owner.astype(np.int64)).to(image.device)


def _recalls(ranks: NDArray[np.int64]) -> Recalls:
    first, second, third = (100.0 * float(np.mean(ranks <= depth)) for depth in DEPTHS)
    return first, second, third


def _mean_recalls(recalls: list[Recalls]) -> Recalls:
    first, second, third = (float(mean) for mean in np.mean(recalls, axis=0))
    return first, second, third
