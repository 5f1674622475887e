"""Who gets whose caption or picture when noise is planted: pure functions of hashes, which touch no shard.

A pair is its place in the lists ``captions`` and ``images`` of hashes (:mod:`noisyclean.corpus.identity`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from noisyclean.corpus.identity import caption_id
from noisyclean.progress import SILENT, Progress

DonorProtocol: TypeAlias = Literal["caption", "image", "hard"]
"""The protocols that pass on what other pairs have."""

NoiseProtocol: TypeAlias = Literal[DonorProtocol, "uninformative"]

TRIES = 200
"""How many swaps, or donors, are tried before a pair is left as it is."""

HARD_CHOICES = 5
"""A hard caption is drawn among so many of the most similar ones: always the nearest would be guessable."""

HARD_LIMIT = 0.9
"""A caption with a higher cosine is passed over: it may well be true of the image too."""

HARD_POOL = 100_000
"""At most so many captions, a random choice of them, are searched for near neighbours: the cost is pairs × pool."""

_SIMILARITIES_AT_ONCE = 8_000_000  # a sparse block of them takes 100 MB at the very most


def known_pairs(captions: Iterable[int], images: Iterable[int]) -> set[int]:
    """What a corpus shows together, one hash a pair; a planted pair is never one of these."""
    return {image ^ caption for caption, image in zip(captions, images, strict=True)}


def choose_noise(
    captions: Sequence[int],
    images: Sequence[int],
    texts: Sequence[str],
    protocol: NoiseProtocol,
    count: int,
    rng: np.random.Generator,
    known: set[int],
    progress: Progress = SILENT,
) -> tuple[list[int], list[int] | list[str]]:
    """Which pairs to make wrong, and what each gets: the number of a donor, or with ``uninformative`` a caption.

    Args:
        count: at most the number of pairs; for the others see :func:`choose_donors`.
    """
    if protocol == "uninformative":
        chosen = rng.permutation(len(images))[:count].tolist()
        return chosen, uninformative_captions(count, rng, lambda i, caption: is_new(caption, images[chosen[i]], known))
    donors = choose_donors(captions, images, texts, protocol, count, rng, known, progress)
    return list(donors), list(donors.values())


def choose_donors(
    captions: Sequence[int],
    images: Sequence[int],
    texts: Sequence[str],
    protocol: DonorProtocol,
    count: int,
    rng: np.random.Generator,
    known: set[int],
    progress: Progress = SILENT,
) -> dict[int, int]:
    """Recipient → donor, for ``count`` recipients where possible, else for fewer.

    Protocols:
        caption: a random choice of the pairs pass their captions on among themselves.
        image: images are passed on instead; all pairs that share one get the same other one.
        hard: a pair gets one of the ``HARD_CHOICES`` captions nearest to its own by TF-IDF.

    No recipient gets what ``known`` (see :func:`known_pairs`) shows together with what it keeps. Where passing on
    cannot achieve that, it gets a copy from any other pair; where nothing fits, it is left out.

    Args:
        captions: a hash for each pair; ``images`` likewise.
        texts: the captions themselves; needed for ``hard`` only, may be empty otherwise.
    """
    pairs = _Pairs(captions, images, texts, known)
    if count == 0:
        return {}
    if protocol == "hard":
        return _near_neighbours(pairs, count, rng, progress)
    return (_pass_images_on if protocol == "image" else _pass_captions_on)(pairs, count, rng)


def uninformative_captions(
    count: int, rng: np.random.Generator, fits: Callable[[int, str], bool] = lambda _number, _caption: True
) -> list[str]:
    """So many captions that say nothing; number i is one of which ``fits(i, caption)`` holds."""
    from noisyclean.corpus.synthetic.captions import write_nothing

    captions = []
    for number in range(count):
        caption = write_nothing(rng)
        while not fits(number, caption):
            caption = write_nothing(rng)
        captions.append(caption)
    return captions


def is_new(caption: str, image: int, known: set[int]) -> bool:
    """Whether the corpus nowhere shows this caption with the image of this hash."""
    return image ^ caption_id(caption) not in known


class _Pairs:
    """The pairs that noise may be planted in."""

    def __init__(self, captions: Sequence[int], images: Sequence[int], texts: Sequence[str], known: set[int]) -> None:
        self.captions = captions
        self.images = images
        self.texts = texts
        self._known = known

    def __len__(self) -> int:
        return len(self.captions)

    def wrong(self, *, image: int, caption: int) -> bool:
        """Whether the corpus nowhere shows these two (hashes) together."""
        return image ^ caption not in self._known


def _pass_captions_on(pairs: _Pairs, count: int, rng: np.random.Generator) -> dict[int, int]:
    def fits(recipient: int, donor: int) -> bool:
        return pairs.wrong(image=pairs.images[recipient], caption=pairs.captions[donor])

    everyone = np.arange(len(pairs))
    return _pass_on(rng.permutation(everyone)[:count], everyone, fits, rng)


def _pass_images_on(pairs: _Pairs, count: int, rng: np.random.Generator) -> dict[int, int]:
    sharing: dict[int, list[int]] = {}
    for pair, image in enumerate(pairs.images):
        sharing.setdefault(image, []).append(pair)
    groups = {members[0]: members for members in sharing.values()}  # known by their first pair

    def fits(recipient: int, donor: int) -> bool:
        image = pairs.images[donor]
        return all(pairs.wrong(image=image, caption=pairs.captions[pair]) for pair in groups[recipient])

    everyone = np.array(list(groups))
    chosen = []
    for group in rng.permutation(everyone).tolist():
        if len(groups[group]) <= count:
            chosen.append(group)
            count -= len(groups[group])
    donors = _pass_on(np.array(chosen, np.int64), everyone, fits, rng)
    return {pair: donor for group, donor in donors.items() for pair in groups[group]}


def _pass_on(
    chosen: NDArray[np.int64],
    everyone: NDArray[np.int64],
    fits: Callable[[int, int], bool],
    rng: np.random.Generator,
) -> dict[int, int]:
    """Recipient → donor: each of ``chosen`` (in random order) gets the next one's, save where that does not fit.

    Two that can thereby be mended swap their donors; else the recipient gets a copy from any of ``everyone``.
    """
    recipients = chosen.tolist()
    donors = recipients[1:] + recipients[:1]
    unserved = set()
    for here, recipient in enumerate(recipients):
        if fits(recipient, donors[here]):
            continue
        for there in _some(len(recipients), rng):
            if fits(recipient, donors[there]) and fits(recipients[there], donors[here]):
                donors[here], donors[there] = donors[there], donors[here]
                break
        else:
            copied = next((one for one in everyone[_some(len(everyone), rng)].tolist() if fits(recipient, one)), None)
            if copied is None:
                unserved.add(recipient)
            else:
                donors[here] = copied
    return {one: donor for one, donor in zip(recipients, donors, strict=True) if one not in unserved}


def _some(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Different numbers under ``count`` in random order, at most ``TRIES``."""
    return rng.choice(count, min(count, TRIES), replace=False)


