"""A corpus for the bench: decoded once, part of it kept for retrieval, noise planted in the rest in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from noisyclean.corpus.donors import NoiseProtocol, choose_noise, known_pairs
from noisyclean.corpus.identity import caption_id
from noisyclean.corpus.index import index_corpus
from noisyclean.corpus.locate import Shard
from noisyclean.corpus.noise import PLANTED_KIND
from noisyclean.corpus.source import MemorySource, StreamSource
from noisyclean.corpus.survey import survey
from noisyclean.corpus.truth import RANDOM, TRUE_KINDS, known_truth
from noisyclean.encoders import Preprocessor
from noisyclean.errors import NoisycleanError
from noisyclean.progress import SILENT, Progress

TEST_SHARE, MOST_TEST_IMAGES = 0.1, 1000
VALIDATION_SHARE, MOST_VALIDATION_IMAGES = 0.03, 300
MIN_PAIRS = 200
"""With fewer there is nothing to compare."""


@dataclass(frozen=True)
class PlantedCorpus:
    """A corpus with known noise.

    Attributes:
        source: the pairs, mismatched ones among them.
        rows: (R,) int64 rows of the index that are trained on and scored.
        matched: (N,) bool over the index, the truth.
        headline: (N,) bool, whether the pair counts in figures: true pairs and mismatches at random (or, if the noise
            is of another kind, those of this kind).
    """

    source: MemorySource
    rows: NDArray[np.int64]
    matched: NDArray[np.bool_]
    headline: NDArray[np.bool_]


class BenchCorpus:
    """A corpus whose pairs are, to the best of anyone's knowledge, true; decoded for one encoder.

    Attributes:
        test, validation: (R,) int64 rows kept from training, for retrieval: true pairs, all captions of an image.
    """

    def __init__(self, shards: Sequence[Shard], preprocessor: Preprocessor, *, workers: int) -> None:
        """Read and decode the shards.

        Raises:
            NoisycleanError: a shard cannot be opened, there are fewer than ``MIN_PAIRS`` pairs, or too few pictures.
        """
        index = index_corpus(shards, workers=workers)
        usable = np.flatnonzero(index.usable)
        if len(usable) < MIN_PAIRS:
            raise NoisycleanError(f"{len(usable)} readable pairs in {shards[0]} …; a bench needs {MIN_PAIRS}")
        self._preprocessor = preprocessor
        self._source = MemorySource(StreamSource(index, preprocessor, workers=workers))
        surveyed = survey(list(shards), with_text=True, workers=workers, progress=SILENT)
        self._texts = surveyed.texts
        self._kinds = known_truth(surveyed)["kind"].to_numpy(object)
        true = usable[np.isin(self._kinds[usable], TRUE_KINDS)]
        # By the picture's hash, so that all captions of an image stay together and the choice is the same in all runs.
        images = np.unique(index.image[true])
        images = images[np.argsort(_mixed(images), kind="stable")]
        tested = min(int(len(images) * TEST_SHARE), MOST_TEST_IMAGES)
        validated = min(int(len(images) * VALIDATION_SHARE), MOST_VALIDATION_IMAGES)
        if not validated:
            raise NoisycleanError(
                f"{len(images)} different pictures in {shards[0]} …: too few to keep some of them for retrieval"
            )
        self.test = true[np.isin(index.image[true], images[:tested])]
        self.validation = true[np.isin(index.image[true], images[tested : tested + validated])]
        kept = np.isin(index.image, images[: tested + validated])
        self._rows = usable[~kept[usable]]

    @property
    def source(self) -> MemorySource:
        """The corpus as it is."""
        return self._source

    def fingerprint(self) -> str:
        """A digest of what the pairs are."""
        return self._source.index.fingerprint()

    def plant(self, protocol: NoiseProtocol, rate: float, seed: int, *, progress: Progress = SILENT) -> PlantedCorpus:
        """Make round(``rate`` × pairs) of the pairs wrong, as ``noisyclean corrupt`` does, but in memory."""
        index = self._source.index
        kinds = self._kinds.copy()
        rows = self._rows
        eligible = rows[np.isin(kinds[rows], TRUE_KINDS)]
        rng = np.random.default_rng(seed)
        captions, images = index.caption, index.image
        known = known_pairs(captions[index.usable].tolist(), images[index.usable].tolist())
        count = min(round(rate * len(rows)), len(eligible))
        chosen, given = choose_noise(
            captions[eligible].tolist(),
            images[eligible].tolist(),
            [self._texts[row] for row in eligible] if protocol == "hard" else [],
            protocol,
            count,
            rng,
            known,
            progress,
        )
        planted = eligible[np.array(chosen, int)]
        source = self._source
        if protocol == "uninformative":
            written = [str(caption) for caption in given]
            ids = np.array([caption_id(caption) for caption in written], np.int64)
            if count:
                source = source.with_captions(planted, ids, self._preprocessor.tokens(written))
        else:
            change = source.with_pictures_of if protocol == "image" else source.with_captions_of
            source = change(planted, eligible[np.array(given, int)])
        kinds[planted] = PLANTED_KIND[protocol]
        counted = {*TRUE_KINDS, RANDOM if protocol in {"caption", "image"} else PLANTED_KIND[protocol]}
        return PlantedCorpus(source, rows, np.isin(kinds, TRUE_KINDS), np.isin(kinds, list(counted)))


def _mixed(hashes: NDArray[np.int64]) -> NDArray[np.uint64]:
    # Folds and hold-outs go by the hashes themselves; multiplying by an odd number makes an order apart from theirs.
    return hashes.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
