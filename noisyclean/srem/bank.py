"""Scoring against a frozen reference bank, so that a pair's score never depends on the batch it came in. *Ours*.

A bank is M pairs. A pair is scored against the bank plus itself: an (M+1)-way classification each way, in which class
j < M is bank pair j and class M the pair itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from noisyclean.srem.entropy import swapped_cross_entropy


class PairStatistics(NamedTuple):
    """What is known of each of B pairs; all float ``[B]``."""

    similarity: Tensor
    """s = ⟨image, text⟩, in [−1, 1]."""
    energy_image: Tensor
    """E_v, of the image over the texts; see :func:`noisyclean.srem.energy`."""
    energy_text: Tensor
    """E_t, of the text over the images."""
    energy: Tensor
    """(E_v + E_t)/2; higher is more uncertain."""
    match_score: Tensor
    """log p + log r at the pair's own class, ≤ 0; see :func:`noisyclean.srem.match_score`."""
    swapped_entropy: Tensor
    """H_s over all the classes, ≥ 0; see :func:`noisyclean.srem.swapped_cross_entropy`."""


class Partners(NamedTuple):
    """The bank pairs that suit each of B pairs best. *Ours*."""

    text: Tensor
    """int64 ``[B]``, the bank pair whose text is most similar to the pair's image."""
    text_similarity: Tensor
    """float ``[B]``, of that text and the image, in [−1, 1]; −∞ where all the bank is masked out."""
    image: Tensor
    """int64 ``[B]``, the bank pair whose image is most similar to the pair's text."""
    image_similarity: Tensor
    """float ``[B]``, of that image and the text, likewise."""


@torch.no_grad()
def bank_statistics(
    image: Tensor,
    text: Tensor,
    bank_image: Tensor,
    bank_text: Tensor,
    temperature: Tensor | float,
    own: Tensor,
    *,
    chunk: int = 1024,
) -> PairStatistics:
    """Score B pairs against the bank. *Ours*.

    A pair's statistics depend neither on the other B − 1 pairs nor on the order of the bank, up to the rounding of the
    matrix product.

    Args:
        image: float ``[B, d]``, unit-norm rows.
        text: float ``[B, d]``, unit-norm rows; row i is the text paired with image i.
        bank_image: float ``[M, d]``, unit-norm rows.
        bank_text: float ``[M, d]``, unit-norm rows.
        temperature: τ > 0.
        own: int64 ``[B]``, the index of each pair in the bank, where it is masked out so that the pair is not its own
            rival; −1 for a pair that is not in the bank.
        chunk: how many pairs to score at a time; memory is a few ``[chunk, M]`` matrices.

    Returns:
        Six float ``[B]``, the dtype of the inputs; no gradient flows through them.

    Raises:
        ValueError: ``image``, ``text`` and ``own`` do not hold as many pairs, or the bank's two sides do not.
        IndexError: an index in ``own`` is beyond the bank.
    """
    chunks = _candidates(image, text, bank_image, bank_text, temperature, own, chunk)
    return _joined([_statistics(one, temperature) for one in chunks])


@torch.no_grad()
def statistics_and_partners(
    image: Tensor,
    text: Tensor,
    bank_image: Tensor,
    bank_text: Tensor,
    temperature: Tensor | float,
    own: Tensor,
    *,
    chunk: int = 1024,
) -> tuple[PairStatistics, Partners]:
    """Score B pairs as :func:`bank_statistics`, which says what is given, and find their best partners in the bank.

    The similarities are taken from the logits that the statistics need anyway, without the pair's own index.
    """
    statistics, partners = [], []
    for one in _candidates(image, text, bank_image, bank_text, temperature, own, chunk):
        statistics.append(_statistics(one, temperature))
        partners.append(_partners(one, temperature))
    return _joined(statistics), _joined(partners)


class NullScores(NamedTuple):
    """What is known of n pairs that are mismatches for certain; float ``[n]`` each."""

    similarity: Tensor
    """s = ⟨image, text⟩, in [−1, 1]."""
    match_score: Tensor
    """log p + log r at the pair's own class, ≤ 0."""


