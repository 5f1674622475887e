"""Noise index files: mismatches as the noisy-correspondence field plants and exchanges them, one ``.npy`` a noise rate.

A benchmark has numbered images and, in a fixed order, several captions of each (five in Flickr30K and COCO, one in
CC152K). The file is a one-dimensional integer array of image numbers, in one of two forms:

- *by caption*, one entry a caption: the image it is paired with (NCR and those after it);
- *by image*, one entry an image: the image that all its captions are paired with (DECL, RCL).

A pair is a mismatch where the number is not its own image's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from noisyclean.corpus.exchange import check_target, write_copy
from noisyclean.corpus.locate import ShardSpec, find_shards
from noisyclean.corpus.parallel import default_workers
from noisyclean.corpus.survey import IMAGE_INDEX, Corpus, survey
from noisyclean.corpus.truth import RANDOM, known_truth
from noisyclean.errors import UsageError
from noisyclean.files import local_place, replacing
from noisyclean.progress import SILENT, Progress

Level: TypeAlias = Literal["caption", "image"]


def make_index(
    captions_per_image: int, images: int, rate: float, level: Level = "caption", seed: int = 0
) -> NDArray[np.int64]:
    """An index by caption of the kind the field uses: a random share ``rate`` permuted at random.

    Levels:
        caption: captions are permuted one by one.
        image: images are, so that the captions of one stay together.

    As in the field, a permutation may leave some where they were; what is wrong in the end may be a little less.

    Returns:
        (images × captions_per_image,) image numbers.

    Raises:
        UsageError: a rate outside 0 to 1, or no such level.
    """
    if not 0 <= rate <= 1:
        raise UsageError(f"rate must be 0 to 1, the share to permute, not {rate}")
    if level not in get_args(Level):
        raise UsageError(f"{level}: no such level; there are {', '.join(get_args(Level))}")
    rng = np.random.default_rng(seed)
    index = np.arange(images, dtype=np.int64)
    if level == "caption":
        index = index.repeat(captions_per_image)
    chosen = rng.permutation(len(index))[: round(rate * len(index))]
    index[chosen] = rng.permutation(index[chosen])
    return index if level == "caption" else index.repeat(captions_per_image)


def write_index(path: Path | str, index: ArrayLike) -> None:
    """Write an index file."""
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        np.save(file, np.asarray(index, np.int64))


def read_index(path: Path | str) -> NDArray[np.int64]:
    """Read an index file, by caption or by image.

    Raises:
        UsageError: there is no such file, or it is no one-dimensional array of integers.
    """
    try:
        index = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such noise index file") from error
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path}: not a .npy file of numbers ({error})") from error
    if not isinstance(index, np.ndarray) or index.ndim != 1 or index.dtype.kind not in "iu":
        found = f"{index.dtype} of shape {index.shape}" if isinstance(index, np.ndarray) else "several arrays"
        raise UsageError(f"{path}: a noise index is a one-dimensional array of image numbers, this is {found}")
    return index.astype(np.int64)


def apply_index(
    shards: ShardSpec,
    out: Path | str,
    index: Path | str | NDArray[np.int64],
    *,
    workers: int | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Copy ``shards`` to the folder ``out``, the n-th pair with the picture of image ``index[n]``.

    The shards are those that ``convert`` wrote, whole: each json states its image's number as ``image_index``. Where
    none does, every sample counts as an image of its own. An index by image is taken as well. Captions stay where
    they are. A pair that is given an image which could not be had loses its own and is unreadable; one that had none
    gets one. Otherwise the copy is as :func:`noisyclean.corpus.noise.corrupt` makes it.

    Returns:
        ``out/truth.parquet``, as ``corrupt`` writes it: ``matched`` where the index names the pair's own image; the
        donor is the first pair of the image given.

    Raises:
        UsageError: an index that does not fit the shards, shards that hold planted noise already, no such shards, or
            an ``out`` that holds shards.
        NoisycleanError: a shard cannot be opened, or changes while it is read.
    """
    found, out = find_shards(shards), local_place(out)
    check_target(found, out)
    source = str(index) if isinstance(index, str | Path) else "the noise index"
    index = read_index(index) if isinstance(index, str | Path) else index
    workers = workers or default_workers()
    corpus = survey(found, with_text=False, workers=workers, progress=progress)
    truth = known_truth(corpus)
    if not truth["matched"].all():
        raise UsageError(f"{found[0]}: noise was planted here already; apply {source} to the shards before that")
    own, first = _own_images(corpus)
    chosen = _by_caption(index, source, own, len(first))

    recipients = np.flatnonzero(chosen != own)
    donors = first[chosen[recipients]]
    readable = corpus.captioned[recipients] & corpus.pictured[donors]
    truth.loc[recipients[~readable], "kind"] = "unreadable"
    wrong, given = recipients[readable], donors[readable]
    truth.loc[wrong, "matched"] = False
    truth.loc[wrong, "kind"] = RANDOM
    truth.loc[wrong, ["donor_shard", "donor_key"]] = truth.loc[given, ["shard", "key"]].to_numpy()
    return write_copy(
        corpus, out, truth, gift="image", recipients=recipients, given=donors, workers=workers, progress=progress
    )


def _own_images(corpus: Corpus) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each sample's image, and each image's first sample, of those that have it if any has."""
    own, stated = corpus.image_index, corpus.image_index >= 0
    if not stated.any():
        own = np.arange(len(corpus.keys))
    elif not stated.all():
        row = int(np.flatnonzero(~stated)[0])
        shard = corpus.shards[int(np.searchsorted(corpus.starts, row, side="right")) - 1]
        raise UsageError(
            f"{shard}: {corpus.keys[row]} has no {IMAGE_INDEX} in its json, as other samples have; "
            "name the shards of one `noisyclean convert` only"
        )
    order = np.argsort(~corpus.pictured, kind="stable")
    numbers, at = np.unique(own[order], return_index=True)
    if not np.array_equal(numbers, np.arange(len(numbers))):
        raise UsageError(
            f"{corpus.shards[0]}: the shards have images up to number {numbers[-1]:,}, but only "
            f"{len(numbers):,} of them; name all shards that `noisyclean convert` wrote"
        )
    return own, order[at]


def _by_caption(index: NDArray[np.int64], source: str, own: NDArray[np.int64], images: int) -> NDArray[np.int64]:
    if len(index) not in (len(own), images):
        raise UsageError(
            f"{source}: has {len(index):,} entries, but the shards hold {len(own):,} pairs of {images:,} images; "
            "convert the split that the index was made for"
        )
    if len(index) and not 0 <= index.min() <= index.max() < images:
        raise UsageError(
            f"{source}: names images {index.min():,} to {index.max():,}, but the shards hold {images:,} "
            f"(0 to {images - 1:,}); convert the split that the index was made for"
        )
    return index if len(index) == len(own) else index[own]
