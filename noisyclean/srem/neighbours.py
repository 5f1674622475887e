"""Match scores in which a pair's neighbours have a say: pictures that look alike have captions that say alike. *Ours*.

What a side asks the bank is expanded by what its neighbours in a pool of pairs have on the other side: u_i is the mean
of the texts of the pool images nearest to image i, v_i that of the images of the pool texts nearest to text i. With the
queries f_i + u_i and g_i + v_i in place of f_i and g_i the pair is classified both ways as by
:func:`noisyclean.srem.bank_statistics`. (Neighbours that look across are LEMoN's idea, Zhang et al. 2025; expanding a
query by what it finds is that of Chum et al. 2007.)

The bank itself is not expanded: what a pair of the pool adds to others would come back to it as a rival of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from noisyclean.srem.bank import spread_shifts, without_own

CHUNK = 256
"""Pairs that are taken at a time."""


@torch.no_grad()
def expanded_queries(
    side: Tensor,
    pool_side: Tensor,
    pool_other: Tensor,
    log_weight: Tensor,
    own: Tensor,
    temperature: Tensor | float,
    neighbours: int,
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """One side of B pairs, each plus what its nearest in the pool have on the other side, f + u. *Ours*.

    Args:
        side: float ``[B, d]``, unit-norm rows, finite: the images, or the texts.
        pool_side: float ``[P, d]``, unit-norm rows: the same side of the pool's pairs, P ≥ 2.
        pool_other: float ``[P, d]``, unit-norm rows: their other side.
        log_weight: float ``[P]``, the logarithm of how far each of these is trusted.
        own: int64 ``[B, e]``, places in the pool that each pair may not ask: itself, and who shares a side with it; −1
            for none.
        temperature: τ > 0; the mean is weighted by softmax of s/τ + ``log_weight``, and scaled to unit norm.
        neighbours: how many are asked; all that there are if they are fewer.
        chunk: how many pairs to take at a time. Memory is one ``[chunk, P]`` and one ``[chunk, neighbours, d]``.

    Returns:
        Float ``[B, d]``, of a norm between 0 and 2. It depends on the pair and the pool alone.
    """
    parts = []
    for some, itself in zip(torch.split(side, chunk), torch.split(own, chunk), strict=True):
        similarity = without_own(some @ pool_side.T, itself)
        nearest, place = similarity.topk(min(neighbours, len(pool_side)), dim=1)
        share = (nearest / temperature + log_weight[place]).softmax(dim=1)
        parts.append(some + normalize(torch.einsum("bk,bkd->bd", share, pool_other[place]), dim=1))
    return torch.cat(parts)


@torch.no_grad()
def expanded_match_scores(
    image: Tensor,
    text: Tensor,
    image_query: Tensor,
    text_query: Tensor,
    bank_image: Tensor,
    bank_text: Tensor,
    temperature: Tensor | float,
    own: Tensor,
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """log p + log r at the pair's own class, p by the image's query and r by the text's. *Ours*.

    Args:
        image, text: float ``[B, d]``, unit-norm rows.
        image_query, text_query: float ``[B, d]``, by :func:`expanded_queries`.
        bank_image, bank_text: float ``[M, d]``, unit-norm rows.
        temperature: τ > 0.
        own: int64 ``[B]``, the index of each pair in the bank, where it is masked out; −1 if it is not there.
        chunk: how many pairs to take at a time. Memory is two ``[chunk, M]``.

    Returns:
        Float ``[B]``, ≤ 0.
    """
    scores = torch.zeros_like(image[:, 0])
    for query, answer, rivals in ((image_query, text, bank_text), (text_query, image, bank_image)):
        others = [
            without_own(some @ rivals.T / temperature, itself).logsumexp(dim=1)
            for some, itself in zip(torch.split(query, chunk), torch.split(own, chunk), strict=True)
        ]
        scores += logsigmoid((query * answer).sum(dim=1) / temperature - torch.cat(others))
    return scores


@torch.no_grad()
def expanded_null_scores(
    bank_image: Tensor,
    bank_text: Tensor,
    image_query: Tensor,
    text_query: Tensor,
    temperature: Tensor | float,
    shifts: int,
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """Such scores of known mismatches, as :func:`noisyclean.srem.null_scores` makes and corrects them. *Ours*.

    Where pair j is among those that image i has asked, or i among those that text j has, the mismatch (i, j) is helped
    as no mismatch outside the bank is. So small p-values come out too large: one of .01 by a fifth in a pool of 3,000
    pairs of which ten are asked, one of .001 by two fifths; in a pool of 600 by nearly a half, and to twice its size.

    Args:
        bank_image, bank_text: float ``[M, d]``, unit-norm rows.
        image_query, text_query: float ``[M, d]``, of the bank's pairs, by :func:`expanded_queries`.
        temperature: τ > 0.
        shifts: how many different shifts to take; all M − 1 if more are asked for.

    Returns:
        Float ``[min(shifts, M − 1) · M]``.
    """
    size = len(bank_image)
    itself = torch.arange(size, device=bank_image.device)
    image_others, text_others = (
        torch.cat(
            [without_own(query[at] @ rivals.T / temperature, at).logsumexp(dim=1) for at in torch.split(itself, chunk)]
        )
        for query, rivals in ((image_query, bank_text), (text_query, bank_image))
    )
    parts = []
    for shift in spread_shifts(size, shifts):
        text = itself.roll(-shift)
        own = (image_query * bank_text[text]).sum(dim=1) + (bank_image * text_query[text]).sum(dim=1)
        parts.append(own / temperature - image_others - text_others[text])
    return torch.cat(parts) - 2 * math.log((size + 1) / (size - 1))