def _near_neighbours(pairs: _Pairs, count: int, rng: np.random.Generator, progress: Progress) -> dict[int, int]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    order = rng.permutation(len(pairs))
    distinct = {pairs.captions[pair]: pair for pair in order.tolist()}
    pool = np.array(list(distinct.values())[:HARD_POOL], np.int64)
    vectoriser = TfidfVectorizer(token_pattern=r"\w+", dtype=np.float32)
    try:
        pool_vectors = vectoriser.fit_transform(pairs.texts[pair] for pair in pool).T.tocsr()
    except ValueError:  # not one word in all the captions
        return {}
    at_once = max(1, _SIMILARITIES_AT_ONCE // len(pool))
    donors: dict[int, int] = {}
    with progress.task("finding near captions", count, "pairs") as task:
        # Through all pairs if need be: some captions have no near neighbour.
        for start in range(0, len(order), at_once):
            recipients = order[start : start + at_once].tolist()
            similarities = vectoriser.transform(pairs.texts[pair] for pair in recipients) @ pool_vectors
            for row, recipient in enumerate(recipients):
                span = slice(*similarities.indptr[row : row + 2])
                near = _nearest(similarities.data[span], pool[similarities.indices[span]])
                image = pairs.images[recipient]
                choices = list(
                    islice((one for one in near if pairs.wrong(image=image, caption=pairs.captions[one])), HARD_CHOICES)
                )
                if choices:
                    donors[recipient] = choices[rng.integers(len(choices))]
                    task.advance()
                if len(donors) == count:
                    return donors
    return donors


def _nearest(similarities: NDArray[np.float32], pairs: NDArray[np.int64]) -> list[int]:
    """The most similar pairs under ``HARD_LIMIT``, the nearest first, at most ``TRIES``."""
    under = similarities <= HARD_LIMIT
    similarities, pairs = similarities[under], pairs[under]
    if len(pairs) > TRIES:
        top = np.argpartition(-similarities, TRIES)[:TRIES]
        similarities, pairs = similarities[top], pairs[top]
    nearest: list[int] = pairs[np.lexsort((pairs, -similarities))].tolist()
    return nearest
