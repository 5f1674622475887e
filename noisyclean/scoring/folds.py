"""Which model may score a pair: the one that never saw it.

Fold-k's model trains on the pairs of all other folds, so it alone scores those of fold k. The fold is a function of
the caption, not of where the pair lies: a corpus that is re-sharded or re-keyed after ``fit`` keeps its folds.

With a single fold there is but one model, which trains on all pairs but a hold-out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A caption on more pairs than this ("click to enlarge") says nothing of any one picture, nor does a picture on more
# pairs ("image not found") of any one caption: they tie no folds together.
_TEMPLATE_USES = 100


@dataclass(frozen=True)
class FoldMap:
    """Caption → fold. A caption's fold is its hash modulo ``folds``, but for the exceptions.

    Attributes:
        folds: their number.
        captions: (E,) int64, sorted hashes of the captions that are exceptions.
        exceptions: (E,) int64, their folds.
        holdout: share of the captions that no model trains on.
    """

    folds: int
    captions: NDArray[np.int64]
    exceptions: NDArray[np.int64]
    holdout: float = 0.0

    def fold_of(self, caption: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) caption hashes → (N,) folds in [0, folds)."""
        fold = np.mod(caption, self.folds)
        if len(self.captions):
            at = np.minimum(np.searchsorted(self.captions, caption), len(self.captions) - 1)
            fold = np.where(self.captions[at] == caption, self.exceptions[at], fold)
        return fold

    def is_held_out(self, caption: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(N,) caption hashes → (N,) whether no model trains on their pairs."""
        # By the upper half of the hash: folds go by its remainder, and the two must not depend on each other.
        return (caption.view(np.uint64) >> np.uint64(32)) % np.uint64(10_000) < np.uint64(round(self.holdout * 10_000))

    def is_in_sample(self, caption: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(N,) caption hashes of fitted pairs → (N,) whether the model that scores them has trained on them."""
        return ~self.is_held_out(caption) if self.folds == 1 else np.zeros(len(caption), np.bool_)


def assign_folds(caption: NDArray[np.int64], image: NDArray[np.int64], folds: int, *, holdout: float = 0.0) -> FoldMap:
    """Put pairs that share a caption or a picture into the same fold.

    Args:
        caption, image: (N,) hashes of the usable pairs' captions and pictures.
        folds: how many.
        holdout: share of the captions that no model trains on.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    captions, row, uses = np.unique(caption, return_inverse=True, return_counts=True)
    _, picture, shown = np.unique(image, return_inverse=True, return_counts=True)
    binding = (uses[row] <= _TEMPLATE_USES) & (shown[picture] <= _TEMPLATE_USES)
    order = np.argsort(image[binding], kind="stable")
    sorted_image, sorted_row = image[binding][order], row[binding][order]
    same = sorted_image[1:] == sorted_image[:-1]
    links = (sorted_row[:-1][same], sorted_row[1:][same])
    graph = coo_array((np.ones(len(links[0]), np.int8), links), shape=(len(captions), len(captions)))
    _, component = connected_components(graph, directed=False)
    # Captions are sorted, so the first of each component is its smallest hash: it names the component's fold.
    _, first = np.unique(component, return_index=True)
    fold = np.mod(captions[first], folds)[component]
    differs = fold != np.mod(captions, folds)
    return FoldMap(folds, captions[differs], fold[differs], holdout)


SKETCH_SIZE = 2**20
"""Pairs of a fitted corpus that are remembered: 8 bytes each."""


def sketch_pairs(caption: NDArray[np.int64], image: NDArray[np.int64]) -> NDArray[np.uint64]:
    """(N,) hashes of captions and of pictures → the ``SKETCH_SIZE`` smallest hashes of the pairs, ascending.

    A bottom-k sketch (Cohen 1997): of any other corpus it tells which of the pairs with so small a hash were there,
    whatever shards and keys they are in now.
    """
    return np.unique(_pair_hash(caption, image))[:SKETCH_SIZE]


def known_share(sketch: NDArray[np.uint64], caption: NDArray[np.int64], image: NDArray[np.int64]) -> float:
    """The share of N pairs that are in the corpus of a sketch, by those whose hashes are small enough to tell."""
    pairs = _pair_hash(caption, image)
    if len(sketch) == SKETCH_SIZE:
        pairs = pairs[pairs <= sketch[-1]]
    return float(np.isin(pairs, sketch).mean()) if len(pairs) else 0.0


def _pair_hash(caption: NDArray[np.int64], image: NDArray[np.int64]) -> NDArray[np.uint64]:
    # Both are uniform hashes already; an odd factor keeps a picture and a caption of equal hash from cancelling.
    return caption.view(np.uint64) ^ (image.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
