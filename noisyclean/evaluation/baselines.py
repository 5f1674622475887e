"""Training-free scores of how well the pairs of a corpus match, from their embeddings alone.

One function a method, all of the form ``f(image, text, temperature, *, ...)``: unit-norm embeddings ``[N, d]`` of N
pairs in, float ``[N]`` out, **higher is better matched**. The published ones are the baselines of a benchmark; the last
two are *ours*. s_ij is the inner product of image i and text j.

Where a method leaves a choice open, or its public code does otherwise than its formula, the docstring says what is
done here.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from noisyclean.srem import bank_statistics, logsumexps
from noisyclean.srem.bank import without_own

LEMON_BETA = 5.0
LEMON_GAMMA = 5.0
LEMON_TAU_1 = 0.1
LEMON_TAU_2 = 5.0


@torch.no_grad()
def clip_score(image: Tensor, text: Tensor, temperature: float) -> Tensor:
    """The similarity s_ii: CLIPScore (Hessel et al. 2021) without its scale of 2.5 and its cut at 0.

    Args:
        image: float ``[N, d]``, unit-norm rows.
        text: float ``[N, d]``, unit-norm rows; row i is the text paired with image i.
        temperature: not used.

    Returns:
        Float ``[N]`` in [−1, 1], same dtype.

    Raises:
        ValueError: the two are not of one shape.
    """
    _require_pairs(image, text)
    return (image * text).sum(dim=1)


@torch.no_grad()
def neg_clip_loss(
    image: Tensor,
    text: Tensor,
    temperature: float,
    *,
    batch_size: int = 32_768,
    batches: int = 10,
    seed: int = 0,
    chunk: int = 1024,
) -> Tensor:
    """negCLIPLoss: s_ii − (τ/2K) Σ_k [log Σ_j e^{s_ij/τ} + log Σ_j e^{s_ji/τ}] over K random batches that hold pair i.

    Wang et al. (2024), "CLIPLoss and Norm-Based Data Selection Methods for Multimodal Contrastive Learning"; the
    defaults are among those of the scripts that come with its code. That cuts K random permutations into batches, as is
    done here, but leaves the last batch of each short; here that one is filled up with pairs already scored, so that
    all sums have as many terms. With N ≤ ``batch_size`` there is one batch to draw, and the score is τ/2 times that of
    :func:`bank_match_score` against all pairs.

    Args:
        image: float ``[N, d]``, unit-norm rows.
        text: float ``[N, d]``, unit-norm rows; row i is the text paired with image i.
        temperature: τ > 0; 0.01 in the paper, CLIP's own.
        batch_size: pairs in a batch, N if there are fewer.
        batches: K ≥ 1.
        seed: of the permutations.
        chunk: how many images to take at a time; memory is a few ``[chunk, batch_size]`` matrices.

    Returns:
        Float ``[N]``, ≤ 0, same dtype.

    Raises:
        ValueError: the two are not of one shape, or there is no batch or nothing in it.
    """
    _require_pairs(image, text)
    if batch_size < 1 or batches < 1:
        raise ValueError(f"at least one batch of at least one pair is needed: {batches} of {batch_size}")
    size = len(image)
    if size <= batch_size:
        batch_size, batches = size, 1
    generator = torch.Generator().manual_seed(seed)
    total = image.new_zeros(size)
    for _ in range(batches):
        order = torch.randperm(size, generator=generator).to(image.device)
        for start in range(0, size, batch_size):
            filled = max(min(start, size - batch_size), 0)
            batch = order[filled : filled + batch_size]
            row, column = logsumexps(image[batch], text[batch], temperature, chunk)
            new = start - filled
            total[batch[new:]] += (row + column)[new:]
    return clip_score(image, text, temperature) - temperature / (2 * batches) * total


@torch.no_grad()
def lemon_fix(image: Tensor, text: Tensor, temperature: float, *, neighbours: int = 30, chunk: int = 1024) -> Tensor:
    """LEMoN with its fixed parameters, negated: −(d_i + β·s_n + γ·s_m).

    Zhang et al. (2025), "LEMoN: Label Error Detection using Multimodal Neighbors" (ICML; arXiv 2407.18941). With the
    cosine distance d(a, b) = 1 − ⟨a, b⟩ and d_j = d(image j, text j) of any pair j:

    * s_n = 1/k Σ_n d(text i, text n) · exp(−τ1·d(image i, image n)) · exp(−τ2·d_n) over the k images n nearest to i;
    * s_m = 1/k Σ_m d(image i, image m) · exp(−τ1·d(text i, text m)) · exp(−τ2·d_m) over the k texts m nearest to i;
    * k = 30, β = γ = 5, τ1 = 0.1, τ2 = 5.

    The neighbours are the other N − 1 pairs of the corpus that is judged (the paper has a training set beside it, but
    judges that one so too), a pair being left out by its position. The public code weighs by exp(τ1·⟨·,·⟩) instead of
    exp(−τ1·d), which makes both sums e^{τ1} = 1.105 times as large; the formula is followed here.

    Args:
        image: float ``[N, d]``, unit-norm rows.
        text: float ``[N, d]``, unit-norm rows; row i is the text paired with image i.
        temperature: not used.
        neighbours: k; N − 1 if that is less.
        chunk: how many pairs to take at a time; memory is two ``[chunk, N]`` and two ``[chunk, k, d]`` arrays.

    Returns:
        Float ``[N]``, same dtype; which of exactly tied neighbours counts is left open.

    Raises:
        ValueError: the two are not of one shape, or ``neighbours`` < 1.
    """
    _require_pairs(image, text)
    distance = 1 - (image * text).sum(dim=1)
    image_similarity, near_image = _nearest_others(image, neighbours, chunk)
    text_similarity, near_text = _nearest_others(text, neighbours, chunk)
    by_image = _neighbour_discrepancy(text, image_similarity, near_image, distance, chunk)
    by_text = _neighbour_discrepancy(image, text_similarity, near_text, distance, chunk)
    return -(distance + LEMON_BETA * by_image + LEMON_GAMMA * by_text)


@torch.no_grad()
def deep_knn(
    image: Tensor,
    text: Tensor,
    temperature: float,
    *,
    neighbours: int = 10,
    clusters: int = 100,
    seed: int = 0,
    chunk: int = 1024,
) -> Tensor:
    """Deep k-NN: the share of the k nearest images whose caption is in the same cluster.

    Bahri et al. (2020), "Deep k-NN for Noisy Labels", trusts a label as far as the nearest neighbours share it.
    Captions become labels by k-means of their embeddings, as in the comparison of LEMoN (see :func:`lemon_fix`), whose
    script has these defaults: 10 neighbours, 100 clusters. Here the k-means is run once, not five times.

    Args:
        image: float ``[N, d]``, unit-norm rows.
        text: float ``[N, d]``, unit-norm rows; row i is the text paired with image i.
        temperature: not used.
        neighbours: k; N − 1 if that is less.
        clusters: as how many labels the captions are taken; N if that is less.
        seed: of the k-means.
        chunk: how many images to take at a time; memory is two ``[chunk, N]`` matrices.

    Returns:
        Float ``[N]`` in [0, 1], same dtype, multiples of 1/k; 0 for a pair that is alone.

    Raises:
        ValueError: the two are not of one shape, or there are no neighbours or clusters to take.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    _require_pairs(image, text)
    if clusters < 1:
        raise ValueError(f"at least one cluster is needed: {clusters}")
    _, near = _nearest_others(image, neighbours, chunk)
    if not near.numel():
        return image.new_zeros(len(image))
    means = KMeans(n_clusters=min(clusters, len(text)), n_init=1, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer captions than clusters are different
        label = torch.from_numpy(means.fit_predict(text.cpu().numpy())).to(image.device)
    return (label[near] == label[:, None]).to(image.dtype).mean(dim=1)


@torch.no_grad()
def bank_match_score(
    image: Tensor, text: Tensor, temperature: float, *, bank: Tensor | None = None, chunk: int = 1024
) -> Tensor:
    """The match score log p + log r against a bank of these pairs, a pair being no rival of its own. *Ours*.

    See :func:`noisyclean.srem.bank_statistics`.

    Args:
        image: float ``[N, d]``, unit-norm rows.
        text: float ``[N, d]``, unit-norm rows; row i is the text paired with image i.
        temperature: τ > 0.
        bank: int64 ``[M]``, which of the pairs are the bank, all different; None: all of them.
        chunk: how many pairs to take at a time; memory is a few ``[chunk, M]`` matrices.

    Returns:
        Float ``[N]``, ≤ 0, same dtype.

    Raises:
        ValueError: the two are not of one shape.
    """
    _require_pairs(image, text)
    bank, own = _bank_and_own(len(image), bank, image.device)
    return bank_statistics(image, text, image[bank], text[bank], temperature, own, chunk=chunk).match_score


@torch.no_grad()
def claimed_match_score(
    image: Tensor, text: Tensor, temperature: float, *, bank: Tensor | None = None, chunk: int = 1024
) -> Tensor:
    """The match score, less how much others lay claim to the pair's image and text. *Ours*.

    p_ij is the probability that image i chooses text j, r_ji that text j chooses image i. The match score asks how sure
    the two are of one another, log p_ii + log r_ii. To this is added whose they are in the eyes of all others: of all
    choices that fall on the image the share that comes from its text, and the reverse,

        log p_ii + log r_ii + log(r_ii / Σ_j r_ji) + log(p_ii / Σ_j p_ji).

    So a rival text that is clearly another image's counts for less, and one that belongs nowhere else for more. The
    shares are the inverted softmax of Smith et al. (2017), "Offline bilingual word vectors, orthogonal transformations
    and the inverted softmax", used against hubs; there is nothing to set.

    What it gains over the match score it gains where a wrong caption's own image, or a wrong image's own caption, is in
    the bank: on 500 COCO pairs with mismatches planted among them and all of them the bank. Where they are not, and
    with a bank of a quarter of the pairs, it is no better.

    Args:
        image: float ``[N, d]``, unit-norm rows.
        text: float ``[N, d]``, unit-norm rows; row i is the text paired with image i.
        temperature: τ > 0.
        bank: int64 ``[M]``, which of the pairs are the bank, all different; None: all of them. A pair outside it is
            scored as if it were the bank's (M+1)-th.
        chunk: how many pairs to take at a time; memory is a few ``[chunk, M]`` matrices.

    Returns:
        Float ``[N]``, ≤ 0, same dtype.

    Raises:
        ValueError: the two are not of one shape.
    """
    _require_pairs(image, text)
    bank, own = _bank_and_own(len(image), bank, image.device)
    bank_image, bank_text = image[bank], text[bank]
    # What each bank image has to choose from among the bank's texts, and each bank text among its images.
    of_images, of_texts = logsumexps(bank_image, bank_text, temperature, chunk)
    scores = []
    for one_image, one_text, one_own in zip(
        torch.split(image, chunk), torch.split(text, chunk), torch.split(own, chunk), strict=True
    ):
        own_logit = (one_image * one_text).sum(dim=1) / temperature
        image_logits = without_own(one_image @ bank_text.T / temperature, one_own)
        text_logits = without_own(one_text @ bank_image.T / temperature, one_own)
        # A probability is the logistic function of its logit against the others', which tells the surest pairs apart.
        log_p = logsigmoid(own_logit - image_logits.logsumexp(dim=1))
        log_r = logsigmoid(own_logit - text_logits.logsumexp(dim=1))
        outside = one_own < 0
        on_image = (image_logits - _with_newcomer(of_texts, image_logits, outside)).logsumexp(dim=1)
        on_text = (text_logits - _with_newcomer(of_images, text_logits, outside)).logsumexp(dim=1)
        scores.append(log_p + log_r + logsigmoid(log_r - on_image) + logsigmoid(log_p - on_text))
    return torch.cat(scores)


def _require_pairs(image: Tensor, text: Tensor) -> None:
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            f"image and text must be of one shape, one row a pair: {list(image.shape)} and {list(text.shape)}"
        )


