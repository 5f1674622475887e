"""Known noise: a copy of a corpus in which some pairs are made wrong on purpose, and the truth about them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
from numpy.typing import NDArray

from noisyclean.corpus.donors import NoiseProtocol, choose_noise, known_pairs
from noisyclean.corpus.exchange import Gift, check_target, write_copy
from noisyclean.corpus.locate import ShardSpec, find_shards
from noisyclean.corpus.parallel import default_workers
from noisyclean.corpus.survey import Corpus, survey
from noisyclean.corpus.truth import RANDOM, TRUE_KINDS, known_truth
from noisyclean.errors import UsageError
from noisyclean.files import local_place
from noisyclean.progress import SILENT, Progress

if TYPE_CHECKING:
    import pandas as pd

PLANTED_KIND: dict[NoiseProtocol, str] = {
    "caption": RANDOM,
    "image": RANDOM,
    "hard": "hard",
    "uninformative": "uninformative",
}


def corrupt(
    shards: ShardSpec,
    out: Path | str,
    *,
    rate: float,
    protocol: NoiseProtocol = "caption",
    seed: int = 0,
    workers: int | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Copy ``shards`` to the folder ``out``, making round(``rate`` × readable pairs) of the pairs wrong.

    Protocols:
        caption: a random choice of the pairs pass their captions on among themselves.
        image: images are passed on instead; all pairs that share one (byte for byte) get the same other one.
        hard: a pair gets a copy of one of the ``HARD_CHOICES`` captions nearest to its own by TF-IDF.
        uninformative: the caption becomes one that says nothing ("IMG_2034.JPG", "click to enlarge").

    A planted pair is always one that the corpus itself nowhere shows: another caption of the same image, or the same
    caption from elsewhere, would be no mismatch. Where passing on cannot achieve that, the pair gets a copy from any
    other pair; where nothing fits, it stays as it is and does not count, and ``progress`` is told.

    Readable means an image and a caption in the shard; nothing is decoded. Other samples are copied as they are, and
    the truth calls them "unreadable" (and matched, for want of anything better). Where a ``truth.parquet`` of an
    earlier corruption or of a synthetic corpus lies beside the shards, untouched pairs keep what it says of them and
    noise is planted in, and taken from, pairs of ``TRUE_KINDS`` only, so that a planted pair is wrong in one way only.

    Keys, members and their order are kept, and the same arguments give the same bytes, however many workers there
    are. Shards are written uncompressed, with extensions in lower case; members that the reader passes over (no key,
    or over ``MAX_MEMBER_BYTES``) and what lies after damage are left out. The sidecars ``NNNNN.parquet`` and
    ``NNNNN_stats.json`` are not copied: they repeat captions and sizes, and would contradict the shards.

    Memory: about 1 kB a pair, and for ``hard`` the captions' text besides. Disk: besides the copy, what is passed on
    is held once more while the work lasts.

    Returns:
        ``out/truth.parquet``: one row a sample in the order of the shards, with ``shard``, ``key``, ``matched``,
        ``kind`` ("match", "random", "hard", "uninformative", "unreadable", or as in the earlier truth),
        ``donor_shard`` and ``donor_key`` (where the caption or image came from; null for none).

    Raises:
        UsageError: a rate outside 0 to 1, an unknown protocol, no such shards, or an ``out`` that holds shards.
        NoisycleanError: a shard cannot be opened, or changes while it is read.
    """
    found, out = find_shards(shards), local_place(out)
    if not 0 <= rate <= 1:
        raise UsageError(f"rate must be 0 to 1, the share of pairs to make wrong, not {rate}")
    if protocol not in get_args(NoiseProtocol):
        raise UsageError(f"{protocol}: no such noise protocol; there are {', '.join(get_args(NoiseProtocol))}")
    check_target(found, out)
    workers = workers or default_workers()
    corpus = survey(found, with_text=protocol == "hard", workers=workers, progress=progress)
    truth = known_truth(corpus)
    rows = _candidates(corpus, truth)
    captions, images = corpus.captions[rows].tolist(), corpus.images[rows].tolist()
    known = known_pairs(corpus.captions[corpus.usable].tolist(), corpus.images[corpus.usable].tolist())
    wanted = round(rate * int(corpus.usable.sum()))

    texts = [corpus.texts[row] for row in rows] if corpus.texts else []
    rng, count = np.random.default_rng(seed), min(wanted, len(rows))
    chosen, gifts = choose_noise(captions, images, texts, protocol, count, rng, known, progress)
    planted = rows[np.array(chosen, int)]
    given: NDArray[np.int64] | list[str]
    if protocol == "uninformative":
        given = [str(caption) for caption in gifts]
        truth.loc[planted, ["donor_shard", "donor_key"]] = None
    else:
        given = rows[np.array(gifts, int)]
        truth.loc[planted, ["donor_shard", "donor_key"]] = truth.loc[given, ["shard", "key"]].to_numpy()
    truth.loc[planted, "matched"] = False
    truth.loc[planted, "kind"] = PLANTED_KIND[protocol]
    if len(planted) < wanted:
        progress.say(f"{len(planted):,} pairs were made wrong, not {wanted:,}: no others could be")
    gift: Gift = "image" if protocol == "image" else "caption"
    return write_copy(
        corpus, out, truth, gift=gift, recipients=planted, given=given, workers=workers, progress=progress
    )


def _candidates(corpus: Corpus, truth: pd.DataFrame) -> NDArray[np.int64]:
    """The rows of the pairs that noise may be planted in, in the order of (shard, key)."""
    eligible = truth[truth["kind"].isin(TRUE_KINDS).to_numpy() & corpus.usable]
    # By name, not by place, so that a shard's inner order has no say in who is chosen.
    return eligible.sort_values(["shard", "key"]).index.to_numpy(np.int64)
