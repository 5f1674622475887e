"""Scoring against a frozen reference bank, so that a pair's score never depends on the batch it came in. *Ours*.

A bank is M pairs. A pair is scored against the bank plus itself: an (M+1)-way classification each way, in which class
j < M is bank pair j and class M the pair itself.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor
from torch.linalg import vecdot
from torch.nn.functional import logsigmoid, pad

from noisyclean.srem.entropy import swapped_cross_entropy

CHUNK = 1024
"""Pairs that are scored at a time."""
CPU_TILE, GPU_TILE = 2**19, 2**23
"""Logits, each way, that are summed up at a time: as many as stay in a CPU's cache, or as keep a GPU busy.

Measured with 2¹⁷ to 2²¹ on one and two cores, for 64 to 1,024 pairs at a time, and with 2²⁰ to 2²⁴ on an H200."""
SUM_CHUNK = 128
"""Bank images that are taken at a time for the sums over a whole bank."""


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


@overload
def bank_statistics(
    image: Tensor,
    text: Tensor,
    bank_image: Tensor,
    bank_text: Tensor,
    temperature: Tensor | float,
    own: Tensor,
    *,
    partners: Literal[False] = False,
    chunk: int = CHUNK,
) -> PairStatistics: ...


@overload
def bank_statistics(
    image: Tensor,
    text: Tensor,
    bank_image: Tensor,
    bank_text: Tensor,
    temperature: Tensor | float,
    own: Tensor,
    *,
    partners: Literal[True],
    chunk: int = CHUNK,
) -> tuple[PairStatistics, Partners]: ...


@torch.no_grad()
def bank_statistics(
    image: Tensor,
    text: Tensor,
    bank_image: Tensor,
    bank_text: Tensor,
    temperature: Tensor | float,
    own: Tensor,
    *,
    partners: bool = False,
    chunk: int = CHUNK,
) -> PairStatistics | tuple[PairStatistics, Partners]:
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
        partners: whether the best partners in the bank are looked for too.
        chunk: how many pairs to score at a time. Memory is four tiles of logits, however large the bank is.

    Returns:
        Six float ``[B]``, the dtype of the inputs; no gradient flows through them. If ``partners``: these, and the
        partners.

    Raises:
        ValueError: ``image``, ``text`` and ``own`` do not hold as many pairs, or the bank's two sides do not.
        IndexError: an index in ``own`` is beyond the bank.
    """
    if not len(image) == len(text) == len(own):
        raise ValueError(f"as many images, texts and bank indices are needed: {len(image)}, {len(text)}, {len(own)}")
    _require_paired_bank(bank_image, bank_text)
    if len(own) and own.max() >= len(bank_image):
        raise IndexError(f"{int(own.max())} is beyond a bank of {len(bank_image)} pairs")
    statistics, found = [], []
    for v, t, at in zip(torch.split(image, chunk), torch.split(text, chunk), torch.split(own, chunk), strict=True):
        rivals = _rivals(v, t, bank_image, bank_text, temperature, at, places=partners)
        statistics.append(_statistics((v * t).sum(dim=1), rivals, temperature))
        if rivals.place is not None:
            found.append(_partners(rivals.largest, rivals.place, temperature))
    return (_joined(statistics), _joined(found)) if partners else _joined(statistics)


class NullScores(NamedTuple):
    """What is known of n pairs that are mismatches for certain; float ``[n]`` each."""

    similarity: Tensor
    """s = ⟨image, text⟩, in [−1, 1]."""
    match_score: Tensor
    """log p + log r at the pair's own class, ≤ 0."""


class RivalSums(NamedTuple):
    """What the pairs of a bank are to one another: logsumexps of its logits z without the diagonal, float ``[M]``."""

    image: Tensor
    """R_i, over k ≠ i of z_ik."""
    text: Tensor
    """C_j, over k ≠ j of z_kj."""


@torch.no_grad()
def rival_sums(bank_image: Tensor, bank_text: Tensor, temperature: Tensor | float) -> RivalSums:
    """What all known mismatches of a bank, and its own pairs, are scored by; takes most of the time of doing so.

    Args:
        bank_image: float ``[M, d]``, unit-norm rows, M ≥ 2.
        bank_text: float ``[M, d]``, unit-norm rows.
        temperature: τ > 0.

    Raises:
        ValueError: the bank's two sides do not hold as many pairs, or M < 2.
    """
    _require_paired_bank(bank_image, bank_text)
    if len(bank_image) < 2:
        raise ValueError(f"a mismatch needs two bank pairs; the bank holds {len(bank_image)}")
    return RivalSums(*logsumexps(bank_image, bank_text, temperature, SUM_CHUNK, own=False))