@torch.no_grad()
def null_scores(
    bank_image: Tensor, bank_text: Tensor, temperature: Tensor | float, shifts: int, *, chunk: int = 1024
) -> NullScores:
    """The scores of known mismatches: bank images with the texts of other bank pairs. *Ours*.

    Image i is paired with text j = (i + shift) mod M and scored against the bank without pairs i and j, plus itself.
    Among its candidates the true partners, text i and image j, must be absent, as they are for a mismatch found outside
    the bank. So the image's logsumexp runs over row i of the bank's own logits without the diagonal entry, and the
    text's over column j without it: nothing is subtracted, nothing cancels.

    A pair outside the bank has M + 1 candidates, a null pair M − 1. A mismatch's own logit is exchangeable with those
    of its rivals, so both sums grow as their number of terms: log((M + 1)/(M − 1)) added to the null's two logsumexps
    makes the two kinds of score comparable.

    Args:
        bank_image: float ``[M, d]``, unit-norm rows, M ≥ 2.
        bank_text: float ``[M, d]``, unit-norm rows.
        temperature: τ > 0.
        shifts: how many different shifts to take, spread evenly over 1 … M − 1; all M − 1 if more are asked for.
        chunk: how many bank images to take at a time; memory is a few ``[chunk, M]`` matrices.

    Returns:
        Two float ``[min(shifts, M − 1) · M]``, shift by shift, the dtype of the inputs; no gradient flows through them.

    Raises:
        ValueError: the bank's two sides do not hold as many pairs, M < 2, or shifts < 1.
    """
    if shifts < 1:
        raise ValueError(f"at least one shift is needed: {shifts}")
    mismatches = _Mismatches(bank_image, bank_text, temperature, chunk)
    size = len(bank_image)
    image = torch.arange(size, device=bank_image.device)
    shifts = min(shifts, size - 1)
    # The middles of equal slices of 1 … M − 1, because near-duplicates may lie side by side, one shift apart.
    spread = [1 + (2 * k + 1) * (size - 1) // (2 * shifts) for k in range(shifts)]
    return _joined([mismatches.scores(image, image.roll(-shift)) for shift in spread])


@torch.no_grad()
def near_miss_scores(
    bank_image: Tensor,
    bank_text: Tensor,
    temperature: Tensor | float,
    image: Tensor,
    neighbours: int,
    *,
    chunk: int = 1024,
) -> NullScores:
    """The scores of near misses: bank images with captions that are like their own. *Ours*.

    Each image is paired with the ``neighbours`` bank texts whose embeddings are nearest to that of its own text, and
    scored as :func:`null_scores` scores its pairs.

    Args:
        bank_image, bank_text, temperature, chunk: as for :func:`null_scores`.
        image: int64 ``[n]``, which bank images; their pairs should be true ones.
        neighbours: texts an image, at most M − 1 of them.

    Returns:
        Two float ``[n · min(neighbours, M − 1)]``, image by image.

    Raises:
        ValueError: the bank's two sides do not hold as many pairs, M < 2, or neighbours < 1.
    """
    if neighbours < 1:
        raise ValueError(f"at least one neighbour is needed: {neighbours}")
    mismatches = _Mismatches(bank_image, bank_text, temperature, chunk)
    neighbours = min(neighbours, len(bank_text) - 1)
    parts = []
    for at in torch.split(image, chunk):
        likeness = bank_text[at] @ bank_text.T
        likeness[torch.arange(len(at)), at] = -torch.inf
        near = likeness.topk(neighbours, dim=1).indices
        parts.append(mismatches.scores(at.repeat_interleave(neighbours), near.flatten()))
    return _joined(parts)


class _Mismatches:
    """Scores any image of a bank with the text of another of its pairs."""

    def __init__(self, bank_image: Tensor, bank_text: Tensor, temperature: Tensor | float, chunk: int) -> None:
        _require_paired_bank(bank_image, bank_text)
        size = len(bank_image)
        if size < 2:
            raise ValueError(f"a mismatch needs two bank pairs; the bank holds {size}")
        self._image, self._text, self._temperature = bank_image, bank_text, temperature
        self._row_lse, self._column_lse = logsumexps(bank_image, bank_text, temperature, chunk, own=False)
        self._correction = math.log((size + 1) / (size - 1))

    def scores(self, image: Tensor, text: Tensor) -> NullScores:
        similarity = (self._image[image] * self._text[text]).sum(dim=1)
        own = similarity / self._temperature - self._correction
        return NullScores(similarity, 2 * own - self._row_lse[image] - self._column_lse[text])


_Columns = TypeVar("_Columns", PairStatistics, Partners, NullScores)


def _joined(parts: list[_Columns]) -> _Columns:
    return type(parts[0])(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _Candidates(NamedTuple):
    """Of a chunk of B pairs: their similarities ``[B]``, and both ways the logits of all M + 1 classes."""

    similarity: Tensor
    image_logits: Tensor
    text_logits: Tensor


def _candidates(
    image: Tensor,
    text: Tensor,
    bank_image: Tensor,
    bank_text: Tensor,
    temperature: Tensor | float,
    own: Tensor,
    chunk: int,
) -> Iterator[_Candidates]:
    if not len(image) == len(text) == len(own):
        raise ValueError(f"as many images, texts and bank indices are needed: {len(image)}, {len(text)}, {len(own)}")
    _require_paired_bank(bank_image, bank_text)
    for v, t, at in zip(torch.split(image, chunk), torch.split(text, chunk), torch.split(own, chunk), strict=True):
        similarity = (v * t).sum(dim=1)
        in_bank = (at >= 0).nonzero().squeeze(1)
        image_logits = torch.cat([v / temperature @ bank_text.T, similarity[:, None] / temperature], dim=1)
        text_logits = torch.cat([t / temperature @ bank_image.T, similarity[:, None] / temperature], dim=1)
        for logits in (image_logits, text_logits):
            logits[:, :-1][in_bank, at[in_bank]] = -torch.inf
        yield _Candidates(similarity, image_logits, text_logits)


def _partners(candidates: _Candidates, temperature: Tensor | float) -> Partners:
    text, image = candidates.image_logits[:, :-1].max(dim=1), candidates.text_logits[:, :-1].max(dim=1)
    return Partners(text.indices, text.values * temperature, image.indices, image.values * temperature)


def _statistics(candidates: _Candidates, temperature: Tensor | float) -> PairStatistics:
    similarity = candidates.similarity
    log_p, log_r = candidates.image_logits.log_softmax(dim=1), candidates.text_logits.log_softmax(dim=1)
    # As log p = s/τ − logsumexp, the energy −τ·logsumexp is τ·log p − s without another pass over the bank. The other
    # way round, log p = (s + E)/τ would round away what tells the surest pairs, p ≈ 1, from one another.
    energy_image = temperature * log_p[:, -1] - similarity
    energy_text = temperature * log_r[:, -1] - similarity
    return PairStatistics(
        similarity=similarity,
        energy_image=energy_image,
        energy_text=energy_text,
        energy=(energy_image + energy_text) / 2,
        match_score=log_p[:, -1] + log_r[:, -1],
        swapped_entropy=swapped_cross_entropy(log_p, log_r),  # log-probabilities are logits of themselves
    )


def logsumexps(
    image: Tensor, text: Tensor, temperature: Tensor | float, chunk: int, *, own: bool = True
) -> tuple[Tensor, Tensor]:
    """The logsumexp of every row and of every column of the logits of M pairs, two float ``[M]``.

    Args:
        chunk: how many images to take at a time.
        own: whether a pair's own logit, on the diagonal, is among them.
    """
    rows = []
    columns = image.new_full((len(image),), -torch.inf)
    for start in range(0, len(image), chunk):
        logits = image[start : start + chunk] @ text.T / temperature
        if not own:
            logits.diagonal(start).fill_(-torch.inf)
        rows.append(logits.logsumexp(dim=1))
        columns = torch.logaddexp(columns, logits.logsumexp(dim=0))
    return torch.cat(rows), columns


def _require_paired_bank(bank_image: Tensor, bank_text: Tensor) -> None:
    if len(bank_image) != len(bank_text):
        raise ValueError(f"the bank's images and texts must be as many: {len(bank_image)} and {len(bank_text)}")