def _bank_and_own(size: int, bank: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """The bank's rows, and for every pair its place in the bank or −1."""
    if bank is None:
        bank = torch.arange(size, device=device)
    own = torch.full((size,), -1, device=device)
    own[bank] = torch.arange(len(bank), device=device)
    return bank, own


def _with_newcomer(total: Tensor, logits: Tensor, outside: Tensor) -> Tensor:
    """The logsumexp of each bank member's choices: ``total`` over the bank, and the scored pair if it is not in it."""
    return torch.where(outside[:, None], torch.logaddexp(total[None, :], logits), total[None, :])


def _nearest_others(points: Tensor, neighbours: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Similarity to and index of the most similar other rows, both ``[N, min(neighbours, N − 1)]``."""
    if neighbours < 1:
        raise ValueError(f"at least one neighbour is needed: {neighbours}")
    count = min(neighbours, max(len(points) - 1, 0))
    values, indices = [], []
    for start in range(0, len(points), chunk):
        similarity = points[start : start + chunk] @ points.T
        similarity.diagonal(start).fill_(-torch.inf)
        nearest = similarity.topk(count, dim=1)
        values.append(nearest.values)
        indices.append(nearest.indices)
    return torch.cat(values), torch.cat(indices)


def _neighbour_discrepancy(other: Tensor, similarity: Tensor, near: Tensor, distance: Tensor, chunk: int) -> Tensor:
    """LEMoN's s_n, with ``other`` the texts of pairs whose images are near; or s_m, the other way round."""
    if not near.numel():
        return torch.zeros_like(distance)
    means = []
    for rows, close, index in zip(
        torch.split(other, chunk), torch.split(similarity, chunk), torch.split(near, chunk), strict=True
    ):
        apart = 1 - torch.einsum("id,ikd->ik", rows, other[index])
        weight = torch.exp(-LEMON_TAU_1 * (1 - close) - LEMON_TAU_2 * distance[index])
        means.append((weight * apart).mean(dim=1))
    return torch.cat(means)
