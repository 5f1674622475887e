"""Matching as classification: each image chooses among the texts of its batch, each text among the images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def pair_logits(image: Tensor, text: Tensor, temperature: Tensor | float) -> Tensor:
    """The logits z = image @ textᵀ / τ of the two in-batch classification tasks.

    Row i classifies image i over the texts and column i text i over the images; the label of both is i. *Stated*:
    "viewing sample matching as classification tasks within the batch". Where several processes share a batch, see
    :class:`PairMatrix`.

    Args:
        image: float ``[B, d]``, unit-norm rows.
        text: float ``[B, d]``, unit-norm rows; row i is the text paired with image i.
        temperature: τ > 0, a number or a scalar tensor (gradients flow into it).

    Returns:
        Float ``[B, B]``, the dtype of the inputs.

    Raises:
        ValueError: the two are not of one shape.
    """
    if image.shape != text.shape:
        raise ValueError(
            f"image and text must be of one shape, one row a pair: {list(image.shape)} and {list(text.shape)}"
        )
    return image @ text.T / temperature


@dataclass(frozen=True)
class PairMatrix:
    """A ``[B, B]`` matrix of images and texts, of which this process holds the rows and columns of b pairs. *Ours*.

    Each of several processes that train on one batch holds those of its own pairs, 2·b·B numbers in place of B². What
    is computed of a pair by its row and its column is gathered from them all, so that what is computed of the batch is
    the same in every process. Alone, a process holds all: ``images`` and ``texts`` are one tensor.

    Attributes:
        images: ``[b, B]``, the rows: own images, all texts.
        texts: ``[B, b]``, the columns: all images, own texts.
        first: the own pairs are those from here on.
        gather: ``[b, …]`` of the own pairs → ``[B, …]`` of all, differentiable.
    """

    images: Tensor
    texts: Tensor
    first: int = 0
    gather: Callable[[Tensor], Tensor] = lambda own: own

    @classmethod
    def of(cls, matrix: Tensor | PairMatrix) -> PairMatrix:
        """``matrix``, all of it held here if it is a tensor."""
        return matrix if isinstance(matrix, PairMatrix) else cls(matrix, matrix)

    @classmethod
    def shared(
        cls, part: Callable[[slice, slice], Tensor], pairs: int, own: slice, gather: Callable[[Tensor], Tensor]
    ) -> PairMatrix:
        """The matrix of so many ``pairs``, of which ``own`` are held here.

        Args:
            part: computes any part of the matrix: that of the images in one slice and of the texts in another.
        """
        everyone = slice(0, pairs)
        images = part(own, everyone)
        texts = images if own == everyone else part(everyone, own)
        return cls(images, texts, own.start, gather)

    def __len__(self) -> int:
        return self.images.shape[1]

    def __truediv__(self, divisor: Tensor) -> PairMatrix:
        return self.map(lambda one: one / divisor)

    def map(self, function: Callable[..., Tensor], *others: PairMatrix) -> PairMatrix:
        """``function``, which works element by element, of this and of ``others``, of which the same is held here."""
        images = function(self.images, *(one.images for one in others))
        alone = self.texts is self.images
        texts = images if alone else function(self.texts, *(one.texts for one in others))
        return PairMatrix(images, texts, self.first, self.gather)

    def detach(self) -> PairMatrix:
        """The same numbers, held constant."""
        return self.map(Tensor.detach)

    @property
    def whole(self) -> Tensor:
        """``[B, B]``, for what cannot be computed pair by pair. Every process then has all of it."""
        return self.gather(self.images)
