"""Matching as classification: each image chooses among the texts of its batch, each text among the images."""

from __future__ import annotations

from torch import Tensor


def pair_logits(image: Tensor, text: Tensor, temperature: Tensor | float) -> Tensor:
    """The logits z = image @ textᵀ / τ of the two in-batch classification tasks.

    Row i classifies image i over the texts and column i text i over the images; the label of both is i. *Stated*:
    "viewing sample matching as classification tasks within the batch". In distributed training pass the gathered batch.

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