@torch.no_grad()
def bank_match_scores(bank_image: Tensor, bank_text: Tensor, temperature: Tensor | float, rivals: RivalSums) -> Tensor:
    """The match scores of the bank's own pairs, float ``[M]``, as :func:`bank_statistics` has them. *Ours*.

    Args:
        bank_image, bank_text, temperature: as for :func:`rival_sums`, whose result ``rivals`` is.
    """
    own = (bank_image * bank_text).sum(dim=1) / temperature
    return logsigmoid(own - rivals.image) + logsigmoid(own - rivals.text)


@torch.no_grad()
def null_scores(
    bank_image: Tensor, bank_text: Tensor, temperature: Tensor | float, rivals: RivalSums, shifts: int
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
        bank_image, bank_text, temperature: as for :func:`rival_sums`, whose result ``rivals`` is.
        shifts: how many different shifts to take, spread evenly over 1 … M − 1; all M − 1 if more are asked for.

    Returns:
        Two float ``[min(shifts, M − 1) · M]``, shift by shift, the dtype of the inputs; no gradient flows through them.

    Raises:
        ValueError: shifts < 1.
    """
    size = len(bank_image)
    image = torch.arange(size, device=bank_image.device)
    return _joined(
        [
            _mismatches(bank_image, bank_text, temperature, rivals, image, image.roll(-shift))
            for shift in spread_shifts(size, shifts)
        ]
    )


def spread_shifts(size: int, shifts: int) -> list[int]:
    """``shifts`` different numbers spread evenly over 1 … ``size`` − 1, or all of them if more are asked for.

    Raises:
        ValueError: shifts < 1.
    """
    if shifts < 1:
        raise ValueError(f"at least one shift is needed: {shifts}")
    shifts = min(shifts, size - 1)
    # The middles of equal slices, because near-duplicates may lie side by side, one shift apart.
    return [1 + (2 * k + 1) * (size - 1) // (2 * shifts) for k in range(shifts)]


@torch.no_grad()
def near_miss_scores(
    bank_image: Tensor,
    bank_text: Tensor,
    temperature: Tensor | float,
    rivals: RivalSums,
    image: Tensor,
    neighbours: int,
) -> NullScores:
    """The scores of near misses: bank images with captions that are like their own. *Ours*.

    Each image is paired with the ``neighbours`` bank texts whose embeddings are nearest to that of its own text, and
    scored as :func:`null_scores` scores its pairs.

    Args:
        bank_image, bank_text, temperature: as for :func:`rival_sums`, whose result ``rivals`` is.
        image: int64 ``[n]``, which bank images; their pairs should be true ones.
        neighbours: texts an image, at most M − 1 of them.

    Returns:
        Two float ``[n · min(neighbours, M − 1)]``, image by image.

    Raises:
        ValueError: neighbours < 1.
    """
    if neighbours < 1:
        raise ValueError(f"at least one neighbour is needed: {neighbours}")
    neighbours = min(neighbours, len(bank_text) - 1)
    parts = []
    for at in torch.split(image, CHUNK):
        likeness = bank_text[at] @ bank_text.T
        likeness[torch.arange(len(at)), at] = -torch.inf
        near = likeness.topk(neighbours, dim=1).indices
        parts.append(
            _mismatches(bank_image, bank_text, temperature, rivals, at.repeat_interleave(neighbours), near.flatten())
        )
    return _joined(parts)


def without_own(logits: Tensor, own: Tensor) -> Tensor:
    """``[B, M]`` logits, in place, with −∞ in each row's ``own`` columns: int64 ``[B]`` or ``[B, e]``, −1 for none."""
    own = own.view(len(logits), -1)
    row, which = (own >= 0).nonzero(as_tuple=True)
    logits[row, own[row, which]] = -torch.inf
    return logits


def _mismatches(
    bank_image: Tensor,
    bank_text: Tensor,
    temperature: Tensor | float,
    rivals: RivalSums,
    image: Tensor,
    text: Tensor,
) -> NullScores:
    """The scores of bank images with the texts of other bank pairs, of which int64 ``[n]`` indices are given."""
    size = len(bank_image)
    similarity = (bank_image[image] * bank_text[text]).sum(dim=1)
    own = similarity / temperature - math.log((size + 1) / (size - 1))
    return NullScores(similarity, 2 * own - rivals.image[image] - rivals.text[text])


_Columns = TypeVar("_Columns", PairStatistics, Partners, NullScores)


def _joined(parts: list[_Columns]) -> _Columns:
    return type(parts[0])(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _Rivals(NamedTuple):
    """What is kept of the logits of B pairs over the bank: both ways and for each of its K tiles, ``[2, B, K]``.

    First come the images, which choose among the texts, then the texts. With p and r the predictions of an image and
    its text, each over the classes of a tile alone:
    """

    largest: Tensor
    """The largest logit."""
    log_total: Tensor
    """The logsumexp of the logits, less the largest of them."""
    cross_entropy: Tensor
    """−Σ p log r, and −Σ r log p."""
    place: Tensor | None
    """int64, whose it is in the bank; None where that is not asked."""


def _rivals(
    image: Tensor,
    text: Tensor,
    bank_image: Tensor,
    bank_text: Tensor,
    temperature: Tensor | float,
    own: Tensor,
    *,
    places: bool,
) -> _Rivals:
    rows, size = len(image), len(bank_image)
    width = max(1, (CPU_TILE if image.device.type == "cpu" else GPU_TILE) // max(1, rows))
    image, text = image / temperature, text / temperature
    # Of a masked class; −∞ would make 0 · −∞ = nan of its share in a cross-entropy.
    lowest = torch.finfo(image.dtype).min
    shape = 2, rows, -(-size // width)
    largest, log_total, cross_entropy = (image.new_empty(shape) for _ in range(3))
    place = own.new_empty(shape) if places else None
    space = image.new_empty(2, 2, rows, min(width, size))
    for k, start in enumerate(range(0, size, width)):
        # In place, on a tile that stays in the cache: all of this takes a fifth of the time of the two products.
        logits, weights = space[..., : size - start]
        torch.mm(image, bank_text[start : start + width].T, out=logits[0])
        torch.mm(text, bank_image[start : start + width].T, out=logits[1])
        masked = ((own >= start) & (own < start + width)).nonzero().squeeze(1)
        logits[:, masked, own[masked] - start] = lowest
        if place is None:
            torch.amax(logits, dim=2, out=largest[..., k])
        else:
            largest[..., k], at = logits.max(dim=2)
            place[..., k] = at + start
        logits -= largest[..., k, None]
        torch.exp(logits, out=weights)
        total = weights.sum(dim=2)
        log_total[..., k] = total.log()
        # log r = z − logsumexp, and with z ≤ 0 here neither term is below 0: nothing cancels.
        expected = torch.stack([vecdot(weights[0], logits[1]), vecdot(weights[1], logits[0])]) / total
        cross_entropy[..., k] = log_total[..., k].flip(0) - expected
    return _Rivals(largest, log_total, cross_entropy, place)


def _partners(largest: Tensor, place: Tensor, temperature: Tensor | float) -> Partners:
    best, tile = largest.max(dim=2)
    similarity = torch.where(best > torch.finfo(best.dtype).min, best * temperature, -torch.inf)
    text, image = place.gather(2, tile[..., None]).squeeze(2)
    return Partners(text, similarity[0], image, similarity[1])


def _statistics(similarity: Tensor, rivals: _Rivals, temperature: Tensor | float) -> PairStatistics:
    # Logits are taken less the pair's own, which rounds them least and makes that 0: one more tile, the last.
    tiles = rivals.largest - (similarity / temperature)[:, None] + rivals.log_total
    # Not own − logsumexp over all the classes: that would round away what tells the surest pairs, p ≈ 1, from one
    # another. So would log p = (s + E)/τ; the energy −τ·logsumexp is taken from log p = s/τ − logsumexp instead.
    log_p = logsigmoid(-tiles.logsumexp(dim=2))
    energy_image, energy_text = temperature * log_p - similarity
    # By the chain rule: how far the two predictions disagree about the tile, and about the class within it.
    tiles = pad(tiles, (0, 1))
    within = (tiles.softmax(dim=2)[..., :-1] * rivals.cross_entropy).sum(dim=(0, 2)) / 2
    return PairStatistics(
        similarity=similarity,
        energy_image=energy_image,
        energy_text=energy_text,
        energy=(energy_image + energy_text) / 2,
        match_score=log_p.sum(dim=0),
        swapped_entropy=swapped_cross_entropy(*tiles) + within,
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
        logits = image[start : start + chunk] / temperature @ text.T
        if not own:
            logits.diagonal(start).fill_(-torch.inf)
        rows.append(logits.logsumexp(dim=1))
        columns = torch.logaddexp(columns, logits.logsumexp(dim=0))
    return torch.cat(rows), columns


def _require_paired_bank(bank_image: Tensor, bank_text: Tensor) -> None:
    if len(bank_image) != len(bank_text):
        raise ValueError(f"the bank's images and texts must be as many: {len(bank_image)} and {len(bank_text)}")
